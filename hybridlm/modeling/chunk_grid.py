"""Where the tokens of a call fall in chunks that are counted from the start of each row's document.

A chunk holds C successive tokens of one document. Pads and packing shift the borders from row to row, and a call may
begin inside a chunk: the tokens of that open chunk come from the state. So the tokens of a call are laid out as
`[B, N, C]`, N chunks of C slots, with the open chunk's tokens in front and empty slots behind the last token of a
document or row.

Shapes: B batch, T tokens, N chunks, C chunk size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import SequenceInfo, compiling, trailing


@dataclass
class ChunkGrid:
    """The layout of one call.

    Attributes:
        chunk_size: C.
        num_chunks: N.
        source: `[B or 1, N C]`, column of each slot in `[open tokens | tokens | one empty]`.
        place: `[B or 1, T]`, slot of each token.
        filled: `[B or 1, N C]`, True at slots with a token.
        fresh: `[B or 1, N]`, True where a document begins with this chunk; `None` when none does.
        closes: `[B or 1, N]`, True where the chunk is full, so that the memory moves on behind it.
        last: `[B or 1]`, chunk of each row's last token.
        closing: Chunks, counted from the first, of which a row's may be full; none behind them is.
        aligned: Whether all rows share one layout that is known without reading a tensor: then all those are full.
    """

    chunk_size: int
    num_chunks: int
    source: Tensor
    place: Tensor
    filled: Tensor
    fresh: Tensor | None
    closes: Tensor
    last: Tensor
    closing: int
    aligned: bool

    @classmethod
    def build(cls, sequence: SequenceInfo, chunk_size: int) -> "ChunkGrid":
        """Lay out a call; layers with the same chunk size share the result."""
        memo = ("chunk_grid", chunk_size)
        if memo not in sequence.memo:
            sequence.memo[memo] = cls._build(sequence, chunk_size)
        return sequence.memo[memo]

    @classmethod
    def _build(cls, sequence: SequenceInfo, size: int) -> "ChunkGrid":
        length, device = sequence.num_tokens, sequence.index.device
        past = sequence.uniform_past
        aligned = sequence.lengths is None and sequence.doc_start is None and past is not None
        if aligned:
            fill = torch.tensor([past % size], device=device)
            slot = (past + torch.arange(length, device=device)[None]) % size
            num_chunks = (past % size + length + size - 1) // size
        else:
            fill, slot = cls._slots(sequence, size)
        borders = slot == 0
        chunk = borders.long().cumsum(1) - borders[:, :1].long()
        real = None if sequence.lengths is None else torch.arange(length, device=device) < sequence.lengths[:, None]
        if not aligned:
            if compiling():
                num_chunks = 1 if length == 1 else (2 * size + length if sequence.starts is None else length)
            else:
                num_chunks = int((chunk if real is None else chunk.masked_fill(~real, 0)).max()) + 1
        place = chunk * size + slot
        rows = max(len(x) for x in (place, fill, real, sequence.starts) if x is not None)
        width = num_chunks * size
        place = place.expand(rows, -1)
        # empty slots read the column behind the last token, pads are written to a slot that is cut off
        columns = torch.arange(length, device=device).expand(rows, -1) + size - 1
        target = place if real is None else torch.where(real, place, width)
        source = torch.full((rows, width + 1), size - 1 + length, dtype=torch.long, device=device)
        source = source.scatter(1, target, columns)[:, :width]
        first = torch.arange(size - 1, device=device).expand(rows, -1)
        goes_on = first < fill[:, None]
        if sequence.starts is not None:
            goes_on = goes_on & ~sequence.starts[:, :1].expand(rows, 1)
        head = torch.where(goes_on, first, source[:, : size - 1])
        source = torch.cat([head, source[:, size - 1 :]], dim=1)
        filled = source < size - 1 + length
        fresh = None
        if sequence.starts is not None:
            starts = sequence.starts if real is None else sequence.starts & real
            fresh = torch.zeros(rows, num_chunks + 1, dtype=torch.bool, device=device)
            where = torch.where(starts.expand(rows, -1), chunk.expand(rows, -1), num_chunks)
            fresh = fresh.scatter(1, where, True)[:, :num_chunks]
        closes = filled.view(rows, num_chunks, size).all(-1)
        last = (chunk if real is None else chunk.masked_fill(~real, 0)).amax(1).expand(rows)
        if aligned:
            closing = (past % size + length) // size
        elif compiling():
            closing = num_chunks
        else:  # a chunk that is not full may lie before one that is, at the end of a document
            closing = int((closes.any(0) * torch.arange(1, num_chunks + 1, device=device)).max())
        return cls(size, num_chunks, source, place, filled, fresh, closes, last, closing, aligned)

    @staticmethod
    def _slots(sequence: SequenceInfo, size: int) -> tuple[Tensor, Tensor]:
        """Tokens of the open chunk `[B]`, and each token's slot in its chunk `[B or 1, T]`."""
        zero = torch.zeros(1, dtype=torch.long, device=sequence.index.device)
        past = zero if sequence.num_past is None else sequence.num_past
        start = zero if sequence.past_doc_start is None else sequence.past_doc_start
        doc_start = 0 if sequence.doc_start is None else sequence.doc_start
        return (past - start) % size, (sequence.index - doc_start) % size

    def lay_out(self, tokens: Tensor, before: Tensor | None) -> Tensor:
        """`[B, T, ...]` as `[B, N, C, ...]`, 0 in empty slots; `before` `[B, C - 1, ...]` is the open chunk."""
        batch, rest = tokens.shape[0], tokens.shape[2:]
        if before is None:
            before = tokens.new_zeros(batch, self.chunk_size - 1, *rest)
        padded = torch.cat([before, tokens, tokens.new_zeros(batch, 1, *rest)], dim=1)
        return self._gather(padded, self.source).view(batch, self.num_chunks, self.chunk_size, *rest)

    def where_full(self, chunk: int, after: Tensor | None, before: Tensor | None) -> Tensor | None:
        """`after` `[B, ...]` in rows whose chunk is full, else `before`; `None` stays `None`."""
        if after is None or self.aligned:
            return after
        return torch.where(self.closes[:, chunk].view(-1, *[1] * (after.dim() - 1)), after, before)

    def take(self, slots: Tensor) -> Tensor:
        """`[B, N, C, ...]` as `[B, T, ...]`: what stands at each token's slot."""
        return self._gather(slots.flatten(1, 2), self.place.clamp(max=self.num_chunks * self.chunk_size - 1))

    def still_open(self, slots: Tensor) -> Tensor:
        """`[B, C - 1, ...]`, the tokens of `[B, N, C, ...]` whose chunk is not full after the call, 0 elsewhere."""
        size = self.chunk_size
        index = self.last[:, None] * size + torch.arange(size - 1, device=slots.device)
        is_open = ~self.closes.gather(1, self.last[:, None]) & self.filled.gather(1, index)
        kept = self._gather(slots.flatten(1, 2), index)
        return kept.masked_fill(~trailing(is_open, kept), 0)

    @staticmethod
    def _gather(values: Tensor, columns: Tensor) -> Tensor:
        if len(columns) == 1:
            return values.index_select(1, columns[0])
        return values.gather(1, trailing(columns, values).expand(-1, -1, *values.shape[2:]))
