"""Semantic bandwidth as an axis: one family of recipes, trained and scored for several K and as a token model.

Every point (an autoencoder and a CALM of one K, or the baseline) leaves its score in the run directory when it is done;
what is there already is not done again.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from calm.data.blocks import check_block_size
from calm.files import write_whole
from calm.report.scatter import Panel, plot_panels
from calm.report.study import SCORE
from calm.report.tables import brier_cell
from calm.study import Evaluation, score_run, scored_block_size
from calm.training.recipe import Recipe
from calm.training.run import train

RECIPES = ("autoencoder", "calm", "baseline")


def run_bandwidth(
    family: str | os.PathLike,
    run: str | os.PathLike,
    patch_sizes: Sequence[int],
    overrides: Sequence[str] = (),
    num_blocks: int | None = None,
    num_samples: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict]:
    """Train and score every point; returns the points, which also lie in ``points.json``.

    All are scored on the same n-grams: those that start where the patches of every K do.

    Args:
        family: directory with ``autoencoder.yaml``, ``calm.yaml`` and ``baseline.yaml``.
        patch_sizes: the K; each has an autoencoder of its own.
        overrides: ``dotted.key=value`` for all recipes.
    """
    family, run = Path(family), Path(run)
    for name in RECIPES:
        if not (family / f"{name}.yaml").is_file():
            raise ValueError(f"no {name}.yaml in {family}: a family of recipes has {', '.join(RECIPES)}.")
    if not patch_sizes or min(patch_sizes) < 1:
        raise ValueError(f"patch sizes must be at least 1, got {list(patch_sizes)}.")
    stride = math.lcm(*patch_sizes)
    for name in RECIPES:
        recipe = Recipe.load(family / f"{name}.yaml", overrides)
        if name != "autoencoder":
            scored_block_size(name, recipe, stride)
        for patch_size in patch_sizes if name != "baseline" else ():
            check_block_size(recipe.data.block_size, patch_size)
    points = []
    for patch_size in (0, *sorted(set(patch_sizes))):
        folder = run / (f"k{patch_size}" if patch_size else "baseline")
        score = folder / SCORE
        if not score.exists():
            model = _train(family, folder, patch_size, overrides, seed, progress)
            scored = score_run(model, Evaluation(stride, num_blocks, num_samples, seed))
            write_whole(score, json.dumps(scored, indent=1))
        points.append(json.loads(score.read_text(encoding="utf-8")))
    _check_comparable(points)
    write_whole(run / "points.json", json.dumps(points, indent=1))
    write_whole(run / "bandwidth.md", _markdown(points))
    plot_panels(_panels(points), run / "bandwidth.png")
    return points


def _train(
    family: Path, folder: Path, patch_size: int, overrides: Sequence[str], seed: int, progress: Progress | None
) -> Path:
    common = [*overrides, f"seed={seed}"]
    if not patch_size:
        return train(Recipe.load(family / "baseline.yaml", [*common, _path("output_dir", folder / "model")]), progress)
    place = folder / "autoencoder"
    here = [_path("output_dir", place), f"model.patch_size={patch_size}"]
    train(Recipe.load(family / "autoencoder.yaml", [*common, *here]), progress)
    here = [_path("output_dir", folder / "model"), _path("model.autoencoder", place)]
    return train(Recipe.load(family / "calm.yaml", [*common, *here]), progress)


def _path(key: str, path: Path) -> str:
    return f"{key}={json.dumps(str(path))}"  # quoted: to YAML, a path may look like something else


def _check_comparable(points: list[dict]) -> None:
    for name in ("stride", "block_size", "data_sha256", "num_samples"):
        values = {str(point[name]) for point in points}
        if len(values) > 1:
            raise ValueError(
                f"points of this directory were scored with different {name} ({', '.join(sorted(values))}): remove "
                f"their {SCORE} files to score them again, or take another directory."
            )


def _name(point: dict) -> str:
    return f"K = {point['patch_size']}" if point["patch_size"] else "token model"


def _panels(points: list[dict]) -> list[Panel]:
    panels = []
    titles = {"training_flops": "training FLOPs", "inference_flops_per_token": "FLOPs per generated token"}
    for key, title in titles.items():
        lines = {
            "CALM": [(p[key], p["brier_lm"], _name(p)) for p in points if p["patch_size"]],
            "token model": [(p[key], p["brier_lm"], "") for p in points if not p["patch_size"]],
        }
        panels.append(Panel("BrierLM against " + title, title, "BrierLM", lines, log_x=True))
    return panels


def _markdown(points: list[dict]) -> str:
    first = points[0]
    lines = [
        "# Semantic bandwidth",
        "",
        f"{first['num_positions']:,} n-grams in {first['num_blocks']} held-out blocks of {first['block_size']} tokens, "
        f"one every {first['stride']} tokens; {first['num_samples']} draws; ± is one standard error.",
        "",
        "| model | BrierLM | Brier-1 | Brier-2 | Brier-3 | Brier-4 | training FLOPs | FLOPs per token | parameters | "
        "tokens | tokens kept by the autoencoder |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for point in points:
        kept = f"{point['token_accuracy_sample']:.2%}" if point["patch_size"] else ""
        brier = " | ".join(f"{value:.2f}" for value in point["brier"])
        lines.append(
            f"| {_name(point)} | {brier_cell(point)} | {brier} | "
            f"{point['training_flops']:.2e} | {point['inference_flops_per_token']:.2e} | {point['parameters']:,} | "
            f"{point['tokens']:,} | {kept} |"
        )
    return "\n".join([*lines, "", "![BrierLM against compute](bandwidth.png)", ""])
