"""Charts as pictures, by matplotlib; importing this module fails where it is not installed."""

from pathlib import Path

from matplotlib.axes import Axes

from hybridlm.evaluation.plots import new_figure

from .charts import COLOURS, MOST_MARKERS, Axis, Chart, HeatMap, LineChart, extent, short, ticks

_COLOURS = ("#1f6fb4", "#c4560c", "#2b7d3f", "#9a3a8f", "#8a6a00", "#b0223c", "#0f7c80", "#5b5f66")
_MARKERS = "os^D"


def save(chart: Chart, path: Path) -> None:
    """Draw a chart into a PNG file."""
    figure, _ = new_figure(*((7, 4.2) if isinstance(chart, LineChart) else _size(chart)))
    axes = figure.add_subplot()
    if isinstance(chart, LineChart):
        _lines(chart, axes)
    else:
        _heat(chart, axes)
    axes.set_title(_literal(chart.title), fontsize="medium", wrap=True)
    figure.savefig(path, dpi=120)


def _literal(text: str) -> str:
    """Without what matplotlib would read as a formula, or no font has."""
    return "".join(letter if letter.isprintable() else "�" for letter in text).replace("$", r"\$")


def _size(chart: HeatMap) -> tuple[float, float]:
    return 2.2 + 0.9 * len(chart.columns), 1.6 + 0.4 * len(chart.rows)


def _lines(chart: LineChart, axes: Axes) -> None:
    for index, series in enumerate(chart.drawn):
        dense = len(series.points) > MOST_MARKERS
        errors = [point.error or 0.0 for point in series.points]
        axes.errorbar(
            [point.x for point in series.points], [point.y for point in series.points],
            yerr=errors if any(errors) else None, label=_literal(series.name).lstrip("_") or "?",
            color=_COLOURS[index % COLOURS], marker=None if dense else _MARKERS[index % 4], markersize=4.5, capsize=2,
            markerfacecolor="white" if index >= COLOURS else None,
            linestyle="none" if not series.line else "-" if index < COLOURS else "--", linewidth=1.4,
        )  # fmt: skip
    for label, level in chart.rules:
        axes.axhline(level, color="black", linestyle=":", linewidth=1, label=_literal(label))
    for label, value in chart.marks:
        axes.axvline(value, color="gray", linestyle=":", linewidth=1, label=_literal(label))
    points = [point for series in chart.drawn for point in series.points]
    heights = [point.y for point in points] + [level for _, level in chart.rules]
    _scale(axes, "x", chart.x, [point.x for point in points])
    _scale(axes, "y", chart.y, heights)
    axes.grid(alpha=0.3)
    if len(chart.series) + len(chart.rules) + len(chart.marks) > 1:
        axes.legend(fontsize="small")


def _scale(axes: Axes, which: str, axis: Axis, values: list[float]) -> None:
    low, high = extent(axis, values)
    places = ticks(axis, low, high, values)
    if which == "x":
        found, set_scale, set_limits = axes.xaxis, axes.set_xscale, axes.set_xlim
    else:
        found, set_scale, set_limits = axes.yaxis, axes.set_yscale, axes.set_ylim
    if axis.log:
        set_scale("log", base=axis.log)
    found.set_ticks(places, [short(place) for place in places])
    found.set_ticks([], minor=True)
    found.set_label_text(_literal(axis.label))
    if axis.low is not None and axis.high is not None:
        air = 0.03 * (high - low)
        set_limits(low - air, high + air)


def _heat(chart: HeatMap, axes: Axes) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in chart.values]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, scores in enumerate(chart.values):
        for column, value in enumerate(scores):
            text, dark = ("–", False) if value is None else (f"{value:.2f}", value > 0.6)
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    names = [_literal(f"{name}\n{below}") for name, below in zip(chart.columns, chart.below, strict=True)]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(chart.rows)), [_literal(name) for name in chart.rows])
    axes.set(xlabel=_literal(chart.x), ylabel=_literal(chart.y))
