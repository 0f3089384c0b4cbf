"""What `hybridlm eval` found, of one or several models: compared in tables, needles by depth, curves by length."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from .blocks import AT_CHANCE, NONE, Block, Cell, Grid, Score, Section, Table, count, distinct, read_score
from .charts import Axis, Chart, HeatMap, LineChart, Point, Series, figure
from .node import Node
from .sources import Source

_WAYS = {"likelihood": "by likelihood", "generated": "generated"}
_ABOUT = {
    "likelihood": "Share of documents in which every token of the answer is the most likely one",
    "generated": "Score of greedily generated answers, under each task's metric",
}
_NOT_THE_MODEL = ("suite", "lengths", "beyond")  # settings that do not change what a cell is
_SUITES = {"recall": "Recall", "ruler": "RULER's families", "babi": "Facts in filler", "length": "Bits per byte"}


@dataclass
class Scored:
    """One model under one set of settings, from one or more files.

    Attributes:
        name: What it is called on the page.
        model: Facts about it.
        settings: What was run.
        cells: By task and length.
        sources: Numbers of the files.
    """

    name: str
    model: Node
    settings: Node
    cells: dict[tuple[str, int], Node] = field(default_factory=dict)
    sources: list[int] = field(default_factory=list)


def gather(sources: Sequence[Source]) -> list[Scored]:
    """The models of the files; those of one model with the same settings are put together."""
    found: dict[str, Scored] = {}
    for source in sources:
        model, settings = source.data["model"], source.data["settings"]
        same = {name: node.value for name, node in settings.items() if name not in _NOT_THE_MODEL}
        key = json.dumps([model.value, same, source.versions], sort_keys=True)
        run = found.setdefault(key, Scored(model["name"].text(), model, settings))
        run.sources.append(source.number)
        for cell in source.data["cells"]:
            run.cells.setdefault((cell["task"].text(), int(cell["length"].number())), cell)
    runs = list(found.values())
    extras = [
        (run.model["hash"].text()[:8], f"seed {figure(run.settings.optional_number('seed') or 0)}", _file(run))
        for run in runs
    ]
    for run, name in zip(runs, distinct([run.name for run in runs], extras), strict=True):
        run.name = name
    return runs


def _file(run: Scored) -> str:
    return f"file {run.sources[0]}"


def sections(runs: Sequence[Scored]) -> list[Section]:
    """The sections about scores, those that have something to show."""
    found = [
        Section("scores", "Scores", _score_tables(runs)),
        Section("needles", "Needles by depth and length", _needles(runs)),
        Section("lengths", "Curves over length and position", _length_curves(runs)),
    ]
    return [section for section in found if section.blocks]


def _sources(runs: Sequence[Scored]) -> list[int]:
    return sorted({number for run in runs for number in run.sources})


def _keys(runs: Sequence[Scored], way: str) -> list[tuple[str, int]]:
    """Task and length of what any run scored that way, in the order of the files."""
    keys = dict.fromkeys(key for run in runs for key, cell in run.cells.items() if way in cell)
    tasks = list(dict.fromkeys(task for task, _ in keys))
    return sorted(keys, key=lambda key: (tasks.index(key[0]), key[1]))


def _score_tables(runs: Sequence[Scored]) -> list[Block]:
    blocks: list[Block] = []
    for way, words in _WAYS.items():
        keys = _keys(runs, way)
        if keys:
            rows = [_row(runs, key, way) for key in keys]
            blocks.append(
                Table(
                    f"Scores {words}", ["task", "length", "documents", "chance", "gold", *(run.name for run in runs)],
                    rows, _sources(runs), _note(runs, way),
                )
            )  # fmt: skip
    keys = _keys(runs, "bits_per_byte")
    if keys:
        blocks.append(_bits_table(runs, keys))
    unfit = [_unfit(run) for run in runs if any(_status(cell) != "scored" for cell in run.cells.values())]
    if unfit:
        blocks.append(Table("What did not fit", ["model", "task", "length", "reason"], sum(unfit, []), _sources(runs)))
    return blocks


def _status(cell: Node) -> str:
    return cell["status"].text()


def _unfit(run: Scored) -> list[list[Cell]]:
    return [
        [Cell(run.name), Cell(task), count(length), Cell(cell.optional_text("reason") or _status(cell))]
        for (task, length), cell in run.cells.items()
        if _status(cell) != "scored"
    ]


def _note(runs: Sequence[Scored], way: str) -> str:
    seeds = sorted({figure(run.settings.optional_number("seed") or 0) for run in runs})
    haystacks = sorted({cell.optional_text("haystack") or "" for run in runs for cell in run.cells.values()} - {""})
    found = (
        f"{_ABOUT[way]}, ± standard error over documents. Lengths in tokens of each model's tokenizer; seed "
        f"{', '.join(seeds)}. chance: what guessing among the candidates shown would score. gold: the right answer "
        f"through the same scorer. “{AT_CHANCE}”: not above chance by three standard errors. *: longer than the model "
        "was trained for."
    )
    return found + (f" Haystacks: {', '.join(haystacks)}." if haystacks else "")


def _length_text(runs: Sequence[Scored], key: tuple[str, int]) -> str:
    beyond = any(_flag(run.cells[key].get("beyond_training")) for run in runs if key in run.cells)
    return f"{key[1]:,}{'*' if beyond else ''}"


def _flag(node: Node | None) -> bool:
    return node is not None and node.flag()


def _row(runs: Sequence[Scored], key: tuple[str, int], way: str) -> list[Cell]:
    cells = [run.cells[key] if key in run.cells and way in run.cells[key] else None for run in runs]
    there = [cell for cell in cells if cell is not None]
    scores = [read_score(cell[way]) for cell in there]
    chances = sorted({score.chance for score in scores if score.chance is not None})
    documents = sorted({int(cell[way].optional_number("num") or 0) for cell in there})
    gold = min(cell["gold"][way].number() for cell in there)
    shown = iter(scores)
    return [
        Cell(key[0]),
        Cell(_length_text(runs, key), key[1]),
        Cell(" / ".join(f"{number:,}" for number in documents), documents[0]),
        Cell(" / ".join(f"{chance:.2g}" for chance in chances) or NONE, chances[0] if chances else None),
        Cell(f"{100 * gold:.0f} %", gold),
        *(Cell(NONE) if cell is None else next(shown).cell for cell in cells),
    ]


def _bits(cell: Node) -> Score:
    return read_score(cell["bits_per_byte"], fewer=True)


def _bits_table(runs: Sequence[Scored], keys: list[tuple[str, int]]) -> Table:
    rows = []
    for key in keys:
        cells = [run.cells.get(key) for run in runs]
        scored = [cell if cell is not None and "bits_per_byte" in cell else None for cell in cells]
        there = [cell for cell in scored if cell is not None]
        chances = sorted({cell["bits_per_byte"]["chance"].number() for cell in there})
        gold = max(cell["gold"]["bits_per_byte"].number() for cell in there)
        sizes = sorted({int(cell["num_documents"].number()) for cell in there})
        rows.append(
            [
                Cell(_length_text(runs, key), key[1]),
                Cell(" / ".join(f"{size:,}" for size in sizes), sizes[0]),
                Cell(" / ".join(f"{chance:.2f}" for chance in chances), chances[0]),
                Cell(f"{gold:.1f}", gold),
                *(Cell(NONE) if cell is None else _bits(cell).cell for cell in scored),
            ]
        )
    texts = {cell.optional_text("source") or "" for run in runs for k, cell in run.cells.items() if k in keys}
    note = (
        f"Fewer is better. Text: {', '.join(sorted(texts - {''}))}, read in windows of that many tokens, the same "
        "bytes at every length; ± standard error over documents. chance: every token as likely as any other. gold: the "
        f"right tokens through the same scorer. “{AT_CHANCE}”: not below chance by three standard errors. "
        "*: longer than the model was trained for."
    )
    titles = ["window", "documents", "chance", "gold", *(run.name for run in runs)]
    return Table("Bits per byte by window", titles, rows, _sources(runs), note)


# -- needles -------------------------------------------------------------------------------------------------------


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
            blocks.append(Grid(run.name, list(maps)))
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
    columns = [f"{length:,}{'*' if _flag(cell.get('beyond_training')) else ''}" for length, cell in cells.items()]
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
            LineChart("Bits per byte against length", x, axis, by_window, marks=marks, sources=_sources(runs),
                      note="Fewer is better; bars are standard errors over documents.")
        )  # fmt: skip
        positions = [chart for run in runs if (chart := _by_position(run)) is not None]
        blocks.append(Grid("Bits per byte against position in the window", list(positions)))
    suites = dict.fromkeys(cell["suite"].text() for run in runs for cell in run.cells.values())
    charts = [chart for suite in suites if (chart := _suite_curve(runs, suite, marks)) is not None]
    if charts:
        blocks.append(Grid("Score against length", charts))
    return blocks


def _trained(runs: Sequence[Scored]) -> list[tuple[str, float]]:
    lengths = sorted({run.model.optional_number("trained_length") or 0 for run in runs} - {0})
    return [("trained length", length) for length in lengths]


def _by_window(run: Scored) -> Series:
    scores = {length: _bits(cell) for (_, length), cell in sorted(run.cells.items()) if "bits_per_byte" in cell}
    return Series(run.name, [Point(length, score.value, score.error) for length, score in scores.items()])


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
        _SUITES.get(suite, suite), Axis("length (tokens)", log=2), Axis("score by likelihood", low=0.0, high=1.0),
        series, [("chance", fmean(chances))], marks, _sources([run for run, _ in with_any]), said,
    )  # fmt: skip
