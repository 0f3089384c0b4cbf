"""Tiny models for the integration tests, and prompts for them.

Weights are drawn wide, so that greedy text does not settle into one token and a lost state shows at once. Texts are
compared in float64, where a near tie between two tokens or two experts cannot decide.
"""

from functools import cache
from typing import Any

import torch

from hybridlm import HybridLMConfig, HybridLMForCausalLM

ROPE = {"name": "rope", "theta": 10000.0}
MIXERS = {
    "mamba": {"name": "mamba", "state_size": 4, "inner_norms": True},
    "mamba2": {"name": "mamba2", "state_size": 8, "head_dim": 8},
    "attention": {"name": "attention", "num_heads": 4, "num_kv_heads": 2, "position": ROPE},
    "window": {"name": "attention", "num_heads": 4, "num_kv_heads": 1, "window": 4, "num_sinks": 2, "position": ROPE},
}
SWIGLU = {"name": "swiglu", "intermediate_size": 32}
MLP = {"name": "mlp", "intermediate_size": 32}
MOE = {
    **{"name": "moe", "num_experts": 4, "top_k": 2, "intermediate_size": 16, "selection_bias": True},
    **{"num_shared_experts": 1, "load_balancing_coef": 0.01, "z_loss_coef": 0.001},
}
STACKS = {
    "mamba": [("mamba", None), ("mamba", SWIGLU)],
    "mamba2": [("mamba2", None), ("mamba2", SWIGLU)],
    "attention": [("attention", SWIGLU), ("attention", MLP)],
    "window": [("window", SWIGLU), ("window", MLP)],
    "hybrid": [("mamba", MOE), ("attention", SWIGLU), ("mamba2", MOE), ("window", MLP)],
}


def config_of(stack: str, **fields: Any) -> HybridLMConfig:
    """The config of one of `STACKS`."""
    recipes = {
        f"layer_{i}": {"mixer": MIXERS[mixer], "channel_mixer": channel}
        for i, (mixer, channel) in enumerate(STACKS[stack])
    }
    sizes = {"vocab_size": 48, "hidden_size": 32, "initializer_range": 0.3, "max_position_embeddings": 256}
    fields = sizes | {"num_hidden_layers": len(recipes)} | fields
    return HybridLMConfig(layer_specs=recipes, layer_layout=list(recipes), **fields)


def build(stack: str, dtype: torch.dtype = torch.float64, model: type = HybridLMForCausalLM, **fields: Any) -> Any:
    """A seeded model in eval mode."""
    torch.manual_seed(1)
    return model(config_of(stack, **fields)).to(dtype).eval()


@cache
def shared(stack: str) -> HybridLMForCausalLM:
    """One float64 model a stack, for tests that do not change it."""
    return build(stack)


def prompt(batch: int = 1, length: int = 9, seed: int = 2) -> torch.Tensor:
    """Random ids `[batch, length]`, without the ids 0 and 1, which tests use for pads and ends."""
    return torch.randint(2, 48, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor], width: int | None = None) -> dict[str, torch.Tensor]:
    """Rows `[length]` of different lengths as a batch with pads on the left."""
    width = width or max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: Any, ids: torch.Tensor, new_tokens: int = 16, **options: Any) -> torch.Tensor:
    """Text `[B, length + new_tokens]` by greedy decoding."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False} | options
    return model.generate(ids, max_new_tokens=new_tokens, **options)


def greedy_by_hand(model: Any, ids: torch.Tensor, new_tokens: int = 16, **options: Any) -> torch.Tensor:
    """The same with one full forward a token: what every way of decoding must give."""
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids, use_cache=False, **options).logits[:, -1:].argmax(-1)], dim=1)
    return ids
