import gzip
import json
import tracemalloc
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from calm.data.documents import BadRecordError, read_documents, split_text
from calm.data.sources import find_sources, unread_summary
from calm.data.tokenizer import train_tokenizer

TEXTS = ["first text", "zweiter Text: ä", "third\nwith a line break"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def read(*sources, **options):
    return list(read_documents([file.path for file in find_sources(sources)], **options))


def test_every_format_gives_the_same_texts(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(LINES))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "d.parquet")
    first, *others = LINES.splitlines(keepends=True)
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.compress(first) + zstandard.compress(b"".join(others)))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.jsonl.zst"):
        assert read(tmp_path / name) == TEXTS, name


def test_folders_are_searched_in_a_fixed_order_and_other_files_passed_over(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "sub" / "c.py").write_text("three")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == ["one", "two", "three"]


def test_a_corrupt_line_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(LINES + b'{"text": "cut\n')
    with pytest.raises(BadRecordError, match=r"bad\.jsonl line 4 is not valid JSON"):
        read(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(LINES + b'{"text": 3}')
    with pytest.raises(BadRecordError, match=r"line 4 holds a int in field 'text', where a text must be"):
        read(tmp_path / "bad.jsonl")


def test_bad_records_are_counted_and_skipped_on_request(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'not json\n{"text": "good"}\n{"body": "no text"}\n{"text": "\xff"}\n{"text": ""}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"latin-1 \xe4")
    counts, first = Counter(), {}
    assert read(tmp_path, on_bad="skip", counts=counts, skipped=first) == ["good"]
    assert set(first) == {"not valid JSON", "no text field", "not UTF-8 text"}
    assert "line 1 is not valid JSON" in first["not valid JSON"]
    assert "line 3 has no text field 'text' (found: body)" in first["no text field"]
    assert "line 4 is not UTF-8" in first["not UTF-8 text"]
    assert counts["skipped: not UTF-8 text"] == 2  # and b.txt
    assert counts["empty"] == 1


@pytest.mark.parametrize(
    ("name", "whole"),
    [("a.jsonl.gz", gzip.compress(LINES * 99)), ("a.jsonl.zst", zstandard.compress(LINES * 99))],
    ids=["gz", "zst"],
)
def test_a_truncated_archive_is_named(tmp_path, name, whole):
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRecordError, match=r"a\.jsonl.* "):
        read(tmp_path / name)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(BadRecordError, match=r"a\.parquet is not a readable parquet file"):
        read(tmp_path / "a.parquet")


def test_damage_that_only_shows_later_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "half a pair: \\ud800"}\n')
    with pytest.raises(BadRecordError, match=r"a\.jsonl line 1 holds half of a surrogate pair \(character 13"):
        read(tmp_path / "a.jsonl")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2, 0]}), tmp_path / "b.parquet")
    with pytest.raises(BadRecordError, match=r"b\.parquet holds int64, not text, in its column 'text'"):
        read(tmp_path / "b.parquet")
    whole = bytearray(gzip.compress(LINES * 99))
    for place in range(20, len(whole) - 8):
        damaged = whole.copy()
        damaged[place] ^= 0xFF
        (tmp_path / "c.jsonl.gz").write_bytes(damaged)
        with pytest.raises(BadRecordError, match=r"c\.jsonl\.gz"):
            read(tmp_path / "c.jsonl.gz")


def test_a_missing_column_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(BadRecordError, match=r"no column 'text' \(found: body\); name it with --text-key"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_key="body") == TEXTS


def test_missing_empty_and_unknown_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        find_sources([tmp_path / "nothing.txt"])
    with pytest.raises(ValueError, match="no documents in"):
        find_sources([tmp_path])
    (tmp_path / "a.docx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*a\.docx: documents are \.txt"):
        find_sources([tmp_path / "a.docx"])


def test_suffixes_are_known_in_every_spelling(tmp_path):
    line = b'{"text": "hello"}\n'
    for name, data in {
        "c4.00000.json.gz": gzip.compress(line), "a.json.zst": zstandard.compress(line), "b.ndjson": line,
        "b.ndjson.gz": gzip.compress(line), "C.JSONL": line, "D.TXT": b"hello", "e.txt.gz": gzip.compress(b"hello"),
        "f.md.zst": zstandard.compress(b"hello"), "G.JsonL.GZ": gzip.compress(line),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == ["hello"], name
    assert len(read(tmp_path)) == 9


def test_the_files_of_a_folder_that_are_not_read_are_named(tmp_path):
    for name in ("a.txt", "b.csv", "c.CSV", "noext", ".hidden", "d.jsonl.xz"):
        (tmp_path / name).write_bytes(b"x")
    unread = []
    find_sources([tmp_path], unread=unread)
    assert sorted(name.rpartition("/")[2] for name in unread) == ["b.csv", "c.CSV", "d.jsonl.xz", "noext"]
    assert unread_summary(unread)["count"] == 4
    assert unread_summary(unread)["suffixes"] == {".csv": 2, ".xz": 1, "none": 1}


def test_a_local_name_is_never_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Pod::Usage.txt").write_text("a synopsis")
    (tmp_path / "Pod").write_text("something else")
    (tmp_path / "memory::a.jsonl").write_text('{"text": "a memo"}')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a table"]}), tmp_path / "zip::b.parquet")
    assert read("Pod::Usage.txt") == ["a synopsis"]
    assert read(".") == ["a synopsis", "a memo", "a table"]


def test_what_a_file_expands_to_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("calm.data.documents.MAX_EXPANDED_BYTES", 2**20)
    long_line = json.dumps({"text": "a" * 2**26}).encode() + b"\n"
    for name, data in {
        "a.jsonl.zst": zstandard.compress(LINES + long_line + LINES),
        "b.jsonl.gz": gzip.compress(LINES + long_line + LINES),
        "c.jsonl": LINES + long_line + LINES,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        del data
        counts, skipped = Counter(), {}
        tracemalloc.start()
        assert read(tmp_path / name, on_bad="skip", counts=counts, skipped=skipped) == TEXTS * 2
        assert tracemalloc.get_traced_memory()[1] < 2**26  # a step of zstd expands to 16 MiB
        tracemalloc.stop()
        assert list(skipped) == ["more than 1 MiB"]
        assert "line 4 holds more than 1 MiB in one document" in skipped["more than 1 MiB"]
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"a" * 2**21))
    with pytest.raises(BadRecordError, match="holds more than 1 MiB"):
        read(tmp_path / "d.txt.gz")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a" * 2**24]}), tmp_path / "e.parquet", compression="zstd", use_dictionary=False
    )
    with pytest.raises(BadRecordError, match="expands to more than 500 times its size"):
        read(tmp_path / "e.parquet")


def test_names_in_messages_are_short_and_printable(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({f"field {i} \ud83d": 0 for i in range(5000)}))
    with pytest.raises(BadRecordError, match="has no text field") as error:
        read(tmp_path / "a.jsonl")
    assert len(str(error.value)) < 2000
    str(error.value).encode()


def test_pieces_of_code_have_the_tokens_of_the_whole():
    code = "".join(f"def f{i}(x):\n    y = x + {i}  # note\n\n\treturn y;\n\n\n" for i in range(60))
    tokenizer = train_tokenizer([code], 380)
    ids = tokenizer(code)["input_ids"]
    for size in range(100, 500, 13):
        pieces = list(split_text(code, size))
        assert "".join(pieces) == code
        assert [token for piece in pieces for token in tokenizer(piece)["input_ids"]] == ids, size
