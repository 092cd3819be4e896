"""Choosing a device."""

import torch


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first accelerator, or the CPU; anything else is taken as torch names it."""
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
