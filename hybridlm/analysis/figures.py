"""What the planner tells: costs of parts, and their sum.

Where tokens choose what they pass through, there are two sets of figures: the bound, which nothing exceeds, and what is
expected when choices are as frequent as they are meant to be. Without such choices the two are equal.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figures:
    """The cost of a part of the model.

    Attributes:
        num_parameters: All parameters; a tied matrix counts once.
        num_active_parameters: Those that a token passes through which enters every span: of E experts the k chosen,
            where it may choose none the most.
        state_bytes: What one row keeps between calls after `context` tokens of one document; where it depends on the
            data, at most.
        step_flops: FLOPs of the token after those, likewise at most.
        prefill_flops: FLOPs of a forward over `context` tokens, logits of every token included, likewise at most.
        expected_state_bytes: Bytes when data-dependent choices are as frequent as they are meant to be.
        expected_step_flops: The same for the token after them, on average.
        expected_prefill_flops: The same for the forward.
        expected_active_parameters: Parameters that a token passes through on average, likewise.
    """

    num_parameters: int = 0
    num_active_parameters: int = 0
    state_bytes: int = 0
    step_flops: int = 0
    prefill_flops: int = 0
    expected_state_bytes: int = 0
    expected_step_flops: int = 0
    expected_prefill_flops: int = 0
    expected_active_parameters: int = 0

    def __add__(self, other: "Figures") -> "Figures":
        names = [field.name for field in dataclasses.fields(Figures)]
        return Figures(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class LayerPlan(Figures):
    """The cost of one layer, and what stands in it.

    Attributes:
        index: Depth of the layer.
        recipe: Its name in `layer_specs`.
        mixer: Name of the mixer, or `None`.
        channel_mixer: Name of the channel mixer, or `None`.
        max_tokens: Most of the `context` tokens of a document that reach it; less than all inside a span.
        expected_tokens: Those that are meant to.
    """

    index: int = 0
    recipe: str = ""
    mixer: str | None = None
    channel_mixer: str | None = None
    max_tokens: int = 0
    expected_tokens: int = 0


@dataclass(frozen=True)
class SpanPlan(Figures):
    """The cost of a span's choice, its layers left out.

    Attributes:
        index: Number of the span in the model.
        span: Its name in the registry.
        start: First layer inside.
        stop: Layer after the last.
        parent: Number of the span around it, or `None`.
        max_tokens: Most of the `context` tokens of a document that enter.
        expected_tokens: Those that are meant to.
        expected_share: Share that is meant to enter of the tokens that come to it.
    """

    index: int = 0
    span: str = ""
    start: int = 0
    stop: int = 0
    parent: int | None = None
    max_tokens: int = 0
    expected_tokens: int = 0
    expected_share: float = 1.0


@dataclass(frozen=True)
class Plan:
    """The cost of a model.

    Attributes:
        context: Tokens that the state and the FLOPs are for.
        dtype: Name of the number format of weights and keys; recurrences stay float32.
        layers: One entry a layer.
        outer: Embeddings, head, final norm, and what makes one stream of several.
        rollback_window: Tokens that `cache.crop` may take back; 0 without a record of the past.
        rollback_bytes: Upper bound on what recording them adds for one row.
        spans: One entry a span, repetitions written out.
    """

    context: int
    dtype: str
    layers: tuple[LayerPlan, ...]
    outer: Figures
    rollback_window: int = 0
    rollback_bytes: int = 0
    spans: tuple[SpanPlan, ...] = ()

    @property
    def total(self) -> Figures:
        """All layers and spans, and what stands around them."""
        return sum((*self.layers, *self.spans), self.outer)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {**dataclasses.asdict(self), "total": dataclasses.asdict(self.total)}
