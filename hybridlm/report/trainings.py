"""What training runs recorded: losses, held-out text, routers, and which tokens went through which layers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import NONE, Block, Cell, Grid, Section, Table, count, distinct, plain
from .charts import Axis, LineChart, Point, Series
from .node import Node
from .sources import Source

_ROUTERS = {
    "expert_max_load": "Load of the busiest expert over the mean load",
    "router_entropy": "Entropy of the routers, of the largest possible",
    "dead_experts": "Dead experts",
}
_DEPTHS = {
    "share": "Share of the tokens that entered, of those that came",
    "token_share": "Share of all tokens that reached the layer",
}
_LAYER = re.compile(r"^layer_(\d+)$")
_SPAN = re.compile(r"^span_(\d+)_(.+?)_(layers?_\d+(?:_to_\d+)?)$")


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    source: Source


def gather(sources: Sequence[Source]) -> list[Run]:
    """The runs under names that differ."""
    names = [source.data.optional_text("name") or source.name for source in sources]
    names = distinct(names, [(f"file {source.number}",) for source in sources])
    return [Run(name, source) for name, source in zip(names, sources, strict=True)]


def sections(runs: Sequence[Run]) -> list[Section]:
    """Training, and what was routed."""
    found = [Section("training", "Training", _training(runs)), Section("routing", "Routers and depth", _routing(runs))]
    return [section for section in found if section.blocks]


def _training(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    ended = [run for run in runs if "training" in run.source.data]
    if ended:
        blocks += [_facts(ended)]
    blocks += _losses(runs)
    heldout = _heldout(ended)
    return [*blocks, heldout] if heldout is not None else blocks


def _facts(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        data, training = run.source.data, run.source.data["training"]
        rows.append(
            [
                Cell(run.name),
                count(data["parameters"].number()),
                count(data.optional_number("expected_active_parameters")),
                count(training["steps"].number()),
                count(data["tokens_seen"].number()),
                Cell(data["data"]["path"].text()),
                plain(training.optional_number("learning_rate"), 5),
                count(training.optional_number("seed")),
                Cell(f"{training['seconds'].number():,.0f} s", training["seconds"].number()),
                Cell(training.optional_text("device") or NONE),
            ]
        )
    titles = [
        "run",
        "parameters",
        "active (expected)",
        "steps",
        "tokens",
        "data",
        "learning rate",
        "seed",
        "time",
        "on",
    ]
    return Table("Runs", titles, rows, [run.source.number for run in runs])


def _losses(runs: Sequence[Run]) -> list[Block]:
    """Training and held-out loss; bits per byte where every run has them."""
    logged = [run for run in runs if any("loss" in record for record in run.source.records)]
    if not logged:
        return []
    bits = all("bits_per_byte" in record for run in logged for record in run.source.records if "loss" in record)
    key, label = ("bits_per_byte", "bits per byte") if bits else ("loss", "loss")
    series = []
    for run in logged:
        series.append(Series(run.name, _points(run.source.records, key)))
        if heldout := _points(run.source.records, f"eval_{key}"):
            series.append(Series(f"{run.name}, held out", heldout))
    series = [one for one in series if one.points]
    if not series:
        return []
    log = 10 if all(point.y > 0 for one in series for point in one.points) else 0
    note = "Both axes begin where the curves do; upwards is logarithmic." if log else ""
    numbers = [run.source.number for run in logged]
    return [LineChart("Loss in training", Axis("step"), Axis(label, log=log), series, sources=numbers, note=note)]


def _points(records: Sequence[Node], key: str) -> list[Point]:
    found = {}
    for record in records:
        value, step = record.optional_number(key), record.optional_number("step")
        if value is not None and step is not None:
            found[step] = value  # a resumed run may log a step again
    return [Point(step, value) for step, value in sorted(found.items())]


def _heldout(runs: Sequence[Run]) -> Table | None:
    rows = []
    for run in runs:
        for score in run.source.data.each("heldout"):
            rows.append(
                [
                    Cell(run.name),
                    count(score["length"].number()),
                    plain(score["bits_per_byte"].number()),
                    count(score["num_documents"].number()),
                    count(score["num_bytes"].number()),
                ]
            )
        for ngram in run.source.data.each("ngrams"):
            name = f"order-{ngram['order'].number():.0f} byte model on what {run.name} saw"
            rows.append([Cell(name), Cell(NONE), plain(ngram["bits_per_byte"].number()), Cell(NONE), Cell(NONE)])
    if not rows:
        return None
    titles = ["run", "window (tokens)", "bits per byte", "documents", "bytes"]
    note = "Fewer is better. One number over all held-out bytes: it has no standard error."
    return Table("Held-out bits per byte", titles, rows, [run.source.number for run in runs], note)


# -- routers and spans ---------------------------------------------------------------------------------------------


def _routing(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    rows: list[list[Cell]] = []
    routed = []
    for run in runs:
        labels = _labels(run.source.records)
        if not labels:
            continue
        routed.append(run)
        charts = [
            chart
            for key, title in (_ROUTERS | _DEPTHS).items()
            if (chart := _chart(run, labels, key, title)) is not None
        ]
        blocks.append(Grid(run.name, charts))
        rows += [_last(run, label) for label in labels]
    if rows:
        titles = [
            "run", "where", "busiest expert", "entropy", "dead experts", "share entered", "share wished",
            "share in 95 % of rows", "share of all tokens", "threshold bias",
        ]  # fmt: skip
        note = (
            "The last record of each run. busiest expert: its load over the mean load, 1 is balance. entropy: as a "
            "fraction of the largest possible. dead: less than a hundredth of the mean load."
        )
        blocks.insert(0, Table("At the end of training", titles, rows, [run.source.number for run in routed], note))
    return blocks


def _labels(records: Sequence[Node]) -> list[str]:
    """Layers and spans that the records speak of, by depth."""
    known = {*_ROUTERS, *_DEPTHS}
    found = {
        label
        for record in records
        for key, _ in record.items()
        for label, _, figure in [key.rpartition("/")]
        if label and figure in known
    }
    return sorted(found, key=_order)


def _order(label: str) -> tuple[int, int, str]:
    layer, span = _LAYER.match(label), _SPAN.match(label)
    if layer:
        return 0, int(layer[1]), label
    return (1, int(span[1]), label) if span else (2, 0, label)


def _words(label: str) -> str:
    """`span_2_mixture_of_depths_layer_3` as a reader says it."""
    span = _SPAN.match(label)
    return f"{span[2]}, {span[3]}".replace("_", " ") if span else label.replace("_", " ")


def _chart(run: Run, labels: Sequence[str], key: str, title: str) -> LineChart | None:
    series = [
        Series(_words(label), points) for label in labels if (points := _points(run.source.records, f"{label}/{key}"))
    ]
    if not series:
        return None
    high = None if key == "expert_max_load" else 1.0
    whole = Axis(key.replace("_", " "), low=0.0, high=high)
    rules = [("balance", 1.0)] if key == "expert_max_load" else []
    return LineChart(f"{title}, {run.name}", Axis("step"), whole, series, rules, sources=[run.source.number])


def _last(run: Run, label: str) -> list[Cell]:
    keys = (
        "expert_max_load", "router_entropy", "dead_experts", "share", "wished_share", "row_share_p95", "token_share",
        "threshold_bias",
    )  # fmt: skip
    cells = []
    for key in keys:
        points = _points(run.source.records, f"{label}/{key}")
        value = points[-1].y if points else None
        cells.append(count(value) if key == "dead_experts" else plain(value, 3))
    return [Cell(run.name), Cell(_words(label)), *cells]
