"""Reading a user's documents: .txt, .md, .py, .jsonl (also .gz, .zst, .json) and .parquet, local or remote."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import fsspec

from calm.data.text import half_character

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json")  # .json: as the paper's code names its JSON lines
SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet")
DAMAGED = "damaged file"
_Parse = Callable[[dict[str, Any], str], Any]


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
    counts = Counter() if counts is None else counts
    for text in _good(files, text_key, on_bad, counts, {} if skipped is None else skipped):
        counts["documents" if text else "empty"] += 1
        if text:
            yield text


def read_records(
    files: Sequence[str],
    parse: _Parse,
    on_bad: str = "error",
    counts: Counter | None = None,
    skipped: dict[str, str] | None = None,
) -> Iterator[Any]:
    """What ``parse(record, place)`` makes of every JSON line and every row of parquet; the rest as for documents.

    Args:
        parse: gets a record and where it stands; returns a :class:`BadRecordError` for a bad one.
    """
    counts = Counter() if counts is None else counts
    for parsed in _good(files, parse, on_bad, counts, {} if skipped is None else skipped):
        counts["records"] += 1
        yield parsed


def _good(files: Sequence[str], of: str | _Parse, on_bad: str, counts: Counter, skipped: dict[str, str]) -> Iterator:
    if on_bad not in ("error", "skip"):
        raise ValueError(f'on_bad must be "error" or "skip", got {on_bad!r}.')
    for path in files:
        for found in _read_file(path, of):
            if not isinstance(found, BadRecordError):
                yield found
                continue
            if on_bad == "error":
                raise found
            counts[f"skipped: {found.kind}"] += 1
            skipped.setdefault(found.kind, str(found))


def _read_file(path: str, of: str | _Parse) -> Iterator:
    """Texts of the field ``of``, or what ``of`` makes of the records; and what is wrong with others."""
    try:
        if path.endswith(TEXT_SUFFIXES) and callable(of):
            yield BadRecordError(path, "holds no records: give .jsonl (.gz, .zst) or .parquet files.", DAMAGED)
        elif path.endswith(TEXT_SUFFIXES):
            with fsspec.open(path, "rt", encoding="utf-8", newline="") as file:
                yield file.read()
        elif path.endswith(".parquet"):
            yield from _read_parquet(path, of)
        else:
            yield from _read_jsonl(path, of)
    except UnicodeDecodeError as error:
        yield BadRecordError(path, f"is not UTF-8 text (byte {error.start}).", "not UTF-8 text")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield BadRecordError(path, f"cannot be read: {error}.", DAMAGED)
    except OSError as error:
        if "://" in path:
            raise OSError(f"{path} does not answer: {error!r}; run the command again to go on.") from error
        yield BadRecordError(path, f"cannot be read: {error}.", DAMAGED)


def _read_jsonl(path: str, of: str | _Parse) -> Iterator:
    import zstandard

    try:
        # Bytes, so that one line that is not UTF-8 does not take the rest of the file with it.
        with fsspec.open(path, "rb") as raw:
            for number, line in enumerate(_lines(raw, path), start=1):
                if line.strip():
                    place = f"{path} line {number}"
                    record: Any = _record(line, place)
                    if isinstance(record, dict):
                        record = of(record, place) if callable(of) else _text_of(record, place, of)
                    yield record
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


def _record(line: bytes, place: str) -> dict | BadRecordError:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return BadRecordError(place, "is not UTF-8 text.", "not UTF-8 text")
    except json.JSONDecodeError as error:
        return BadRecordError(place, f"is not valid JSON ({error.msg}, column {error.colno}).", "not valid JSON")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        return BadRecordError(place, f"cannot be read as JSON ({error}).", "not valid JSON")
    if isinstance(record, dict):
        return record
    return BadRecordError(place, f"is no record of named fields, but {type(record).__name__}.", "no text field")


def _text_of(record: dict, place: str, text_key: str) -> str | BadRecordError:
    if text_key in record and not isinstance(record[text_key], str):
        given = f"holds a {type(record[text_key]).__name__} in field {text_key!r}, where a text must be."
        return BadRecordError(place, given, "no text in the text field")
    if text_key not in record:
        return BadRecordError(
            place,
            f"has no text field {text_key!r} (found: {', '.join(record)}); name it with --text-key.",
            "no text field",
        )
    half = half_character(record[text_key])
    if half is not None:
        return BadRecordError(
            place, f"holds half of a surrogate pair (character {half} of its text).", "not UTF-8 text"
        )
    return record[text_key]


def _read_parquet(path: str, of: str | _Parse) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    try:
        with fsspec.open(path, "rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            if callable(of):
                for number, row in enumerate(row for batch in file.iter_batches() for row in batch.to_pylist()):
                    yield of(row, f"{path} row {number}")
                return
            if of not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                yield BadRecordError(
                    path, f"has no column {of!r} (found: {columns}); name it with --text-key.", "no text column"
                )
                return
            kind = file.schema_arrow.field(of).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                yield BadRecordError(
                    path,
                    f"holds {kind}, not text, in its column {of!r}; name another with --text-key.",
                    "no text column",
                )
                return
            for batch in file.iter_batches(columns=[of]):
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
