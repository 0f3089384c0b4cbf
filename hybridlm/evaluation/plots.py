"""Figures for results, where matplotlib is installed."""

from typing import Any

MARKERS = "os^vDP*Xdph"


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure in inches that draws into files, without a window; and matplotlib's tables of colours.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'hybridlm[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, colormaps
