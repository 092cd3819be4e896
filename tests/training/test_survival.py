"""Runs that are cut short, divided otherwise, or go wrong."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_run import BACKBONE, autoencoder_recipe, calm_recipe, workspace  # noqa: F401
from test_run import recipe as make_recipe

from calm.checkpoints.loading import load_model
from calm.training.loop.interruption import InterruptionCallback
from calm.training.loop.metrics_log import read_metrics
from calm.training.run import train
from calm.training.state.checkpoint_manifest import SEAL, find_checkpoint, read_seal, seal
from calm.training.state.resume import is_complete


def same_weights(first, second, **tolerance):
    expected, actual = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        if tolerance:
            torch.testing.assert_close(actual[name], value, **tolerance)
        else:
            assert torch.equal(value, actual[name]), name


def start(recipe, path, *command, options=(), group=False):
    path.write_text(recipe.to_yaml())
    command = command or (sys.executable,)
    return subprocess.Popen(
        [*command, "-m", "calm.cli.main", "train", str(path), *options], env=os.environ | {"PYTHONPATH": "src"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=group,
    )  # fmt: skip


def train_in_two_processes(recipe, path, port, options=()):
    process = start(
        recipe, path, sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
        options=options,
    )  # fmt: skip
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def test_a_step_in_one_piece_equals_a_step_in_many(workspace):  # noqa: F811
    """Noise and order follow from seed, step and block, not from the micro-batch a block comes in."""
    whole = train(calm_recipe(workspace, "one_of_four", per_device_train_batch_size=4, max_steps=4))
    pieces = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 4}
    same_weights(whole, train(calm_recipe(workspace, "four_of_one", **pieces)), rtol=1e-4, atol=1e-5)


def test_two_processes_equal_one(workspace, tmp_path):  # noqa: F811
    whole = train(calm_recipe(workspace, "one_process", per_device_train_batch_size=4, max_steps=4))
    divided = calm_recipe(workspace, "two_processes", per_device_train_batch_size=2, max_steps=4)
    del divided.training["use_cpu"]  # which a machine without an accelerator need not be told
    train_in_two_processes(divided, tmp_path / "recipe.yaml", 29517)
    same_weights(whole, workspace / "two_processes", rtol=1e-4, atol=1e-5)
    losses = [[record["loss"] for record in read_metrics(run) if "loss" in record] for run in
              (whole, workspace / "two_processes")]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_sharded_run_equals_one_process_and_each_goes_on_from_the_other(workspace, tmp_path):  # noqa: F811
    """Two steps of two processes with FSDP2, two of one process, two of two again."""
    rate = {"lr_scheduler_type": "constant"}  # the same whatever max_steps
    whole = train(calm_recipe(workspace, "unsharded", per_device_train_batch_size=4, max_steps=6, **rate))

    def shard(max_steps):
        steps = {"per_device_train_batch_size": 2, "max_steps": max_steps, "save_steps": 1}
        best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True} if max_steps == 6 else {}
        recipe = calm_recipe(workspace, "sharded", **steps, **rate, **best, fsdp=True)
        train_in_two_processes(recipe, tmp_path / "recipe.yaml", 29518, ["--allow-recipe-change"])

    shard(2)
    load_model(workspace / "sharded")  # all there, and nothing of FSDP
    alone = calm_recipe(workspace, "sharded", per_device_train_batch_size=4, max_steps=4, **rate)
    train(alone, allow_recipe_change=True)
    shard(6)
    same_weights(whole, workspace / "sharded", rtol=1e-4, atol=1e-5)
    losses = [[record["loss"] for record in read_metrics(run) if "loss" in record] for run in
              (whole, workspace / "sharded")]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_weight_that_embeds_and_predicts_can_be_sharded(workspace, tmp_path):  # noqa: F811
    """Of an autoencoder, of a CALM with losses beside the head's, and of a token model whose two embeddings are one."""
    sizes = {"max_steps": 2, "save_steps": 2}
    recipes = {}
    for name, batch, fsdp in (("whole", 4, {}), ("parts", 2, {"fsdp": True})):
        training = sizes | {"per_device_train_batch_size": batch} | fsdp
        calm = calm_recipe(workspace, f"calm_{name}", **training)
        calm.model.mtp_weight, calm.model.mtp_type, calm.model.decoded_brier_weight = 1.0, "autoregressive", 1.0
        tied = {"backbone": BACKBONE | {"tie_word_embeddings": True}}
        recipes[name] = [
            autoencoder_recipe(workspace, f"autoencoder_{name}", **training),
            calm,
            make_recipe(workspace, "baseline", f"tied_{name}", tied, **training),
        ]
    for whole, parts in zip(*recipes.values(), strict=True):
        train(whole)
        train_in_two_processes(parts, tmp_path / "recipe.yaml", 29519)
        # A step is 1e-2 wide, also where a gradient is next to nothing.
        same_weights(Path(whole.output_dir), Path(parts.output_dir), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [(b'"data"', b'"dat!"'), (b'"files"', b'"fides"'), (b'"num_processes": 1', b'"num_processes": 3'), (b"{", b"[")],
)
def test_a_checkpoint_with_a_damaged_manifest_is_passed_over(tmp_path, pattern, replacement):
    about = {"data": {"train": "x"}, "blocks_per_step": 4, "num_processes": 1}
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(b"1234")
        seal(tmp_path / f"checkpoint-{step}", about)
    newest = tmp_path / "checkpoint-4" / SEAL
    content = newest.read_bytes()
    assert pattern in content
    newest.write_bytes(content.replace(pattern, replacement, 1))
    checkpoint, complaints = find_checkpoint(tmp_path, tuple(about))
    assert checkpoint == tmp_path / "checkpoint-2"
    assert f"checkpoint-4 is damaged ({SEAL}" in complaints[0]


