"""Mamba mixer: a selective state space model with one decay for each channel and state entry.

Shapes: B batch, T tokens, D hidden size, I inner width, N state size, R rank of the step size, W kernel width.
Reference: Gu and Dao 2023, "Mamba", arXiv:2312.00752, section 3; Lieber et al. 2024, "Jamba", arXiv:2403.19887.
Differs: `dt_proj` has no bias of its own: the bias is `dt_bias`, kept in float32 and added before the softplus.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .conv import CausalConv1d
from .masks import SequenceInfo
from .norms import RMSNorm
from .precision import Float32Islands, state_dtype
from .recurrent import RecurrentState, check_step_sizes, init_dt_bias, step_sizes
from .scan import selective_scan, selective_scan_reference


class MambaMixer(Float32Islands):
    """Mix tokens through a diagonal linear recurrence whose step size, input and output depend on the token.

    Args:
        hidden_size: Width D of the residual stream.
        state_size: State entries N of each channel.
        conv_kernel: Width W of the short convolution.
        expand: I as a multiple of D, unless `intermediate_size` is given.
        intermediate_size: Inner width I.
        dt_rank: Rank R of the step size's projection; `None` for D / 16 rounded up.
        conv_bias: Whether the convolution has a bias.
        bias: Whether `in_proj` and `out_proj` have biases.
        inner_norms: Whether the low-rank step size, B and C are normalised, as in Jamba.
        norm_eps: Added to the mean square in those norms.
        activation: After the convolution; the gate is always SiLU.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        dt_init_floor: Initial step sizes are raised to this.
    """

    float32_names = ("A_log", "D", "dt_bias")
    full_precision = ("x_proj", "dt_proj")
    state_type = RecurrentState

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        intermediate_size: int | None = None,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        inner_norms: bool = False,
        norm_eps: float = 1e-6,
        activation: str = "silu",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        inner = expand * hidden_size if intermediate_size is None else intermediate_size
        rank = math.ceil(hidden_size / 16) if dt_rank is None else dt_rank
        sizes = {"state_size": state_size, "conv_kernel": conv_kernel, "expand": expand, "dt_rank": rank}
        for name, size in (sizes | {"intermediate_size": inner}).items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if activation not in ACT2FN:
            raise ValueError(f"activation={activation!r} must be one of {sorted(ACT2FN)}")
        check_step_sizes(dt_min, dt_max)
        self.hidden_size, self.num_states, self.intermediate_size, self.dt_rank = hidden_size, state_size, inner, rank
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.activation = ACT2FN[activation]
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=bias)
        self.conv1d = CausalConv1d(inner, conv_kernel, bias=conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        wide = state_dtype(torch.get_default_dtype())  # whatever type the model is built in
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=wide))
        self.A_log = nn.Parameter(torch.empty(inner, state_size, dtype=wide))
        self.D = nn.Parameter(torch.empty(inner, dtype=wide))
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)
        self.dt_norm = RMSNorm(rank, eps=norm_eps) if inner_norms else None
        self.b_norm = RMSNorm(state_size, eps=norm_eps) if inner_norms else None
        self.c_norm = RMSNorm(state_size, eps=norm_eps) if inner_norms else None
        self.init_weights(0.02)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Published initial values: step sizes log-uniform, A = -1 ... -N, D = 1; `std` is not used."""
        self.conv1d.init_weights(std)
        bound = self.dt_rank**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        init_dt_bias(self.dt_bias, *self.dt_range)
        entries = torch.arange(1, self.num_states + 1, device=self.A_log.device, dtype=self.A_log.dtype)
        init.copy_(self.A_log, entries.log().expand_as(self.A_log))
        init.ones_(self.D)

    def forward(
        self, hidden_states: Tensor, state: RecurrentState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """Map `[B, T, D]` to `[B, T, D]`; also return the state after each row's last real token.

        Args:
            hidden_states: `[B, T, D]`.
            state: `conv_states` `[B, I, W - 1]` and `recurrent_states` `[B, I, N]`; `None` at the start.
            sequence: Pads and document borders; `None` for whole rows of one document.
        """
        return self._mix(hidden_states, state, sequence, self.conv1d, selective_scan)

    def forward_reference(
        self, hidden_states: Tensor, state: RecurrentState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """Do what `forward` does, convolving and scanning one token at a time."""
        return self._mix(hidden_states, state, sequence, self.conv1d.forward_reference, selective_scan_reference)

    def _mix(self, hidden_states, state, sequence, convolve, scan) -> tuple[Tensor, RecurrentState]:
        starts = None if sequence is None else sequence.starts
        lengths = None if sequence is None else sequence.lengths
        conv_states, recurrent_states = (None, None) if state is None else (state.conv_states, state.recurrent_states)
        value, gate = self.in_proj(hidden_states).chunk(2, dim=-1)  # each [B, T, I]
        value, conv_states = convolve(value, conv_states, starts, lengths)
        value = self.activation(value)
        dt, key, query = self._select(value, sequence)
        rate = -self.A_log.to(dt.dtype).exp()
        output, recurrent_states = scan(value, dt, rate, key, query, self.D, recurrent_states, starts)
        output = (output * nn.functional.silu(gate)).to(hidden_states.dtype)
        return self.out_proj(output), RecurrentState(conv_states.to(hidden_states.dtype), recurrent_states)

    def _select(self, value: Tensor, sequence: SequenceInfo | None) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes `[B, T, I]`, 0 at pads, at least float32, and B and C `[B, T, N]`."""
        dt, key, query = self.x_proj(value).split([self.dt_rank, self.num_states, self.num_states], dim=-1)
        if self.dt_norm is not None:
            dt, key, query = self.dt_norm(dt), self.b_norm(key), self.c_norm(query)
        mask = None if sequence is None else sequence.token_mask
        return step_sizes(self.dt_proj(dt), self.dt_bias, mask), key, query

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one row and type of each state tensor; the same after any number of tokens."""
        return {
            "conv_states": ((self.intermediate_size, self.conv1d.num_past), dtype),
            "recurrent_states": ((self.intermediate_size, self.num_states), state_dtype(dtype)),
        }

    def state_size(self, num_tokens: int) -> int:
        """Elements of one row's state."""
        return self.intermediate_size * (self.conv1d.num_past + self.num_states)
