"""Configuration and weights of a model, from a directory or the hub, with one clear line when something is wrong."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from calm.models.limits import check_sizes, leaves
from calm.utils.files import check_json
from calm.utils.paths import did_you_mean, looks_local

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What transformers knows without code from the hub; names with a slash are repositories whose kernels it would run.
_KERNEL_FIELDS = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_config(path: str | os.PathLike, **hub: Any) -> dict:
    """The fields of ``config.json``, as they stand there.

    Args:
        hub: options of transformers' downloads, see ``HUB_OPTIONS``.

    Raises:
        OSError: when the file is missing or damaged, or the hub cannot be reached; the message names the remedy.
        ValueError: when the model would need code of the checkpoint, or has sizes that no model has.
    """
    if os.path.isdir(path) and not (Path(path) / hub.get("subfolder", "") / "config.json").is_file():
        raise OSError(f"no model in {path}: config.json is missing.")
    if not os.path.exists(path) and (looks_local(path) or not _HUB_ID.fullmatch(os.fspath(path))):
        raise OSError(f"no model at {path}: there is no such directory{did_you_mean(path)}")
    try:
        check_json(Path(path) / hub.get("subfolder", "") / "config.json")
    except ValueError as error:
        raise OSError(str(error)) from error
    try:
        fields = PreTrainedConfig.get_config_dict(path, **hub)[0]
    except OSError as error:
        raise OSError(
            f"no model {path}: there is no such directory, and the hub gave none ({str(error).splitlines()[0]}) "
            f"Without network, download config.json, the weights (model.safetensors or pytorch_model.bin) and the "
            f"tokenizer's files of https://huggingface.co/{path} elsewhere, and pass the directory you put them in."
        ) from error
    _check_runs_no_code(path, fields)
    check_sizes(fields, f"config.json of {path}: ")
    return fields


def code_refused(path: str | os.PathLike, what: str) -> str:
    """Return the message for a checkpoint that cannot be loaded without running code of its own."""
    return (
        f"{path} needs code of its own to be loaded ({what}), and calm runs no code of a checkpoint: take a model and "
        "a tokenizer of a type that transformers or this package has."
    )


def _check_runs_no_code(path: str | os.PathLike, fields: dict) -> None:
    """Raise ValueError for a configuration that transformers could follow only by running code of the checkpoint.

    An ``auto_map`` beside a model type that is installed is ignored: the installed class loads the model.
    """
    model_type, auto_map = fields.get("model_type"), fields.get("auto_map")
    if auto_map and model_type and model_type not in CONFIG_MAPPING:
        raise ValueError(code_refused(path, f"auto_map in config.json, for model_type {model_type!r}"))
    installed = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    for name, value in leaves(fields):
        # One name, or a dict of names by part of the model.
        if value is None or value in installed or not set(name.split(".")) & _KERNEL_FIELDS:
            continue
        if "/" in str(value):
            raise ValueError(code_refused(path, f"{name} {value!r} in config.json"))
        raise ValueError(f"config.json of {path}: {name} must be one of {', '.join(installed)}, got {value!r}.")


def read_weights(path: str | os.PathLike, **hub: Any) -> dict[str, Tensor]:
    """All tensors of a checkpoint on the CPU: one file or shards, safetensors or pickled (tensors only, never code).

    Files are memory-mapped: a tensor takes memory when it is used.

    Raises:
        OSError: when there are no weights.
        ValueError: when a file is damaged, or holds something else than tensors.
    """

    def find(name: str) -> str | None:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)

    for name in _WEIGHTS:
        file = find(name)
        if file is None:
            continue
        if not name.endswith(".index.json"):
            return _read_file(file)
        shards = {shard: find(shard) for shard in read_index(Path(file))}
        missing = [shard for shard, found in shards.items() if found is None]
        if missing:
            raise ValueError(f"{path} lacks {listing(missing)}, named in {name}: copy the checkpoint again.")
        return {key: tensor for found in shards.values() for key, tensor in _read_file(str(found)).items()}
    raise OSError(f"no weights in {path}: expected one of {', '.join(_WEIGHTS)}.")


def read_index(file: Path, *keys: str) -> list[str]:
    """Return the names of the shards in the index of a sharded checkpoint.

    Args:
        keys: further fields that the index must have.

    Raises ValueError when the index lacks something.
    """
    check_json(file)
    index = json.loads(file.read_text(encoding="utf-8"))
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{file} has no weight_map from tensors to files: copy the checkpoint again.")
    if missing := [key for key in keys if not isinstance(index.get(key), dict)]:
        raise ValueError(f"{file} has no {missing[0]}: copy the checkpoint again.")
    if elsewhere := [name for name in names.values() if Path(name).name != name]:
        raise ValueError(f"{file} names a file outside its directory ({elsewhere[0]!r}): refused.")
    return sorted(set(names.values()))


def code_in_pickle(file: str | os.PathLike) -> str:
    """Return the message for a pickled checkpoint that holds more than tensors."""
    return (
        f"{file} holds more than tensors (code that loading would run), or is no checkpoint: refused. Ask for "
        "safetensors, or save it again as a dict of tensors."
    )


def _read_file(file: str) -> dict[str, Tensor]:
    if file.endswith(".safetensors"):
        try:
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short ({error}): copy it again.") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise ValueError(code_in_pickle(file)) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged or cut short: copy it again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} is no checkpoint: expected a dict of tensors.")
    return state


def _is_zip(file: str) -> bool:
    """Whether a pickled checkpoint has the format that can be memory-mapped."""
    with open(file, "rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def listing(names: list[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_weights(
    path: str | os.PathLike, missing: list[str], unexpected: list[str], mismatched: list[tuple[str, Any, Any]]
) -> None:
    """ValueError that lists by name what is wrong with a checkpoint.

    Args:
        mismatched: name, shape in the file, shape of the model.
    """
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {listing(missing)}")
    if mismatched:
        shapes = [f"{name} {list(given)} instead of {list(wanted)}" for name, given, wanted in mismatched]
        problems.append(f"{len(mismatched)} of another shape: {listing(shapes)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unknown: {listing(unexpected)}")
    if problems:
        raise ValueError(f"the weights in {path} do not fit its configuration ({'; '.join(problems)}).")
