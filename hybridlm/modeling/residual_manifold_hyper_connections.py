"""Manifold-constrained hyper-connections (mHC): n residual streams, mixed by doubly stochastic matrices.

A product of doubly stochastic matrices is one too, so the streams neither blow up nor fade with depth, and their mean
goes through the mixing unchanged.

Shapes: B batch, T tokens, n streams, D hidden size.
Reference: Xie et al. 2025, "mHC: Manifold-Constrained Hyper-Connections", arXiv:2512.24880; conventions and parameters
of DeepSeek-V4 as in transformers' `DeepseekV4HyperConnection` and `DeepseekV4HyperHead`.
Differs: the initial values. They are chosen so that a new model is the plain residual model, up to `eps` for a
sub-layer: streams are written equally, and read with shares that add up to 1. The shares differ, or equal streams would
get equal gradients forever. transformers draws all weights, with scales of 1 and no bias; the paper fixes only the
scales.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .connections import Gates, MeanHead, StreamResidual, weighted_sum
from .precision import project, state_dtype

# logit of a stream's own entry against each other one: at the start 0.95 of a stream goes on as itself when n = 4
_OWN_STREAM = 4.0


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Turn matrices `[..., n, n]` into doubly stochastic ones.

    A softmax over rows, then columns and rows are divided by their sums by turns, columns last.

    Args:
        logits: `[..., n, n]`.
        iterations: Times that the columns are divided.
        eps: Added to every entry and to every sum.
    """
    matrix = logits.movedim((-2, -1), (0, 1)).softmax(1) + eps  # sums over leading dimensions are quick
    matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    # stacked entry by entry, so that gradients too have the tokens last: the backward pass takes a third of the time
    return torch.stack(matrix.flatten(0, 1).unbind(0), dim=-1).unflatten(-1, matrix.shape[:2])


def _logit(share: float, eps: float) -> float:
    """What `sigmoid(...) + eps` makes a share of."""
    share = min(share - eps, 1 - 1e-6)  # with one stream the share is 1, which no sigmoid reaches
    return math.log(share / (1 - share))


def _normalized(stream: Tensor, eps: float) -> Tensor:
    """All streams of a token as one vector over its root mean square, `[B, T, n * D]`."""
    flat = stream.flatten(-2).to(state_dtype(stream.dtype))
    return nn.functional.rms_norm(flat, flat.shape[-1:], None, eps)


def _check(num_streams: int, eps: float, norm_eps: float) -> None:
    if not 0 <= eps < 0.5 / num_streams:
        raise ValueError(f"eps={eps} must lie in [0, 1 / (2 num_streams))")
    if not norm_eps > 0:
        raise ValueError(f"norm_eps={norm_eps} must be above 0")


