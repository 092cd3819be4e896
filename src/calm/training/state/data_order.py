"""What makes a run the same on one process or many, in one piece or several.

The order of the blocks and the noise of every block follow from the seed, the step and the block's own number: not from
the process that happens to take it, how steps are divided into micro-batches, or what was drawn before.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import default_data_collator

from calm.functional.rng import Generator, RowStreams
from calm.training.loop.interruption import leave_signals_to_the_trainer

_NUMBERS_AT_ONCE = 2**16


class NumberedBlocks(Dataset):
    """Another dataset's items with their ``number``."""

    def __init__(self, blocks: Dataset):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        leave_signals_to_the_trainer()
        return self.blocks[index] | {"number": index}


def collate_numbered(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of numbered blocks. The numbers stay in the processor's memory: no step waits to read them back."""
    numbers = [item.pop("number") for item in items]
    return default_data_collator(items) | {"number": numbers}


class ShuffledSteps(Sampler[int]):
    """A new order of the blocks in every pass over them, cut to whole steps.

    Args:
        blocks_per_step: of all processes and micro-batches together.
        step: tells the step that comes next; from it follows which pass this is.

    Raises ValueError when the blocks do not fill one step.
    """

    def __init__(self, num_blocks: int, blocks_per_step: int, seed: int, step: Callable[[], int]):
        if num_blocks < blocks_per_step:
            raise ValueError(
                f"a step takes {blocks_per_step} blocks, but the data hold {num_blocks}: prepare more text, or choose "
                "a smaller training.per_device_train_batch_size, tokens_per_step or data.block_size."
            )
        self.num_blocks, self.seed, self.step = num_blocks, seed, step
        self.steps_per_pass = num_blocks // blocks_per_step
        self.blocks_per_step = blocks_per_step

    def __len__(self) -> int:
        return self.steps_per_pass * self.blocks_per_step

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_seed_of(self.seed, self.step() // self.steps_per_pass))
        order = torch.randperm(self.num_blocks, generator=generator)[: len(self)]
        # A list of all would take four times the memory, in every process.
        for part in order.split(_NUMBERS_AT_ONCE):
            yield from part.tolist()


def noise_of_blocks(numbers: list[int], seed: int, step: int, device: torch.device) -> Generator:
    """Return a stream of random numbers for each block of a batch: generators on a CPU, counters elsewhere.

    A CPU's generators are the faster source there. A GPU would start a kernel for each of them, and a compiled model
    cannot use them.
    """
    if device.type != "cpu":
        seeds = torch.tensor([_seed_of(seed, step, number) for number in numbers])
        if device.type == "cuda":
            seeds = seeds.pin_memory()
        return RowStreams(seeds.to(device, non_blocking=True))
    return [torch.Generator(device).manual_seed(_seed_of(seed, step, number)) for number in numbers]


def _seed_of(*values: int) -> int:
    # A hash, because neighbouring seeds would give neighbouring states of some generators.
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=7).digest(), "little")
