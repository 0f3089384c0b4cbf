"""The new tokens of a call, a piece for each segment that they fall in, for what must go from segment to segment.

Segments are the chunks of `chunk_grid.py`: C tokens, counted from the start of each row's document. A piece holds the
call's own tokens of one segment, left-aligned; the tokens of a segment that was open before the call are in slots of
the state. What is kept of an open segment lies in a buffer with a slot for each of its tokens.

Shapes: B batch, T tokens, C segment size, L tokens of a piece.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk_grid import ChunkGrid
from .masks import SequenceInfo, compiling


@dataclass
class Piece:
    """The call's tokens of one segment in every row.

    Attributes:
        call: The piece as a call of its own: positions, pads at the end, and whether a document begins with it.
        columns: Where its tokens stand in the call, a slice, or `[B or 1, L]`.
        slots: `[B or 1, L]`, slot of each token in its segment.
        size: C.
        offset: Slot of the first token where it is the same in every row and no row has pads; else `None`.
        closes: `[B or 1]`, True where the segment is full behind the piece.
        may_close: Whether any row's can be.
    """

    call: SequenceInfo
    columns: slice | Tensor
    slots: Tensor
    size: int
    offset: int | None
    closes: Tensor
    may_close: bool

    @property
    def begins(self) -> Tensor | None:
        """`[B or 1]`, True where a document begins with the piece; `None` when none does."""
        return None if self.call.starts is None else self.call.starts[:, 0]

    def take(self, values: Tensor, dim: int = 1) -> Tensor:
        """The piece's part of something of every token of the call; `dim` is where the tokens are."""
        if isinstance(self.columns, slice):
            return values.narrow(dim, self.columns.start, self.columns.stop - self.columns.start)
        return values.gather(dim, _spread(self.columns, values, dim))

    def extend(self, before: Tensor | None, new: Tensor, dim: int = 1) -> Tensor:
        """Put `new`, something of the piece's tokens, behind what a buffer holds of their segments.

        Args:
            before: The buffer, or `None` when it is empty.
            new: `[..., L, ...]`.
            dim: Where the tokens are.

        Returns:
            The buffer, with all slots, or with those up to the last token of the piece.
        """
        if self.offset == 0:
            return new
        if self.offset is not None:
            return torch.cat([before.narrow(dim, 0, self.offset), new], dim)
        held = 0 if before is None else before.shape[dim]
        shape = list(new.shape)
        shape[dim] = self.size + 1 - held  # pads go to a slot that is cut off
        buffer = new.new_zeros(shape)
        buffer = buffer if before is None else torch.cat([before, buffer.to(before.dtype)], dim)
        slots = self.slots
        if self.call.lengths is not None:
            real = torch.arange(slots.shape[1], device=slots.device) < self.call.lengths[:, None]
            slots = torch.where(real, slots, self.size)
        return buffer.scatter(dim, _spread(slots, new, dim), new.to(buffer.dtype)).narrow(dim, 0, self.size)

    def where_full(self, after: Tensor | None, before: Tensor | None) -> Tensor | None:
        """`after` `[B, ...]` in rows whose segment is full, else `before`; `None` stays `None`."""
        if after is None or self.offset is not None:  # if one closes, all do
            return after
        return torch.where(self.closes.view(-1, *[1] * (after.dim() - 1)), after, before)

    def visible(self, num_slots: int) -> Tensor:
        """`[B or 1, L, num_slots]`, True where a token may look: at slots up to its own."""
        return torch.arange(num_slots, device=self.slots.device) <= self.slots[..., None]


