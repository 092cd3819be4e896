import copy
import json
import re
import subprocess
import sys
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.utils.data import DataLoader

from calm.data import pipeline
from calm.data.blocks import TokenBlocks, read_manifest
from calm.data.checksums import check_checksums, file_checksums
from calm.data.conversations import ConversationBlocks, prepare_conversations
from calm.data.corpus import write_embedded_corpus
from calm.data.pipeline import Executor
from calm.data.prepare import prepare
from calm.data.tokenizer import (
    END_TOKEN,
    MAX_WORD_CHARACTERS,
    _without_long_words,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from calm.utils.files import only_writer, staged_directory
from calm.workflows.quickstart import run_quickstart

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


def test_a_directory_has_one_writer_at_a_time(tokenizer, source, tmp_path, monkeypatch):
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "response": "b"}')
    writers = {
        "data": lambda path: prepare([source], tokenizer, path),
        "chats": lambda path: prepare_conversations([tmp_path / "chats.jsonl"], tokenizer, path),
        "corpus": write_embedded_corpus,
        "tokenizer": lambda path: staged_directory(path).__enter__(),
        "quickstart": lambda path: run_quickstart(path, 1, 0, "cpu", None),
    }
    for name, write in writers.items():
        with only_writer(tmp_path / name), pytest.raises(ValueError, match="another process is writing"):
            write(tmp_path / name)
        assert not (tmp_path / name).exists()
        assert not list(tmp_path.glob(".*.lock"))
    monkeypatch.chdir(tmp_path)
    with only_writer("data"), pytest.raises(ValueError, match="another process is writing"):
        prepare([source], tokenizer, tmp_path / "data")


def test_a_link_and_what_it_leads_to_have_one_writer(tokenizer, source, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    for held, other in (("link", "data"), ("data", "link")):
        with only_writer(tmp_path / held), pytest.raises(ValueError, match="another process is writing"):
            prepare([source], tokenizer, tmp_path / other)
    manifest = prepare([source], tokenizer, tmp_path / "link")
    assert read_manifest(tmp_path / "data") == manifest
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("separator", ["eos", "bos"])
def test_a_block_belongs_to_the_document_with_most_of_its_tokens(tokenizer, tmp_path, separator):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<|pad|>"  # any token beside the end-of-text token
    for name, lengths in (("a", (30, 3, 3, 70)), ("b", (1, 45, 2))):
        documents = (json.dumps({"text": letter * length}) for letter, length in zip("wxyz", lengths, strict=False))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(documents))
    prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tokenizer, tmp_path / "data", separator=separator)
    blocks = TokenBlocks(tmp_path / "data", 8)
    ids = torch.cat([block["input_ids"] for block in blocks]).tolist()
    mark, number, owners = {"eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}[separator], 0, []
    for token in ids:
        owners.append(number)
        number += token == mark
    expected = [Counter(owners[first : first + 8]).most_common(1)[0][0] for first in range(0, len(owners), 8)]
    assert len(set(expected)) > 3
    assert blocks.documents() == expected
    assert blocks.documents(3) == [expected[index] for index in blocks.spread(3)]


def test_workers_of_a_killed_preparation_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_WAIT_FOR_WORKERS", 0)
    (tmp_path / "work").mkdir()
    with FileLock(tmp_path / "work" / "00000.lock"), pytest.raises(ValueError, match="are still writing in"):
        pipeline.wait_for_workers(tmp_path)
    pipeline.wait_for_workers(tmp_path)


def test_an_output_may_be_named_like_an_address(tokenizer, source, tmp_path):
    manifest = prepare([source], tokenizer, tmp_path / "a::b" / "memory::c")
    assert read_manifest(tmp_path / "a::b" / "memory::c") == manifest


def test_a_document_that_spells_a_separator_is_one_document(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"END = '{END_TOKEN}'  # then <|pad|>"}) + "\n")
    prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "data")
    ids = np.fromfile(next((tmp_path / "data").glob("*.ds")), np.uint16).tolist()
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids[:-1]) == f"END = '{END_TOKEN}'  # then <|pad|>"


def test_tokens_that_were_replaced_do_not_have_their_checksums(tokenizer, source, tmp_path, monkeypatch):
    monkeypatch.setattr("calm.data.checksums.CHUNK_BYTES", 100)
    monkeypatch.setattr("calm.data.prepare.CHUNK_BYTES", 100)
    monkeypatch.setattr("calm.data.pipeline.file_checksums", lambda path: file_checksums(path, 100))
    path = tmp_path / "data"
    manifest = prepare([source], tokenizer, path)
    check_checksums(path, manifest)
    file = path / manifest["files"][0]["name"]
    content = file.read_bytes()
    file.write_bytes(content[:500] + bytes(10) + content[510:])
    with pytest.raises(ValueError, match=r"shuffled\.ds does not have its checksum between bytes 500 and 600"):
        check_checksums(path, read_manifest(path), every_chunk=True)
    old = {name: value for name, value in manifest.items() if name not in ("files", "chunk_bytes")}
    old["files"] = [{"name": file.name, "num_tokens": manifest["num_tokens"]}]
    check_checksums(path, old)  # written by an earlier release


