"""Continuations that a token model draws, and a CALM that learns from them."""

import json
import sys

import pytest
import torch
from test_run import BACKBONE, calm_recipe, recipe, workspace  # noqa: F401
from tiny import calm, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from calm.checkpoints.loading import load_language_model
from calm.cli.main import main
from calm.evaluation.compute import compute
from calm.functional.energy_score import energy_score
from calm.training.loop.distillation import draw_continuations
from calm.training.loop.metrics_log import read_metrics
from calm.training.recipe.cost import recipe_cost
from calm.training.recipe.recipe import DistillationRecipe, Recipe
from calm.training.run import train

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def teacher(vocab_size):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, initializer_range=0.8, **SMALL)).eval()


@torch.no_grad()
def test_continuations_follow_the_law_of_the_teacher():
    """Against the exact law of two tokens, enumerated; at every patch of a block."""
    model, ids, draws = teacher(3), torch.randint(3, (1, 6)), 4000
    drawn = draw_continuations(model, ids, 2, draws, torch.Generator().manual_seed(0))
    assert drawn.shape == (draws, 1, 2, 2)
    for patch in range(2):
        context = ids[:, : 2 * (patch + 1)]
        first = model(context).logits[0, -1].softmax(-1)
        second = torch.stack([model(torch.cat([context, torch.tensor([[x]])], 1)).logits[0, -1] for x in range(3)])
        law = (first[:, None] * second.softmax(-1)).flatten()
        index = drawn[:, 0, patch, 0] * 3 + drawn[:, 0, patch, 1]
        seen = torch.bincount(index, minlength=9) / draws
        assert ((seen - law).abs() < 4 * (law * (1 - law) / draws).sqrt() + 1e-3).all()


def test_what_a_block_gets_does_not_depend_on_the_blocks_beside_it_nor_on_how_the_block_is_divided(monkeypatch):
    model, ids = teacher(20), torch.randint(20, (3, 24))

    def draw(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return draw_continuations(model, ids[rows], 4, 3, generators)

    together = draw([0, 1, 2])
    assert torch.equal(together[:, 1:2], draw([1]))
    monkeypatch.setattr("calm.evaluation.branches._NODES", 6)  # two patches at a time
    assert draw([0, 1, 2]).shape == together.shape
    monkeypatch.undo()
    monkeypatch.setattr("calm.training.loop.distillation._TILE_ELEMENTS", 3 * 20)  # one context at a time
    assert torch.equal(draw([0, 1, 2]), together)


@torch.no_grad()
def test_the_loss_is_the_energy_score_against_all_continuations():
    model, ids = calm(patch_size=2), tokens(2, 8)
    continuations = torch.stack([tokens(2, 6).view(2, 3, 2) for _ in range(4)])
    noise, target_noise = torch.rand(4, 2, 3, 6) - 0.5, torch.randn(8, 2, 3, 8)
    out = model(ids, labels=ids, target_ids=continuations, noise=noise, target_noise=target_noise)
    posterior = model.autoencoder.encode(continuations.flatten(-2))
    draws = target_noise.unflatten(0, (4, 2))  # of every continuation two
    targets = posterior.mean[:, None] + posterior.log_std.exp()[:, None] * draws
    samples = model.head.sample(out.last_hidden_state[:, :-1], noise)
    expected = -energy_score(samples, targets.flatten(0, 1)).mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # Continuations that all are the text: the plain loss, but for which draw belongs to which.
    text = ids[:, 2:].view(2, 3, 2).expand(4, -1, -1, -1)
    same = model(ids, labels=ids, target_ids=text, noise=noise, target_noise=target_noise).loss
    assert same.item() == pytest.approx(
        model(ids, labels=ids, noise=noise, target_noise=target_noise).loss.item(), rel=1e-5
    )


def distilled(workspace, output, **training):  # noqa: F811
    run = calm_recipe(workspace, output, lr_scheduler_type="constant", **training)
    run.distillation = DistillationRecipe(str(workspace / "teacher"), 2)
    return run


def test_a_student_trains_and_resumes_exactly(workspace):  # noqa: F811
    train(recipe(workspace, "baseline", "teacher", {"backbone": BACKBONE}, max_steps=30))
    losses = [r["loss"] for r in read_metrics(train(distilled(workspace, "student", max_steps=12))) if "loss" in r]
    assert losses[-1] < losses[0]
    plain = [r["loss"] for r in read_metrics(train(calm_recipe(workspace, "plain", max_steps=12))) if "loss" in r]
    assert losses != plain
    # The first six steps, then the rest in another process's stead.
    train(distilled(workspace, "resumed", max_steps=6))
    train(distilled(workspace, "resumed", max_steps=12), allow_recipe_change=True)
    resumed = [r["loss"] for r in read_metrics(workspace / "resumed") if "loss" in r]
    assert resumed == losses


def test_info_counts_the_teacher(workspace, monkeypatch, capsys):  # noqa: F811
    train(recipe(workspace, "baseline", "teacher", {"backbone": BACKBONE}, max_steps=30))
    run = distilled(workspace, "counted", max_steps=2)
    output = train(run)
    (workspace / "counted.yaml").write_text(run.to_yaml())

    def flops(source):
        monkeypatch.setattr(sys, "argv", ["calm", "info", str(source), "--json"])
        with pytest.raises(SystemExit):
            main()
        return json.loads(capsys.readouterr().out)["training_flops"]

    cost = recipe_cost(run, load_language_model(output), 2)["training_flops"]
    without = compute(load_language_model(output), 8).training_flops_per_token * 2 * 2 * 32
    assert flops(output) == flops(workspace / "counted.yaml") == pytest.approx(cost)
    assert cost > 1.5 * without
    (workspace / "teacher").rename(workspace / "elsewhere")
    try:
        assert flops(output) is None
    finally:
        (workspace / "elsewhere").rename(workspace / "teacher")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distillation.num_continuations=3", r"multiple of num_continuations \(3\).*This head: energy with 4"),
        ("distillation.teacher=/no/such/model", r"^distillation\.teacher: no model at /no/such/model"),
        ("distillation.teacher={workspace}/autoencoder", r"holds an autoencoder; a language model is needed"),
        ("distillation.num_continuations=0", r"num_continuations must be at least 1, got 0"),
        ("distillation.temperature=1", r"unknown key 'temperature' in distillation"),
        ("model.head.type=flow", r"distillation is for stage calm with an energy head"),
    ],
)
def test_what_does_not_fit_is_refused(workspace, change, message):  # noqa: F811
    train(recipe(workspace, "baseline", "teacher", {"backbone": BACKBONE}, max_steps=30))
    path = workspace / "distilled.yaml"
    path.write_text(distilled(workspace, "refused", max_steps=2).to_yaml())
    if change == "model.head.type=flow":
        change = "model.head={type: flow}"
    with pytest.raises(ValueError, match=message):
        train(Recipe.load(path, [change.replace("{workspace}", str(workspace))]))
    assert not (workspace / "refused" / "model.safetensors").exists()
