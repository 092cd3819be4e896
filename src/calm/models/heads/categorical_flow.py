"""The categorical flow head: a few passes choose the tokens of a patch, each from those chosen before it.

It is a discrete flow from masked to clean tokens (Gat et al. 2024, arXiv 2407.15595; MaskGIT, Chang et al. 2022, arXiv
2202.04200) with a fixed order. The first pass is independent multi-token prediction and chooses the first token. Every
later pass sees the tokens that are chosen and predicts all others; it chooses about as many as all passes before it. A
patch of K tokens takes log2(K) + 1 passes by default. The latent vector is the codes of the chosen tokens
(:class:`~calm.models.modeling_codes.TokenCodes`).

Shapes: P positions, S samples of a position, K tokens of a patch, Z latent, D hidden, W width of the network, V
vocabulary, M shortlist, ... any leading dimensions.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from calm.functional.rng import Generator, pick, uniform
from calm.functional.temperature import largest, sharpened
from calm.functional.tiles import checkpointed_rows, rows_at_once
from calm.models.heads.base import Head, HeadConfig, HeadLoss, leading_shape
from calm.models.heads.registry import register_head
from calm.models.layer_access import embedding_matrix
from calm.models.posterior import Posterior

_SAMPLING_ELEMENTS = 2**22  # of the logits that exist at once on a CPU


@strict
class CategoricalFlowHeadConfig(HeadConfig):
    r"""
    The head that chooses the tokens of a patch in a few passes, trained by cross-entropy. It needs the autoencoder of
    token codes ([`TokenCodesConfig`]).

    Args:
        type: ``"categorical_flow"``.
        num_mlp_layers: residual blocks of the network of the later passes.
        hidden_size: width of the blocks; default the backbone's.
        code_size: dimensions of a token's code; default, and required to be, the autoencoder's.
        num_passes: passes of a sample, at least 2, by default log2(K) + 1. The first pass is multi-token prediction.
            Every pass chooses the next tokens of the patch, and later passes see them.
        shortlist_size: M, the most likely tokens of the first pass that later passes choose from; default all tokens.
    """

    model_type = "calm_categorical_flow_head"

    type: Literal["categorical_flow"] = "categorical_flow"
    num_mlp_layers: int = 3
    hidden_size: int | None = None
    code_size: int | None = None
    num_passes: int | None = None
    shortlist_size: int | None = None
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_at_least(1, "num_mlp_layers", "hidden_size", "code_size", "shortlist_size")
        self._check_at_least(2, "num_passes", because=" (the first pass predicts the tokens independently)")

    def fit_to(self, autoencoder_config: Any) -> None:
        if self.code_size not in (None, autoencoder_config.code_size):
            raise ValueError(
                f"head_config.code_size is {self.code_size}, but the autoencoder's is {autoencoder_config.code_size}: "
                "leave it out."
            )
        self.code_size = autoencoder_config.code_size
        if self.shortlist_size is not None and self.shortlist_size > autoencoder_config.vocab_size:
            raise ValueError(
                f"head_config.shortlist_size must be at most the vocabulary's {autoencoder_config.vocab_size} tokens, "
                f"got {self.shortlist_size}."
            )

    def schedule(self, patch_size: int) -> list[int]:
        """Return how many tokens of a patch of K are chosen before each pass.

        The number grows by equal factors: 0, 1, 2, 4 for K = 8 in four passes.
        """
        num_passes = min(self.num_passes or math.ceil(math.log2(patch_size)) + 1, patch_size)
        counts = [0]
        for index in range(1, num_passes):
            # The small summand keeps 8 ** (1 / 3) from falling below 2.
            counts.append(max(counts[-1] + 1, int(patch_size ** (index / num_passes) + 1e-9)))
        return counts


class ModulatedBlock(nn.Module):
    """Residual MLP block, shifted, scaled and gated by a condition: ``[..., W], [..., W] -> [..., W]``."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + (1 + gate) * self.mlp(self.norm(x) * (1 + scale) + shift)


