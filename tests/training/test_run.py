"""Real, tiny training runs of every stage."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
from filelock import FileLock
from safetensors.torch import load_file

from calm.checkpoints.loading import load_autoencoder, load_language_model, load_model
from calm.compat.masking import no_packed_sequences
from calm.data.blocks import TokenBlocks
from calm.data.prepare import prepare
from calm.data.tokenizer import train_tokenizer
from calm.evaluation.brier_lm import evaluate_brier
from calm.evaluation.reconstruction import evaluate_reconstruction
from calm.training.loop.metrics_log import read_metrics
from calm.training.recipe.models import build_model
from calm.training.recipe.recipe import Recipe
from calm.training.run import train
from calm.training.state.resume import is_complete

WORDS = ["alpha", "beta", "gamma", "delta"]
DOCUMENTS = [" ".join(WORDS[(i + j) % 4] for j in range(60)) for i in range(40)]
BACKBONE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Prepared data and a trained autoencoder."""
    root = tmp_path_factory.mktemp("training")
    tokenizer = train_tokenizer(DOCUMENTS, 270)
    for split in ("train", "validation"):
        (root / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
        prepare([root / f"{split}.jsonl"], tokenizer, root / split)
    train(autoencoder_recipe(root))
    return root


def recipe(root, stage, output, model, **training):
    fields = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
    }
    return Recipe.from_dict(
        {
            "stage": stage,
            "output_dir": str(root / output),
            "data": {"train": str(root / "train"), "validation": str(root / "validation"), "block_size": 32},
            "model": model,
            "training": fields | training,
        }
    )


def autoencoder_recipe(root, output="autoencoder", **training):
    model = {"patch_size": 2, "hidden_size": 32, "intermediate_size": 48, "latent_size": 16, "latent_dropout": 0.0}
    return recipe(root, "autoencoder", output, model, **{"max_steps": 300, "save_steps": 100} | training)


def calm_recipe(root, output="calm", **training):
    head = {"noise_size": 8, "num_mlp_layers": 1, "num_samples": 4, "num_target_samples": 4}
    model = {"autoencoder": str(root / "autoencoder"), "backbone": BACKBONE, "head": head}
    return recipe(root, "calm", output, model, **training)


def test_autoencoder_learns_to_reconstruct(workspace):
    model = load_autoencoder(workspace / "autoencoder")
    result = evaluate_reconstruction(model, TokenBlocks(workspace / "validation", 32, 2))
    assert result.token_accuracy_mean > 0.95
    assert result.token_accuracy_sample > 0.9
    assert 0 < result.live_dimensions <= 16
    records = [record for record in read_metrics(workspace / "autoencoder") if "accuracy" in record]
    assert records[-1]["accuracy"] > records[0]["accuracy"]
    for key in ("loss", "reconstruction_loss", "kl", "live_dimensions", "grad_norm", "tokens_per_second"):
        assert key in records[0]


def test_calm_trains_and_leaves_a_self_contained_model(workspace):
    output = train(calm_recipe(workspace, max_steps=12))
    records = [record for record in read_metrics(output) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["loss"] < records[0]["loss"]
    held_out = [record["eval_loss"] for record in read_metrics(output) if "eval_loss" in record]
    assert len(held_out) == 6  # with every checkpoint
    assert held_out[-1] < held_out[0]
    for record in records:
        score = record["diversity"] - 2 * record["fidelity"]
        assert record["energy_score"] == pytest.approx(score, rel=1e-4)
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "recipe.yaml"} <= names
    assert any(path.name.startswith("events") for path in (output / "tensorboard").iterdir())
    # The frozen autoencoder is the trained one, and did not move.
    inside = load_language_model(output).autoencoder.state_dict()
    for name, value in load_autoencoder(workspace / "autoencoder").state_dict().items():
        assert torch.equal(value, inside[name])


