"""What `hybridlm eval` found, of one or several models, side by side in tables."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from hybridlm.evaluation.tables import AT_CHANCE

from .blocks import NONE, Block, Cell, Score, Section, Table, count, distinct, read_score
from .charts import figure
from .node import Node
from .sources import Source

_WAYS = {"likelihood": "by likelihood", "generated": "generated"}
_ABOUT = {
    "likelihood": "Share of documents in which every token of the answer is the most likely one",
    "generated": "Score of greedily generated answers, under each task's metric",
}
_NOT_THE_MODEL = ("suite", "lengths", "beyond")  # settings that do not change what a cell is
_LEAST_CHANCE = 0.0001  # that is told as a number
SUITES = {"recall": "Recall", "ruler": "RULER's families", "babi": "Facts in filler", "length": "Bits per byte"}


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
    extras = [(run.model["hash"].text()[:8], f"seed {_seed(run)}", f"file {run.sources[0]}") for run in runs]
    for run, name in zip(runs, distinct([run.name for run in runs], extras), strict=True):
        run.name = name
    return runs


def _seed(run: Scored) -> str:
    return figure(run.settings.optional_number("seed") or 0)


def sections(runs: Sequence[Scored]) -> list[Section]:
    """The section of scores, if there are any."""
    blocks = _score_tables(runs)
    return [Section("scores", "Scores", blocks)] if blocks else []


def numbers_of(runs: Sequence[Scored]) -> list[int]:
    """Numbers of the files of some runs."""
    return sorted({number for run in runs for number in run.sources})


def _keys(runs: Sequence[Scored], way: str) -> list[tuple[str, int]]:
    """Task and length of what any run scored that way, in the order of the files."""
    keys = dict.fromkeys(key for run in runs for key, cell in run.cells.items() if way in cell)
    tasks = list(dict.fromkeys(task for task, _ in keys))
    return sorted(keys, key=lambda key: (tasks.index(key[0]), key[1]))


def _score_tables(runs: Sequence[Scored]) -> list[Block]:
    counts = _counts(runs)
    blocks: list[Block] = [counts] if counts is not None else []
    for way, words in _WAYS.items():
        keys = _keys(runs, way)
        if keys:
            rows = [_row(runs, key, way) for key in keys]
            blocks.append(
                Table(
                    f"Scores {words}", ["task", "length", "documents", "chance", "gold", *(run.name for run in runs)],
                    rows, numbers_of(runs), _note(runs, way),
                )
            )  # fmt: skip
    keys = _keys(runs, "bits_per_byte")
    if keys:
        blocks.append(_bits_table(runs, keys))
    unfit = [row for run in runs for row in _unfit(run)]
    if unfit:
        blocks.append(Table("What did not fit", ["model", "task", "length", "reason"], unfit, numbers_of(runs)))
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
    seeds = sorted({_seed(run) for run in runs})
    haystacks = sorted({cell.optional_text("haystack") or "" for run in runs for cell in run.cells.values()} - {""})
    found = (
        f"{_ABOUT[way]}, ± standard error over documents. Lengths in tokens of each model's tokenizer; seed "
        f"{', '.join(seeds)}. chance: what guessing among the candidates shown would score. gold: the right answer "
        f"through the same scorer. “{AT_CHANCE}”: not above chance by three standard errors. *: longer than the model "
        "was trained for."
    )
    return found + (f" Haystacks: {', '.join(haystacks)}." if haystacks else "")


def _length_text(runs: Sequence[Scored], key: tuple[str, int]) -> str:
    beyond = any(is_set(run.cells[key].get("beyond_training")) for run in runs if key in run.cells)
    return f"{key[1]:,}{'*' if beyond else ''}"


def is_set(node: Node | None) -> bool:
    """Whether a flag is there and true."""
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
        Cell(" / ".join(map(_small, chances)) or NONE, chances[0] if chances else None),
        Cell(f"{100 * gold:.0f} %", gold),
        *(Cell(NONE) if cell is None else next(shown).cell for cell in cells),
    ]


def _small(chance: float) -> str:
    return f"{chance:.2g}" if chance >= _LEAST_CHANCE or chance == 0 else f"< {_LEAST_CHANCE}"


def _counts(runs: Sequence[Scored]) -> Table | None:
    """How many tasks of a suite each model does better than a guesser."""
    groups = dict.fromkeys(
        (run.cells[key]["suite"].text(), key[1]) for run in runs for key in _keys([run], "likelihood")
    )
    if len(groups) < 2:
        return None
    rows = []
    for suite, length in groups:
        found = []
        for run in runs:
            cells = [
                cell
                for (_, tokens), cell in run.cells.items()
                if tokens == length and cell["suite"].text() == suite and "likelihood" in cell
            ]
            above = sum(read_score(cell["likelihood"]).above for cell in cells)
            found.append(Cell(f"{above} of {len(cells)}", above / len(cells)) if cells else Cell(NONE))
        rows.append([Cell(SUITES.get(suite, suite)), count(length), *found])
    note = "By likelihood; above by three standard errors."
    return Table("Tasks above chance", ["suite", "length", *(run.name for run in runs)], rows, numbers_of(runs), note)


def bits_score(cell: Node) -> Score:
    """Bits per byte of a cell; fewer are better."""
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
                *(Cell(NONE) if cell is None else bits_score(cell).cell for cell in scored),
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
    return Table("Bits per byte by window", titles, rows, numbers_of(runs), note)
