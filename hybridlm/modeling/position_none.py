"""No position encoding: the causal mask and recurrent layers below carry the order."""

from torch import Tensor, nn

from .masks import SequenceInfo


class NoPosition(nn.Module):
    """Leave queries and keys as they are.

    Args:
        head_dim: Width K of a head.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Return `[B, H, T, K]` and `[B, G, T, K]` unchanged."""
        return query, key
