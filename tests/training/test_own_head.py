"""The head of docs/training.md, in a file of its own as a reader would write it, through the commands."""

import json
import re
import sys
from pathlib import Path

import pytest
import tiny
from test_run import recipe, workspace  # noqa: F401

from calm import CalmConfig, CalmForCausalLM, Head, HeadConfig, register_head
from calm.checkpoints.loading import load_model
from calm.checkpoints.reference import save_reference
from calm.cli import main as cli
from calm.models.heads import registry
from calm.training.loop.metrics_log import read_metrics

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"
MODEL = {"backbone": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}}


@pytest.fixture
def head_file(tmp_path):
    """The file of the guide; what it registers is forgotten afterwards."""
    (code,) = re.findall(r"```python\n(# gaussian_head\.py\n.*?)```", GUIDE.read_text(), re.DOTALL)
    path, known = tmp_path / "gaussian_head.py", list(sys.path)
    path.write_text(code)
    yield path
    registry._registered.pop("gaussian", None)
    sys.modules.pop("gaussian_head", None)
    sys.path[:] = known


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["calm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_a_head_in_one_file_trains_writes_scores_and_is_saved(workspace, head_file, monkeypatch, capsys):  # noqa: F811
    model = MODEL | {
        "autoencoder": str(workspace / "autoencoder"), "head": {"type": "gaussian", "num_samples": 3},
        "decoded_brier_weight": 0.1,
    }  # fmt: skip
    path, output = workspace / "gaussian.yaml", workspace / "gaussian"
    path.write_text(recipe(workspace, "calm", "gaussian", model, max_steps=12).to_yaml())
    code, _, error = run(monkeypatch, capsys, "train", path)
    assert code == 2
    assert "head_config.type must be one of energy" in error
    assert "--import MODULE" in error

    given = ("--import", head_file)
    assert run(monkeypatch, capsys, "train", path, *given)[0] == 0
    records = [record for record in read_metrics(output) if "loss" in record]
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[0]["decoded_brier"] is not None  # the loss returns its samples, so that they can be decoded
    code, text, _ = run(monkeypatch, capsys, "info", output, *given, "--json")
    assert code == 0
    assert json.loads(text)["inference_flops_per_token"]["head"] > 0
    arguments = ("generate", output, *given, "--prompt", "alpha", "--max-new-tokens", "9", "--temperature", "0.5")
    first = run(monkeypatch, capsys, *arguments)
    assert first[1].startswith("alpha")
    assert first == run(monkeypatch, capsys, *arguments)
    code, text, _ = run(
        monkeypatch, capsys, "evaluate", output, *given, "--data", workspace / "validation", "--block-size", "32",
        "--blocks", "2", "--samples", "2",
    )  # fmt: skip
    assert code == 0
    assert "BrierLM" in text


def test_a_model_whose_head_is_not_registered_is_refused_in_words(workspace, head_file, tmp_path):  # noqa: F811
    sys.path.insert(0, str(head_file.parent))
    import gaussian_head  # noqa: F401

    config = CalmConfig(
        autoencoder_config=tiny.autoencoder_config(), backbone_config=tiny.backbone(), head_config={"type": "gaussian"}
    )
    model = CalmForCausalLM(config)
    assert "GaussianHead" in model._no_split_modules
    model.save_pretrained(tmp_path / "model")
    assert type(CalmForCausalLM.from_pretrained(tmp_path / "model").head) is type(model.head)
    with pytest.raises(
        ValueError, match="the reference implementation has no gaussian head, only energy, diffusion, fl"
    ):
        save_reference(model, tmp_path / "reference")
    registry._registered.pop("gaussian")
    with pytest.raises(ValueError, match=r"must be one of energy.*got 'gaussian'.*calm COMMAND --import MODULE"):
        load_model(tmp_path / "model")


def test_a_head_without_a_name_or_with_a_taken_one_is_refused():
    class Nameless(Head):
        config_class = HeadConfig

    class Config(HeadConfig):
        model_type = "second_energy_head"
        type: str = "energy"

    class SecondEnergyHead(Head):
        config_class = Config

    with pytest.raises(ValueError, match="Nameless cannot be registered: set config_class to a HeadConfig whose"):
        register_head(Nameless)
    with pytest.raises(ValueError, match="a head of type 'energy' is registered already"):
        register_head(SecondEnergyHead)


def test_a_categorical_head_cannot_be_converted_either(tmp_path):
    with pytest.raises(ValueError, match="the reference implementation has no categorical_flow head"):
        save_reference(tiny.calm(type="categorical_flow"), tmp_path / "reference")
