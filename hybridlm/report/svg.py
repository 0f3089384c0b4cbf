"""Charts as SVG inside the page: no style of their own but classes, a title for each point, text that is text.

The tree is built, not written, so that names from result files cannot break out of it. There are no style attributes,
which the page's content security policy forbids.
"""

import math
from xml.etree import ElementTree as ET

from .charts import (
    COLOURS,
    MOST_MARKERS,
    Axis,
    Chart,
    HeatMap,
    LineChart,
    Point,
    Series,
    extent,
    figure,
    short,
    ticks,
)

SHADES = 10  # classes h0 to h10
_WIDTH, _HEIGHT = 600, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 46
_CELL_WIDTH, _CELL_HEIGHT = 64, 28


def draw(chart: Chart, ident: str) -> str:
    """The chart as an `svg` element.

    Args:
        chart: What to draw.
        ident: For the ids inside; unique in the page.
    """
    root = _heat(chart, ident) if isinstance(chart, HeatMap) else _lines(chart, ident)
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def swatch(index: int, line: bool = True) -> str:
    """The mark of a series in the legend, with a piece of its line if it has one."""
    root = ET.Element("svg", {"class": "swatch", "viewBox": "0 0 28 12", "width": "28", "height": "12"})
    root.set("aria-hidden", "true")
    if line:
        _add(root, "line", f"line {_look(index)}", x1=1, y1=6, x2=27, y2=6)
    _marker(root, index, 14, 6)
    return ET.tostring(root, encoding="unicode")


def _root(chart: Chart, ident: str, width: float, height: float, kind: str) -> ET.Element:
    root = ET.Element("svg", {"class": f"chart {kind}", "role": "img", "viewBox": f"0 0 {width:g} {height:g}"})
    root.set("width", f"{width:g}")
    root.set("height", f"{height:g}")
    root.set("aria-labelledby", f"{ident}-title {ident}-text")
    ET.SubElement(root, "title", {"id": f"{ident}-title"}).text = chart.title
    ET.SubElement(root, "desc", {"id": f"{ident}-text"}).text = chart.alt
    return root


def _add(parent: ET.Element, tag: str, look: str, text: str | None = None, **attributes: float | str) -> ET.Element:
    found = ET.SubElement(parent, tag, {"class": look})
    for name, value in attributes.items():
        found.set(name.replace("_", "-"), value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip("."))
    if text is not None:
        found.text = text
    return found


def _look(index: int) -> str:
    """Classes s0 to s7 of the style sheet."""
    return f"s{index % COLOURS}" + (" again" if index >= COLOURS else "")


class _Scale:
    """From values to places."""

    def __init__(self, axis: Axis, values: list[float], start: float, stop: float) -> None:
        self.low, self.high = extent(axis, values)
        self.ticks = ticks(axis, self.low, self.high, values)
        self._log, self._start, self._stop = bool(axis.log), start, stop

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self._log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self._start + (value - low) / (high - low) * (self._stop - self._start)


def _lines(chart: LineChart, ident: str) -> ET.Element:
    root = _root(chart, ident, _WIDTH, _HEIGHT, "lines")
    points = [point for series in chart.drawn for point in series.points]
    across = [point.x for point in points]
    heights = [point.y for point in points] + [level for _, level in chart.rules]
    if not chart.y.log:
        heights += [point.y + sign * (point.error or 0.0) for point in points for sign in (-1, 1)]
    x = _Scale(chart.x, across, _LEFT, _WIDTH - _RIGHT)
    y = _Scale(chart.y, heights, _HEIGHT - _BOTTOM, _TOP)
    _axes(root, chart, x, y)
    for label, level in chart.rules:
        place = y(level)
        _add(root, "line", "rule", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=place, y2=place)
        _add(root, "text", "note end", label, x=_WIDTH - _RIGHT - 3, y=place - 4)
    for label, value in chart.marks:
        if x.low <= value <= x.high:
            _add(root, "line", "rule", x1=x(value), x2=x(value), y1=_TOP, y2=_HEIGHT - _BOTTOM)
            _add(root, "text", "note", label, x=x(value) + 4, y=_TOP + 10)
    for index, series in enumerate(chart.drawn):
        _curve(root, chart, series, index, x, y)
    return root


