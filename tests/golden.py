"""Tensors recorded from the reference implementation (golden_tensors/README.md), and models with its weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from calm import CalmAutoencoder, CalmForCausalLM
from calm.checkpoints.reference_names import reference_names, replace_prefix

DATA = Path(__file__).parent / "golden_tensors"
RTOL = 1e-5


def load(name: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to rtol 1e-5; entries near zero are held to that share of the tensor's scale."""
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=RTOL * expected.abs().max().item())


def rename(state: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Tensors under our names; those the reference stores a second time are left out."""
    names = {theirs: ours for ours, theirs in reference_names(config).items()}
    known = tuple(f"{prefix}." for prefix in names)
    return {replace_prefix(name, names): value for name, value in state.items() if name.startswith(known)}


def autoencoder(patch_size: int) -> CalmAutoencoder:
    return CalmAutoencoder.from_pretrained(DATA / f"autoencoder_k{patch_size}")


def language_model(name: str, **head) -> CalmForCausalLM:
    """A recorded language model in evaluation mode; ``head`` changes fields of its head's configuration."""
    model = CalmForCausalLM.from_pretrained(DATA / name)
    for field, value in head.items():
        setattr(model.config.head_config, field, value)
    return model.eval()
