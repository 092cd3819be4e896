"""The samplers: the ways to sample the next patch from a hidden state.

To add one, write a subclass of :class:`Sampler` and register it; command line, server, evaluation and error messages
read the list of this module. This module does not import torch, because the command line reads it: the methods import
what they need.

Shapes: P positions, K tokens of a patch, D hidden, n most likely tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from calm.functional.rng import Generator
    from calm.generation.sampling_params import SamplingParams


@dataclass
class TokenLogprobs:
    """Log-probabilities in nats, of the model itself: before temperature and ``top_p``."""

    tokens: Tensor  # [P, K], of the sampled tokens, each given those before it
    top: Tensor  # [P, K, n], of the most likely tokens at every position, in descending order
    top_ids: Tensor  # [P, K, n]


@dataclass
class SampledPatches:
    """The next patch of every position, and what it took."""

    tokens: Tensor  # [P, K]
    num_samples: Tensor  # [P], samples of the head
    num_decoded: Tensor  # [P], products with the vocabulary (LM-head evaluations)
    logprobs: TokenLogprobs | None = None

    @classmethod
    def once(cls, tokens: Tensor, logprobs: TokenLogprobs | None = None) -> SampledPatches:
        """Return patches ``[P, K]`` that took one sample each, fully decoded."""
        ones = tokens.new_ones(len(tokens))
        return cls(tokens, ones, ones * tokens.shape[1], logprobs)

    @classmethod
    def empty(cls, num_rows: int, patch_size: int, device: Any, fill: int = 0, logprobs: int | None = None) -> Any:
        """Return patches of the token ``fill`` that took nothing, to be filled by :meth:`put`."""
        import torch

        tokens = torch.full((num_rows, patch_size), fill, dtype=torch.long, device=device)
        nothing = tokens.new_zeros(num_rows)
        if logprobs is None:
            return cls(tokens, nothing, nothing.clone())
        top_ids = tokens.new_zeros((num_rows, patch_size, logprobs))
        zeros = torch.zeros_like(tokens, dtype=torch.float32)
        return cls(tokens, nothing, nothing.clone(), TokenLogprobs(zeros, top_ids.float(), top_ids))

    def put(self, rows: Any, patches: SampledPatches) -> None:
        """Replace the rows ``[R]`` by R other patches, and add what those took."""
        self.tokens[rows] = patches.tokens
        self.num_samples[rows] += patches.num_samples
        self.num_decoded[rows] += patches.num_decoded
        if self.logprobs is not None and patches.logprobs is not None:
            self.logprobs.tokens[rows] = patches.logprobs.tokens
            self.logprobs.top[rows] = patches.logprobs.top
            self.logprobs.top_ids[rows] = patches.logprobs.top_ids


class Sampler:
    """Base of the samplers.

    Attributes:
        name: the ``sampler`` of :class:`~calm.generation.sampling_params.SamplingParams`.
        summary: a few words for help texts.
        has_probabilities: whether it knows the probabilities of tokens. Then any temperature from 0 is possible, and so
            are ``top_p`` and log-probabilities; otherwise the temperature is in (0, 1].
        compares_samples: whether it chooses among ``num_candidates`` samples below temperature 1.
        uses_head: whether it samples from the head; the costs of generation depend on it.
    """

    name = ""
    summary = ""
    has_probabilities = False
    compares_samples = False
    uses_head = True

    def check(self, params: SamplingParams) -> None:
        """Raise ValueError for parameters that the sampler cannot use; those that are None are not checked."""
        from calm.functional.temperature import check_candidates, check_known_temperature, check_temperature

        temperature = params.temperature
        if temperature is not None:
            (check_known_temperature if self.has_probabilities else check_temperature)(temperature)
            if self.compares_samples and params.num_candidates is not None:
                check_candidates(params.num_candidates, temperature)
        asked = {"top_p": params.top_p if params.top_p != 1 else None, "logprobs": params.logprobs}
        for name, value in asked.items():
            if value is not None and not self.has_probabilities:
                raise ValueError(
                    f"{name}={value} needs token probabilities, and sampler {self.name} only has samples: use sampler "
                    f"{' or '.join(samplers_with_probabilities())}, or leave {name} out (a lower temperature also "
                    "makes text safer)."
                )

    def missing(self, model: Any) -> str:
        """Return what a model lacks for this sampler, as part of a sentence; empty when it has all."""
        return ""

    def sample(self, model: Any, hidden: Tensor, params: SamplingParams, generator: Generator) -> SampledPatches:
        """Return the next patches of hidden states ``[P, D]``.

        Args:
            params: without None, as :meth:`SamplingParams.with_defaults` returns them, and checked.
            generator: one, or a list of one per position.
        """
        raise NotImplementedError

    def sample_in_rounds(
        self,
        model: Any,
        hidden: Tensor,
        params: SamplingParams,
        generator: Generator,
        report: Callable[[str], None],
    ) -> Iterator[tuple[SampledPatches, Tensor]] | None:
        """Return :meth:`sample` in pieces where it may take long, so that a server can serve others between them.

        Args:
            report: called with a warning, if there is one.

        Returns:
            an iterator over the patches and ``[P]``, which of them are final; None where it takes one piece.
        """
        return None

    def score(self, model: Any, hidden: Tensor, tokens: Tensor, num_top: int = 0) -> tuple[TokenLogprobs, Tensor]:
        """Return log-probabilities of given patches ``[P, K]`` after hidden states ``[P, D]``.

        The second result is a mask ``[P, K]`` of the tokens that are the most likely at their position.
        """
        raise NotImplementedError

    def num_head_samples(self, params: SamplingParams) -> int:
        """Return the number of samples of the head that a patch takes at most."""
        if not self.uses_head:
            return 0
        return (params.num_candidates or 1) if self.compares_samples and params.temperature != 1 else 1


_SAMPLERS: dict[str, Sampler] = {}
# Former names, accepted for one release.
_RENAMED = {"token_prediction": "mtp"}


def register_sampler(sampler: type[Sampler]) -> type[Sampler]:
    """Add a sampler to the list under its ``name``; a decorator of subclasses of :class:`Sampler`.

    Raises:
        ValueError: for a name that is empty or belongs to another class.
    """
    known = _SAMPLERS.get(sampler.name)
    if not sampler.name or sampler.name in _RENAMED:
        raise ValueError(f"sampler {sampler.__name__} needs a name of its own, got {sampler.name!r}.")
    if known is not None and type(known).__qualname__ != sampler.__qualname__:
        raise ValueError(f"a sampler named {sampler.name} exists already: choose another name.")
    _SAMPLERS[sampler.name] = sampler()
    return sampler


def sampler_names() -> list[str]:
    """Return the names of all samplers."""
    return list(_SAMPLERS)


def samplers_with_probabilities() -> list[str]:
    """Return the names of the samplers that know the probabilities of tokens."""
    return [name for name, sampler in _SAMPLERS.items() if sampler.has_probabilities]


def find_sampler(name: str) -> Sampler:
    """Return the sampler of a name; ValueError names those that exist."""
    name = _RENAMED.get(name, name)
    if name not in _SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(_SAMPLERS)}, got {name!r:.60}.")
    return _SAMPLERS[name]


def canonical_name(name: str, warn: bool = True) -> str:
    """Return the present name of a sampler; a former one is accepted with a FutureWarning."""
    if name not in _RENAMED:
        return name
    if warn:
        warnings.warn(
            f"sampler {name!r} is named {_RENAMED[name]!r} now; the old name works for one more release.",
            FutureWarning,
            stacklevel=3,
        )
    return _RENAMED[name]


def supported_samplers(model: Any) -> list[str]:
    """Return the names of the samplers that a CALM can use."""
    return [name for name, sampler in _SAMPLERS.items() if not sampler.missing(model)]


def default_sampler(model: Any) -> str:
    """Return the sampler of a new model: the first with token probabilities that it supports, or else batch."""
    return next((name for name in supported_samplers(model) if _SAMPLERS[name].has_probabilities), "batch")


@register_sampler
class BatchSampler(Sampler):
    """Choose among ``num_candidates`` samples of the head by how often they agree: fast, approximate."""

    name = "batch"
    summary = "compares samples of the head: fast, approximate"
    compares_samples = True

    def sample(self, model: Any, hidden: Tensor, params: SamplingParams, generator: Generator) -> SampledPatches:
        """Return the next patches, as :meth:`Sampler.sample`."""
        from calm.functional.temperature import sample_batch

        if params.temperature == 1:
            return _sample_head(model, hidden, generator)
        assert params.temperature is not None
        assert params.num_candidates is not None
        samples = model.lazy_samples(hidden, generator)
        tokens = sample_batch(samples, params.temperature, params.num_candidates)
        return SampledPatches(tokens, samples.num_samples, samples.num_decoded)


@register_sampler
class ExactSampler(Sampler):
    """Sample from the head until enough samples agree: exact, slow at low temperature."""

    name = "exact"
    summary = "compares samples of the head until enough agree: exact, slow at low temperature"
    compares_samples = True

    def sample(self, model: Any, hidden: Tensor, params: SamplingParams, generator: Generator) -> SampledPatches:
        """Return the next patches, as :meth:`Sampler.sample`."""
        if params.temperature == 1:
            return _sample_head(model, hidden, generator)
        warn = lambda message: warnings.warn(message, stacklevel=2)  # noqa: E731
        *_, (patches, _) = self._rounds(model, hidden, params, generator, warn)
        return patches

    def sample_in_rounds(
        self,
        model: Any,
        hidden: Tensor,
        params: SamplingParams,
        generator: Generator,
        report: Callable[[str], None],
    ) -> Iterator[tuple[SampledPatches, Tensor]] | None:
        """Return an iterator of rounds of at most 64 samples, as :meth:`Sampler.sample_in_rounds`."""
        if params.temperature == 1:
            return None
        return self._rounds(model, hidden, params, generator, report)

    def _rounds(
        self,
        model: Any,
        hidden: Tensor,
        params: SamplingParams,
        generator: Generator,
        report: Callable[[str], None],
    ) -> Iterator[tuple[SampledPatches, Tensor]]:
        """Yield the patches after every round; the batch sampler chooses those whose budget is spent."""
        from calm.functional.rng import of_rows
        from calm.functional.temperature import exact_rounds

        assert params.temperature is not None
        samples = model.lazy_samples(hidden, generator)
        for tokens, accepted in exact_rounds(samples, params.temperature):
            patches = SampledPatches(tokens, samples.num_samples, samples.num_decoded)
            yield patches, accepted
        rows = (~accepted).nonzero()[:, 0]
        if len(rows) == 0:
            return
        report(
            f"the samples of {len(rows)} patch(es) agree too rarely for exact sampling at temperature "
            f"{params.temperature:g}; the batch sampler chose there."
        )
        patches.put(rows, find_sampler("batch").sample(model, hidden[rows], params, of_rows(generator, rows)))
        yield patches, accepted.new_ones(len(accepted))


@register_sampler
class DirectSampler(Sampler):
    """Sharpen the probabilities that a categorical flow head predicts: one sample at any temperature."""

    name = "direct"
    summary = "samples from the token probabilities of a categorical flow head"
    has_probabilities = True

    def missing(self, model: Any) -> str:
        """Return what a model lacks, as :meth:`Sampler.missing`."""
        if model.head.has_log_prob:
            return ""
        return f"a head with token probabilities (categorical_flow), and this model has a {_head_type(model)} head"

    def sample(self, model: Any, hidden: Tensor, params: SamplingParams, generator: Generator) -> SampledPatches:
        """Return the next patches, as :meth:`Sampler.sample`."""
        options = {} if params.top_p == 1 else {"top_p": params.top_p}
        latents = model.head.sample(hidden, generator=generator, temperature=params.temperature, **options)
        tokens = model.autoencoder.decode_tokens(latents).to(hidden.device)
        return SampledPatches.once(tokens, _logprobs(self, model, hidden, tokens, params))

    def score(self, model: Any, hidden: Tensor, tokens: Tensor, num_top: int = 0) -> tuple[TokenLogprobs, Tensor]:
        """Return log-probabilities, as :meth:`Sampler.score`; tokens outside the shortlist have probability 0."""
        log_prob, is_best, *top = model.head.log_probabilities(hidden, tokens, num_top=num_top)
        return TokenLogprobs(log_prob, *top), is_best


@register_sampler
class MtpSampler(Sampler):
    """Sample the tokens of a patch from multi-token prediction, without head and autoencoder."""

    name = "mtp"
    summary = "samples from multi-token prediction, without the head"
    has_probabilities = True
    uses_head = False

    def missing(self, model: Any) -> str:
        """Return what a model lacks, as :meth:`Sampler.missing`."""
        if model.config.mtp_weight:
            return ""
        return "multi-token prediction, and this model was trained without it (model.mtp_weight in its recipe)"

    def sample(self, model: Any, hidden: Tensor, params: SamplingParams, generator: Generator) -> SampledPatches:
        """Return the next patches, as :meth:`Sampler.sample`."""
        embeddings = model.token_matrix(hidden.device)
        options = {} if params.top_p == 1 else {"top_p": params.top_p}
        tokens = model.mtp_head.draw(hidden, embeddings, params.temperature, generator, **options)
        return SampledPatches.once(tokens, _logprobs(self, model, hidden, tokens, params))

    def score(self, model: Any, hidden: Tensor, tokens: Tensor, num_top: int = 0) -> tuple[TokenLogprobs, Tensor]:
        """Return log-probabilities, as :meth:`Sampler.score`."""
        embeddings = model.token_matrix(hidden.device)
        log_prob, is_best, *top = model.mtp_head.log_probabilities(hidden, tokens, embeddings, num_top=num_top)
        return TokenLogprobs(log_prob, *top), is_best


def _sample_head(model: Any, hidden: Tensor, generator: Generator) -> SampledPatches:
    """Return one sample of the head per position, decoded: temperature 1."""
    tokens = model.autoencoder.decode_tokens(model.head.sample(hidden, generator=generator))
    return SampledPatches.once(tokens.to(hidden.device))


def _logprobs(
    sampler: Sampler, model: Any, hidden: Tensor, tokens: Tensor, params: SamplingParams
) -> TokenLogprobs | None:
    """Return the log-probabilities of sampled patches, where the parameters ask for them."""
    return None if params.logprobs is None else sampler.score(model, hidden, tokens, params.logprobs)[0]


def _head_type(model: Any) -> str:
    return str(model.config.head_config.type)
