"""Titans' memory as context (MAC): attention inside segments, over tokens and what a memory says of them.

A segment is C tokens, counted from the start of the document. In segment n, with the memory M_{n-1} that the segments
before it have left,

    h_i = M_{n-1}(q(x_i)),  y_i = x_i + Attention([P ; h_j, j <= i ; x_j, j <= i]),
    m_i = M_{n-1}(q(y_i)),  o_i = W (norm(y_i) * sigmoid(norm(m_i))),

and when the segment is full M_n is M_{n-1} trained by its y, all gradients taken at M_{n-1}: the chunk of the memory is
the segment. Nothing that the memory learns of a segment is read in it, so nothing can leak to its earlier tokens.

Shapes: B batch, T tokens, D hidden size, G key-value heads, K head width, C segment size, L tokens of a piece, H heads
of the memory, E width of such a head, P weights of one, F what the memory needs of a token, W width of its convolution.
Reference: Behrouz et al. 2024, "Titans: Learning to Memorize at Test Time", arXiv:2501.00663, section 4.1.
Differs: a token sees h of the tokens up to itself, where the paper's segment is one prefix; the output gate reads
M_{n-1}, where the paper's M_n has seen the whole segment; both would leak. h and x have projections to queries of their
own for x and y; the product is projected; y holds x_i itself (`attention_residual`); persistent tokens P are keys and
values (see `attention_branch.py`); see also `memory.py` and `memory_gates.py`.
"""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention_branch import AttentionBranch
from .conv import CausalConv1d
from .masks import SequenceInfo, plain_sequence
from .memories import build_memory
from .memory import MemoryNetwork
from .memory_gates import GAMMA, coefficients
from .memory_reference import TokenMemory
from .neural_memory import NeuralMemoryState, trace_of, unit
from .precision import state_dtype, without_autocast
from .segments import Piece, Segments
from .titans import GateByMemory


@dataclass(kw_only=True)
class TitansMACState(NeuralMemoryState):
    """The state of the memory, and what attention needs of the open segment; 0 in empty slots.

    Attributes:
        query_states: `[B, H E, W - 1]`, the last inputs of the convolution over queries for h.
        keys: `[B, G, 2, C - 1, K]`, of h and of x.
        values: As `keys`.
    """

    query_states: Tensor
    keys: Tensor
    values: Tensor


class _Fast(NamedTuple):
    """What moves on when a segment closes: memory, momentum `[B, H, P]`, tokens before it `[B, H, c - 1, F]`."""

    memory: Tensor
    momentum: Tensor | None
    recent: Tensor | None


