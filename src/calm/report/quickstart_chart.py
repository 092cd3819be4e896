"""Charts of a quickstart as SVG text: scores against backbone steps per token, and learning curves.

An SVG follows the colour scheme of the page or viewer that shows it. It needs no font, script or file beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 14, 44
_LABEL_HEIGHT = 15
_DODGE = 9  # pixels between points at the same place of the x axis
_SHAPES = ("circle", "diamond", "square", "triangle")
NUM_COLOURS = 3  # then grey
_LIGHT = ("#2a78d6", "#1baf7a", "#c2521d")
_DARK = ("#5598e7", "#3cc694", "#ec835a")
_MAX_POINTS = 300  # of a learning curve


@dataclass
class ScorePoint:
    """One model in the chart of scores.

    Attributes:
        label: name beside the point.
        x: backbone steps per token.
        y: BrierLM.
        error: standard error of BrierLM, if it is known.
        colour: number of the colour; NUM_COLOURS or more is grey.
    """

    label: str
    x: float
    y: float
    error: float | None
    colour: int


def scores_chart(points: Sequence[ScorePoint]) -> str:
    """Return the chart of BrierLM (higher is better) against backbone steps per token (fewer are faster)."""
    top = max(point.y + (point.error or 0) for point in points)
    ticks = _ticks(max(top, 0.1))
    x_ticks = sorted({0.0, 1.0, *(point.x for point in points)})
    plot = _Axes((-0.15, 1.06), (0.0, max(ticks[-1], top)))
    parts = [plot.frame(x_ticks, ticks, "backbone steps per generated token", "BrierLM (100 is best)")]
    at_the_same_x: dict[float, int] = {}
    labels: list[_Label] = []
    for point in points:
        number = at_the_same_x.setdefault(point.x, 0)
        at_the_same_x[point.x] += 1
        x, y = plot.x(point.x) + number * _DODGE, plot.y(point.y)
        colour = f"c{min(point.colour, NUM_COLOURS)}"
        value = f"{point.y:z.2f}" + ("" if point.error is None else f" ± {point.error:.2f}")
        title = f"<title>{escape(point.label)}: BrierLM {value}, {point.x:g} steps per token</title>"
        bar = ""
        if point.error:
            low, high = plot.y(max(0.0, point.y - point.error)), plot.y(point.y + point.error)
            bar = f'<path class="bar" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
        shape = _shape(_SHAPES[min(point.colour, len(_SHAPES) - 1)], x, y)
        parts.append(f'<g class="{colour}">{title}{bar}{shape}</g>')
        labels.append(_Label(f"{point.label} {point.y:z.2f}", x, y, on_the_left=point.x > 0.4, column=point.x))
    parts += _place_labels(labels)
    return _svg(parts, "BrierLM against backbone steps per generated token")


def curves_chart(title: str, points: Sequence[tuple[float, float]], colour: int) -> str:
    """Return one learning curve, ``(step, value)`` per point; a shorter chart where there is nothing to draw."""
    stride = max(1, len(points) // _MAX_POINTS)
    shown = [*points[:-1:stride], *points[-1:]]
    values = [value for _, value in shown] or [0.0]
    last_step = max((step for step, _ in shown), default=1.0)
    ticks = _ticks(max(*values, 0.1))
    plot = _Axes((0.0, last_step), (0.0, max(ticks[-1], *values)))
    x_ticks = [tick for tick in _ticks(last_step) if tick <= last_step]
    path = " ".join(f"{plot.x(step):.1f},{plot.y(value):.1f}" for step, value in shown)
    line = f'<g class="c{min(colour, NUM_COLOURS)}"><polyline class="line" points="{path}"/></g>'
    return _svg([plot.frame(x_ticks, ticks, "step", title), line], title)


@dataclass
class _Axes:
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM - _LABEL_HEIGHT)

    def frame(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_title: str, y_title: str) -> str:
        """Return grid, ticks and titles."""
        parts = [f'<text class="title" x="4" y="{_TOP}">{escape(y_title)}</text>']
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tick in x_ticks:
            parts.append(
                f'<text x="{self.x(tick):.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick:,g}</text>'
            )
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(f'<text class="title" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
        return "".join(parts)


@dataclass
class _Label:
    text: str
    x: float
    y: float
    on_the_left: bool
    column: float


def _place_labels(labels: Sequence[_Label]) -> list[str]:
    """Return labels beside their points; those of one place on the x axis are moved apart."""
    parts = []
    for column in sorted({label.column for label in labels}):
        below = float("inf")
        # From the lowest one upwards.
        for label in sorted((label for label in labels if label.column == column), key=lambda label: -label.y):
            y = min(label.y + 4, below - _LABEL_HEIGHT)
            below = y
            # Beside all points of its place, so that a label covers none.
            points = [other.x for other in labels if other.column == column]
            x, anchor = (min(points) - 9, "end") if label.on_the_left else (max(points) + 9, "start")
            parts.append(
                f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(label.text)}</text>'
            )
    return parts


def _shape(name: str, x: float, y: float) -> str:
    if name == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    if name == "square":
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>'
    if name == "diamond":
        return f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z"/>'
    return f'<path d="M{x:.1f} {y - 6:.1f}l5.5 10h-11z"/>'


def _ticks(top: float) -> list[float]:
    """Return five to seven round numbers from 0 to at least ``top``."""
    rough = top / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(step * number, 10) for number in range(math.ceil(top / step - 1e-9) + 1)]


def _svg(parts: Sequence[str], title: str) -> str:
    colours = "".join(f".c{number}{{color:{colour}}}" for number, colour in enumerate(_LIGHT))
    dark = "".join(f".c{number}{{color:{colour}}}" for number, colour in enumerate(_DARK))
    style = (
        "svg.chart text{font:12px system-ui,sans-serif;fill:#52514e}"
        "svg.chart text.label{fill:#0b0b0b;font-weight:600}"
        "svg.chart .grid{stroke:#e1e0d9;stroke-width:1}"
        "svg.chart g{fill:currentColor;stroke:none}"
        "svg.chart .bar{stroke:currentColor;stroke-width:2;opacity:.55}"
        "svg.chart .line{fill:none;stroke:currentColor;stroke-width:2}"
        f"svg.chart .c{NUM_COLOURS}{{color:#898781}}{colours}"
        f"@media(prefers-color-scheme:dark){{svg.chart text{{fill:#c3c2b7}}svg.chart text.label{{fill:#fff}}"
        f"svg.chart .grid{{stroke:#2c2c2a}}{dark}}}"
    )
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{style}</style>{"".join(parts)}</svg>'
    )
