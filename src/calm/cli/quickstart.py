import time
from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    run: Annotated[Path, typer.Argument(help="directory of everything it writes")] = Path("runs/quickstart"),
    minutes: Annotated[
        float, typer.Option(help="time budget, shared by the stages; too short a budget is refused with the minimum")
    ] = 8,
    seed: Annotated[int, typer.Option(help="seed of initialisation, data order and sampling")] = 0,
    device: Annotated[str, typer.Option(help="auto or cpu")] = "auto",
) -> None:
    """Train, score and sample CALM and a token baseline on real text in the given minutes.

    The text is the source of Python's own standard library; nothing is downloaded. Both models read the same tokens:
    as many as the time allows on this machine. A run that was killed resumes when it is started again.
    """
    started = time.monotonic()  # loading the libraries is a part of the given minutes

    from rich.console import Console

    from calm.report import quickstart as report
    from calm.training.loop.metrics_log import read_metrics
    from calm.utils.device import resolve_device
    from calm.utils.progress import make_progress
    from calm.workflows.quickstart import MODELS, next_command, run_quickstart

    if not 0 < minutes < float("inf"):
        raise ValueError(f"--minutes must be a number above 0, got {minutes:g}.")
    with make_progress() as progress:
        results = run_quickstart(run, minutes, seed, resolve_device(device).type, progress, started=started)
    report.show(results, Console())
    command = next_command(run)
    path = report.write(results, {name: read_metrics(run / name) for name in MODELS}, run, command)
    print(f"report: {path.absolute()} (and report.md beside it)\nnext:\n{command}")
