"""Neural memory: projections, short convolutions, gates and the scan over chunks, as a mixer or as a branch of one.

Shapes: B batch, T tokens, D hidden size, H heads, K head width, C chunk size, c window, P weights of a head's memory,
F = 2 K + gates, what the memory needs of a token, W width of the convolution.
Reference: Behrouz et al. 2024, "Titans: Learning to Memorize at Test Time", arXiv:2501.00663, section 3.
Differs: see `memory.py` and `memory_gates.py`; values have unit length too; each head's output is normalised and gated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .chunk_grid import ChunkGrid
from .conv import CausalConv1d
from .masks import SequenceInfo, plain_sequence
from .memory import Coefficients, MemoryNetwork
from .memory_gates import GAMMA, LOG_ETA, LOG_KEEP, THETA, MemoryGates, coefficients
from .memory_reference import scan_by_tokens
from .norms import RMSNorm
from .precision import state_dtype, without_autocast

# what `output_memory_trace` records of each token and head, in this order
TRACE = ("surprise", "memory_norm", "learning_rate", "momentum", "forgetting")


@dataclass
class NeuralMemoryState:
    """What a neural memory carries from one call to the next; all zeros are the start of a document.

    Attributes:
        conv_states: `[B, 3 H K, W - 1]`, the last inputs of the convolution, in the model's type.
        memory: `[B, H, P]`, what the weights have moved from their learned initial values, where the open chunk began.
        open_tokens: `[B, C - 1, H, F]`, keys, values and gates of the open chunk, 0 in empty slots.
        momentum: `[B, H, P]`, where the open chunk began; `None` without momentum.
        recent_tokens: `[B, c - 1, H, F]`, the tokens before the open chunk; `None` when the window is one token.
    """

    conv_states: Tensor
    memory: Tensor
    open_tokens: Tensor
    momentum: Tensor | None = None
    recent_tokens: Tensor | None = None


class MemoryScan(nn.Module):
    """Run the memory over the tokens of a call.

    Args:
        network: The fast-weight network.
        chunk_size: C.
        window: c.
        detach: Whether the memory with which a chunk begins is a constant for the outer gradient.
    """

    def __init__(self, network: MemoryNetwork, chunk_size: int, window: int, detach: bool) -> None:
        super().__init__()
        self.network, self.chunk_size, self.window, self.detach = network, chunk_size, window, detach

    def forward(
        self, queries: Tensor, tokens: Tensor, state: NeuralMemoryState | None, sequence: SequenceInfo
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor | None]]:
        """Read every token from the memory after it, and move the memory on.

        Args:
            queries: `[B, T, H, K]`.
            tokens: `[B, T, H, F]`, keys, values and gates.
            state: `None` at the start.
            sequence: The call.

        Returns:
            `[B, T, H, K]`, the trace `[B, T, H, 5]` if the call asks for it, and the new state's tensors by name.
        """
        width = self.network.head_dim
        grid = ChunkGrid.build(sequence, self.chunk_size)
        laid = grid.lay_out(tokens, None if state is None else state.open_tokens).transpose(2, 3)  # [B, N, H, C, F]
        single = sequence.num_tokens == 1  # then only its own slot is read
        asked = [queries.transpose(1, 2)] if single else grid.lay_out(queries, None).transpose(2, 3).unbind(1)
        keys, values, gates = laid.split([width, width, laid.shape[-1] - 2 * width], dim=-1)
        memory, momentum, recent = self.begin(state, tokens)
        rules = None
        if recent is None:
            rules = [Coefficients(*parts) for parts in zip(*self._rules(gates), strict=True)]
        outputs, traces = [], []
        chunks = zip(keys.unbind(1), values.unbind(1), gates.unbind(1), asked, strict=True)
        for n, (key, value, gate, query) in enumerate(chunks):
            if grid.fresh is not None:
                begins = grid.fresh[:, n, None, None]
                memory = memory.masked_fill(begins, 0.0)
                momentum = None if momentum is None else momentum.masked_fill(begins, 0.0)
                recent = None if recent is None else recent.masked_fill(begins[..., None], 0.0)
            if self.detach:
                memory, momentum = memory.detach(), None if momentum is None else momentum.detach()
            if recent is None:
                rule = rules[n]
            else:
                rule = coefficients(gate, recent[..., 2 * width + GAMMA], self.network.momentum)
                key = torch.cat([recent[..., :width], key], dim=2)
                value = torch.cat([recent[..., width : 2 * width], value], dim=2)
            tokens_of_chunk = key, value, gate, query
            output, after, trace = self._chunk(memory, momentum, tokens_of_chunk, rule, grid, n, sequence.need_trace)
            outputs.append(output)
            if trace is not None:
                traces.append(trace)
            if after is None:
                continue
            memory = grid.where_full(n, after[0], memory)
            momentum = grid.where_full(n, after[1], momentum)
            if recent is not None:
                moved = torch.cat([recent, laid[:, n]], dim=2)[:, :, -recent.shape[2] :]
                recent = grid.where_full(n, moved, recent)
        output = outputs[0].transpose(1, 2) if single else grid.take(torch.stack(outputs, dim=1).transpose(2, 3))
        trace = None
        if traces:
            trace = grid.take(torch.stack(traces, dim=1).transpose(2, 3))
            sequence.journal.leave_trace(trace)
        kept = {"memory": memory, "momentum": momentum, "open_tokens": grid.still_open(laid.transpose(2, 3))}
        return output, trace, kept | {"recent_tokens": None if recent is None else recent.transpose(1, 2)}

    def begin(self, state: NeuralMemoryState | None, tokens: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Memory, momentum `[B, H, P]` and recent tokens `[B, H, c - 1, F]` before a call with `[B, T, H, F]`."""
        if state is not None:
            recent = None if state.recent_tokens is None else state.recent_tokens.transpose(1, 2)
            return state.memory, state.momentum, recent
        batch, _, heads, num_features = tokens.shape
        network = self.network
        zeros = tokens.new_zeros(batch, heads, network.num_weights)
        recent = tokens.new_zeros(batch, heads, self.window - 1, num_features) if self.window > 1 else None
        return zeros, torch.zeros_like(zeros) if network.momentum else None, recent

    def _rules(self, gates: Tensor) -> list[tuple[Tensor, ...]]:
        return [part.unbind(1) for part in coefficients(gates, None, self.network.momentum)]

    def _chunk(
        self,
        memory: Tensor,
        momentum: Tensor | None,
        tokens: tuple[Tensor, Tensor, Tensor, Tensor],
        rule: Coefficients,
        grid: ChunkGrid,
        n: int,
        need_trace: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None] | None, Tensor | None]:
        key, value, gate, query = tokens
        network = self.network
        weights = network.weights(memory)
        gradients = network.gradients(weights, key, value)
        after = network.advance(memory, momentum, gradients, rule) if n < grid.closing else None
        if not network.at_borders:
            if query.shape[2] < gate.shape[2]:  # a call of one token
                rule = rule.at(grid.place[:, 0] % self.chunk_size)
            output = network.read_moving(weights, momentum, gradients, rule, query)
        else:
            output = network.read(weights, query)
            if after is not None:
                last = network.read(network.weights(after[0]), query[:, :, -1:])
                last = torch.where(grid.closes[:, n, None, None, None], last, output[:, :, -1:])
                output = torch.cat([output[:, :, :-1], last], dim=2)
        trace = None
        if need_trace:
            trace = trace_of(gradients.surprise[..., -gate.shape[2] :], weights, gate, network.momentum)
        return output, after, trace


