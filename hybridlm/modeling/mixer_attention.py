"""Softmax attention: multi-head, grouped or multi-query; full or windowed with sinks; any backend of transformers.

Shapes: B batch, T new tokens, S keys, D hidden size, H query heads, G key-value heads, K head width.
Reference: Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023 (grouped queries), arXiv:2305.13245; Xiao et al.
2023 (attention sinks), arXiv:2309.17453.
Differs: sinks keep their original positions, so nothing is rotated again when the window moves. A convolution of the
projections is linear, as in Arora et al. 2024 ("Based"), arXiv:2402.18668, without a bias; the projections have one.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import logging

from .attention_product import AttentionProduct
from .cache_entries import KeyValueStore
from .conv import CausalConv1d, ConvState
from .heads import check_heads
from .masks import SequenceInfo, compiling, plain_sequence
from .norms import RMSNorm
from .positions import build_position
from .window import WindowState, extend, slot_index

logger = logging.get_logger(__name__)


class AttentionMixer(nn.Module):
    """Mix tokens by softmax attention over the visible past.

    Args:
        hidden_size: Width D of the residual stream.
        num_heads: Query heads H.
        num_kv_heads: Key-value heads G; H by default, 1 is multi-query attention.
        head_dim: Width K of a head; D / H by default.
        position: `{"name": "none"}` or `{"name": "rope", ...}`.
        window: Number of keys a token sees, itself included; `None` for all.
        num_sinks: First tokens of its document that a token sees beyond the window.
        qk_norm: Whether queries and keys are RMS-normalised per head.
        qk_norm_eps: Added to the mean square there.
        output_gate: Whether the output is multiplied by a sigmoid of the input.
        logit_softcap: Scores are squeezed into (-cap, cap).
        learned_sinks: Whether each head has a learned sink logit.
        scale: Factor on the scores; 1 / sqrt(K) by default.
        qkv_bias: Whether the input projections have a bias.
        out_bias: Whether the output projection has a bias.
        conv_kernel: Width W of a depthwise causal convolution of queries, keys and values, before their norms and
            positions; `None` for none.
        dropout: Probability of dropping an attention weight in training.
    """

    state_type = WindowState

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        position: dict | None = None,
        window: int | None = None,
        num_sinks: int = 0,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        output_gate: bool = False,
        logit_softcap: float | None = None,
        learned_sinks: bool = False,
        scale: float | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        conv_kernel: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(hidden_size, num_heads, num_kv_heads, head_dim, dropout)
        self._check(window, num_sinks, logit_softcap, conv_kernel)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.window, self.num_sinks = window, num_sinks
        self.logit_softcap, self.dropout = logit_softcap, dropout
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=qkv_bias)
        self.widths = (width, kv_width, kv_width)
        self.conv1d = None if conv_kernel is None else CausalConv1d(sum(self.widths), conv_kernel, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=out_bias)
        self.gate_proj = nn.Linear(hidden_size, width, bias=qkv_bias) if output_gate else None
        self.q_norm = RMSNorm(self.head_dim, eps=qk_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=qk_norm_eps) if qk_norm else None
        self.sinks = nn.Parameter(torch.empty(num_heads)) if learned_sinks else None
        self.position = build_position(position, self.head_dim)
        scaling = self.head_dim**-0.5 if scale is None else scale
        self.product = AttentionProduct(num_heads // num_kv_heads, scaling)
        self.init_weights(0.02)

    @staticmethod
    def _check(window: int | None, num_sinks: int, logit_softcap: float | None, conv_kernel: int | None) -> None:
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1, or null for full attention")
        if num_sinks < 0 or (num_sinks and window is None):
            raise ValueError(f"num_sinks={num_sinks} must be at least 0, and needs a window")
        if logit_softcap is not None and logit_softcap <= 0:
            raise ValueError(f"logit_softcap={logit_softcap} must be positive")
        if conv_kernel is not None and conv_kernel < 2:
            raise ValueError(f"conv_kernel={conv_kernel} must be at least 2, or null for no convolution")

    def init_weights(self, std: float) -> None:
        """Start the learned sinks."""
        if self.sinks is not None:
            init.normal_(self.sinks, mean=0.0, std=std)

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape a row and type of the state after `num_tokens` tokens."""
        slots = num_tokens if self.window is None else self.num_sinks + self.window
        shape = (self.num_kv_heads, slots, self.head_dim)
        spec = {"keys": (shape, dtype), "values": (shape, dtype)}
        return (
            spec if self.conv1d is None else spec | {"conv_states": ((sum(self.widths), self.conv1d.num_past), dtype)}
        )

    def state_size(self, num_tokens: int) -> int:
        """Elements a row keeps after `num_tokens` tokens."""
        return sum(math.prod(shape) for shape, _ in self.state_spec(num_tokens, torch.float32).values())

    def _projections(self, hidden_states: Tensor) -> list[Tensor]:
        """Queries, keys and values `[B, T, widths]`."""
        return [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]

    def _convolve(
        self,
        hidden_states: Tensor,
        state: ConvState | WindowState | None,
        sequence: SequenceInfo,
        reference: bool = False,
    ) -> tuple[Tensor, ConvState]:
        """The projections side by side, convolved, and the last ones before the convolution."""
        tail = None if state is None else state.conv_states
        convolve = self.conv1d.forward_reference if reference else self.conv1d
        mixed = torch.cat(self._projections(hidden_states), dim=-1)
        mixed, tail = convolve(mixed, tail, sequence.starts, sequence.lengths)
        return mixed, ConvState(tail.to(hidden_states.dtype))

    def _mixed(
        self, hidden_states: Tensor, state: KeyValueStore | WindowState | None, sequence: SequenceInfo
    ) -> tuple[list[Tensor], Tensor | None]:
        """Queries, keys and values `[B, T, widths]`, and the tail of their convolution where it goes into the state."""
        if self.conv1d is None:
            return self._projections(hidden_states), None
        tail = None
        if isinstance(state, KeyValueStore):  # its convolution is rolled back apart, from the same inputs
            mixed = state.convolution.run(self._convolve, hidden_states, sequence)
        else:
            mixed, after = self._convolve(hidden_states, state, sequence)
            tail = after.conv_states
        query, key, value = mixed.split(self.widths, dim=-1)
        if sequence.use_cache:  # a view would keep the queries alive as long as the keys
            key, value = key.clone(), value.clone()
        return [query, key, value], tail

    def _heads(self, projections: list[Tensor], sequence: SequenceInfo) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, T, K]`, keys and values `[B, G, T, K]`, with norms and positions."""
        query, key, value = (projected.unflatten(-1, (-1, self.head_dim)) for projected in projections)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self.position(query.transpose(1, 2), key.transpose(1, 2), sequence)
        return query, key, value.transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        state: KeyValueStore | WindowState | None = None,
        sequence: SequenceInfo | None = None,
    ) -> tuple[Tensor, KeyValueStore | WindowState | None]:
        """Map `[B, T, D]` to `[B, T, D]`; also return what to attend to next time."""
        if sequence is None:
            sequence = plain_sequence(hidden_states)
        projections, tail = self._mixed(hidden_states, state, sequence)
        query, key, value = self._heads(projections, sequence)
        key, value, key_index, state = self._extend(key, value, state, sequence)
        if tail is not None and state is not None:
            state.conv_states = tail
        output = self._attend(query, key, value, key_index, sequence)
        return self._finish(output, hidden_states), state

    def _finish(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        output = output.flatten(2)  # [B, T, H K]
        if self.gate_proj is not None:
            output = output * torch.sigmoid(self.gate_proj(hidden_states))
        return self.o_proj(output)

    def _extend(
        self, key: Tensor, value: Tensor, state: KeyValueStore | WindowState | None, sequence: SequenceInfo
    ) -> tuple[Tensor, Tensor, Tensor | None, KeyValueStore | WindowState | None]:
        """All keys and values, the index of each (`None`: the call's own tokens), and the new state."""
        if isinstance(state, KeyValueStore):
            first = sequence.uniform_past == 0 and state.max_length is None
            key, value = state.append(key, value, sequence)
            return key, value, None if first else self._slots(key, sequence), state
        new_state = None
        if sequence.use_cache and self.window is not None:
            new_state = extend(state, key, value, sequence, self.window, self.num_sinks)
        if state is None:
            return key, value, None, new_state
        memo = ("slots", self.window, self.num_sinks)
        if memo not in sequence.memo:
            past = slot_index(sequence, key.shape[0], self.window, self.num_sinks, key.device)
            sequence.memo[memo] = torch.cat([past, sequence.index.expand(key.shape[0], -1)], dim=1)
        key, value = torch.cat([state.keys, key], dim=2), torch.cat([state.values, value], dim=2)
        return key, value, sequence.memo[memo], new_state

    @staticmethod
    def _slots(key: Tensor, sequence: SequenceInfo) -> Tensor:
        memo = ("arange", key.shape[2])
        if memo not in sequence.memo:
            sequence.memo[memo] = torch.arange(key.shape[2], device=key.device)[None]
        return sequence.memo[memo]

    def _needs_mask(self, key_index: Tensor | None, num_keys: int, sequence: SequenceInfo) -> bool:
        """Whether the causal order alone would let a token see what it must not."""
        if sequence.doc_start is not None:
            return True
        if key_index is None:  # the call's own tokens, pads last: real tokens never look at them
            return self.window is not None and num_keys > self.window
        past = sequence.uniform_past  # a static store has empty slots from the first token on
        return self.window is not None or sequence.num_tokens > 1 or past is None or num_keys != past + 1

    def _mask(self, key_index: Tensor | None, num_keys: int, sequence: SequenceInfo) -> Tensor | None:
        """`[B or 1, 1, T, S]`, or `None` when causal order says it all; shared by the layers of a call."""
        if not self._needs_mask(key_index, num_keys, sequence):
            return None
        memo = ("mask", key_index is None, num_keys, self.window, self.num_sinks)
        if memo not in sequence.memo:
            index, view = sequence.index if key_index is None else key_index, sequence
            if sequence.uniform_past is not None and sequence.doc_start is None:  # one mask serves all rows
                index, view = index[:1], replace(sequence, index=sequence.index[:1])
            sequence.memo[memo] = view.visible(index, self.window, self.num_sinks)
        return sequence.memo[memo]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_index: Tensor | None, sequence: SequenceInfo
    ) -> Tensor:
        implementation = sequence.attn_implementation
        if sequence.need_weights:
            implementation = "eager"
        options: dict[str, Any] = {"dropout": self.dropout if self.training else 0.0}
        if self.logit_softcap is not None:
            options["softcap"] = self.logit_softcap
        if self.sinks is not None:
            options["s_aux"] = self.sinks
        if implementation == "sdpa" and len(options) > 1:
            if not compiling():
                logger.warning_once("sdpa has no logit_softcap and no learned_sinks: these layers use eager attention")
            implementation = "eager"
        causal = key_index is None and query.shape[2] > 1
        if "flash" in implementation:
            mask, flash = self._flash_options(key_index, key.shape[2], sequence)
            options.update(flash)
        elif implementation == "flex_attention":
            mask = self._block_mask(key_index, key.shape[2], query, sequence)
        else:
            mask = self._mask(key_index, key.shape[2], sequence)
            options["is_causal"] = causal and mask is None
        return self.product(query, key, value, mask, implementation, **options)[0]

    def _flash_options(
        self, key_index: Tensor | None, num_keys: int, sequence: SequenceInfo
    ) -> tuple[None, dict[str, Any]]:
        """Flash kernels know causal order, a window and lengths of documents, but no mask."""
        options: dict[str, Any] = {"is_causal": True, "sliding_window": self.window}
        past = sequence.uniform_past
        ragged = key_index is not None and (past is None or num_keys != past + sequence.num_tokens)
        if self.sinks is not None:
            raise ValueError(
                "attn_implementation: most flash kernels drop learned_sinks without a word; use 'eager' or "
                "'flex_attention'"
            )
        if self.num_sinks or ragged or (key_index is not None and sequence.doc_start is not None):
            raise ValueError(
                "attn_implementation: flash attention cannot express attention sinks, a static cache, or a cache whose "
                "rows have different lengths or several documents; use 'sdpa'"
            )
        if self.window is not None and key_index is not None:
            raise ValueError("attn_implementation: flash attention cannot read a windowed cache; use 'sdpa'")
        if sequence.doc_start is not None:
            if sequence.index.shape[0] != 1:
                raise ValueError("attn_implementation: flash attention packs documents in one row; use 'sdpa'")
            begins = torch.nonzero(sequence.index[0] == sequence.doc_start[0])[:, 0].to(torch.int32)
            borders = nn.functional.pad(begins, (0, 1), value=sequence.num_tokens)
            longest = int(borders.diff().max())
            options.update(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=longest, max_length_k=longest)
        return None, options

    def _block_mask(self, key_index: Tensor | None, num_keys: int, query: Tensor, sequence: SequenceInfo) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        memo = ("block", key_index is None, num_keys, self.window, self.num_sinks)
        if memo not in sequence.memo:
            batch = query.shape[0]
            dense = sequence.visible(sequence.index if key_index is None else key_index, self.window, self.num_sinks)
            dense = dense[:, 0].expand(batch, -1, -1)

            def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return dense[b, q, k]

            sequence.memo[memo] = create_block_mask(
                visible, batch, None, query.shape[2], num_keys, device=query.device, _compile=compiling()
            )
        return sequence.memo[memo]

    def forward_reference(
        self, hidden_states: Tensor, state: Any = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, tuple[list, ConvState | None]]:
        """Attend token by token and row by row, in plain loops over the real tokens.

        The state is, for every row, the list of `(key, value)` `[G, K]` of its tokens and the start of its document;
        and the tail of the convolution.
        """
        if sequence is None:
            sequence = plain_sequence(hidden_states)
        rows, tail = (None, None) if state is None else state
        if self.conv1d is None:
            projections = self._projections(hidden_states)
        else:
            mixed, tail = self._convolve(hidden_states, tail, sequence, reference=True)
            projections = list(mixed.split(self.widths, dim=-1))
        query, key, value = self._heads(projections, sequence)
        batch, _, length, _ = query.shape
        rows = [([], 0) for _ in range(batch)] if rows is None else [(list(kv), start) for kv, start in rows]
        output = torch.zeros_like(query)
        for b in range(batch):
            seen, start = rows[b]
            count = length if sequence.lengths is None else int(sequence.lengths[b])
            for t in range(count):
                if sequence.starts is not None and bool(sequence.starts[b, t]):
                    start = len(seen)
                seen.append((key[b, :, t], value[b, :, t]))
                now = len(seen) - 1
                visible = [
                    j
                    for j in range(start, now + 1)
                    if self.window is None or j > now - self.window or j - start < self.num_sinks
                ]
                output[b, :, t] = self._attend_one(query[b, :, t], [seen[j] for j in visible])
            rows[b] = (seen, start)
        return self._finish(output.transpose(1, 2), hidden_states), (rows, tail)

    def _attend_one(self, query: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        groups = self.num_heads // self.num_kv_heads
        keys = torch.stack([key for key, _ in pairs], dim=1).repeat_interleave(groups, dim=0)  # [H, S, K]
        values = torch.stack([value for _, value in pairs], dim=1).repeat_interleave(groups, dim=0)
        scores = torch.einsum("hk,hsk->hs", query, keys) * self.product.scaling
        if self.logit_softcap is not None:
            scores = self.logit_softcap * torch.tanh(scores / self.logit_softcap)
        weights = scores.exp()
        total = weights.sum(-1) + (0 if self.sinks is None else self.sinks.to(scores.dtype).exp())
        return torch.einsum("hs,hsk->hk", weights / total[:, None], values)
