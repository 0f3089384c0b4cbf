"""What a race file says: which arms learn which task under which recipe; `load.py` reads and checks it."""

from dataclasses import asdict, dataclass, field
from typing import Any

MOST_STEPS = 10**6  # seeds of rows would run into one another


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


def recipe(race: Race) -> dict[str, Any]:
    """The race as plain data."""
    return asdict(race)
