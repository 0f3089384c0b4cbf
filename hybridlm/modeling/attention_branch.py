"""Attention with persistent tokens, as one half of a mixer: over a sliding window, or over what a mask shows.

Persistent tokens are learned keys and values that every query sees. Being no tokens of the row they take no place in
it, count in no window and no segment, and have no position: queries meet them before their own position is put in, so
that their weight is the same everywhere. Keys and values, and not vectors that are projected, cost nothing a call and
need no place in a batch with left pads. A memory needs none: what it would have learned of them is in its initial
weights.

Shapes: B batch, T tokens, D hidden size, H query heads, G key-value heads, K head width, S keys, N persistent tokens.
Reference: Behrouz et al. 2024, "Titans", arXiv:2501.00663, section 3.3; Sukhbaatar et al. 2019, "Augmenting
Self-attention with Persistent Memory", arXiv:1907.01470, for learned keys and values.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .heads import check_heads, merge_heads, split_heads
from .lookback import History, joined, roll, walk, weigh, window_attention
from .masks import SequenceInfo
from .norms import RMSNorm
from .positions import build_position


class AttentionBranch(nn.Module):
    """Projections, position and persistent tokens.

    Args:
        hidden_size: Width D.
        num_heads: Query heads H.
        num_kv_heads: Key-value heads G; H when `None`.
        head_dim: Width K of a head; D / H when `None`.
        position: Position encoding by name.
        num_persistent: Persistent tokens N.
        qk_norm: Whether queries and keys are RMS-normalised per head; persistent keys are as they were learned.
        qk_norm_eps: Added to the mean square there.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        position: dict | None,
        num_persistent: int,
        qk_norm: bool,
        qk_norm_eps: float,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(hidden_size, num_heads, num_kv_heads, head_dim)
        if num_persistent < 0:
            raise ValueError(f"num_persistent={num_persistent} must be at least 0")
        self.num_heads, self.num_kv_heads, self.num_persistent = num_heads, num_kv_heads, num_persistent
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=qk_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=qk_norm_eps) if qk_norm else None
        self.position = build_position(position, self.head_dim)
        shape = (num_kv_heads, num_persistent, self.head_dim)
        self.persistent_keys = nn.Parameter(torch.empty(shape)) if num_persistent else None
        self.persistent_values = nn.Parameter(torch.empty(shape)) if num_persistent else None
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Start the persistent tokens: keys of the size of a query's, values small."""
        if self.num_persistent:
            init.normal_(self.persistent_keys, mean=0.0, std=self.head_dim**-0.5)
            init.normal_(self.persistent_values, mean=0.0, std=std)

    def queries(self, hidden_states: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Queries `[B, H, T, K]` of `[B, T, D]`, with and without their position."""
        plain = split_heads(self.q_proj(hidden_states), self.head_dim)
        plain = plain if self.q_norm is None else self.q_norm(plain)
        return self.position(plain, plain[:, :0], sequence)[0], plain

    def keys_and_values(self, hidden_states: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Keys, with their position, and values `[B, G, T, K]` of `[B, T, D]`."""
        key, value = (split_heads(p(hidden_states), self.head_dim) for p in (self.k_proj, self.v_proj))
        key = key if self.k_norm is None else self.k_norm(key)
        return self.position(key[:, :0], key, sequence)[1], value

    def _persistent(self, plain: Tensor) -> tuple[Tensor, Tensor] | None:
        """Scores `[B, G, H / G, T, N]` of the persistent tokens for queries without position, and their values."""
        if not self.num_persistent:
            return None
        query = plain.unflatten(1, (self.num_kv_heads, -1)) / math.sqrt(self.head_dim)
        keys, values = self.persistent_keys.to(plain.dtype), self.persistent_values.to(plain.dtype)
        return query @ keys[:, None].transpose(-1, -2), values[None, :, None]

    def over_window(
        self, hidden_states: Tensor, past: tuple[Tensor | None, Tensor | None], window: int, sequence: SequenceInfo
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Attend to the last `window` tokens.

        Args:
            hidden_states: `[B, T, D]`.
            past: Keys and values `[B, G, window - 1, K]` before the call, right-aligned (see `lookback.py`).
            window: Tokens that each sees, itself included.
            sequence: The call.

        Returns:
            `[B, T, D]`, and the past of the next call if it is wanted.
        """
        query, plain = self.queries(hidden_states, sequence)
        new = self.keys_and_values(hidden_states, sequence)
        key, value = (joined(*pair, sequence) for pair in zip(past, new, strict=True))
        output = window_attention(query, key, value, window, sequence, self._persistent(plain))
        kept = None
        if sequence.use_cache:
            kept = tuple(roll(*pair, window - 1, sequence) for pair in zip(past, new, strict=True))
        return self.o_proj(merge_heads(output)), kept

    def over(self, query: Tensor, plain: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Attend with `queries` to keys and values `[B, G, S, K]` where `visible` `[B or 1, T, S]`; `[B, T, D]`."""
        grouped = query.unflatten(1, (self.num_kv_heads, -1)) / math.sqrt(self.head_dim)
        scores = grouped @ key[:, :, None].transpose(-1, -2)
        output = weigh(scores, visible[:, None, None], value[:, :, None], self._persistent(plain))
        return self.o_proj(merge_heads(output.flatten(1, 2)))

    def of_one(self, query: Tensor, plain: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The plain loop's attention of one token, `[H, K]` before the last projection, to keys and values `[G, K]`."""
        outputs = []
        for head in range(self.num_heads):
            group = head * self.num_kv_heads // self.num_heads
            scores = [query[head] @ key[group] for key, _ in pairs]
            values = [value[group] for _, value in pairs]
            for number in range(self.num_persistent):
                scores.append(plain[head] @ self.persistent_keys[group, number])
                values.append(self.persistent_values[group, number])
            weights = (torch.stack(scores) * self.head_dim**-0.5).softmax(0)
            outputs.append(weights @ torch.stack(values))
        return torch.stack(outputs)

    def over_window_reference(
        self, hidden_states: Tensor, past: list[History] | None, window: int, sequence: SequenceInfo
    ) -> tuple[Tensor, list[History]]:
        """Do what `over_window` does, a token at a time; the past is the `History` of every row."""
        query, plain = self.queries(hidden_states, sequence)
        new = self.keys_and_values(hidden_states, sequence)
        histories = [History(before) for before in past or [None] * query.shape[0]]
        output = torch.zeros_like(query)
        for b, t in walk(histories, new, sequence):
            tokens, start = histories[b].tokens, histories[b].start
            output[b, :, t] = self.of_one(query[b, :, t], plain[b, :, t], tokens[max(start, len(tokens) - window) :])
        return self.o_proj(merge_heads(output)), histories
