"""Tiny models for tests: random weights, large enough that outputs differ."""

import torch

from calm import CalmAutoencoder, CalmAutoencoderConfig, CalmConfig, CalmForCausalLM
from calm.models.configuration_codes import TokenCodesConfig

VOCAB_SIZE = 48
EOS, PAD = 1, 0


def autoencoder_config(patch_size=4, **changes):
    fields = {
        "vocab_size": VOCAB_SIZE,
        "patch_size": patch_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "latent_size": 8,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.3,
    }
    return CalmAutoencoderConfig(**fields | changes)


def codes_config(patch_size=4, **changes):
    size = max(2, 8 // patch_size)
    fields = {
        "vocab_size": VOCAB_SIZE,
        "patch_size": patch_size,
        "code_size": size,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return TokenCodesConfig(**fields | changes)


def backbone(**changes):
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return fields | changes


HEAD_FIELDS = {
    "energy": {"noise_size": 6, "num_mlp_layers": 1, "num_samples": 4, "num_target_samples": 8},
    "diffusion": {"num_mlp_layers": 2, "num_samples": 4, "num_sampling_steps": 20, "clip_latent": 4.0},
    "flow": {"num_mlp_layers": 2, "num_samples": 4, "num_sampling_steps": 3},
    "categorical_flow": {"num_mlp_layers": 1},
}


def calm(patch_size=4, type="energy", vocab_size=VOCAB_SIZE, token_prediction=None, **head):
    """A language model whose samples differ: its zero-initialised layers are filled."""
    torch.manual_seed(0)
    autoencoder = autoencoder_config(patch_size, vocab_size=vocab_size)
    if type == "categorical_flow":
        autoencoder = codes_config(patch_size, vocab_size=vocab_size)
    config = CalmConfig(
        autoencoder_config=autoencoder,
        backbone_config=backbone(vocab_size=vocab_size),
        head_config={"type": type} | HEAD_FIELDS[type] | head,
        initializer_range=0.3,
        mtp_weight=1.0 if token_prediction else 0.0,
        mtp_type=token_prediction or "independent",
    )
    model = CalmForCausalLM(config)
    for parameter in model.head.parameters():
        if parameter.dim() == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def autoencoder(patch_size=4, **changes):
    torch.manual_seed(0)
    return CalmAutoencoder(autoencoder_config(patch_size, **changes)).eval()


def tokens(batch, length):
    """Token ids without end-of-text and padding."""
    return torch.randint(2, VOCAB_SIZE, (batch, length))
