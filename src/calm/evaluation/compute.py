"""What a model costs: parameters and floating-point operations, by the paper's rules.

A weight matrix of m parameters costs 2m operations per row it is applied to; attention costs 4 * layers * width *
context per step; look-ups, norms and activations cost nothing. Training costs three times the forward pass; of the
frozen autoencoder a language model's training uses one forward pass of the encoder. All of it is counted from the
shapes of the layers: a model on the meta device will do.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calm.generation.samplers import find_sampler
from calm.generation.sampling_params import DEFAULTS, SamplingParams
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM
from calm.models.modeling_codes import TokenCodes


@dataclass
class Compute:
    """Costs of a model, by part; every dict has a ``total``."""

    parameters: dict[str, int]  # also language_model and autoencoder, which add up to the total
    training_flops_per_token: float
    inference_flops_per_token: dict[str, float]

    def to_dict(self) -> dict:
        return asdict(self)


def compute(
    model: PreTrainedModel,
    context: int,
    temperature: float = 1.0,
    num_candidates: int = DEFAULTS["num_candidates"],
    frozen: Collection[str] = (),
    sampler: str = "batch",
) -> Compute:
    """Costs of training and of generation, per token.

    Args:
        model: CALM, autoencoder or token model; may lie on the meta device.
        context: positions (tokens of a token model, patches of CALM) attended to at every step.
        temperature: of CALM's generation; below 1 every chunk is chosen among ``num_candidates`` draws, each of which
            is counted in full: head, decoder, K products with the vocabulary. Generation as it is implemented shares
            and skips part of that.
        frozen: parts of a CALM that its training goes through forwards only, ``"backbone"``, or not at all,
            ``"token_predictor"``.
        sampler: of CALM's generation; ``"mtp"`` takes the place of head and decoder.

    Returns:
        costs by part: of a CALM ``backbone``, ``attention``, ``patch_embedding``, ``head``, ``autoencoder_decode`` (or
        ``token_prediction``); of a token model ``backbone``, ``attention``, ``output_embedding``; of an autoencoder
        ``autoencoder_decode``. Each dict has a ``total``.
    """
    if isinstance(model, CalmAutoencoder):
        return _autoencoder_compute(model)
    if isinstance(model, CalmForCausalLM):
        params = SamplingParams(temperature, sampler, num_candidates)
        return _calm_compute(model, context, find_sampler(sampler).num_head_samples(params), frozen)
    return _token_model_compute(model, context)


def _autoencoder_compute(model: CalmAutoencoder) -> Compute:
    patch_size = model.config.patch_size
    encode, decode = _encode_flops(model), _decode_flops(model)
    total = _parameters(model)
    return Compute(
        {"total": total, "language_model": 0, "autoencoder": total, **_autoencoder_parts(model)},
        3 * (encode + decode) / patch_size,
        {"total": decode / patch_size, "autoencoder_decode": decode / patch_size},
    )


def _calm_compute(model: CalmForCausalLM, context: int, draws: int, frozen: Collection[str]) -> Compute:
    patch_size, head_config = model.config.patch_size, model.config.head_config
    backbone, embedding = 2 * _matrices(model.backbone), 2 * _matrices(model.patch_embedding)
    attention = _attention_flops(model.config.backbone_config, context)
    head_training, draw = model.head.flops()
    per_patch = {"backbone": backbone, "attention": attention, "patch_embedding": embedding}
    if not draws:  # the sampler does not use the head
        per_patch["token_prediction"] = _token_prediction_flops(model)
    else:
        per_patch |= {"head": draws * draw, "autoencoder_decode": draws * _decode_flops(model.autoencoder)}
    inference = {name: flops / patch_size for name, flops in per_patch.items()}
    states = backbone + embedding + attention
    if "backbone" not in frozen:
        states *= 3
    if "token_predictor" not in frozen:
        states += 3 * _token_prediction_flops(model)
    heads = 3 * head_training
    if model.config.decoded_brier_weight:
        # Forwards, and back to the draws: the decoder's own weights are frozen.
        heads += 2 * head_config.num_samples * _decode_flops(model.autoencoder)
    total, autoencoder = _parameters(model), _parameters(model.autoencoder)
    return Compute(
        {
            "total": total,
            "language_model": total - autoencoder,
            "autoencoder": autoencoder,
            "token_embedding": _parameters(model.get_input_embeddings()),
            "backbone": _parameters(model.backbone) - _parameters(model.get_input_embeddings()),
            "patch_embedding": _parameters(model.patch_embedding),
            "head": _parameters(model.head),
            **_token_predictor_part(model),
            **_autoencoder_parts(model.autoencoder),
        },
        (states + heads + _encode_flops(model.autoencoder)) / patch_size,
        {"total": sum(inference.values()), **inference},
    )


def _token_predictor_part(model: CalmForCausalLM) -> dict[str, int]:
    return {"token_predictor": _parameters(model.token_predictor)} if model.config.token_prediction_weight else {}


def _token_prediction_flops(model: CalmForCausalLM) -> int:
    """Per patch: K states, what the tokens before add to them, K products with the vocabulary."""
    if not model.config.token_prediction_weight:
        return 0
    looks = model.config.patch_size * _parameters(model.get_input_embeddings())
    return 2 * (_matrices(model.token_predictor) + looks)


def _token_model_compute(model: Any, context: int) -> Compute:
    total = _parameters(model)
    embedding, output = _parameters(model.get_input_embeddings()), 2 * _matrices(model.get_output_embeddings())
    parts = {
        "backbone": 2 * _matrices(model) - output,
        "attention": _attention_flops(model.config, context),
        "output_embedding": output,
    }
    inference = sum(parts.values())
    output_parameters = 0 if model.config.tie_word_embeddings else output // 2
    return Compute(
        {
            "total": total,
            "language_model": total,
            "autoencoder": 0,
            "token_embedding": embedding,
            "backbone": total - embedding - output_parameters,
            "output_embedding": output_parameters,
        },
        3 * inference,
        {"total": inference, **parts},
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _matrices(module: nn.Module) -> int:
    """Parameters of the linear layers that a row meets: of experts those of the few it is sent to."""
    linear = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear | Conv1D))
    config: Any = getattr(module, "config", None)
    experts = [
        parameter
        for part in module.modules()
        if not isinstance(part, nn.Conv1d)
        for parameter in part.parameters(recurse=False)
        if parameter.dim() == 3
    ]
    if not experts:
        return linear
    active = getattr(config, "num_experts_per_tok", None)
    if active is None:
        raise ValueError(f"{type(module).__name__} has layers whose operations are not known: its cost is not counted.")
    return linear + sum(parameter.numel() * active // len(parameter) for parameter in experts)


def _attention_flops(config, context: int) -> int:
    return 4 * config.num_hidden_layers * config.hidden_size * context


def _autoencoder_parts(model: CalmAutoencoder | TokenCodes) -> dict[str, int]:
    if isinstance(model, TokenCodes):
        return {}
    return {
        "autoencoder_embedding": _parameters(model.embed_tokens),
        "autoencoder_encoder": _parameters(model.encoder),
        "autoencoder_decoder": _parameters(model.decoder),
    }


def _per_patch_flops(part: Any, patch_size: int) -> int:
    """Of encoder or decoder, whose token blocks run once for every token of a patch."""
    of_tokens = _matrices(part.token_blocks) + _matrices(part.embedding_proj)
    return 2 * (_matrices(part) - of_tokens + patch_size * of_tokens)


def _encode_flops(model: CalmAutoencoder | TokenCodes) -> int:
    if isinstance(model, TokenCodes):
        return 0
    return _per_patch_flops(model.encoder, model.config.patch_size)


def _decode_flops(model: CalmAutoencoder | TokenCodes) -> int:
    patch_size = model.config.patch_size
    if isinstance(model, TokenCodes):
        return 2 * model.codes.numel() * patch_size
    return _per_patch_flops(model.decoder, patch_size) + 2 * model.embed_tokens.weight.numel() * patch_size
