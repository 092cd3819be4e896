"""Low temperature on accelerators: sample, decode and choose without a host read.

Shapes: P positions, N candidates, K tokens of a patch, D hidden.
"""

from typing import Any

import torch
from torch import Tensor

from calm.functional.counted_choice import AT_ONCE, choose_by_counts
from calm.functional.rng import Generator, uniform


def pays_off(model: Any, hidden: Tensor, num_candidates: int) -> bool:
    """Return whether :func:`sample_at_once` is faster than decoding candidates lazily.

    It is on accelerators, where a host read takes as long as decoding many tokens, for few positions and candidates.
    """
    num_tokens = len(hidden) * num_candidates * model.config.patch_size
    return hidden.device.type != "cpu" and num_tokens <= AT_ONCE


@torch.no_grad()
def sample_at_once(
    model: Any, hidden: Tensor, temperature: float, num_candidates: int, generator: Generator = None
) -> Tensor:
    """Sample the next patches with the distribution of the batch sampler: hidden states ``[P, D] -> [P, K]``.

    All candidates are decoded. With :class:`~calm.functional.rng.RowStreams` the device never waits for the host.

    Args:
        model: a CALM.
        temperature: in (0, 1].
        num_candidates: N.
        generator: one, or a stream for every position.
    """
    latents = model.head.sample(hidden, generator=generator, num_samples=num_candidates)  # [N, P, Z]
    candidates = model.autoencoder.decode_tokens(latents).movedim(0, 1)  # [P, N, K]
    uniforms = uniform((len(hidden), 1), generator, hidden.device, row_dim=0)
    return choose_by_counts(candidates.to(hidden.device), temperature, uniforms)
