"""Linear layers that keep the input of the activation only, and compute the activation again for the gradient.

A head processes N times as many vectors as the backbone, so its kept activations are most of the memory of a step.

Shapes: I input, O output, ... any leading dimensions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.models.layer_access import is_plain

__all__ = ["gated_silu_linear", "is_plain", "silu_linear"]


def silu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """Compute ``linear(silu(x))``: ``[..., I] -> [..., O]``; for the backward pass it keeps ``x``, not ``silu(x)``."""
    return _apply(x, linear, _Silu)


def gated_silu_linear(gate_up: Tensor, linear: nn.Module) -> Tensor:
    """Compute ``linear(silu(gate) * up)`` of ``[gate, up]``: ``[..., 2 I] -> [..., O]``; it keeps only its input."""
    return _apply(gate_up, linear, _GatedSilu)


class _Silu:
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.silu(x)

    @staticmethod
    def backward(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activation and the gradient of its input."""
        return F.silu(x), torch.ops.aten.silu_backward(gradient, x)


class _GatedSilu:
    @staticmethod
    def forward(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(gate_up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_up.chunk(2, dim=-1)
        opened = F.silu(gate)
        result = torch.empty_like(gate_up)
        of_gate, of_up = result.chunk(2, dim=-1)
        of_up.copy_(gradient * opened)
        of_gate.copy_(torch.ops.aten.silu_backward(gradient.mul_(up), gate))
        return opened.mul_(up), result


def _apply(x: Tensor, linear: nn.Module, activation: type[_Silu] | type[_GatedSilu]) -> Tensor:
    # A compiler decides itself what to compute again.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not is_plain(linear):
        return linear(activation.forward(x))
    return _ActivatedLinear.apply(x, linear.weight, linear.bias, activation)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: type[_Silu] | type[_GatedSilu]
    ) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x, weight)
        return F.linear(activation.forward(x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])  # an input may also be one vector, or empty
        of_x, of_weight, of_bias = None, None, None
        if wants_x or wants_weight:
            of_activation = (rows @ weight.to(rows.dtype)).view(*gradient.shape[:-1], weight.shape[1]).to(x.dtype)
            activated, of_x = ctx.activation.backward(x, of_activation)
            if wants_weight:
                of_weight = rows.mT @ activated.reshape(-1, weight.shape[1]).to(rows.dtype)
        if wants_bias:
            of_bias = rows.sum(0)
        return of_x if wants_x else None, of_weight, of_bias, None
