"""`calm convert`, and the other commands on what it reads and writes."""

import json
import subprocess
import sys
import venv

import golden
import pytest
import torch

from calm.checkpoints.loading import load_model
from calm.cli import main as cli
from calm.data.tokenizer import load_tokenizer, save_for_transformers_4, tokenizer_hash, train_tokenizer

CHECKPOINT = golden.DATA / "checkpoint_k4"


def run(monkeypatch, capsys, *arguments):
    """Exit code, output and error output of a command."""
    monkeypatch.setattr(sys, "argv", ["calm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_a_released_checkpoint_is_converted_and_back(tmp_path, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "convert", CHECKPOINT / "energy", tmp_path / "ours")
    assert code == 0
    assert "no tokenizer beside it" in out
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "calm-lm"
    assert (tmp_path / "ours" / "model.safetensors").exists()
    code, _, _ = run(monkeypatch, capsys, "convert", tmp_path / "ours", tmp_path / "back", "--to", "reference")
    assert code == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["ae_path"] == str(
        tmp_path / "back" / "autoencoder"
    )
    before, after = (
        torch.load(path / "pytorch_model.bin", weights_only=True) for path in (CHECKPOINT / "energy", tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours"]


def test_the_autoencoder_tokenizer_and_dtype_can_be_given(tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(["some text of some length " * 50], 260)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code, out, _ = run(
        monkeypatch, capsys, "convert", CHECKPOINT / "energy", tmp_path / "ours", "--dtype", "bfloat16",
        "--tokenizer", tmp_path / "tokenizer", "--autoencoder", CHECKPOINT / "autoencoder",
    )  # fmt: skip
    assert code == 0
    assert "no tokenizer" not in out
    assert (tmp_path / "ours" / "tokenizer.json").exists()
    assert load_model(tmp_path / "ours").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (CHECKPOINT / "energy", ("--dtype", "int8"), "dtype must be one of auto, float32, bfloat16, float16, got"),
        (CHECKPOINT / "energy", ("--tokenizer", "no/such/dir"), "no tokenizer at no/such/dir"),
        ("no/such/model", (), "no model at no/such/model"),
        (golden.DATA / "brier" / "ar", (), "holds a LlamaForCausalLM: only autoencoders and CALMs"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, monkeypatch, capsys, source, arguments, message):
    code, _, error = run(monkeypatch, capsys, "convert", source, tmp_path / "new", *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    code, _, error = run(monkeypatch, capsys, "convert", CHECKPOINT / "energy", tmp_path)
    assert (code, (tmp_path / "file").read_text()) == (2, "mine")
    assert "is there already" in error


TEXT = "some text of some length, and <|pad|> more: 漢字"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def reference_directory(tmp_path, monkeypatch, capsys):
    """A model and tokenizer in the reference's layout, and the tokenizer they were converted from."""
    tokenizer = train_tokenizer(["some text of some length, and more " * 50], 270)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run(monkeypatch, capsys, "convert", CHECKPOINT / "energy", tmp_path / "ours")
    code, _, _ = run(
        monkeypatch, capsys, "convert", tmp_path / "ours", tmp_path / "reference", "--to", "reference",
        "--tokenizer", tmp_path / "tokenizer",
    )  # fmt: skip
    assert code == 0
    return tmp_path / "reference", tokenizer


def test_a_tokenizer_for_the_reference_has_its_transformers_spelling(reference_directory):
    directory, tokenizer = reference_directory
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == TEMPLATE
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    assert merges
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)
    assert tokenizer_hash(load_tokenizer(directory)) == tokenizer_hash(tokenizer)


def test_a_merge_with_a_space_within_is_not_written_for_the_reference(tmp_path):
    tokenizer = train_tokenizer(["some text of some length " * 50], 262)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] |= {"a b": 262, "a bc": 263}
    state["model"]["merges"].append(["a b", "c"])
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    with pytest.raises(ValueError, match="has a space within"):
        save_for_transformers_4(tokenizer, tmp_path)


@pytest.mark.slow
def test_the_references_transformers_loads_the_tokenizer(reference_directory, tmp_path):
    """In an environment of its own, with the version that the reference pins."""
    directory, tokenizer = reference_directory
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "transformers==4.43.*", "jinja2"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip cannot install transformers 4.43 here: {installed.stderr.strip().splitlines()[-1]}")
    code = f"""
import json
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(directory)!r})
text = tokenizer.apply_chat_template([{{"role": "user", "content": "a"}}], tokenize=False)
ids = tokenizer({TEXT!r})["input_ids"]
print(json.dumps([ids, tokenizer.decode(ids), tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer), text]))
"""
    done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = tokenizer(TEXT)["input_ids"]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        ids, tokenizer.decode(ids), tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer), "<user>a",
    ]  # fmt: skip
