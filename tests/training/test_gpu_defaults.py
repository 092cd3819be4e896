"""What a recipe leaves to the device, on a GPU; no GPU is needed to choose it."""

import pytest
import torch

from calm.functional.rng import RowStreams, uniform
from calm.training.recipe.recipe import Recipe
from calm.training.recipe.trainer_arguments import gpu_defaults
from calm.training.state.data_order import noise_of_blocks


def defaults(**training):
    recipe = Recipe.from_dict(
        {
            "stage": "baseline", "output_dir": "runs/x", "data": {"train": "data/x", "block_size": 8},
            "model": {"backbone": {"hidden_size": 16}}, "training": {"learning_rate": 1e-3} | training,
        }
    )  # fmt: skip
    return gpu_defaults(recipe, dict(recipe.training))


def test_a_long_run_is_compiled_and_a_short_one_is_not():
    assert defaults(max_steps=5000)["torch_compile"]
    assert defaults(num_train_epochs=1)["torch_compile"]
    assert not defaults(max_steps=100)["torch_compile"]
    assert defaults(max_steps=100, torch_compile=True)["torch_compile"]


def test_a_sharded_run_is_not_compiled_by_default():
    assert not defaults(max_steps=5000, fsdp=True)["torch_compile"]


def test_batches_are_loaded_ahead_and_copied_without_waiting():
    found = defaults()
    assert found["dataloader_num_workers"] > 0
    assert found["dataloader_persistent_workers"]
    assert found["dataloader_pin_memory"]
    assert found["accelerator_config"]["non_blocking"]


def test_what_the_recipe_says_counts():
    assert defaults(dataloader_num_workers=0).get("dataloader_persistent_workers") is None


def test_tf32_is_off_and_refused_in_a_compiled_run():
    assert defaults()["tf32"] is False
    with pytest.raises(ValueError, match=r"training\.tf32 cannot be used with training\.torch_compile"):
        defaults(tf32=True)
    assert defaults(tf32=True, torch_compile=False)["tf32"]


def test_noise_of_blocks_on_a_device_does_not_depend_on_the_other_blocks():
    meta = noise_of_blocks([4, 7], seed=1, step=2, device=torch.device("meta"))
    assert isinstance(meta, RowStreams)
    assert isinstance(noise_of_blocks([4], seed=1, step=2, device=torch.device("cpu")), list)
    assert uniform((2, 3), meta, "meta").shape == (2, 3)
