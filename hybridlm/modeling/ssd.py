"""The recurrence of Mamba-2, as matrix products over chunks, linear in length forward and backward, in plain PyTorch.

State, pads and document starts are as in `scan.py`.

Names follow linear attention: `value` is the papers' x, `key` is B, `query` is C, `rate` is A, `skip` is D.
Shapes: B batch, T tokens, H heads, G groups, P head width, N state size.
Reference: Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060.
Differs: decays are powers of two, since exp2 is about three times as fast as exp on a CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .scan import LOG2_E, widen


def ssd_scan_reference(
    value: Tensor,
    dt: Tensor,
    rate: Tensor,
    key: Tensor,
    query: Tensor,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `ssd_scan` does, one token at a time."""
    value, dt, rate, key, query, skip, state = widen(value, dt, rate, key, query, skip, state)
    batch, num_tokens, num_heads, head_dim = value.shape
    repeats = num_heads // key.shape[2]
    if state is None:
        state = value.new_zeros(batch, num_heads, head_dim, key.shape[3])
    outputs = []
    for t in range(num_tokens):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0.0)
        step_key = key[:, t].repeat_interleave(repeats, dim=1)[:, :, None, :]  # [B, H, 1, N]
        step_query = query[:, t].repeat_interleave(repeats, dim=1)[:, :, None, :]
        write = (dt[:, t, :, None] * value[:, t])[..., None] * step_key  # [B, H, P, N]
        state = (dt[:, t] * rate).exp()[..., None, None] * state + write
        outputs.append((state * step_query).sum(-1))
    output = torch.stack(outputs, dim=1)
    return output if skip is None else output + skip[:, None] * value, state


