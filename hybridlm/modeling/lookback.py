"""The last tokens before a call, in order, and attention that looks back over a bounded distance.

A state `[B, G, R, K]` ends with the last real token of each row, whatever the row's length; slots before its first
token hold zeros. So column c of the state followed by a call's own tokens lies R + t - c tokens before token t in every
row, and what a token sees follows from that distance and from its place in its document: no index needs to be kept.

Long calls are worked through in blocks of queries, each with the columns that it can reach.

Shapes: B batch, T new tokens, R remembered tokens, C columns of a block, G key-value heads, H query heads, K width.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .masks import SequenceInfo
from .precision import state_dtype

MAX_SCORES = 1 << 22  # of a block, over all rows and heads
BLOCKS = (64, 512)  # shortest and longest, if memory allows


def places(sequence: SequenceInfo) -> Tensor:
    """`[B or 1, T]`, how many tokens of its own document come before each token."""
    return sequence.index if sequence.doc_start is None else sequence.index - sequence.doc_start


def joined(past: Tensor | None, new: Tensor, sequence: SequenceInfo) -> Tensor:
    """`[B, G, R', K]` of the remembered tokens that there can be, and the call's own `[B, G, T, K]` behind them."""
    if past is None or sequence.uniform_past == 0:
        return new
    size = past.shape[2]
    known = size if sequence.uniform_past is None else min(size, sequence.uniform_past)
    return torch.cat([past[:, :, size - known :], new], dim=2)


def roll(past: Tensor | None, new: Tensor, size: int, sequence: SequenceInfo) -> Tensor:
    """`[B, G, size, K]`, the last `size` real tokens of each row after a call with `new` `[B, G, T, K]`."""
    batch, heads, length, width = new.shape
    if past is None:
        past = new.new_zeros(batch, heads, size, width)
    if sequence.lengths is None:
        if length >= size:  # a view would keep all of a long call alive
            return new[:, :, length - size :].clone(memory_format=torch.contiguous_format)
        return torch.cat([past[:, :, length:], new], dim=2)
    index = sequence.lengths[:, None] + torch.arange(size, device=new.device)  # [B, size]
    both = torch.cat([past, new], dim=2)
    return both.gather(2, index[:, None, :, None].expand(batch, heads, size, width))


class History:
    """All tokens of one row so far, for the plain loops of `forward_reference`.

    Attributes:
        tokens: What is kept of each token.
        start: Number of the first token of the open document.
    """

    def __init__(self, before: "History | None" = None) -> None:
        self.tokens: list[tuple[Tensor, ...]] = [] if before is None else list(before.tokens)
        self.start = 0 if before is None else before.start


def walk(histories: list[History], new: tuple[Tensor, ...], sequence: SequenceInfo) -> Iterator[tuple[int, int]]:
    """Go through the real tokens of a call one by one, and add each to the history of its row.

    Args:
        histories: One a row; they are changed.
        new: What is kept of each token, `[B, G, T, K]` each.
        sequence: The call.

    Yields:
        The row and the token.
    """
    for b, history in enumerate(histories):
        for t in range(sequence.num_tokens if sequence.lengths is None else int(sequence.lengths[b])):
            if sequence.starts is not None and bool(sequence.starts[b, t]):
                history.start = len(history.tokens)
            history.tokens.append(tuple(part[b, :, t] for part in new))
            yield b, t


def block_size(num_rows: int, reach: int) -> int:
    """Queries of a block in which each of `num_rows` rows and heads looks `reach` tokens back."""
    shortest, longest = BLOCKS
    return max(1, min(max(shortest, reach), longest, MAX_SCORES // (num_rows * max(reach, 1))))


def blocks(
    num_past: int, num_tokens: int, nearest: int, farthest: int, size: int, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cut a call into blocks of queries.

    Args:
        num_past: Columns before the call's own tokens.
        num_tokens: T.
        nearest: Smallest distance that any query looks back.
        farthest: Largest distance.
        size: Queries of a block.
        device: Where the distances are wanted.

    Yields:
        The queries, the columns that they reach, and the distances `[queries, C]` between them.
    """
    for start in range(0, num_tokens, size):
        stop = min(start + size, num_tokens)
        first = max(0, num_past + start - farthest)
        last = max(first, num_past + stop - nearest)
        query, column = torch.arange(start, stop, device=device), torch.arange(first, last, device=device)
        yield slice(start, stop), slice(first, last), num_past + query[:, None] - column


def seen(distance: Tensor, reach: Tensor, nearest: int = 0) -> Tensor:
    """`[B or 1, queries, C]`, True where a query that looks `reach` `[B or 1, queries]` tokens back sees a column."""
    return (distance >= nearest) & (distance <= reach[..., None])


def soft_weights(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible columns, in at least float32; 0 everywhere where none is visible."""
    wide = scores.to(state_dtype(scores.dtype))
    return wide.masked_fill(~visible, torch.finfo(wide.dtype).min).softmax(-1) * visible


def weigh(scores: Tensor, visible: Tensor, values: Tensor, always: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Weigh `values` by the softmax over visible columns; `always` are scores and values that no mask hides."""
    if always is None:
        return soft_weights(scores, visible).to(values.dtype) @ values
    count = always[0].shape[-1]
    visible = nn.functional.pad(visible, (count, 0), value=True)
    weights = soft_weights(torch.cat([always[0], scores], dim=-1), visible).to(values.dtype)
    return weights[..., :count] @ always[1] + weights[..., count:] @ values


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    sequence: SequenceInfo,
    always: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention over the last tokens of the own document.

    Args:
        query: `[B, H, T, K]`.
        key: `[B, G, R' + T, K]`, remembered tokens first.
        value: `[B, G, R' + T, K]`.
        window: Tokens that each sees, itself included.
        sequence: The call.
        always: Scores `[B, G, H / G, T, N]` and values `[B or 1, G, 1, N, K]` of what every query sees besides.

    Returns:
        `[B, H, T, K]`.
    """
    batch, heads, length, width = query.shape
    groups, reach = key.shape[1], places(sequence).clamp(max=window - 1)
    query = query.unflatten(1, (groups, heads // groups)) / math.sqrt(width)  # [B, G, H / G, T, K]
    key, value, outputs = key[:, :, None], value[:, :, None], []
    size = block_size(batch * heads, window)
    cuts = blocks(key.shape[3] - length, length, 0, window - 1, size, query.device)
    for queries, columns, distance in cuts:
        visible = seen(distance, reach[:, queries])[:, None, None]  # [B or 1, 1, 1, queries, C]
        scores = query[..., queries, :] @ key[..., columns, :].transpose(-1, -2)
        besides = None if always is None else (always[0][..., queries, :], always[1])
        outputs.append(weigh(scores, visible, value[..., columns, :], besides))
    return torch.cat(outputs, dim=-2).flatten(1, 2)
