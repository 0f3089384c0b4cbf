"""What `hybridlm eval` found, drawn: needles by depth and length, curves over length and position."""

from collections.abc import Sequence
from statistics import fmean

from hybridlm.evaluation.tables import AT_CHANCE

from .blocks import Block, Grid, Section, read_score
from .charts import Axis, Chart, HeatMap, LineChart, Point, Series
from .evals import SUITES, Scored, bits_score, is_set, numbers_of


def sections(runs: Sequence[Scored]) -> list[Section]:
    """The sections of needles and curves, those that have something to show."""
    found = [
        Section("needles", "Needles by depth and length", _needles(runs)),
        Section("lengths", "Curves over length and position", _length_curves(runs)),
    ]
    return [section for section in found if section.blocks]


def _needles(runs: Sequence[Scored]) -> list[Block]:
    """One map a task and model, and one of all tasks before them."""
    blocks: list[Block] = []
    for run in runs:
        maps = [
            found
            for task in dict.fromkeys(task for task, _ in run.cells)
            if (found := _needle_map(run, task)) is not None
        ]
        if maps:
            blocks.append(Grid(run.name, maps))
    return blocks


def _needle_map(run: Scored, task: str) -> HeatMap | None:
    cells = {length: cell for (name, length), cell in sorted(run.cells.items()) if name == task and "by_depth" in cell}
    if not cells:
        return None
    groups: dict[int, dict[float, tuple[float, float]]] = {}
    for length, cell in cells.items():
        groups[length] = {
            entry["depth"].number(): (entry["score"].number(), entry["num"].number()) for entry in cell["by_depth"]
        }
    depths = sorted({depth for group in groups.values() for depth in group})
    values, notes = [], []
    for depth in depths:
        values.append([groups[length][depth][0] if depth in groups[length] else None for length in groups])
        notes.append([_needle_note(groups[length].get(depth), depth, length) for length in groups])
    below = []
    for cell in cells.values():
        score = read_score(cell["likelihood"])
        below.append(f"{score.value:.2f}" if score.above else AT_CHANCE)
    columns = [f"{length:,}{'*' if is_set(cell.get('beyond_training')) else ''}" for length, cell in cells.items()]
    rows = [f"{100 * depth:.0f} %" for depth in depths]
    names = sorted({cell.optional_text("haystack") or "" for cell in cells.values()} - {""})
    note = f"Haystack: {', '.join(names)}. Below: all depths." if names else "Below: all depths."
    return HeatMap(f"{task}, {run.name}", "tokens", "depth", columns, rows, values, notes, below, run.sources, note)


def _needle_note(found: tuple[float, float] | None, depth: float, length: int) -> str:
    place = f"depth {100 * depth:.0f} %, {length:,} tokens"
    if found is None:
        return f"{place}: no document"
    score, num = found
    return f"{place}: {score:.3f} over {num:.0f} document{'s' * (num != 1)}"


# -- curves --------------------------------------------------------------------------------------------------------


def _length_curves(runs: Sequence[Scored]) -> list[Block]:
    marks = _trained(runs)
    blocks: list[Block] = []
    by_window = [series for run in runs if (series := _by_window(run)).points]
    axis = Axis("bits per byte")
    if by_window:
        x = Axis("window (tokens)", log=2)
        blocks.append(
            LineChart("Bits per byte against length", x, axis, by_window, marks=marks, sources=numbers_of(runs),
                      note="Fewer is better; bars are standard errors over documents.")
        )  # fmt: skip
        positions = [chart for run in runs if (chart := _by_position(run)) is not None]
        blocks.append(Grid("Bits per byte against position in the window", positions))
    suites = dict.fromkeys(cell["suite"].text() for run in runs for cell in run.cells.values())
    charts = [chart for suite in suites if (chart := _suite_curve(runs, suite, marks)) is not None]
    if charts:
        blocks.append(Grid("Score against length", charts))
    return blocks


def _trained(runs: Sequence[Scored]) -> list[tuple[str, float]]:
    lengths = sorted({run.model.optional_number("trained_length") or 0 for run in runs} - {0})
    return [("trained length", length) for length in lengths]


def _by_window(run: Scored) -> Series:
    cells = {length: cell for (_, length), cell in sorted(run.cells.items()) if "bits_per_byte" in cell}
    return Series(run.name, [bits_score(cell).at(length) for length, cell in cells.items()])


def _by_position(run: Scored) -> Chart | None:
    series = []
    for (_, length), cell in sorted(run.cells.items()):
        if "by_position" in cell:
            points = []
            for bucket in cell["by_position"]:
                start, stop = bucket["start"].number(), bucket["stop"].number()
                # the middle of a bucket that doubles; + 1: positions begin at 0
                points.append(Point(round(((start + 1) * stop) ** 0.5, 1), bucket["bits_per_byte"].number()))
            series.append(Series(f"window of {length:,}", points))
    if not series:
        return None
    return LineChart(
        run.name, Axis("position in the window (tokens)", log=10), Axis("bits per byte"), series,
        marks=_trained([run]), sources=run.sources,
        note="Each point is a bucket of positions, drawn at its geometric middle.",
    )  # fmt: skip


def _suite_curve(runs: Sequence[Scored], suite: str, marks: list[tuple[str, float]]) -> Chart | None:
    """Mean over the tasks that every run scored at every length, so that points compare."""
    scored = [
        {key: cell for key, cell in run.cells.items() if cell["suite"].text() == suite and "likelihood" in cell}
        for run in runs
    ]
    with_any = [(run, cells) for run, cells in zip(runs, scored, strict=True) if cells]
    lengths = sorted({length for _, cells in with_any for _, length in cells})
    if len(lengths) < 2:
        return None
    tasks = [
        task
        for task in dict.fromkeys(task for _, cells in with_any for task, _ in cells)
        if all((task, length) in cells for _, cells in with_any for length in {length for _, length in cells})
    ]
    if not tasks:
        return None
    series, chances = [], []
    for run, cells in with_any:
        points = []
        for length in sorted({length for _, length in cells}):
            scores = [read_score(cells[task, length]["likelihood"]) for task in tasks]
            errors = [score.error for score in scores]
            error = None if None in errors else sum(e**2 for e in errors if e is not None) ** 0.5 / len(scores)
            points.append(Point(length, fmean(score.value for score in scores), error))
            chances.append(fmean(score.chance or 0.0 for score in scores))
        series.append(Series(run.name, points))
    said = f"Mean over the {len(tasks)} tasks that were scored at every length: {', '.join(tasks)}."
    return LineChart(
        SUITES.get(suite, suite), Axis("length (tokens)", log=2), Axis("score by likelihood", low=0.0, high=1.0),
        series, [("chance", fmean(chances))], marks, numbers_of([run for run, _ in with_any]), said,
    )  # fmt: skip
