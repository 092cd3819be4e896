"""Reading a user's documents: text files, JSON lines (both also compressed) and parquet files, local or remote."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import fsspec

from calm.data.text import half_character

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")  # .json: JSON lines too, as C4, Dolma and the paper's code name them
COMPRESSIONS = (".gz", ".zst")
PARQUET_SUFFIXES = (".parquet",)
FORMATS = f"{', '.join((*TEXT_SUFFIXES, *JSONL_SUFFIXES))} (each also {' and '.join(COMPRESSIONS)}) and .parquet"
# A few kilobytes can expand to gigabytes. No document is near this long; text files that are not compressed may be.
MAX_EXPANDED_BYTES = 2**26
_READ_BYTES = 2**20
_ZSTD_INPUT_BYTES = 2**9  # at once: they expand to 16 MiB at most
_PARQUET_ROWS = 64
_MAX_EXPANSION = 500  # of a column of parquet
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


def suffixes_of(path: str) -> tuple[str, str]:
    """Return the format and the compression that a file name states, in lower case; "" where it states none.

    The format is one of ``TEXT_SUFFIXES``, ``JSONL_SUFFIXES`` and ``PARQUET_SUFFIXES``.
    """
    name = path.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    formats = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *(() if compression else PARQUET_SUFFIXES))
    return next((suffix for suffix in formats if name.endswith(suffix)), ""), compression


def is_readable(path: str) -> bool:
    """Whether a file has the name of a format that is read."""
    return suffixes_of(path)[0] != ""


def field_names(record: dict) -> str:
    """Return the names of a record's fields for a message, which may be many, long and no UTF-8 text."""
    names = ", ".join(str(name)[:40] for name in list(record)[:20]) + (", ..." if len(record) > 20 else "")
    return names.encode("utf-8", "backslashreplace").decode()


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
    import zstandard

    kind, compression = suffixes_of(path)
    try:
        if kind in TEXT_SUFFIXES and callable(of):
            yield BadRecordError(path, "holds no records: give .jsonl (.gz, .zst) or .parquet files.", DAMAGED)
        elif kind in TEXT_SUFFIXES:
            with _open(path) as raw:
                yield _read_text(raw, path, compression)
        elif kind in PARQUET_SUFFIXES:
            yield from _read_parquet(path, of)
        else:
            yield from _read_jsonl(path, of, compression)
    except zstandard.ZstdError as error:
        yield BadRecordError(path, f"cannot be read: {error}.", DAMAGED)
    except UnicodeDecodeError as error:
        yield BadRecordError(path, f"is not UTF-8 text (byte {error.start}).", "not UTF-8 text")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield BadRecordError(path, f"cannot be read: {error}.", DAMAGED)
    except OSError as error:
        if "://" in path:
            raise OSError(f"{path} does not answer: {error!r}; run the command again to go on.") from error
        yield BadRecordError(path, f"cannot be read: {error}.", DAMAGED)


def _open(path: str) -> IO[bytes]:
    """Open a file for reading; a local name is never read as an address, such as ``a::b`` would be."""
    return fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")


def _read_text(raw: IO[bytes], path: str, compression: str) -> str | BadRecordError:
    if not compression:
        return raw.read().decode("utf-8")
    data = bytearray()
    for chunk in _chunks(raw, compression):
        data += chunk
        if len(data) > MAX_EXPANDED_BYTES:
            return _too_long(path)
    return data.decode("utf-8")


def _too_long(place: str) -> BadRecordError:
    limit = f"{MAX_EXPANDED_BYTES // 2**20} MiB"
    return BadRecordError(place, f"holds more than {limit} in one document: divide it.", f"more than {limit}")