def ssd_scan(
    value: Tensor,
    dt: Tensor,
    rate: Tensor,
    key: Tensor,
    query: Tensor,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run `h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T`, `y_t = h_t C_t + D x_t` in every head.

    Inside a chunk the recurrence is a masked matrix product, whose scores `C_i . B_j` the heads of a group share;
    between chunks only the state is handed on.

    Args:
        value: `[B, T, H, P]`, x.
        dt: `[B, T, H]`, step sizes, at least 0; 0 at pads.
        rate: `[H]`, A, negative.
        key: `[B, T, G, N]`, B. G divides H.
        query: `[B, T, G, N]`, C.
        skip: `[H]`, D, or `None`.
        state: `[B, H, P, N]` before the first token; `None` for zeros.
        starts: `[B, T]`, True where the state is forgotten before the token; `None` for nowhere.
        chunk_size: Tokens of one matrix product; changes speed, not the function.

    Returns:
        The outputs `[B, T, H, P]` and the state `[B, H, P, N]` after the last token, at least float32.
    """
    with torch.autocast(value.device.type, enabled=False):
        value, dt, rate, key, query, skip, state = widen(value, dt, rate, key, query, skip, state)
        batch, num_tokens, num_heads, head_dim = value.shape
        num_groups, state_size = key.shape[2:]
        if state is None:
            state = value.new_zeros(batch, num_heads, head_dim, state_size)
        rate = rate * LOG2_E
        if num_tokens == 1:
            return _ssd_step(value, dt, rate, key, query, skip, state, starts)
        weights = _ssd_weights(dt, rate, starts, min(chunk_size, num_tokens))
        # split and unbind, not slices: their backward is one copy instead of one full-length gradient per chunk
        chunks = [tensor.split(weights.size, dim=1) for tensor in (value, key, query)]
        state = state.view(batch, num_groups, -1, state_size).transpose(2, 3)  # [B, G, N, H/G * P]
        outputs = []
        for chunk, weight in zip(zip(*chunks, strict=True), weights.unbind(num_tokens), strict=True):
            output, state = _ssd_chunk(*chunk, skip, state, weight)
            outputs.append(output)
        state = state.transpose(2, 3).reshape(batch, num_heads, head_dim, state_size)
        return torch.cat(outputs, dim=1), state


def _ssd_step(
    value: Tensor,
    dt: Tensor,
    rate: Tensor,
    key: Tensor,
    query: Tensor,
    skip: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if starts is not None:
        state = state.masked_fill(starts[:, 0, None, None, None], 0.0)
    batch, _, num_groups, state_size = key.shape
    decay = torch.exp2(dt[:, 0] * rate)[..., None, None]
    write = (dt[:, 0, :, None] * value[:, 0]).reshape(batch * num_groups, -1, 1)  # [B * G, H/G * P, 1]
    key, query = key.reshape(-1, 1, state_size), query.reshape(-1, state_size, 1)
    grouped = torch.baddbmm((decay * state).view(batch * num_groups, -1, state_size), write, key)
    output = torch.bmm(grouped, query).view(value.shape)
    return output if skip is None else torch.addcmul(output, value, skip[:, None]), grouped.view(state.shape)


@dataclass
class _ChunkWeights:
    """How much each token of a chunk of C tokens keeps of what came before; all small, for all chunks at once.

    Attributes:
        total: `[B, chunks, H, C]`, log2 of the decay since the chunk began, float64.
        dt: `[B, chunks, H, C]`.
        fade_in: `[B, chunks, C, H]`, decay of the chunk's first state at each token.
        fade_out: `[B, chunks, C, H]`, dt times the decay from each token to the chunk's end.
        hidden: `[1, 1, C, C]` or `[B, chunks, C, C]`, 0 where a token sees another one and -inf where not.
    """

    total: Tensor
    dt: Tensor
    fade_in: Tensor
    fade_out: Tensor
    hidden: Tensor

    @property
    def size(self) -> int:
        """Tokens of a chunk."""
        return self.dt.shape[3]

    def unbind(self, num_tokens: int) -> list["_ChunkWeights"]:
        """One piece for each chunk, without the padding of the last one."""
        num_chunks, size = self.dt.shape[1], self.size
        tensors = [tensor.unbind(1) for tensor in (self.total, self.dt, self.fade_in, self.fade_out)]
        hidden = self.hidden.expand(-1, num_chunks, -1, -1).unbind(1)
        pieces = [_ChunkWeights(*piece) for piece in zip(*tensors, hidden, strict=True)]
        rest = num_tokens - (num_chunks - 1) * size
        if rest < size:
            last = pieces[-1]
            by_head = last.total[..., :rest], last.dt[..., :rest]
            by_token = last.fade_in[:, :rest], last.fade_out[:, :rest]
            pieces[-1] = _ChunkWeights(*by_head, *by_token, last.hidden[:, :rest, :rest])
        return pieces


def _ssd_weights(dt: Tensor, rate: Tensor, starts: Tensor | None, size: int) -> _ChunkWeights:
    pad = -dt.shape[1] % size
    dt = nn.functional.pad(dt, (0, 0, 0, pad)).unflatten(1, (-1, size))  # padding changes nothing: its dt is 0
    # float64: differences of large sums stand for the product of a few decays
    wide = dt.dtype if dt.device.type == "mps" else torch.float64
    total = (dt * rate).to(wide).cumsum(2)
    fade_in = torch.exp2(total).to(dt.dtype)
    fade_out = torch.exp2(total[:, :, -1:] - total).to(dt.dtype) * dt
    visible = torch.ones(1, 1, size, size, dtype=torch.bool, device=dt.device).tril()
    if starts is not None:
        ids = nn.functional.pad(starts.long(), (0, pad)).unflatten(1, (-1, size)).cumsum(2)  # 0: begun before the chunk
        visible = visible & (ids[..., :, None] == ids[..., None, :])
        fade_in = fade_in * (ids == 0)[..., None]
        fade_out = fade_out * (ids == ids[..., -1:])[..., None]
    hidden = torch.zeros_like(visible, dtype=dt.dtype).masked_fill(~visible, -torch.inf)
    # heads first in memory too: the [C, C] weights take their layout from these
    total, dt = (tensor.transpose(2, 3).contiguous() for tensor in (total, dt))
    return _ChunkWeights(total, dt, fade_in, fade_out, hidden)


def _ssd_chunk(
    value: Tensor, key: Tensor, query: Tensor, skip: Tensor | None, state: Tensor, weights: _ChunkWeights
) -> tuple[Tensor, Tensor]:
    """One chunk of C tokens: `state` is `[B, G, N, H/G * P]` before and after it."""
    batch, size, num_heads, head_dim = value.shape
    num_groups = key.shape[2]
    query, key = query.transpose(1, 2), key.permute(0, 2, 3, 1)  # [B, G, C, N] and [B, G, N, C]
    gaps = (weights.total[..., :, None] - weights.total[..., None, :]).to(value.dtype)
    # hidden before the exponential: above the diagonal the difference is positive and may overflow
    kept = torch.exp2(gaps + weights.hidden[:, None]) * weights.dt[:, :, None, :]  # [B, H, C, C]
    kept = (kept.unflatten(1, (num_groups, -1)) * torch.matmul(query, key)[:, :, None]).flatten(1, 2)
    if skip is not None:
        kept.diagonal(dim1=-2, dim2=-1).add_(skip[:, None])
    inside = torch.matmul(kept, value.transpose(1, 2)).transpose(1, 2)  # [B, C, H, P]
    carried = torch.matmul(query, state).transpose(1, 2).reshape(value.shape)
    output = (carried * weights.fade_in[..., None]).add_(inside)  # in this order it is token-major in memory
    written = (value * weights.fade_out[..., None]).view(batch, size, num_groups, -1).transpose(1, 2)
    keep = weights.fade_in[:, -1].view(batch, num_groups, 1, -1, 1).expand(-1, -1, -1, -1, head_dim).flatten(3)
    return output, torch.addcmul(torch.matmul(key, written), state, keep)
