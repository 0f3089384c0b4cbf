"""The bounded state of windowed attention: the last keys of each row, and the first keys of its open document.

A key's slot follows from its index, so that the state needs no bookkeeping of its own: token i sits in slot
i mod window, the j-th token of the open document in sink slot j.

Shapes: B batch, G key-value heads, K head width, R = window slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import SequenceInfo


@dataclass
class WindowState:
    """Keys and values `[B, G, num_sinks + R, K]`, and the tail of the convolution behind them, if there is one."""

    keys: Tensor
    values: Tensor
    conv_states: Tensor | None = None


def _rows(sequence: SequenceInfo, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens before the call and start of the open document, `[B, 1]` each."""
    zero = torch.zeros(batch, 1, dtype=torch.long, device=device)
    past = zero if sequence.num_past is None else sequence.num_past[:, None]
    start = zero if sequence.past_doc_start is None else sequence.past_doc_start[:, None]
    return past, start


def _latest(count: Tensor, window: int) -> Tensor:
    """`[B, R]`, the largest index below `count` `[B, 1]` that belongs into each slot; negative where there is none."""
    slots = torch.arange(window, device=count.device)
    return count - 1 - (count - 1 - slots) % window


def slot_index(sequence: SequenceInfo, batch: int, window: int, num_sinks: int, device: torch.device) -> Tensor:
    """`[B, num_sinks + R]`, index of the token in every slot before the call; -1 where it is empty."""
    past, start = _rows(sequence, batch, device)
    ring = _latest(past, window)
    ring = torch.where(ring - start >= num_sinks, ring, -1)
    if not num_sinks:
        return ring
    sinks = start + torch.arange(num_sinks, device=device)
    return torch.cat([torch.where(sinks < past, sinks, -1), ring], dim=1)


def extend(
    state: WindowState | None, keys: Tensor, values: Tensor, sequence: SequenceInfo, window: int, num_sinks: int
) -> WindowState:
    """The state after a call with `keys` and `values` `[B, G, T, K]`."""
    batch, heads, length, _ = keys.shape
    past, start = _rows(sequence, batch, keys.device)
    count = past + (length if sequence.lengths is None else sequence.lengths[:, None])
    if sequence.doc_start is not None:
        last = (count - past - 1).clamp(min=0)
        start = torch.where(count > past, sequence.doc_start.expand(batch, -1).gather(1, last), start)
    index = _latest(count, window)
    new = (index >= past) & (index - start >= num_sinks)
    if num_sinks:
        sinks = start + torch.arange(num_sinks, device=keys.device)
        index = torch.cat([sinks, index], dim=1)
        new = torch.cat([(sinks >= past) & (sinks < count), new], dim=1)
    source = (index - past).clamp(0, length - 1)[:, None, :, None]  # [B, 1, slots, 1]

    def place(fresh: Tensor, old: Tensor | None) -> Tensor:
        taken = fresh.gather(2, source.expand(-1, heads, -1, fresh.shape[-1]))
        return torch.where(new[:, None, :, None], taken, 0 if old is None else old)

    old_keys, old_values = (None, None) if state is None else (state.keys, state.values)
    return WindowState(place(keys, old_keys), place(values, old_values))
