"""What the mixers with a short convolution and a recurrence share: their state, step sizes and initial values.

Shapes: B batch, T tokens, C channels of the convolution, W its width, H step sizes a token has.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .precision import state_dtype


@dataclass
class RecurrentState:
    """What such a mixer carries from one call to the next.

    Attributes:
        conv_states: `[B, C, W - 1]`, the last inputs of the convolution, in the model's type.
        recurrent_states: `[B, ...]`, float32, or float64 in a float64 model.
    """

    conv_states: Tensor
    recurrent_states: Tensor


def step_sizes(
    raw: Tensor, bias: Tensor, token_mask: Tensor | None, low: float = 0.0, high: float | None = None
) -> Tensor:
    """Turn projections into step sizes; every path of a mixer gets them from here.

    Args:
        raw: `[B, T, H]`, in any type.
        bias: `[H]`, added before the softplus.
        token_mask: `[B, T]`, True at real tokens; `None` when all are.
        low: Smallest step size of a real token.
        high: Largest step size; `None` for no bound.

    Returns:
        `[B, T, H]`, at least float32, 0 at pads: a pad writes nothing and forgets nothing.
    """
    dt = nn.functional.softplus(raw.to(state_dtype(raw.dtype)) + bias)
    if low > 0.0 or high is not None:
        dt = dt.clamp(low, high)
    return dt if token_mask is None else dt.masked_fill(~token_mask[..., None], 0.0)


def check_step_sizes(dt_min: float, dt_max: float) -> None:
    """Refuse a range that has no logarithm or is empty."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min={dt_min} must be above 0 and at most dt_max={dt_max}")


@torch.no_grad()
def init_dt_bias(bias: Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """Set a bias so that `softplus(bias)` is log-uniform between two step sizes, and at least `floor`."""
    dt = torch.empty_like(bias).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=floor)
    init.copy_(bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
