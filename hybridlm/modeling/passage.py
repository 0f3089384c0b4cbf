"""How tokens pass through spans in one call: what was decided, who entered, and the way back.

Shapes: B batch, T tokens around the span, T' tokens that enter, D hidden size, n residual streams.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .masks import Compaction, trailing


@dataclass
class Selection:
    """What a span decides for the tokens of a call.

    Attributes:
        wished: `[B, T]`, True at tokens that would enter if there were no ceiling; False at pads.
        scores: `[B, T]`, what the decision was made from; the loss is computed from it.
        weight: `[B, T]`, factor w; `None` for 1.
        inputs: like the stream, what enters at each token; `None` for the stream itself.
        positions: `[B, T]`, position ids of what enters; `None` for those of the tokens.
        retain: `[B, T]`, share of what was held before that an entering token keeps; `None` for 0.
        sizes: `[B, T]`, number of tokens that what enters stands for, 0 elsewhere; `None` where it is not known yet.
        taken: `[B, T]`, True at tokens that enter.
    """

    wished: Tensor
    scores: Tensor
    weight: Tensor | None = None
    inputs: Tensor | None = None
    positions: Tensor | None = None
    retain: Tensor | None = None
    sizes: Tensor | None = None
    taken: Tensor | None = None


@dataclass
class Passage:
    """How tokens entered a span in one call.

    Attributes:
        number: Number of the span in the model.
        selection: What was decided.
        compaction: The move of entering tokens to the front; `None` when they keep their places.
        mask: `[B, T]`, True at tokens that could enter; `None` for all.
        outer: The passage into the span around this one.
        before: `[B, T, D]`, the stream around the span, as hidden states are recorded; kept only where they are.
    """

    number: int
    selection: Selection
    compaction: Compaction | None
    mask: Tensor | None = None
    outer: "Passage | None" = None
    before: Tensor | None = None

    def lift(self, values: Tensor, before: bool = False) -> Tensor:
        """Bring `[B, T', ...]` back to the tokens around the span: 0, or the stream, where none entered."""
        taken = self.selection.taken
        lifted = values if self.compaction is None else self.compaction.restore(values)
        fill = torch.zeros_like(lifted)
        if before:
            fill = self.before
        return torch.where(trailing(taken, lifted), lifted, fill)


@dataclass
class Journal:
    """What the spans and layers of one call did, in the order it happened.

    Attributes:
        complete: Whether something is recorded: then every layer runs, and passages keep the stream around them.
        traced: Whether memories leave traces.
        passages: One for each span whose layers ran.
        layers: Depth of each layer that ran, and how its tokens came there.
        traces: By depth, the trace of a layer's memory `[B, T, H, F]`, in pieces where the call was cut.
    """

    complete: bool = False
    traced: bool = False
    passages: list[Passage] = field(default_factory=list)
    layers: list[tuple[int, Passage | None]] = field(default_factory=list)
    traces: dict[int, list[Tensor]] = field(default_factory=dict)

    def leave_trace(self, trace: Tensor) -> None:
        """Keep what the memory of the layer that runs has recorded."""
        self.traces.setdefault(self.layers[-1][0], []).append(trace)


@dataclass
class SpanRecord:
    """What one span did in a call, in the caller's layout.

    Attributes:
        number: Number of the span in the model.
        scores: `[B, T]`, as in `Selection`.
        taken: `[B, T]`, True at tokens that entered.
        wished: `[B, T]`, True at tokens that would have entered without the ceiling.
        reached: `[B, T]`, True at tokens that the span could choose from.
        sizes: `[B, T]`, as in `Selection`.
    """

    number: int
    scores: Tensor
    taken: Tensor
    wished: Tensor
    reached: Tensor
    sizes: Tensor | None = None


def stream_mean(stream: Tensor) -> Tensor:
    """`[B, T, D]`, the mean of the residual streams `[B, T, n, D]`, or the stream itself where there is one."""
    return stream if stream.dim() == 3 else stream.mean(2)


def lift_all(passage: Passage | None, values: Tensor, before: bool = False) -> Tensor:
    """Bring values of a layer inside nested spans back to the tokens of the model."""
    while passage is not None:
        values, passage = passage.lift(values, before), passage.outer
    return values
