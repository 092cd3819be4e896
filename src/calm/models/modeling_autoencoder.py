"""The autoencoder: K tokens to one latent vector and back.

It is context-free: every patch of K tokens is encoded alone. Shapes: B batch, T = L * K tokens, L patches, K tokens of
a patch, H hidden, E embedding, Z latent, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils import ModelOutput

from calm.checkpoints.reference import load_pretrained
from calm.functional.gaussian import gaussian_kl
from calm.functional.rng import Generator, uniform
from calm.models.best_token import best_token
from calm.models.configuration_autoencoder import CalmAutoencoderConfig
from calm.models.frozen import FrozenLayers
from calm.models.layer_access import device_of, embedding_matrix, is_plain
from calm.models.linear_cross_entropy import linear_cross_entropy
from calm.models.patches import split_patches
from calm.models.posterior import Posterior

# While it trains, its accuracy is measured on so many tokens of a batch: on all of them it would take as long as a
# third of the loss.
_ACCURACY_TOKENS = 512


@dataclass
class CalmAutoencoderOutput(ModelOutput):
    """
    Args:
        loss: scalar, when labels were given: K * cross-entropy + kl_weight * KL.
        reconstruction_loss: scalar, mean cross-entropy per token in nats.
        kl: scalar, mean KL per patch in nats, floored per dimension.
        accuracy: scalar, share of tokens whose largest logit is theirs; of the first 512 tokens of a training batch.
        logits: ``[B, L, K, V]``, when no labels were given: the loss is computed without holding them.
        mean, log_std: the posterior, ``[B, L, Z]``.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    kl: Tensor | None = None
    accuracy: Tensor | None = None
    logits: Tensor | None = None
    mean: Tensor | None = None
    log_std: Tensor | None = None


class _MLP(LlamaMLP, FrozenLayers):
    """SwiGLU block: ``[..., H] -> [..., H]``."""


class ResidualBlock(FrozenLayers):
    """Pre-norm SwiGLU block with a residual connection: ``[..., H] -> [..., H]``."""

    def __init__(self, config: CalmAutoencoderConfig):
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.norm(hidden))


def _residual_blocks(config: CalmAutoencoderConfig, num_layers: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(config) for _ in range(num_layers)))


def _embedding_proj(size_in: int | None, size_out: int | None) -> nn.Module:
    """Between the width of the embeddings and that of the blocks, where they differ."""
    assert size_in
    assert size_out
    return nn.Identity() if size_in == size_out else nn.Linear(size_in, size_out, bias=False)


