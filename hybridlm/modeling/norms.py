"""Norms over the last dimension, computed in float32 (float64 for float64 input).

Shapes: D is the normalised size.
Reference: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467; Ba et al. 2016, "Layer
Normalization", arXiv:1607.06450.
Differs: the place of the last cast follows Llama, or Gemma when the weight is an offset from one.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .precision import state_dtype


def _check_eps(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps={eps} must be above 0")


class RMSNorm(nn.Module):
    """Divide by the root mean square and multiply by a weight.

    Args:
        size: Normalised size D.
        eps: Added to the mean square.
        offset: If true the factor is `1 + weight`, multiplied before the cast back to the input's type, as in Gemma;
            otherwise it is `weight`, multiplied after the cast, as in Llama.
    """

    def __init__(self, size: int, *, eps: float = 1e-6, offset: bool = False) -> None:
        super().__init__()
        _check_eps(eps)
        self.size, self.eps, self.offset = size, eps, offset
        self.weight = nn.Parameter(torch.empty(size))
        self.init_weights()

    def init_weights(self, std: float = 0.0) -> None:
        """Start as the plain normalisation; `std` is not used."""
        init.constant_(self.weight, 0.0 if self.offset else 1.0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `[..., D]`; the result has the input's type."""
        dtype, wide = hidden_states.dtype, state_dtype(hidden_states.dtype)
        shape = (self.size,)
        if self.offset:
            weight = 1.0 + self.weight.to(wide)
            return nn.functional.rms_norm(hidden_states.to(wide), shape, weight, self.eps).to(dtype)
        if dtype == wide:
            return nn.functional.rms_norm(hidden_states, shape, self.weight.to(wide), self.eps)
        normalized = nn.functional.rms_norm(hidden_states.to(wide), shape, None, self.eps)
        return (self.weight * normalized.to(dtype)).to(dtype)  # the last cast matters for a weight wider than the input

    def extra_repr(self) -> str:
        """Show the size and the options."""
        return f"{self.size}, eps={self.eps}, offset={self.offset}"


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the standard deviation, multiply by a weight and add a bias.

    Args:
        size: Normalised size D.
        eps: Added to the variance.
        offset: If true the factor is `1 + weight`.
        bias: Whether there is a bias.
    """

    def __init__(self, size: int, *, eps: float = 1e-6, offset: bool = False, bias: bool = True) -> None:
        super().__init__()
        _check_eps(eps)
        self.size, self.eps, self.offset = size, eps, offset
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.init_weights()

    def init_weights(self, std: float = 0.0) -> None:
        """Start as the plain normalisation; `std` is not used."""
        init.constant_(self.weight, 0.0 if self.offset else 1.0)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `[..., D]`; the result has the input's type."""
        wide = state_dtype(hidden_states.dtype)
        weight = self.weight.to(wide)
        weight = 1.0 + weight if self.offset else weight
        bias = None if self.bias is None else self.bias.to(wide)
        output = nn.functional.layer_norm(hidden_states.to(wide), (self.size,), weight, bias, self.eps)
        return output.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Show the size and the options."""
        return f"{self.size}, eps={self.eps}, offset={self.offset}, bias={self.bias is not None}"


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def build_norm(spec: dict, size: int) -> nn.Module:
    """Build the norm that a config's `norm` entry describes.

    Args:
        spec: `{"name": "rms" | "layer", "eps": 1e-6, "offset": False}`, for "layer" also "bias". Every key but the name
            has a default. "placement" belongs to the layer and is ignored here.
        size: Normalised size D.

    Raises:
        ValueError: If the name or a key is unknown; the message lists what is allowed.
    """
    options = {key: value for key, value in spec.items() if key not in ("name", "placement")}
    name = spec.get("name")
    if name not in NORMS:
        raise ValueError(f"name: unknown {name!r}, expected one of {sorted(NORMS)}")
    allowed = ["eps", "offset", "bias"] if name == "layer" else ["eps", "offset"]
    for key in options:
        if key not in allowed:
            raise ValueError(f"{key}: unknown option of norm {name!r}, expected one of {allowed}")
    return NORMS[name](size, **options)
