"""Tensors recorded from the reference implementation (see tests/data/README.md), and models that hold its weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from calm import CalmAutoencoder, CalmAutoencoderConfig, CalmConfig, CalmForCausalLM

DATA = Path(__file__).parent / "data"
RTOL = 1e-5

# The reference's name of a parameter -> ours, by prefix.
AUTOENCODER = {
    "encoder.embed_tokens": "embed_tokens",
    "encoder.encoder_layers.0.layernorm": "encoder.token_blocks.0.norm",
    "encoder.encoder_layers.0.mlp": "encoder.token_blocks.0.mlp",
    "encoder.encoder_layers.1.layernorm": "encoder.patch_blocks.0.norm",
    "encoder.encoder_layers.1.mlp": "encoder.patch_blocks.0.mlp",
    "encoder.squeeze_layer": "encoder.squeeze",
    "encoder.norm": "encoder.norm",
    "encoder.hidden_to_latent": "encoder.to_posterior",
    "decoder.latent_to_hidden": "decoder.from_latent",
    "decoder.decoder_layers.0.layernorm": "decoder.patch_blocks.0.norm",
    "decoder.decoder_layers.0.mlp": "decoder.patch_blocks.0.mlp",
    "decoder.decoder_layers.1.layernorm": "decoder.token_blocks.0.norm",
    "decoder.decoder_layers.1.mlp": "decoder.token_blocks.0.mlp",
    "decoder.expand_layer": "decoder.expand",
    "decoder.norm": "decoder.norm",
}
LANGUAGE_MODEL = {
    "transformer": "backbone",
    "embed_proj": "patch_embedding.layers",
    "mlp_generator.noise_embd": "head.noise_proj",
    "mlp_generator.norm_noise": "head.noise_norm",
    "mlp_generator.hidden_embd": "head.hidden_proj",
    "mlp_generator.norm_hidden": "head.hidden_norm",
    "mlp_generator.final_layer.in_ln": "head.final_norm",
    "mlp_generator.final_layer.linears.0": "head.final_mlp.0",
    "mlp_generator.final_layer.linears.2": "head.output_layer",
    **{f"mlp_generator.mlp_blocks.{i}.in_ln": f"head.blocks.{i}.norm" for i in range(2)},
    **{f"mlp_generator.mlp_blocks.{i}.linears.0": f"head.blocks.{i}.mix" for i in range(2)},
    **{f"mlp_generator.mlp_blocks.{i}.linears.2": f"head.blocks.{i}.mlp.1" for i in range(2)},
    **{f"mlp_generator.mlp_blocks.{i}.linears.4": f"head.blocks.{i}.mlp.3" for i in range(2)},
    **{f"mlp_generator.mlp_blocks.{i}.down_proj": f"head.blocks.{i}.down_proj" for i in range(2)},
    **{f"ae_model.{theirs}": f"autoencoder.{ours}" for theirs, ours in AUTOENCODER.items()},
}


def load(name: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to rtol 1e-5; entries near zero are held to that share of the tensor's scale."""
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=RTOL * expected.abs().max().item())


def rename(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Tensors under our names; those the reference stores a second time are left out."""
    renamed = {}
    for key, value in state.items():
        prefix = max((theirs for theirs in names if key.startswith(theirs + ".")), key=len, default=None)
        if prefix is not None:
            renamed[names[prefix] + key.removeprefix(prefix)] = value
    return renamed


def autoencoder(patch_size: int) -> CalmAutoencoder:
    config = json.loads((DATA / f"autoencoder_k{patch_size}" / "config.json").read_text())
    model = CalmAutoencoder(
        CalmAutoencoderConfig(
            vocab_size=config["vocab_size"],
            patch_size=config["patch_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            latent_size=config["latent_size"],
            kl_clip=config["kl_clamp"],
            eos_token_id=config["eos_token_id"],
            pad_token_id=config["pad_token_id"],
        )
    )
    model.load_state_dict(rename(load(f"autoencoder_k{patch_size}/model"), AUTOENCODER))
    return model.eval()


def language_model(patch_size: int, alpha: float = 1.0) -> CalmForCausalLM:
    config = json.loads((DATA / f"energy_k{patch_size}" / "config.json").read_text())
    backbone = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = CalmForCausalLM(
        CalmConfig(
            autoencoder_config=autoencoder(patch_size).config,
            backbone_config={name: config[name] for name in (*backbone, "num_key_value_heads", "rms_norm_eps")},
            head_config={
                "noise_size": config["noise_size"],
                "num_mlp_layers": config["num_mlp_layers"],
                "num_samples": config["num_samples"],
                "alpha": alpha,
            },
        )
    )
    model.load_state_dict(rename(load(f"energy_k{patch_size}/model"), LANGUAGE_MODEL))
    return model.eval()