@dataclass
class Segments:
    """The pieces of a call.

    Attributes:
        size: C.
        pieces: In the order of the segments; those of a row follow one another.
        num_open: Tokens of the segment that is open behind the call, one number, or `[B or 1]`.
        place: `[B or 1, T]`, where each token stands in the pieces, one behind the other; `None`: as in the call.
    """

    size: int
    pieces: list[Piece]
    num_open: int | Tensor
    place: Tensor | None

    @classmethod
    def build(cls, sequence: SequenceInfo, size: int) -> "Segments":
        """Cut a call; layers with the same segment size share the result."""
        memo = ("segments", size)
        if memo not in sequence.memo:
            aligned = sequence.lengths is None and sequence.doc_start is None and sequence.uniform_past is not None
            sequence.memo[memo] = cls._cut_evenly(sequence, size) if aligned else cls._cut(sequence, size)
        return sequence.memo[memo]

    @classmethod
    def _cut_evenly(cls, sequence: SequenceInfo, size: int) -> "Segments":
        """Every row alike: borders are numbers."""
        past, length, device = sequence.uniform_past, sequence.num_tokens, sequence.index.device
        pieces, start = [], 0
        while start < length:
            offset = (past + start) % size
            stop = min(length, start + size - offset)
            index, positions = sequence.index[:, start:stop], sequence.positions[:, start:stop]
            call = SequenceInfo(stop - start, index, positions)
            slots = torch.arange(offset, offset + stop - start, device=device)[None]
            full = offset + stop - start == size
            closes = torch.tensor([full], device=device)
            pieces.append(Piece(call, slice(start, stop), slots, size, offset, closes, full))
            start = stop
        return cls(size, pieces, (past + length) % size, None)

    @classmethod
    def _cut(cls, sequence: SequenceInfo, size: int) -> "Segments":
        grid, length, device = ChunkGrid.build(sequence, size), sequence.num_tokens, sequence.index.device
        chunk, slot = grid.place // size, grid.place % size
        rows, columns = len(chunk), torch.arange(length, device=device)
        target = chunk if sequence.lengths is None else chunk.masked_fill(columns >= sequence.lengths[:, None], -1)
        numbers = torch.arange(grid.num_chunks, device=device)
        counts = (target[..., None] == numbers).sum(1)  # [B or 1, N]
        first = counts.cumsum(1) - counts
        longest = [min(size, length)] * grid.num_chunks if compiling() or length == 1 else counts.amax(0).tolist()
        pieces = []
        for n, count in enumerate(longest):
            own = torch.arange(count, device=device)
            taken = (first[:, n, None] + own).clamp(max=length - 1)
            begins = slot[:, :1] if n == 0 else torch.zeros_like(slot[:, :1])
            starts = None
            if grid.fresh is not None:
                starts = (own == 0) & grid.fresh[:, n, None]
            index, positions = (x.expand(rows, -1).gather(1, taken) for x in (sequence.index, sequence.positions))
            call = SequenceInfo(count, index, positions, lengths=counts[:, n], starts=starts)
            slots = (begins + own).clamp(max=size - 1)
            pieces.append(Piece(call, taken, slots, size, None, grid.closes[:, n], n < grid.closing))
        before = torch.tensor([0, *longest[:-1]], device=device).cumsum(0)
        place = before[chunk.clamp(max=grid.num_chunks - 1)] + slot - torch.where(chunk == 0, slot[:, :1], 0)
        last = (
            slot[:, -1:] if sequence.lengths is None else slot.gather(1, (sequence.lengths - 1).clamp(min=0)[:, None])
        )
        num_open = (last[:, 0] + 1) % size
        if sequence.lengths is not None:
            num_open = torch.where(sequence.lengths > 0, num_open, slot[:, 0])
        return cls(size, pieces, num_open, place.clamp(max=sum(longest) - 1))

    def join(self, outputs: list[Tensor]) -> Tensor:
        """`[B, L, ...]` of every piece as `[B, T, ...]`."""
        joined = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        return joined if self.place is None else joined.gather(1, _spread(self.place, joined, 1))

    def still_open(self, buffer: Tensor, dim: int = 1) -> Tensor:
        """What a buffer holds of the segment that is open behind the call, in C - 1 slots, 0 in empty ones."""
        size = self.size - 1
        if isinstance(self.num_open, int):
            shape = list(buffer.shape)
            shape[dim] = size - self.num_open
            return torch.cat([buffer.narrow(dim, 0, self.num_open), buffer.new_zeros(shape)], dim)
        held = torch.arange(size, device=buffer.device) < self.num_open[:, None]
        kept = buffer.narrow(dim, 0, size)
        return kept.masked_fill(~held.view(len(held), *[1] * (dim - 1), size, *[1] * (buffer.dim() - dim - 1)), 0)


def _spread(columns: Tensor, values: Tensor, dim: int) -> Tensor:
    """`[B or 1, L]` as an index of `values` along `dim`."""
    shape = list(values.shape)
    shape[dim] = columns.shape[1]
    columns = columns.view(len(columns), *[1] * (dim - 1), columns.shape[1], *[1] * (values.dim() - dim - 1))
    return columns.expand(shape)