@pytest.mark.parametrize(
    ("type", "fields"), [("flow", {"num_sampling_steps": 2}), ("diffusion", {"num_sampling_steps": 10})]
)
def test_iterative_heads_train_score_and_write(workspace, type, fields):
    """A recipe says which head; BrierLM and generation treat it like any other."""
    fields = {"type": type, "num_mlp_layers": 1, "num_samples": 4} | fields
    run = calm_recipe(workspace, output=type, max_steps=60, save_steps=60)
    run.model.head = fields
    output = train(run)
    losses = [record["loss"] for record in read_metrics(output) if "loss" in record]
    assert sum(losses[-5:]) < sum(losses[:5])
    model = load_language_model(output)
    assert model.config.head_config.type == type
    result = evaluate_brier(model, TokenBlocks(workspace / "validation", 32, 2), stride=4, num_blocks=8)
    assert result.accuracy[0] > 0  # four words in a circle: some draws hit
    out = model.generate(torch.tensor([[5, 6]]), max_new_tokens=6, temperature=0.5, num_candidates=10)
    assert out.shape == (1, 8)


def test_baseline_learns(workspace):
    output = train(recipe(workspace, "baseline", "baseline", {"backbone": BACKBONE}, max_steps=30))
    records = [record for record in read_metrics(output) if "loss" in record]
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    model = load_language_model(output)
    assert model.config.model_type == "llama"
    # Its context holds the blocks it was trained on, as a CALM's does.
    long = recipe(workspace, "baseline", "long", {"backbone": BACKBONE}, max_steps=1)
    long.data.block_size = 4096
    trained = build_model(long)
    assert trained.config.max_position_embeddings == 4096
    # A copy computes its loss with weights of its own.
    other, ids = copy.deepcopy(trained), torch.tensor([[5, 6, 7, 8]])
    before = other(ids, labels=ids).loss
    with torch.no_grad():
        trained.lm_head.weight.zero_()
    assert other(ids, labels=ids).loss == before


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 0.001}])
def test_a_warm_up_that_outlasts_the_run_is_told(workspace, length, capsys):
    fields = {"max_steps": -1, "warmup_steps": 30, "save_steps": 50} | length
    train(recipe(workspace, "baseline", f"warming_{len(str(length))}", {"backbone": BACKBONE}, **fields))
    steps = length.get("max_steps", 1)
    assert f"the warm-up of 30 steps does not end within the {steps} of this run" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_launchers_precision_is_not_taken_for_the_recipes(workspace, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = calm_recipe(workspace, "launched", max_steps=1)
    with pytest.raises(ValueError, match="the launcher asks for mixed precision bf16, and the recipe for no"):
        train(run)
    run.precision = "bfloat16"
    train(run)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_attention_is_causal_without_a_mask_of_all_pairs(is_compiled):
    seen = []

    def spy(graph, _):
        seen.extend(node.kwargs for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph.forward

    model, ids = tiny.calm().train(), torch.randint(2, 40, (2, 64))
    attention = torch.nn.functional.scaled_dot_product_attention
    with no_packed_sequences(), pytest.MonkeyPatch.context() as patch:
        if is_compiled:
            torch.compile(model, backend=spy)(input_ids=ids, labels=ids)
        else:
            patch.setattr(
                torch.nn.functional, "scaled_dot_product_attention",
                lambda *given, **more: seen.append(more) or attention(*given, **more),
            )  # fmt: skip
            model(input_ids=ids, labels=ids)
    assert seen
    assert all(call.get("attn_mask") is None and call["is_causal"] for call in seen)


def test_dropout_does_not_bring_the_logits_back(workspace):
    backbone = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = build_model(recipe(workspace, "baseline", "dropout", {"backbone": backbone}))
    assert model.training
    ids = torch.tensor([[5, 6, 7, 8]])
    assert model(ids, labels=ids).logits is None


def test_brier_lm_is_logged_with_every_evaluation_and_changes_nothing(workspace):
    plain = calm_recipe(workspace, output="without_brier", max_steps=6)
    scored = calm_recipe(workspace, output="with_brier", max_steps=6)
    scored.brier_blocks = 3
    train(plain)
    records = read_metrics(train(scored))
    scores = [record for record in records if "eval_brier_lm" in record]
    assert [record["step"] for record in scores] == [2, 4, 6]
    assert all(f"eval_brier_{n}" in scores[0] for n in (1, 2, 3, 4))
    first, second = (load_file(workspace / name / "model.safetensors") for name in ("without_brier", "with_brier"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_complete_run_is_not_done_again(workspace):
    recipe = calm_recipe(workspace, "complete", max_steps=2)
    train(recipe)
    before = (workspace / "complete" / "model.safetensors").stat().st_mtime_ns
    train(recipe)
    assert (workspace / "complete" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_may_be_named_by_another_path_and_moved_with_what_it_is_made_from(workspace, tmp_path):
    shutil.copytree(workspace / "autoencoder", tmp_path / "a" / "autoencoder")
    run = calm_recipe(workspace, "moves", max_steps=2)

    def here(root):
        run.output_dir, run.model.autoencoder = str(root / "moves"), str(root / "autoencoder")
        return run

    train(here(tmp_path / "a"))
    assert is_complete(here(tmp_path / "a" / ".." / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert is_complete(here(tmp_path / "b"))
    (tmp_path / "b" / "moves" / "complete.json").unlink()
    train(here(tmp_path / "b"))
    run.model.autoencoder = str(workspace / "autoencoder")
    with pytest.raises(ValueError, match=r"another recipe: model\.autoencoder"):
        train(run)
    # A copy beside what may be another autoencoder is not that run.
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    assert not is_complete(here(tmp_path / "c"))


def test_another_recipe_does_not_overwrite_a_run(workspace):
    train(calm_recipe(workspace, "mine", max_steps=2))
    with pytest.raises(ValueError, match=r"another recipe: training\.learning_rate \(0\.01 there, 0\.5 here\)"):
        train(calm_recipe(workspace, "mine", max_steps=2, learning_rate=0.5))


def test_a_foreign_directory_is_not_touched(workspace):
    (workspace / "foreign").mkdir()
    (workspace / "foreign" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty and holds no training run"):
        train(calm_recipe(workspace, "foreign"))
    assert [path.name for path in (workspace / "foreign").iterdir()] == ["thesis.txt"]


def test_killed_and_started_again_equals_uninterrupted(workspace, tmp_path):
    steps = {"max_steps": 120, "save_steps": 5}  # several passes over the data
    whole = train(calm_recipe(workspace, "whole", **steps))
    killed = calm_recipe(workspace, "killed", **steps)
    path = tmp_path / "recipe.yaml"
    path.write_text(killed.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "calm.cli.main", "train", str(path)], env=os.environ | {"PYTHONPATH": "src"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoints = workspace / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-1?")) and process.poll() is None and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workspace / "killed" / "model.safetensors").exists()
    train(killed)
    expected, actual = load_file(whole / "model.safetensors"), load_file(workspace / "killed" / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    first, second = read_metrics(whole), read_metrics(workspace / "killed")
    assert [record.get("loss") for record in first] == [record.get("loss") for record in second]


def test_a_kill_behind_the_last_step_adds_no_step(workspace):
    recipe = calm_recipe(workspace, "ended", max_steps=5, save_steps=2)
    output = train(recipe)
    weights, records = load_file(output / "model.safetensors"), read_metrics(output)
    for name in ("complete.json", "model.safetensors"):  # as if killed before they were written
        (output / name).unlink()
    train(recipe)
    again = load_file(output / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert read_metrics(output) == records
    assert json.loads((output / "complete.json").read_text())["global_step"] == 5


def test_blocks_that_hold_no_whole_patches_are_refused(workspace):
    bad = calm_recipe(workspace, "bad")
    bad.data.block_size = 33
    with pytest.raises(ValueError, match="multiple of the patch size 2, got 33"):
        train(bad)
    assert not (workspace / "bad").exists()


def test_tokenizers_that_do_not_belong_together_are_refused(workspace, tmp_path):
    other = train_tokenizer(DOCUMENTS, 265)
    prepare([workspace / "train.jsonl"], other, tmp_path / "data")
    bad = calm_recipe(workspace, "bad")
    bad.data.train = str(tmp_path / "data")
    with pytest.raises(ValueError, match="belong to different tokenizers"):
        train(bad)


def test_damaged_and_missing_weights_are_named(workspace, tmp_path):
    model = load_autoencoder(workspace / "autoencoder")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_model(tmp_path)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="cannot load a model"):
        load_model(tmp_path)
    state = model.state_dict()
    del state["encoder.squeeze.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"1 missing: encoder\.squeeze\.weight"):
        load_model(tmp_path)


def test_an_autoencoder_is_not_taken_for_a_language_model(workspace):
    with pytest.raises(ValueError, match="holds an autoencoder; a language model is needed"):
        load_language_model(workspace / "autoencoder")


def test_every_held_out_block_counts_whatever_the_batch(workspace):
    losses = []
    for size in (2, 7, 1000):
        run = train(
            calm_recipe(workspace, f"evaluated{size}", max_steps=1, save_steps=1, per_device_eval_batch_size=size)
        )
        losses += [record["eval_loss"] for record in read_metrics(run) if "eval_loss" in record]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_the_best_checkpoint_stays_and_is_the_result(workspace):
    settings = {"save_steps": 1, "eval_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
    # So high a rate that the first steps are the best.
    rate = {"learning_rate": 3.0, "lr_scheduler_type": "constant", "max_steps": 5}
    output = train(calm_recipe(workspace, "best", **settings, **rate))
    losses = {each["step"]: each["eval_loss"] for each in read_metrics(output) if "eval_loss" in each}
    best = min(losses, key=losses.get)
    assert best < 5
    kept = sorted(int(path.name.split("-")[1]) for path in (output / "checkpoints").glob("checkpoint-*"))
    assert kept == [best, 5]
    result, saved = (
        load_file(path / "model.safetensors") for path in (output, output / f"checkpoints/checkpoint-{best}")
    )
    assert all(torch.equal(tensor, saved[name]) for name, tensor in result.items())
    # A kill behind the last step: the same model again.
    (output / "complete.json").unlink()
    (output / "model.safetensors").unlink()
    train(calm_recipe(workspace, "best", **settings, **rate))
    again = load_file(output / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in result.items())


@pytest.mark.parametrize("change", [{"optim": "adafactor"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_what_a_checkpoint_cannot_give_is_refused_and_the_finished_run_stays(workspace, change):
    finished = calm_recipe(workspace, "finished")
    output = train(finished)
    before = (output / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=f"holds a run of another recipe: .*training.{next(iter(change))}"):
        train(calm_recipe(workspace, "finished", **change, max_steps=8), allow_recipe_change=True)
    assert train(finished) == output
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_a_longer_run_logs_the_rate_it_uses(workspace):
    train(calm_recipe(workspace, "longer", max_steps=4))
    output = train(calm_recipe(workspace, "longer", max_steps=8), allow_recipe_change=True)
    whole = train(calm_recipe(workspace, "long", max_steps=8))
    rates, expected = (
        [each["learning_rate"] for each in read_metrics(run) if "loss" in each][4:] for run in (output, whole)
    )
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rate": "abc"}, r"training.learning_rate must be a number, got 'abc'"),
        ({"max_steps": 1.5}, r"training.max_steps must be a number without fraction, got 1.5"),
        ({"save_only_model": True}, r"training.save_only_model has no place in a recipe"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(workspace, setting, message):
    with pytest.raises(ValueError, match=message):
        calm_recipe(workspace, "refused", **setting)


def test_a_run_refused_before_its_first_step_claims_nothing(workspace):
    refused = calm_recipe(workspace, "unclaimed", per_device_train_batch_size=100000)
    with pytest.raises(ValueError, match="prepare more text, or choose a smaller"):
        train(refused)
    assert train(calm_recipe(workspace, "unclaimed")) == workspace / "unclaimed"


def test_two_runs_do_not_share_a_directory(workspace):
    place = workspace / "shared"
    place.mkdir()
    with FileLock(place / ".lock"), pytest.raises(ValueError, match=r"another process is training in .*shared: wait"):
        train(calm_recipe(workspace, "shared"))
    assert train(calm_recipe(workspace, "shared", max_steps=2)) == place  # the refused run claimed nothing


@pytest.mark.parametrize("setting", [{"report_to": "wandb"}, {"optim": "adamw_bnb_8bit"}])
def test_a_library_that_is_missing_is_named(workspace, setting):
    with pytest.raises(ValueError, match=r"needs a library that is not installed: .*(wandb|bitsandbytes)"):
        train(calm_recipe(workspace, "missing_library", **setting))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "nonsense"}, "the settings in model.backbone make no model: KeyError"),
        ({"rope_theta": "x"}, "the settings in model.backbone make no model: TypeError"),
    ],
)
def test_backbones_that_make_no_model_are_refused(workspace, change, message):
    for stage in ("calm", "baseline"):
        model = {"backbone": BACKBONE | change}
        if stage == "calm":
            model["autoencoder"] = str(workspace / "autoencoder")
        with pytest.raises(ValueError, match=message):
            train(recipe(workspace, stage, "refused", model))
