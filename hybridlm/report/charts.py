"""What a chart shows, apart from how it is drawn: `svg` draws it for the page, `png` into a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

COLOURS = 8  # then they come again, dashed
MOST_MARKERS = 40  # of a curve
MOST_ROWS = 60  # of the numbers below a chart


@dataclass(frozen=True)
class Point:
    """A point of a curve, with its standard error where there is one."""

    x: float
    y: float
    error: float | None = None


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: In the legend.
        points: In the order of x.
        line: Whether points are joined.
    """

    name: str
    points: list[Point]
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: What it measures.
        log: 2 or 10 for a logarithmic one, 0 for a linear one.
        low: Where it begins at the latest.
        high: Where it ends at the earliest.
    """

    label: str
    log: int = 0
    low: float | None = None
    high: float | None = None


ACCURACY = Axis("accuracy", low=0.0, high=1.0)


@dataclass(frozen=True)
class LineChart:
    """Curves over one axis.

    Attributes:
        title: What is shown.
        x: Axis to the right.
        y: Axis upwards.
        series: The curves.
        rules: Level lines, by what they mean.
        marks: Upright lines, by what they mean.
        sources: Numbers of the files that the points come from.
        note: What a reader must know.
    """

    title: str
    x: Axis
    y: Axis
    series: list[Series]
    rules: list[tuple[str, float]] = field(default_factory=list)
    marks: list[tuple[str, float]] = field(default_factory=list)
    sources: Sequence[int] = ()
    note: str = ""
    block: str = "chart"

    @property
    def drawn(self) -> list[Series]:
        """The series without what has no place on a logarithmic axis."""
        fits = [
            [point for point in one.points if (not self.x.log or point.x > 0) and (not self.y.log or point.y > 0)]
            for one in self.series
        ]
        return [Series(one.name, points, one.line) for one, points in zip(self.series, fits, strict=True)]

    @property
    def alt(self) -> str:
        """The chart in words."""
        points = [point for series in self.series for point in series.points]
        if not points:
            return f"{self.title}: no data."
        count = f"{len(self.series)} curve{'s' * (len(self.series) != 1)}"
        if not any(series.line for series in self.series):
            count = f"{len(points)} point{'s' * (len(points) != 1)}"
        left, right = min(point.x for point in points), max(point.x for point in points)
        said = [f"{series.name} ends at {figure(series.points[-1].y)}" for series in self.series[:12] if series.points]
        return (
            f"{self.title}: {count}, {self.y.label} over {self.x.label} from {figure(left)} to {figure(right)}. "
            f"{'; '.join(said)}."
        )

    def numbers(self) -> tuple[list[str], list[list[str]], str]:
        """The points as a table: titles, rows, and what was left out."""
        places = sorted({point.x for series in self.series for point in series.points})
        step = -(-len(places) // MOST_ROWS) if places else 1
        kept = places[::step]
        if places and kept[-1] != places[-1]:
            kept.append(places[-1])
        found = [{point.x: point for point in series.points} for series in self.series]
        rows = [[figure(place), *(_value(points.get(place)) for points in found)] for place in kept]
        left_out = f"Every {step}th of {len(places)} places; the file has all." if step > 1 else ""
        return [self.x.label, *(series.name for series in self.series)], rows, left_out


@dataclass(frozen=True)
class HeatMap:
    """Scores in cells.

    Attributes:
        title: What is shown.
        x: What the columns are.
        y: What the rows are.
        columns: Their names.
        rows: Their names.
        values: `[rows][columns]`, 0 to 1; `None` where nothing was measured.
        notes: `[rows][columns]`, what stands behind a value.
        below: A line below each column.
        sources: Numbers of the files that the cells come from.
        note: What a reader must know.
    """

    title: str
    x: str
    y: str
    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]
    notes: list[list[str]]
    below: list[str]
    sources: Sequence[int] = ()
    note: str = ""
    block: str = "heat"

    @property
    def alt(self) -> str:
        """The chart in words."""
        means = "; ".join(f"{column}: {below}" for column, below in zip(self.columns, self.below, strict=True))
        return f"{self.title}: score for {len(self.rows)} of {self.y} by {self.x}. Over all of {self.y}: {means}."

    def numbers(self) -> tuple[list[str], list[list[str]], str]:
        """The cells as a table."""
        rows = [
            [name, *("–" if value is None else f"{value:.3f}" for value in values)]
            for name, values in zip(self.rows, self.values, strict=True)
        ]
        return [self.y, *self.columns], rows, ""


Chart = LineChart | HeatMap


def figure(value: float) -> str:
    """A number as short as it may be said."""
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if abs(value) >= 1e7:
        return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.4g}"


def short(value: float) -> str:
    """A number on an axis: 262144 is 262k."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    return figure(value)


def _value(point: Point | None) -> str:
    if point is None:
        return "–"
    return f"{point.y:.4g}" if point.error is None else f"{point.y:.4g} ± {point.error:.2g}"


def extent(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """Where an axis begins and ends: around the values, with some air where the axis has no end of its own."""
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if axis.log:
        low, high = math.log(low, axis.log), math.log(high, axis.log)
        air = 0.04 * (high - low) or 0.5
        return axis.log ** (low - air), axis.log ** (high + air)
    air = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    low = low - air if axis.low is None else min(axis.low, low)
    high = high + air if axis.high is None else max(axis.high, high)
    return low, high


def ticks(axis: Axis, low: float, high: float, values: Sequence[float]) -> list[float]:
    """Where an axis is labelled: at the values themselves if they are few on a logarithmic one."""
    different = sorted(set(values))
    if axis.log == 2 and len(different) <= 8:
        found: list[float] = []
        for value in different:  # labels need room
            if not found or math.log(value / found[-1]) > 0.07 * math.log(high / low):
                found.append(value)
        return found
    if axis.log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            places = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            found = [place for place in places if low <= place <= high]
            if len(found) >= 3:
                return found
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(by for by in (1, 2, 2.5, 5, 10) if (high - low) / (by * step) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]
