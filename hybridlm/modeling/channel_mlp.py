"""Plain feed-forward channel mixer: up, activation, down.

Shapes: B batch, T tokens, D hidden size.
Reference: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.3.
Differs: the activation is free, and the biases are an option.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .masks import SequenceInfo


class MLP(nn.Module):
    """Two projections with an activation in between; every token on its own.

    Args:
        hidden_size: Width D of the residual stream.
        intermediate_size: Width between the projections; `4 * hidden_size` if not given.
        activation: A name of `transformers.activations.ACT2FN`.
        bias: Whether the projections have biases.
        dropout: Probability of dropping an output in training.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int | None = None,
        activation: str = "gelu",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        if intermediate_size < 1:
            raise ValueError(f"intermediate_size={intermediate_size} must be at least 1")
        if activation not in ACT2FN:
            raise ValueError(f"activation: unknown {activation!r}, expected one of {sorted(ACT2FN)}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be in [0, 1)")
        self.dropout = dropout
        self.intermediate_size = intermediate_size
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = ACT2FN[activation]

    def init_weights(self, std: float) -> None:
        """Nothing to set: every parameter belongs to a projection."""

    def forward(
        self, hidden_states: Tensor, state: None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, None]:
        """Map `[B, T, D]` to `[B, T, D]`; there is no state."""
        output = self.down_proj(self.activation(self.up_proj(hidden_states)))
        return nn.functional.dropout(output, self.dropout, self.training), None

    def forward_reference(
        self, hidden_states: Tensor, state: None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, None]:
        """Give the result of `forward`, token by token."""
        tokens = [self.forward(token)[0] for token in hidden_states.unbind(1)]
        return torch.stack(tokens, dim=1), None

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """No state at any length."""
        return {}

    def state_size(self, num_tokens: int) -> int:
        """No state at any length."""
        return 0
