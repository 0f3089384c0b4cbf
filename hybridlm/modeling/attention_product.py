"""Queries against keys, through the backend that the model was told to use.

Shapes: B batch, T new tokens, S keys, H query heads, G key-value heads, K head width.
Reference: Vaswani et al. 2017, arXiv:1706.03762.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .precision import state_dtype


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention, and the truth for the other backends.

    Args:
        module: Gives `training` and `num_key_value_groups`.
        query: `[B, H, T, K]`.
        key: `[B, G, S, K]`.
        value: `[B, G, S, K]`.
        attention_mask: `[B or 1, 1, T, S]`, True where visible; `None` for all, or for causal with `is_causal`.
        scaling: Factor on the scores.
        dropout: Probability of dropping a weight in training.
        softcap: Scores are squeezed into (-softcap, softcap).
        s_aux: `[H]`, logit of a learned sink that takes weight and gives nothing.
        is_causal: Whether query t sees keys up to t when there is no mask.

    Returns:
        `[B, T, H, K]` and the weights `[B, H, T, S]`.
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None and is_causal:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    scores = scores.to(state_dtype(scores.dtype))
    if s_aux is not None:
        sink = s_aux.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = nn.functional.dropout(weights.to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class _BackendName:
    """What flash attention reads from its module's config; a class of its own because Dynamo can trace it."""

    _attn_implementation = "sdpa"


class AttentionProduct(nn.Module):
    """Queries against keys, through the backend that the model was told to use.

    A module of its own so that transformers can record the weights it returns.
    """

    def __init__(self, num_key_value_groups: int, scaling: float) -> None:
        super().__init__()
        self.num_key_value_groups, self.scaling = num_key_value_groups, scaling
        self.is_causal = True
        self.config = _BackendName()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, implementation: str, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return `[B, T, H, K]`, and the weights where the backend has them."""
        if self.config._attn_implementation != implementation:
            self.config._attn_implementation = implementation
        function = eager_attention
        if implementation != "eager":
            function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        return function(self, query, key, value, mask, scaling=self.scaling, **options)
