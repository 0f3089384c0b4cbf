"""Short causal convolution in token-major layout, with a tail that carries over to the next call.

Shapes: B batch, T tokens, C channels, W kernel width.
Reference: Gu and Dao 2023, "Mamba", arXiv:2312.00752, figure 3.
Differs: the tail holds W - 1 tokens, no tap crosses the start of a document, pads at the end of a row leave no trace.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init


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
        past = self._past(inputs, tail)
        padded = torch.cat([past.to(dtype), inputs.to(dtype)], dim=1)  # [B, W - 1 + T, C]
        segment_ids = None
        if starts is not None:
            segment_ids = nn.functional.pad(starts.long().cumsum(1), (self.num_past, 0))  # the tail is document 0
        with torch.autocast(inputs.device.type, enabled=False):
            if segment_ids is None and (dtype in (torch.float32, torch.bfloat16) or inputs.is_cuda):
                outputs = self._convolve(padded, dtype)
            else:
                outputs = self._shift_and_add(padded, segment_ids, dtype)
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

    def _convolve(self, padded: Tensor, dtype: torch.dtype) -> Tensor:
        # token-major [B, T, C] is the channels-last layout of an image of height 1: no transposed copy is made
        image = padded.transpose(1, 2).unsqueeze(2)  # [B, C, 1, W - 1 + T]
        bias = None if self.bias is None else self.bias.to(dtype)
        outputs = nn.functional.conv2d(image, self.weight.to(dtype).unsqueeze(2), bias, groups=self.groups)
        return outputs.squeeze(2).transpose(1, 2)

    def _shift_and_add(self, padded: Tensor, segment_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        weight = self.weight[:, 0].to(dtype).T  # [W, C]
        num_tokens = padded.shape[1] - self.num_past
        outputs = padded[:, self.num_past :] * weight[self.num_past]
        for tap in range(self.num_past):
            taken = padded[:, tap : tap + num_tokens]
            if segment_ids is not None:
                same = segment_ids[:, tap : tap + num_tokens] == segment_ids[:, self.num_past :]
                taken = taken * same[..., None]
            outputs = torch.addcmul(outputs, taken, weight[tap])
        return outputs if self.bias is None else outputs + self.bias.to(dtype)

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