class Encoder(FrozenLayers):
    """Token embeddings of a patch to its posterior: ``[..., K, E] -> [..., Z], [..., Z]``."""

    def __init__(self, config: CalmAutoencoderConfig):
        super().__init__()
        self.embedding_proj = _embedding_proj(config.embedding_size, config.hidden_size)
        self.token_blocks = _residual_blocks(config, config.num_encoder_layers // 2)
        self.squeeze = nn.Linear(config.patch_size * config.hidden_size, config.hidden_size)
        self.patch_blocks = _residual_blocks(config, config.num_encoder_layers // 2)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.to_posterior = nn.Linear(config.hidden_size, 2 * config.latent_size)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.squeeze(self.token_blocks(self.embedding_proj(embeddings)).flatten(-2))
        mean, log_std = self.to_posterior(self.norm(self.patch_blocks(hidden))).chunk(2, dim=-1)
        return mean, log_std


class Decoder(FrozenLayers):
    """Latent vector to a state per token, ready for the output embedding: ``[..., Z] -> [..., K, E]``."""

    def __init__(self, config: CalmAutoencoderConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.from_latent = nn.Linear(config.latent_size, config.hidden_size)
        self.patch_blocks = _residual_blocks(config, config.num_decoder_layers // 2)
        self.expand = nn.Linear(config.hidden_size, config.patch_size * config.hidden_size)
        self.token_blocks = _residual_blocks(config, config.num_decoder_layers // 2)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.embedding_proj = _embedding_proj(config.hidden_size, config.embedding_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.token_states(self.patch_states(latents), 0, self.patch_size)

    def patch_states(self, latents: Tensor) -> Tensor:
        """What all K tokens of a latent have in common: ``[..., Z] -> [..., H]``."""
        return self.patch_blocks(self.from_latent(latents))

    def token_states(self, patch_states: Tensor, start: int, stop: int) -> Tensor:
        """Tokens start to stop of a patch, each decoded by itself: ``[..., H] -> [..., stop - start, E]``."""
        if not is_plain(self.expand):
            expanded = self.expand(patch_states).unflatten(-1, (self.patch_size, -1))[..., start:stop, :]
            return self.embedding_proj(self.norm(self.token_blocks(expanded)))
        weight = self.expand.weight.unflatten(0, (self.patch_size, -1))[start:stop].flatten(0, 1)
        bias = self.expand.bias.unflatten(0, (self.patch_size, -1))[start:stop].flatten()
        hidden = F.linear(patch_states, weight, bias).unflatten(-1, (stop - start, -1))
        return self.embedding_proj(self.norm(self.token_blocks(hidden)))


class CalmAutoencoder(FrozenLayers, PreTrainedModel):
    """Maps K tokens to one latent vector and back; see :class:`CalmAutoencoderConfig`."""

    config: CalmAutoencoderConfig
    config_class = CalmAutoencoderConfig
    base_model_prefix = "autoencoder"
    main_input_name = "input_ids"
    # It has no attention: a language model may choose any with it inside.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: CalmAutoencoderConfig):
        super().__init__(config)
        # One parameter is the input embedding and, transposed, the output embedding: nothing to tie, nothing to lose.
        assert config.embedding_size is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "CalmAutoencoder":
        """Load a directory or hub id, in our layout or in the reference implementation's."""
        return load_pretrained(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    @property
    def device(self) -> torch.device:
        """Where the model reads its input: of a model that is spread over devices, that of the token embeddings."""
        return device_of(self)

    def output_matrix(self, device: torch.device) -> Tensor:
        """Return the output layer, ``[V, E]``: the input embedding's vectors."""
        return embedding_matrix(self.embed_tokens, self.config.vocab_size, device)

    def encode(self, input_ids: Tensor) -> Posterior:
        """Posterior of every patch: token ids ``[B, T]``, T a multiple of K -> mean, log_std ``[B, L, Z]``."""
        patches = split_patches(input_ids, self.config.patch_size)
        mean, log_std = self.encoder(self.embed_tokens(patches))
        return Posterior(mean, log_std, patches)

    def decode(self, latents: Tensor) -> Tensor:
        """Logits of the K tokens of every latent: ``[..., Z] -> [..., K, V]``."""
        states = self.decoder(latents)
        return F.linear(states, self.output_matrix(states.device))

    def decode_tokens(self, latents: Tensor) -> Tensor:
        """Most likely tokens of every latent: ``[..., Z] -> [..., K]``, without holding all logits at once."""
        return self.best_tokens(self.decoder(latents))

    def best_tokens(self, token_states: Tensor) -> Tensor:
        """Most likely token of every state of the decoder: ``[..., E] -> [...]``."""
        matrix = self.output_matrix(token_states.device)
        return best_token(token_states.flatten(0, -2), matrix).view(token_states.shape[:-1])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generator = None,
    ) -> CalmAutoencoderOutput:
        """Encode, draw one latent per patch, decode.

        In training mode input tokens and latent entries are dropped; the loss stays the reconstruction of every token.

        Args:
            input_ids: ``[B, T]``, T a multiple of K.
            attention_mask: ``[B, T]``, 0 for padding, whose labels do not count.
            labels: ``[B, T]``, -100 where a token does not count.
            noise: standard normal ``[B, L, Z]`` of the latent draw.
            generator: source of noise and dropout otherwise; one, or a list of one per row.
        """
        config = self.config
        if self.training and config.token_dropout:
            uniforms = uniform(input_ids.shape, generator, input_ids.device, row_dim=0)
            input_ids = input_ids.masked_fill(uniforms < config.token_dropout, config.token_dropout_id)
        posterior = self.encode(input_ids)
        latents = posterior.sample(1, None if noise is None else noise[None], generator)[0]
        if self.training and config.latent_dropout:
            uniforms = uniform(latents.shape, generator, latents.device, row_dim=0)
            latents = latents * (uniforms >= config.latent_dropout) / (1 - config.latent_dropout)
        states = self.decoder(latents)
        output = CalmAutoencoderOutput(mean=posterior.mean, log_std=posterior.log_std)
        if labels is None:
            output.logits = F.linear(states, self.output_matrix(states.device))
        else:
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, -100)
            states, labels = states.flatten(0, -2), labels.long().flatten()
            output.reconstruction_loss = linear_cross_entropy(states, self.output_matrix(states.device), labels)
            seen = slice(_ACCURACY_TOKENS if self.training else None)
            counted = labels[seen].ne(-100)
            hits = (self.best_tokens(states[seen].detach()) == labels[seen]) & counted
            output.accuracy = hits.sum() / counted.sum().clamp(min=1)
            output.kl = gaussian_kl(posterior.mean, posterior.log_std, config.kl_clip).mean()
            # Summed over the patch, so that the weight of the KL does not depend on K.
            output.loss = config.patch_size * output.reconstruction_loss + config.kl_weight * output.kl
        return output


AutoModel.register(CalmAutoencoderConfig, CalmAutoencoder, exist_ok=True)
