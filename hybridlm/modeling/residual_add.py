"""The plain residual stream: a sub-layer reads it and adds to it.

Reference: He et al. 2015, arXiv:1512.03385; LayerScale: Touvron et al. 2021, arXiv:2103.17239.
"""

from torch import Tensor

from .connections import Residual


class AddResidual(Residual):
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
        super().__init__(hidden_size, multiplier=multiplier, layer_scale=layer_scale, dropout=dropout)
        self.init_weights(0.0)

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read the stream `[B, T, D]`: what the sub-layer sees, and the learned factor for `write`."""
        return stream, self.scale

    def write(self, stream: Tensor, update: Tensor, context: Tensor | None) -> Tensor:
        """The stream after the sub-layer's output `[B, T, D]`."""
        return stream + self.scaled(update, context)
