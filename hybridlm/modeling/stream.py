"""From the arguments of a call to the `SequenceInfo` of its layers.

Borders of documents come from `seq_idx`, else from `cu_seq_lens_*` (one row), else, without an attention mask, from
position ids that do not go on by one. The cache remembers where each row stands, so that a packed row may be cut
anywhere.

Shapes: B batch, T tokens of the call in the caller's layout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import Compaction, SequenceInfo, compiling

UNKNOWN = -2  # a position or segment that was never told: no border can be read from it


@dataclass
class RowState:
    """Where each row of a stream stands.

    Attributes:
        num_tokens: `[B]`, real tokens so far.
        doc_start: `[B]`, index of the first token of the open document.
        last_position: `[B]`, position id of the last real token.
        last_segment: `[B]`, `seq_idx` of the last real token.
        uniform: `num_tokens` when it is one number for all rows, known without reading a tensor.
        one_document: whether every row is still in its first document.
    """

    num_tokens: Tensor
    doc_start: Tensor
    last_position: Tensor
    last_segment: Tensor
    uniform: int | None = 0
    one_document: bool = True

    @classmethod
    def fresh(cls, batch_size: int, device: torch.device) -> "RowState":
        """Rows that have seen nothing."""
        zero = torch.zeros(batch_size, dtype=torch.long, device=device)
        return cls(zero, zero.clone(), zero - 1, zero + UNKNOWN)

    def tensors(self) -> tuple[Tensor, ...]:
        """What is known of each row alone."""
        return self.num_tokens, self.doc_start, self.last_position, self.last_segment


def current_mask(attention_mask: Tensor | dict | None, batch: int, num_tokens: int, num_past: int) -> Tensor | None:
    """The part of the caller's mask that speaks of this call's tokens, `[B, T]`, or `None` when all are real.

    Args:
        attention_mask: `[B, past + T]`, 1 at real tokens, or the dictionary that `create_masks_for_generate` made.
        batch: B.
        num_tokens: T.
        num_past: columns that earlier calls put into the cache.

    Raises:
        ValueError: The mask has another shape.
    """
    if attention_mask is None:
        return None
    if isinstance(attention_mask, dict):
        return attention_mask["token_mask"]
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: expected [batch, tokens], got {attention_mask.dim()} dimensions; masks of pairs of "
            "tokens are not supported, use seq_idx or position_ids for packed documents"
        )
    if compiling():
        return attention_mask[:, -num_tokens:].bool()
    if tuple(attention_mask.shape) != (batch, num_past + num_tokens):
        raise ValueError(
            f"attention_mask: expected shape {(batch, num_past + num_tokens)} ({num_past} cached and {num_tokens} new "
            f"tokens), got {tuple(attention_mask.shape)}"
        )
    real = attention_mask[:, num_past:].bool()
    return None if bool(real.all()) else real


def segments_from_lengths(
    cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None, num_tokens: int, batch: int
) -> Tensor | None:
    """`cu_seq_lens_*` of one row as document numbers `[1, T]`.

    A first document with more keys than queries goes on from the cache; it gets the number `UNKNOWN`.

    Raises:
        ValueError: More than one row, or borders that do not span the call.
    """
    if cu_seq_lens_q is None:
        return None
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q: describes one row, got a batch of {batch}; use seq_idx")
    borders = cu_seq_lens_q.long().reshape(-1)
    if not compiling() and (
        borders.numel() < 2 or borders[0] != 0 or borders[-1] != num_tokens or bool((borders.diff() < 0).any())
    ):
        raise ValueError(f"cu_seq_lens_q: must rise from 0 to {num_tokens}, got {borders.tolist()}")
    columns = torch.arange(num_tokens, device=borders.device)
    segments = torch.bucketize(columns, borders[1:-1], right=True)[None]
    if cu_seq_lens_k is not None and cu_seq_lens_k.numel() > 1:
        goes_on = cu_seq_lens_k.reshape(-1)[1] > borders[1]
        segments = torch.where(goes_on & (segments == 0), UNKNOWN, segments)
    return segments


def _breaks(positions: Tensor, last: Tensor, has_past: bool) -> Tensor:
    """`[B, T]`, True where a position does not follow the one before."""
    first = positions[:, :1] != last[:, None] + 1 if has_past else torch.zeros_like(positions[:, :1], dtype=torch.bool)
    first = first & (last[:, None] != UNKNOWN)
    return torch.cat([first, positions[:, 1:] != positions[:, :-1] + 1], dim=1)


def _changes(segments: Tensor, last: Tensor | None, has_past: bool) -> Tensor:
    """`[B, T]`, True where a document number differs from the one before; `last=None`: numbers begin anew."""
    if has_past and last is None:
        first = segments[:, :1] != UNKNOWN
    elif has_past:
        first = (segments[:, :1] != last[:, None]) & (last[:, None] != UNKNOWN)
    else:
        first = torch.zeros_like(segments[:, :1], dtype=torch.bool)
    return torch.cat([first, segments[:, 1:] != segments[:, :-1]], dim=1)


def _starts(
    positions: Tensor | None,
    segments: Tensor | None,
    lasting: bool,
    by_position: bool,
    rows: RowState,
    token_mask: Tensor | None,
) -> Tensor | None:
    """`[B, T]`, True where documents begin in this call, or `None` when none does.

    `lasting` says that document numbers mean the same in every call (`seq_idx`, not `cu_seq_lens_*`).
    """
    has_past = rows.uniform != 0
    if segments is not None:
        starts = _changes(segments, rows.last_segment if lasting else None, has_past)
        if not lasting and has_past and positions is not None:
            starts[:, 0] &= positions[:, 0] != rows.last_position + 1
    elif by_position and positions is not None and not compiling():
        starts = _breaks(positions, rows.last_position, has_past)
    else:
        return None
    if token_mask is not None:
        starts = starts & token_mask
    return starts if compiling() or bool(starts.any()) else None


def _check_borders(seq_idx: Tensor | None, lengths: Tensor | None, positions: Tensor | None) -> None:
    """Refuse borders that contradict each other."""
    if compiling():
        return
    if seq_idx is not None and lengths is not None:
        same = (seq_idx[:, 1:] != seq_idx[:, :-1]) == (lengths[:, 1:] != lengths[:, :-1])
        if not bool(same.all()):
            raise ValueError("seq_idx and cu_seq_lens_q: their document borders differ; give one, or make them agree")
    segments = seq_idx if seq_idx is not None else lengths
    if segments is not None and positions is not None:
        jump = positions[:, 1:] != positions[:, :-1] + 1
        if bool((jump & (segments[:, 1:] == segments[:, :-1])).any()):
            name = "seq_idx" if seq_idx is not None else "cu_seq_lens_q"
            raise ValueError(f"position_ids and {name}: a position restarts or jumps inside one document")


def build_sequence(
    batch: int,
    num_tokens: int,
    device: torch.device,
    rows: RowState,
    *,
    real: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    borders_from_positions: bool = False,
) -> tuple[SequenceInfo, Compaction | None, RowState]:
    """Describe one call.

    Args:
        batch: B.
        num_tokens: T.
        device: Where the tokens are.
        rows: Where each row stood before the call.
        real: `[B, T]`, True at real tokens; `None` when all are.
        position_ids: `[B or 1, T]`; counted from the start of each document when `None`.
        seq_idx: `[B or 1, T]`, document number of each token.
        cu_seq_lens_q: `[documents + 1]`, borders of the documents of one row.
        cu_seq_lens_k: the same with the cached keys counted in.
        borders_from_positions: whether positions that do not go on by one are borders.

    Returns:
        The description, the compaction (`None` when there are no pads), and where each row stands after the call.
    """
    lengths_idx = segments_from_lengths(cu_seq_lens_q, cu_seq_lens_k, num_tokens, batch)
    given = {"position_ids": position_ids, "seq_idx": seq_idx}
    for name, value in given.items():
        if value is not None:
            if value.dim() != 2 or value.shape[1] != num_tokens or value.shape[0] not in (1, batch):
                raise ValueError(f"{name}: expected shape {(batch, num_tokens)}, got {tuple(value.shape)}")
            given[name] = value.long().expand(batch, num_tokens)
    positions, seq_idx = given["position_ids"], given["seq_idx"]
    if real is None:
        _check_borders(seq_idx, lengths_idx, positions)
    segments = seq_idx if seq_idx is not None else lengths_idx

    compaction = token_mask = lengths = None
    if real is not None and num_tokens == 1:
        lengths, token_mask = real.sum(1), real
    elif real is not None:
        compaction = Compaction.from_mask(real)
        lengths = real.sum(1)
        num_tokens = compaction.num_tokens
        token_mask = torch.arange(num_tokens, device=device) < lengths[:, None]
        positions = None if positions is None else compaction.apply(positions)
        segments = None if segments is None else compaction.apply(segments.expand(batch, -1))
        if not compiling() and bool(token_mask.all()):
            token_mask = lengths = None

    starts = _starts(positions, segments, seq_idx is not None, borders_from_positions, rows, token_mask)
    numbers = segments if seq_idx is not None else None
    sequence, after = _describe(rows, num_tokens, positions, numbers, starts, token_mask, lengths)
    return sequence, compaction, after


def _describe(
    rows: RowState,
    num_tokens: int,
    positions: Tensor | None,
    numbers: Tensor | None,
    starts: Tensor | None,
    token_mask: Tensor | None,
    lengths: Tensor | None,
) -> tuple[SequenceInfo, RowState]:
    """Describe compacted tokens, and where each row stands after them."""
    index = rows.num_tokens[:, None] + torch.arange(num_tokens, device=rows.num_tokens.device)
    one_document = rows.one_document and starts is None
    doc_start = None
    if not one_document:
        doc_start = rows.doc_start[:, None].expand(index.shape)
        if starts is not None:
            doc_start = torch.maximum(torch.where(starts, index, -1).cummax(1).values, doc_start)
    if positions is None:
        positions = index if doc_start is None else index - doc_start
    after = _advance(rows, lengths, num_tokens, doc_start, positions, numbers, one_document)
    sequence = SequenceInfo(
        num_tokens=num_tokens,
        index=index,
        positions=positions,
        token_mask=token_mask,
        lengths=lengths,
        starts=starts,
        segment_ids=None if starts is None else starts.long().cumsum(1),
        seq_idx=numbers,
        doc_start=doc_start,
        num_past=None if rows.uniform == 0 else rows.num_tokens,
        uniform_past=rows.uniform,
        past_doc_start=None if rows.one_document else rows.doc_start,
    )
    return sequence, after


def select_tokens(
    sequence: SequenceInfo, taken: Tensor, rows: RowState, positions: Tensor | None = None
) -> tuple[SequenceInfo, Compaction | None, RowState]:
    """Describe the tokens of a call that enter a span.

    Documents are told apart by the index of their first token in the stream around the span, so that a border is seen
    even when the tokens at it do not enter.

    Args:
        sequence: The call.
        taken: `[B, T]`, True at tokens that enter; False at pads.
        rows: Where each row of the span stands.
        positions: `[B, T]`, position ids of tokens that enter; their own when `None`.

    Returns:
        As `build_sequence`; the compaction is `None` when all tokens keep their place.
    """
    batch, num_tokens = taken.shape
    compaction, token_mask, lengths = None, taken, taken.sum(1)
    everyone = not compiling() and bool(taken.all())
    if num_tokens > 1 and not everyone:
        compaction = Compaction.from_mask(taken)
        num_tokens = compaction.num_tokens
        token_mask = torch.arange(num_tokens, device=taken.device) < lengths[:, None]
        everyone = not compiling() and bool(token_mask.all())
    if everyone:
        token_mask = lengths = None

    def pick(values: Tensor | None) -> Tensor | None:
        return values if compaction is None or values is None else compaction.apply(values)

    positions = pick((sequence.positions if positions is None else positions).expand(batch, -1))
    one_document = rows.one_document and sequence.doc_start is None
    numbers = torch.zeros_like(positions) if sequence.doc_start is None else pick(sequence.doc_start)
    starts = None
    if not one_document:
        starts = _changes(numbers, rows.last_segment, rows.uniform != 0)
        starts = starts if token_mask is None else starts & token_mask
        starts = starts if compiling() or bool(starts.any()) else None
    inner, after = _describe(rows, num_tokens, positions, numbers, starts, token_mask, lengths)
    inner.token_ids, inner.inputs_embeds = pick(sequence.token_ids), pick(sequence.inputs_embeds)
    for name in ("attn_implementation", "use_cache", "need_weights", "journal"):
        setattr(inner, name, getattr(sequence, name))
    return inner, compaction, after


def _advance(
    rows: RowState,
    lengths: Tensor | None,
    num_tokens: int,
    doc_start: Tensor | None,
    positions: Tensor,
    segments: Tensor | None,
    one_document: bool,
) -> RowState:
    """Where each row stands after a call of `num_tokens` compacted tokens."""

    def last(values: Tensor | None, before: Tensor) -> Tensor:
        if values is None:
            return before
        values = values.expand(before.shape[0], -1)
        if lengths is None:
            return values[:, -1].clone()
        taken = values.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(lengths > 0, taken, before)

    uniform = None
    if lengths is None and rows.uniform is not None:
        uniform = rows.uniform + num_tokens
    return RowState(
        num_tokens=rows.num_tokens + (num_tokens if lengths is None else lengths),
        doc_start=last(doc_start, rows.doc_start),
        last_position=last(positions, rows.last_position),
        last_segment=last(segments, rows.last_segment),
        uniform=uniform,
        one_document=one_document,
    )
