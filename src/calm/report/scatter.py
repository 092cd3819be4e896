"""Lines of measured points as a PNG: one panel or several, one line per model or family."""

from dataclasses import dataclass
from pathlib import Path

from calm.report.canvas import new_figure

_COLOURS, _MARKERS = 10, "osD^"  # matplotlib's colours come again after so many lines: then another marker


@dataclass
class Panel:
    """A plot of ``lines``: by name, the points (x, y, label) of each."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float, str]]]
    log_x: bool = False


def plot_panels(panels: list[Panel], path: Path) -> None:
    """Draw panels side by side and write the PNG."""
    figure = new_figure(5.5 * len(panels) + 2, 4)
    drawn = {}
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (name, points) in enumerate(panel.lines.items()):
            marker = _MARKERS[number // _COLOURS % len(_MARKERS)]
            (drawn[name],) = axis.plot(
                [x for x, _, _ in points], [y for _, y, _ in points], marker=marker, markersize=5, linewidth=1
            )
            for x, y, label in points:
                axis.annotate(label, (x, y), textcoords="offset points", xytext=(4, -9), fontsize=7)
        if panel.log_x:
            axis.set_xscale("log")
            axis.tick_params(axis="x", which="minor", labelsize=6)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.x)
        axis.set_ylabel(panel.y)
        axis.grid(alpha=0.3)
    # Beside the panels: over them it would hide points.
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def temperature_panels(results: dict[str, list[dict]]) -> list[Panel]:
    """Accuracy against collision, of every model at its temperatures: how right against how repetitive.

    Two models are compared where their collisions are equal, whatever temperatures give that.

    Args:
        results: of each model, what :meth:`BrierResult.to_dict` gives at several temperatures.
    """
    panels = []
    for n in (1, 4):
        lines = {
            name: [
                (result["collision"][n - 1], result["accuracy"][n - 1], f"T = {result['temperature']:g}")
                for result in sorted(several, key=lambda result: -result["temperature"])
            ]
            for name, several in results.items()
        }
        title = f"first {n} tokens" if n > 1 else "next token"
        panels.append(Panel(title, "collision x 100", "accuracy x 100", lines))
    return panels
