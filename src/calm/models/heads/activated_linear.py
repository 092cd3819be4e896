"""Linear layers that keep what comes before their activation alone, and compute the activation again for the gradient.

A head sees N times as many vectors as the backbone: what its layers keep is most of the memory of a training step.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def activated_linear(activation: Callable[[Tensor], Tensor], x: Tensor, linear: nn.Linear) -> Tensor:
    """``linear(activation(x))``; for the backward pass it keeps ``x``, not ``activation(x)``."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(activation(x))  # a compiler decides for itself what to compute again
    return _ActivatedLinear.apply(activation, x, linear.weight, linear.bias)


def gated_silu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[gate, up]``: ``[..., 2 D] -> [..., D]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.activation, ctx.device_type = activation, x.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device_type), torch.get_autocast_dtype(ctx.device_type)
        ctx.save_for_backward(x, weight)
        return F.linear(activation(x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        enabled, dtype = ctx.autocast
        with torch.autocast(ctx.device_type, dtype, enabled=enabled), torch.enable_grad():
            x = x.detach().requires_grad_()
            activated = ctx.activation(x)
            (of_x,) = torch.autograd.grad(activated, x, gradient @ weight)
        rows = gradient.flatten(0, -2)
        return None, of_x, rows.mT @ activated.detach().flatten(0, -2).to(rows.dtype), rows.sum(0)
