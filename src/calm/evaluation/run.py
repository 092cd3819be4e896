"""Evaluation of models side by side, as ``calm evaluate`` does it."""

import math
import os
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from calm.checkpoints.loading import load_model
from calm.data.blocks import TokenBlocks, read_manifest
from calm.data.tokenizer import has_tokenizer, load_tokenizer, tokenizer_hash
from calm.evaluation import brier_lm
from calm.evaluation.metrics.registry import MetricInputs, compute_metrics
from calm.evaluation.protocol import Protocol, protocols
from calm.evaluation.reconstruction import evaluate_reconstruction
from calm.evaluation.statistics import MIN_BLOCKS
from calm.generation.model_runner import model_runner
from calm.generation.samplers import canonical_name
from calm.generation.sampling_params import DEFAULTS, SamplingParams
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.utils.device import resolve_device, resolve_dtype
from calm.utils.progress import make_progress

AUTOENCODER = "autoencoder"


def evaluate(
    models: str | os.PathLike | Sequence[str | os.PathLike],
    data: str | os.PathLike,
    *,
    protocol: str = "common",
    block_size: int | None = None,
    num_blocks: int | None = None,
    num_samples: int = 4,
    stride: int | None = None,
    target_error: float | None = None,
    temperatures: Sequence[float] = (1.0,),
    samplers: Sequence[str] = ("batch",),
    num_candidates: int = DEFAULTS["num_candidates"],
    batch_size: int = 8,
    seed: int = 0,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    show_progress: bool = False,
    on_result: Callable[[dict[str, dict[str, Any]]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score models on held-out text: BrierLM of language models, reconstruction of autoencoders, and every metric.

    Args:
        models: directories of trained models, or hub ids; one or several.
        data: directory of prepared validation data.
        protocol: ``"common"`` or ``"paper"``, see :func:`calm.evaluation.protocol.protocols`.
        block_size: tokens of a block, the longest context; default 1024.
        num_blocks: number of blocks, evenly spread over the data; default all.
        num_samples: samples per position, of which all pairs are compared; at least 2.
        stride: tokens between scored n-grams; default: what fits the patches of all models.
        target_error: stop a model when the standard error of its BrierLM is this low.
        temperatures: every model is scored at each.
        samplers: every CALM is scored with each.
        num_candidates: samples per patch that the batch sampler compares below temperature 1.
        batch_size: blocks at a time.
        seed: of all samples.
        tokenizer: tokenizer of models that are saved without one.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``; auto is float32 on a CPU.
        show_progress: show the progress on the standard error.
        on_result: called with all results so far after every score.

    Returns:
        a dictionary per score, by the name of the model (with temperature and sampler, if there are several): the
        fields of :class:`~calm.evaluation.brier_lm.BrierResult` or
        :class:`~calm.evaluation.reconstruction.ReconstructionResult`, ``model``, ``protocol``, and ``metrics``, the
        values of the registered metrics that the model supports (None where a value is infinite).

    Raises:
        ValueError: for settings that do not fit together, and for a model whose tokenizer is not that of the data.
    """
    names = [str(name) for name in ([models] if isinstance(models, str | os.PathLike) else models)]
    protocols([], protocol, block_size, stride)  # a mistake shows before models are loaded
    temperatures = list(dict.fromkeys(temperatures))
    samplers = list(dict.fromkeys(canonical_name(name) for name in samplers))
    for sampler in samplers:
        SamplingParams(1.0, sampler, num_candidates)
    target = resolve_device(device)
    loaded: dict[str, Any] = {}
    variants: dict[str, list[tuple[float, str]]] = {}
    for name in names:
        loaded[name] = load_model(name, resolve_dtype(dtype, target))
        loaded[name].to(target)
        variants[name] = _variants(loaded[name], temperatures, samplers, num_candidates)
    tokenizers = _tokenizers(names, data, tokenizer)
    results: dict[str, dict[str, Any]] = {}
    with make_progress(disable=not show_progress) as progress:
        settings = protocols(loaded.values(), protocol, block_size, stride)
        for (name, model), setting in zip(loaded.items(), settings, strict=True):
            blocks = TokenBlocks(data, setting.block_size, setting.multiple_of)
            task = progress.add_task(f"score {name}", total=len(blocks.spread(num_blocks)), note="")
            advance = lambda done, task=task: progress.advance(task, done)  # noqa: E731
            for temperature, sampler in variants[name] or [(1.0, "")]:
                inputs = _inputs(model, tokenizers[name], blocks, setting, temperature, sampler)
                inputs.num_blocks, inputs.batch_size, inputs.seed = num_blocks, batch_size, seed
                label = name
                if inputs.kind == AUTOENCODER:
                    result: Any = evaluate_reconstruction(model, blocks, num_blocks, batch_size, seed, advance)
                else:
                    parts = [f"T = {temperature:g}"] * (len(temperatures) > 1) + [sampler] * (sampler != "batch")
                    label = f"{name} ({', '.join(parts)})" if parts else name
                    progress.reset(task, description=f"score {label}")
                    result = brier_lm.evaluate_brier(
                        model, blocks, setting.stride, num_blocks=num_blocks, num_samples=num_samples,
                        batch_size=batch_size, seed=seed, advance=advance, temperature=temperature,
                        num_candidates=num_candidates, target_error=target_error, sampler=sampler,
                    )  # fmt: skip
                metrics = {
                    key: value if math.isfinite(value) else None for key, value in compute_metrics(inputs).items()
                }
                results[label] = {"model": name, "protocol": protocol} | result.to_dict() | {"metrics": metrics}
                if on_result is not None:
                    on_result(results)
                if show_progress and target_error is not None and inputs.kind != AUTOENCODER:
                    error = result.brier_lm_error
                    if error is None or error > target_error:
                        few = f" No error is reported below {MIN_BLOCKS} blocks." if error is None else ""
                        progress.console.print(f"{label}: the text ended before the error was {target_error:g}.{few}")
    return results


def _variants(
    model: Any, temperatures: Sequence[float], samplers: Sequence[str], num_candidates: int
) -> list[tuple[float, str]]:
    """Return temperatures and samplers of a language model's scores, checked; none for an autoencoder."""
    if isinstance(model, CalmAutoencoder):
        return []
    runner = model_runner(model)
    if not runner.samplers:  # a token model
        for temperature in temperatures:
            runner.resolve(SamplingParams(temperature))
        return [(temperature, "batch") for temperature in temperatures]
    for temperature, sampler in product(temperatures, samplers):
        runner.check(SamplingParams(temperature, sampler, num_candidates))
    return list(product(temperatures, samplers))


def _inputs(
    model: Any, tokenizer: Any, blocks: TokenBlocks, setting: Protocol, temperature: float, sampler: str
) -> MetricInputs:
    kind = AUTOENCODER if isinstance(model, CalmAutoencoder) else model_runner(model).kind
    return MetricInputs(
        model, kind, tokenizer, blocks, setting.stride, temperature=temperature,
        sampler=sampler if kind == "calm" else None,
    )  # fmt: skip


def _tokenizers(names: Sequence[str], data: str | os.PathLike, other: str | None) -> dict[str, Any]:
    """Return the tokenizer of every model; ValueError for one that did not prepare the data."""
    expected, tokenizers = read_manifest(data)["tokenizer_sha256"], {}
    for name in names:
        tokenizers[name] = load_tokenizer(name if other is None or has_tokenizer(name) else other)
        if tokenizer_hash(tokenizers[name]) != expected:
            raise ValueError(
                f"{data} was not prepared with the tokenizer of {name}: `calm prepare --tokenizer {name}`."
            )
    return tokenizers