class TitansMACMixer(nn.Module):
    """Mix the tokens of a segment by attention that also reads a memory of all segments before it.

    Args:
        hidden_size: Width D of the residual stream.
        num_heads: Query heads of the attention.
        num_kv_heads: Key-value heads G; `num_heads` by default.
        head_dim: Width K of a head; D / `num_heads` by default.
        position: Position encoding of the attention, `{"name": "none"}` or `{"name": "rope", ...}`; h_j stands
            where x_j does.
        segment_size: Tokens C of a segment, which is the `chunk_size` of the memory too.
        num_persistent: Learned keys and values that every token attends to besides.
        qk_norm: Whether queries and keys are RMS-normalised per head.
        norm_eps: Added to mean squares.
        attention_residual: Whether x_i is added to what attention makes of it, so that the memory sees the token and
            not only a mean of tokens. The paper does not say. Without it a small model learned which values a row
            held, and not which key each belonged to.
        memory: `{"name": "neural_memory", ...}` with the options of that mixer; `chunk_size` follows from
            `segment_size`. By default the outer gradient flows through all segments; with its `detach_memory` the
            memory that an update starts from is a constant, and the gradient reaches earlier segments only through
            what was read of them.
    """

    state_type = TitansMACState
    full_precision = ("memory.qkv_proj", "memory.gates.proj", "query_proj")
    applied_twice = ("attention.k_proj", "attention.v_proj", "memory.gate_proj", "memory.out_proj")  # to h too

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        position: dict | None = None,
        segment_size: int = 128,
        num_persistent: int = 4,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        attention_residual: bool = True,
        memory: dict | None = None,
    ) -> None:
        super().__init__()
        if segment_size < 1:
            raise ValueError(f"segment_size={segment_size} must be at least 1")
        self.attention = AttentionBranch(
            hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            position=position,
            num_persistent=num_persistent,
            qk_norm=qk_norm,
            qk_norm_eps=norm_eps,
        )
        self.memory = build_memory(memory, hidden_size, segment_size)
        self.hidden_size, self.segment_size = hidden_size, segment_size
        self.attention_residual = attention_residual
        self.num_heads, self.num_kv_heads = num_heads, self.attention.num_kv_heads
        self.head_dim = self.attention.head_dim
        width = self.memory.num_heads * self.memory.head_dim
        self.query_proj = nn.Linear(hidden_size, width, bias=False)
        self.query_conv = CausalConv1d(width, self.memory.conv1d.kernel_size[0])
        self.gate = GateByMemory(hidden_size, norm_eps)

    def forward(
        self, hidden_states: Tensor, state: TitansMACState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, TitansMACState]:
        """Map `[B, T, D]` to `[B, T, D]`; also return the state after each row's last real token."""
        sequence = plain_sequence(hidden_states) if sequence is None else sequence
        segments = Segments.build(sequence, self.segment_size)
        tail = None if state is None else state.query_states
        asked, tail = self.query_conv(self.query_proj(hidden_states), tail, sequence.starts, sequence.lengths)
        queries = self.attention.queries(hidden_states, sequence)
        keys, values = self.attention.keys_and_values(hidden_states, sequence)
        given = (hidden_states, self._heads(asked), keys, values)
        buffers, fast = self._open(state), self._begin(state, asked)
        conv = None if state is None else state.conv_states
        attended, read, traces = [], [], []
        for piece in segments.pieces:
            fast = self._enter(fast, piece)
            weights = self.network.weights(fast.memory)
            self._show(buffers, weights, given, piece)
            rows = [piece.take(query, 2) for query in queries]
            shown = [buffer.flatten(2, 3) for buffer in buffers[:2]]
            y = self.attention.over(*rows, *shown, self.visible(piece, buffers[0].shape[3]))
            y = y + piece.take(hidden_states, 1) if self.attention_residual else y
            mixed = self.memory.qkv_proj(y)
            mixed, conv = self.memory.conv1d(mixed, conv, piece.call.starts, piece.call.lengths)
            query, tokens = self.memory.associate(mixed, self.memory.gates(y))
            buffers[2] = piece.extend(buffers[2], tokens)
            attended.append(y)
            with without_autocast(y):
                if sequence.need_trace:
                    traces.append(self._trace(weights, tokens))
                if piece.may_close:
                    fast = self._learn(fast, weights, buffers[2], piece)
                read.append(self._read(weights, query))
        attended = segments.join(attended)
        output = self.gate(attended, self.memory.finish(segments.join(read), attended))
        if torch.is_grad_enabled():  # where no full segment is followed by another, the gates have a gradient of 0
            output = output + 0 * sum(parameter.sum() for parameter in self.memory.gates.parameters())
        if traces:
            sequence.journal.leave_trace(segments.join(traces))
        kept = [segments.still_open(buffer, dim) for buffer, dim in zip(buffers, (3, 3, 1), strict=True)]
        return output, TitansMACState(
            conv_states=conv.to(hidden_states.dtype),
            query_states=tail.to(hidden_states.dtype),
            keys=kept[0],
            values=kept[1],
            open_tokens=kept[2],
            memory=fast.memory,
            momentum=fast.momentum,
            # a view would keep the whole segment alive
            recent_tokens=None if fast.recent is None else fast.recent.transpose(1, 2).clone(),
        )

    @property
    def network(self) -> MemoryNetwork:
        """The fast-weight network."""
        return self.memory.scan.network

    def _heads(self, asked: Tensor) -> Tensor:
        """Queries `[B, T, H, E]` for h, of the convolved projection."""
        asked = nn.functional.silu(asked.to(state_dtype(asked.dtype)))
        return unit(asked.unflatten(-1, (self.memory.num_heads, self.memory.head_dim)))

    def _read(self, weights: list[Tensor], queries: Tensor) -> Tensor:
        """What the memory answers to `[B, L, H, E]`."""
        return self.network.read(weights, queries.transpose(1, 2)).transpose(1, 2)

    @staticmethod
    def visible(piece: Piece, num_slots: int) -> Tensor:
        """`[B or 1, L, 2 num_slots]`: of h and of x, each token sees those up to its own."""
        return piece.visible(num_slots).repeat(1, 1, 2)

    @staticmethod
    def _open(state: TitansMACState | None) -> list[Tensor | None]:
        """Buffers of the open segment: keys, values, and what the memory needs of its tokens."""
        return [None] * 3 if state is None else [state.keys, state.values, state.open_tokens]

    def _begin(self, state: TitansMACState | None, like: Tensor) -> _Fast:
        features = 2 * self.memory.head_dim + self.memory.gates.num_gates
        like = like.new_empty(len(like), 0, self.memory.num_heads, features, dtype=state_dtype(like.dtype))
        return _Fast(*self.memory.scan.begin(state, like))

    def _enter(self, fast: _Fast, piece: Piece) -> _Fast:
        """The memory that a segment begins with."""
        memory, momentum, recent = fast
        if piece.begins is not None:
            begins = piece.begins[:, None, None]
            memory = memory.masked_fill(begins, 0.0)
            momentum = None if momentum is None else momentum.masked_fill(begins, 0.0)
            recent = None if recent is None else recent.masked_fill(begins[..., None], 0.0)
        return _Fast(memory, momentum, recent)

    def _show(
        self, buffers: list[Tensor | None], weights: list[Tensor], given: tuple[Tensor, ...], piece: Piece
    ) -> None:
        """Add keys and values of a piece's h and x to the buffers; `given` is of all tokens of the call."""
        x, asked, *own = (piece.take(part, dim) for part, dim in zip(given, (1, 1, 2, 2), strict=True))
        with without_autocast(x):
            read = self._read(weights, asked)
        context = self.attention.keys_and_values(self.memory.finish(read, x), piece.call)
        for i, pair in enumerate(zip(context, own, strict=True)):
            buffers[i] = piece.extend(buffers[i], torch.stack(pair, dim=2), dim=3)

    def _learn(self, fast: _Fast, weights: list[Tensor], buffer: Tensor, piece: Piece) -> _Fast:
        """Train the memory on a segment `[B, C, H, F]`, in rows in which it is full."""
        memory, momentum = fast.memory, fast.momentum
        if self.memory.scan.detach:
            memory, momentum = memory.detach(), None if momentum is None else momentum.detach()
            weights = self.network.weights(memory)
        laid, width = buffer.transpose(1, 2), self.memory.head_dim
        sources, recent_gamma = laid, None
        if fast.recent is not None:
            sources, recent_gamma = torch.cat([fast.recent, laid], dim=2), fast.recent[..., 2 * width + GAMMA]
        rule = coefficients(laid[..., 2 * width :], recent_gamma, self.network.momentum)
        gradients = self.network.gradients(weights, sources[..., :width], sources[..., width : 2 * width])
        after = self.network.advance(memory, momentum, gradients, rule)
        recent = None if fast.recent is None else sources[:, :, -fast.recent.shape[2] :]
        return _Fast(*(piece.where_full(*pair) for pair in zip((*after, recent), fast, strict=True)))

    def _trace(self, weights: list[Tensor], tokens: Tensor) -> Tensor:
        """What is recorded of a piece's tokens, `[B, L, H, 5]`."""
        width, laid = self.memory.head_dim, tokens.transpose(1, 2)
        surprise = self.network.gradients(weights, laid[..., :width], laid[..., width : 2 * width]).surprise
        return trace_of(surprise, weights, laid[..., 2 * width :], self.network.momentum).transpose(1, 2)

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one row and type of each state tensor; the same after any number of tokens."""
        shape = (self.num_kv_heads, 2, self.segment_size - 1, self.head_dim)
        spec = self.memory.state_spec(num_tokens, dtype) | {"keys": (shape, dtype), "values": (shape, dtype)}
        return spec | {"query_states": ((self.query_conv.in_channels, self.query_conv.num_past), dtype)}

    def state_size(self, num_tokens: int) -> int:
        """Elements of one row's state."""
        return sum(torch.Size(shape).numel() for shape, _ in self.state_spec(num_tokens, torch.float32).values())

    def forward_reference(
        self, hidden_states: Tensor, state: Any = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, list["_Row"]]:
        """Do what `forward` does, row by row and token by token; the state is a `_Row` for every row."""
        sequence = plain_sequence(hidden_states) if sequence is None else sequence
        rows = [_Row(self, hidden_states[b], None if state is None else state[b]) for b in range(len(hidden_states))]
        queries = self.attention.queries(hidden_states, sequence)
        own = self.attention.keys_and_values(hidden_states, sequence)
        outputs = torch.zeros_like(hidden_states)
        for b, row in enumerate(rows):
            for t in range(sequence.num_tokens if sequence.lengths is None else int(sequence.lengths[b])):
                if sequence.starts is not None and bool(sequence.starts[b, t]):
                    row.forget()
                at = replace(
                    sequence, positions=sequence.positions.expand(len(rows), -1)[b : b + 1, t : t + 1], memo={}
                )
                query, plain, key, value = (part[b, :, t] for part in (*queries, *own))
                outputs[b, t] = row.step(hidden_states[b, t], query, plain, (key, value), at)
        return outputs, rows


