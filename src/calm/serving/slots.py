"""The keys and values of all running sequences: one slot each, of fixed size, allocated once.

Running sequences have the slots 0 to n - 1, whatever their lengths: a step of n sequences uses a view of the first n
slots, without copying.

Shapes: n running sequences, q new positions of each, P positions (patches, or tokens of a token model).
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from calm.models.capabilities import check_full_attention


class SlotCache(Cache):
    """A cache for ``num_slots`` sequences of at most ``num_positions`` positions.

    ``num_spare`` positions after them hold tokens that are drafted beyond the end of a sequence.

    Raises ValueError for backbones whose layers do not all attend to all positions.
    """

    def __init__(
        self,
        config: Any,
        num_slots: int,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        num_spare: int = 0,
    ):
        check_full_attention(config, "served")
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (num_slots, num_heads, num_positions + num_spare, head_size)
        self._slots = [_SlotLayer(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self._slots))
        self.num_slots, self.num_positions = num_slots, num_positions
        self.num_bytes = sum(2 * layer.keys.nbytes for layer in self._slots)

    def put(self, slot: int, cache: Any, row: int, length: int) -> None:
        """Copy the first ``length`` positions of a row of a prompts' cache into a slot."""
        for layer, source in zip(self._slots, cache.layers, strict=True):
            layer.keys[slot, :, :length] = source.keys[row, :, :length]
            layer.values[slot, :, :length] = source.values[row, :, :length]
            # The keys of a former sequence are removed: masked positions have weight 0, and 0 times NaN is NaN.
            layer.keys[slot, :, length:], layer.values[slot, :, length:] = 0, 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a sequence of ``length`` positions from one slot to another."""
        for layer in self._slots:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def next_step(self, positions: Tensor, length: int) -> Tensor:
        """Set where the next step writes, ``[n]`` or ``[n, q]``, all before ``length``; return its mask.

        The mask is ``[n, 1, 1, P]`` or ``[n, 1, q, P]``: every position sees those up to itself.
        """
        positions = positions.view(len(positions), -1)
        for layer in self._slots:
            layer.positions, layer.length = positions, length
        visible = torch.arange(length, device=positions.device) <= positions[..., None]
        dtype = self._slots[0].keys.dtype
        hidden = torch.zeros(visible.shape, dtype=dtype, device=positions.device)
        return hidden.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


class _SlotLayer(CacheLayerMixin):
    """The slots of one layer; ``update`` adds q positions of every running sequence."""

    keys: Tensor
    values: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.keys, self.values = torch.zeros((2, *shape), dtype=dtype, device=device).unbind()
        self.positions = torch.zeros(0, 1, dtype=torch.long, device=device)  # [n, q]
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: all memory is allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        count = len(self.positions)
        rows = torch.arange(count, device=self.positions.device)[:, None]
        self.keys[rows, :, self.positions] = key_states.transpose(1, 2)
        self.values[rows, :, self.positions] = value_states.transpose(1, 2)
        return self.keys[:count, :, : self.length], self.values[:count, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self, *args) -> int:
        return max(self.length - self.positions.shape[1], 0)

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """Return :meth:`get_max_length`, under its older name."""
        return self.get_max_length()