def test_an_id_beyond_the_vocabulary_is_named_in_one_line(tmp_path):
    write_blocks(tmp_path / "data", [64])
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 40}))
    blocks = TokenBlocks(tmp_path / "data", 8)
    message = r"\(block 5\) are damaged: token id 47, and the vocabulary has 40 tokens; run `calm prepare` again\."
    with pytest.raises(ValueError, match=message):
        blocks[5]
    loader = DataLoader(blocks, batch_size=8, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(ValueError, match=message) as error:
        list(loader)
    assert "\n" not in str(error.value)


def test_a_manifest_that_lacks_a_key_is_named(tmp_path):
    write_blocks(tmp_path / "data", [64])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: it has no 'tokenizer_sha256'"):
        read_manifest(tmp_path / "data")["tokenizer_sha256"]
    (tmp_path / "data" / "manifest.json").write_text("[" * 20000)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or cut short"):
        read_manifest(tmp_path / "data")


CHATS = {
    "a null beside another name": ({"prompt": "a", "response": None, "completion": "b"}, 1),
    "no messages": ({"messages": [], "prompt": "a", "response": "b"}, 1),
    "null messages": ({"messages": None, "prompt": "a", "response": "", "completion": "b"}, 1),
    "parts": ({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "c"}]},
        {"role": "assistant", "content": "b"}]}, 1),
    "null content": ({"messages": [
        {"role": "system", "content": None}, {"role": "assistant", "content": None}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}]}, 1),
    "a picture": ({"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
        {"role": "assistant", "content": "b"}]}, 0),
    "half a character": ({"messages": [
        {"role": "us\ud83d", "content": "a"}, {"role": "assistant", "content": "b"}]}, 0),
    "half a character elsewhere": ({"messages": [
        {"role": "user", "content": "a", "name": "\ud83d"}, {"role": "assistant", "content": "b"}]}, 0),
    "no list": ({"messages": {"role": "user"}}, 0),
    "only nulls": ({"messages": None, "prompt": None, "response": None}, 0),
}  # fmt: skip


def test_chats_are_read_as_tables_and_logs_have_them(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end_of_text|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    lines = [json.dumps(record) for record, _ in CHATS.values()]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    manifest = prepare_conversations([tmp_path / "c.jsonl"], tokenizer, tmp_path / "out", on_bad="skip")
    assert manifest["num_examples"] == sum(count for _, count in CHATS.values())
    assert sum(kind["count"] for kind in manifest["skipped"].values()) == sum(not count for _, count in CHATS.values())
    check_checksums(tmp_path / "out", manifest)
    (tmp_path / "out" / "lengths.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"lengths\.npy cannot be read"):
        ConversationBlocks(tmp_path / "out", 32)


def test_a_response_that_spells_an_end_of_text_does_not_end_there(tokenizer, tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "say it", "response": f"it is {END_TOKEN} of course"}))
    prepare_conversations([tmp_path / "c.jsonl"], tokenizer, tmp_path / "out")
    ids = np.fromfile(tmp_path / "out" / "examples.ds", np.uint16)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == f"say itit is {END_TOKEN} of course"


def test_a_tokenizer_is_trained_in_time_that_grows_with_its_text():
    """Words are divided: the time grows with the square of the longest one."""
    text = "ACGT" * 700 + " " * 3000 + "words and more"
    parts = list(_without_long_words(text))
    assert "".join(parts) == text
    assert max(len(word) for part in parts for word in re.findall(r"\S+|\s+", part)) == MAX_WORD_CHARACTERS
    assert list(_without_long_words("short words " * 1000)) == ["short words " * 1000]


@pytest.mark.parametrize("content", ["", "{}", "null", "[]", '{"model": null}', "[" * 20000])
def test_a_damaged_tokenizer_is_named_in_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match="tokenizer") as error:
            load_tokenizer(path)
        assert "\n" not in str(error.value)


def test_flipped_bits_in_a_tokenizer_end_in_one_line_or_in_none(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    for place in range(0, 1500, 97):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (tmp_path / "tokenizer.json").write_bytes(flipped)
        with suppress(ValueError):
            load_tokenizer(tmp_path)


def test_a_token_beyond_the_vocabulary_is_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["vocab"]["zz"] = 10**6
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="one has the id 1000000, beyond that vocabulary"):
        load_tokenizer(tmp_path)


def test_a_regular_expression_without_an_end_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("calm.data.tokenizer._PROBE_SECONDS", 3)
    tokenizer.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, state["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"a regular expression that takes more than|does not encode a short text"):
        load_tokenizer(tmp_path)