class ManifoldHyperConnectionsResidual(StreamResidual):
    """`H' = C^T H + post f(pre^T H)`, with `C` `[n, n]` doubly stochastic, `pre` and `post` `[n]`, all of the token.

    `u` is the token's streams, flattened and normalised; then `pre = sigmoid(.) + eps`, `post = 2 sigmoid(.)` and
    `C = sinkhorn(.)` of `scale * (u W^T) + base`.

    `mix_weight` `[n * n + 2n, n * D]` is `W`, `mix_base` `[n * n + 2n]` and `mix_scale` `[3]`, each in the order
    pre, post, C. They stay float32.

    Args:
        hidden_size: Width D of the residual stream.
        num_streams: Number of streams n.
        sinkhorn_iterations: Times that the columns of `C` are divided by their sums.
        eps: Added to `pre`, and in the Sinkhorn iteration.
        scale_init: Initial scale of what depends on the token.
        norm_eps: Of the norm over all streams.
        multiplier: Factor on what is added.
        layer_scale: Initial value of a learned factor per channel; `None` for no such factor.
        dropout: Probability of dropping an added element in training.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_streams: int = 4,
        sinkhorn_iterations: int = 20,
        eps: float = 1e-6,
        scale_init: float = 0.01,
        norm_eps: float = 1e-6,
        multiplier: float = 1.0,
        layer_scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        shared = {"multiplier": multiplier, "layer_scale": layer_scale, "dropout": dropout}
        super().__init__(hidden_size, num_streams=num_streams, **shared)
        if sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_iterations={sinkhorn_iterations} must be at least 1")
        _check(num_streams, eps, norm_eps)
        self.sinkhorn_iterations, self.eps = sinkhorn_iterations, eps
        self.scale_init, self.norm_eps = scale_init, norm_eps
        num_gates = num_streams * (num_streams + 2)
        self.mix_weight = nn.Parameter(torch.empty(num_gates, num_streams * hidden_size))
        self.mix_base = nn.Parameter(torch.empty(num_gates))
        self.mix_scale = nn.Parameter(torch.empty(3))
        self.init_weights(0.02)

    @staticmethod
    def head(hidden_size: int, **options: Any) -> "ManifoldHead":
        """Streams that begin as the embedding and end as a gated sum."""
        names = ("num_streams", "eps", "scale_init", "norm_eps")
        return ManifoldHead(hidden_size, **{name: options[name] for name in names})

    def init_weights(self, std: float) -> None:
        """Start as the plain residual; only `C` depends on the token then, as it may on equal streams."""
        super().init_weights(std)
        n = self.num_streams
        shares = torch.full((n,), _logit(0.5 / n, self.eps))
        shares[self.index % n] = _logit(0.5 + 0.5 / n, self.eps)  # about half from one stream, as in hyper-connections
        init.copy_(self.mix_base, torch.cat([shares, torch.zeros(n), _OWN_STREAM * torch.eye(n).flatten()]))
        weight = torch.zeros_like(self.mix_weight)
        weight[2 * n :].normal_(std=std)
        init.copy_(self.mix_weight, weight)
        init.constant_(self.mix_scale, self.scale_init)

    def gates(self, stream: Tensor) -> Gates:
        """The gates of every token of `[B, T, n, D]`."""
        n = self.num_streams
        sizes = [n, n, n * n]
        logits = project(_normalized(stream, self.norm_eps), self.mix_weight)  # [B, T, n * n + 2n]
        parts = zip(logits.split(sizes, -1), self.mix_scale.unbind(), self.mix_base.split(sizes), strict=True)
        pre, post, mix = (part * scale + base for part, scale, base in parts)
        mix = sinkhorn(mix.unflatten(-1, (n, n)), self.sinkhorn_iterations, self.eps)
        return Gates(pre.sigmoid() + self.eps, 2 * post.sigmoid(), mix)


class ManifoldHead(MeanHead):
    """Streams that all begin as the embedding and end as a sum, gated as a sub-layer's input is.

    Args:
        hidden_size: Width D of the residual stream.
        num_streams: Number of streams n.
        eps: Added to the gates.
        scale_init: Initial scale of what depends on the token.
        norm_eps: Of the norm over all streams.
    """

    float32_names = ("mix_weight", "mix_base", "mix_scale")

    def __init__(
        self, hidden_size: int, *, num_streams: int, eps: float = 1e-6, scale_init: float = 0.01, norm_eps: float = 1e-6
    ) -> None:
        super().__init__(hidden_size, num_streams)
        self.eps, self.scale_init, self.norm_eps = eps, scale_init, norm_eps
        self.mix_weight = nn.Parameter(torch.empty(num_streams, num_streams * hidden_size))
        self.mix_base = nn.Parameter(torch.empty(num_streams))
        self.mix_scale = nn.Parameter(torch.empty(1))
        self.init_weights(0.0)

    def init_weights(self, std: float) -> None:
        """Start as the mean; `std` is not used."""
        init.zeros_(self.mix_weight)
        init.constant_(self.mix_base, _logit(1 / self.num_streams, self.eps))
        init.constant_(self.mix_scale, self.scale_init)

    def forward(self, stream: Tensor) -> Tensor:
        """The gated sum `[B, T, D]` of the streams `[B, T, n, D]`."""
        logits = project(_normalized(stream, self.norm_eps), self.mix_weight)  # [B, T, n]
        gates = (logits * self.mix_scale + self.mix_base).sigmoid() + self.eps
        return weighted_sum(gates, stream)
