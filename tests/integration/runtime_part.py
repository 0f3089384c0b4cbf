"""What a user brings: a mixer with a state of its own, a leaky average of the past, and a kind of position."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init


@dataclass
class LeakyState:
    """The average so far, `[B, D]`."""

    recurrent_states: Tensor


class LeakyMixer(nn.Module):
    """Mix tokens by a running average that forgets at one learned rate.

    Args:
        hidden_size: Width D of the residual stream.
        start: Fraction kept at the start of training.
    """

    state_type = LeakyState

    def __init__(self, hidden_size: int, *, start: float = 0.5) -> None:
        super().__init__()
        self.start = start
        self.keep = nn.Parameter(torch.empty(hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Start every channel alike."""
        init.constant_(self.keep, self.start)

    def forward(self, hidden_states, state=None, sequence=None):
        """Map `[B, T, D]` to `[B, T, D]`."""
        average = torch.zeros_like(hidden_states[:, 0]) if state is None else state.recurrent_states
        outputs = []
        for t in range(hidden_states.shape[1]):
            if sequence is not None and sequence.starts is not None:
                average = average.masked_fill(sequence.starts[:, t, None], 0.0)
            new = self.keep * average + hidden_states[:, t]
            if sequence is not None and sequence.token_mask is not None:
                new = torch.where(sequence.token_mask[:, t, None], new, average)
            average = new
            outputs.append(average)
        return self.out_proj(torch.stack(outputs, dim=1)), LeakyState(average)

    def state_spec(self, num_tokens, dtype):
        """One vector a row."""
        return {"recurrent_states": ((self.keep.shape[0],), dtype)}

    def state_size(self, num_tokens):
        """One vector a row."""
        return self.keep.shape[0]


class FadingPosition(nn.Module):
    """Scale keys by a number that falls with the position.

    Args:
        head_dim: Width of a head.
        rate: How fast it falls.
    """

    def __init__(self, head_dim: int, *, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, query, key, sequence):
        """Change keys `[B, G, T, K]`."""
        return query, key * (-self.rate * sequence.positions[:, None, :, None]).exp().to(key.dtype)