class MaskedTokenNetwork(nn.Module):
    """Predict what the chosen tokens of a patch add to the states of its tokens: ``[..., K, D]``.

    The last layer starts at zero, so that an untrained network leaves independent multi-token prediction.
    """

    gradient_checkpointing = False  # transformers sets it, and the function beside it
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: CategoricalFlowHeadConfig, patch_size: int, hidden_size: int):
        super().__init__()
        self.output_shape = (patch_size, hidden_size)
        width, eps = config.hidden_size or hidden_size, config.layer_norm_eps
        self.chosen_norm = nn.LayerNorm(hidden_size, eps=eps, elementwise_affine=False)
        self.chosen_proj = nn.Linear(patch_size * hidden_size, width)
        self.mask_proj = nn.Linear(patch_size, width)
        self.hidden_proj = nn.Linear(hidden_size, width)
        self.condition_proj = nn.Linear(width, width)
        self.blocks = nn.ModuleList(ModulatedBlock(width, eps) for _ in range(config.num_mlp_layers))
        self.output_layer = nn.Linear(width, patch_size * hidden_size)

    def forward(self, embeddings: Tensor, is_chosen: Tensor, hidden: Tensor) -> Tensor:
        """
        Args:
            embeddings: of the tokens, ``[..., K, D]``; those of tokens that are not chosen do not matter.
            is_chosen: ``[..., K]``, bool.
            hidden: ``[..., D]``; mask and hidden states broadcast against the embeddings.
        """
        is_chosen = is_chosen.to(hidden.dtype)
        context = self.hidden_proj(hidden) + self.mask_proj(is_chosen)
        condition = F.silu(self.condition_proj(F.silu(context)))
        # Embeddings of a small model are small: without the norm the network would hardly see the chosen tokens.
        chosen = self.chosen_norm(embeddings.to(hidden.dtype)) * is_chosen[..., None]
        x = self.chosen_proj(chosen.flatten(-2)) + context
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, condition)
            else:
                x = block(x, condition)
        return self.output_layer(x).unflatten(-1, self.output_shape)

    def init_weights(self) -> None:
        """Initialise the modulation and the last layer with zeros, other layers for inputs of unit scale."""
        zero = {self.output_layer, *(block.modulation for block in self.blocks)}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module in zero:
                    init.zeros_(module.weight)
                else:
                    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                init.zeros_(module.bias)


