"""The embedded corpus: text that people wrote, no file in both splits, no split that is about one file."""

import json
import string
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from calm.cli.main import app
from calm.data.corpus import (
    MAX_FILE_SHARE,
    cap_documents,
    corpus_size,
    embedded_corpus,
    literal_share,
    stdlib_documents,
    write_embedded_corpus,
)

TABLE = "decoding = (\n" + "    '\\x00'  # a character\n" * 200 + ")\n"
CODE = '''
def compare(first, second):
    """Return whether both sequences are equal.

    A long text that people wrote, which is no table although it is a string literal of the module's syntax tree.
    """
    for left, right in zip(first, second):
        if left != right:
            return False
    return len(first) == len(second)
'''


@pytest.fixture(scope="module")
def splits():
    return embedded_corpus()


def test_a_table_is_recognised_by_its_literals():
    assert literal_share(CODE) < 0.05
    assert literal_share("topics = {'a': r'''" + CODE + "'''}\n") > 0.9
    assert literal_share("numbers = " + repr(list(range(1000)))) > 0.9
    assert literal_share("names = {curses.KEY_A1: 'ka1', curses.KEY_A3: 'ka3', -1: None}") > 0.8
    assert literal_share("calls = [function(item) for item in items]") == 0
    assert literal_share("no python:") == 1


def test_generated_tables_and_copies_are_left_out():
    documents = dict(stdlib_documents())
    assert not {"pydoc_data/topics.py", "encodings/cp437.py", "html/entities.py", "stringprep.py"} & set(documents)
    assert not any("/test/" in f"/{path}" or "_sysconfigdata" in path for path in documents)
    assert {"argparse.py", "json/decoder.py", "_pydecimal.py"} <= set(documents)
    # The codecs of Asian languages are one text with different names in it.
    assert len({"encodings/big5.py", "encodings/gbk.py", "encodings/johab.py"} & set(documents)) == 1


def test_no_file_is_in_both_splits_and_none_dominates_one(splits):
    paths = {split: {path for path, _ in documents} for split, documents in splits.items()}
    assert not paths["train"] & paths["validation"]
    for documents in splits.values():
        assert corpus_size(documents).largest_share <= MAX_FILE_SHARE
        assert len({text for _, text in documents}) == len(documents)


def test_both_splits_have_enough_text(splits):
    num_characters = {split: corpus_size(documents).num_characters for split, documents in splits.items()}
    assert num_characters["validation"] > 300_000
    assert num_characters["train"] > 0.85 * sum(len(text) for _, text in stdlib_documents())


def test_a_capped_document_ends_with_a_line_and_begins_as_before():
    documents = [(letter, f"{letter}\n" * 100) for letter in string.ascii_letters] + [("large", "a long line\n" * 5000)]
    capped = dict(cap_documents(documents))
    assert all(capped[path] == text for path, text in documents[:-1])
    assert capped["large"].endswith("a long line\n")
    assert 150 < len(capped["large"]) <= MAX_FILE_SHARE * sum(map(len, capped.values()))
    with pytest.raises(ValueError, match="2 usable files for one split of the corpus; 50 are needed"):
        cap_documents(documents[:2])


def test_the_embedded_corpus_replaces_nothing(tmp_path):
    (tmp_path / "validation.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"validation.jsonl exists and has other content"):
        write_embedded_corpus(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["validation.jsonl"]
    (tmp_path / "validation.jsonl").unlink()
    assert write_embedded_corpus(tmp_path) == write_embedded_corpus(tmp_path)  # the same again


def test_the_command_writes_both_splits_in_a_fixed_order_and_prints_their_sizes(tmp_path, splits):
    result = CliRunner().invoke(app, ["corpus", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for split, documents in splits.items():
        lines = (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [(record["path"], record["text"]) for record in map(json.loads, lines)] == documents
        files = [path for path, _ in documents if "/" not in path]
        assert all(before < after for before, after in pairwise(files))
        assert f"{len(documents)} documents" in result.output
