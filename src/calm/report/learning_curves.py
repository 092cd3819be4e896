"""Learning curves as a PNG."""

from pathlib import Path

from calm.report.canvas import new_figure


def plot_learning_curves(curves: dict[str, list[dict]], panels: list[tuple[str, str, str]], path: Path) -> None:
    """Draw one panel per entry of ``panels``.

    Args:
        curves: records (``metrics.jsonl``) of each run, by the run's name.
        panels: ``(run, key, title)`` of each panel.
        path: of the PNG.
    """
    figure = new_figure(4 * len(panels), 3)
    for axis, (run, key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        records = [record for record in curves.get(run, []) if key in record]
        axis.plot([record["step"] for record in records], [record[key] for record in records], linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
