"""Read a race file, in YAML, and check it before anything starts."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hybridlm.evaluation.symbols import TOKEN_TASKS
from hybridlm.presets import data_path, find_race
from hybridlm.typed import build, read_yaml, suggestion

from .file import MOST_STEPS, Demand, Race

INITIALISATIONS = ("uniform", "config")
SCHEDULES = ("cosine", "constant")
MATCHED = ("parameters", "state_bytes", "flops")
MOST_SEEDS = 1000  # seeds of rows would run into that of the rows that are tested
QUICK_STEPS, QUICK_ROWS = 20, 32


def race_names() -> list[str]:
    """The races that come with the package."""
    names = sorted(path.stem for path in data_path("configs", "races").glob("*.yaml"))
    return sorted(names, key=lambda name: name != "default")


def load_race(source: str | Path, *, seeds: int | None = None, quick: bool = False) -> Race:
    """Read and check a race file.

    Args:
        source: A path, or the name of a race that comes with the package.
        seeds: Replaces the file's.
        quick: One seed, few steps and rows: does it run at all?

    Raises:
        FileNotFoundError: There is no such race.
        ValueError: With the path of what is unknown, missing or not allowed.
    """
    if seeds is not None:
        _check_seeds("--seeds", seeds)
    content = read_yaml(find_race(source))
    with in_file(source):
        race = build(Race, content)
        race.seeds = race.seeds if seeds is None else seeds
        _check(race)
    return _shorten(race, seeds) if quick else race


@contextmanager
def in_file(source: str | Path) -> Iterator[None]:
    """Name the race file in errors about what it says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _check_seeds(name: str, seeds: int) -> None:
    if seeds < 1:
        raise ValueError(f"{name}: {seeds}, expected at least 1")
    if seeds > MOST_SEEDS:
        raise ValueError(f"{name}: {seeds}, expected at most {MOST_SEEDS}")


