"""What `calm quickstart` shows and writes when it is done."""

from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from calm.report.learning_curves import plot_learning_curves
from calm.report.tables import (
    brier_cell,
    brier_table,
    difference_cell,
    difference_table,
    differences,
    score_cell,
)

CURVES = [
    ("calm", "first_cross_entropy", "CALM: cross-entropy of the first pass"),
    ("calm", "later_cross_entropy", "CALM: cross-entropy of later passes"),
    ("baseline", "loss", "baseline: cross-entropy"),
]


def _costs(results: dict) -> dict[str, dict[str, str]]:
    costs = {}
    for name in results["brier"]:
        trained = results["training"].get(name)
        speed = results["generation_tokens_per_second"].get(name)
        costs[name] = {
            "train\nFLOPs": f"{trained['training_flops']:.1e}" if trained else "",
            "tokens/s": f"{speed:,.0f}" if speed else "",
        }
    return costs


def _said(sample: dict) -> str:
    return f"{sample['model']}, temperature {sample['temperature']:.3g}"


def show(results: dict, console: Console) -> None:
    """Print the tables and samples."""
    console.print(brier_table(results["brier"], _costs(results)))
    if (table := difference_table(results["brier"])) is not None:
        console.print(table)
    for sample in results["samples"]:
        text = Text.assemble((sample["prompt"], "bold"), sample["text"])
        console.print(Panel(text, title=_said(sample), title_align="left"))


def write(results: dict, curves: dict[str, list[dict]], run: Path) -> Path:
    """Write ``report.md`` and ``learning_curves.png`` into the run directory; returns the report's path."""
    picture = "![learning curves](learning_curves.png)"
    try:
        plot_learning_curves(curves, CURVES, run / "learning_curves.png")
    except ImportError:
        picture = "(Learning curves need matplotlib: install `calm-lm[report]`.)"
    costs = _costs(results)
    lines = [
        "# CALM quickstart",
        "",
        f"Time budget {results['minutes']:g} minutes, seed {results['seed']}. Text: the source of Python's standard "
        "library.",
        "",
        f"All models were trained on the same tokens: {results['training']['calm']['tokens']:,} of them.",
        "",
        "| model | BrierLM | difference | Brier-1 | Brier-2 | Brier-3 | Brier-4 | training FLOPs | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    apart = differences(results["brier"])
    for name, result in results["brier"].items():
        brier = " | ".join(map(score_cell, result["brier"]))
        cells = " | ".join(costs[name].values())
        difference = difference_cell(apart[name]) if name in apart else ""
        lines.append(f"| {name} | {brier_cell(result)} | {difference} | {brier} | {cells} |")
    scored = results["brier"]["calm"]
    lines += [
        "",
        "BrierLM is the geometric mean of Brier-1 to Brier-4, times 100; ± is one standard error (from 32 blocks on), "
        "and that of a difference (to the first model, block by block) is smaller. Measured at "
        f"{scored['num_positions']:,} positions in {scored['num_blocks']} held-out blocks of {scored['block_size']} "
        f"tokens, every {scored['stride']} tokens, with {scored['num_samples']} draws each. Tokens/s: "
        "temperature 1, batch 8. `calm` samples with its head, `calm (token_prediction)` with the multi-token "
        "prediction that its backbone was trained with as well.",
        "",
        picture,
        "",
        "## Samples",
    ]
    for sample in results["samples"]:
        lines += [
            "",
            f"{_said(sample)}:",
            "",
            "```python",
            sample["prompt"] + sample["text"],
            "```",
        ]
    path = run / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