def test_no_flipped_bit_of_a_checkpoints_manifest_changes_its_run(tmp_path):
    about = {"data": {"train": "x"}, "blocks_per_step": 4, "num_processes": 1}
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "weights").write_bytes(b"1234")
    seal(tmp_path / "checkpoint-2", about)
    path = tmp_path / "checkpoint-2" / SEAL
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with suppress(ValueError):  # it is passed over, and there is no other one
            find_checkpoint(tmp_path, tuple(about))
            read = read_seal(path.parent)
            assert {name: read[name] for name in about} == about


def test_a_finished_run_without_its_weights_is_restored_from_its_checkpoint(workspace):  # noqa: F811
    recipe = calm_recipe(workspace, "restored", max_steps=3)
    output = train(recipe)
    weights = load_file(output / "model.safetensors")
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:1000])):
        damage(output / "model.safetensors")
        assert not is_complete(recipe)
        train(recipe)
        assert is_complete(recipe)
        again = load_file(output / "model.safetensors")
        assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_tokens_replaced_under_a_run_are_found(workspace):  # noqa: F811
    recipe = calm_recipe(workspace, "replaced", max_steps=2)
    data = workspace / "replaced_data"
    shutil.copytree(recipe.data.train, data)
    recipe.data.train = str(data)
    train(recipe)
    tokens = next(data.glob("*.ds"))
    tokens.write_bytes(tokens.read_bytes()[:-100] + bytes(100))
    recipe.output_dir += "_again"
    with pytest.raises(ValueError, match="does not have its checksum"):
        train(recipe)