def _check(race: Race) -> None:
    if race.task.name not in TOKEN_TASKS:
        raise ValueError(f"task.name: unknown {race.task.name!r}{suggestion(race.task.name, TOKEN_TASKS)}")
    if race.quick:
        raise ValueError("quick: no key of a race file, give --quick")
    training, reading = race.training, race.reading
    _one_of("model.linear_init", race.model.linear_init, INITIALISATIONS)
    _one_of("training.schedule", training.schedule, SCHEDULES)
    _check_seeds("seeds", race.seeds)
    at_least_one = {
        "task.length": race.task.length, "model.vocab_size": race.model.vocab_size,
        "model.hidden_size": race.model.hidden_size, "training.batch_size": training.batch_size,
        "reading.every": reading.every, "reading.rows": reading.rows,
    }  # fmt: skip
    if race.task.rows is not None:
        at_least_one["task.rows"] = race.task.rows
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name}: {value}, expected at least 1")
    if not 1 <= training.steps < MOST_STEPS:
        raise ValueError(f"training.steps: {training.steps}, expected 1 to {MOST_STEPS - 1}")
    if not 0 <= training.warmup_steps <= training.steps:
        raise ValueError(f"training.warmup_steps: {training.warmup_steps}, expected 0 to steps={training.steps}")
    if training.learning_rate <= 0:
        raise ValueError(f"training.learning_rate: {training.learning_rate}, expected above 0")
    if training.weight_decay < 0:
        raise ValueError(f"training.weight_decay: {training.weight_decay}, expected at least 0")
    for name, value in (("training.final_share", training.final_share), ("reading.threshold", reading.threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: {value}, expected 0 to 1")
    for step in reading.steps:
        if not 1 <= step <= training.steps:
            raise ValueError(f"reading.steps: {step}, expected 1 to training.steps={training.steps}")
    for length in reading.lengths:
        if length < 1:
            raise ValueError(f"reading.lengths: {length}, expected at least 1")
    _check_arms(race)
    _check_match(race)
    if not race.ordering.demands:  # nothing would show, whatever happens
        raise ValueError("ordering.demands: empty, expected at least one")
    for place, demand in enumerate(race.ordering.demands):
        _check_demand(race, demand, f"ordering.demands.{place}")


def _check_arms(race: Race) -> None:
    if not race.arms:
        raise ValueError("arms: empty, expected at least one")
    for name, part in race.parts.items():
        if "name" not in part and "mixer" not in part:
            raise ValueError(f"parts.{name}: {part}, expected a mixer with its `name`, or `mixer` and `channel_mixer`")
    for name, arm in race.arms.items():
        if not re.fullmatch(r"[\w.+-]+", name):  # it becomes the name of a file
            raise ValueError(f"arms.{name}: expected letters, digits and any of '_.+-'")
        if not arm.layers:
            raise ValueError(f"arms.{name}.layers: empty, expected names of parts")
        for part in arm.layers if isinstance(arm.layers, list) else ():
            if part not in race.parts:
                raise ValueError(f"arms.{name}.layers: unknown part {part!r}{suggestion(part, race.parts)}")


def _check_match(race: Race) -> None:
    match = race.match
    if match is None:
        return
    _one_of("match.what", match.what, MATCHED)
    _one_of("match.by", match.by, ("width", "steps"))
    if match.by == "steps" and match.what != "flops":
        raise ValueError(f"match.by: 'steps' is for flops, expected 'width' for {match.what}")
    if match.of is not None and match.target is not None:
        raise ValueError(f"match.target: {match.target}, but match.of={match.of!r} is given; expected one of them")
    if match.of is not None and match.of not in race.arms:
        raise ValueError(f"match.of: unknown arm {match.of!r}{suggestion(match.of, race.arms)}")
    for name, value in (("target", match.target), ("context", match.context)):
        if value is not None and value < 1:
            raise ValueError(f"match.{name}: {value}, expected at least 1")
    if not 0 <= match.tolerance < 1:
        raise ValueError(f"match.tolerance: {match.tolerance}, expected at least 0 and below 1")


def _check_demand(race: Race, demand: Demand, path: str) -> None:
    for key, arm in (("arm", demand.arm), ("above", demand.above)):
        if arm is not None and arm not in race.arms:
            raise ValueError(f"{path}.{key}: unknown arm {arm!r}{suggestion(arm, race.arms)}")
    if demand.step is not None and demand.step not in race.steps_read:
        raise ValueError(f"{path}.step: {demand.step} is not read, expected one of {race.steps_read}")
    if demand.length is not None and demand.length not in race.lengths:
        raise ValueError(f"{path}.length: {demand.length} is not tested, expected one of {race.lengths}")
    if demand.step is not None and demand.length is not None:
        raise ValueError(f"{path}: step={demand.step} and length={demand.length}, expected one of them")
    if (demand.least, demand.most, demand.above) == (None, None, None):
        raise ValueError(f"{path}: demands nothing, expected one of ['above', 'least', 'most']")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: unknown {value!r}, expected one of {list(allowed)}")


def _shorten(race: Race, seeds: int | None) -> Race:
    """The same with few steps and rows, and one seed unless the user gave a number."""
    steps = min(race.training.steps, QUICK_STEPS)

    def moved(step: int | None) -> int | None:
        return None if step is None else max(1, round(step * steps / race.training.steps))

    # numbers of few steps cannot be matched closely
    match = race.match and replace(race.match, tolerance=max(race.match.tolerance, 1 / steps))
    demands = [replace(demand, step=moved(demand.step)) for demand in race.ordering.demands]
    return replace(
        race,
        title=f"{race.title} (quick)",
        training=replace(race.training, steps=steps, warmup_steps=min(race.training.warmup_steps, steps // 4)),
        reading=replace(race.reading, steps=[moved(step) for step in race.reading.steps], every=steps, rows=QUICK_ROWS),
        ordering=replace(race.ordering, demands=demands),
        match=match,
        seeds=1 if seeds is None else seeds,
        quick=True,
    )
