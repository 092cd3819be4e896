"""FSDP2: weights, gradients and moments divided over the processes; checkpoints that do not show it.

A checkpoint of a sharded run holds what one of a single process holds, so that any number of processes, sharded or not,
can go on with it. The frozen autoencoder is not sharded: it stays whole, in float32, on every process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors import safe_open
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def configure(accelerator: Any, plugin: FullyShardedDataParallelPlugin, model: torch.nn.Module) -> None:
    """Settings of FSDP2 that a CALM needs, before the model is sharded; ValueError for FSDP1.

    accelerate shards on GPUs alone and trains on processors without a word about it; here these shard as well.
    """
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP1 is not supported: set fsdp_version to 2 (`--fsdp_version 2` of accelerate).")
    backbone: Any = getattr(model, "backbone", None)
    if backbone is not None:
        plugin.ignored_modules = [model.autoencoder]
        # It would make new parameters, of which accelerate does not know that they are ignored.
        plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        # The head is no unit: it reads weights past its modules.
        units = sorted(backbone._no_split_modules)
        plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or units
    plugin.state_dict_type = plugin.state_dict_type.FULL_STATE_DICT
    # Sums of gradients and the loss stay float32.
    dtype = _DTYPES.get(accelerator.mixed_precision)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(dtype, torch.float32) if dtype else None
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = plugin
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def check_autoencoder_is_whole(model: torch.nn.Module) -> None:
    """ValueError where the autoencoder was sharded, and would compute in half precision."""
    autoencoder: Any = getattr(model, "autoencoder", None)
    if autoencoder is not None and any(isinstance(each, DTensor) for each in autoencoder.parameters()):
        raise ValueError(
            f"accelerate {accelerate.__version__} shards the frozen autoencoder, which must stay whole: install "
            "accelerate 1.15 or later."
        )


@contextmanager
def embeddings_in_the_root(model: Any) -> Iterator[None]:
    """While a model is sharded: its input embedding stays with what belongs to no layer.

    accelerate would make it a unit that is whole during the embedding's own forward pass alone, and token prediction
    and the autoencoder use its weight as an output layer, too. Where a model says that the two are one weight,
    accelerate knows.
    """
    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        yield
        return
    model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings


def whole_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any] | None:
    """``optimizer.state_dict()`` as one process would have it, for those who ``keep`` it; all processes call it."""
    state = optimizer.state_dict()
    whole: dict[Any, dict[str, Any]] = {}
    for index, values in state["state"].items():
        # New dictionaries: those of the state are the optimiser's own.
        whole[index] = {}
        for name, value in values.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                whole[index][name] = full.cpu() if isinstance(value, DTensor) else full
    return state | {"state": whole} if keep else None


def load_optimizer_state(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load this process's share of the optimiser state in a file; the rest of the file is not read."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        for name, value in values.items():
            if value.shape == parameters[index].shape:
                values[name] = _share(value, parameters[index])
    optimizer.load_state_dict(state)


@torch.no_grad()
def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load this process's share of the weights in a safetensors file; the rest of the file is not read."""
    with safe_open(path, framework="pt") as file:
        for name, value in model.state_dict(keep_vars=True).items():
            if name in file.keys():  # noqa: SIM118 - no mapping; tied weights are saved once
                value.copy_(_share(file.get_slice(name), value))


def _share(whole: Any, like: Tensor) -> Tensor:
    """Return what a process holds of a tensor (or of a slice of a file) that is divided like another."""
    if not isinstance(like, DTensor):
        return whole if isinstance(whole, Tensor) else whole[...]
    mesh, placements = like.device_mesh, like.placements
    if mesh.ndim == 1 and isinstance(placements[0], Shard) and placements[0].dim == 0:
        rows = -(-like.shape[0] // mesh.size())  # of every process, the last ones may have fewer
        start = min(rows * mesh.get_local_rank(), like.shape[0])
        part = whole[start : start + rows].to(like.device)
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    whole = whole if isinstance(whole, Tensor) else whole[...]
    return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)