def test_a_damaged_checkpoint_is_passed_over(workspace):  # noqa: F811
    whole = train(calm_recipe(workspace, "undamaged", max_steps=6))
    output = train(calm_recipe(workspace, "damaged", max_steps=6))
    (output / "complete.json").unlink()
    (output / "model.safetensors").unlink()
    weights = output / "checkpoints" / "checkpoint-6" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (output / "checkpoints" / "checkpoint-5").mkdir()  # what a kill left
    checkpoint, complaints = find_checkpoint(output / "checkpoints")
    assert checkpoint == output / "checkpoints" / "checkpoint-4"
    assert "checkpoint-6 is damaged (model.safetensors does not have its checksum)" in complaints[0]
    train(calm_recipe(workspace, "damaged", max_steps=6))
    assert not (output / "checkpoints" / "checkpoint-5").exists()
    same_weights(whole, output)


def test_a_signal_ends_a_run_with_a_checkpoint(workspace, tmp_path):  # noqa: F811
    steps = {"max_steps": 200, "save_steps": 1000, "logging_steps": 7}
    whole = train(calm_recipe(workspace, "calm_through", **steps))
    stopped = calm_recipe(workspace, "stopped", **steps)
    process = start(stopped, tmp_path / "recipe.yaml")
    deadline = time.monotonic() + 120
    while len(read_metrics(workspace / "stopped")) < 2 and process.poll() is None and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "with a checkpoint; run the same command again" in errors
    assert "Traceback" not in errors
    train(stopped)
    same_weights(whole, workspace / "stopped")
    first, second = read_metrics(whole), read_metrics(workspace / "stopped")
    assert [record.get("loss") for record in first] == [record.get("loss") for record in second]


def test_a_signal_to_all_processes_leaves_the_loaders_workers_alone(workspace, tmp_path):  # noqa: F811
    """As `timeout`, schedulers and Ctrl-C send it. Workers that last until the end end with the run."""
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    recipe = calm_recipe(workspace, "all_signalled", max_steps=10_000, save_steps=10_000, **workers)
    process = start(recipe, tmp_path / "recipe.yaml", group=True)
    deadline = time.monotonic() + 120
    while len(read_metrics(workspace / "all_signalled")) < 2 and process.poll() is None and time.monotonic() < deadline:
        pass
    assert len(read_metrics(workspace / "all_signalled")) >= 2
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    checkpoint, complaints = find_checkpoint(workspace / "all_signalled" / "checkpoints")
    assert checkpoint is not None
    assert not complaints


def test_a_loss_that_is_no_number_ends_the_run(workspace):  # noqa: F811
    recipe = calm_recipe(workspace, "diverges", learning_rate=1e30, max_grad_norm=0, max_steps=20, save_steps=1)
    with pytest.raises(ValueError, match=r"the loss of step \d+ is not finite"):
        train(recipe)
    assert not (workspace / "diverges" / "model.safetensors").exists()


def test_a_changed_recipe_goes_on_when_it_is_allowed(workspace):  # noqa: F811
    train(calm_recipe(workspace, "longer", max_steps=4, lr_scheduler_type="constant"))
    more = calm_recipe(workspace, "longer", max_steps=6, lr_scheduler_type="constant", learning_rate=5e-3)
    with pytest.raises(ValueError, match=r"--allow-recipe-change"):
        train(more)
    output = train(more, allow_recipe_change=True)
    rates = {record["step"]: record["learning_rate"] for record in read_metrics(output) if "loss" in record}
    assert (rates[4], rates[6]) == (1e-2, 5e-3)


def test_steps_of_another_size_are_refused_on_resume(workspace):  # noqa: F811
    train(calm_recipe(workspace, "sized", max_steps=4))
    wider = calm_recipe(workspace, "sized", max_steps=6, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match=r"on 2 blocks a step; 1 process\(es\) would take 4"):
        train(wider, allow_recipe_change=True)
    # What was there is there as it was, and complete.
    assert is_complete(calm_recipe(workspace, "sized", max_steps=4))


