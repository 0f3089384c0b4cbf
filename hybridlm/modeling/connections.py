"""What all residual parts share, and what those with several streams share.

A residual part stands around one sub-layer. Calling it reads the stream: what the sub-layer sees, and a context. Then
`write(stream, update, context)` puts the sub-layer's output back. Parameters are used only in the call, so that
hooks on it (offloading, sharding) find them in place; what `write` needs of them travels in the context.

Shapes: B batch, T tokens, n streams, D hidden size. The stream is `[B, T, D]`, with several streams `[B, T, n, D]`.
Reference: LayerScale: Touvron et al. 2021, "Going deeper with Image Transformers", arXiv:2103.17239.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .precision import Float32Islands, without_autocast


class Residual(Float32Islands):
    """The options of what is added, common to all residual parts.

    Args:
        hidden_size: Width D of the residual stream.
        multiplier: Factor on what is added.
        layer_scale: Initial value of a learned factor per channel; `None` for no such factor.
        dropout: Probability of dropping an added element in training.
    """

    placements: tuple[str, ...] = ("pre", "post", "sandwich")

    def __init__(
        self, hidden_size: int, *, multiplier: float = 1.0, layer_scale: float | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        self.multiplier, self.layer_scale, self.dropout = multiplier, layer_scale, dropout
        self.index = 0
        self.scale = None if layer_scale is None else nn.Parameter(torch.empty(hidden_size))

    @staticmethod
    def head(hidden_size: int, **options: Any) -> nn.Module | None:
        """Make the module that turns embeddings into the stream and back; `None` when the stream is `[B, T, D]`."""
        return None

    def place(self, index: int) -> None:
        """Take note of the number of sub-layers before this one, on which initial values may depend."""
        self.index = index
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Set the learned factor to its initial value."""
        if self.scale is not None:
            init.constant_(self.scale, self.layer_scale)

    def scaled(self, update: Tensor, scale: Tensor | None) -> Tensor:
        """What is added of a sub-layer's output `[B, T, D]`, given the learned factor `[D]`."""
        if scale is not None:
            update = update * scale
        if self.multiplier != 1.0:
            update = update * self.multiplier
        if self.dropout:
            update = nn.functional.dropout(update, self.dropout, self.training)
        return update


class Gates(NamedTuple):
    """How one sub-layer is tied to the streams; leading dimensions `[B, T]` are absent where no token differs.

    Attributes:
        read: `[..., n]`, weight of each stream in what the sub-layer sees.
        write: `[..., n]`, factor on the sub-layer's output in each stream.
        mix: `[..., n, n]`, part of stream i (first index) that goes on in stream j (second index).
    """

    read: Tensor
    write: Tensor
    mix: Tensor


class Connection(NamedTuple):
    """The context of a residual part with several streams: its gates, and the factor per channel `[D]`."""

    write: Tensor
    mix: Tensor
    scale: Tensor | None


class StreamResidual(Residual):
    """A residual part with n streams `[B, T, n, D]`; a subclass says which gates a token has.

    `x'_j = sum_i mix[i, j] x_i + write[j] f(sum_i read[i] x_i)`. Gates are computed in float32 (float64 for a float64
    stream), the streams are mixed in their own type, as in DeepSeek-V4.
    """

    # with `post`, norm(x + f(x)), there would be a norm of every stream and none of what the sub-layer sees
    placements = ("pre", "sandwich")
    float32_names = ("mix_weight", "mix_base", "mix_scale")

    def __init__(self, hidden_size: int, *, num_streams: int, **options: Any) -> None:
        super().__init__(hidden_size, **options)
        if num_streams < 1:
            raise ValueError(f"num_streams={num_streams} must be at least 1")
        self.hidden_size, self.num_streams = hidden_size, num_streams

    def gates(self, stream: Tensor) -> Gates:
        """The gates of every token of `[B, T, n, D]`."""
        raise NotImplementedError

    def forward(self, stream: Tensor) -> tuple[Tensor, Connection]:
        """Read the streams `[B, T, n, D]`: what the sub-layer sees, `[B, T, D]`, and the context for `write`."""
        gates = self.gates(stream)
        return weighted_sum(gates.read, stream), Connection(gates.write, gates.mix, self.scale)

    def write(self, stream: Tensor, update: Tensor, context: Connection) -> Tensor:
        """The streams `[B, T, n, D]` after the sub-layer's output `[B, T, D]`."""
        dtype, update = stream.dtype, self.scaled(update, context.scale)
        with without_autocast(stream):
            mixed = torch.matmul(context.mix.to(dtype).transpose(-1, -2), stream)
        return mixed + context.write.to(dtype).unsqueeze(-1) * update.unsqueeze(-2)

    def extra_repr(self) -> str:
        """Show the number of streams."""
        return f"{self.hidden_size}, num_streams={self.num_streams}"


class MeanHead(Float32Islands):
    """Streams that all begin as the embedding and end as their mean.

    Args:
        hidden_size: Width D of the residual stream.
        num_streams: Number of streams n.
    """

    def __init__(self, hidden_size: int, num_streams: int) -> None:
        super().__init__()
        self.hidden_size, self.num_streams = hidden_size, num_streams

    def expand(self, hidden_states: Tensor) -> Tensor:
        """Copy `[B, T, D]` into every stream of `[B, T, n, D]`."""
        return hidden_states.unsqueeze(2).expand(-1, -1, self.num_streams, -1)

    def collapse(self, stream: Tensor) -> Tensor:
        """Turn the streams `[B, T, n, D]` into hidden states `[B, T, D]`."""
        return self(stream)  # through the call, where hooks put parameters in place

    def forward(self, stream: Tensor) -> Tensor:
        """The mean of the streams."""
        return stream.mean(2)


def weighted_sum(weights: Tensor, stream: Tensor) -> Tensor:
    """The sum of the streams `[B, T, n, D]` by weights `[..., n]` of a wider type: `[B, T, D]` in the stream's type."""
    return (weights.unsqueeze(-1) * stream).sum(2).to(stream.dtype)
