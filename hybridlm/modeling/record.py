"""A stream of tokens through some layers: where its rows stand, and which of its calls can be undone.

The model's tokens are one stream; the tokens that enter a span are another, which advances more slowly. Each keeps its
own rows and its own record, and all are rolled back together.

Shapes: B batch, T tokens of a call.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .masks import SequenceInfo
from .stream import UNKNOWN, RowState


@dataclasses.dataclass
class RecordedCall:
    """One call that `crop` can undo.

    Attributes:
        serial: Number of the model's call that it belongs to.
        num_columns: Columns of the call before compaction.
        real: `[B, columns]`, the columns that hold a token of this stream; `None` when all do.
        sequence: The recorded part of the call.
        offset: Compacted tokens of the call that lie before `sequence`.
        before: The rows before the call.
        positions: Of the whole call, as is `seq_idx`.
    """

    serial: int
    num_columns: int
    real: Tensor | None
    sequence: SequenceInfo
    offset: int
    before: RowState
    positions: Tensor
    seq_idx: Tensor | None


@dataclasses.dataclass
class Undo:
    """What `Stream.undo` found out and `Stream.apply` does."""

    calls: list[RecordedCall]
    rows: RowState
    shortened: SequenceInfo | None  # what is left of a call that is taken back in part
    num_kept: Tensor | None  # [B], its tokens that stay


class Stream:
    """The rows and the record of one stream.

    Args:
        is_static: Whether every tensor keeps its address.
    """

    def __init__(self, is_static: bool = False) -> None:
        self.is_static = is_static
        self.entries: list[Any] = []  # of the layers that this stream runs through
        self.rows: RowState | None = None
        self.recording = False
        self.calls: list[RecordedCall] = []
        self.num_marked = 0
        self.forgotten = -1  # serial of the newest call that can no longer be undone

    def start_rows(self, batch: int, device: torch.device) -> RowState:
        """Where the rows stand, for a call of `batch` rows."""
        return RowState.fresh(batch, device) if self.rows is None else self.rows

    def plan(self, sequence: SequenceInfo, window: int) -> None:
        """Decide where the checkpoints of this call lie, before its layers run."""
        if self.rows is None:
            self.rows = RowState.fresh(sequence.num_rows, sequence.index.device)
            for tensor in self.rows.tensors() if self.is_static else ():
                torch._dynamo.mark_static_address(tensor)
        if not self.recording:
            return
        shortest = sequence.num_tokens if sequence.lengths is None else int(sequence.lengths.min())
        split = shortest - window
        if split > 0:
            sequence.parts = [sequence.narrow(0, split), sequence.narrow(split, sequence.num_tokens)]
        elif sum(call.sequence.num_tokens for call in self.calls[self.num_marked :]) >= window:
            sequence.promote = True

    def commit(
        self, serial: int, num_columns: int, real: Tensor | None, sequence: SequenceInfo, rows: RowState
    ) -> None:
        """Take note of a call after its layers ran."""
        if self.recording:
            if sequence.promote:
                if self.num_marked:
                    self.forgotten = self.calls[self.num_marked - 1].serial
                self.calls = self.calls[self.num_marked :]
                self.num_marked = len(self.calls)
            part, offset = sequence, 0
            if sequence.parts:
                part, offset = sequence.parts[-1], sequence.parts[0].num_tokens
                self.calls, self.num_marked, self.forgotten = [], 0, serial - 1
            part.memo.clear()  # masks as wide as the past
            part.passage = part.journal = None
            facts = (sequence.positions, sequence.seq_idx)
            self.calls.append(RecordedCall(serial, num_columns, real, part, offset, self.rows, *facts))
        if self.is_static:
            for old, new in zip(self.rows.tensors(), rows.tensors(), strict=True):
                old.copy_(new)
            self.rows.uniform = None  # a number that changes every step would compile a new graph every step
            self.rows.one_document = rows.one_document
        else:
            self.rows = rows

    def begin_record(self, serial: int) -> None:
        """Keep what `undo` needs from the call `serial` on."""
        self.recording, self.calls, self.num_marked, self.forgotten = True, [], 0, serial - 1
        for entry in self.entries:
            entry.begin_record()

    def undo(self, first_dropped: int, partial: int | None = None, kept: Tensor | None = None) -> Undo:
        """Find the state before the call `first_dropped`, changing nothing.

        Args:
            first_dropped: Serial from which calls are taken back.
            partial: Serial of a call before it that is taken back in part.
            kept: `[B]`, columns of that call, pads left out, whose tokens stay.

        Raises:
            ValueError: The record does not reach so far.
        """
        if (first_dropped if partial is None else partial) <= self.forgotten:
            raise ValueError
        keep = sum(call.serial < first_dropped for call in self.calls)
        if any(call.offset for call in self.calls[keep:]):  # what lies before `offset` was not recorded
            raise ValueError
        rows = self.calls[keep].before if keep < len(self.calls) else self.rows
        calls, shortened, num_kept = self.calls[:keep], None, None
        if partial is not None and calls and calls[-1].serial == partial:
            call = calls[-1]
            stays = torch.arange(call.num_columns, device=kept.device) < kept[:, None]  # [B, columns]
            real = stays if call.real is None else call.real & stays
            num_tokens = kept.new_tensor(call.num_columns) if call.real is None else call.real.sum(1)
            num_kept = real.sum(1)
            if bool((num_kept < num_tokens).any()):
                shortened, rows = _shorten(call, num_tokens - num_kept)
                width = int(kept.max())
                real = None if call.real is None and bool(stays[:, :width].all()) else real[:, :width]
                calls[-1] = dataclasses.replace(call, num_columns=width, real=real, sequence=shortened)
        return Undo(calls, rows, shortened, num_kept)

    def apply(self, undo: Undo) -> None:
        """Return to the state that `undo` found."""
        rows = self.rows = undo.rows
        self.calls = undo.calls
        length = 0 if rows is None else rows.uniform  # no rows: no token has come yet
        if length is None:
            length = int(rows.num_tokens.max())
        for entry in self.entries:
            entry.rollback(len(self.calls), undo.shortened, length)
        if self.num_marked > len(self.calls) - (undo.shortened is not None):
            self.num_marked = 0
            for entry in self.entries:
                entry.drop_mark()

    def map(self, function: Any) -> None:
        """Replace the tensors of the rows by `function(tensor)`; entries are mapped by their layers."""
        if self.rows is not None:
            self.rows = map_tensors(self.rows, function)

    def reset(self) -> None:
        """Forget every row."""
        self.calls, self.num_marked, self.forgotten = [], 0, -1
        if self.is_static and self.rows is not None:
            self.rows.num_tokens.zero_()
            self.rows.doc_start.zero_()
            self.rows.last_position.fill_(-1)
            self.rows.last_segment.fill_(UNKNOWN)
            self.rows.uniform, self.rows.one_document = 0, True
        else:
            self.rows = None


def _shorten(call: RecordedCall, removed: Tensor) -> tuple[SequenceInfo, RowState]:
    """The recorded part of a call without its last `removed` `[B]` tokens, and the rows after that.

    Raises:
        ValueError: They were not all recorded.
    """
    sequence, batch, device = call.sequence, call.before.num_tokens.shape[0], call.before.num_tokens.device
    available = sequence.num_tokens if sequence.lengths is None else sequence.lengths
    if bool((removed > available).any()):
        raise ValueError
    uniform = sequence.lengths is None and bool((removed == removed[0]).all())
    shorter = sequence.head(sequence.num_tokens - int(removed[0])) if uniform else sequence.shorten(removed)
    lengths = torch.as_tensor(available, device=device).expand(batch) - removed

    def at_end(values: Tensor | None, before: Tensor, count: Tensor) -> Tensor:
        if values is None:
            return before
        last = (count - 1).clamp(min=0)[:, None]
        return torch.where(count > 0, values.expand(batch, -1).gather(1, last)[:, 0], before)

    base = sequence.num_past if sequence.num_past is not None else torch.zeros_like(lengths)
    past_start = sequence.past_doc_start if sequence.past_doc_start is not None else call.before.doc_start
    past, kept = sequence.uniform_past, lengths + call.offset
    rows = RowState(
        num_tokens=base + lengths,
        doc_start=at_end(sequence.doc_start, past_start, lengths),
        last_position=at_end(call.positions, call.before.last_position, kept),
        last_segment=at_end(call.seq_idx, call.before.last_segment, kept),
        uniform=past + shorter.num_tokens if uniform and past is not None else None,
        one_document=sequence.doc_start is None,
    )
    return shorter, rows


def map_tensors(value: Any, function: Any) -> Any:
    """A dataclass with `function` applied to its tensors."""
    changes = {
        f.name: function(getattr(value, f.name))
        for f in dataclasses.fields(value)
        if isinstance(getattr(value, f.name), Tensor)
    }
    return dataclasses.replace(value, **changes)
