"""Gates of a memory, and what they make of the gradients of a chunk.

Each token chooses, a number a head: a learning rate theta, a momentum decay eta, a share alpha to forget, and with a
window of several tokens the weight gamma of its gradient. In a chunk

    S_t = eta_t S_{t-1} - theta_t sum_{i in window of t} gamma_i grad_i,    M_t = (1 - alpha_t) M_{t-1} + S_t,

with all gradients at one point, which makes M and S at every token weighed sums of the gradients and of what was there.

All C gradients are taken at one point, so the step of a token is at most `max_learning_rate (1 - eta) / (C c)`: the
sum of what a chunk does along one direction is that of one full step. A deep memory, which is not convex, also takes at
most a quarter of a full step a token: its outer gradient grows without end under full steps to new values, so C is at
least 4 there. alpha is at least `min_forgetting`.

Shapes: B batch, T tokens, H heads, C chunk size, c window, J = c - 1 + C sources.
Reference: Behrouz et al. 2024, "Titans", arXiv:2501.00663, section 3.2; Behrouz et al. 2025 (Omega rule),
arXiv:2505.23735, section 3.
Differs: the bounds on theta and alpha.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .memory import Coefficients
from .precision import state_dtype

DEEP_SHARES = 4  # tokens at least that share a full step of a deep memory
THETA, LOG_ETA, LOG_KEEP, GAMMA = range(4)  # columns of the gates


class GateProjection(nn.Linear):
    """A projection whose biases start at given values, one for each kind of gate and the same in every head."""

    def __init__(self, hidden_size: int, num_heads: int, biases: list[float]) -> None:
        self.num_heads, self.biases = num_heads, biases
        super().__init__(hidden_size, len(biases) * num_heads)

    def reset_parameters(self) -> None:
        """Start as `init_weights` says."""
        self.init_weights(0.02)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Draw the weights, set the biases."""
        init.normal_(self.weight, mean=0.0, std=std)
        biases = torch.tensor(self.biases, dtype=self.bias.dtype, device=self.bias.device)
        init.copy_(self.bias, biases.repeat_interleave(self.num_heads))


class MemoryGates(nn.Module):
    """Make the gates of tokens.

    Args:
        hidden_size: Width D of what they are made from.
        num_heads: H.
        chunk_size: C.
        deep: Whether the memory has more than one layer.
        window: Tokens c whose gradients one update sums (Omega rule), 1 for its own.
        max_learning_rate: theta of a chunk of one token without momentum is below this.
        min_forgetting: alpha is at least this.
        momentum: Whether there is a momentum; else eta is 0.
        forgetting: Whether there is forgetting; else alpha is 0.
        learning_rate_bias: Initial bias of the learning rate, before the sigmoid.
        momentum_bias: Initial bias of eta.
        forgetting_bias: Initial bias of alpha.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        chunk_size: int,
        deep: bool,
        window: int,
        max_learning_rate: float,
        min_forgetting: float,
        momentum: bool,
        forgetting: bool,
        learning_rate_bias: float,
        momentum_bias: float,
        forgetting_bias: float,
    ) -> None:
        super().__init__()
        for name, value in (("chunk_size", chunk_size), ("omega_window", window)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if max_learning_rate < 0:
            raise ValueError(f"max_learning_rate={max_learning_rate} must be at least 0")
        if not 0 <= min_forgetting < 1:
            raise ValueError(f"min_forgetting={min_forgetting} must lie in [0, 1)")
        self.num_heads, self.window = num_heads, window
        self.shares = max(chunk_size, DEEP_SHARES) if deep else chunk_size
        self.max_learning_rate, self.min_forgetting = max_learning_rate, min_forgetting
        self.momentum, self.forgetting = momentum, forgetting
        biases = {"theta": learning_rate_bias}
        biases |= {"eta": momentum_bias} if momentum else {}
        biases |= {"alpha": forgetting_bias} if forgetting else {}
        biases |= {"gamma": 2.0} if window > 1 else {}
        self.names, self.num_gates = tuple(biases), 3 + (window > 1)
        self.proj = GateProjection(hidden_size, num_heads, list(biases.values()))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Gates `[B, T, H, 3 or 4]` of tokens `[B, T, D]`: theta, log eta, log(1 - alpha), and gamma."""
        raw = self.proj(hidden_states)
        raw = raw.to(state_dtype(raw.dtype)).unflatten(-1, (len(self.names), self.num_heads)).unbind(-2)
        raw = dict(zip(self.names, raw, strict=True))
        sigmoid, log_sigmoid = torch.sigmoid, nn.functional.logsigmoid
        theta = sigmoid(raw["theta"]) * (self.max_learning_rate / (self.shares * self.window))
        log_eta = log_keep = torch.zeros_like(theta)
        if self.momentum:
            theta, log_eta = theta * sigmoid(-raw["eta"]), log_sigmoid(raw["eta"])
        if self.forgetting:
            log_keep = log_sigmoid(-raw["alpha"]) + math.log1p(-self.min_forgetting)
        gates = [theta, log_eta, log_keep]
        if self.window > 1:
            gates.append(sigmoid(raw["gamma"]))
        return torch.stack(gates, dim=-1)


def decay_products(log_decay: Tensor) -> Tensor:
    """`[..., C]` to `[..., C, C]`: entry i, j is the product of the decays j + 1 to i, and 0 for j > i.

    Sums of each range are made on their own: a difference of two long sums would lose what is small.
    """
    size = log_decay.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    ranges = log_decay[..., None].expand(*log_decay.shape, size).masked_fill(~lower.tril(-1), 0.0).cumsum(-2)
    return ranges.exp().masked_fill(~lower, 0.0)


def coefficients(gates: Tensor, recent_gamma: Tensor | None, momentum: bool) -> Coefficients:
    """What a chunk's gradients, the memory and the momentum before it weigh in the memory after each token.

    Args:
        gates: `[..., C, 3 or 4]`, of `MemoryGates`; theta, log eta and log keep are 0 in empty slots.
        recent_gamma: `[..., c - 1]`, weights of the gradients of the tokens before the chunk, 0 where there is none;
            `None` for the chunk's own gradients, each for its own token.
        momentum: Whether there is a momentum.
    """
    theta, log_eta, log_keep = gates[..., THETA], gates[..., LOG_ETA], gates[..., LOG_KEEP]
    decay = decay_products(log_keep)  # [..., C, C]
    keep = log_keep.cumsum(-1).exp()
    if momentum:
        speed, momentum_keep = decay_products(log_eta), log_eta.cumsum(-1).exp()
        carry, write = (decay @ momentum_keep[..., None])[..., 0], decay @ (speed * theta[..., None, :])
        momentum_write = speed[..., -1, :] * theta
    else:
        write = decay * theta[..., None, :]
        momentum_keep, carry, momentum_write = torch.zeros_like(keep), torch.zeros_like(keep), torch.zeros_like(theta)
    if recent_gamma is not None:
        gamma = torch.cat([recent_gamma, gates[..., GAMMA]], dim=-1)  # [..., J]
        num_tokens, num_sources = theta.shape[-1], gamma.shape[-1]
        offset = torch.arange(num_sources, device=gamma.device) - torch.arange(num_tokens, device=gamma.device)[:, None]
        band = ((offset >= 0) & (offset <= num_sources - num_tokens)).to(gamma.dtype) * gamma[..., None, :]
        write, momentum_write = write @ band, (momentum_write[..., None, :] @ band)[..., 0, :]
    return Coefficients(keep, carry, write, momentum_keep[..., -1], momentum_write, theta.sum(-1))
