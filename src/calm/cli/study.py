from pathlib import Path
from typing import Annotated

import typer


def study(
    plan: Annotated[
        Path, typer.Argument(help="YAML: models, scoring, report; recipes/study/... are found from anywhere")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of models, scores and report")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ..., for all recipes")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="a model of the plan, several times: these and what they need; default all")
    ] = None,
    cost: Annotated[bool, typer.Option("--cost", help="print what the models cost instead of training them")] = False,
    tflops: Annotated[
        float, typer.Option(help="with --cost: operations per second, in 10^12, that the hardware does for you")
    ] = 100.0,
) -> None:
    """Train and score the models of a plan, and compare them.

    What is done is not done again, and a model under way goes on from its last checkpoint: start the same command again
    after a kill. `timeout --signal TERM 9m calm study ...` does as much as fits into nine minutes. Started several
    times, on several devices or machines with one file system, the processes share the work.

    Example: `calm study recipes/study/cpu.yaml -o runs/study data.train=data/train data.validation=data/validation`
    """
    from calm.utils.progress import make_progress
    from calm.workflows.study import Plan, run_study, study_cost

    if cost:
        if not tflops > 0:
            raise ValueError(f"--tflops must be above 0, got {tflops:g}.")
        from rich.console import Console

        from calm.report.tables import cost_table

        Console().print(cost_table(study_cost(Plan.load(plan), output, overrides or [], only or []), tflops))
        return
    with make_progress() as progress:
        report = run_study(Plan.load(plan), output, overrides or [], only or [], progress)
    print(report.read_text(encoding="utf-8"))


def report(
    study: Annotated[Path, typer.Argument(help="directory of `calm study`")],
) -> None:
    """Draw the tables and plots of a study again, from the scores that are there."""
    from calm.report.study import write_report

    print(write_report(study).read_text(encoding="utf-8"))
