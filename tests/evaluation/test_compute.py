"""Parameters and FLOPs against the paper's table (2048 positions of context, 5.0e11 training tokens)."""

import json
import runpy
import sys
from importlib import resources
from pathlib import Path

import pytest
import tiny
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from calm.checkpoints.meta_model import outline
from calm.cli import main as cli
from calm.evaluation.compute import compute
from calm.training.recipe.models import outline_model
from calm.training.recipe.recipe import Recipe

PAPER = Path(str(resources.files("calm") / "recipes" / "paper"))


RECIPES = [Recipe.load(path) for path in sorted(PAPER.glob("*.yaml"))]


def model_of(name):
    return outline_model(Recipe.load(PAPER / f"{name}.yaml"), RECIPES)


@pytest.mark.parametrize(
    ("name", "millions", "inference", "training"),
    [
        ("transformer_s", 281, 4.4e8, 6.64e20),
        ("transformer_m", 465, 7.9e8, 12.0e20),
        ("transformer_l", 847, 15.0e8, 22.5e20),
        ("calm_m", 371, 2.9e8, 3.77e20),
        ("calm_l", 735, 4.6e8, 8.06e20),
        ("calm_xl", 1829, 9.4e8, 21.5e20),
    ],
)
def test_the_papers_table_is_reproduced(name, millions, inference, training):
    cost = compute(model_of(name), context=2048)
    assert cost.parameters["language_model"] // 10**6 == millions
    assert cost.inference_flops_per_token["total"] == pytest.approx(inference, rel=0.05)
    assert cost.training_flops_per_token * 5.0e11 == pytest.approx(training, rel=0.005)


def test_the_autoencoder_has_75_million_parameters():
    parameters = compute(model_of("autoencoder"), context=1).parameters
    assert parameters["total"] // 10**6 == 75
    assert parameters["total"] == sum(parameters[f"autoencoder_{part}"] for part in ("embedding", "encoder", "decoder"))


@pytest.mark.parametrize("name", ["calm_m", "calm_m_diffusion", "transformer_s"])
def test_parts_add_up(name):
    model = model_of(name)
    cost = compute(model, context=100)
    parts = dict(cost.parameters)
    total, inner = parts.pop("total"), parts.pop("autoencoder")
    assert total == parts.pop("language_model") + inner == sum(parameter.numel() for parameter in model.parameters())
    assert total == sum(parts.values())
    inference = dict(cost.inference_flops_per_token)
    assert inference.pop("total") == pytest.approx(sum(inference.values()))


def test_candidates_multiply_head_and_decoder_alone():
    model = model_of("calm_m")
    one, many = (compute(model, 2048, temperature, 200).inference_flops_per_token for temperature in (1.0, 0.5))
    for part in ("head", "autoencoder_decode"):
        assert many[part] == 200 * one[part]
    for part in ("backbone", "attention", "patch_embedding"):
        assert many[part] == one[part]
    assert many["total"] / one["total"] == pytest.approx(100, rel=0.1)  # about 100 times, as DESIGN has it


def test_iterative_heads_cost_a_pass_per_step():
    flow, diffusion = (
        compute(model_of(f"calm_m_{head}"), 1).inference_flops_per_token for head in ("flow", "diffusion")
    )
    assert flow["head"] / 20 == pytest.approx(diffusion["head"] / 100, rel=0.05)  # midpoint: two passes in 10 steps


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_paper_describes_a_model(path):
    recipe = Recipe.load(path)
    assert recipe.output_dir == f"runs/paper/{path.stem}"
    model = outline_model(recipe, RECIPES)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert recipe.data.block_size // getattr(model.config, "patch_size", 1) <= 2048


