"""The models of the memory comparison.

Every arm has two layers. The first is a short window of attention for all of them, so that a token sees its neighbours;
the second is the arm's own mixer. Widths of the feed-forward networks make up for what mixers cost in parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.analysis.planner import state_bytes
from hybridlm.data import RecallVocabulary

STATE_CONTEXT = 8192  # tokens behind which state bytes are compared


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Args:
        hidden_size: Width D.
        num_heads: Heads of attention and of the store; memories have half as many, since 8 pairs need wide keys.
        num_parameters: What every model comes close to.
        initializer_range: Standard deviation of the initial weights, about that of U(+-1/sqrt(D)).
        embedding_multiplier: Factor on the embeddings; without one they are small beside what the layers add.
        window: Tokens that attention sees.
        chunk: Chunk of the memories, segment of memory as context.
        num_pairs: Pairs of key and value in a row, and queries.
        stages: Length, rows of a step and most steps of each stage of key-value recall.
        passkey: The same for the passkey, after them.
        solved: Share of right answers over `patience` steps at which a stage ends.
        patience: Steps whose answers are counted for that.
        learning_rate: After the warm-up.
        warmup_steps: Steps in which it rises.
        test_lengths: Lengths that are tested.
        test_rows: Rows of each task and length.
        test_piece: Tokens of a row that are read in one call of the tests, on top of the state of those before.
    """

    hidden_size: int = 64
    num_heads: int = 4
    num_parameters: int = 130_000
    initializer_range: float = 0.07
    embedding_multiplier: float = 5.5
    window: int = 8
    chunk: int = 8
    num_pairs: int = 8
    stages: tuple[tuple[int, int, int], ...] = (
        (32, 64, 1500), (64, 64, 200), (128, 32, 200), (256, 16, 150), (512, 16, 150),
    )  # fmt: skip
    passkey: tuple[int, int, int] = (512, 16, 150)
    solved: float = 0.98
    patience: int = 20
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    test_lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    test_rows: int = 64
    test_piece: int = 512
    vocabulary: RecallVocabulary = RecallVocabulary(num_keys=16, num_values=16, num_fillers=16)


QUICK = Settings(
    stages=((32, 64, 400), (64, 64, 100), (128, 32, 100), (256, 16, 60), (512, 16, 60)),
    passkey=(512, 16, 60),
    test_rows=16,
)


def _window(settings: Settings) -> dict[str, Any]:
    heads = {"num_heads": settings.num_heads, "window": settings.window}
    return {"name": "attention", **heads, "position": {"name": "rope"}}


def _memory(settings: Settings, **options: Any) -> dict[str, Any]:
    """A linear memory that forgets little at the start: a pair must outlive the row.

    Without the output gate: `lmm-gated` has it.
    """
    return {
        "name": "neural_memory",
        "output_gate": False,
        "num_heads": settings.num_heads // 2,
        "chunk_size": settings.chunk,
        "memory_depth": 1,
        "forgetting_bias": -8.0,
        "max_curvature": 1.0,  # what a linear memory with unit keys has: no bound
        **options,
    }


def _titans(kind: str, **options: Any) -> Callable[[Settings], dict[str, Any]]:
    def mixer(settings: Settings) -> dict[str, Any]:
        memory = _memory(settings)
        local: dict[str, Any] = {"window": settings.window}
        if kind == "mac":
            del memory["chunk_size"]
            local = {"segment_size": settings.chunk}
        position = {"name": "rope"}
        return {
            "name": f"titans_{kind}", "num_heads": settings.num_heads, "position": position, **local, "memory": memory,
            **options,
        }  # fmt: skip

    return mixer


def _memorizing(settings: Settings) -> dict[str, Any]:
    return {
        "name": "memorizing",
        "num_heads": settings.num_heads,
        "position": {"name": "rope"},
        "window": settings.window,
        "memory_size": 512,
        "top_k": 8,
    }


def _mamba2(settings: Settings) -> dict[str, Any]:
    """With a state as large as that of the memory, to the byte."""
    return {"name": "mamba2", "state_size": 39, "head_dim": 16, "chunk_size": 64}


