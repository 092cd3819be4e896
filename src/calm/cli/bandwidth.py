from pathlib import Path
from typing import Annotated

import typer


def bandwidth(
    family: Annotated[
        Path, typer.Argument(help="directory with autoencoder.yaml, calm.yaml, baseline.yaml, as recipes/quickstart")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of models, scores, table and plot")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ..., for all recipes")] = None,
    patch_size: Annotated[
        list[int] | None, typer.Option("--patch-size", "-k", min=1, help="K, several times; default 1, 2, 4 and 8")
    ] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="validation blocks to score on; default all")] = None,
    samples: Annotated[int, typer.Option(min=2, help="draws per position")] = 8,
    seed: Annotated[int, typer.Option(help="of training and draws")] = 0,
) -> None:
    """Train and score one family of models for several K, and draw BrierLM against compute.

    Points that are done are not done again; a point under way goes on from its last checkpoint.

    Example: `calm bandwidth recipes/quickstart -o runs/bandwidth data.train=data/train data.validation=data/validation`
    """
    from calm.bandwidth import run_bandwidth
    from calm.training.progress import make_progress

    with make_progress() as progress:
        sizes = patch_size or [1, 2, 4, 8]
        run_bandwidth(family, output, sizes, overrides or [], blocks, samples, seed, progress)
    print((output / "bandwidth.md").read_text(encoding="utf-8"))
