"""What a layer knows about the tokens of one call: which are real, where documents begin, what each may attend to.

Rows are compacted before the layers run: real tokens first and in order, pads last. Left padding, pads inside a cached
stream and right padding are then one case, and the *index* of a token, the number of real tokens before it in its row,
names it in every call, whatever the layout the caller used.

Shapes: B batch, T query tokens, S key tokens.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


def compiling() -> bool:
    """Whether the call is being traced, so that tensor values cannot be read."""
    return torch.compiler.is_compiling()


@dataclass
class SequenceInfo:
    """The tokens of one call, as every part of a layer sees them.

    Attributes:
        num_tokens: T.
        index: `[B or 1, T]`, number of real tokens before each token in its row, earlier calls included.
        positions: `[B or 1, T]`, position ids.
        token_mask: `[B, T]`, True at real tokens, a prefix of every row; `None` when all are real.
        lengths: `[B]`, real tokens of each row in this call; `None` when all are real.
        starts: `[B, T]`, True at the first token of each document that begins here; `None` when none does.
        segment_ids: `[B, T]`, number of the document inside this call's row; `None` when there is one a row.
        seq_idx: `[B, T]`, the caller's document numbers; `None` when none were given.
        doc_start: `[B, T]`, index of the first token of each token's document; `None` when it is 0 everywhere.
        num_past: `[B]`, real tokens of each row in earlier calls; `None` without a past.
        uniform_past: the same number when it is one for all rows and known without reading a tensor.
        past_doc_start: `[B]`, index of the first token of the document that was open when the call began.
        token_ids: `[B, T]`, or `None` when the model was given embeddings.
        inputs_embeds: `[B, T, D]`.
        attn_implementation: name in transformers' attention interface.
        use_cache: whether the state after this call is wanted.
        need_weights: whether attention weights are recorded in this call.
        promote: whether cache entries move their checkpoint forward before this call (see `cache.py`).
        parts: the call cut in two, when the cache needs a checkpoint inside it.
        passage: how the tokens of this call entered the innermost span around the layer; `None` outside of spans.
        journal: what the spans and layers of this call did (see `spans.py`).
    """

    num_tokens: int
    index: Tensor
    positions: Tensor
    token_mask: Tensor | None = None
    lengths: Tensor | None = None
    starts: Tensor | None = None
    segment_ids: Tensor | None = None
    seq_idx: Tensor | None = None
    doc_start: Tensor | None = None
    num_past: Tensor | None = None
    uniform_past: int | None = 0
    past_doc_start: Tensor | None = None
    token_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attn_implementation: str = "sdpa"
    use_cache: bool = False
    need_weights: bool = False
    promote: bool = False
    parts: "list[SequenceInfo] | None" = None
    passage: Any = None
    journal: Any = None
    memo: dict = field(default_factory=dict, repr=False)

    @property
    def need_trace(self) -> bool:
        """Whether the traces of memories are recorded in this call."""
        return self.journal is not None and self.journal.traced

    @property
    def num_rows(self) -> int:
        """B."""
        return self.index.shape[0]

    def visible(self, key_index: Tensor, window: int | None = None, num_sinks: int = 0) -> Tensor:
        """Which keys each query may attend to.

        Args:
            key_index: `[B or 1, S]`, index of the token behind each key; negative for an empty slot.
            window: number of keys a query sees, itself included; `None` for all.
            num_sinks: first tokens of its document that a query sees beyond the window.

        Returns:
            `[B or 1, 1, T, S]`, True where visible.
        """
        query, key = self.index[:, :, None], key_index[:, None, :]
        first = 0 if self.doc_start is None else self.doc_start[:, :, None]
        mask = (key <= query) & (key >= first)
        if window is not None:
            near = key > query - window
            mask = mask & (near | (key - first < num_sinks) if num_sinks else near)
        return mask[:, None]

    def narrow(self, start: int, stop: int) -> "SequenceInfo":
        """The same call restricted to compacted tokens `[start, stop)`; what came before them is past."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, start:stop]

        batch = self.index.shape[0] if self.lengths is None else self.lengths.shape[0]
        lengths = None if self.lengths is None else (self.lengths - start).clamp(0, stop - start)
        before = start if self.lengths is None else self.lengths.clamp(max=start)
        zero = torch.zeros(batch, dtype=torch.long, device=self.index.device)
        past_doc_start = self.past_doc_start
        if start and self.doc_start is not None:
            last = torch.as_tensor(before, device=zero.device).expand(batch) - 1
            past_doc_start = self.doc_start.gather(1, last.clamp(min=0)[:, None])[:, 0]
        segment_ids = cut(self.segment_ids)
        return replace(
            self,
            num_tokens=stop - start,
            index=cut(self.index),
            positions=cut(self.positions),
            token_mask=cut(self.token_mask),
            lengths=lengths,
            starts=cut(self.starts),
            segment_ids=None if segment_ids is None else segment_ids - segment_ids[:, :1],
            seq_idx=cut(self.seq_idx),
            doc_start=cut(self.doc_start),
            num_past=(zero if self.num_past is None else self.num_past) + before,
            uniform_past=None if self.uniform_past is None or self.lengths is not None else self.uniform_past + start,
            past_doc_start=past_doc_start,
            token_ids=cut(self.token_ids),
            inputs_embeds=cut(self.inputs_embeds),
            parts=None,
            promote=self.promote and start == 0,
            memo={},
        )

    def to(self, device: torch.device, **kwargs: bool) -> "SequenceInfo":
        """The same on another device, made once a device; accelerate calls this between layers."""
        if self.index.device == torch.device(device):
            return self
        if ("device", device) not in self.memo:
            moved = {f.name: getattr(self, f.name) for f in fields(self)}
            moved = {name: v.to(device, **kwargs) for name, v in moved.items() if isinstance(v, Tensor)}
            parts = None if self.parts is None else [part.to(device, **kwargs) for part in self.parts]
            self.memo["device", device] = replace(self, **moved, parts=parts, memo={})
        return self.memo["device", device]

    def shorten(self, removed: Tensor) -> "SequenceInfo":
        """The same call after `removed` `[B]` real tokens were taken from the end of each row; they become pads."""
        lengths = torch.full_like(removed, self.num_tokens) if self.lengths is None else self.lengths
        lengths = lengths - removed
        mask = torch.arange(self.num_tokens, device=removed.device) < lengths[:, None]
        return replace(self, lengths=lengths, token_mask=mask, parts=None, memo={})

    def head(self, num_tokens: int) -> "SequenceInfo":
        """The same call without the tokens after the first `num_tokens` of every row."""
        shorter = self.narrow(0, num_tokens)
        if shorter.lengths is not None and not compiling() and bool((shorter.lengths == num_tokens).all()):
            shorter.lengths = shorter.token_mask = None
        return shorter


