"""The step of the backbone with a static key/value cache, compiled.

A step of generation has one position per row: on a GPU most of the time starts small kernels, and a CUDA graph avoids
that. The cache and the mask have their final size from the start, so that every step has the same shapes.

Shapes: B batch, K tokens of a patch, L patches, D hidden.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

from calm.models.capabilities import check_full_attention

_SHAPES = 64  # batch sizes, lengths and models
_SIZES = 256  # sizes of caches are multiples of it, in patches, so that other lengths do not compile again
_BUSY = threading.Lock()  # a model has one static cache, and the compiler is not thread-safe
_LAST: WeakKeyDictionary = WeakKeyDictionary()  # by model; not an attribute, so that copies have none


class StaticStep:
    """Compiled step and cache for one batch size and one greatest length."""

    def __init__(self, model: Any, num_patches: int):
        self.num_patches = num_patches
        self.cache = StaticCache(config=model.config.backbone_config, max_cache_len=num_patches)
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        self.run: Callable[..., Tensor] = torch.compile(_step, mode=mode, dynamic=False)

    @classmethod
    @contextmanager
    def of(cls, model: Any, state: Any, num_patches: int) -> Iterator[tuple[Any, Callable[[Any, Tensor], Any]]]:
        """Yield a state whose cache is static and the function that extends it; other threads wait meanwhile."""
        check_full_attention(model.config.backbone_config, "compiled")
        limit = -(-num_patches // _SIZES) * _SIZES
        # A cache and its compiled step are specific to these.
        key = (len(state.hidden), limit, model.dtype, model.device, torch.is_inference_mode_enabled())
        with _BUSY:
            made_for, step = _LAST.get(model, (None, None))
            if made_for != key:
                step = cls(model, limit)
                _LAST[model] = key, step
            yield step.take_over(state), partial(step.extend, model)

    def take_over(self, state: Any) -> Any:
        """Move a prompt's keys and values into the static cache."""
        self.cache.reset()
        for index, layer in enumerate(state.past_key_values.layers):
            self.cache.update(layer.keys, layer.values, index)
        mask = state.patch_mask
        if mask is not None:  # later places count as text: causality hides them until they are filled
            mask = torch.cat([mask, mask.new_ones(len(mask), self.num_patches - mask.shape[1])], dim=1)
        return type(state)(state.hidden, self.cache, state.position, mask)

    def extend(self, model: Any, state: Any, patch: Tensor) -> Any:
        """Feed a patch ``[B, K]`` back, as the ``extend`` of the model."""
        # Otherwise the compiler stops compiling this code after a few shapes, for all models of the process.
        with torch._dynamo.config.patch(recompile_limit=_SHAPES):
            hidden = self.run(model, patch, state.position, state.patch_mask, self.cache)
        # A copy, because the graph writes to the same memory in the next step.
        return type(state)(hidden.clone(), self.cache, state.position + 1, state.patch_mask)


def _step(model: Any, patch: Tensor, position: Tensor, patch_mask: Tensor | None, cache: StaticCache) -> Tensor:
    outputs = model(patch, attention_mask=patch_mask, position_ids=position, past_key_values=cache, use_cache=True)
    return outputs.last_hidden_state[:, -1]
