"""The recurrence of Mamba, linear in length forward and backward, in plain PyTorch.

It takes the state before the first token, returns the state after the last, and forgets everything at the start of a
document. A token with `dt = 0` changes nothing, which is how callers mark pads.

Names here follow linear attention: `value` is the papers' x, `key` is B, `query` is C, `rate` is A, `skip` is D.
Shapes: B batch, T tokens, D channels, N state size.
Reference: Gu and Dao 2023, "Mamba", arXiv:2312.00752.
Differs: decays are powers of two, since exp2 is about three times as fast as exp on a CPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import state_dtype

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)


def widen(*tensors: Tensor | None) -> list[Tensor | None]:
    """Bring all tensors to one type, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, state_dtype(tensor.dtype))
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def block_slices(num_tokens: int, block: int) -> list[slice]:
    """The blocks that `num_tokens` tokens fall into; the last may be shorter."""
    return [slice(start, min(start + block, num_tokens)) for start in range(0, num_tokens, block)]


def selective_scan_reference(
    value: Tensor,
    dt: Tensor,
    rate: Tensor,
    key: Tensor,
    query: Tensor,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `selective_scan` does, one token at a time."""
    value, dt, rate, key, query, skip, state = widen(value, dt, rate, key, query, skip, state)
    if state is None:
        state = value.new_zeros(value.shape[0], *rate.shape)
    outputs = []
    for t in range(value.shape[1]):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0.0)
        write = (dt[:, t] * value[:, t])[..., None] * key[:, t, None, :]  # [B, D, N]
        state = (dt[:, t, :, None] * rate).exp() * state + write
        outputs.append((state * query[:, t, None, :]).sum(-1))
    output = torch.stack(outputs, dim=1)
    return output if skip is None else output + skip * value, state


def selective_scan(
    value: Tensor,
    dt: Tensor,
    rate: Tensor,
    key: Tensor,
    query: Tensor,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t`, `y_t = C_t h_t + D x_t` in every channel.

    Args:
        value: `[B, T, D]`, x.
        dt: `[B, T, D]`, step sizes, at least 0; 0 at pads.
        rate: `[D, N]`, A, negative.
        key: `[B, T, N]`, B.
        query: `[B, T, N]`, C.
        skip: `[D]`, D, or `None`.
        state: `[B, D, N]` before the first token; `None` for zeros.
        starts: `[B, T]`, True where the state is forgotten before the token; `None` for nowhere.

    Returns:
        The outputs `[B, T, D]` and the state `[B, D, N]` after the last token, at least float32.
    """
    with torch.autocast(value.device.type, enabled=False):
        value, dt, rate, key, query, skip, state = widen(value, dt, rate, key, query, skip, state)
        if state is None:
            state = value.new_zeros(value.shape[0], *rate.shape)
        rate = rate * LOG2_E
        if value.shape[1] == 1:
            output, state = _selective_step(value, dt, rate, key, query, state, starts)
        else:
            rate, state = rate.T.contiguous(), state.transpose(1, 2)  # channels last: they are the long axis
            output, state = _SelectiveScan.apply(value, dt, rate, key, query, state, starts)
            state = state.transpose(1, 2)
        return output if skip is None else torch.addcmul(output, value, skip), state


def _selective_step(
    value: Tensor, dt: Tensor, rate: Tensor, key: Tensor, query: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    if starts is not None:
        state = state.masked_fill(starts[:, 0, None, None], 0.0)
    decay = torch.exp2(dt[:, 0, :, None] * rate)  # [B, D, N]
    state = torch.addcmul((dt[:, 0] * value[:, 0])[..., None] * key, decay, state)
    return torch.matmul(state, query.transpose(1, 2)).transpose(1, 2), state


class _SelectiveScan(torch.autograd.Function):
    """The scan in blocks; backward recomputes each block from the state at its start.

    Autograd over the same loop would fill one zero gradient of full length per token, which is quadratic.
    """

    BLOCK_ELEMENTS = 1 << 19  # elements of `[B, block, N, D]`: two such buffers stay in the cache

    @staticmethod
    def _block(value: Tensor, rate: Tensor) -> int:
        per_token = value.shape[0] * rate.numel()
        return max(8, min(32, _SelectiveScan.BLOCK_ELEMENTS // per_token, value.shape[1]))

    @staticmethod
    def _fill(decay: "_Block", memory: "_Block", before: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """Compute a block's decays and states into two blocks, given the state before it."""
        value, dt, rate, key, starts = inputs
        torch.mul(dt.unsqueeze(2), rate, out=decay.whole)
        decay.whole.exp2_()
        if starts is not None:
            decay.whole.masked_fill_(starts[:, :, None, None], 0.0)
        torch.mul((dt * value).unsqueeze(2), key.unsqueeze(3), out=memory.whole)
        for step_decay, step_memory in zip(decay.steps, memory.steps, strict=True):
            step_memory.addcmul_(step_decay, before)
            before = step_memory

    @staticmethod
    def forward(
        ctx,
        value: Tensor,
        dt: Tensor,
        rate: Tensor,
        key: Tensor,
        query: Tensor,
        state: Tensor,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        size = _SelectiveScan._block(value, rate)
        decay, memory = _Block.empty(value, size, rate), _Block.empty(value, size, rate)
        output = torch.empty_like(value, memory_format=torch.contiguous_format)
        checkpoints = []
        for part in block_slices(value.shape[1], size):
            decay, memory = decay.first(part.stop - part.start), memory.first(part.stop - part.start)
            checkpoints.append(state)
            inputs = (value[:, part], dt[:, part], rate, key[:, part], None if starts is None else starts[:, part])
            _SelectiveScan._fill(decay, memory, state, inputs)
            output[:, part] = torch.matmul(query[:, part].unsqueeze(2), memory.whole).squeeze(2)
            state = memory.steps[-1].clone()
        ctx.save_for_backward(value, dt, rate, key, query, starts, *checkpoints)
        return output, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        value, dt, rate, key, query, starts, *checkpoints = ctx.saved_tensors
        size = _SelectiveScan._block(value, rate)
        buffers = [_Block.empty(value, size, rate) for _ in range(3)]
        grad_value, grad_dt = torch.empty_like(value), torch.empty_like(dt)
        grad_rate, grad_key, grad_query = torch.zeros_like(rate), torch.empty_like(key), torch.empty_like(query)
        parts = block_slices(value.shape[1], size)
        with torch.autocast(value.device.type, enabled=False):
            for part, before in zip(reversed(parts), reversed(checkpoints), strict=True):
                decay, memory, grad = (buffer.first(part.stop - part.start) for buffer in buffers)
                inputs = (value[:, part], dt[:, part], rate, key[:, part], None if starts is None else starts[:, part])
                _SelectiveScan._fill(decay, memory, before, inputs)
                grad_part = grad_output[:, part]
                torch.mul(grad_part.unsqueeze(2), query[:, part].unsqueeze(3), out=grad.whole)
                grad.steps[-1].add_(grad_state)
                for t in range(len(grad.steps) - 1, 0, -1):
                    grad.steps[t - 1].addcmul_(decay.steps[t], grad.steps[t])
                grad_state = decay.steps[0] * grad.steps[0]
                # a row times a matrix: the same product with the vector as a column is ten times slower on a CPU
                grad_query[:, part] = torch.matmul(grad_part.unsqueeze(2), memory.whole.transpose(2, 3)).squeeze(2)
                write = (dt[:, part] * value[:, part]).unsqueeze(2)
                grad_key[:, part] = torch.matmul(write, grad.whole.transpose(2, 3)).squeeze(2)
                grad_write = torch.matmul(key[:, part].unsqueeze(2), grad.whole).squeeze(2)
                # gradient of the exponents, in place of the decays: grad * decay * state before the step
                grad.whole[:, 1:].mul_(memory.whole[:, :-1])
                grad.whole[:, 0].mul_(before)
                exponent = decay.whole.mul_(grad.whole)
                torch.mul(exponent, rate, out=memory.whole)
                grad_dt[:, part] = torch.addcmul(memory.whole.sum(2) * LN_2, grad_write, value[:, part])
                grad_value[:, part] = grad_write * dt[:, part]
                grad_rate += exponent.mul_(dt[:, part].unsqueeze(2)).sum((0, 1))
        return grad_value, grad_dt, grad_rate * LN_2, grad_key, grad_query, grad_state, None


@dataclass
class _Block:
    """A buffer `[B, block, N, D]` with a view of each token: made once, since making one costs as much as using it."""

    whole: Tensor
    steps: Sequence[Tensor]

    @classmethod
    def empty(cls, like: Tensor, size: int, rate: Tensor) -> "_Block":
        whole = like.new_empty(like.shape[0], size, *rate.shape)
        return cls(whole, whole.unbind(1))

    def first(self, size: int) -> "_Block":
        """The same memory for `size` tokens."""
        return self if size == len(self.steps) else _Block(self.whole[:, :size], self.steps[:size])
