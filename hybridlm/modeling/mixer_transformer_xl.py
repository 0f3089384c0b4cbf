"""Transformer-XL attention: a segment sees itself and the last tokens before it, by distance and content.

Shapes: B batch, T new tokens, D hidden size, H heads, K head width, S segment size, M memory size, C columns.
Reference: Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv:1901.02860,
sections 3.2 and 3.3.
Differs: segments are counted in real tokens from the start of each document and not in calls, so that any split gives
the same. The memory is kept as keys and values and not as the layer's inputs: both give the same outputs, but from
inputs every decoded token would project S + M tokens anew, which costs far more than twice the bytes. With it the
border of the gradient moves from the layer's input to its keys and values: `k_proj` and `v_proj` learn from a token's
use in its own segment, and not from its use as memory. Position ids are not read: distances are counted in tokens of
the document.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .heads import check_heads, merge_heads, split_heads
from .lookback import History, block_size, blocks, joined, places, roll, seen, soft_weights, walk
from .masks import SequenceInfo, plain_sequence


@dataclass
class LookbackState:
    """Keys and values `[B, H, M + S - 1, K]` of the last tokens, right-aligned (see `lookback.py`)."""

    keys: Tensor
    values: Tensor


def sinusoids(num_distances: int, size: int, like: Tensor) -> Tensor:
    """`[num_distances, size]`, the encodings of the distances `num_distances - 1` down to 0."""
    wide = torch.promote_types(like.dtype, torch.float32)
    distance = torch.arange(num_distances - 1, -1, -1, device=like.device, dtype=wide)
    rates = 10000.0 ** -(torch.arange(0, size, 2, device=like.device, dtype=wide) / size)
    angles = distance[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :size].to(like.dtype)


def rel_shift(scores: Tensor) -> Tensor:
    """Move scores by distance to the columns that lie at it.

    Args:
        scores: `[..., T, C]`, column m for distance C - 1 - m.

    Returns:
        `[..., T, C]`: query t, whose own column is C - T + t, against every column up to that one; the rest is noise.
    """
    *lead, num_queries, num_columns = scores.shape
    padded = nn.functional.pad(scores, (1, 0)).reshape(*lead, num_columns + 1, num_queries)
    return padded[..., 1:, :].reshape(*lead, num_queries, num_columns)


class TransformerXLMixer(nn.Module):
    """Attend to the own segment and the memory before it, with relative positions.

    A token that is number p of its document, in segment n = p // S, sees the tokens from n S - M to p of its document.

    Args:
        hidden_size: Width D of the residual stream.
        num_heads: Heads H.
        head_dim: Width K of a head; D / H by default.
        segment_size: Tokens S of a segment.
        memory_size: Tokens M before a segment that it sees; S by default.
        dropout: Probability of dropping an attention weight in training.
        detach_memory: Whether no gradient flows into what a segment sees of the ones before it, as in the paper.
    """

    state_type = LookbackState

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        segment_size: int = 128,
        memory_size: int | None = None,
        dropout: float = 0.0,
        detach_memory: bool = True,
    ) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads, num_heads, head_dim, dropout)
        if segment_size < 1:
            raise ValueError(f"segment_size={segment_size} must be at least 1")
        if memory_size is not None and memory_size < 0:
            raise ValueError(f"memory_size={memory_size} must be at least 0, or null for segment_size")
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.segment_size = segment_size
        self.memory_size = segment_size if memory_size is None else memory_size
        self.farthest = self.memory_size + segment_size - 1
        self.dropout, self.detach_memory = dropout, detach_memory
        width = num_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.r_weight = nn.Parameter(torch.empty(num_heads, self.head_dim, hidden_size))  # W_R of the paper
        self.content_bias = nn.Parameter(torch.empty(num_heads, self.head_dim))  # u
        self.position_bias = nn.Parameter(torch.empty(num_heads, self.head_dim))  # v
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Start what is no linear layer: the projection of distances and the two biases."""
        for parameter in (self.r_weight, self.content_bias, self.position_bias):
            init.normal_(parameter, mean=0.0, std=std)

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape a row and type of the state, whatever the number of tokens."""
        shape = (self.num_heads, self.farthest, self.head_dim)
        return {"keys": (shape, dtype), "values": (shape, dtype)}

    def state_size(self, num_tokens: int) -> int:
        """Elements a row keeps."""
        return sum(math.prod(shape) for shape, _ in self.state_spec(num_tokens, torch.float32).values())

    def _project(self, hidden_states: Tensor) -> list[Tensor]:
        """Queries, keys and values, `[B, H, T, K]` each."""
        return [split_heads(p(hidden_states), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)]

    def forward(
        self, hidden_states: Tensor, state: LookbackState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, LookbackState | None]:
        """Map `[B, T, D]` to `[B, T, D]`; also return the last keys and values."""
        sequence = plain_sequence(hidden_states) if sequence is None else sequence
        query, key, value = self._project(hidden_states)
        past_keys, past_values = (None, None) if state is None else (state.keys, state.values)
        output = self._attend(query, joined(past_keys, key, sequence), joined(past_values, value, sequence), sequence)
        if sequence.use_cache:
            size = self.farthest
            state = LookbackState(roll(past_keys, key, size, sequence), roll(past_values, value, size, sequence))
        return self.o_proj(merge_heads(output)), state

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, sequence: SequenceInfo) -> Tensor:
        """`[B, H, T, K]`, block by block; key and value have the remembered tokens in front."""
        batch, heads, length, width = query.shape
        num_past, place = key.shape[2] - length, places(sequence)
        since = place % self.segment_size  # tokens of the own segment before each token
        reach = torch.minimum(place, since + self.memory_size)
        size = block_size(batch * heads, self.farthest + 1)
        most = min(num_past + length, self.farthest + min(size, length))
        encodings = self._encodings(most, query, sequence)
        # few queries are cheaper to bring to the distances than many distances to the heads: (q W) R = q (W R)
        few = batch * length <= width
        table = encodings if few else torch.einsum("hkd,cd->hck", self.r_weight, encodings)
        outputs = []
        for queries, columns, distance in blocks(num_past, length, 0, self.farthest, size, query.device):
            visible = seen(distance, reach[:, queries])[:, None]  # [B or 1, 1, queries, C]
            recent = None
            if self.detach_memory and torch.is_grad_enabled():
                recent = seen(distance, since[:, queries])[:, None]
            asked, rows = query[:, :, queries], table[..., most - distance.shape[1] :, :]
            by_distance = asked + self.position_bias[:, None]
            by_distance = torch.einsum("bhtk,hkd->bhtd", by_distance, self.r_weight) if few else by_distance
            scores = self._content_scores(asked, key[:, :, columns], recent)
            scores = (scores + rel_shift(by_distance @ rows.transpose(-1, -2))) / math.sqrt(width)
            weights = soft_weights(scores, visible).to(value.dtype)
            weights = nn.functional.dropout(weights, self.dropout, self.training)
            outputs.append(self._read(weights, value[:, :, columns], recent))
        return torch.cat(outputs, dim=2)

    def _encodings(self, num_distances: int, like: Tensor, sequence: SequenceInfo) -> Tensor:
        """The `sinusoids` of a call, shared by its layers."""
        memo = ("sinusoids", num_distances, self.hidden_size, like.dtype)
        if memo not in sequence.memo:
            sequence.memo[memo] = sinusoids(num_distances, self.hidden_size, like)
        return sequence.memo[memo]

    def _content_scores(self, query: Tensor, key: Tensor, recent: Tensor | None) -> Tensor:
        query = query + self.content_bias[:, None]
        scores = query @ key.transpose(-1, -2)
        return scores if recent is None else torch.where(recent, scores, query @ key.detach().transpose(-1, -2))

    @staticmethod
    def _read(weights: Tensor, value: Tensor, recent: Tensor | None) -> Tensor:
        if recent is None:
            return weights @ value
        return (weights * recent) @ value + (weights * ~recent) @ value.detach()

    def forward_reference(
        self, hidden_states: Tensor, state: Any = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, list[History]]:
        """Attend token by token and row by row; one more distance is encoded for each token until all are.

        The state is the `History` of every row, with `(key, value)` `[H, K]` of its tokens.
        """
        sequence = plain_sequence(hidden_states) if sequence is None else sequence
        query, key, value = self._project(hidden_states)
        histories = [History(before) for before in state or [None] * query.shape[0]]
        output, table = torch.zeros_like(query), []
        for b, t in walk(histories, (key, value), sequence):
            place = len(histories[b].tokens) - 1 - histories[b].start
            for distance in range(len(table), min(place, self.farthest) + 1):
                encoding = sinusoids(distance + 1, self.hidden_size, query)[0]
                table.append((self.r_weight.flatten(0, 1) @ encoding[:, None]).view(self.num_heads, -1))
            output[b, :, t] = self._attend_one(query[b, :, t], histories[b].tokens, place, table)
        return self.o_proj(merge_heads(output)), histories

    def _attend_one(self, query: Tensor, tokens: list, place: int, table: list[Tensor]) -> Tensor:
        since = place % self.segment_size
        distances = range(min(place, since + self.memory_size) + 1)
        pairs = [tokens[len(tokens) - 1 - distance] for distance in distances]
        if self.detach_memory:
            pairs = [(k, v) if d <= since else (k.detach(), v.detach()) for d, (k, v) in enumerate(pairs)]
        keys, values = (torch.stack(part, dim=1) for part in zip(*pairs, strict=True))  # [H, seen, K]
        encoded = torch.stack([table[distance] for distance in distances], dim=1)
        content = keys @ (query + self.content_bias)[..., None]  # [H, seen, 1]
        position = encoded @ (query + self.position_bias)[..., None]
        weights = ((content + position) / math.sqrt(self.head_dim)).softmax(1)
        return (weights.transpose(1, 2) @ values)[:, 0]
