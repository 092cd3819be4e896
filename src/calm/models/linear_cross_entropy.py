"""Cross-entropy of an output layer over a large vocabulary, without holding its logits.

The logits ``[P, V]`` are by far the largest tensor of a training step. They are computed in tiles. The gradient of a
tile is computed while its logits exist, in the forward pass: nothing is computed twice.

Shapes: P positions, H hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the logits that exist at once: 256 MiB in float32; 1 GiB on a GPU, where every tile reads the weight again
# and small tiles would cost more than the products.
_TILE_ELEMENTS, _TILE_ELEMENTS_ELSEWHERE = 2**26, 2**28


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute ``cross_entropy(states @ weight.T, labels)``, the mean over labels that are not -100.

    Products have the precision of autocast or of the states; the loss and the sum of the weight's gradient are float32.
    In float32 torch computes it (2.13 and later).

    Args:
        states: ``[P, H]``.
        weight: ``[V, H]``.
        labels: ``[P]``, -100 where a position does not count.

    Returns:
        scalar, float32; 0 where no position counts.
    """
    if len(labels) == 0:
        return states.sum().float()
    dtype = product_dtype(states)
    if dtype == torch.float32 and hasattr(torch.nn, "LinearCrossEntropyOptions") and not torch.compiler.is_compiling():
        any_label = labels.ne(-100).any()
        # Without a label all count, times zero: a mean over nothing would be NaN, and so would its gradients be.
        labels = torch.where(any_label, labels, labels.clamp(min=0))
        return F.linear_cross_entropy(states, weight, labels, options=torch.nn.LinearCrossEntropyOptions()) * any_label
    return _MeanCrossEntropy.apply(states.to(dtype), weight, labels, torch.is_grad_enabled())


def token_cross_entropies(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of every position, 0 where the label is -100: ``[P, H], [V, H], [P] -> [P]`` float32.

    Positions may be weighted afterwards. The gradient of the states is computed in the forward pass; that of the
    weight, where it is wanted, needs the logits once more.
    """
    return _CrossEntropies.apply(states.to(weight.dtype), weight, labels, torch.is_grad_enabled())


def product_dtype(states: Tensor) -> torch.dtype:
    """Return the precision of products with states: that of autocast where it is on."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _tile_rows(weight: Tensor) -> int:
    elements = _TILE_ELEMENTS if weight.device.type == "cpu" else _TILE_ELEMENTS_ELSEWHERE
    return max(1, elements // len(weight))


def _tile_losses(states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of a tile ``[P]`` and its log-probabilities ``[P, V]``, in float32."""
    log_probs = F.linear(states, weight).float().log_softmax(-1)
    counts = labels.ne(-100)
    losses = -log_probs.gather(-1, labels.clamp(min=0)[:, None])[:, 0] * counts
    return losses, log_probs


def _logit_gradient(log_probs: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of the logits ``[P, V]`` for losses with the factors ``scale [P]``."""
    places = labels.clamp(min=0)[:, None]
    scale = (scale * labels.ne(-100))[:, None]
    return (log_probs.exp() * scale).scatter_add(-1, places, -scale)


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, with_gradients: bool) -> Tensor:
        wants_states, wants_weight = (with_gradients and wanted for wanted in ctx.needs_input_grad[:2])
        scale = 1 / labels.ne(-100).sum().clamp(min=1).float()
        size = _tile_rows(weight)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        of_states: list[Tensor] = []
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        with torch.autocast(states.device.type, enabled=False):
            product_weight = weight.to(states.dtype)
            for tile, some in zip(states.split(size), labels.split(size), strict=True):
                losses, log_probs = _tile_losses(tile, product_weight, some)
                total = total + losses.sum()
                if not (wants_states or wants_weight):
                    continue
                of_logits = _logit_gradient(log_probs, some, scale.expand(len(some))).to(tile.dtype)
                if wants_states:
                    of_states.append(of_logits @ product_weight)
                if of_weight is not None:
                    of_weight = of_weight + of_logits.mT @ tile
        ctx.save_for_backward(torch.cat(of_states) if of_states else None, of_weight)
        ctx.weight_dtype = weight.dtype
        return total * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_states, of_weight = ctx.saved_tensors
        return (
            None if of_states is None else of_states * gradient.to(of_states.dtype),
            None if of_weight is None else (of_weight * gradient).to(ctx.weight_dtype),
            None,
            None,
        )


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, with_gradients: bool) -> Tensor:
        wants_states = with_gradients and ctx.needs_input_grad[0]
        dtype = product_dtype(states)
        size, losses, of_states = _tile_rows(weight), [], []
        with torch.autocast(states.device.type, enabled=False):
            product_weight = weight.to(dtype)
            for tile, some in zip(states.split(size), labels.split(size), strict=True):
                of_tile, log_probs = _tile_losses(tile.to(dtype), product_weight, some)
                losses.append(of_tile)
                if wants_states:
                    of_logits = _logit_gradient(log_probs, some, torch.ones_like(of_tile))
                    of_states.append((of_logits.to(dtype) @ product_weight).to(states.dtype))
        ctx.dtype = dtype
        ctx.save_for_backward(states, weight, labels, torch.cat(of_states) if of_states else None)
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        states, weight, labels, of_states = ctx.saved_tensors
        if of_states is not None:
            of_states = of_states * gradient[:, None].to(of_states.dtype)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight, size = torch.zeros_like(weight, dtype=torch.float32), _tile_rows(weight)
            product_weight = weight.to(ctx.dtype)
            tiles = zip(states.split(size), labels.split(size), gradient.split(size), strict=True)
            for tile, some, scale in tiles:
                tile = tile.to(ctx.dtype)
                _, log_probs = _tile_losses(tile, product_weight, some)
                of_logits = _logit_gradient(log_probs, some, scale.float()).to(ctx.dtype)
                of_weight = of_weight + of_logits.mT @ tile
            of_weight = of_weight.to(weight.dtype)
        return of_states, of_weight, None, None
