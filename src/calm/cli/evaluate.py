from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from calm.generation.samplers import sampler_names
from calm.generation.sampling_params import DEFAULTS, SamplingParams


def evaluate(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="directories of trained models, or hub ids")],
    data: Annotated[Path, typer.Option(help="prepared validation data, see `calm prepare`")],
    protocol: Annotated[
        str,
        typer.Option(
            help="common: all models on the same n-grams, with the same context in tokens; paper: blocks of 2048 "
            "patches for a CALM and 2048 tokens for a token model, an n-gram at every patch and every token"
        ),
    ] = "common",
    block_size: Annotated[
        int | None, typer.Option(help="tokens of a block: the longest context. Scores depend on it  [default: 1024]")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="so many blocks, evenly spread over the data; default all")
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=2,
            help="draws per position, of which all pairs are compared; of a token model 4 are as good as more",
        ),
    ] = 4,
    stride: Annotated[
        int | None, typer.Option(min=1, help="tokens between scored n-grams; default fits all models")
    ] = None,
    target_error: Annotated[
        float | None,
        typer.Option(help="stop a model when the standard error of its BrierLM is this low, after 32 blocks at least"),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            help="of the draws, in (0, 1] with a head; may be given several times. Default 1, as in the paper"
        ),
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(help=f"of CALMs: {', '.join(sampler_names())}, or one of your own; may be given several times"),
    ] = None,
    num_candidates: Annotated[int, typer.Option(min=1, help="draws per chunk at temperatures below 1")] = DEFAULTS[
        "num_candidates"
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="blocks at a time")] = 8,
    seed: Annotated[int, typer.Option(help="of all draws")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer of models that have none beside them")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; auto is float32 on a CPU")] = "auto",
    output: Annotated[Path | None, typer.Option(help="write the results as JSON, after every score")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="draw accuracy against collision at the temperatures, as a PNG")
    ] = None,
) -> None:
    """Score models on held-out text: BrierLM of language models, reconstruction of autoencoders.

    Example: `calm evaluate runs/calm runs/baseline --data data/validation --block-size 256`

    Example: `calm evaluate runs/calm runs/baseline --data DIR --temperature 1 --temperature 0.5 --plot t.png`
    """
    from rich.console import Console

    from calm.checkpoints.loading import load_model
    from calm.data.blocks import TokenBlocks, read_manifest
    from calm.data.tokenizer import has_tokenizer, load_tokenizer, tokenizer_hash
    from calm.evaluation.brier_lm import evaluate_brier
    from calm.evaluation.protocol import protocols
    from calm.evaluation.reconstruction import evaluate_reconstruction
    from calm.evaluation.statistics import MIN_BLOCKS
    from calm.generation.model_runner import model_runner
    from calm.generation.samplers import canonical_name
    from calm.models.modeling_autoencoder import CalmAutoencoder
    from calm.models.modeling_calm import CalmForCausalLM
    from calm.report.scatter import plot_panels, temperature_panels
    from calm.report.tables import brier_table, difference_table, reconstruction_table
    from calm.utils.device import resolve_device, resolve_dtype
    from calm.utils.files import write_json
    from calm.utils.progress import make_progress

    protocols([], protocol, block_size, stride)  # a mistake shows before models are loaded
    temperatures = list(dict.fromkeys(temperature or [1.0]))
    samplers = list(dict.fromkeys(canonical_name(name) for name in sampler or ["batch"]))
    for how in samplers:
        SamplingParams(1.0, how, num_candidates)
    _check_writable(context, output, plot)
    target = resolve_device(device)
    loaded: dict[str, Any] = {}
    for name in models:
        loaded[name] = load_model(name, resolve_dtype(dtype, target))
        loaded[name].to(target)
        if isinstance(loaded[name], CalmForCausalLM):
            for t, how in product(temperatures, samplers):
                loaded[name].check_sampling(SamplingParams(t, how, num_candidates))
        elif not isinstance(loaded[name], CalmAutoencoder):
            for t in temperatures:
                model_runner(loaded[name]).resolve(SamplingParams(t))
    manifest = read_manifest(data)
    for name in models:
        own = load_tokenizer(name if tokenizer is None or has_tokenizer(name) else tokenizer)
        if tokenizer_hash(own) != manifest["tokenizer_sha256"]:
            raise ValueError(
                f"{data} was not prepared with the tokenizer of {name}: `calm prepare --tokenizer {name}`."
            )

    results: dict[str, dict] = {}

    def keep() -> None:  # after every score: none is lost when a later one ends early
        if output is not None:
            document = {"data": str(data), "tokenizer_sha256": manifest["tokenizer_sha256"], "models": results}
            write_json(output, document)

    with make_progress() as progress:
        scored_on = protocols(loaded.values(), protocol, block_size, stride)
        for (name, model), scored_as in zip(loaded.items(), scored_on, strict=True):
            text = TokenBlocks(data, scored_as.block_size, scored_as.multiple_of)
            task = progress.add_task(f"score {name}", total=len(text.spread(blocks)), note="")
            advance = lambda done, task=task: progress.advance(task, done)  # noqa: E731
            origin = {"model": name, "protocol": protocol}
            if isinstance(model, CalmAutoencoder):
                result = evaluate_reconstruction(model, text, blocks, batch_size, seed, advance)
                results[name] = origin | result.to_dict()
                keep()
                continue
            for t, how in product(temperatures, samplers if isinstance(model, CalmForCausalLM) else ["batch"]):
                said = [f"T = {t:g}"] * (len(temperatures) > 1) + [how] * (how != "batch")
                label = f"{name} ({', '.join(said)})" if said else name
                progress.reset(task, description=f"score {label}")
                scored = evaluate_brier(
                    model,
                    text,
                    scored_as.stride,
                    num_blocks=blocks,
                    num_samples=samples,
                    batch_size=batch_size,
                    seed=seed,
                    advance=advance,
                    temperature=t,
                    num_candidates=num_candidates,
                    target_error=target_error,
                    sampler=how,
                )
                results[label] = origin | scored.to_dict()
                keep()
                error = scored.brier_lm_error
                if target_error is not None and (error is None or error > target_error):
                    few = f" No error is reported below {MIN_BLOCKS} blocks." if error is None else ""
                    progress.console.print(f"{label}: the text ended before the error was {target_error:g}.{few}")
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width; numbers must not be cut off
        console = Console(width=max(console.width, 160))
    scores = {name: result for name, result in results.items() if "brier_lm" in result}
    rebuilt = {name: result for name, result in results.items() if "brier_lm" not in result}
    if rebuilt:
        console.print(reconstruction_table(rebuilt))
    if scores:
        console.print(brier_table(scores))
        if (differences := difference_table(scores)) is not None:
            console.print(differences)
    if any(result["brier_lm"] == 0 for result in scores.values()):
        print("BrierLM is 0 where one of its scores is not above 0; more text (--blocks) may tell it from 0.")
    if plot is not None and scores:
        lines: dict[str, list[dict]] = {}
        for each in scores.values():
            how = "" if each["sampler"] in (None, "batch") else f" ({each['sampler']})"
            lines.setdefault(each["model"] + how, []).append(each)
        plot_panels(temperature_panels(lines), plot)
        print(f"plot: {plot}")


def _check_writable(context: typer.Context, output: Path | None, plot: Path | None) -> None:
    """Raise ValueError for a file that could not be written at the end, and hold its lock to the end of the command."""
    from calm.utils.files import only_writer

    if plot is not None and plot.suffix != ".png":
        raise ValueError(f"--plot draws a PNG: name a file that ends in .png, got {plot}.")
    for path in (output, plot):
        if path is not None:
            if path.is_dir():
                raise ValueError(f"{path} is a directory: name a file in it.")
            path.parent.mkdir(parents=True, exist_ok=True)
            context.with_resource(only_writer(path))
