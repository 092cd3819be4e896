"""Sequences that run in the engine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from calm.generation.samplers import SampledPatches
from calm.serving.jobs import Job
from calm.serving.text import TextStream


@dataclass
class Running:
    """A sequence that has a slot."""

    job: Job
    generator: torch.Generator
    text: TextStream
    position: int
    since: float
    rounds: "Rounds | None" = None  # that sample the next patch
    failed: bool = False
    draft: Any = None  # what a drafter needs of the sequence


@dataclass
class Rounds:
    """Sequences whose next patch is sampled in rounds, one in every step."""

    rows: list[Running]
    iterator: Iterator[tuple[SampledPatches, torch.Tensor]]
