"""`calm convert`, and the other commands on what it reads and writes."""

import json
import sys

import golden
import pytest
import torch

from calm.cli import main as cli
from calm.data.tokenizer import train_tokenizer
from calm.models.loading import load_model

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
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "calm"
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
