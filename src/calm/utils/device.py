"""Choosing a device and a precision."""

import gc

import torch

DTYPES = ("float32", "bfloat16", "float16")


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first accelerator, or the CPU; anything else is taken as torch names it."""
    if name == "auto":
        # What torch was built for need not be here.
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def resolve_dtype(name: str, device: torch.device | None = None) -> torch.dtype | None:
    """Return the dtype of a name; None leaves the weights in the dtype they were saved in.

    ``auto`` is float32 on a CPU, where half precision is slow, bfloat16 on a GPU that computes with it natively, and
    None elsewhere or without a device.

    Args:
        device: the one the model will run on, if that is known.
    """
    if name == "auto":
        if device is not None and device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if device is not None and has_native_bfloat16(device) else None
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}.")
    return getattr(torch, name)


def has_native_bfloat16(device: torch.device) -> bool:
    """Return whether a device is a GPU with bfloat16 arithmetic."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.is_bf16_supported(including_emulation=False)


def release_memory() -> None:
    """Free the memory of unreferenced models: a Trainer and its model form a cycle, and torch caches what it freed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