@dataclass(frozen=True)
class Arm:
    """One model.

    Args:
        about: What it is, in a few words.
        mixer: Makes the mixer of the second layer.
        with_window: Whether the first layer has its window of attention; else it has no mixer.
        control_of: The arm from which this one takes something away.
        is_memory: Whether the bound on recall counts it as a memory.
    """

    about: str
    mixer: Callable[[Settings], dict[str, Any]]
    with_window: bool = True
    control_of: str | None = None
    is_memory: bool = False


ARMS = {
    "window": Arm("attention with a window, twice", _window),
    "mamba2": Arm("Mamba-2", _mamba2),
    "lmm": Arm("neural memory (Titans' LMM)", _memory, is_memory=True),
    "mac": Arm("memory as context (Titans)", _titans("mac"), is_memory=True),
    "mag": Arm("memory as gate (Titans)", _titans("mag"), is_memory=True),
    "mal": Arm("memory as layer (Titans)", _titans("mal"), is_memory=True),
    "memorizing": Arm("window and a store of 512 past keys (Memorizing Transformer)", _memorizing, is_memory=True),
    "lmm-frozen": Arm(
        "lmm that never learns (theta = 0)", lambda s: _memory(s, max_learning_rate=0.0), control_of="lmm"
    ),
    "lmm-gated": Arm("lmm with the output gate", lambda s: _memory(s, output_gate=True), control_of="lmm"),
    "mac-bare": Arm(
        "mac without the token beside its context", _titans("mac", attention_residual=False), control_of="mac"
    ),
    "lmm-alone": Arm("lmm without the window", _memory, with_window=False, control_of="lmm", is_memory=True),
}
ON_REQUEST = ("lmm-gated", "mac-bare")  # what the two choices are worth; LOG.md has the answers
DEFAULT_ARMS = [arm for arm in ARMS if arm not in ON_REQUEST]
QUICK_ARMS = ["window", "lmm", "lmm-frozen"]


@cache
def build_config(arm: str, settings: Settings) -> HybridLMConfig:
    """The config of an arm, with the width of feed-forward networks that comes closest to the number of parameters."""
    small, large = (_config(arm, settings, width) for width in (16, 32))
    counts = [_count(config) for config in (small, large)]
    slope = (counts[1] - counts[0]) / 16
    width = round(16 + (settings.num_parameters - counts[0]) / slope)
    if width < 1:
        raise ValueError(f"num_parameters={settings.num_parameters} is too few for {arm!r}")
    config = _config(arm, settings, width)
    _outline(config)  # writes out all options, so that the config says the same before and after a model is built
    return config


def _config(arm: str, settings: Settings, width: int) -> HybridLMConfig:
    chosen = ARMS[arm]
    channel = {"name": "swiglu", "intermediate_size": width}
    local = _window(settings) if chosen.with_window else None
    mixers = {"local": local, "own": chosen.mixer(settings)}
    return HybridLMConfig(
        vocab_size=settings.vocabulary.size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=2,
        layer_specs={name: {"mixer": mixer, "channel_mixer": channel} for name, mixer in mixers.items()},
        layer_layout=["local", "own"],
        tie_word_embeddings=True,
        initializer_range=settings.initializer_range,
        embedding_multiplier=settings.embedding_multiplier,
        max_position_embeddings=max(settings.test_lengths),
        use_cache=False,
    )


def _count(config: HybridLMConfig) -> int:
    return _outline(config).num_parameters()


def _outline(config: HybridLMConfig) -> HybridLMForCausalLM:
    """The model without its weights."""
    with torch.device("meta"):
        return HybridLMForCausalLM(config)


def row_state_bytes(arm: str, settings: Settings) -> int:
    """What a row's state takes behind `STATE_CONTEXT` tokens, in float32, by the planner."""
    mixers = [layer.mixer for layer in _outline(build_config(arm, settings)).model.layers if layer.mixer is not None]
    return sum(state_bytes(mixer, STATE_CONTEXT, torch.float32) for mixer in mixers)


def build_model(arm: str, settings: Settings, seed: int) -> HybridLMForCausalLM:
    """An arm's model."""
    torch.manual_seed(seed)
    return HybridLMForCausalLM(build_config(arm, settings))
