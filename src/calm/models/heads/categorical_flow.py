"""The categorical flow head: a few passes carry noise to token codes, each pass predicts the clean tokens.

The latent vector is the K token codes of a patch (:class:`~calm.models.modeling_codes.TokenCodes`). At time 0 the head
is independent multi-token prediction. Later passes see the noisy codes and the tokens that are already chosen.

Shapes: P positions, S samples of a position, K tokens of a patch, d code size, Z = K * d latent, D hidden, W width of
the network, R size of the token features, V vocabulary, M shortlist, ... any leading dimensions.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from calm.functional.categorical_flow import code_logit_scale, euler_step
from calm.functional.noise import Generator, normal, pick, uniform
from calm.functional.temperature import sharpened
from calm.functional.tiles import checkpointed_rows, rows_at_once
from calm.models.best_token import best_token
from calm.models.configuration_heads import CategoricalFlowHeadConfig
from calm.models.heads.base import Head, HeadLoss, leading_shape
from calm.models.heads.clean_token_network import CleanTokenNetwork, NetworkInputs
from calm.models.modeling_autoencoder import Posterior

_SAMPLING_ELEMENTS = 2**22  # of the logits that exist at once on a CPU
_CHOSEN = 1.0  # time of a token that is chosen: its code is free of noise
_MOST_SCALE = 0.85  # code_logit_scale is evaluated at this time at most, where a code is readable without doubt


@dataclass
class _Vocabulary:
    """Tables with one row per token that can be chosen: all V tokens, or the M tokens of a shortlist.

    Output embeddings ``[V, D]``, codes ``[V, d]`` and features ``[V, R]``; those of a shortlist begin with
    ``[P, K, M, ...]`` and broadcast over samples.
    """

    embeddings: Tensor
    codes: Tensor
    features: Tensor

    def shortlist(self, token_ids: Tensor) -> "_Vocabulary":
        """Return the rows of some tokens of every position: ids ``[P, K, M]``."""
        return _Vocabulary(*(F.embedding(token_ids, table) for table in (self.embeddings, self.codes, self.features)))

    def before(self, stop: int) -> "_Vocabulary":
        """Return the tables of the first tokens of a patch."""
        return self._part(slice(stop))

    def after(self, start: int) -> "_Vocabulary":
        """Return the tables of the tokens of a patch from ``start`` on."""
        return self._part(slice(start, None))

    def _part(self, part: slice) -> "_Vocabulary":
        if self.codes.dim() == 2:
            return self
        return _Vocabulary(self.embeddings[:, part], self.codes[:, part], self.features[:, part])


def _scores(states: Tensor, table: Tensor) -> Tensor:
    """Return products of states ``[..., K, X]`` with the rows of a table: ``[..., K, V or M]``, in float32."""
    states = states.to(table.dtype)
    return (F.linear(states, table) if table.dim() == 2 else (table @ states[..., None])[..., 0]).float()


def _code_scores(scaled: Tensor, codes: Tensor) -> Tensor:
    """Return the log-likelihoods of noisy codes up to a constant, as :func:`_scores`, without autocast.

    They reach some tens of nats, where half precision is off by tenths.
    """
    with torch.autocast(scaled.device.type, enabled=False):
        return _scores(scaled, codes)


def _expectation(probs: Tensor, table: Tensor) -> Tensor:
    """Return the mean of a table's rows: ``[..., K, V or M] -> [..., K, X]``."""
    probs = probs.to(table.dtype)
    return probs @ table if table.dim() == 2 else (probs[..., None, :] @ table)[..., 0, :]


def _rows(index: Tensor, table: Tensor) -> Tensor:
    """Return one row of a table per token: ``[S, P, K] -> [S, P, K, X]``."""
    if table.dim() == 2:
        return F.embedding(index, table)
    place = index[..., None, None].expand(*index.shape, 1, table.shape[-1])
    return table.expand(len(index), *table.shape).gather(3, place)[..., 0, :]


