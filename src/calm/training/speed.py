"""How long a training step takes here, so that a time budget can be turned into a number of steps."""

import statistics
import time
from typing import Any

import torch

from calm.training.recipe.models import build_model
from calm.training.recipe.recipe import Recipe
from calm.training.recipe.trainer_arguments import training_arguments
from calm.training.run import load_blocks

_WARMUP_STEPS = 2
_MEASURED_STEPS = 6


def seconds_per_step(recipe: Recipe) -> float:
    """Median seconds of an optimiser step of the recipe, on a throw-away copy of its model and real blocks."""
    model: Any = build_model(recipe)
    blocks, _ = load_blocks(recipe, model)
    arguments = training_arguments(recipe)
    model = model.to(arguments.device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    batch_size, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    items = [blocks[index % len(blocks)] for index in range(batch_size)]
    batch = {name: torch.stack([item[name] for item in items]).to(arguments.device) for name in items[0]}
    times = []
    for _ in range(_WARMUP_STEPS + _MEASURED_STEPS):
        started = time.perf_counter()
        for _ in range(accumulation):
            with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
                loss = model(**batch).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    return statistics.median(times[_WARMUP_STEPS:])
