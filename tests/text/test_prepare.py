import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from calm.data.blocks import TokenBlocks, read_manifest
from calm.data.pipeline import Executor
from calm.data.prepare import prepare
from calm.data.tokenizer import END_TOKEN, load_tokenizer, tokenizer_hash, train_tokenizer

DOCUMENTS = [
    f"document number {i}: the quick brown fox jumps over {i * i} lazy dogs\n" * (i % 5 + 1) for i in range(60)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def test_tokenizer_brings_back_any_text(tokenizer):
    text = "anything: äöü 漢字 \U0001f600\n\ttabs  and   spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token == END_TOKEN
    assert loaded.padding_side == "left"
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)


def test_tokenizers_are_told_apart(tokenizer):
    assert tokenizer_hash(train_tokenizer(DOCUMENTS, 301)) != tokenizer_hash(tokenizer)


def test_too_little_text_for_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"gives only \d+ tokens, not the 5000"):
        train_tokenizer(["short"], 5000)
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(["short"], 100)


def test_prepared_tokens_are_the_documents_with_separators(tokenizer, source, tmp_path):
    manifest = prepare([source], tokenizer, tmp_path / "data")
    blocks = TokenBlocks(tmp_path / "data", 1)
    ids = [int(blocks[i]["input_ids"]) for i in range(len(blocks))]
    assert manifest["num_tokens"] == len(ids)
    assert manifest["num_documents"] == len(DOCUMENTS)
    texts = tokenizer.decode(ids).split(END_TOKEN)
    assert texts.pop() == ""
    assert sorted(texts) == sorted(DOCUMENTS)
    assert texts != DOCUMENTS  # shuffled


def test_documents_can_be_separated_as_the_papers_are(tokenizer, source, tmp_path):
    with pytest.raises(ValueError, match="tokenizer has no bos token"):
        prepare([source], tokenizer, tmp_path / "data", separator="bos")
    with pytest.raises(ValueError, match="separator must be one of eos, bos, got 'newline'"):
        prepare([source], tokenizer, tmp_path / "data", separator="newline")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    prepare([source], tokenizer, tmp_path / "bos", separator="bos")
    eos = prepare([source], tokenizer, tmp_path / "eos")
    ids = TokenBlocks(tmp_path / "bos", eos["num_tokens"])[0]["input_ids"]
    expected = TokenBlocks(tmp_path / "eos", eos["num_tokens"])[0]["input_ids"]
    assert torch.equal(ids, expected.masked_fill(expected == tokenizer.eos_token_id, tokenizer.bos_token_id))


def test_preparing_twice_does_nothing_and_differently_is_refused(tokenizer, source, tmp_path):
    prepare([source], tokenizer, tmp_path / "data")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    prepare([source], tokenizer, tmp_path / "data")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    with pytest.raises(ValueError, match=r"prepared otherwise \(different: seed\)"):
        prepare([source], tokenizer, tmp_path / "data", seed=1)


def test_nothing_is_left_behind_by_a_failure(tokenizer, source, tmp_path):
    source.write_text(source.read_text() + "{broken\n")
    with pytest.raises(ValueError, match="line 61 is not valid JSON"):
        prepare([source], tokenizer, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl"]


def test_several_files_are_prepared_in_silence(tokenizer, source, tmp_path, capfd):
    (tmp_path / "more.txt").write_text("one more document")
    manifest = prepare([source, tmp_path / "more.txt"], tokenizer, tmp_path / "data", executor=Executor(workers=2))
    assert manifest["num_documents"] == len(DOCUMENTS) + 1
    assert len(manifest["files"]) == 2
    assert capfd.readouterr().err == ""


def test_skipped_records_stand_in_the_manifest(tokenizer, source, tmp_path):
    source.write_text(source.read_text() + "{broken\n")
    manifest = prepare([source], tokenizer, tmp_path / "data", on_bad="skip")
    assert manifest["num_documents"] == len(DOCUMENTS)
    assert manifest["skipped"]["not valid JSON"]["count"] == 1


def test_an_empty_corpus_is_refused(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no text in"):
        prepare([tmp_path / "empty.txt"], tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    (tmp_path / "empty.txt").write_text("no longer")
    assert prepare([tmp_path / "empty.txt"], tokenizer, tmp_path / "data")["num_documents"] == 1


def test_a_foreign_directory_is_not_touched(tokenizer, source, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty and holds no prepared data"):
        prepare([source], tokenizer, tmp_path / "data")
    assert (tmp_path / "data" / "thesis.txt").read_text() == "precious"


def write_blocks(path, lengths, token_bytes=2):
    """Prepared data whose tokens count up."""
    path.mkdir()
    start, files = 0, []
    for number, length in enumerate(lengths):
        np.arange(start, start + length, dtype={2: np.uint16, 4: np.uint32}[token_bytes]).tofile(path / f"{number}.ds")
        files.append({"name": f"{number}.ds", "num_tokens": length})
        start += length
    manifest = {"files": files, "token_bytes": token_bytes, "num_tokens": start, "vocab_size": start}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    write_blocks(tmp_path / "data", [8])
    (tmp_path / "data" / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or cut short"):
        TokenBlocks(tmp_path / "data", 4, 1)


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_blocks_are_consecutive_tokens_across_files(tmp_path, token_bytes):
    write_blocks(tmp_path / "data", [0, 6, 1, 0, 2, 13, 0, 1], token_bytes)
    blocks = TokenBlocks(tmp_path / "data", 4, patch_size=2)
    assert [block["input_ids"].tolist() for block in (blocks[i] for i in range(len(blocks)))] == [
        list(range(start, start + 4)) for start in range(0, 20, 4)
    ]
    assert torch.equal(blocks[3]["labels"], blocks[3]["input_ids"])
    assert [int(batch[0, 0]) for batch in blocks.batches(2, 1)] == [0, 8]
    with pytest.raises(IndexError):
        blocks[5]


def test_blocks_work_in_worker_processes(tmp_path):
    write_blocks(tmp_path / "data", [64])
    blocks = TokenBlocks(tmp_path / "data", 8)
    blocks[0]  # mapped here already
    loader = DataLoader(blocks, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert torch.cat([batch["input_ids"] for batch in loader]).flatten().tolist() == list(range(64))


def test_block_size_must_hold_whole_patches(tmp_path):
    write_blocks(tmp_path / "data", [64])
    with pytest.raises(ValueError, match="multiple of the patch size 4, got 10; nearest: 8"):
        TokenBlocks(tmp_path / "data", 10, patch_size=4)


def test_data_shorter_than_a_block_are_refused(tmp_path):
    write_blocks(tmp_path / "data", [64])
    with pytest.raises(ValueError, match="shorter than one block: 64 tokens, block_size 128"):
        TokenBlocks(tmp_path / "data", 128)


def test_damaged_data_are_named(tmp_path):
    write_blocks(tmp_path / "data", [64])
    with open(tmp_path / "data" / "0.ds", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"0\.ds holds 100 bytes instead of 128"):
        read_manifest(tmp_path / "data")
    (tmp_path / "data" / "0.ds").unlink()
    with pytest.raises(ValueError, match=r"0\.ds is missing"):
        read_manifest(tmp_path / "data")
    with pytest.raises(ValueError, match=r"manifest\.json is missing; `calm prepare` makes it"):
        read_manifest(tmp_path)


def test_data_modules_import_nothing_else_of_the_package():
    code = (
        "import sys; sys.path.insert(0, 'src'); import calm.data.blocks, calm.data.documents; "
        "print([m for m in sys.modules if m.startswith(('calm.training', 'calm.evaluation', 'datatrove'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
