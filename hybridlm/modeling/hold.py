"""What later tokens read of the last token that entered a span.

Shapes: B batch, T tokens, N width of the stream, all residual streams together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import SequenceInfo

CHUNK = 64


@dataclass
class Held:
    """What the last token that entered brought back: `values` `[B, n * D]`."""

    values: Tensor


def _unpack(packed: Tensor, sequence: SequenceInfo | None) -> tuple[Tensor, Tensor]:
    """What stays `[B, T]` and the updates `[B, T, N]`; tokens that `crop` took back have become pads since."""
    keep, updates = packed[..., 0], packed[..., 1:]
    if sequence is not None and sequence.token_mask is not None:
        keep = keep.masked_fill(~sequence.token_mask, 1.0)
        updates = updates.masked_fill(~sequence.token_mask[..., None], 0.0)
    return keep, updates


def hold_last(packed: Tensor, state: Held | None, sequence: SequenceInfo) -> tuple[Tensor, Held]:
    """Repeat the last update until the next one.

    Args:
        packed: `[B, T, 1 + N]`: 1 where the last update stays and 0 where it is replaced, and the updates.
        state: Held before the call, or `None` for 0.
        sequence: The call.

    Returns:
        What each token gets `[B, T, N]`, and what is held after the call.
    """
    keep, updates = _unpack(packed, sequence)
    columns = torch.arange(packed.shape[1], device=packed.device)
    last = torch.where(keep == 0, columns, -1).cummax(1).values  # [B, T]
    held = updates.gather(1, last.clamp(min=0)[..., None].expand_as(updates))
    before = torch.zeros_like(updates[:, 0]) if state is None else state.values
    held = torch.where(last[..., None] < 0, before[:, None], held)
    return held, Held(held[:, -1].clone())  # a view would keep all of a long call alive


def hold_mean(packed: Tensor, state: Held | None, sequence: SequenceInfo) -> tuple[Tensor, Held]:
    """As `hold_last`, where an update may replace a share only: held = keep * held + update."""
    keep, updates = _unpack(packed, sequence)
    held = torch.zeros_like(updates[:, 0]) if state is None else state.values
    outputs = []
    for start in range(0, packed.shape[1], CHUNK):
        kept, new = keep[:, start : start + CHUNK], updates[:, start : start + CHUNK]
        size = kept.shape[1]
        below = torch.ones(size, size, dtype=torch.bool, device=packed.device).tril(-1)
        # products of `keep` between two tokens, without logarithms: 0 is a common value
        decay = torch.where(below, kept[:, :, None], 1.0).cumprod(1).tril()  # [B, later, earlier]
        piece = decay @ new + kept.cumprod(1)[..., None] * held[:, None]
        held = piece[:, -1]
        outputs.append(piece)
    return torch.cat(outputs, dim=1), Held(held)
