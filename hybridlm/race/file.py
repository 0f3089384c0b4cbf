"""A race file: which arms learn which task under which recipe, in YAML, checked before anything starts."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridlm.evaluation.symbols import TOKEN_TASKS
from hybridlm.presets import data_path, find_race
from hybridlm.typed import build, read_yaml, suggestion

INITIALISATIONS = ("uniform", "config")
SCHEDULES = ("cosine", "constant")
MATCHED = ("parameters", "state_bytes", "flops")
MOST_STEPS = 10**6  # seeds of rows would run into one another
MOST_SEEDS = 1000  # and into that of the rows that are tested
QUICK_STEPS, QUICK_ROWS = 20, 32


@dataclass
class Task:
    """What is learned.

    Args:
        name: A key of `hybridlm.evaluation.TOKEN_TASKS`.
        length: Tokens of a row in training.
        options: Of the task's generator.
        rows: Rows that are drawn once and read again and again; by default every step draws new ones.
    """

    name: str
    length: int
    options: dict = field(default_factory=dict)
    rows: int | None = None


@dataclass
class Model:
    """What all arms share.

    Args:
        vocab_size: Symbols of the task, at least.
        hidden_size: Width D.
        linear_init: `uniform`, weights of linear layers and experts from U(+-1/sqrt(fan_in)); `config`, as the config
            says.
        channel_mixer: Of every layer whose part is a mixer alone.
        fields: Further fields of the config, such as `embedding_std`.
    """

    vocab_size: int
    hidden_size: int = 64
    linear_init: str = "uniform"
    channel_mixer: dict | None = field(default_factory=lambda: {"name": "swiglu", "intermediate_size": 128})
    fields: dict = field(default_factory=dict)


@dataclass
class Arm:
    """One architecture.

    Args:
        layers: Names of parts, a layer each; or a pattern of parts with names of one character, such as `(MMMA)x2`.
        about: What it is, in a few words.
        fields: Fields of the config that are this arm's own, such as `spans`.
    """

    layers: list[str] | str
    about: str = ""
    fields: dict = field(default_factory=dict)


@dataclass
class Match:
    """What is made equal.

    Args:
        what: `parameters` (by the widths of channel mixers), `state_bytes` (by the size options of mixers) or `flops`.
        of: The arm whose figure the others come to; by default the one with the largest.
        target: The figure itself, instead of `of`.
        tolerance: Largest relative difference.
        by: FLOPs only: `width`, of channel mixers, or `steps`.
        context: Tokens behind which states are compared; by default the length in training.
    """

    what: str
    of: str | None = None
    target: int | None = None
    tolerance: float = 0.01
    by: str = "width"
    context: int | None = None


@dataclass
class Training:
    """How all arms are trained: AdamW, gradients clipped at 1, the loss on answers only.

    Args:
        steps: Optimizer steps.
        learning_rate: After the warm-up.
        warmup_steps: Steps in which it rises.
        schedule: `cosine`, down to `final_share` of it at the last step, or `constant`.
        final_share: See `schedule`.
        batch_size: Rows of a step.
        weight_decay: Of all weights.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 50
    schedule: str = "cosine"
    final_share: float = 0.1
    batch_size: int = 32
    weight_decay: float = 0.0


@dataclass
class Reading:
    """When and where accuracy is read, always on rows that no arm was trained on.

    Args:
        steps: Steps that are reported; the last step is too.
        lengths: Lengths that are tested at the end; the length in training is too.
        every: Steps between two points of the curve.
        rows: Rows of a reading.
        threshold: Accuracy that counts as solved.
    """

    steps: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    every: int = 50
    rows: int = 256
    threshold: float = 0.95


@dataclass
class Demand:
    """What must hold of the mean over seeds for the known ordering to show.

    Args:
        arm: Whose accuracy.
        step: Where it is read; by default at the last step.
        length: The length at the end, instead of a step.
        least: It is at least this.
        most: It is at most this.
        above: It is above that of this arm.
        by: By at least so much.
    """

    arm: str
    step: int | None = None
    length: int | None = None
    least: float | None = None
    most: float | None = None
    above: str | None = None
    by: float = 0.0


@dataclass
class Ordering:
    """What is known of these arms.

    Args:
        claim: In words, with its source.
        demands: What shows it.
    """

    claim: str
    demands: list[Demand]


@dataclass
class Race:
    """A whole race.

    Args:
        title: One line.
        task: What is learned.
        model: What all arms share.
        parts: What layers are made of: a mixer with its options, or `{"mixer": ..., "channel_mixer": ...}`.
        arms: What is compared.
        training: How all are trained.
        reading: When accuracy is read.
        ordering: What is known.
        match: What is made equal.
        seeds: Runs of an arm.
        note: What a reader must know besides.
        quick: Whether steps were cut short, only to see that it runs; then there is no verdict.
    """

    title: str
    task: Task
    model: Model
    parts: dict[str, dict]
    arms: dict[str, Arm]
    training: Training
    ordering: Ordering
    reading: Reading = field(default_factory=Reading)
    match: Match | None = None
    seeds: int = 3
    note: str = ""
    quick: bool = False

    @property
    def steps_read(self) -> list[int]:
        """The steps that are reported."""
        return sorted({*self.reading.steps, self.training.steps})

    @property
    def lengths(self) -> list[int]:
        """The lengths that are tested."""
        return sorted({*self.reading.lengths, self.task.length})


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


def recipe(race: Race) -> dict[str, Any]:
    """The race as plain data."""
    return asdict(race)
