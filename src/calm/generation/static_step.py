"""The step of the backbone with a static key/value cache, compiled, and on a GPU captured in a CUDA graph.

A step of generation has one position per row: on a GPU most of the time starts small kernels, and a CUDA graph avoids
that. The cache and the mask have their final size from the start, so that every step has the same shapes.

The graph is an object of the step itself. Those of ``torch.compile(mode="reduce-overhead")`` are kept in thread-local
storage, and a model that was compiled in one thread cannot generate in another (torch before 2.13).

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
_WARM_UP = 2  # calls before a capture: the first compiles
_BUSY = threading.Lock()  # a model has one static cache, and the compiler is not thread-safe
_LAST: WeakKeyDictionary = WeakKeyDictionary()  # by model; not an attribute, so that copies have none

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def capture_cuda_graph(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record the kernels of a function once and return a function that replays them, from any thread.

    The function must read its inputs from tensors that stay where they are. Every replay writes to the same output.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device meanwhile
        output = function()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def capture_for(device: torch.device) -> Capture | None:
    """Return what records a step on a device; None where nothing does."""
    return capture_cuda_graph if device.type == "cuda" else None


class StaticStep:
    """Compiled step and cache for one batch size and one greatest length."""

    def __init__(self, model: Any, num_patches: int):
        self.num_patches = num_patches
        self.cache = StaticCache(config=model.config.backbone_config, max_cache_len=num_patches)
        self.capture = capture_for(model.device)
        self.run: Callable[..., Tensor] = torch.compile(_step, dynamic=False)
        self._inputs: list[Tensor | None] = []
        self._replay: Callable[[], Tensor] | None = None

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
            inputs = [patch, state.position, state.patch_mask]
            hidden = self.run(model, *inputs, self.cache) if self.capture is None else self._replayed(model, inputs)
        # A copy, because the graph writes to the same memory in the next step.
        return type(state)(hidden.clone(), self.cache, state.position + 1, state.patch_mask)

    def _replayed(self, model: Any, inputs: list[Tensor | None]) -> Tensor:
        assert self.capture is not None
        if self._replay is None or [each is None for each in inputs] != [each is None for each in self._inputs]:
            # Buffers of their own: the graph reads from these places.
            self._inputs = [None if each is None else each.clone() for each in inputs]
            # The calls before the capture write to the cache where the first replay will write, and count on.
            layers: list[Any] = list(self.cache.layers)
            lengths = [layer.cumulative_length.clone() for layer in layers]
            self._replay = self.capture(partial(self.run, model, *self._inputs, self.cache))
            for layer, length in zip(layers, lengths, strict=True):
                layer.cumulative_length.copy_(length)
        for buffer, value in zip(self._inputs, inputs, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        return self._replay()


def _step(model: Any, patch: Tensor, position: Tensor, patch_mask: Tensor | None, cache: StaticCache) -> Tensor:
    outputs = model(patch, attention_mask=patch_mask, position_ids=position, past_key_values=cache, use_cache=True)
    return outputs.last_hidden_state[:, -1]