def plain_sequence(hidden_states: Tensor) -> SequenceInfo:
    """One document a row, no pads, no past."""
    batch, length = hidden_states.shape[:2]
    index = torch.arange(length, device=hidden_states.device).expand(batch, -1)
    return SequenceInfo(num_tokens=length, index=index, positions=index, use_cache=True)


def join(calls: list[SequenceInfo]) -> SequenceInfo:
    """Successive calls without pads as one call."""

    def cat(name: str) -> Tensor | None:
        values = [getattr(call, name) for call in calls]
        if all(value is None for value in values):
            return None
        rows = max(call.index.shape[0] for call in calls)
        filled = [_fill(name, call, value) for call, value in zip(calls, values, strict=True)]
        return torch.cat([value.expand(rows, -1) for value in filled], 1)

    starts = cat("starts")
    return replace(
        calls[0],
        num_tokens=sum(call.num_tokens for call in calls),
        index=cat("index"),
        positions=cat("positions"),
        starts=starts,
        segment_ids=None if starts is None else starts.long().cumsum(1),
        seq_idx=None,
        doc_start=cat("doc_start"),
        token_ids=None,
        inputs_embeds=None,
        parts=None,
        promote=False,
        memo={},
    )


def _fill(name: str, call: SequenceInfo, value: Tensor | None) -> Tensor:
    if value is not None:
        return value
    dtype = torch.bool if name == "starts" else torch.long
    return torch.zeros(1, call.num_tokens, dtype=dtype, device=call.index.device)


@dataclass
class Compaction:
    """The move of real tokens to the front of every row, and its inverse.

    Attributes:
        order: `[B, T']`, source column of each compacted token; `None` when real tokens were already first.
        inverse: `[B, T]`, compacted place of each column.
        real: `[B, T]`, True at real tokens, in the caller's layout.
        num_tokens: T', tokens of the longest row.
    """

    order: Tensor | None
    inverse: Tensor
    real: Tensor
    num_tokens: int

    @classmethod
    def from_mask(cls, real: Tensor) -> "Compaction":
        """Plan the move for a mask `[B, T]`."""
        lengths = real.sum(1)
        width = real.shape[1]
        if compiling():
            already, num_tokens = False, width
        else:
            num_tokens = max(int(lengths.max()), 1)
            already = bool((real == (torch.arange(width, device=real.device) < lengths[:, None])).all())
        order = None if already else torch.argsort((~real).to(torch.int8), dim=1, stable=True)[:, :num_tokens]
        inverse = (real.long().cumsum(1) - 1).clamp(min=0)
        return cls(order, inverse, real, num_tokens)

    def apply(self, values: Tensor) -> Tensor:
        """`[B, T, ...]` to `[B, T', ...]`."""
        if self.order is None:
            return values[:, : self.num_tokens]
        return _gather(values, self.order)

    def carry(self, values: Tensor) -> Tensor:
        """`[B, T']` to `[B, T]`; a pad gets the value of the real token before it, or of the first."""
        return _gather(values, self.inverse)

    def restore(self, values: Tensor, dim: int = 1) -> Tensor:
        """`[B, T', ...]` to `[B, T, ...]`, 0 at pads; `dim` is where the tokens are."""
        values = values.movedim(dim, 1)
        restored = _gather(values, self.inverse)
        return restored.masked_fill(~trailing(self.real, values), 0).movedim(1, dim)


def _gather(values: Tensor, columns: Tensor) -> Tensor:
    if values.shape[0] != columns.shape[0]:
        values = values.expand(columns.shape[0], *values.shape[1:])
    return values.gather(1, trailing(columns, values).expand(-1, -1, *values.shape[2:]))


def trailing(tokens: Tensor, like: Tensor) -> Tensor:
    """Something of each token, `[B, T]`, with as many dimensions of 1 behind as `like` `[B, T', ...]` has."""
    return tokens.reshape(*tokens.shape, *[1] * (like.dim() - 2))
