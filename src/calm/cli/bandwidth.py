from pathlib import Path
from typing import Annotated

import typer


def bandwidth(
    family: Annotated[
        Path,
        typer.Argument(
            help="directory with autoencoder.yaml, calm.yaml, baseline.yaml; recipes/quickstart is found from anywhere"
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of models, scores and report")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ..., for all recipes")] = None,
    patch_size: Annotated[
        list[int] | None, typer.Option("--patch-size", "-k", min=1, help="K, several times; default 1, 2, 4 and 8")
    ] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="validation blocks to score on; default all")] = None,
    samples: Annotated[int, typer.Option(min=2, help="draws per position")] = 8,
    seed: Annotated[int, typer.Option(help="of training and draws")] = 0,
) -> None:
    """Train and score one family of models for several K, and draw BrierLM against compute.

    It is a study (`calm study`) of the family's recipes: what is done is not done again, a model under way goes on from
    its last checkpoint, several processes share the work, and another K may be added later.

    Example: `calm bandwidth recipes/quickstart -o runs/bandwidth data.train=data/train data.validation=data/validation`
    """
    from calm.utils.progress import make_progress
    from calm.workflows.patch_size_sweep import bandwidth_plan
    from calm.workflows.study import run_study

    plan = bandwidth_plan(family, patch_size or [1, 2, 4, 8], blocks, samples, seed)
    with make_progress() as progress:
        report = run_study(plan, output, overrides or [], progress=progress)
    print(report.read_text(encoding="utf-8"))