def trace_of(surprise: Tensor, weights: list[Tensor], gates: Tensor, momentum: bool) -> Tensor:
    """What is recorded of tokens, `[B, H, C, 5]`, of their `[B, H, C]` and `[B, H, C, F - 2 K]`, as `TRACE` says."""
    size = torch.cat([w.flatten(2) for w in weights], dim=-1).norm(dim=-1, keepdim=True)
    eta, alpha = gates[..., LOG_ETA].exp() * momentum, -torch.expm1(gates[..., LOG_KEEP])
    return torch.stack([surprise, size.expand_as(surprise), gates[..., THETA], eta, alpha], dim=-1)


class NeuralMemory(nn.Module):
    """Mix tokens through a network that is trained while it runs, by the surprise of each token.

    Args:
        hidden_size: Width D of the residual stream.
        num_heads: Heads H, each with a memory of its own.
        head_dim: Width K of keys and values; D / H by default.
        chunk_size: Tokens C whose gradients are taken at one point, 64 by default. It changes the function.
        memory_depth: Layers of the network; 1 is a linear memory.
        memory_expansion: Width between its layers as a multiple of `head_dim`.
        memory_bias: Whether its layers have biases.
        memory_residual: Whether it predicts `k + LayerNorm(network(k))`, as TTT does.
        memory_activation: Between its layers: `gelu`, `silu` or `relu`.
        objective: What is minimised: `l2` (Titans), `lp`, `huber`, `kl` or `dot`.
        objective_p: Exponent of `lp`.
        objective_threshold: Threshold of `huber`, temperature of `kl`.
        retention: `decay` (Titans), `lq`, `elastic_net` or `kl`; the last three move the memory only at chunk borders.
        retention_q: Exponent of `lq`, threshold of `elastic_net`, scale of `kl`.
        optimizer: `gradient` (Titans), or `muon` (Atlas), which moves the memory only at chunk borders.
        omega_window: Tokens c whose gradients one update sums (Atlas), 1 for its own alone (Titans).
        momentum: Whether past surprise is carried on.
        forgetting: Whether the memory decays.
        forget_to: What it decays to: its `initial` weights, or `zero` as in the paper.
        max_learning_rate: Bound of what a chunk moves along one direction, in full steps; 0 never learns. A deep memory
            moves by a quarter of that a token at most.
        min_forgetting: Smallest share that a token forgets.
        max_gradient: Largest slope of a token; `None` for no bound.
        max_curvature: Largest curvature of a token, `None` for no bound. A linear memory with unit keys has 1; at
            0.5 the largest step of `l2` lands on the value, and beyond that the memory swings around it.
        normalize_values: Whether values have unit length, as queries and keys do.
        learning_rate_bias: Initial bias of the learning rate.
        momentum_bias: Initial bias of the momentum decay.
        forgetting_bias: Initial bias of forgetting.
        conv_kernel: Width W of the convolution over queries, keys and values; 1 for none.
        output_norm: Whether each head's output is RMS-normalised.
        output_gate: Whether it is multiplied by SiLU of the input.
        norm_eps: Added to the mean square in that norm.
        detach_memory: Whether the outer gradient treats the memory with which a chunk begins as a constant; by default
            it flows through all chunks.
    """

    state_type = NeuralMemoryState
    full_precision = ("qkv_proj", "gates.proj")

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        chunk_size: int | None = None,
        memory_depth: int = 2,
        memory_expansion: float = 2.0,
        memory_bias: bool = False,
        memory_residual: bool = False,
        memory_activation: str = "gelu",
        objective: str = "l2",
        objective_p: float = 3.0,
        objective_threshold: float = 1.0,
        retention: str = "decay",
        retention_q: float | None = None,
        optimizer: str = "gradient",
        omega_window: int = 1,
        momentum: bool = True,
        forgetting: bool = True,
        forget_to: str = "initial",
        max_learning_rate: float = 1.0,
        min_forgetting: float = 1e-4,
        max_gradient: float | None = 2.0,
        max_curvature: float | None = 0.5,
        normalize_values: bool = True,
        learning_rate_bias: float = 0.0,
        momentum_bias: float = 0.0,
        forgetting_bias: float = -5.0,
        conv_kernel: int = 4,
        output_norm: bool = True,
        output_gate: bool = True,
        norm_eps: float = 1e-6,
        detach_memory: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is None and hidden_size % num_heads):
            raise ValueError(f"num_heads={num_heads} must divide hidden_size={hidden_size}, or head_dim must be given")
        if conv_kernel < 1:
            raise ValueError(f"conv_kernel={conv_kernel} must be at least 1")
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        chunk_size = 64 if chunk_size is None else chunk_size
        self.chunk_size, self.window, self.normalize_values = chunk_size, omega_window, normalize_values
        network = MemoryNetwork(
            num_heads,
            self.head_dim,
            depth=memory_depth,
            expansion=memory_expansion,
            bias=memory_bias,
            residual_norm=memory_residual,
            activation=memory_activation,
            objective=objective,
            objective_p=objective_p,
            objective_threshold=objective_threshold,
            retention=retention,
            retention_q=retention_q,
            optimizer=optimizer,
            momentum=momentum,
            forget_to=forget_to,
            max_gradient=max_gradient,
            max_curvature=max_curvature,
        )
        self.gates = MemoryGates(
            hidden_size,
            num_heads,
            chunk_size=chunk_size,
            deep=memory_depth > 1,
            window=omega_window,
            max_learning_rate=max_learning_rate,
            min_forgetting=min_forgetting,
            momentum=momentum,
            forgetting=forgetting,
            learning_rate_bias=learning_rate_bias,
            momentum_bias=momentum_bias,
            forgetting_bias=forgetting_bias,
        )
        self.scan = MemoryScan(network, chunk_size, omega_window, detach_memory)
        width = num_heads * self.head_dim
        self.qkv_proj = nn.Linear(hidden_size, 3 * width, bias=False)
        self.conv1d = CausalConv1d(3 * width, conv_kernel)
        self.gate_proj = nn.Linear(hidden_size, width, bias=False) if output_gate else None
        self.norm = RMSNorm(self.head_dim, eps=norm_eps) if output_norm else None
        self.out_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, state: NeuralMemoryState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Map `[B, T, D]` to `[B, T, D]`; also return the state after each row's last real token."""
        return self._mix(hidden_states, state, sequence, self.conv1d, self.scan)

    def forward_reference(
        self, hidden_states: Tensor, state: NeuralMemoryState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Do what `forward` does, a token at a time, with autograd for the inner gradient."""
        return self._mix(hidden_states, state, sequence, self.conv1d.forward_reference, self._scan_reference)

    def _scan_reference(self, *inputs):
        return scan_by_tokens(self.scan, *inputs)

    def _mix(self, hidden_states, state, sequence, convolve, scan) -> tuple[Tensor, NeuralMemoryState]:
        sequence = plain_sequence(hidden_states) if sequence is None else sequence
        conv_states = None if state is None else state.conv_states
        mixed, conv_states = convolve(self.qkv_proj(hidden_states), conv_states, sequence.starts, sequence.lengths)
        queries, tokens = self.associate(mixed, self.gates(hidden_states))
        with without_autocast(queries):
            output, _, kept = scan(queries, tokens, state, sequence)
        output = self.finish(output, hidden_states)
        return output, NeuralMemoryState(conv_states.to(hidden_states.dtype), **kept)

    def associate(self, mixed: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, T, H, K]` and what the memory needs of the tokens `[B, T, H, F]`, of convolved projections."""
        mixed = nn.functional.silu(mixed.to(state_dtype(mixed.dtype)))
        queries, keys, values = mixed.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        queries, keys = unit(queries), unit(keys)
        values = unit(values) if self.normalize_values else values
        return queries, torch.cat([keys, values, gates], dim=-1)

    def finish(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """Normalise and gate what was read, `[B, T, H, K]`, and project it to `[B, T, D]`."""
        output = (output if self.norm is None else self.norm(output)).flatten(2).to(hidden_states.dtype)
        if self.gate_proj is not None:
            output = output * nn.functional.silu(self.gate_proj(hidden_states))
        return self.out_proj(output)

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one row and type of each state tensor; the same after any number of tokens."""
        wide, heads = state_dtype(dtype), self.num_heads
        token, weights = (heads, 2 * self.head_dim + self.gates.num_gates), (heads, self.scan.network.num_weights)
        spec = {
            "conv_states": ((self.conv1d.in_channels, self.conv1d.num_past), dtype),
            "memory": (weights, wide),
            "open_tokens": ((self.chunk_size - 1, *token), wide),
        }
        if self.scan.network.momentum:
            spec["momentum"] = (weights, wide)
        if self.window > 1:
            spec["recent_tokens"] = ((self.window - 1, *token), wide)
        return spec

    def state_size(self, num_tokens: int) -> int:
        """Elements of one row's state."""
        return sum(torch.Size(shape).numel() for shape, _ in self.state_spec(num_tokens, torch.float32).values())


def unit(vectors: Tensor) -> Tensor:
    """`[..., K]` with unit length; a vector of zeros stays one."""
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + 1e-6)