@register_head
class CategoricalFlowHead(Head):
    """Few-pass choice of tokens; see :class:`CategoricalFlowHeadConfig`."""

    config_class = CategoricalFlowHeadConfig
    needs_token_codes = True
    has_log_prob = True

    def __init__(self, config: CategoricalFlowHeadConfig, hidden_size: int, latent_size: int):
        super().__init__(config, hidden_size, latent_size)
        assert config.code_size is not None
        self.patch_size = latent_size // config.code_size
        self.schedule = config.schedule(self.patch_size)
        self.base_proj = nn.Linear(hidden_size, self.patch_size * hidden_size, bias=False)
        if len(self.schedule) > 1:
            self.network = MaskedTokenNetwork(config, self.patch_size, hidden_size)

    def attach(self, token_embeddings: nn.Embedding, autoencoder: nn.Module) -> None:
        """Take the backbone's token embeddings as output layer and the codes of the autoencoder."""
        # In a tuple, so that they are not registered as parts of the head: the model saves and moves them.
        self._tables: tuple[nn.Embedding, Any] = (token_embeddings, autoencoder)

    def _output_matrix(self, device: torch.device) -> Tensor:
        """Return the output layer, ``[V, D]``."""
        embeddings, autoencoder = self._tables
        return embedding_matrix(embeddings, autoencoder.config.vocab_size, device)

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(
        self,
        hidden: Tensor,
        posterior: Posterior,
        noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        generator: Generator = None,
    ) -> HeadLoss:
        """Return the cross-entropy per token of the first pass, plus that of a random later pass, in nats.

        The later passes do not train the backbone: with their gradient, all ways to read its hidden states are worse.

        Args:
            noise: uniform in [0, 1), ``[...]``; it chooses the later pass of every position.
            target_noise: not used, the targets have no variance.
        """
        embeddings, token_ids = self._output_matrix(hidden.device), posterior.token_ids
        if token_ids is None:
            token_ids = self._tables[1].decode_tokens(posterior.mean)
        base = self.base_proj(hidden).unflatten(-1, (self.patch_size, -1))
        first = _cross_entropy(base, token_ids, embeddings)
        if len(self.schedule) == 1:
            return HeadLoss(first, {"first_cross_entropy": first})
        if noise is None:
            noise = uniform(hidden.shape[:-1], generator, hidden.device, row_dim=0)
        counts = torch.tensor(self.schedule[1:], device=hidden.device)[(noise * (len(self.schedule) - 1)).long()]
        is_chosen = torch.arange(self.patch_size, device=hidden.device) < counts[..., None]
        hidden, embeddings = hidden.detach(), embeddings.detach()
        states = base.detach() + self.network(F.embedding(token_ids, embeddings), is_chosen, hidden)
        later = _cross_entropy(states, token_ids.masked_fill(is_chosen, -100), embeddings)
        return HeadLoss(first + later, {"first_cross_entropy": first, "later_cross_entropy": later})

    # --- sampling -----------------------------------------------------------------------------------------------------

    def sample(  # type: ignore[override]  # with return_log_prob, a pair
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        generator: Generator = None,
        num_samples: int | None = None,
        temperature: float = 1.0,
        return_log_prob: bool = False,
        top_p: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return one latent per hidden state, or ``num_samples``, as :meth:`Head.sample`.

        Args:
            noise: uniform in [0, 1), ``[..., K]``, one number for the choice of every token.
            temperature: at least 0. The probabilities of every token are raised to the power 1 / temperature; 0 chooses
                the most likely token.
            return_log_prob: also return the log-probability of every token in nats, given the tokens chosen before it,
                ``[..., K]``. Their sum is that of the patch.
            top_p: as :func:`~calm.functional.temperature.sharpened` has it, for every token.
        """
        if noise is None:
            shape = (*leading_shape(hidden, num_samples), self.patch_size)
            noise = uniform(shape, generator, hidden.device)
        tokens, log_prob, *_ = self._tiled(hidden, noise, None, temperature, top_p)
        latents = F.embedding(tokens, self._tables[1].codes).flatten(-2).to(hidden.dtype)
        return (latents, log_prob) if return_log_prob else latents

    def log_probabilities(
        self, hidden: Tensor, token_ids: Tensor, temperature: float = 1.0, num_top: int = 0
    ) -> tuple[Tensor, ...]:
        """Return the log-probabilities in nats of the tokens of given patches, and whether each is the most likely one.

        ``[..., D], [..., K] -> [..., K], [..., K]`` bool, then log-probabilities and ids of the ``num_top`` most likely
        tokens at every position in descending order, ``[..., K, num_top]`` each. The sum over the first n tokens is the
        log-probability of these n. Extra leading dimensions of ``token_ids`` give several patches per state. Tokens
        outside the shortlist have probability 0.
        """
        return self._tiled(hidden, None, token_ids, temperature, num_top=num_top)[1:]

    def _tiled(
        self,
        hidden: Tensor,
        noise: Tensor | None,
        token_ids: Tensor | None,
        temperature: float,
        top_p: float = 1.0,
        num_top: int = 0,
    ) -> tuple[Tensor, ...]:
        """Return tokens, chosen by the noise or given, their log-probabilities, and whether each is the most likely.

        Log-probabilities and ids of the most likely tokens follow. What comes after the log-probabilities is valid for
        given tokens alone: sampling does not use it.
        """
        each = token_ids if noise is None else noise
        assert each is not None
        states = hidden.flatten(0, -2)
        several = each.reshape(-1, len(states), self.patch_size)  # [S, P, K]
        elements = len(several) * self.patch_size * self._tables[1].config.vocab_size
        size = rows_at_once(elements, hidden.device, _SAMPLING_ELEMENTS)
        results = [
            self._passes(
                state, None if noise is None else tile, tile if noise is None else None, temperature, top_p, num_top
            )
            for state, tile in zip(states.split(size), several.split(size, dim=1), strict=True)
        ]
        parts = [torch.cat(tiles, dim=1) for tiles in zip(*results, strict=True)]
        return tuple(part.reshape(*each.shape, *part.shape[3:]) for part in parts)

    def _passes(
        self,
        hidden: Tensor,
        noise: Tensor | None,
        given: Tensor | None,
        temperature: float,
        top_p: float,
        num_top: int,
    ) -> tuple[Tensor, ...]:
        """As :meth:`_tiled`: ``[P, D], [S, P, K] -> [S, P, K]`` each, then ``[S, P, K, num_top]`` twice."""
        embeddings = table = self._output_matrix(hidden.device)
        base = _scores(self.base_proj(hidden).unflatten(-1, (self.patch_size, -1)), table)  # [P, K, V]
        shortlist: Tensor | None = None
        if self.config.shortlist_size is not None and self.config.shortlist_size < len(table):
            base, shortlist = base.topk(self.config.shortlist_size)  # [P, K, M]
            table = F.embedding(shortlist, table)  # [P, K, M, D]
        tokens: list[Tensor] = []
        found: list[tuple[Tensor, ...]] = []
        for start, stop in itertools.pairwise((*self.schedule, self.patch_size)):
            now = slice(start, stop)
            logits = base[:, now]
            if start:
                states = self._later_states(hidden, F.embedding(torch.cat(tokens, dim=-1), embeddings))
                logits = logits + _scores(states[..., now, :], table if shortlist is None else table[:, now])
            probs = sharpened(logits, temperature, top_p)  # [(S,) P, stop - start, V or M]
            listed = None if shortlist is None else shortlist[:, now]
            if given is None:
                assert noise is not None
                index = _pick(probs, noise[..., now])[..., None]
                is_listed = is_best = torch.ones_like(index, dtype=torch.bool)
            else:
                index, is_listed = _place_in(listed, given[..., now, None])
                is_best = (index == probs.argmax(-1, keepdim=True)) & is_listed
            log_prob = torch.where(is_listed, probs.expand(len(index), -1, -1, -1).gather(-1, index).log(), -math.inf)
            found.append((log_prob[..., 0], is_best[..., 0]))
            if given is not None:
                top, top_ids = largest(probs, num_top)
                if listed is not None:
                    top_ids = listed.expand(*top_ids.shape[:-1], -1).gather(-1, top_ids)
                shape = (*log_prob.shape[:-1], num_top)
                found[-1] += (top.log().expand(shape), top_ids.expand(shape))
            ids = index if listed is None else listed.expand(len(index), -1, -1, -1).gather(-1, index)
            tokens.append(ids[..., 0] if given is None else given[..., now])
        parts = [torch.cat(of_passes, dim=2) for of_passes in zip(*found, strict=True)]
        return torch.cat(tokens, dim=-1), *parts

    def _later_states(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        """Return what the embeddings of chosen tokens add to the states: ``[P, D], [S, P, n, D] -> [S, P, K, D]``."""
        num_chosen = chosen.shape[-2]
        embeddings = F.pad(chosen, (0, 0, 0, self.patch_size - num_chosen))
        is_chosen = (torch.arange(self.patch_size, device=hidden.device) < num_chosen)[None]
        return self.network(embeddings, is_chosen, hidden)

    def flops(self) -> tuple[float, float]:
        """As :meth:`Head.flops`, with the products with the vocabulary or the shortlist."""
        vocab_size, hidden_size = self._tables[1].config.vocab_size, self.base_proj.in_features
        shortlist = min(self.config.shortlist_size or vocab_size, vocab_size)
        first = self.base_proj.weight.numel() + self.patch_size * vocab_size * hidden_size
        if len(self.schedule) == 1:
            return 2 * first, 2 * first
        network = sum(part.weight.numel() for part in self.network.modules() if isinstance(part, nn.Linear))
        sample = first + (len(self.schedule) - 1) * network
        sample += (self.patch_size - self.schedule[1]) * shortlist * hidden_size  # every token is chosen in one pass
        return 2 * (first + network + self.patch_size * vocab_size * hidden_size), 2 * sample

    def init_weights(self) -> None:
        init.kaiming_uniform_(self.base_proj.weight, a=math.sqrt(5))
        if len(self.schedule) > 1:
            self.network.init_weights()


def _scores(states: Tensor, table: Tensor) -> Tensor:
    """Return products with embeddings of all tokens or of a shortlist, in float32.

    ``[..., K, D], [V, D] or [P, K, M, D] -> [..., K, V or M]``.
    """
    states = states.to(table.dtype)
    return (F.linear(states, table) if table.dim() == 2 else (table @ states[..., None])[..., 0]).float()


def _pick(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return the choices of S samples: ``[(S,) P, k, V], [S, P, k] -> [S, P, k]``.

    Probabilities that all samples share are summed up once, not once per sample.
    """
    if probs.dim() == uniforms.dim():
        return pick(probs, uniforms.movedim(0, -1).contiguous()).movedim(-1, 0)
    return pick(probs, uniforms[..., None])[..., 0]


def _place_in(shortlist: Tensor | None, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of tokens in their shortlist, and whether they are in it.

    ``[P, k, M], [S, P, k, 1] -> [S, P, k, 1]`` each.
    """
    if shortlist is None:
        return token_ids, torch.ones_like(token_ids, dtype=torch.bool)
    is_token = shortlist == token_ids
    return is_token.long().argmax(-1, keepdim=True), is_token.any(-1, keepdim=True)


def _cross_entropy(states: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    """Return the mean cross-entropy of the tokens of each patch whose label is not -100: ``[..., K, D] -> [...]``."""
    rows = (states.flatten(0, -2), labels.flatten())
    losses = checkpointed_rows(_token_loss, len(embeddings), rows, embeddings)
    return losses.view(labels.shape).sum(-1) / labels.ne(-100).sum(-1).clamp(min=1)


def _token_loss(states: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states.to(embeddings.dtype), embeddings).float(), labels, reduction="none")