def _read_jsonl(path: str, of: str | _Parse, compression: str) -> Iterator:
    # Bytes, so that one line that is not UTF-8 does not take the rest of the file with it.
    with _open(path) as raw:
        for number, line in enumerate(_lines(_chunks(raw, compression)), start=1):
            place = f"{path} line {number}"
            if line is None:
                yield _too_long(place)
            elif line.strip():
                record: Any = _record(line, place)
                if isinstance(record, dict):
                    record = of(record, place) if callable(of) else _text_of(record, place, of)
                yield record


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines of a file; None for one of more than MAX_EXPANDED_BYTES, which is passed over without being stored."""
    line, too_long = bytearray(), False
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            too_long = too_long or len(line) + len(end) > MAX_EXPANDED_BYTES
            yield None if too_long else bytes(line) + end
            line, too_long = bytearray(), False
        too_long = too_long or len(line) + len(rest) > MAX_EXPANDED_BYTES
        if too_long:
            line = bytearray()
        else:
            line += rest
    if line or too_long:
        yield None if too_long else bytes(line)


def _chunks(raw: IO[bytes], compression: str) -> Iterator[bytes]:
    """The content of a file in pieces of bounded size, whatever it expands to."""
    if compression == ".zst":
        return _zstd_chunks(raw)
    stream = gzip.GzipFile(fileobj=raw) if compression == ".gz" else raw
    return iter(lambda: stream.read(_READ_BYTES), b"")


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    """Pieces of a zstd file of any number of frames; zstandard's own reader takes a file cut short for a whole one."""
    import zstandard

    frame = None
    while block := raw.read(_READ_BYTES):
        for start in range(0, len(block), _ZSTD_INPUT_BYTES):
            data = block[start : start + _ZSTD_INPUT_BYTES]
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                expanded = frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
                if expanded:
                    yield expanded
    if frame is not None:
        raise EOFError("the compressed file ends in the middle of its data")


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
            f"has no text field {text_key!r} (found: {field_names(record)}); name it with --text-key.",
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
        with _open(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            if (group := _expanding_group(file.metadata)) is not None:
                limit = f"{MAX_EXPANDED_BYTES // 2**20} MiB"
                yield BadRecordError(
                    path,
                    f"expands to more than {_MAX_EXPANSION} times its size and {limit} (row group {group}): write it "
                    "again in smaller row groups.",
                    f"more than {limit}",
                )
                return
            if callable(of):
                batches = file.iter_batches(batch_size=_PARQUET_ROWS)
                for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
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
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[of]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except pyarrow.ArrowException as error:
        yield BadRecordError(path, f"is not a readable parquet file: {error}.", DAMAGED)


def _expanding_group(metadata: Any) -> int | None:
    """Return the first row group that expands as no text does; pages of parquet are unpacked as a whole."""
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            sizes = metadata.row_group(group).column(column)
            if sizes.total_uncompressed_size > max(MAX_EXPANDED_BYTES, _MAX_EXPANSION * sizes.total_compressed_size):
                return group
    return None


# Places where byte-level tokenizers (of GPT-2, Llama 3, Qwen and others) begin a new token in every text: after a
# single line break, and before a space, if a word follows. Longer white space is one token, but for its last space.
_LINE_BEGINS = re.compile(r"(?<=\S\n)(?=\w)|(?<=\s)(?= \S)")
_WORD_BEGINS = re.compile(r"(?= \S)")


def split_text(text: str, max_characters: int | None) -> Iterator[str]:
    """Yield pieces of at most ``max_characters``, cut where a line begins or, where none does, before a word.

    The tokens of the pieces are those of the whole text for byte-level tokenizers. The exception is a text that has no
    such place in ``max_characters``: it is cut anywhere.
    """
    start = 0
    while max_characters is not None and len(text) - start > max_characters:
        end = start + max_characters
        cuts = (_last(pattern, text, start + 1, end) for pattern in (_LINE_BEGINS, _WORD_BEGINS))
        end = next(filter(None, cuts), end)
        yield text[start:end]
        start = end
    yield text[start:]


def _last(pattern: re.Pattern, text: str, start: int, end: int) -> int | None:
    """Return the last place from start to end, inclusive, where an empty match is; the pattern looks at neighbours."""
    place = None
    for match in pattern.finditer(text, start, min(end + 2, len(text))):
        if match.start() <= end:
            place = match.start()
    return place
