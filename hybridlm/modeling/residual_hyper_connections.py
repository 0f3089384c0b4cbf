"""Hyper-connections: n residual streams that every sub-layer reads, mixes and writes with learned weights.

Shapes: B batch, T tokens, n streams, D hidden size.
Reference: Zhu et al. 2024, "Hyper-Connections", arXiv:2409.19606, sections 2 and 3.
Differs: the streams end as their mean and not as their sum, so that the new model is the plain pre-norm model exactly.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .connections import Gates, MeanHead, StreamResidual
from .norms import RMSNorm
from .precision import project


class HyperConnectionsResidual(StreamResidual):
    """`H' = A_r^T H + b f(A_m^T H)`, with `A_m` `[n]`, `A_r` `[n, n]` and `b` `[n]` learned, the same for every token.

    When dynamic, `scale * tanh(norm(H) W)` of each token's own streams is added to them. At the start `A_m` picks
    stream `index mod n` for sub-layer `index`, `A_r` is the identity, `b` is 1 and `W` is 0.

    `mix_base` holds `[A_m | A_r | b]`, `[n, n + 2]` flattened; `mix_weight` `[n + 2, D]` is the transpose of `W`;
    `mix_scale` `[2]` are the scales of `A` and of `b`. They stay float32.

    Args:
        hidden_size: Width D of the residual stream.
        num_streams: Number of streams n.
        dynamic: Whether the weights also depend on the token.
        scale_init: Initial scale of what depends on the token.
        tanh: Whether what depends on the token goes through a tanh.
        norm_eps: Of the norm over each stream that the dynamic part begins with.
        multiplier: Factor on what is added.
        layer_scale: Initial value of a learned factor per channel; `None` for no such factor.
        dropout: Probability of dropping an added element in training.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_streams: int = 4,
        dynamic: bool = True,
        scale_init: float = 0.01,
        tanh: bool = True,
        norm_eps: float = 1e-6,
        multiplier: float = 1.0,
        layer_scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        shared = {"multiplier": multiplier, "layer_scale": layer_scale, "dropout": dropout}
        super().__init__(hidden_size, num_streams=num_streams, **shared)
        if not norm_eps > 0:
            raise ValueError(f"norm_eps={norm_eps} must be above 0")
        self.scale_init, self.tanh = scale_init, tanh
        # flat: what a token starts from is not pulled to zero by weight decay, as in the paper
        self.mix_base = nn.Parameter(torch.empty(num_streams * (num_streams + 2)))
        self.norm = RMSNorm(hidden_size, eps=norm_eps) if dynamic else None
        self.mix_weight = nn.Parameter(torch.empty(num_streams + 2, hidden_size)) if dynamic else None
        self.mix_scale = nn.Parameter(torch.empty(2)) if dynamic else None
        self.init_weights(0.0)

    @staticmethod
    def head(hidden_size: int, **options: Any) -> MeanHead:
        """Streams that begin as the embedding and end as their mean."""
        return MeanHead(hidden_size, options["num_streams"])

    def init_weights(self, std: float) -> None:
        """Start as the plain residual; `std` is not used."""
        super().init_weights(std)
        base = torch.zeros(self.num_streams, self.num_streams + 2)
        base[self.index % self.num_streams, 0] = 1.0
        base[:, 1:-1] = torch.eye(self.num_streams)
        base[:, -1] = 1.0
        init.copy_(self.mix_base, base.flatten())
        if self.mix_weight is not None:
            init.zeros_(self.mix_weight)
            init.constant_(self.mix_scale, self.scale_init)

    def gates(self, stream: Tensor) -> Gates:
        """The gates of every token of `[B, T, n, D]`; without `B, T` when they are static."""
        gates = self.mix_base.unflatten(0, (self.num_streams, -1))  # [n, n + 2]
        if self.mix_weight is not None:
            dynamic = project(self.norm(stream), self.mix_weight)  # [B, T, n, n + 2]
            dynamic = dynamic.tanh() if self.tanh else dynamic
            scale = torch.cat([self.mix_scale[:1].expand(self.num_streams + 1), self.mix_scale[1:]])
            gates = gates + scale * dynamic
        return Gates(gates[..., 0], gates[..., -1], gates[..., 1:-1])