class CategoricalFlowHead(Head):
    """Few-pass flow over token codes; see :class:`~calm.models.configuration_heads.CategoricalFlowHeadConfig`."""

    has_log_prob = True

    def __init__(self, config: CategoricalFlowHeadConfig, hidden_size: int, latent_size: int):
        super().__init__()
        self.config = config
        self.latent_size, self.patch_size = latent_size, latent_size // config.code_size
        width = config.hidden_size or hidden_size
        self.base_proj = nn.Linear(hidden_size, self.patch_size * hidden_size, bias=False)
        self.passes = config.schedule(self.patch_size)
        if len(self.passes) > 1:
            self.prior_proj = nn.Linear(hidden_size, self.patch_size * config.feature_size)
            self.network = CleanTokenNetwork(config, self.patch_size, hidden_size, width)

    def attach(self, token_embeddings: nn.Embedding, autoencoder: nn.Module) -> None:
        """Take the backbone's token embeddings as output layer and the codes of the autoencoder."""
        # In a tuple, so that they are not registered as parts of the head: the model saves and moves them.
        self._tables = (token_embeddings, autoencoder)
        if len(self.passes) > 1:
            vocab_size = token_embeddings.num_embeddings
            self.token_features = nn.Parameter(torch.empty(vocab_size, self.config.feature_size))

    def _vocabulary(self) -> _Vocabulary:
        embeddings, autoencoder = self._tables
        features = (
            self.token_features if len(self.passes) > 1 else autoencoder.codes.new_zeros(len(autoencoder.codes), 0)
        )
        return _Vocabulary(embeddings.weight, autoencoder.codes.float(), features)

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(
        self,
        hidden: Tensor,
        posterior: Posterior,
        noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        generator: Generator = None,
        uniforms: Tensor | None = None,
    ) -> HeadLoss:
        """Return the cross-entropy of the clean tokens in the first pass, plus that in a random later pass.

        The later passes do not train the backbone: their gradient made every way to read its hidden states worse.

        Args:
            noise: standard normal ``[..., Z]``.
            target_noise: not used, the targets have no variance.
            uniforms: uniform in [0, 1), ``[...]``; the pass.
        """
        table = self._vocabulary()
        codes = posterior.mean.unflatten(-1, (self.patch_size, -1)).float()
        token_ids = posterior.token_ids
        if token_ids is None:
            token_ids = best_token(codes.flatten(0, -2), table.codes).view(codes.shape[:-1])
        if noise is None:
            noise = normal(posterior.mean.shape, generator, hidden.device, row_dim=0)
        if uniforms is None:
            uniforms = uniform(hidden.shape[:-1], generator, hidden.device, row_dim=0)
        base = self.base_proj(hidden).unflatten(-1, (self.patch_size, -1))
        first = self._cross_entropy(base, token_ids, table)
        if len(self.passes) == 1:
            return HeadLoss(first, {"first_cross_entropy": first})
        time = self._training_times(uniforms)
        noise = noise.unflatten(-1, (self.patch_size, -1)).float()
        points = time[..., None] * codes + (1 - time[..., None]) * noise
        hidden, table = hidden.detach(), dataclasses.replace(table, embeddings=table.embeddings.detach())
        prior = self.prior_proj(hidden).unflatten(-1, (self.patch_size, -1))
        rows = (_scaled(points, time).flatten(0, -2), prior.flatten(0, -2))
        expected = checkpointed_rows(_expected_features, len(table.codes), rows, table.codes, table.features)
        is_chosen = (time == _CHOSEN)[..., None]
        chosen = F.embedding(token_ids, table.embeddings) * is_chosen
        inputs = NetworkInputs(_estimated(points, time), expected.view(*token_ids.shape, -1), chosen, time)
        states = base.detach() + self.network(inputs, hidden)
        labels = token_ids.masked_fill(is_chosen[..., 0], -100)
        later = self._cross_entropy(states, labels, table, _scaled(points, time))
        return HeadLoss(first + later, {"first_cross_entropy": first, "later_cross_entropy": later})

    def _training_times(self, uniforms: Tensor) -> Tensor:
        """Return the time of every token in a random pass after the first, 1 for chosen tokens: ``[..., K]``."""
        later = torch.stack([self._times(*each, uniforms.device) for each in self.passes[1:]])
        return later[(uniforms * len(later)).long()]

    def _times(self, time: float, num_chosen: int, device: torch.device) -> Tensor:
        """Return the time of every token in a pass: ``[K]``."""
        times = torch.full((self.patch_size,), time, device=device)
        times[:num_chosen] = _CHOSEN
        return times

    def _cross_entropy(
        self, states: Tensor, labels: Tensor, table: _Vocabulary, scaled: Tensor | None = None
    ) -> Tensor:
        """Return the mean cross-entropy in nats of the tokens of each patch whose label is not -100: ``[...]``."""
        rows = (states.flatten(0, -2), labels.flatten())
        others = (table.embeddings,)
        if scaled is not None:
            rows, others = (*rows, scaled.flatten(0, -2)), (*others, table.codes)  # type: ignore[assignment]
        function = _token_loss if scaled is None else _noisy_token_loss
        losses = checkpointed_rows(function, len(table.codes), rows, *others)
        counted = labels.ne(-100)
        return losses.view(labels.shape).sum(-1) / counted.sum(-1).clamp(min=1)

    # --- sampling -----------------------------------------------------------------------------------------------------

    def sample(
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        generator: Generator = None,
        num_samples: int | None = None,
        temperature: float = 1.0,
        return_log_prob: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return one latent per hidden state, or ``num_samples``, as :meth:`Head.sample`.

        Args:
            noise: ``[..., Z + K]``: standard normal for the points at time 0, then uniform in [0, 1), one for the
                choice of every token.
            temperature: at least 0. The probabilities of every pass are raised to the power 1 / temperature; 0 chooses
                the most likely token.
            return_log_prob: also return the log-probability in nats, ``[...]``, with which the tokens are chosen given
                the normal part of the noise. It is the probability of the patch with the noise as auxiliary variable.
        """
        if noise is None:
            shape = leading_shape(hidden, num_samples)
            parts = [
                normal((*shape, self.latent_size), generator, hidden.device),
                uniform((*shape, self.patch_size), generator, hidden.device),
            ]
            noise = torch.cat(parts, dim=-1)
        tokens, log_prob = self._tiled(hidden, noise, temperature)
        latents = F.embedding(tokens, self._vocabulary().codes).flatten(-2).to(hidden.dtype)
        return (latents, log_prob) if return_log_prob else latents

    def log_prob(self, hidden: Tensor, token_ids: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Return the log-probability in nats of given tokens, given the noise of the points.

        Its mean over noise is a lower bound of the log-likelihood; the log of the mean probability is a closer one.

        Args:
            hidden: ``[..., D]``.
            token_ids: ``[..., K]``. A token outside the shortlist has probability 0.
            noise: standard normal ``[..., Z]``; extra leading dimensions give several values per state.
        """
        return self._tiled(hidden, noise, temperature, token_ids)[1]

    def _tiled(
        self, hidden: Tensor, noise: Tensor, temperature: float, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return tokens ``[..., K]``, chosen or given, and their log-probabilities ``[...]``."""
        states = hidden.flatten(0, -2)
        samples = noise.reshape(-1, len(states), noise.shape[-1])  # [S, P, X]
        table = self._vocabulary()
        size = rows_at_once(len(samples) * self.patch_size * len(table.codes), hidden.device, _SAMPLING_ELEMENTS)
        given = [None] * len(states) if token_ids is None else token_ids.flatten(0, -2).split(size)
        tiles = zip(states.split(size), samples.split(size, dim=1), given, strict=False)
        tokens, log_prob = zip(*(self._sample(*tile, table, temperature) for tile in tiles), strict=True)
        return (
            torch.cat(tokens, dim=1).view(*noise.shape[:-1], self.patch_size),
            torch.cat(log_prob, dim=1).view(noise.shape[:-1]),
        )

    def _sample(
        self, hidden: Tensor, noise: Tensor, given: Tensor | None, table: _Vocabulary, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return tokens and their log-probabilities: ``[P, D], [S, P, Z (+ K)], [P, K] -> [S, P, K], [S, P]``."""
        patch_size = self.patch_size
        points, uniforms = noise[..., : self.latent_size].float(), noise[..., self.latent_size :].float()
        points = points.unflatten(-1, (patch_size, -1))
        base = _scores(self.base_proj(hidden).unflatten(-1, (patch_size, -1)), table.embeddings)  # [P, K, V]
        token_ids: Tensor | None = None
        if self.config.shortlist_size is not None and self.config.shortlist_size < len(table.codes):
            base, token_ids = base.topk(self.config.shortlist_size)
            table = table.shortlist(token_ids)
        prior = base[..., :0]
        if len(self.passes) > 1:
            prior = _scores(self.prior_proj(hidden).unflatten(-1, (patch_size, -1)), table.features)
        log_prob = torch.zeros_like(points[..., 0, 0])
        if given is not None:
            given, is_listed = _in_shortlist(given, token_ids)
            log_prob = log_prob.masked_fill(~is_listed, -math.inf)
        tokens = torch.zeros((*points.shape[:2], patch_size), dtype=torch.long, device=points.device)
        for (time, start), (next_time, stop) in itertools.pairwise((*self.passes, (_CHOSEN, patch_size))):
            logits = base[:, start:]
            if start:
                logits = logits + self._context_scores(hidden, points, tokens, prior, table, (time, start))
            probs = sharpened(logits, temperature).expand(len(points), -1, -1, -1)  # [S, P, K - start, V]
            now, later = probs.split([stop - start, patch_size - stop], dim=2)
            chosen = pick(now, uniforms[..., start:stop, None])[..., 0] if given is None else given[:, start:stop]
            tokens[..., start:stop] = chosen
            log_prob = log_prob + now.gather(-1, tokens[..., start:stop, None]).log().sum((-1, -2))
            codes = _rows(tokens[..., :stop], table.before(stop).codes)
            others = points[..., stop:, :]
            if stop < patch_size:
                clean = _expectation(later, table.after(stop).codes)
                others = euler_step(others, clean, points.new_tensor(time), points.new_tensor(next_time))
            points = torch.cat([codes, others], dim=-2)
        if token_ids is not None:
            tokens = token_ids.expand(len(tokens), -1, -1, -1).gather(-1, tokens[..., None])[..., 0]
        return tokens, log_prob

    def _context_scores(
        self,
        hidden: Tensor,
        points: Tensor,
        tokens: Tensor,
        prior: Tensor,
        table: _Vocabulary,
        at: tuple[float, int],
    ) -> Tensor:
        """Return what noisy codes and chosen tokens add to the logits of the others: ``[S, P, K - chosen, V]``."""
        time, num_chosen = at
        some, others = table.after(num_chosen), (..., slice(num_chosen, None), slice(None))
        times = self._times(time, num_chosen, points.device)
        codes = _code_scores(_scaled(points, times)[others], some.codes)
        expected = _expectation((prior[:, num_chosen:] + codes).softmax(-1), some.features)
        # A chosen token is its own expectation.
        listed = table.before(num_chosen)
        known = _rows(tokens[..., :num_chosen], listed.features)
        chosen = _rows(tokens[..., :num_chosen], listed.embeddings)
        chosen = F.pad(chosen, (0, 0, 0, self.patch_size - num_chosen))
        inputs = NetworkInputs(_estimated(points, times), torch.cat([known, expected], dim=-2), chosen, times)
        return codes + _scores(self.network(inputs, hidden)[others], some.embeddings)

    def flops(self) -> tuple[float, float]:
        """As :meth:`Head.flops`, with the products with the vocabulary or the shortlist."""
        config, patch_size = self.config, self.patch_size
        vocab_size, hidden_size = self._tables[0].weight.shape
        shortlist = min(config.shortlist_size or vocab_size, vocab_size)
        table = config.code_size + config.feature_size  # entries per token that later passes read beside its embedding
        first = _linear_size(self.base_proj) + patch_size * vocab_size * hidden_size
        if len(self.passes) == 1:
            return 2 * first, 2 * first
        prior, network = (_linear_size(part) for part in (self.prior_proj, self.network))
        training = first + prior + network + patch_size * vocab_size * (hidden_size + 2 * table)
        sample = first + prior + patch_size * shortlist * config.feature_size
        for _, num_chosen in self.passes[1:]:
            sample += network + (patch_size - num_chosen) * shortlist * (hidden_size + table + config.code_size)
        return 2 * training, 2 * sample

    def init_weights(self) -> None:
        init.kaiming_uniform_(self.base_proj.weight, a=math.sqrt(5))
        if len(self.passes) > 1:
            init.kaiming_uniform_(self.prior_proj.weight, a=math.sqrt(5))
            init.zeros_(self.prior_proj.bias)
            init.normal_(self.token_features, std=0.3)
            self.network.init_weights()


def _linear_size(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _in_shortlist(given: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the place of tokens in their shortlist, and whether all of a patch are in it: ``[P, K]``, ``[P]``."""
    if token_ids is None:
        return given, torch.ones(len(given), dtype=torch.bool, device=given.device)
    is_token = token_ids == given[..., None]
    return is_token.long().argmax(-1), is_token.any(-1).all(-1)


def _readable(time: Tensor) -> Tensor:
    """Return times at which the scale of the code scores stays finite, ``[..., K] -> [..., K, 1]``."""
    return time.clamp(max=_MOST_SCALE)[..., None]


def _scaled(points: Tensor, time: Tensor) -> Tensor:
    """Return a(t) z_t, whose products with the codes are log-likelihoods: ``[..., K, d], [..., K] -> [..., K, d]``."""
    return code_logit_scale(_readable(time)) * points


def _estimated(points: Tensor, time: Tensor) -> Tensor:
    """Return the linear estimate of the codes, 0 at time 0: ``[..., K, d], [..., K] -> [..., K, d]``."""
    time = _readable(time)
    return time / (time.square() + (1 - time).square()) * points


def _expected_features(scaled: Tensor, prior: Tensor, codes: Tensor, features: Tensor) -> Tensor:
    """``[rows, d], [rows, R] -> [rows, R]``: the mean feature under prior and noisy code."""
    return (_code_scores(scaled, codes) + F.linear(prior, features).float()).softmax(-1).to(features.dtype) @ features


def _token_loss(states: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states.to(embeddings.dtype), embeddings).float(), labels, reduction="none")


def _noisy_token_loss(states: Tensor, labels: Tensor, scaled: Tensor, embeddings: Tensor, codes: Tensor) -> Tensor:
    logits = F.linear(states.to(embeddings.dtype), embeddings).float() + _code_scores(scaled, codes)
    return F.cross_entropy(logits, labels, reduction="none")
