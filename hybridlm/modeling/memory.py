"""A memory that is a small network of each row and head, trained by its own tokens while the model runs.

The network's weights are fast weights: W' = W_0 + D, with W_0 learned by the outer training and D the state. All
gradients of a chunk are taken at the weights W' with which it begins. The gradient that one token gives a layer is a
product of two vectors, x' delta, so whatever weighs the gradients of a chunk (momentum, forgetting, a window) is a
matrix `write` `[C, J]`, and reading the memory after token i is

    keep_i q W' + carry_i q S - ((q x') * write) delta        layer by layer,

with S the momentum at the start. No gradient of a token is ever made as a matrix. It runs the same with and without
autograd, and the outer gradient goes through it.

Bounds keep it stable: a token's slope has at most the length `max_gradient`, and a token whose step would move its own
prediction beyond its value (by its curvature: the squared length of its gradient over that of its slope) is scaled down
to `max_curvature`. Both are one factor a token.

Shapes: B batch, H heads, C tokens of a chunk, J sources (C, and those of a window before it), K key width, V value
width, P weights of a head.
Reference: Behrouz et al. 2024, "Titans", arXiv:2501.00663, sections 3.1 and 3.2; Sun et al. 2024 (LayerNorm and
residual around the network), arXiv:2407.04620; Behrouz et al. 2025 (Muon), arXiv:2505.23735; Behrouz et al. 2025
(retention), arXiv:2504.13173.
Differs: the bounds; decay may go to the learned weights (`forget_to="initial"`), since a deep memory that has decayed
to 0 has no gradient any more.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .memory_update import RETENTIONS, orthogonalize, retain
from .objectives import OBJECTIVES, slope
from .router import check_name

_TINY = 1e-12  # below the square of any length that matters, above 0: a root there has a finite slope


class Coefficients(NamedTuple):
    """How a chunk's gradients enter the memory.

    Attributes:
        keep: `[B, H, C]`, share of the chunk-start weights left after each token.
        carry: `[B, H, C]`, weight of the chunk-start momentum in the memory after each token.
        write: `[B, H, C, J]`, weight of each source's gradient in the memory after each token.
        momentum_keep: `[B, H]`, share of the momentum left behind the last token.
        momentum_write: `[B, H, J]`, weight of each gradient in the momentum behind the last token.
        rate: `[B, H]`, sum of the learning rates; the length of an orthogonalised step.
    """

    keep: Tensor
    carry: Tensor
    write: Tensor
    momentum_keep: Tensor
    momentum_write: Tensor
    rate: Tensor

    def at(self, slots: Tensor) -> "Coefficients":
        """The same for one token of the chunk, at slots `[B or 1]`."""
        index = slots.view(-1, 1, 1).expand(*self.keep.shape[:2], 1)
        write = self.write.gather(2, index[..., None].expand(-1, -1, 1, self.write.shape[-1]))
        return self._replace(keep=self.keep.gather(2, index), carry=self.carry.gather(2, index), write=write)


class Gradients(NamedTuple):
    """Rank-one gradients of every source.

    Attributes:
        inputs: For each layer `[B, H, J, in]`.
        deltas: For each layer `[B, H, J, out]`; the gradient of a source is the product of the two.
        surprise: `[B, H, J]`, the Frobenius norm over all layers.
    """

    inputs: list[Tensor]
    deltas: list[Tensor]
    surprise: Tensor


class MemoryNetwork(nn.Module):
    """The fast-weight network: what it predicts, the gradients of its objective, and how they move it.

    Args:
        num_heads: Heads H, each with a memory of its own.
        head_dim: Width of keys and values.
        depth: Layers of the network, at least 1.
        expansion: Width between layers as a multiple of `head_dim`.
        bias: Whether its layers have (fast) biases.
        residual_norm: Whether it predicts `k + LayerNorm(network(k))`, with a learned norm a head, as TTT does.
        activation: Between layers: `gelu`, `silu` or `relu`.
        objective: One of `objectives.OBJECTIVES`.
        objective_p: Exponent of the objective `lp`.
        objective_threshold: Threshold of `huber`, temperature of `kl`.
        retention: One of `memory_update.RETENTIONS`.
        retention_q: Exponent of `lq`, threshold of `elastic_net`, scale of `kl`.
        optimizer: `gradient`, or `muon`: the step that a chunk adds is orthogonalised.
        momentum: Whether a momentum is kept.
        forget_to: `initial` or `zero`.
        max_gradient: Largest slope of a token; `None` for no bound.
        max_curvature: Largest curvature of a token, `None` for no bound. A linear memory with unit keys has 1; at
            0.5 the largest step of `l2` lands on the value, and beyond that the memory swings around it.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        depth: int = 2,
        expansion: float = 2.0,
        bias: bool = False,
        residual_norm: bool = False,
        activation: str = "gelu",
        objective: str = "l2",
        objective_p: float = 3.0,
        objective_threshold: float = 1.0,
        retention: str = "decay",
        retention_q: float | None = None,
        optimizer: str = "gradient",
        momentum: bool = True,
        forget_to: str = "initial",
        max_gradient: float | None = 2.0,
        max_curvature: float | None = 0.5,
    ) -> None:
        super().__init__()
        check_name("memory_activation", activation, tuple(_ACTIVATIONS))
        check_name("objective", objective, OBJECTIVES)
        check_name("retention", retention, tuple(RETENTIONS))
        check_name("optimizer", optimizer, ("gradient", "muon"))
        check_name("forget_to", forget_to, ("initial", "zero"))
        inner = round(expansion * head_dim)
        for option, value in (("num_heads", num_heads), ("head_dim", head_dim), ("memory_depth", depth)):
            if value < 1:
                raise ValueError(f"{option}={value} must be at least 1")
        if inner < 1:
            raise ValueError(f"memory_expansion={expansion} must give at least one unit of head_dim={head_dim}")
        if objective_p <= 1:
            raise ValueError(f"objective_p={objective_p} must be above 1")
        for option, value in (
            *(("objective_threshold", objective_threshold), ("max_gradient", max_gradient)),
            ("max_curvature", max_curvature),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{option}={value} must be above 0")
        self.num_heads, self.head_dim, self.depth, self.bias = num_heads, head_dim, depth, bias
        self.activation, self.objective = _ACTIVATIONS[activation], objective
        self.objective_p, self.objective_threshold = objective_p, objective_threshold
        self.retention, self.retention_q = retention, RETENTIONS[retention] if retention_q is None else retention_q
        if retention == "elastic_net" and self.retention_q < 0:
            raise ValueError(f"retention_q={retention_q} must be at least 0, as a threshold")
        if retention in ("lq", "kl") and self.retention_q <= 0:
            raise ValueError(f"retention_q={retention_q} must be above 0, as an exponent or a scale")
        self.optimizer, self.momentum, self.forget_to = optimizer, momentum, forget_to
        self.max_gradient, self.max_curvature = max_gradient, max_curvature
        widths = [head_dim] + [inner] * (depth - 1) + [head_dim]
        self.shapes = [(a + bias, b) for a, b in zip(widths, widths[1:], strict=False)]
        self.num_weights = sum(a * b for a, b in self.shapes)  # P
        for i, shape in enumerate(self.shapes):
            self.register_parameter(f"initial_{i}", nn.Parameter(torch.empty(num_heads, *shape)))
        self.norm_weight = self.norm_bias = None
        if residual_norm:
            self.norm_weight = nn.Parameter(torch.empty(num_heads, head_dim))
            self.norm_bias = nn.Parameter(torch.empty(num_heads, head_dim))
        self.init_weights()

    @property
    def at_borders(self) -> bool:
        """Whether the memory moves only when a chunk closes, so that only a chunk's last token reads its own chunk."""
        return self.optimizer == "muon" or self.retention != "decay"

    @torch.no_grad()
    def init_weights(self, std: float = 0.0) -> None:
        """Start layers with the standard deviation 1 / sqrt(inputs), a linear memory at a tenth; `std` is not used."""
        for weight, shape in zip(self.initial, self.shapes, strict=True):
            init.normal_(weight, mean=0.0, std=shape[0] ** -0.5 * (0.1 if self.depth == 1 else 1.0))
        if self.norm_weight is not None:
            init.ones_(self.norm_weight)
            init.zeros_(self.norm_bias)

    @property
    def initial(self) -> list[Tensor]:
        """W_0, for each layer `[H, in, out]`."""
        return [getattr(self, f"initial_{i}") for i in range(self.depth)]

    def split(self, flat: Tensor) -> list[Tensor]:
        """`[B, H, P]` as a `[B, H, in, out]` for each layer."""
        pieces = flat.split([a * b for a, b in self.shapes], dim=-1)
        return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def weights(self, memory: Tensor) -> list[Tensor]:
        """The weights in use, `[B, H, in, out]` a layer, of a state `[B, H, P]`, 0 at the start of a document."""
        raw = [w.to(d.dtype) + d for w, d in zip(self.initial, self.split(memory), strict=True)]
        return [retain(self.retention, w, self.retention_q) for w in raw]

    def _augment(self, inputs: Tensor) -> Tensor:
        return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1) if self.bias else inputs

    def read(self, weights: list[Tensor], queries: Tensor) -> Tensor:
        """What the network of fixed weights answers to `[B, H, C, K]`."""
        hidden = queries
        for layer, weight in enumerate(weights):
            hidden = self._augment(hidden) @ weight
            if layer + 1 < self.depth:
                hidden = self.activation(hidden)[0]
        return self._finish(hidden, queries)

    def _finish(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        if self.norm_weight is None:
            return hidden
        normed, _ = _standardize(hidden)
        return inputs + normed * self.norm_weight[:, None].to(hidden.dtype) + self.norm_bias[:, None].to(hidden.dtype)

    def gradients(self, weights: list[Tensor], keys: Tensor, values: Tensor) -> Gradients:
        """Backpropagate the objective of every source by hand.

        Args:
            weights: `[B, H, in, out]` a layer.
            keys: `[B, H, J, K]`.
            values: `[B, H, J, V]`.
        """
        inputs, slopes, hidden = [], [], keys
        for layer, weight in enumerate(weights):
            inputs.append(self._augment(hidden))
            hidden = inputs[-1] @ weight
            if layer + 1 < self.depth:
                hidden, derivative = self.activation(hidden)
                slopes.append(derivative)
        prediction = self._finish(hidden, keys)
        delta = slope(self.objective, prediction, values, self.objective_p, self.objective_threshold)
        length = (delta.square().sum(-1) + _TINY).sqrt()  # [B, H, J]
        if self.norm_weight is not None:
            delta = _through_standardize(hidden, delta * self.norm_weight[:, None].to(delta.dtype))
        deltas = [delta]
        for layer in range(self.depth - 1, 0, -1):
            delta = (delta @ weights[layer].transpose(-1, -2))[..., : self.shapes[layer][0] - self.bias]
            delta = delta * slopes[layer - 1]
            deltas.insert(0, delta)
        squares = sum(x.square().sum(-1) * d.square().sum(-1) for x, d in zip(inputs, deltas, strict=True))
        factor = None
        if self.max_gradient is not None:
            factor = (self.max_gradient / length).clamp(max=1.0)
        if self.max_curvature is not None:
            gentle = (self.max_curvature * length.square() / (squares + _TINY)).clamp(max=1.0)
            factor = gentle if factor is None else factor * gentle
        surprise = (squares + _TINY).sqrt()
        if factor is not None:
            deltas, surprise = [d * factor[..., None] for d in deltas], surprise * factor
        return Gradients(inputs, deltas, surprise)

    def read_moving(
        self, weights: list[Tensor], momentum: Tensor | None, gradients: Gradients, rule: Coefficients, queries: Tensor
    ) -> Tensor:
        """Read `[B, H, C, K]`, token i from the memory after token i of the chunk; `[B, H, C, V]`."""
        hidden = queries
        speeds = [None] * self.depth if momentum is None else self.split(momentum)
        for layer in range(self.depth):
            x = self._augment(hidden)
            out = rule.keep[..., None] * (x @ weights[layer])
            if self.forget_to == "initial":
                out = out + (1 - rule.keep)[..., None] * (x @ self.initial[layer].to(x.dtype))
            if speeds[layer] is not None:
                out = out + rule.carry[..., None] * (x @ speeds[layer])
            near = (x @ gradients.inputs[layer].transpose(-1, -2)) * rule.write
            hidden = out - near @ gradients.deltas[layer]
            if layer + 1 < self.depth:
                hidden = self.activation(hidden)[0]
        return self._finish(hidden, queries)

    def advance(
        self, memory: Tensor, momentum: Tensor | None, gradients: Gradients, rule: Coefficients
    ) -> tuple[Tensor, Tensor | None]:
        """The state `[B, H, P]` and the momentum behind the chunk's last slot."""
        keep, carry = rule.keep[..., -1, None], rule.carry[..., -1, None]
        steps, speeds = [], []
        for x, delta in zip(gradients.inputs, gradients.deltas, strict=True):
            steps.append(_weighed(x, rule.write[..., -1, :], delta).flatten(2))
            if momentum is not None:
                speeds.append(_weighed(x, rule.momentum_write, delta).flatten(2))
        step = -torch.cat(steps, dim=-1)
        if momentum is not None:
            step = step + carry * momentum
            momentum = rule.momentum_keep[..., None] * momentum - torch.cat(speeds, dim=-1)
        if self.optimizer == "muon":
            turned = [orthogonalize(piece).flatten(2) for piece in self.split(step)]
            step = rule.rate[..., None] * torch.cat(turned, dim=-1)
        decayed = keep * memory
        if self.forget_to == "zero":
            initial = torch.cat([w.flatten(1) for w in self.initial], dim=-1).to(memory.dtype)
            decayed = decayed - (1 - keep) * initial
        return decayed + step, momentum


def _weighed(inputs: Tensor, weight: Tensor, deltas: Tensor) -> Tensor:
    """`[B, H, in, out]`, the weighed sum of the sources' gradients."""
    return (inputs * weight[..., None]).transpose(-1, -2) @ deltas


def _standardize(hidden: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1 along the last dimension, and the factor that did it."""
    centred = hidden - hidden.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * scale, scale


def _through_standardize(hidden: Tensor, slopes: Tensor) -> Tensor:
    """Backpropagate `slopes` through `_standardize`."""
    normed, scale = _standardize(hidden)
    return scale * (slopes - slopes.mean(-1, keepdim=True) - normed * (slopes * normed).mean(-1, keepdim=True))


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative."""
    share = 0.5 * (1 + torch.erf(z * 0.5**0.5))
    return z * share, share + z * torch.exp(-0.5 * z.square()) * 0.3989422804014327


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.sigmoid(z)
    return z * share, share * (1 + z * (1 - share))


def _relu(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.relu(), (z > 0).to(z.dtype)


_ACTIVATIONS = {"gelu": _gelu, "silu": _silu, "relu": _relu}
