"""The models of the isoFLOP comparison.

Every arm is the same stack of attention and SwiGLU layers with one thing changed. Arms of one seed begin with the same
weights wherever they have the same parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.data import build_byte_tokenizer


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Args:
        hidden_size: Width D.
        num_layers: Layers of the plain stack.
        num_heads: Attention heads.
        intermediate_size: Width of the feed-forward networks; of an expert, half of it.
        initializer_range: Standard deviation of the initial weights.
        embedding_multiplier: Factor on the embeddings; without one they are small beside what the layers add.
        length: Tokens in a row, T.
        batch_size: Rows in a step.
        num_steps: Steps of the plain model; the FLOPs of these are what every arm may spend.
        learning_rate: Constant after the warm-up.
        warmup_steps: Steps in which it rises.
        weight_decay: Of matrices.
        num_evaluations: Times in `num_steps` that the held-out loss is read, evenly.
        heldout_windows: Windows of T bytes that are scored.
        count_every: Steps between two counts of an arm's FLOPs where they depend on the data.
    """

    hidden_size: int = 64
    num_layers: int = 4
    num_heads: int = 2
    intermediate_size: int = 192
    initializer_range: float = 0.05
    embedding_multiplier: float = 8.0
    length: int = 128
    batch_size: int = 4
    num_steps: int = 2400
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    num_evaluations: int = 6
    heldout_windows: int = 512
    count_every: int = 10


QUICK = Settings(
    hidden_size=32, num_layers=4, num_heads=2, intermediate_size=64, length=64, batch_size=4, num_steps=20,
    warmup_steps=4, num_evaluations=2, heldout_windows=8, count_every=2,
)  # fmt: skip


def _depth(capacity: float, rule: str) -> Callable[[Settings], list[dict[str, Any]]]:
    span = {"name": "mixture_of_depths", "start": 1, "stop": 2, "every": 2, "capacity": capacity, "rule": rule}
    return lambda settings: [dict(span)]


def _merging(boundary: str) -> Callable[[Settings], list[dict[str, Any]]]:
    def spans(settings: Settings) -> list[dict[str, Any]]:
        quarter = settings.num_layers // 4
        inside = {"start": quarter, "stop": settings.num_layers - quarter}
        return [{"name": "token_merging", **inside, "boundary": boundary, "target_ratio": 2.0}]

    return spans


@dataclass(frozen=True)
class Arm:
    """One way to build the stack.

    Args:
        about: What it is, in a few words.
        spans: Makes the config's `spans`.
        experts: Whether the feed-forward networks are mixtures of experts.
        every_other: Whether only layers 0, 2, 4, ... are built: what is left when the spans of depth take nothing.
    """

    about: str
    spans: Callable[[Settings], list[dict[str, Any]]] = field(default=lambda settings: [])
    experts: bool = False
    every_other: bool = False


ARMS = {
    "plain": Arm("attention and SwiGLU"),
    "fewer": Arm("plain without the layers that depth routing wraps", every_other=True),
    "random": Arm("a random 12.5 % of places, the same in every row, in every other layer", _depth(0.125, "random")),
    "mod": Arm("mixture of depths, 12.5 % of tokens in every other layer", _depth(0.125, "threshold")),
    "mod_half": Arm("mixture of depths, 50 % of tokens in every other layer", _depth(0.5, "threshold")),
    "merge": Arm("token merging 2:1 around the middle layers, boundaries by cosine", _merging("cosine")),
    "moe": Arm("8 experts of half the width, 2 a token", experts=True),
    "moe_mod": Arm("moe and mod together", _depth(0.125, "threshold"), experts=True),
    "mod_topk": Arm("mod trained by top-k, with a causal predictor", _depth(0.125, "predictor")),
    "merge_learned": Arm("token merging 2:1 around the middle layers, learned boundaries", _merging("learned")),
}
DEFAULT_ARMS = [name for name in ARMS if name not in ("mod_topk", "merge_learned")]


def build_config(arm: str, settings: Settings) -> HybridLMConfig:
    """The config of an arm."""
    chosen = ARMS[arm]
    channel: dict[str, Any] = {"name": "swiglu", "intermediate_size": settings.intermediate_size}
    if chosen.experts:
        channel = {"name": "moe", "num_experts": 8, "top_k": 2, "load_balancing_coef": 0.01, "implementation": "loop"}
        channel["intermediate_size"] = settings.intermediate_size // 2
    mixer = {"name": "attention", "num_heads": settings.num_heads, "position": {"name": "rope"}, "qk_norm": True}
    depth = settings.num_layers // 2 if chosen.every_other else settings.num_layers
    return HybridLMConfig(
        vocab_size=len(build_byte_tokenizer()),
        hidden_size=settings.hidden_size,
        num_hidden_layers=depth,
        layer_specs={"attn": {"mixer": mixer, "channel_mixer": channel}},
        layer_layout=["attn"] * depth,
        spans=chosen.spans(settings),
        initializer_range=settings.initializer_range,
        embedding_multiplier=settings.embedding_multiplier,
        max_position_embeddings=settings.length,
        use_cache=False,
    )


def build_model(arm: str, settings: Settings, seed: int) -> HybridLMForCausalLM:
    """An arm's model; what it shares with the plain one begins as there."""
    torch.manual_seed(seed)
    plain = HybridLMForCausalLM(build_config("plain", settings))
    if arm == "plain":
        return plain
    model = HybridLMForCausalLM(build_config(arm, settings))
    kept = dict(enumerate(plain.model.layers))
    if ARMS[arm].every_other:
        kept = {index: plain.model.layers[2 * index] for index in range(settings.num_layers // 2)}
    weights = {name: tensor for name, tensor in plain.state_dict().items() if ".layers." not in name}
    for index, layer in kept.items():
        weights |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in own}, strict=False)
    return model
