"""What the repository's own comparisons found: equal FLOPs (`eval/isoflop.py`) and memories (`eval/memory.py`)."""

from collections.abc import Sequence
from statistics import fmean

from .blocks import NONE, Block, Cell, Grid, Section, Table, Words, count, plain, read_accuracy
from .charts import ACCURACY, Axis, LineChart, Point, Series
from .node import Node
from .sources import Source

_READINGS = {"equal_flops": "equal FLOPs", "equal_half_flops": "half the FLOPs", "equal_steps": "equal steps"}
_HOLDS = {True: "holds", False: "does not hold"}


def sections(sources: Sequence[Source]) -> list[Section]:
    """One section a comparison."""
    makers = {"isoflop": ("Equal FLOPs", _isoflop), "memory": ("Memories", _memory)}
    found = []
    for source in sources:
        title, make = makers[source.kind]
        found.append(Section(f"{source.kind}-{source.number}", f"{title} ({source.name})", make(source)))
    return found


# -- equal FLOPs ---------------------------------------------------------------------------------------------------


def _isoflop(source: Source) -> list[Block]:
    data, numbers = source.data, [source.number]
    rows = []
    for name, arm in data["arms"].items():
        scores = [arm.get(key) for key in _READINGS]
        rows.append(
            [
                Cell(name),
                Cell(arm.optional_text("about") or ""),
                count(arm["parameters"].number()),
                count(arm["flops_per_token"].number()),
                *(Cell(NONE) if score is None else read_accuracy(score).cell for score in scores),
            ]
        )
    titles = ["arm", "about", "parameters", "FLOPs / token", *_READINGS.values()]
    note = "Held-out bits per byte: fewer is better; ± standard error over seeds."
    blocks: list[Block] = [Table("Arms", titles, rows, numbers, note)]
    curve = _isoflop_curve(source)
    blocks += [curve] if curve is not None else []
    if "claims" in data:
        rows = [
            [
                Cell(claim["claim"].text()),
                Cell(_READINGS.get(read_at := claim.optional_text("read_at") or NONE, read_at)),
                plain(claim.optional_number("gain"), 3),
                plain(claim.optional_number("standard_error"), 3),
                Cell(claim["verdict"].text()),
            ]
            for claim in data["claims"]
        ]
        titles = ["claim", "read at", "gain (bits per byte)", "standard error", "verdict"]
        blocks.append(Table("Claims", titles, rows, numbers, data.optional_text("verdicts") or ""))
    return blocks


def _isoflop_curve(source: Source) -> LineChart | None:
    """Means over the seeds of an arm, which were read at the same steps."""
    by_arm: dict[str, list[list[tuple[float, float]]]] = {}
    for run in source.data.each("runs"):
        points = [(entry["flops"].number(), entry["heldout"].number()) for entry in run["curve"]]
        by_arm.setdefault(run["arm"].text(), []).append([point for point in points if point[0] > 0])
    series = []
    for name, curves in by_arm.items():
        steps = zip(*curves, strict=False)
        points = [Point(fmean(x for x, _ in step), fmean(y for _, y in step)) for step in steps]
        if points:
            series.append(Series(name, points))
    if not series:
        return None
    title = "Held-out bits per byte against FLOPs"
    return LineChart(title, Axis("FLOPs", log=10), Axis("bits per byte"), series, sources=[source.number],
                     note="Means over seeds; fewer is better.")  # fmt: skip


# -- memories ------------------------------------------------------------------------------------------------------


def _memory(source: Source) -> list[Block]:
    data = source.data
    chance = data["chance"].number()
    arms = dict(data["arms"].items())
    tasks = list(dict.fromkeys(task for arm in arms.values() for task, _ in arm["scores"].items()))
    blocks: list[Block] = []
    bounds = [
        f"{bound['bound'].text()}: {bound['value'].number():.3f}, {_HOLDS[bound['holds'].flag()]}."
        for bound in data.each("bounds")
    ]
    if bounds:
        blocks.append(Words(bounds))
    charts = [_memory_curve(source, arms, task, chance) for task in tasks]
    charts += [_memory_state(source, arms, task, chance) for task in tasks]
    blocks.append(Grid("Accuracy against length and state bytes", charts))
    return blocks + [_memory_table(source, arms, task, chance) for task in tasks]


def _memory_curve(source: Source, arms: dict[str, Node], task: str, chance: float) -> LineChart:
    series = []
    for name, arm in arms.items():
        points = [read_accuracy(node, chance).at(length) for length, node in arm.by_number("scores", task)]
        series.append(Series(name, points))
    return LineChart(f"{task}: accuracy against length", Axis("length (tokens)", log=2), ACCURACY,
                     [one for one in series if one.points], [("chance", chance)], sources=[source.number])  # fmt: skip


def _memory_state(source: Source, arms: dict[str, Node], task: str, chance: float) -> LineChart:
    """At the shortest length, which is the trained one."""
    series, shortest = [], 0.0
    for name, arm in arms.items():
        scores = arm.by_number("scores", task)
        if scores:
            shortest, node = scores[0]
            point = read_accuracy(node, chance).at(arm["state_bytes"].number())
            series.append(Series(name, [point], line=False))
    return LineChart(f"{task}: accuracy against state bytes", Axis("state bytes of a row", log=2), ACCURACY, series,
                     [("chance", chance)], sources=[source.number], note=f"At {shortest:,.0f} tokens.")  # fmt: skip


def _memory_table(source: Source, arms: dict[str, Node], task: str, chance: float) -> Table:
    lengths = sorted({length for arm in arms.values() for length, _ in arm.by_number("scores", task)})
    rows = []
    for name, arm in arms.items():
        scores = dict(arm.by_number("scores", task))
        cells = [read_accuracy(scores[length], chance).cell if length in scores else Cell(NONE) for length in lengths]
        about = Cell(arm.optional_text("about") or "")
        rows.append([Cell(name), about, count(arm["parameters"].number()), count(arm["state_bytes"].number()), *cells])
    titles = ["arm", "about", "parameters", "state bytes", *(f"{length:,.0f} tokens" for length in lengths)]
    note = f"Accuracy, ± standard error over seeds; chance is {chance:.4g}."
    return Table(f"{task}: accuracy by length", titles, rows, [source.number], note)
