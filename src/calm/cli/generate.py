import sys
from pathlib import Path
from typing import Annotated

import typer

from calm.cli.sampling_options import with_sampling_options
from calm.generation.sampling_params import SamplingParams


@with_sampling_options
def generate(
    model: Annotated[str, typer.Argument(help="directory of a trained model, or a hub id")],
    prompt: Annotated[
        str | None, typer.Option(help="text to continue; `-` reads standard input. Default: an empty text")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL file, `{"prompt": ...}` in every line; needs --output')
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file: the lines of --prompts with their continuations")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts of the file at a time")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="number of tokens to add at most")] = 128,
    stop: Annotated[list[str] | None, typer.Option(help="end after this text; may be given several times")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same text on the same device")] = 0,
    drafter: Annotated[
        str | None, typer.Option(help="directory of a drafter of this token model: same text, fewer passes")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer, when the model has none beside it")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; auto is float32 on a CPU")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="compile the step: slow to start, then faster")] = False,
    *,
    sampling: SamplingParams,
) -> None:
    """Continue a prompt, printing as it goes, or all prompts of a file.

    Example: `calm generate runs/calm --prompt "def main(" --temperature 0.5`

    Example: `calm generate runs/calm --prompts prompts.jsonl -o texts.jsonl`
    """
    import dataclasses

    from calm.checkpoints.loading import load_language_model
    from calm.data.tokenizer import load_tokenizer
    from calm.generation.completions import PrintingStreamer, complete, complete_file
    from calm.generation.drafted_runner import DraftedRunner
    from calm.generation.model_runner import model_runner
    from calm.utils.device import resolve_device, resolve_dtype
    from calm.utils.paths import did_you_mean
    from calm.utils.progress import make_progress

    if prompts is not None and (output is None or prompt is not None):
        raise ValueError("--prompts needs --output for its continuations, and replaces --prompt.")
    if output is not None and prompts is None:
        raise ValueError("--output is for the continuations of --prompts; that of one --prompt is printed.")
    if prompts is not None and not prompts.is_file():
        raise ValueError(f"no such file: {prompts}{did_you_mean(prompts)}")
    target = resolve_device(device)
    language_model = load_language_model(model, resolve_dtype(dtype, target))
    language_model.to(target)  # type: ignore[arg-type]
    own_tokenizer = load_tokenizer(tokenizer or model)
    params = dataclasses.replace(sampling, max_new_tokens=max_new_tokens, stop=tuple(stop or ()), seed=seed)
    runner = model_runner(language_model) if drafter is None else DraftedRunner(language_model, drafter)
    if prompts is None or output is None:
        text = sys.stdin.read() if prompt == "-" else prompt or ""
        complete(runner, own_tokenizer, [text], params, PrintingStreamer(own_tokenizer), compile=compile)
        if isinstance(runner, DraftedRunner):
            print(runner.summary())
        return
    with make_progress() as progress:
        task = progress.add_task("generate", total=None, note="")
        advance = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
        count = complete_file(runner, own_tokenizer, prompts, output, params, batch_size, advance, compile)
    print(f"{count} texts: {output}")
    if isinstance(runner, DraftedRunner):
        print(runner.summary())