def test_counting_multiplies_what_a_forward_pass_does():
    """Against torch's own counter of operations, on a real forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny.calm(4)
    ids = tiny.tokens(1, 4 * 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
        model.autoencoder.decode(model.head.sample(torch.randn(6, 16)))
    cost = compute(model, context=6).inference_flops_per_token
    # torch's counter knows the matrix products; attention over 6 positions is in it or not, by its implementation.
    matrices = (cost["total"] - cost["attention"]) * 24
    assert matrices <= counter.get_total_flops() <= cost["total"] * 24


@pytest.mark.parametrize("embedding_size", [None, 4])
def test_counting_knows_the_autoencoders_parts(embedding_size):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny.autoencoder(3, embedding_size=embedding_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.decode(torch.randn(5, 8))
    cost = compute(model, 1).inference_flops_per_token["total"] * 15
    assert counter.get_total_flops() == pytest.approx(cost)


def test_counting_knows_the_layers_of_gpt2():
    from torch.utils.flop_counter import FlopCounterMode

    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tiny.tokens(1, 24))
    cost = compute(model, context=24).inference_flops_per_token
    assert (cost["total"] - cost["attention"]) * 24 <= counter.get_total_flops() <= cost["total"] * 24


def test_counting_knows_how_many_experts_a_token_meets():
    fields = tiny.backbone(num_local_experts=4)
    one, two = (MixtralForCausalLM(MixtralConfig(**fields, num_experts_per_tok=active)) for active in (1, 2))
    expert = 2 * 3 * 16 * 24  # gate, up and down projection
    costs = [compute(model, context=8).inference_flops_per_token["backbone"] for model in (one, two)]
    assert costs[1] - costs[0] == 2 * expert
    model = LlamaForCausalLM(LlamaConfig(**tiny.backbone()))
    model.model.mixer = torch.nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="LlamaForCausalLM has layers whose operations are not known"):
        compute(model, context=8)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["calm", "info", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_info_prints_json_for_recipes(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, PAPER / "calm_xl.yaml", "--json", "--tokens", "5e11")
    document = json.loads(out)
    assert code == 0
    assert document["training_flops"] == pytest.approx(21.5e20, rel=0.005)
    assert document["inference_flops_per_token"]["total"] == pytest.approx(9.71e8, rel=0.005)
    code, out, _ = run(
        monkeypatch, capsys, PAPER / "calm_m.yaml", "--json", "--temperature", "0.5", "--num-candidates", "50"
    )
    assert json.loads(out)["candidates"] == 50
    assert json.loads(out)["training_tokens"] == 250000 * 2097152
    code, out, _ = run(monkeypatch, capsys, PAPER / "calm_m.yaml", "model.head.num_mlp_layers=8")
    assert "training" in out


@pytest.mark.parametrize("name", ["autoencoder", "calm", "calm_energy", "head_finetune", "baseline"])
def test_info_counts_recipes_before_their_data_are_there(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(monkeypatch, capsys, f"recipes/single_gpu/{name}.yaml", "--json", "--vocab-size", "500")
    small = json.loads(out)
    assert code == 0
    code, out, _ = run(monkeypatch, capsys, f"recipes/single_gpu/{name}.yaml", "--json", "--vocab-size", "600")
    assert json.loads(out)["parameters"]["total"] > small["parameters"]["total"]


def test_the_benchmark_of_compute_prints_the_papers_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compute.py", "--output", str(tmp_path / "compute.json")])
    runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "compute.py"), run_name="__main__")
    assert "| calm_xl | 1829.80M | 1.82B |" in capsys.readouterr().out
    assert json.loads((tmp_path / "compute.json").read_text())["calm_m"]["parameters"] // 10**4 == 37173


def test_info_passes_over_what_is_no_recipe_beside_one(tmp_path, monkeypatch, capsys):
    recipe = (PAPER / "transformer_s.yaml").read_text()
    (tmp_path / "baseline.yaml").write_text(recipe)
    (tmp_path / "plan.yaml").write_text("models: [1")
    code, out, _ = run(monkeypatch, capsys, tmp_path / "baseline.yaml", "--json")
    assert code == 0
    assert json.loads(out)["parameters"]["total"] > 0


def test_info_reads_models_in_either_layout(tmp_path, monkeypatch, capsys):
    tiny.calm().save_pretrained(tmp_path)
    released = Path(__file__).parents[1] / "golden_tensors" / "checkpoint_k4" / "energy"
    for path in (tmp_path, released):
        code, out, _ = run(monkeypatch, capsys, path, "--json")
        assert code == 0
        document = json.loads(out)
        assert document["training_flops"] is None
        assert document["parameters"]["total"] == sum(each.numel() for each in outline(path).parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "no recipe at nowhere.yaml"),
        ([str(PAPER / "calm_m.yaml"), "--temperature", "0"], "temperature must be in (0, 1], got 0.0"),
        (
            [str(PAPER / "calm_m.yaml"), "--temperature", "0.1", "--num-candidates", "5"],
            "num_candidates must be at least 10",
        ),
        ([str(PAPER / "calm_m.yaml"), "model.autoencoder=nowhere"], "no model in nowhere yet"),
        (["/no/such/path"], "no model at /no/such/path: there is no such directory"),
        (
            [str(PAPER.parent / "quickstart" / "baseline.yaml")],
            "names no vocab_size: prepare them, or name it (`calm info --vocab-size`",
        ),
    ],
)
def test_mistakes_end_in_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(monkeypatch, capsys, *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
