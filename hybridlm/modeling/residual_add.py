"""The plain residual stream: a sub-layer reads it and adds to it.

Reference: He et al. 2015, arXiv:1512.03385; LayerScale: Touvron et al. 2021, arXiv:2103.17239.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init


class AddResidual(nn.Module):
    """`x + multiplier * scale * f(x)`.

    Args:
        hidden_size: Width D of the residual stream.
        multiplier: Factor on what is added.
        layer_scale: Initial value of a learned factor per channel; `None` for no such factor.
        dropout: Probability of dropping an added element in training.
    """

    def __init__(
        self, hidden_size: int, *, multiplier: float = 1.0, layer_scale: float | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        self.multiplier, self.layer_scale, self.dropout = multiplier, layer_scale, dropout
        self.scale = None if layer_scale is None else nn.Parameter(torch.empty(hidden_size))
        self.init_weights(0.0)

    def init_weights(self, std: float) -> None:
        """Set the learned factor to its initial value."""
        if self.scale is not None:
            init.constant_(self.scale, self.layer_scale)

    def read(self, stream: Tensor) -> Tensor:
        """What the sub-layer sees of the stream `[B, T, D]`."""
        return stream

    def write(self, stream: Tensor, update: Tensor) -> Tensor:
        """The stream after the sub-layer's output `[B, T, D]`."""
        if self.scale is not None:
            update = update * self.scale
        if self.multiplier != 1.0:
            update = update * self.multiplier
        if self.dropout:
            update = nn.functional.dropout(update, self.dropout, self.training)
        return stream + update