def test_data_that_changed_under_a_run_are_refused(workspace):  # noqa: F811
    recipe = calm_recipe(workspace, "moved", max_steps=4)
    output = train(recipe)
    (output / "complete.json").unlink()
    manifest = workspace / "validation" / "manifest.json"
    before = manifest.read_text()
    try:
        manifest.write_text(before + " ")
        with pytest.raises(ValueError, match=r"the prepared data changed .*data\.validation"):
            train(recipe)
    finally:
        manifest.write_text(before)


def test_unknown_precision_is_refused(workspace):  # noqa: F811
    values = calm_recipe(workspace, "precise")
    with pytest.raises(ValueError, match="precision must be one of auto, float32"):
        type(values)(**vars(values) | {"precision": "int3"})


def test_sharding_over_one_process_is_refused(workspace, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP shards a model over processes, and this is one process"):
        train(calm_recipe(workspace, "one_shard"))
    assert not (workspace / "one_shard").exists()


def limited(limit):
    """A command that runs another under a limit of the shell."""
    return "bash", "-c", f'ulimit {limit}; exec "$@"', "-", sys.executable


def test_a_checkpoint_that_finds_no_room_leaves_the_others_whole(workspace, tmp_path):  # noqa: F811
    train(calm_recipe(workspace, "no_room", max_steps=2))
    longer = calm_recipe(workspace, "no_room", max_steps=8)
    (workspace / "no_room" / "recipe.yaml").write_text(longer.to_yaml())
    (workspace / "no_room" / "complete.json").unlink()
    process = start(longer, tmp_path / "recipe.yaml", *limited("-f 40"))  # no file beyond 40 KiB, the weights have more
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "the checkpoint of step 4 cannot be written" in errors
    assert "Traceback" not in errors
    checkpoints = workspace / "no_room" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    assert find_checkpoint(checkpoints) == (checkpoints / "checkpoint-2", [])


def test_too_little_memory_ends_in_a_line_that_says_what_to_change(workspace, tmp_path):  # noqa: F811
    large = calm_recipe(workspace, "too_large", max_steps=2, per_device_train_batch_size=60)
    large.model.head = large.model.head | {"num_samples": 2000, "num_target_samples": 2000}
    process = start(large, tmp_path / "recipe.yaml", *limited("-v 6000000"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "out of memory in step 1 with 60 blocks of 32 tokens at once" in errors
    assert "Traceback" not in errors


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # its successor is younger than our range
def test_gradient_checkpointing_and_bfloat16_train(workspace):  # noqa: F811
    plain = train(calm_recipe(workspace, "all_kept", max_steps=3))
    same_weights(plain, train(calm_recipe(workspace, "computed_again", max_steps=3, gradient_checkpointing=True)),
                 rtol=1e-5, atol=1e-6)  # fmt: skip
    rounded = train(calm_recipe(workspace, "rounded", max_steps=3, bf16=True))
    losses = [[record["loss"] for record in read_metrics(run) if "loss" in record] for run in (plain, rounded)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_training_is_the_same_training(workspace):  # noqa: F811
    plain = train(calm_recipe(workspace, "not_compiled", max_steps=3))
    compiled = train(calm_recipe(workspace, "compiled", max_steps=3, torch_compile=True))
    same_weights(plain, compiled, rtol=1e-3, atol=1e-4)


def test_a_second_signal_acts_unless_it_is_the_first_come_twice(monkeypatch):
    """A scheduler signals all processes, and a launcher passes its own on."""
    now, ended = [0.0], []
    monkeypatch.setattr("calm.training.loop.interruption.time.monotonic", lambda: now[0])
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    interruption = InterruptionCallback()
    try:
        interruption.on_train_begin(None, None, None)
        signal.raise_signal(signal.SIGTERM)
        now[0] = 1.0
        signal.raise_signal(signal.SIGTERM)
        assert (interruption.signal, ended) == (signal.SIGTERM, [])
        now[0] = 9.0
        signal.raise_signal(signal.SIGTERM)
        assert ended == [signal.SIGTERM]
    finally:
        interruption.restore()
        signal.signal(signal.SIGTERM, before)
