"""Memory as a gated moving sum of inputs, the form in which surveys write down neural memories: a baseline.

    M_t = lambda M_{t-1} + sigma(x_t) x_t,    o_t = W M_t,    sigma(x) = sigmoid(w x + b),    lambda = exp(-exp(A_log))

This is not Titans, but what is left of it when the memory is a vector: there are no keys, no values, no gradient, and
every token reads the same. sigma is called surprise, and knows nothing of the memory: with |x - M| / sqrt(D) in its
place the memory would grow without end, by about |x| / sqrt(D) times itself a token.

Shapes: B batch, T tokens, D hidden size.
Reference: the simplification of Behrouz et al. 2024, "Titans", arXiv:2501.00663, that is found in surveys.
Differs: lambda is learned, one number a channel; the output has a projection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .masks import SequenceInfo
from .precision import Float32Islands, project, state_dtype
from .scan import selective_scan, selective_scan_reference


@dataclass
class EMAMemoryState:
    """What the mixer carries from one call to the next.

    Attributes:
        recurrent_states: `[B, D]`, the memory, float32, or float64 in a float64 model.
    """

    recurrent_states: Tensor


class EMAMemoryMixer(Float32Islands):
    """Keep a decaying sum of what was surprising; a simplification, and a baseline that is not Titans.

    Args:
        hidden_size: Width D of the residual stream.
        decay_min: Smallest initial lambda of a channel.
        decay_max: Largest initial lambda; initial memories reach from 1 / (1 - min) to 1 / (1 - max) tokens back.
    """

    float32_names = ("A_log",)
    full_precision = ("surprise_proj",)
    state_type = EMAMemoryState

    def __init__(self, hidden_size: int, *, decay_min: float = 0.9, decay_max: float = 0.999) -> None:
        super().__init__()
        if not 0 < decay_min <= decay_max < 1:
            raise ValueError(f"decay_min={decay_min} must be above 0 and at most decay_max={decay_max}, below 1")
        self.hidden_size, self.decays = hidden_size, (decay_min, decay_max)
        wide = state_dtype(torch.get_default_dtype())  # whatever type the model is built in
        self.surprise_proj = nn.Linear(hidden_size, 1)
        self.A_log = nn.Parameter(torch.empty(hidden_size, dtype=wide))
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.init_weights(0.02)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Spread the reach of channels evenly on a logarithmic scale; `std` is not used."""
        low, high = (torch.logit(torch.tensor(x, dtype=torch.float64)) for x in self.decays)
        spread = torch.linspace(0, 1, self.hidden_size, dtype=torch.float64, device=self.A_log.device)
        rates = -nn.functional.logsigmoid(low + (high - low) * spread)
        init.copy_(self.A_log, rates.log().to(self.A_log.dtype))

    def forward(
        self, hidden_states: Tensor, state: EMAMemoryState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, EMAMemoryState]:
        """Map `[B, T, D]` to `[B, T, D]`; also return the memory after each row's last real token."""
        return self._mix(hidden_states, state, sequence, selective_scan)

    def forward_reference(
        self, hidden_states: Tensor, state: EMAMemoryState | None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, EMAMemoryState]:
        """Do what `forward` does, one token at a time."""
        return self._mix(hidden_states, state, sequence, selective_scan_reference)

    def _mix(self, hidden_states, state, sequence, scan) -> tuple[Tensor, EMAMemoryState]:
        starts, mask = (None, None) if sequence is None else (sequence.starts, sequence.token_mask)
        memory = None if state is None else state.recurrent_states[..., None]
        surprise = torch.sigmoid(
            project(hidden_states, self.surprise_proj.weight, self.surprise_proj.bias)
        )  # [B, T, 1]
        # steps of length 1 with the rate log lambda; a pad takes a step of length 0, which changes nothing
        steps = torch.ones_like(hidden_states, dtype=surprise.dtype)
        if mask is not None:
            steps = steps.masked_fill(~mask[..., None], 0.0)
        rate = -self.A_log.exp()[:, None].to(surprise.dtype)  # [D, 1]
        output, memory = scan(hidden_states, steps, rate, surprise, torch.ones_like(surprise), None, memory, starts)
        return self.out_proj(output.to(hidden_states.dtype)), EMAMemoryState(memory[..., 0])

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one row and type of the memory; the same after any number of tokens."""
        return {"recurrent_states": ((self.hidden_size,), state_dtype(dtype))}

    def state_size(self, num_tokens: int) -> int:
        """Elements of one row's state."""
        return self.hidden_size