def _axes(root: ET.Element, chart: LineChart, x: _Scale, y: _Scale) -> None:
    bottom = _HEIGHT - _BOTTOM
    for tick in y.ticks:
        _add(root, "line", "grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(tick), y2=y(tick))
        _add(root, "text", "tick end", short(tick), x=_LEFT - 7, y=y(tick) + 4)
    for tick in x.ticks:
        _add(root, "line", "grid", x1=x(tick), x2=x(tick), y1=_TOP, y2=bottom)
        _add(root, "text", "tick middle", short(tick), x=x(tick), y=bottom + 17)
    _add(root, "path", "frame", d=f"M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}")
    _add(root, "text", "label middle", chart.x.label, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 8)
    middle = (_TOP + bottom) / 2
    _add(root, "text", "label middle", chart.y.label, x=14, y=middle, transform=f"rotate(-90 14 {middle:g})")


def _curve(root: ET.Element, chart: LineChart, series: Series, index: int, x: _Scale, y: _Scale) -> None:
    look = _look(index)
    group = _add(root, "g", look)
    if series.line and len(series.points) > 1:
        steps = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in series.points)
        _add(group, "polyline", f"line {look}", points=steps)
    dense = len(series.points) > MOST_MARKERS
    for point in series.points[:: -(-len(series.points) // MOST_MARKERS) or 1]:
        spot = _add(group, "g", "spot")
        ET.SubElement(spot, "title").text = _words(chart, series.name, point)
        left, top = x(point.x), y(point.y)
        if point.error and not dense and not chart.y.log:
            upper, lower = y(point.y + point.error), y(point.y - point.error)
            _add(spot, "path", f"error {look}", d=f"M{left:.1f} {upper:.1f}V{lower:.1f}")
        if not dense:
            _marker(spot, index, left, top)
        _add(spot, "circle", "hover", cx=left, cy=top, r=7)


def _words(chart: LineChart, name: str, point: Point) -> str:
    error = "" if point.error is None else f" ± {point.error:.2g}"
    return f"{name}: {chart.y.label} {figure(point.y)}{error} at {chart.x.label} {figure(point.x)}"


def _marker(parent: ET.Element, index: int, x: float, y: float) -> None:
    """Shapes differ too, so that colour is not all that tells series apart."""
    shape, look = index % 4, f"mark {_look(index)}"
    if shape == 0:
        _add(parent, "circle", look, cx=x, cy=y, r=3.6)
    elif shape == 1:
        _add(parent, "rect", look, x=x - 3.2, y=y - 3.2, width=6.4, height=6.4)
    elif shape == 2:
        _add(parent, "path", look, d=f"M{x:.1f} {y - 4.4:.1f}l4.2 7.6h-8.4z")
    else:
        _add(parent, "path", look, d=f"M{x:.1f} {y - 4.8:.1f}l4.8 4.8l-4.8 4.8l-4.8 -4.8z")


def _heat(chart: HeatMap, ident: str) -> ET.Element:
    left = 24 + 7.2 * max((len(name) for name in chart.rows), default=0)
    width = max(left + _CELL_WIDTH * len(chart.columns) + 8, 170)
    bottom = 8 + _CELL_HEIGHT * len(chart.rows)
    root = _root(chart, ident, width, bottom + 52, "cells")
    for row, name in enumerate(chart.rows):
        top = 8 + row * _CELL_HEIGHT
        _add(root, "text", "tick end", name, x=left - 7, y=top + 18)
        for column, value in enumerate(chart.values[row]):
            cell = _add(root, "g", "spot")
            ET.SubElement(cell, "title").text = chart.notes[row][column]
            place = left + column * _CELL_WIDTH
            shade = "none" if value is None else f"h{round(SHADES * min(max(value, 0.0), 1.0))}"
            _add(cell, "rect", f"cell {shade}", x=place, y=top, width=_CELL_WIDTH - 2, height=_CELL_HEIGHT - 2)
            text = "–" if value is None else f"{value:.2f}"
            _add(cell, "text", f"in {shade}", text, x=place + _CELL_WIDTH / 2 - 1, y=top + 17)
    for column, (name, below) in enumerate(zip(chart.columns, chart.below, strict=True)):
        place = left + (column + 0.5) * _CELL_WIDTH - 1
        _add(root, "text", "tick middle", name, x=place, y=bottom + 15)
        _add(root, "text", "note middle", below, x=place, y=bottom + 29)
    _add(root, "text", "label middle", chart.x, x=left + _CELL_WIDTH * len(chart.columns) / 2, y=bottom + 46)
    middle = (8 + bottom) / 2
    _add(root, "text", "label middle", chart.y, x=11, y=middle, transform=f"rotate(-90 11 {middle:g})")
    return root
