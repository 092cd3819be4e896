"""Metrics: perplexity and bits per byte against probabilities computed directly, and a metric from outside."""

import json
import math
import sys

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import calm
from calm.cli.main import main
from calm.data.prepare import prepare
from calm.data.tokenizer import train_tokenizer
from calm.evaluation.likelihood import log_likelihoods
from calm.evaluation.metrics import registry
from calm.evaluation.metrics.registry import Metric, register_metric

TEXT = "the cat sat on the mät. one two three four five. " * 12
TOY = """
from calm import Metric, register_metric

@register_metric
class ContextLength(Metric):
    name = "context_length"
    columns = {"longest_context": "longest context"}
    digits = 0

    def supports(self, inputs):
        return inputs.kind == "token model"

    def compute(self, inputs):
        return {"longest_context": inputs.blocks.block_size}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Prepared text, and a token model, two CALMs and an autoencoder with the same tokenizer."""
    path = tmp_path_factory.mktemp("metrics")
    tokenizer = train_tokenizer([TEXT] * 3, 280)
    size = len(tokenizer)
    tokenizer.save_pretrained(path / "tokenizer")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    prepare([path / "text.txt"], tokenizer, path / "data")
    torch.manual_seed(0)
    models = {
        "token": LlamaForCausalLM(LlamaConfig(**tiny.backbone(vocab_size=size))),
        "flow": tiny.calm(2, "categorical_flow", vocab_size=size),
        "mtp": tiny.calm(2, vocab_size=size, token_prediction="autoregressive"),
        "autoencoder": tiny.autoencoder(2, vocab_size=size),
    }
    for name, model in models.items():
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    return path, models, tokenizer


def evaluate(path, *names, **settings):
    results = calm.evaluate([path / name for name in names], path / "data", block_size=32, num_samples=2, **settings)
    return list(results.values())


def test_perplexity_and_bits_per_byte_are_those_of_the_text(workspace):
    path, models, tokenizer = workspace
    blocks = [block["input_ids"] for block in calm.data.blocks.TokenBlocks(path / "data", 32, 2)]
    num_bytes = sum(len(tokenizer.decode(block[2:], skip_special_tokens=True).encode()) for block in blocks)
    num_tokens = 30 * len(blocks)
    token, flow = evaluate(path, "token", "flow")
    (mtp,) = evaluate(path, "mtp", samplers=["mtp"])
    with torch.no_grad():
        logits = models["token"](torch.stack(blocks)).logits[:, 1:-1].log_softmax(-1)
    expected = {"token": logits.gather(-1, torch.stack(blocks)[:, 2:, None]).double().sum().item()}
    for name, sampler in (("flow", "direct"), ("mtp", "mtp")):
        contexts, texts = [b[:2].tolist() for b in blocks], [b[2:].tolist() for b in blocks]
        expected[name] = sum(value for value, _ in log_likelihoods(models[name], contexts, texts, sampler))
    for name, result in (("token", token), ("flow", flow), ("mtp", mtp)):
        if math.isinf(expected[name]):
            assert result["metrics"] == {"perplexity": None, "bits_per_byte": None}
            continue
        assert result["metrics"]["perplexity"] == pytest.approx(math.exp(-expected[name] / num_tokens), rel=1e-4)
        assert result["metrics"]["bits_per_byte"] == pytest.approx(-expected[name] / math.log(2) / num_bytes, rel=1e-4)


def test_models_without_probabilities_have_no_perplexity(workspace):
    path, *_ = workspace
    results = evaluate(path, "mtp", "token", "autoencoder", temperatures=[0.5], num_candidates=8, num_blocks=2)
    results += evaluate(path, "mtp", num_blocks=2)
    assert [result["metrics"] for result in results] == [{}, {}, {}, {}]
    assert "token_accuracy_mean" in results[2]


def test_a_metric_of_ones_own_is_in_table_and_json(workspace, tmp_path, monkeypatch, capsys):
    path, *_ = workspace
    (tmp_path / "my_metric.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    arguments = ["evaluate", path / "token", path / "mtp", "--data", path / "data", "--block-size", 32, "--blocks", 2]
    arguments += ["--import", "my_metric", "--output", tmp_path / "scores.json"]
    monkeypatch.setattr(sys, "argv", ["calm", *map(str, arguments)])
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        registry._METRICS.pop("context_length", None)
        sys.modules.pop("my_metric", None)
    assert not end.value.code
    table = capsys.readouterr().out.split("Further metrics")[1]
    assert all(heading in table for heading in ("perplexity", "bits/byte", "longest context"))
    token, mtp = json.loads((tmp_path / "scores.json").read_text())["models"].values()
    assert list(token["metrics"]) == ["perplexity", "bits_per_byte", "longest_context"]
    assert token["metrics"]["longest_context"] == 32
    assert mtp["metrics"] == {}


def test_names_and_columns_of_metrics_are_unique():
    registry.all_metrics()
    with pytest.raises(ValueError, match="a metric named perplexity exists already"):
        register_metric(type("Other", (Metric,), {"name": "perplexity", "columns": {"other": "other"}}))
    with pytest.raises(ValueError, match="perplexity has the column perplexity already"):
        register_metric(type("Other", (Metric,), {"name": "other", "columns": {"perplexity": "p"}}))
    with pytest.raises(ValueError, match="needs a name and columns"):
        register_metric(type("Nameless", (Metric,), {}))


def test_evaluate_is_public_and_the_package_of_evaluation_stays(workspace):
    path, *_ = workspace
    (result,) = calm.evaluate(path / "token", path / "data", block_size=32, num_blocks=2).values()
    assert result["num_blocks"] == 2
    assert calm.evaluation.__name__ == "calm.evaluation"
    with pytest.raises(ValueError, match="protocol must be one of common, paper, got 'best'"):
        calm.evaluate(path / "token", path / "data", protocol="best")
