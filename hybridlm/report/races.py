"""What `hybridlm race` found: every arm's accuracy against its state, the length, and the steps of training."""

import json
from collections.abc import Sequence

from .blocks import NONE, Block, Cell, Grid, Listing, Section, Table, Words, count, distinct, read_accuracy
from .charts import ACCURACY, Axis, Chart, LineChart, Point, Series, figure
from .node import Node
from .sources import Source

_MATCHED = {"parameters": "equal parameters", "state_bytes": "equal state bytes", "flops": "equal FLOPs"}


def sections(sources: Sequence[Source]) -> list[Section]:
    """One section a race."""
    titles = [source.data.optional_text("title") or source.data["name"].text() for source in sources]
    titles = distinct(titles, [(f"file {source.number}",) for source in sources])
    return [
        Section(f"race-{source.number}", f"Race: {title}", _blocks(source))
        for source, title in zip(sources, titles, strict=True)
    ]


def _blocks(source: Source) -> list[Block]:
    race = source.data
    chance = race["chance"].number()
    arms = dict(race["arms"].items())
    if not arms:
        raise race.wrong("arms: there is none")
    blocks: list[Block] = [Words(_about(race, chance)), _ordering(race)]
    blocks.append(_table(source, arms, chance))
    summary = [sentence.text() for sentence in race.each("summary")]
    blocks += [Listing("What the race says", "\n".join(summary))] if summary else []
    charts = [_steps(source, arms, chance), _state(source, arms, chance), _lengths(source, arms, chance)]
    blocks.append(Grid("Accuracy against steps, state and length", [chart for chart in charts if chart is not None]))
    lengths = _length_table(source, arms, chance)
    if lengths is not None:
        blocks.append(lengths)
    recipe = race.get("recipe")
    if recipe is not None:
        blocks.append(Listing("The full recipe", json.dumps(recipe.value, indent=1, ensure_ascii=False)))
    return blocks


def _about(race: Node, chance: float) -> list[str]:
    matched = race.optional_text("matched")
    at = f"at {_MATCHED.get(matched, matched)}" if matched else "not matched in size"
    task = race["task"]
    return [
        f"Task {task['task'].text()}, rows of {figure(task['length'].number())} tokens; arms {at}; chance is "
        f"{chance:.4g}. Accuracies are means over seeds, ± standard error. How many steps an arm takes is speed of "
        "learning under this recipe, not capacity."
    ]


def _ordering(race: Node) -> Words:
    ordering = race.get("ordering")
    if ordering is None:
        return Words(["The race makes no claim about an ordering."])
    if isinstance(ordering.value, dict) and ordering.value.get("shows", "") is None:
        why, claim = ordering["why"].text(), ordering["claim"].text()
        return Words([f"No verdict on the expected ordering, {why}: {claim}"])
    shows = ordering["shows"].flag()
    verdict = "The expected ordering shows" if shows else "The expected ordering does not show"
    return Words([f"{verdict}: {ordering['claim'].text()} {ordering['why'].text()}"], "good" if shows else "bad")


def _table(source: Source, arms: dict[str, Node], chance: float) -> Table:
    steps = sorted({step for arm in arms.values() for step, _ in arm["at"].by_number()})
    threshold = next((arm["steps_to"]["threshold"].number() for arm in arms.values() if "steps_to" in arm), None)
    to = [] if threshold is None else [f"steps to {threshold:g}"]
    rows = []
    for name, arm in arms.items():
        scores = dict(arm["at"].by_number())
        rows.append(
            [
                Cell(name),
                Cell(arm.optional_text("about") or ""),
                *(count(arm.optional_number(key)) for key in ("parameters", "state_bytes", "flops_per_token")),
                count(len(list(arm["seeds"]))),
                *(read_accuracy(scores[step], chance).cell if step in scores else Cell(NONE) for step in steps),
                *([_steps_to(arm)] if to else []),
            ]
        )
    titles = ["arm", "about", "parameters", "state bytes", "FLOPs / token", "seeds"]
    note = f"Chance is {chance:.4g}." + (" Steps by seed; –: not reached." if to else "")
    own = [
        f"{name} at its step {score['own_step'].number():,.0f} for {step:,.0f}"
        for name, arm in arms.items()
        for step, score in arm["at"].by_number()
        if "own_step" in score
    ]
    note += f" Arms that do not take as many steps are read at their own: {', '.join(own)}." if own else ""
    accuracy = [f"at step {step:,.0f}" for step in steps]
    return Table("Arms and accuracy", [*titles, *accuracy, *to], rows, [source.number], note)


def _steps_to(arm: Node) -> Cell:
    """Steps of each seed; sorted by the slowest, and after all others where a seed did not get there."""
    seeds = arm.each("steps_to", "seeds")
    text = ", ".join(NONE if seed.value is None else f"{seed.number():,.0f}" for seed in seeds)
    reached = [seed.number() for seed in seeds if seed.value is not None]
    return Cell(text or NONE, max(reached) if seeds and len(reached) == len(seeds) else None)


def _steps(source: Source, arms: dict[str, Node], chance: float) -> Chart | None:
    series = []
    for name, arm in arms.items():
        points = [Point(entry[0].number(), entry[1].number(), entry.optional_number(2)) for entry in arm.each("curve")]
        if points:
            series.append(Series(name, points))
    if not series:
        return None
    return LineChart("Accuracy against steps", Axis("step", low=0.0), ACCURACY, series, [("chance", chance)],
                     sources=[source.number])  # fmt: skip


def _state(source: Source, arms: dict[str, Node], chance: float) -> Chart | None:
    """Where each arm was read last."""
    series, read = [], 0.0
    for name, arm in arms.items():
        at, size = arm["at"].by_number(), arm.optional_number("state_bytes")
        if at and size and size > 0:
            read, node = at[-1]
            series.append(Series(name, [read_accuracy(node, chance).at(size)], line=False))
    if not series:
        return None
    return LineChart("Accuracy against state bytes", Axis("state bytes of a row", log=2), ACCURACY, series,
                     [("chance", chance)], sources=[source.number], note=f"At step {read:,.0f}.")  # fmt: skip


def _lengths(source: Source, arms: dict[str, Node], chance: float) -> Chart | None:
    series = []
    for name, arm in arms.items():
        points = [read_accuracy(node, chance).at(length) for length, node in arm.by_number("lengths")]
        if points:
            series.append(Series(name, points))
    if not series:
        return None
    trained = source.data["task"]["length"].number()
    return LineChart("Accuracy against length", Axis("length (tokens)", log=2), ACCURACY, series,
                     [("chance", chance)], [("trained length", trained)], [source.number])  # fmt: skip


def _length_table(source: Source, arms: dict[str, Node], chance: float) -> Table | None:
    lengths = sorted({length for arm in arms.values() for length, _ in arm.by_number("lengths")})
    if not lengths:
        return None
    rows = []
    for name, arm in arms.items():
        scores = dict(arm.by_number("lengths"))
        cells = [read_accuracy(scores[length], chance).cell if length in scores else Cell(NONE) for length in lengths]
        rows.append([Cell(name), *cells])
    titles = ["arm", *(f"{length:,.0f} tokens" for length in lengths)]
    chances = {read_accuracy(score, chance).chance for arm in arms.values() for _, score in arm.by_number("lengths")}
    note = f"Chance is {' to '.join(f'{value:.4g}' for value in sorted({min(chances), max(chances)}))}."
    return Table("Accuracy by length", titles, rows, [source.number], note)
