"""Reading a user's documents: .txt, .md, .py, .jsonl (also .gz, .zst, .json) and .parquet, local or remote."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import fsspec

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json")  # .json: as the paper's code names its JSON lines
SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet")
DAMAGED = "damaged file"


class BadRecordError(ValueError):
    """A document that cannot be read.

    Args:
        place: the file and the place in it.
        problem: what is wrong there.
        kind: the problem without its particulars, under which it is counted.
    """

    def __init__(self, place: str, problem: str, kind: str):
        super().__init__(place, problem, kind)
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.args[0]} {self.args[1]}"


def read_documents(
    files: Sequence[str],
    text_key: str = "text",
    on_bad: str = "error",
    counts: Counter | None = None,
    skipped: dict[str, str] | None = None,
) -> Iterator[str]:
    """The texts of the files, one after the other, without holding a file in memory.

    Args:
        text_key: field of JSON lines and column of parquet files that holds the text.
        on_bad: ``"error"`` raises :class:`BadRecordError` at the first unreadable record; ``"skip"`` passes over it
            (over the rest of the file, where the file itself is damaged).
        counts: gets ``documents``, ``empty`` and, per kind of bad record, ``skipped: <kind>``.
        skipped: gets the first bad record of every kind, as a message.

    Raises:
        OSError: when a remote file does not answer; such a file is not bad, and nothing of it may be missing.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f'on_bad must be "error" or "skip", got {on_bad!r}.')
    counts = Counter() if counts is None else counts
    skipped = {} if skipped is None else skipped
    for path in files:
        for text in _read_file(path, text_key):
            if isinstance(text, BadRecordError):
                if on_bad == "error":
                    raise text
                counts[f"skipped: {text.kind}"] += 1
                skipped.setdefault(text.kind, str(text))
            elif text:
                counts["documents"] += 1
                yield text
            else:
                counts["empty"] += 1


def _read_file(path: str, text_key: str) -> Iterator[str | BadRecordError]:
    try:
        if path.endswith(TEXT_SUFFIXES):
            with fsspec.open(path, "rt", encoding="utf-8", newline="") as file:
                yield file.read()
        elif path.endswith(".parquet"):
            yield from _read_parquet(path, text_key)
        else:
            yield from _read_jsonl(path, text_key)
    except UnicodeDecodeError as error:
        yield BadRecordError(path, f"is not UTF-8 text (byte {error.start}).", "not UTF-8 text")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield BadRecordError(path, f"cannot be read: {error}.", DAMAGED)
    except OSError as error:
        if "://" in path:
            raise OSError(f"{path} does not answer: {error!r}; run the command again to go on.") from error
        yield BadRecordError(path, f"cannot be read: {error}.", DAMAGED)


def _read_jsonl(path: str, text_key: str) -> Iterator[str | BadRecordError]:
    import zstandard

    try:
        # Bytes, so that one line that is not UTF-8 does not take the rest of the file with it.
        with fsspec.open(path, "rb") as raw:
            for number, line in enumerate(_lines(raw, path), start=1):
                if line.strip():
                    yield _text_of(line, f"{path} line {number}", text_key)
    except zstandard.ZstdError as error:
        yield BadRecordError(path, f"cannot be read: {error}.", DAMAGED)


def _lines(raw: IO[bytes], path: str) -> Iterable[bytes]:
    if path.endswith(".zst"):
        return _zstd_lines(raw)
    return gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw


def _zstd_lines(raw: IO[bytes]) -> Iterator[bytes]:
    """Lines of a zstd file of any number of frames; zstandard's own reader takes a file cut short for a whole one."""
    import zstandard

    frame, rest = None, b""
    while data := raw.read(2**20):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            rest += frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
        *lines, rest = rest.split(b"\n")
        yield from lines
    if frame is not None:
        raise EOFError("the compressed file ends in the middle of its data")
    if rest:
        yield rest


def _text_of(line: bytes, place: str, text_key: str) -> str | BadRecordError:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return BadRecordError(place, "is not UTF-8 text.", "not UTF-8 text")
    except json.JSONDecodeError as error:
        return BadRecordError(place, f"is not valid JSON ({error.msg}, column {error.colno}).", "not valid JSON")
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        return BadRecordError(
            place, f"has no text field {text_key!r} (found: {fields}); name it with --text-key.", "no text field"
        )
    try:
        record[text_key].encode()
    except UnicodeEncodeError as error:
        return BadRecordError(
            place, f"holds half of a surrogate pair (character {error.start} of its text).", "not UTF-8 text"
        )
    return record[text_key]


def _read_parquet(path: str, text_key: str) -> Iterator[str | BadRecordError]:
    import pyarrow
    import pyarrow.parquet

    try:
        with fsspec.open(path, "rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            if text_key not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                yield BadRecordError(
                    path, f"has no column {text_key!r} (found: {columns}); name it with --text-key.", "no text column"
                )
                return
            kind = file.schema_arrow.field(text_key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                yield BadRecordError(
                    path,
                    f"holds {kind}, not text, in its column {text_key!r}; name another with --text-key.",
                    "no text column",
                )
                return
            for batch in file.iter_batches(columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except pyarrow.ArrowException as error:
        yield BadRecordError(path, f"is not a readable parquet file: {error}.", DAMAGED)


def split_text(text: str, max_characters: int | None) -> Iterator[str]:
    """Pieces of at most ``max_characters``, cut behind a line break where there is one, else in front of a space.

    Byte-level tokenizers begin a new token there anyway, so that the pieces' tokens are the whole text's.
    """
    start = 0
    while max_characters is not None and len(text) - start > max_characters:
        end = start + max_characters
        cut = text.rfind("\n", start, end) + 1 or text.rfind(" ", start + 1, end)
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    yield text[start:]
