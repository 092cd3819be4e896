"""Models one under the other as a PNG: a score and its error each, beside that of the first."""

from collections.abc import Sequence
from pathlib import Path

from calm.report.canvas import new_figure


def plot_rows(rows: Sequence[tuple[str, float, float | None]], x: str, path: Path) -> None:
    """Draw a point with an error bar per row.

    Args:
        rows: label, value and standard error (None where there is none); a line marks the value of the first.
        x: what the values are.
        path: of the PNG.
    """
    figure = new_figure(9, 0.8 + 0.24 * len(rows))
    axis = figure.subplots()
    labels, values, errors = zip(*rows, strict=True)
    places = range(len(rows))
    axis.axvline(values[0], color="0.6", linewidth=1, linestyle="--")
    axis.errorbar(values, places, xerr=[error or 0.0 for error in errors], fmt="o", markersize=4, capsize=2)
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(x)
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
