"""Parameters and buffers that never fall below float32.

A decay is multiplied thousands of times along a sequence, so `A_log`, `D`, `dt_bias` and router biases stay float32
when the rest of the model is cast. `model.double()` still raises them to float64.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Float32Islands(nn.Module):
    """A module whose tensors named in `float32_names` ignore casts to a smaller type."""

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: tensor for name in self.float32_names if (tensor := getattr(self, name, None)) is not None}
        kept = {name: tensor.detach() for name, tensor in before.items()}
        super()._apply(fn, recurse)
        for name, original in kept.items():
            cast = getattr(self, name)
            if cast.is_floating_point() and cast.dtype.itemsize < 4:
                # from the original, not from the cast: a round trip through bfloat16 would lose bits
                value = original.to(device=cast.device, dtype=torch.float32)
                if isinstance(cast, nn.Parameter):
                    cast.data = value
                else:
                    self._buffers[name] = value
        return self


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a recurrent state is kept in: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(tensor: Tensor) -> Any:
    """A context in which products have the type of their factors."""
    device_type = tensor.device.type
    # entering the context costs more than the product of one token; the meta device has none
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def project(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map in float32 (float64 for float64 inputs), whatever autocast says."""
    wide = state_dtype(inputs.dtype)
    with without_autocast(inputs):
        return nn.functional.linear(inputs.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