class _Row:
    """One row of `forward_reference`: its memory, the open segment, and the inputs of the convolutions."""

    def __init__(self, mixer: TitansMACMixer, like: Tensor, before: "_Row | None") -> None:
        self.mixer, self.like = mixer, like
        if before is None:
            self.forget()
        else:
            self.memory = copy(before.memory)
            self.memory.open, self.pairs = list(before.memory.open), list(before.pairs)
            self.tails = before.tails

    def forget(self) -> None:
        """Begin a document."""
        memory = self.mixer.memory
        shape = (1, memory.num_heads, 2 * memory.head_dim + memory.gates.num_gates)
        like = self.like.new_zeros(shape, dtype=state_dtype(self.like.dtype))
        self.memory = TokenMemory(memory.scan, like, None, 0)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # keys and values `[G, K]` of h and x of the open segment
        self.tails: tuple[Tensor | None, Tensor | None] = (None, None)

    def step(self, x: Tensor, query: Tensor, plain: Tensor, own: tuple[Tensor, Tensor], at: SequenceInfo) -> Tensor:
        """One token `[D]`."""
        mixer, memory = self.mixer, self.mixer.memory
        asked, asked_tail = mixer.query_conv.forward_reference(mixer.query_proj(x)[None, None], self.tails[0])
        read = self.memory.recall(mixer._heads(asked)[0, 0])
        h = memory.finish(read[None, None], x[None, None])
        key, value = mixer.attention.keys_and_values(h, at)
        self.pairs += [(key[0, :, 0], value[0, :, 0]), own]
        y = mixer.attention.o_proj(mixer.attention.of_one(query, plain, self.pairs).flatten())[None, None]
        y = y + x if mixer.attention_residual else y
        mixed, tail = memory.conv1d.forward_reference(memory.qkv_proj(y), self.tails[1])
        asked, tokens = memory.associate(mixed, memory.gates(y))
        remembered = memory.finish(self.memory.recall(asked[0, 0])[None, None], y)
        self.memory.learn(tokens[0, 0])
        if not self.memory.open:
            self.pairs = []
        self.tails = (asked_tail, tail)
        return mixer.gate(y, remembered)[0, 0]
