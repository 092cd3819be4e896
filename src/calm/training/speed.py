"""Seconds per training step on this machine, so that a time budget can be turned into a number of steps."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from calm.training.recipe.models import outline_model
from calm.training.recipe.recipe import Recipe
from calm.training.recipe.trainer_arguments import training_arguments

_WARMUP_STEPS = 2
_MEASURED_STEPS = 5


def seconds_per_step(recipe: Recipe, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the median seconds of an optimiser step of the recipe.

    The steps train a copy of its model with random weights on random tokens. Neither the data of the recipe nor its
    output directory need exist; the vocabulary is that of the data or, without data, ``model.backbone.vocab_size``.

    Args:
        recipe: the recipe.
        clock: returns the present time in seconds.
    """
    arguments = training_arguments(recipe)
    device = arguments.device
    model: Any = outline_model(recipe).to_empty(device=device).train()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02, generator=torch.Generator(device).manual_seed(0))
        else:
            tensor.zero_()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    shape = (arguments.per_device_train_batch_size, recipe.data.block_size)
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    times = []
    for _ in range(_WARMUP_STEPS + _MEASURED_STEPS):
        started = clock()
        for _ in range(arguments.gradient_accumulation_steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(clock() - started)
    return statistics.median(times[_WARMUP_STEPS:])
