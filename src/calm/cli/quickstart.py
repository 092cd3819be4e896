from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    run: Annotated[Path, typer.Argument(help="directory of everything it makes")] = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(min=0.5, help="time budget, shared by the stages")] = 8,
    seed: Annotated[int, typer.Option(help="of initialisation, data order and draws")] = 0,
    device: Annotated[str, typer.Option(help="auto or cpu")] = "auto",
) -> None:
    """The whole path on real text: tokenizer, CALM, baseline, scores, samples.

    The text is the source of Python's own standard library; nothing is downloaded. Killed and started again, it goes on
    where it was.
    """
    from rich.console import Console

    from calm.report import quickstart as report
    from calm.training.loop.metrics_log import read_metrics
    from calm.utils.device import resolve_device
    from calm.utils.progress import make_progress
    from calm.workflows.quickstart import MODELS, run_quickstart

    with make_progress() as progress:
        results = run_quickstart(run, minutes, seed, resolve_device(device).type, progress)
    report.show(results, Console())
    path = report.write(results, {name: read_metrics(run / name) for name in MODELS}, run)
    settings = "--sampler direct --temperature 0.5"
    print(f"report: {path}\nnext: calm generate {run / 'calm'} --prompt 'def ' {settings}")
