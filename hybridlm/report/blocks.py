"""What a page is made of: sections with sentences, tables and charts; and scores that say when they mean nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hybridlm.evaluation.chance import NUM_ERRORS
from hybridlm.evaluation.tables import AT_CHANCE

from .charts import Chart, Point
from .node import Node

NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        sort: What it is sorted by, where that is a number.
        dim: Whether it says nothing worth reading, such as a score at chance.
    """

    text: str
    sort: float | None = None
    dim: bool = False


@dataclass(frozen=True)
class Table:
    """A table that can be sorted.

    Attributes:
        caption: What it shows.
        titles: Of the columns.
        rows: As many cells as titles; the first names the row.
        sources: Numbers of the files that the figures come from.
        note: What a reader must know.
    """

    caption: str
    titles: list[str]
    rows: list[list[Cell]]
    sources: Sequence[int] = ()
    note: str = ""
    block: str = "table"

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [any(row[column].sort is not None for row in self.rows) for column in range(len(self.titles))]


@dataclass(frozen=True)
class Words:
    """Sentences; as a list where there are several."""

    sentences: list[str]
    tone: str = ""
    block: str = "words"


@dataclass(frozen=True)
class Listing:
    """Text that keeps its lines, folded away."""

    summary: str
    text: str
    block: str = "listing"


@dataclass(frozen=True)
class Grid:
    """Small charts side by side, under a heading of their own."""

    title: str
    charts: Sequence[Chart]
    block: str = "grid"


Block = Table | Words | Listing | Grid | Chart


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        slug: Its id.
        title: Its heading.
        blocks: What it shows.
    """

    slug: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """A mean with its standard error, beside what guessing gets.

    Attributes:
        value: Mean.
        error: Its standard error; `None` from a single document or seed.
        chance: What guessing gets.
        above: Whether it lies above chance by three standard errors.
    """

    value: float
    error: float | None
    chance: float | None
    above: bool

    @property
    def text(self) -> str:
        """`0.531 ± 0.031`, or the mean alone, with `at chance` around what is not above chance."""
        error = "" if self.error is None else f" ± {self.error:.3f}"
        text = f"{self.value:.3f}{error}"
        return text if self.above else f"{AT_CHANCE} ({text})"

    @property
    def cell(self) -> Cell:
        """The score in a table."""
        return Cell(self.text, self.value, dim=not self.above)

    def at(self, x: float) -> Point:
        """The score in a chart."""
        return Point(x, self.value, self.error)


def read_score(
    node: Node, value: str = "score", error: str = "error", chance: float | None = None, *, fewer: bool = False
) -> Score:
    """A score of a result file.

    What the file says of chance is held against its figures: a score that they do not show to be above is at chance.

    Args:
        node: The score.
        value: Name of the mean.
        error: Name of its standard error.
        chance: What guessing gets, where the score does not say it.
        fewer: Whether less is better, as of bits per byte.
    """
    mean, spread = node[value].number(), node.optional_number(error)
    guessed = node.optional_number("chance")
    guessed = chance if guessed is None else guessed
    said = node.get("above_chance")
    above = said.flag() if said is not None else True
    if guessed is not None:
        distance = guessed - mean if fewer else mean - guessed
        # 1e-6: figures are rounded
        above = above and distance + 1e-6 >= NUM_ERRORS * (spread or 0.0) and distance > 0
        above = above and (spread is not None or said is not None)
    return Score(mean, spread, guessed, above)


def read_accuracy(node: Node, chance: float | None = None) -> Score:
    """A mean over seeds, as races and comparisons write it."""
    return read_score(node, "mean", "standard_error", chance)


def plain(value: float | None, digits: int = 4) -> Cell:
    """A number without an error."""
    return Cell(NONE) if value is None else Cell(f"{value:,.{digits}f}".replace("-", "−"), value)


def count(value: float | None) -> Cell:
    """A whole number."""
    return Cell(NONE) if value is None else Cell(f"{value:,.0f}", value)


def distinct(names: Sequence[str], extras: Sequence[Sequence[str]]) -> list[str]:
    """Names made different where they are the same, by the first extras that tell them apart.

    Args:
        names: As results give them.
        extras: For each name what may be added, the plainest first.
    """
    found = list(names)
    for step in range(len(extras[0]) if extras else 0):
        again = [name for name in found if found.count(name) > 1]
        if not again:
            break
        added = [
            f"{name} ({extra[step]})" if name in again else name for name, extra in zip(found, extras, strict=True)
        ]
        if any(len({a for n, a in zip(found, added, strict=True) if n == name}) > 1 for name in again):
            found = added
    return found
