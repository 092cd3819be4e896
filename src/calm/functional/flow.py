"""Flow matching on straight paths ``x_t = (1 - t) noise + t clean``, whose velocity is ``clean - noise``.

Shapes: Z latent, ... any leading dimensions. Source: Lipman et al. 2023, Liu et al. 2023.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SOLVERS = ("midpoint", "euler")


def straight_path(noise: Tensor, clean: Tensor, time: Tensor) -> Tensor:
    """Return the point at ``time [...]`` in [0, 1] between noise and clean vector, ``[..., Z]``."""
    return (1 - time[..., None]) * noise + time[..., None] * clean


def flow_matching_loss(velocity: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
    """Compute the squared error of a predicted velocity, mean over Z: ``[..., Z] x 3 -> [...]``."""
    return (velocity - (clean - noise)).square().mean(-1)


def integrate_flow(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int, solver: str = "midpoint"
) -> Tensor:
    """Follow a velocity field from noise (t = 0) to a clean vector (t = 1), ``[..., Z] -> [..., Z]``.

    Args:
        velocity: function of points ``[..., Z]`` and a time (a scalar tensor, float32).
        num_steps: steps of equal length; the midpoint solver evaluates two velocities in each.
        solver: ``"midpoint"`` (second order) or ``"euler"``.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}.")
    length = 1 / num_steps
    x = noise
    for step in range(num_steps):
        time = torch.tensor(step / num_steps, dtype=torch.float32, device=noise.device)
        slope = velocity(x, time)
        if solver == "midpoint":
            slope = velocity(x + 0.5 * length * slope, time + 0.5 * length)
        x = x + length * slope
    return x
