"""What every plot is drawn on."""

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """A figure without pyplot, in inches: no window system is asked for, no state is shared with the caller."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
