"""Short causal convolution in token-major layout, with a tail that carries over to the next call.

Shapes: B batch, T tokens, C channels, W kernel width.
Reference: Gu and Dao 2023, "Mamba", arXiv:2312.00752, figure 3.
Differs: the tail holds W - 1 tokens, no tap crosses the start of a document, pads at the end of a row leave no trace.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init


@dataclass
class ConvState:
    """`[B, C, W - 1]`, the last inputs of a convolution, in the model's type."""

    conv_states: Tensor


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution in which token t sees tokens t - W + 1 to t of its own document.

    Args:
        channels: Number of channels C.
        kernel_size: Width W.
        bias: Whether each channel has a bias.
    """

    def __init__(self, channels: int, kernel_size: int, *, bias: bool = True) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels, bias=bias)
        self.num_past = kernel_size - 1

    def init_weights(self, std: float = 0.0) -> None:
        """PyTorch's own uniform initialisation, as published; `std` is not used."""
        bound = 1.0 / math.sqrt(self.kernel_size[0])
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def forward(
        self, inputs: Tensor, tail: Tensor | None = None, starts: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve along the tokens.

        Args:
            inputs: `[B, T, C]`.
            tail: `[B, C, W - 1]`, the tokens before the first one; `None` for zeros.
            starts: `[B, T]`, True at the first token of each document; `None` when no document begins here.
            lengths: `[B]`, number of real tokens of each row, which come first; `None` when all are real.

        Returns:
            The outputs `[B, T, C]` and the tail `[B, C, W - 1]` after each row's last real token.
        """
        dtype = torch.promote_types(inputs.dtype, self.weight.dtype)
        padded = torch.cat([self._past(inputs, tail).to(dtype), inputs.to(dtype)], dim=1)  # [B, W - 1 + T, C]
        segment_ids = same = None
        if starts is not None:
            segment_ids = nn.functional.pad(starts.long().cumsum(1), (self.num_past, 0))  # the tail is document 0
            windows = segment_ids.unfold(1, self.num_past + 1, 1)  # [B, T, W]
            same = (windows == windows[..., -1:]).to(dtype)
        weight, bias = self.weight[:, 0].to(dtype), None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            if inputs.shape[1] > 1:
                outputs = _DepthwiseConv.apply(padded, weight, bias, same)
            else:
                taps = padded if same is None else padded * same.transpose(1, 2)
                outputs = (taps * weight.T).sum(1, keepdim=True)
                outputs = outputs if bias is None else outputs + bias
        return outputs.to(inputs.dtype), self._last_tokens(padded, segment_ids, lengths)

    def forward_reference(
        self, inputs: Tensor, tail: Tensor | None = None, starts: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Do what `forward` does, one token at a time."""
        window = self._past(inputs, tail)
        outputs = []
        for t in range(inputs.shape[1]):
            if starts is not None:
                window = window.masked_fill(starts[:, t, None, None], 0.0)
            taps = torch.cat([window, inputs[:, t : t + 1]], dim=1)  # [B, W, C]
            outputs.append((taps * self.weight[:, 0].T).sum(1) + (0.0 if self.bias is None else self.bias))
            real = torch.ones_like(taps[:, :1, :1], dtype=torch.bool)
            if lengths is not None:
                real = (t < lengths)[:, None, None]
            window = torch.where(real, taps[:, 1:], window)
        return torch.stack(outputs, dim=1), window.transpose(1, 2)

    def _past(self, inputs: Tensor, tail: Tensor | None) -> Tensor:
        if tail is None:
            return inputs.new_zeros(inputs.shape[0], self.num_past, inputs.shape[2])
        return tail.transpose(1, 2)

    def _last_tokens(self, padded: Tensor, segment_ids: Tensor | None, lengths: Tensor | None) -> Tensor:
        batch, num_past = padded.shape[0], self.num_past
        num_tokens = padded.shape[1] - num_past
        if lengths is None:
            last = padded[:, num_tokens:]
            same = None if segment_ids is None else segment_ids[:, num_tokens:] == segment_ids[:, -1:]
        else:
            index = lengths[:, None] + torch.arange(num_past, device=padded.device)  # [B, W - 1]
            last = padded.gather(1, index[..., None].expand(batch, num_past, padded.shape[2]))
            same = None
            if segment_ids is not None:
                ids = segment_ids.gather(1, index)
                same = ids == ids[:, -1:]
        if same is not None:
            last = last * same[..., None]
        return last.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # a view would keep all tokens alive


class _DepthwiseConv(torch.autograd.Function):
    """`y_t = sum_k w_k x_(t - W + 1 + k) + b`, with a factor for each token and tap.

    On a CPU PyTorch's own gradient of a depthwise weight takes twenty times as long as the convolution, and autograd
    over shifted copies fills a full-length gradient for each tap. Here the loops go over tiles that stay in the cache.
    """

    TILE_ELEMENTS = 1 << 17

    @staticmethod
    def _tiles(padded: Tensor, width: int) -> list[slice]:
        num_tokens = padded.shape[1] - width + 1
        per_token = padded.shape[0] * padded.shape[2]
        tile = num_tokens if padded.is_cuda else max(8, _DepthwiseConv.TILE_ELEMENTS // per_token)
        return [slice(start, min(start + tile, num_tokens)) for start in range(0, num_tokens, tile)]

    @staticmethod
    def forward(ctx, padded: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None) -> Tensor:
        ctx.save_for_backward(padded, weight, same)
        ctx.has_bias = bias is not None
        if same is None and (padded.is_cuda or padded.dtype in (torch.float32, torch.bfloat16)):
            # token-major [B, T, C] is the channels-last layout of an image of height 1: no transposed copy is made
            image = padded.transpose(1, 2).unsqueeze(2)  # [B, C, 1, W - 1 + T]
            outputs = nn.functional.conv2d(image, weight[:, None, None], bias, groups=weight.shape[0])
            return outputs.squeeze(2).transpose(1, 2)
        taps = weight.T.contiguous()  # [W, C]
        outputs = padded.new_empty(padded.shape[0], padded.shape[1] - len(taps) + 1, padded.shape[2])
        for tile in _DepthwiseConv._tiles(padded, len(taps)):
            output = outputs[:, tile]
            output.copy_(bias) if ctx.has_bias else output.zero_()
            for k in range(len(taps)):
                taken = padded[:, tile.start + k : tile.stop + k]
                output.addcmul_(taken if same is None else taken * same[:, tile, k, None], taps[k])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, same = ctx.saved_tensors
        taps = weight.T.contiguous()
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_padded, grad_taps = torch.zeros_like(padded), torch.zeros_like(taps, dtype=wide)
        for tile in _DepthwiseConv._tiles(padded, len(taps)):
            grad = grad_outputs[:, tile]
            for k in range(len(taps)):
                part = slice(tile.start + k, tile.stop + k)
                grad_tap = grad if same is None else grad * same[:, tile, k, None]
                grad_padded[:, part].addcmul_(grad_tap, taps[k])
                grad_taps[k] += (grad_tap * padded[:, part]).sum((0, 1), dtype=wide)
        grad_bias = grad_outputs.sum((0, 1)) if ctx.has_bias else None
        return grad_padded, grad_taps.T.to(weight.dtype), grad_bias, None
