"""Mamba-2 mixer: a state space model with one decay for each head and a matrix as its state.

Shapes: B batch, T tokens, D hidden size, H heads, P head width, I = H * P, G groups, N state size, W kernel width.
Reference: Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060, sections 6 and 7.
Differs: no pad or earlier document reaches the state or the convolution, and a call may go on from any state.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .conv import CausalConv1d
from .masks import SequenceInfo
from .precision import Float32Islands, state_dtype
from .recurrent import RecurrentState, check_step_sizes, init_dt_bias, step_sizes
from .ssd import ssd_scan, ssd_scan_reference


class GatedRMSNorm(nn.Module):
    """RMS norm in groups, with a gate before or after it.

    Args:
        size: Normalised size I.
        num_groups: Groups that are normalised on their own. Must divide `size`.
        eps: Added to the mean square.
        norm_before_gate: Whether the gate is applied after the norm.
    """

    def __init__(self, size: int, *, num_groups: int = 1, eps: float = 1e-5, norm_before_gate: bool = False) -> None:
        super().__init__()
        self.num_groups, self.eps, self.norm_before_gate = num_groups, eps, norm_before_gate
        self.weight = nn.Parameter(torch.empty(size))
        self.init_weights()

    def init_weights(self, std: float = 0.0) -> None:
        """Start as the plain normalisation; `std` is not used."""
        init.ones_(self.weight)

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        """Normalise `[..., I]` and multiply by `gate` of the same shape; the result is at least float32."""
        dtype = state_dtype(hidden_states.dtype)
        hidden_states = hidden_states.to(dtype)
        if not self.norm_before_gate:
            hidden_states = hidden_states * gate
        grouped = hidden_states.unflatten(-1, (self.num_groups, -1))
        hidden_states = nn.functional.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2)
        hidden_states = hidden_states * self.weight.to(dtype)
        return hidden_states * gate if self.norm_before_gate else hidden_states


class Mamba2Mixer(Float32Islands):
    """Mix tokens through a matrix memory in each head that fades at a rate chosen by the token.

    Args:
        hidden_size: Width D of the residual stream.
        state_size: State entries N of each channel.
        head_dim: Width P of a head.
        num_heads: Number of heads H; `None` for `expand * hidden_size / head_dim`.
        expand: I as a multiple of D, unless `num_heads` is given.
        num_groups: Groups G of heads that share B and C. Must divide `num_heads`.
        conv_kernel: Width W of the short convolution over x, B and C.
        chunk_size: Tokens handled by one matrix product; changes speed, not the function.
        conv_bias: Whether the convolution has a bias.
        bias: Whether `in_proj` and `out_proj` have biases.
        gate_norm: Whether the output is normalised (in G groups) where it is gated.
        norm_eps: Added to the mean square in that norm.
        norm_before_gate: Whether the gate is applied after the norm.
        dt_limit_min: Step sizes are raised to this.
        dt_limit_max: Step sizes are lowered to this; `None` for no bound.
        activation: After the convolution; the gate is always SiLU.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        dt_init_floor: Initial step sizes are raised to this.
        a_min: Smallest initial -A.
        a_max: Largest initial -A.
    """

    float32_names = ("A_log", "D", "dt_bias")
    full_precision = ("in_proj",)  # it makes the step sizes, B and C too
    state_type = RecurrentState

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 128,
        head_dim: int = 64,
        num_heads: int | None = None,
        expand: int = 2,
        num_groups: int = 1,
        conv_kernel: int = 4,
        chunk_size: int = 64,
        conv_bias: bool = True,
        bias: bool = False,
        gate_norm: bool = True,
        norm_eps: float = 1e-5,
        norm_before_gate: bool = False,
        dt_limit_min: float = 0.0,
        dt_limit_max: float | None = None,
        activation: str = "silu",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        a_min: float = 1.0,
        a_max: float = 16.0,
    ) -> None:
        super().__init__()
        sizes = {"state_size": state_size, "head_dim": head_dim, "expand": expand, "num_groups": num_groups}
        for name, size in (sizes | {"conv_kernel": conv_kernel, "chunk_size": chunk_size}).items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if num_heads is None:
            if expand * hidden_size % head_dim:
                raise ValueError(f"head_dim={head_dim} must divide expand * hidden_size={expand * hidden_size}")
            num_heads = expand * hidden_size // head_dim
        if num_heads < 1 or num_heads % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide num_heads={num_heads}")
        if activation not in ACT2FN:
            raise ValueError(f"activation={activation!r} must be one of {sorted(ACT2FN)}")
        if dt_limit_min < 0 or (dt_limit_max is not None and dt_limit_max < dt_limit_min):
            raise ValueError(f"dt_limit_min={dt_limit_min} must be at least 0 and at most dt_limit_max={dt_limit_max}")
        if not 0 < a_min <= a_max:
            raise ValueError(f"a_min={a_min} must be above 0 and at most a_max={a_max}")
        check_step_sizes(dt_min, dt_max)
        self.num_states, self.head_dim, self.num_heads, self.num_groups = state_size, head_dim, num_heads, num_groups
        self.hidden_size, self.intermediate_size, self.chunk_size = hidden_size, num_heads * head_dim, chunk_size
        self.dt_limits, self.dt_range, self.a_range = (
            (dt_limit_min, dt_limit_max),
            (dt_min, dt_max, dt_init_floor),
            (a_min, a_max),
        )
        self.activation = ACT2FN[activation]
        conv_size = self.intermediate_size + 2 * num_groups * state_size
        self.in_proj = nn.Linear(hidden_size, self.intermediate_size + conv_size + num_heads, bias=bias)
        self.conv1d = CausalConv1d(conv_size, conv_kernel, bias=conv_bias)
        wide = state_dtype(torch.get_default_dtype())  # whatever type the model is built in
        self.dt_bias = nn.Parameter(torch.empty(num_heads, dtype=wide))
        self.A_log = nn.Parameter(torch.empty(num_heads, dtype=wide))
        self.D = nn.Parameter(torch.empty(num_heads, dtype=wide))
        self.norm = None
        if gate_norm:
            self.norm = GatedRMSNorm(
                self.intermediate_size, num_groups=num_groups, eps=norm_eps, norm_before_gate=norm_before_gate
            )
        self.out_proj = nn.Linear(self.intermediate_size, hidden_size, bias=bias)
        self.init_weights(0.02)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Published initial values: step sizes log-uniform, -A uniform, D = 1; `std` is not used."""
        self.conv1d.init_weights(std)
        init_dt_bias(self.dt_bias, *self.dt_range)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(*self.a_range).log())
        init.ones_(self.D)

    def forward(
        self, hidden_states: Tensor, state: RecurrentState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """Map `[B, T, D]` to `[B, T, D]`; also return the state after each row's last real token.

        Args:
            hidden_states: `[B, T, D]`.
            state: `conv_states` `[B, I + 2 G N, W - 1]` and `recurrent_states` `[B, H, P, N]`; `None` at the start.
            sequence: Pads and document borders; `None` for whole rows of one document.
        """
        return self._mix(hidden_states, state, sequence, self.conv1d, self._scan)

    def forward_reference(
        self, hidden_states: Tensor, state: RecurrentState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """Do what `forward` does, convolving and scanning one token at a time."""
        return self._mix(hidden_states, state, sequence, self.conv1d.forward_reference, ssd_scan_reference)

    def _mix(self, hidden_states, state, sequence, convolve, scan) -> tuple[Tensor, RecurrentState]:
        starts, lengths, mask = None, None, None
        if sequence is not None:
            starts, lengths, mask = sequence.starts, sequence.lengths, sequence.token_mask
        conv_states, recurrent_states = (None, None) if state is None else (state.conv_states, state.recurrent_states)
        inner, conv_size = self.intermediate_size, self.conv1d.in_channels
        gate, mixed, dt = self.in_proj(hidden_states).split([inner, conv_size, self.num_heads], dim=-1)
        mixed, conv_states = convolve(mixed, conv_states, starts, lengths)
        mixed = self.activation(mixed)
        value, key, query = mixed.split([inner, (conv_size - inner) // 2, (conv_size - inner) // 2], dim=-1)
        value = value.unflatten(-1, (self.num_heads, self.head_dim))
        key = key.unflatten(-1, (self.num_groups, self.num_states))
        query = query.unflatten(-1, (self.num_groups, self.num_states))
        dt = step_sizes(dt, self.dt_bias, mask, *self.dt_limits)
        rate = -self.A_log.to(dt.dtype).exp()
        output, recurrent_states = scan(value, dt, rate, key, query, self.D, recurrent_states, starts)
        output, gate = output.flatten(-2), nn.functional.silu(gate)
        output = output * gate if self.norm is None else self.norm(output, gate)
        output = self.out_proj(output.to(hidden_states.dtype))
        return output, RecurrentState(conv_states.to(hidden_states.dtype), recurrent_states)

    def _scan(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        return ssd_scan(*inputs, chunk_size=self.chunk_size)

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one row and type of each state tensor; the same after any number of tokens."""
        return {
            "conv_states": ((self.conv1d.in_channels, self.conv1d.num_past), dtype),
            "recurrent_states": ((self.num_heads, self.head_dim, self.num_states), state_dtype(dtype)),
        }

    def state_size(self, num_tokens: int) -> int:
        """Elements of one row's state."""
        return self.conv1d.in_channels * self.conv1d.num_past + self.intermediate_size * self.num_states
