"""``calm.load``: a language model and its tokenizer, ready to continue text."""

import dataclasses
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from calm.checkpoints.loading import load_autoencoder, load_language_model
from calm.data.text import ContinuationDecoder
from calm.data.tokenizer import load_tokenizer
from calm.generation.completions import complete
from calm.generation.sampling_params import SamplingParams
from calm.utils.device import resolve_device, resolve_dtype


class TextModel:
    """A language model and its tokenizer.

    Attributes:
        model: a :class:`~calm.CalmForCausalLM`, or a token model of transformers.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        return f"TextModel({type(self.model).__name__} on {self.model.device})"

    def generate(self, prompt: str = "", params: SamplingParams | None = None, **changes: Any) -> str:
        """Return a continuation of a prompt, without the prompt.

        Args:
            prompt: text to continue; empty for a new document.
            params: sampling parameters; what they leave open is taken from the model.
            changes: fields of :class:`~calm.SamplingParams` that replace those of ``params``: ``temperature``,
                ``max_new_tokens``, ``sampler``, ``stop``, ``seed``, ...

        Raises:
            ValueError: when a parameter is unknown or does not fit the model.
        """
        return complete(self.model, self.tokenizer, [prompt], _with_changes(params, changes))[0]["text"]

    def stream(self, prompt: str = "", params: SamplingParams | None = None, **changes: Any) -> Iterator[str]:
        """Yield the continuation of a prompt piece by piece while it is generated; arguments as in :meth:`generate`.

        Generation stops when the iterator is closed.
        """
        return self._pieces(prompt, _with_changes(params, changes))

    def _pieces(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        pieces = _Pieces(self.tokenizer)

        def generate() -> None:
            try:
                complete(self.model, self.tokenizer, [prompt], params, pieces)
                pieces.queue.put(None)
            except _ClosedError:
                pass
            except BaseException as error:  # raised again in the thread of the caller
                pieces.queue.put(error)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            while (piece := pieces.queue.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            pieces.is_closed = True
            thread.join()


def load(
    path: str | os.PathLike,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    tokenizer: str | os.PathLike | None = None,
    autoencoder: str | os.PathLike | None = None,
) -> TextModel:
    """Load a language model and its tokenizer from a directory or hub id, in evaluation mode.

    CALMs and token models of this package, the released checkpoints of the reference implementation, and token models
    of transformers can be loaded.

    Args:
        device: ``"auto"`` is the accelerator, or the CPU if there is none.
        dtype: ``"auto"`` is float32 on a CPU, and the type of the saved weights elsewhere.
        tokenizer: directory or hub id of the tokenizer; default that of the model.
        autoencoder: directory or hub id of the autoencoder, for a released checkpoint that has none.

    Raises:
        ValueError: when there is no language model, or a file of it is damaged.
    """
    target = resolve_device(str(device))
    own = None if autoencoder is None else load_autoencoder(autoencoder)
    model: Any = load_language_model(path, resolve_dtype(dtype, target), own)
    return TextModel(model.to(target), load_tokenizer(str(path if tokenizer is None else tokenizer)))


class _ClosedError(Exception):
    """Stop the generation of a stream whose reader has closed it."""


class _Pieces(BaseStreamer):
    """Decode the patches of a continuation and pass them to another thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.queue: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self.is_closed = False
        self._decoder = ContinuationDecoder(tokenizer)
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.is_closed:
            raise _ClosedError
        text = self._decoder.add(value.flatten().tolist())
        if not self._is_prompt:  # the prompt comes first
            self.queue.put(text)
        self._is_prompt = False

    def end(self) -> None:
        self.queue.put(self._decoder.add([], last=True))


def _with_changes(params: SamplingParams | None, changes: dict[str, Any]) -> SamplingParams:
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    if unknown := [name for name in changes if name not in names]:
        raise ValueError(f"{unknown[0]} is no sampling parameter; the parameters are {', '.join(names)}.")
    return dataclasses.replace(params or SamplingParams(), **changes)
