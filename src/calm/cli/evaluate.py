import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    models: Annotated[list[str], typer.Argument(help="directories of trained models, or hub ids")],
    data: Annotated[Path, typer.Option(help="prepared validation data, see `calm prepare`")],
    block_size: Annotated[int, typer.Option(help="tokens of a block: the longest context. Scores depend on it")] = 1024,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="so many blocks, evenly spread over the data; default all")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="continuations drawn per position, at least 2")] = 4,
    stride: Annotated[
        int | None, typer.Option(min=1, help="tokens between scored n-grams; default fits all models")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="blocks at a time")] = 8,
    seed: Annotated[int, typer.Option(help="of all draws")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer of models that have none beside them")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; auto is float32 on a CPU")] = "auto",
    output: Annotated[Path | None, typer.Option(help="write the results as JSON")] = None,
) -> None:
    """Score models on held-out text: BrierLM of language models, reconstruction of autoencoders.

    All language models are scored on the same n-grams: those that start where every model's patches start.

    Example: `calm evaluate runs/calm runs/baseline --data data/validation --block-size 256`
    """
    from rich.console import Console

    from calm.data.blocks import TokenBlocks
    from calm.data.tokenizer import has_tokenizer, load_tokenizer, tokenizer_hash
    from calm.device import resolve_device, resolve_dtype
    from calm.evaluation.brier_lm import evaluate_brier
    from calm.evaluation.reconstruction import evaluate_reconstruction
    from calm.models.loading import load_model
    from calm.models.modeling_autoencoder import CalmAutoencoder
    from calm.report.tables import brier_table, reconstruction_table
    from calm.training.progress import make_progress

    target = resolve_device(device)
    loaded: dict[str, Any] = {}
    for name in models:
        loaded[name] = load_model(name, resolve_dtype(dtype, target))
        loaded[name].to(target)
    patch_sizes = [getattr(model.config, "patch_size", 1) for model in loaded.values()]
    stride = stride or math.lcm(*patch_sizes)
    text = TokenBlocks(data, block_size, math.lcm(*patch_sizes))
    for name in models:
        words = load_tokenizer(name if tokenizer is None or has_tokenizer(name) else tokenizer)
        if tokenizer_hash(words) != text.manifest["tokenizer_sha256"]:
            raise ValueError(
                f"{data} was not prepared with the tokenizer of {name}: `calm prepare --tokenizer {name}`."
            )

    results: dict[str, dict] = {}
    with make_progress() as progress:
        for name, model in loaded.items():
            total = len(text.spread(blocks))
            task = progress.add_task(f"score {name}", total=total, note="")
            if isinstance(model, CalmAutoencoder):
                results[name] = evaluate_reconstruction(model, text, blocks, batch_size, seed).to_dict()
                progress.update(task, completed=total)
            else:
                advance = lambda done, task=task: progress.advance(task, done)  # noqa: E731
                result = evaluate_brier(model, text, stride, blocks, samples, batch_size, seed, advance)
                results[name] = result.to_dict()
    console = Console()
    scores = {name: result for name, result in results.items() if "brier_lm" in result}
    rebuilt = {name: result for name, result in results.items() if "brier_lm" not in result}
    if rebuilt:
        console.print(reconstruction_table(rebuilt))
    if scores:
        console.print(brier_table(scores))
    if output is not None:
        document = {"data": str(data), "tokenizer_sha256": text.manifest["tokenizer_sha256"], "models": results}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1), encoding="utf-8")
