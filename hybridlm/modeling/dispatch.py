"""Ways to send tokens to experts that are more than the best k scores of each token.

Shapes: N tokens of a call, k choices a token, E experts.
Reference: Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961, section 2.2 (capacity); Lepikhin et al. 2020,
"GShard", arXiv:2006.16668, algorithm 1 (second expert at random, capacity); Zhou et al. 2022, "Mixture-of-Experts with
Expert Choice Routing", arXiv:2202.09368; Roller et al. 2021, "Hash Layers For Large Sparse Models", arXiv:2106.04426.
"""

from fractions import Fraction

import torch
from torch import Tensor, nn

_MIX, _WORD = 0x45D9F3B, 0xFFFFFFFF


def capacity_of(capacity_factor: float, top_k: int, num_experts: int, num_tokens: Tensor | int) -> Tensor | int:
    """Places of one expert: `capacity_factor * k * tokens / E`, rounded up, in whole numbers so that it is exact."""
    ratio = Fraction(capacity_factor).limit_denominator(10**6) * top_k / num_experts
    return -(-num_tokens * ratio.numerator // ratio.denominator)


def within_capacity(indices: Tensor, wanted: Tensor, num_experts: int, capacity: Tensor | int) -> Tensor:
    """Which wishes an expert has a place for: all first choices before all second ones, in the order of the tokens.

    Args:
        indices: `[N, k]`, the chosen experts.
        wanted: `[N, k]`, False at choices that want no place: those of pads, and what was dropped before.
        num_experts: E.
        capacity: Places of one expert.

    Returns:
        `[N, k]`, True where a wish got its place.
    """
    queue = indices.T.flatten()
    wishes = nn.functional.one_hot(queue, num_experts) * wanted.T.flatten()[:, None]  # [k * N, E]
    place = wishes.cumsum(0).gather(1, queue[:, None])  # counted from 1
    return wanted & (place <= capacity).view(indices.shape[::-1]).T


def tokens_of_experts(scores: Tensor, token_mask: Tensor | None, capacity: Tensor | int) -> Tensor:
    """Let every expert choose its best tokens.

    Args:
        scores: `[N, E]`.
        token_mask: `[N]`, true at real tokens; None for all.
        capacity: Tokens an expert takes.

    Returns:
        `[N, E]`, True where the expert took the token.
    """
    scores = scores.detach()
    if token_mask is not None:
        scores = scores.masked_fill(~token_mask[:, None], float("-inf"))
    rank = scores.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    chosen = rank < capacity
    return chosen if token_mask is None else chosen & token_mask[:, None]


def hashed_experts(token_ids: Tensor, top_k: int, num_experts: int, seed: int) -> Tensor:
    """Choose k different experts for every token id: a function of its arguments alone, on any device.

    Args:
        token_ids: `[...]`.
        top_k: k.
        num_experts: E.
        seed: Another seed gives another table.

    Returns:
        `[..., k]`.
    """
    experts = torch.arange(num_experts, device=token_ids.device)
    values = token_ids[..., None] * num_experts + experts + (seed * 0x9E3779B1 & _WORD)
    for _ in range(3):  # 32 bits in 64: no product overflows
        values = ((values >> 16) ^ values) * _MIX & _WORD
    return (values * num_experts + experts).topk(top_k, dim=-1).indices  # the second term parts equal values
