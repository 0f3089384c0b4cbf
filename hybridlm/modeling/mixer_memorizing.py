"""Memorizing attention: a local window, and the nearest keys in a long store of what has left it.

Shapes: B batch, T new tokens, D hidden size, H query heads, G key-value heads, K head width, W window, M memory size,
C columns of a block, N chosen keys.
Reference: Wu et al. 2022, "Memorizing Transformers", arXiv:2203.08913, section 3.
Differs: a key enters the store when it leaves its reader's window, token by token, and not a segment at a time after
the segment was read: nothing is seen twice, and any split of a sequence gives the same. The store is of the open
document alone. Where it is empty its output is 0 and the gate is closed: the local output stands alone. The look-up
compares normalised queries and keys that carry no position, whatever `position` does to the local ones, so that the
rotation never hides an old key; a learned scale per head, the inverse of a temperature, makes scores of them.
Similarities are compared in steps a little above the rounding of their type; of equal ones the latest keys are chosen,
wherever they are kept.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import initialization as init

from .heads import check_heads, merge_heads, split_heads
from .lookback import (
    History,
    block_size,
    blocks,
    joined,
    places,
    roll,
    seen,
    soft_weights,
    walk,
    window_attention,
)
from .masks import SequenceInfo, plain_sequence
from .positions import build_position
from .precision import state_dtype, without_autocast


@dataclass
class MemorizingState:
    """The last tokens, right-aligned (see `lookback.py`).

    Attributes:
        keys: `[B, G, W - 1, K]`, as the window reads them, with their positions.
        memory_keys: `[B, G, W + M - 1, K]`, normalised and without positions; those of the window are on their way in.
        values: `[B, G, W + M - 1, K]`.
    """

    keys: Tensor
    memory_keys: Tensor
    values: Tensor


def nearness(similarity: Tensor) -> Tensor:
    """Similarities between -1 and 1 as whole numbers, in steps above the error of their products."""
    bits = 40 if similarity.dtype == torch.float64 else 18
    return (similarity * 2.0**bits).round().long()


@torch.no_grad()
def nearest(similarity: Tensor, visible: Tensor, count: int) -> Tensor:
    """The columns of the `count` most similar keys.

    Args:
        similarity: `[..., T, C]`, columns in the order of their tokens.
        visible: `[B or 1, 1, 1, T, C]`, the others come last.
        count: N.

    Returns:
        `[..., T, N]`; of equal keys the latest ones.
    """
    num_columns = similarity.shape[-1]
    rank = nearness(similarity) * num_columns + torch.arange(num_columns, device=similarity.device)  # no two are equal
    return rank.masked_fill(~visible, torch.iinfo(rank.dtype).min).topk(count, dim=-1).indices


class MemorizingMixer(nn.Module):
    """Mix the output of a local window with that of the nearest keys before it, by a learned gate per head.

    Args:
        hidden_size: Width D of the residual stream.
        num_heads: Query heads H.
        num_kv_heads: Key-value heads G; H by default.
        head_dim: Width K of a head; D / H by default.
        position: Position encoding inside the window, `{"name": "none"}` or `{"name": "rope", ...}`.
        window: Tokens W that a token sees locally, itself included.
        memory_size: Tokens M that the store holds, the last ones that left the window.
        top_k: Keys of the store that each head of a token reads.
        detach_memory: Whether no gradient flows into the store, as in the paper.
        gate_init: Logit of the share of the store in the output, at the start.
        scale_init: Factor on the similarities at the start; sqrt(K) by default.
    """

    state_type = MemorizingState

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        position: dict | None = None,
        window: int = 512,
        memory_size: int = 8192,
        top_k: int = 32,
        detach_memory: bool = True,
        gate_init: float = 0.0,
        scale_init: float | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(hidden_size, num_heads, num_kv_heads, head_dim)
        for name, value in (("window", window), ("memory_size", memory_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 1 <= top_k <= memory_size:
            raise ValueError(f"top_k={top_k} must lie between 1 and memory_size={memory_size}")
        if scale_init is not None and scale_init <= 0:
            raise ValueError(f"scale_init={scale_init} must be positive")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.window, self.memory_size, self.top_k = window, memory_size, top_k
        self.detach_memory, self.gate_init = detach_memory, gate_init
        self.scale_init = math.sqrt(self.head_dim) if scale_init is None else scale_init
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.position = build_position(position, self.head_dim)
        self.gate = nn.Parameter(torch.empty(num_heads))
        self.log_scale = nn.Parameter(torch.empty(num_heads))
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Start the gates and the scales; nothing is random."""
        init.constant_(self.gate, self.gate_init)
        init.constant_(self.log_scale, math.log(self.scale_init))

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape a row and type of the state, whatever the number of tokens."""
        slots = {"keys": self.window - 1, "memory_keys": self._num_slots, "values": self._num_slots}
        return {name: ((self.num_kv_heads, count, self.head_dim), dtype) for name, count in slots.items()}

    def state_size(self, num_tokens: int) -> int:
        """Elements a row keeps."""
        return sum(math.prod(shape) for shape, _ in self.state_spec(num_tokens, torch.float32).values())

    @property
    def _num_slots(self) -> int:
        return self.window + self.memory_size - 1

    def _project(self, hidden_states: Tensor, sequence: SequenceInfo) -> tuple[Tensor, ...]:
        """Local queries, keys and values, then queries and keys of the look-up, `[B, H or G, T, K]` each."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (split_heads(p(hidden_states), self.head_dim) for p in projections)
        wide = state_dtype(hidden_states.dtype)
        memory_query, memory_key = normalize(query.to(wide), dim=-1), normalize(key.to(wide), dim=-1)
        query, key = self.position(query, key, sequence)
        return query, key, value, memory_query, memory_key.to(hidden_states.dtype)

    def forward(
        self, hidden_states: Tensor, state: MemorizingState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, MemorizingState | None]:
        """Map `[B, T, D]` to `[B, T, D]`; also return the last keys and values."""
        sequence = plain_sequence(hidden_states) if sequence is None else sequence
        query, key, value, memory_query, memory_key = self._project(hidden_states, sequence)
        past = (None,) * 3 if state is None else (state.keys, state.memory_keys, state.values)
        new = (key, memory_key, value)
        keys, memory_keys, values = (joined(*pair, sequence) for pair in zip(past, new, strict=True))
        near = values[:, :, values.shape[2] - keys.shape[2] :]
        local = window_attention(query, keys, near, self.window, sequence)
        with without_autocast(hidden_states):
            memory = self._look_up(memory_query, memory_keys, values, sequence)
            output = self._mix(local, memory, places(sequence) >= self.window)
        if sequence.use_cache:
            sizes = (self.window - 1, self._num_slots, self._num_slots)
            state = MemorizingState(*(roll(*pair, sequence) for pair in zip(past, new, sizes, strict=True)))
        return self.o_proj(merge_heads(output.to(value.dtype))), state

    def _mix(self, local: Tensor, memory: Tensor, stored: Tensor) -> Tensor:
        """Mix `[B, H, T, K]` by the gate, which is closed where nothing is `stored` `[B or 1, T]`."""
        share = self.gate.to(memory.dtype).sigmoid()[:, None, None] * stored[:, None, :, None]
        return local + share * (memory - local)

    def _look_up(self, query: Tensor, key: Tensor, value: Tensor, sequence: SequenceInfo) -> Tensor:
        """What each query `[B, H, T, K]` finds in the store, `[B, H, T, K]`; keys and values have the past in front."""
        batch, heads, length, _ = query.shape
        groups, num_past = key.shape[1], key.shape[2] - length
        if self.detach_memory:
            key, value = key.detach(), value.detach()
        reach = places(sequence).clamp(max=self._num_slots)
        scale = self.log_scale.to(query.dtype).exp().view(groups, -1, 1, 1)  # [G, H / G, 1, 1]
        query, key = query.unflatten(1, (groups, heads // groups)), key.to(query.dtype)[:, :, None]
        outputs, size = [], block_size(batch * heads, self._num_slots)
        for queries, columns, distance in blocks(num_past, length, self.window, self._num_slots, size, query.device):
            visible = seen(distance, reach[:, queries], self.window)[:, None, None]  # [B or 1, 1, 1, queries, C]
            similarity = query[..., queries, :] @ key[..., columns, :].transpose(-1, -2)
            stored = value[:, :, None, columns].to(query.dtype)  # [B, G, 1, C, K]
            if similarity.shape[-1] <= self.top_k:
                outputs.append(soft_weights(similarity * scale, visible) @ stored)
                continue
            chosen = nearest(similarity, visible, self.top_k)  # [B, G, H / G, queries, N]
            visible = visible.expand_as(similarity).gather(-1, chosen)
            weights = soft_weights(similarity.gather(-1, chosen) * scale, visible)
            rows = chosen.flatten(2)[..., None].expand(-1, -1, -1, value.shape[-1])
            found = stored[:, :, 0].gather(2, rows).view(*chosen.shape, -1)
            outputs.append((weights[..., None, :] @ found)[..., 0, :])
        return torch.cat(outputs, dim=-2).flatten(1, 2)

    def forward_reference(
        self, hidden_states: Tensor, state: Any = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, list[History]]:
        """Attend token by token and row by row, and search the store by comparing with every key in it.

        The state is the `History` of every row, with `(key, memory key, value)` `[G, K]` of its tokens.
        """
        sequence = plain_sequence(hidden_states) if sequence is None else sequence
        query, key, value, memory_query, memory_key = self._project(hidden_states, sequence)
        histories = [History(before) for before in state or [None] * query.shape[0]]
        output = torch.zeros_like(query)
        for b, t in walk(histories, (key, memory_key, value), sequence):
            tokens, start = histories[b].tokens, histories[b].start
            border = max(len(tokens) - self.window, start)  # first token of the window
            local = self._read(query[b, :, t], [(k, v) for k, _, v in tokens[border:]], self.head_dim**-0.5)
            stored = [(k, v) for _, k, v in tokens[max(border - self.memory_size, start) : border]]
            output[b, :, t] = self._mix_one(local, memory_query[b, :, t], stored)
        return self.o_proj(merge_heads(output)), histories

    def _mix_one(self, local: Tensor, query: Tensor, stored: list) -> Tensor:
        if not stored:
            return local
        if self.detach_memory:
            stored = [(key.detach(), value.detach()) for key, value in stored]
        memory = self._read(query, stored, self.log_scale.exp()[:, None], self.top_k)
        gate = self.gate.sigmoid()[:, None]
        return (1 - gate) * local + gate * memory

    def _read(self, query: Tensor, pairs: list, scale: Tensor | float, count: int | None = None) -> Tensor:
        """Softmax attention of one token over all pairs, or over the `count` nearest ones."""
        repeats = self.num_heads // self.num_kv_heads
        keys, values = (
            torch.stack(part, dim=1).repeat_interleave(repeats, dim=0) for part in zip(*pairs, strict=True)
        )  # [H, S, K]
        scores = (keys @ query[..., None])[..., 0]
        if count is not None and count < len(pairs):
            latest_first = nearness(scores).flip(1)
            order = latest_first.argsort(dim=1, descending=True, stable=True)[:, :count]
            chosen = len(pairs) - 1 - order  # [H, N]
            scores = scores.gather(1, chosen)
            values = values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))
        weights = (scores * scale).softmax(1)
        return (weights[:, None] @ values)[:, 0]
