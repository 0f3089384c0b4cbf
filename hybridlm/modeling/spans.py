"""Spans: runs of layers that only some tokens pass through.

A span chooses tokens, runs its layers on the shorter sequence and puts the results back: what enters is x, what leaves
is x + w (inner(x) - x). Tokens that do not enter advance no state of the inner layers and leave no keys there, and a
window of attention inside counts those that entered. Tokens keep their position ids. The choice for a token depends on
tokens up to it only, except where a class says otherwise.

Shapes: B batch, T tokens around the span, T' tokens that enter, D hidden size, n residual streams. The stream is
`[B, T, D]`, or `[B, T, n, D]` where there are several.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .cache_entries import RecurrentEntry
from .cache_layer import SpanCache
from .hold import Held, hold_last, hold_mean
from .loads import NUM_COUNTS, span_counts, warn_if_nobody_applies
from .losses import document_mean_loss, label_tokens_per_document
from .masks import Compaction, SequenceInfo, compiling, trailing
from .passage import Passage, Selection, SpanRecord, stream_mean
from .precision import Float32Islands, state_dtype
from .stream import RowState, select_tokens


def under_ceiling(wished: Tensor, ceiling: float, sequence: SequenceInfo, rows: RowState) -> Tensor:
    """Let a token enter only while fewer than `ceil(ceiling * (t + 1))` tokens of its document have.

    With N the tokens that entered before the call and W the running wishes, the tokens that have entered after each
    are W + min(N, the least of (bound - W) so far).

    Args:
        wished: `[B, T]`, False at pads.
        ceiling: Share of a document's tokens.
        sequence: The call.
        rows: Where the rows of the span stand, which tells how many tokens of each open document have entered.

    Returns:
        `[B, T]`.
    """
    first = torch.zeros_like(sequence.index) if sequence.doc_start is None else sequence.doc_start
    bound = ceil_share(ceiling, sequence.index - first + 1)
    open_document = (rows.last_segment[:, None] == first).expand(wished.shape)
    entered = torch.where(open_document, (rows.num_tokens - rows.doc_start)[:, None], 0)  # before the call
    wishes = wished.long().cumsum(1)
    if sequence.starts is not None:  # count anew in every document
        before = torch.where(sequence.starts, wishes - wished.long(), 0).cummax(1).values
        wishes = wishes - before
        number = sequence.starts.long().cumsum(1)
    else:
        number = torch.zeros_like(wishes)
    far = 2**40  # pushes the least value of one document below everything before it
    least = ((bound - wishes) - number * far).cummin(1).values + number * far
    total = wishes + torch.minimum(entered, least)
    previous = torch.where(
        number == torch.nn.functional.pad(number[:, :-1], (1, 0)),
        torch.nn.functional.pad(total[:, :-1], (1, 0)),
        entered,
    )
    previous[:, 0] = entered[:, 0]
    return wished & (total > previous)


def ceil_share(share: float, count: Tensor) -> Tensor:
    """`ceil(share * count)`, exact where the product is a whole number."""
    return (share * count.double() - 1e-9).ceil().long()


class Span(Float32Islands):
    """What all spans share; a subclass decides in `select`.

    Args:
        hidden_size: Width D.
        ceiling: After n tokens of a document at most `ceil(ceiling * n)` have entered; `None` for no limit.
    """

    choice_type: type | None = None  # dataclass of the state behind `select`
    holds = False  # whether tokens that do not enter read what the last one that did brought back

    def __init__(self, hidden_size: int, ceiling: float | None) -> None:
        super().__init__()
        if ceiling is not None and not 0 < ceiling <= 1:
            raise ValueError(f"ceiling={ceiling} must lie in (0, 1]")
        self.hidden_size, self.ceiling = hidden_size, ceiling
        self.number, self.start, self.stop, self.parent = 0, 0, 0, None
        # sums of `loads`: since the last optimizer step here, and of all processes since a log was written; plain
        # attributes because DistributedDataParallel would overwrite buffers with the first rank's
        self._load: Tensor | None = None
        self.num_unapplied = 0
        self.load_record: Tensor | None = None

    def place(self, number: int, start: int, stop: int, parent: int | None) -> None:
        """Tell the span where it stands: its number, its layers `[start, stop)` and the span around it."""
        self.number, self.start, self.stop, self.parent = number, start, stop, parent

    def select(self, stream: Tensor, state: Any, sequence: SequenceInfo) -> tuple[Selection, Any]:
        """Decide which tokens would enter; the ceiling comes after.

        Args:
            stream: `[B, T, D]` or `[B, T, n, D]`; `stream_mean` makes one vector a token of it.
            state: What the last call returned, or `None` at the start.
            sequence: The call.

        Returns:
            The decision and the state after the call.
        """
        raise NotImplementedError

    def max_tokens(self, num_tokens: int) -> int:
        """Most tokens that enter among the first `num_tokens` of a document, outside of top-k training."""
        return num_tokens if self.ceiling is None else math.ceil(self.ceiling * num_tokens - 1e-9)

    def expected_share(self) -> float:
        """Share of tokens that is meant to enter."""
        raise NotImplementedError

    def token_losses(self, record: SpanRecord, segment_ids: Tensor | None) -> Tensor | None:
        """`[B, T]`, what the choice adds to the loss at each token, or `None`; see `span_losses`."""
        return None

    def predicted(self, record: SpanRecord) -> Tensor | None:
        """`[B, T]`, True where a causal decision that is only being learned says that a token enters, or `None`."""
        return None

    def add_load(self, record: SpanRecord) -> None:
        """Count what a forward in training chose."""
        counts = span_counts(record, self.predicted(record))
        self._load = counts if self._load is None else self._load.to(counts.device) + counts
        if getattr(self, "threshold_bias", None) is not None:
            self.num_unapplied = warn_if_nobody_applies(self.num_unapplied)

    def reset_load(self) -> None:
        """Start counting anew."""
        self._load = None
        self.num_unapplied = 0

    def load_counts(self) -> Tensor:
        """What was counted since the last `reset_load`, to be added up over processes; see `loads.SpanLoad`."""
        if self._load is None:
            return torch.zeros(NUM_COUNTS, dtype=torch.double, device=next(self.parameters(), torch.empty(0)).device)
        return self._load

    @torch.no_grad()
    def apply_load(self, counts: Tensor, moves: bool = True) -> None:
        """Take note of counts that may come from several processes, move a bias by them if it `moves`, count anew."""
        self.load_record = counts.clone() if self.load_record is None else self.load_record.to(counts.device) + counts
        self.reset_load()

    def state_spec(self, num_streams: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape a row and type of what the span keeps in a cache, whatever the number of tokens.

        A subclass with a `choice_type` adds its fields, named `choice.*`.
        """
        held = ((num_streams * self.hidden_size,), state_dtype(dtype))
        return {"held.values": held} if self.holds else {}

    def new_entry(self, static_length: int | None = None) -> SpanCache:
        """Make what this span keeps in a cache; `static_length` tokens may come to it, or any number."""
        static = static_length is not None
        choice = None if self.choice_type is None else RecurrentEntry(self.choice_type, static)
        held = RecurrentEntry(Held, static) if self.holds else None
        room = self.max_tokens(static_length) if static else None
        return SpanCache(range(self.start, self.stop), self.parent, choice, held, room)

    def forward(
        self, stream: Tensor, sequence: SequenceInfo, inner: Callable[[Tensor, SequenceInfo], Tensor], cache: Any = None
    ) -> Tensor:
        """Send the tokens of `stream` that this span chooses through `inner`."""
        sequence = sequence.to(stream.device)
        entry = None if cache is None else cache.spans[self.number]
        batch, device = stream.shape[0], stream.device
        rows = RowState.fresh(batch, device) if entry is None else entry.stream.start_rows(batch, device)
        selection = self._choose(stream, sequence, entry)
        selection.taken = selection.wished
        if self.ceiling is not None and not self.sees_the_future(sequence):
            selection.taken = under_ceiling(selection.wished, self.ceiling, sequence, rows)
        # in training the layers always run, so that every parameter gets a gradient and every process its collectives
        journal, delta, compaction = sequence.journal, None, None
        if compiling() or self.training or journal.complete or bool(selection.taken.any()):
            inside, compaction, after = select_tokens(sequence, selection.taken, rows, selection.positions)
            before = stream_mean(stream) if journal.complete else None
            inside.passage = Passage(self.number, selection, compaction, sequence.token_mask, sequence.passage, before)
            journal.passages.append(inside.passage)
            entering = stream if selection.inputs is None else selection.inputs
            entering = entering if compaction is None else compaction.apply(entering)
            if entry is not None:
                entry.stream.plan(inside, cache.record_window)
            delta = inner(entering, inside).to(device) - entering
            if entry is not None:
                entry.stream.commit(cache.num_calls, sequence.num_tokens, selection.taken, inside, after)
        elif not self.holds:
            return stream
        update = self._spread(stream, delta, selection, compaction, sequence, entry)
        if selection.weight is not None:
            update = update * trailing(selection.weight, update).to(update.dtype)
        return stream + update

    def sees_the_future(self, sequence: SequenceInfo) -> bool:
        """Whether later tokens have a say in this call."""
        return False

    def _choose(self, stream: Tensor, sequence: SequenceInfo, entry: SpanCache | None) -> Selection:
        """Call `select`, through the cache where it has a state."""
        if entry is None or entry.choice is None:
            return self.select(stream, None, sequence)[0]
        parts: list[Selection] = []

        def choose(stream: Tensor, state: Any, sequence: SequenceInfo) -> tuple[Tensor, Any]:
            selection, state = self.select(stream, state, sequence)
            parts.append(selection)
            return selection.scores, state

        entry.choice.run(choose, stream, sequence)
        parts = parts[-len(sequence.parts or [sequence]) :]  # what comes before was replayed
        if len(parts) == 1:
            return parts[0]
        values = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Selection)}
        return Selection(**{name: None if v[0] is None else torch.cat(v, dim=1) for name, v in values.items()})

    def _spread(
        self,
        stream: Tensor,
        delta: Tensor | None,
        selection: Selection,
        compaction: Compaction | None,
        sequence: SequenceInfo,
        entry: SpanCache | None,
    ) -> Tensor:
        """What each token around the span gets of what the inner layers added, like the stream."""
        taken = trailing(selection.taken, stream)
        if delta is None:
            update = torch.zeros_like(stream)
        else:
            update = delta if compaction is None else compaction.restore(delta)
            update = torch.where(taken, update, torch.zeros((), dtype=update.dtype, device=update.device))
        if not self.holds:
            return update
        wide = state_dtype(stream.dtype)
        keep = torch.where(selection.taken, 0.0, 1.0).to(wide)
        if selection.retain is not None:
            retain = selection.retain.to(wide)
            keep = torch.where(selection.taken, retain, keep)
            update = update * trailing(1 - retain, update).to(update.dtype)
        if sequence.starts is not None:
            keep = keep.masked_fill(sequence.starts, 0.0)
        packed = torch.cat([keep[..., None], update.flatten(2).to(wide)], dim=-1)
        hold = hold_last if selection.retain is None else hold_mean
        held = hold(packed, None, sequence)[0] if entry is None else entry.held.run(hold, packed, sequence)
        return held.to(stream.dtype).view_as(stream)


def span_losses(
    spans: Iterable[Span],
    records: Iterable[SpanRecord],
    labels: Tensor,
    token_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    *,
    shifted: bool = False,
) -> Tensor | None:
    """Add up what the choices of all spans add to the loss.

    Args:
        spans: The spans of the model.
        records: What they did, one record a span.
        labels: `[B, T]`, as in `losses.label_tokens_per_document`.
        token_mask: `[B, T]`, True at real tokens; `None` for all.
        segment_ids: `[B, T]`; `None` for one document a row.
        num_items_in_batch: Label tokens of all micro-batches together.
        shifted: Whether `labels` are `shift_labels`.

    Returns:
        A scalar, or `None` when no span has a loss.
    """
    total, label_tokens = None, None
    for span, record in zip(spans, records, strict=True):
        values = span.token_losses(record, segment_ids)
        if values is None:
            continue
        if label_tokens is None:
            label_tokens = label_tokens_per_document(labels, segment_ids, token_mask, shifted=shifted)
        loss = document_mean_loss(
            values,
            token_mask=record.reached,
            segment_ids=segment_ids,
            label_tokens=label_tokens,
            num_items_in_batch=num_items_in_batch,
        )
        total = loss if total is None else total + loss.to(total.device)
    return total
