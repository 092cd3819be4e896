"""Continuations of a block that share its key/value cache: branches of a tree whose trunk is the block.

A branch sees the trunk up to where it leaves it and its own nodes, and has the rotary positions it would have alone, so
its hidden states are those of a plain forward pass over its own text.

Shapes: B blocks, L positions of the trunk, n nodes added to each block at once, m nodes so far (trunk included),
D hidden.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

_NODES = 256  # of a block at once: bounds the attention mask


class Branches:
    """Nodes on the cache of a forward pass over blocks."""

    def __init__(self, backbone: Any, cache: Cache, length: int):
        self.backbone, self.cache, self.length = backbone, cache, length

    def behind(self, contexts: Tensor) -> Tensor:
        """What a node sees that follows a position of the trunk: ``[B, n] -> [B, n, L]``."""
        return torch.arange(self.length, device=contexts.device) <= contexts[..., None]

    def grow(self, inputs: Tensor, positions: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Add nodes.

        Args:
            inputs: embeddings ``[B, n, D]``.
            positions: ``[B, n]``.
            visible: what each sees, ``[B, n, up to m]``: :meth:`behind` it, or what its parent sees.

        Returns:
            hidden states ``[B, n, D]``, and what children of the nodes see, ``[B, n, m + n]``.
        """
        batch_size, count, _ = inputs.shape
        nodes = self.cache.get_seq_length() - visible.shape[2]
        visible = torch.nn.functional.pad(visible, (0, int(nodes)))
        own = torch.eye(count, dtype=torch.bool, device=inputs.device).expand(batch_size, -1, -1)
        visible = torch.cat([visible, own], dim=2)
        mask = torch.zeros(visible.shape, dtype=inputs.dtype, device=inputs.device)
        mask = mask.masked_fill_(~visible, torch.finfo(inputs.dtype).min)
        outputs = self.backbone(
            inputs_embeds=inputs,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.last_hidden_state, visible

    def backwards(self, contexts: Tensor, nodes_each: int) -> Iterator[Tensor]:
        """Contexts ``[P]`` that each grow so many nodes at once, in pieces from the end of the block to its beginning.

        What no context of a piece or of those to come sees is cut off before it.
        """
        for some in reversed(contexts.split(max(1, _NODES // max(1, nodes_each)))):
            self.cut(int(some[-1]) + 1)
            yield some

    def cut(self, length: int) -> None:
        """Remove all nodes, and the trunk from a position on: the first ``length`` are left."""
        surplus = int(self.cache.get_seq_length()) - length
        if surplus:
            self.cache.crop(-surplus)
        self.length = length
