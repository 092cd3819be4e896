"""What a model costs, in floating-point operations, by the paper's rules.

A weight matrix of m parameters costs 2m operations per row it is applied to; attention costs 4 * layers * width *
context per step; training costs three times the forward pass. Embedding look-ups and norms cost nothing.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM


@dataclass
class Compute:
    """Parameters and operations of a model."""

    parameters: int  # without the autoencoder
    training_flops_per_token: float
    inference_flops_per_token: float  # one draw per chunk, no temperature


def compute(model: PreTrainedModel, context: int) -> Compute:
    """Operations of training and generation.

    Args:
        model: CALM, autoencoder or token model.
        context: tokens attended to at a step of generation; half as many on average in training.
    """
    if isinstance(model, CalmAutoencoder):
        per_patch = _encode_flops(model) + _decode_flops(model)
        patch_size = model.config.patch_size
        return Compute(_parameters(model), 3 * per_patch / patch_size, _decode_flops(model) / patch_size)
    if isinstance(model, CalmForCausalLM):
        patch_size = model.config.patch_size
        backbone = 2 * _matrices(model.backbone) + 2 * _matrices(model.patch_embedding)
        attention = _attention_flops(model.config.backbone_config, context / patch_size)
        head = 2 * _matrices(model.head)
        encode, decode = _encode_flops(model.autoencoder), _decode_flops(model.autoencoder)
        samples = model.config.head_config.num_samples
        return Compute(
            _parameters(model) - _parameters(model.autoencoder),
            # The frozen autoencoder only encodes the target, forward.
            (3 * (backbone + attention / 2 + samples * head) + encode) / patch_size,
            (backbone + attention + head + decode) / patch_size,
        )
    matrices = 2 * _matrices(model)
    attention = _attention_flops(model.config, context)
    return Compute(_parameters(model), 3 * (matrices + attention / 2), matrices + attention)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _matrices(model: nn.Module) -> int:
    """Parameters of the linear layers."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def _attention_flops(config, context: float) -> float:
    return 4 * config.num_hidden_layers * config.hidden_size * context


def _token_blocks_per_patch(model: CalmAutoencoder, blocks: nn.Module) -> int:
    return 2 * _matrices(blocks) * model.config.patch_size


def _encode_flops(model: CalmAutoencoder) -> float:
    encoder = model.encoder
    per_patch = 2 * (_matrices(encoder) - _matrices(encoder.token_blocks))
    return per_patch + _token_blocks_per_patch(model, encoder.token_blocks)


def _decode_flops(model: CalmAutoencoder) -> float:
    decoder = model.decoder
    per_patch = 2 * (_matrices(decoder) - _matrices(decoder.token_blocks))
    vocabulary = 2 * model.embed_tokens.weight.numel() * model.config.patch_size
    return per_patch + _token_blocks_per_patch(model, decoder.token_blocks) + vocabulary
