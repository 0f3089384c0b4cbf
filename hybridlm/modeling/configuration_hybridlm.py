"""Configuration of a hybrid model: recipes for layers, and which recipe stands at which depth.

The file that the Hub stores is the whole truth: every option is written out, defaults included, when a model is built.
"""

import inspect
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

SCHEMA_VERSION = 1

# attention-like mixers, in the closed vocabulary of transformers; everything else is "linear_attention"
_ATTENTION_TYPES = {"attention": ("full_attention", "sliding_attention")}

# common names that other libraries read; here they follow from the recipes
_DERIVED = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "sliding_window")


def _keys_of_transformers() -> set[str]:
    """Top-level keys that transformers itself writes, or passes on load."""
    source = inspect.getsource(inspect.getmodule(PreTrainedConfig))
    handled = re.findall(r"""(?:kwargs|config_dict|output|d)(?:\.(?:pop|get)\(|\[)["'](\w+)["']""", source)
    quoted = re.findall(r"""["'](_?\w+)["'] in (?:self\.__dict__|output|config_dict|kwargs|dictionary)""", source)
    fields = getattr(PreTrainedConfig, "__dataclass_fields__", {})
    generation = GenerationConfig._get_default_generation_params()
    by_other_modules = {"auto_map", "quantization_config", "model_type"}  # saving remote code, quantizers, AutoConfig
    not_ours = {"rope_theta", "rope_scaling", "kwargs"}  # a position is an option of a mixer
    return {*handled, *quoted, *fields, *generation, *by_other_modules} - not_ours


def _default_specs() -> dict:
    return {
        "ssm": {"mixer": {"name": "mamba2"}, "channel_mixer": {"name": "swiglu"}},
        "attn": {"mixer": {"name": "attention"}, "channel_mixer": {"name": "swiglu"}},
    }


@strict
class HybridLMConfig(PreTrainedConfig):
    r"""Describe a hybrid model.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width D of the residual stream.
        num_hidden_layers: Depth; the length of `layer_layout`.
        layer_specs: Recipe name to `{"mixer": part or None, "channel_mixer": part or None, "norm": optional}`; a part
            is `{"name": ..., options ...}`. The names are the keys of `hybridlm.modeling.registry`.
        layer_layout: Recipe name of every layer. By default the recipes take turns.
        spans: Runs of layers that only some tokens pass through: `[{"name": ..., "start": first layer, "stop": layer
            after the last, "every": distance of repetitions or None, options ...}]`, names as in `registry.SPANS`.
        norm: `{"name": "rms" | "layer", "eps": ..., "placement": "pre" | "post" | "sandwich", ...}`.
        residual: `{"name": "add", "multiplier": ..., "layer_scale": initial value or None, "dropout": ...}`, or another
            of `registry.RESIDUALS`.
        embedding_multiplier: Factor on the token embeddings.
        logit_multiplier: Factor on the logits.
        embedding_dropout: Probability of dropping an element of the embeddings in training.
        tie_word_embeddings: Whether the head shares the embedding matrix.
        initializer_range: Standard deviation of normal initialisation.
        embedding_std: The same for the embedding, and for a head that shares it; `initializer_range` when `None`.
        max_position_embeddings: The length that the model was trained for.
        use_cache: Whether a forward in evaluation mode returns its cache.
        output_router_logits: Whether router logits are returned by default.
        extra: Anything else that should travel with the model.
        schema_version: Version of this schema.

    Raises:
        ValueError: An unknown key, a value of the wrong type, a layout that does not fit. Parts and their options are
            checked when a model is built, or by `hybridlm describe`.

    Example:
        >>> config = HybridLMConfig(hidden_size=64, vocab_size=257, num_hidden_layers=2,
        ...     layer_specs={"ssm": {"mixer": {"name": "mamba"}, "channel_mixer": {"name": "swiglu"}}},
        ...     layer_layout=["ssm", "ssm"])
    """

    model_type = "hybridlm"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss"]

    vocab_size: int = 257
    hidden_size: int = 256
    num_hidden_layers: int = 2
    layer_specs: dict | None = None
    layer_layout: list | None = None
    spans: list | None = None
    norm: dict | None = None
    residual: dict | None = None
    embedding_multiplier: float | int = 1.0
    logit_multiplier: float | int = 1.0
    embedding_dropout: float | int = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float | int = 0.02
    embedding_std: float | int | None = None
    max_position_embeddings: int = 2048
    use_cache: bool = True
    output_router_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    extra: dict | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        for name in _DERIVED:
            if name in kwargs:
                raise ValueError(f"{name}: follows from layer_specs and cannot be given; set it in a recipe's mixer")
        unknown = sorted(set(kwargs) - _keys_of_transformers())
        if unknown:
            own = sorted(name for name in type(self).__annotations__)
            raise ValueError(f"{unknown[0]}: unknown key, expected one of {own}; free data belongs into `extra`")
        self._check_schema()
        self.layer_specs = _default_specs() if self.layer_specs is None else self.layer_specs
        if self.layer_layout is None:
            names = list(self.layer_specs)
            self.layer_layout = [names[i % len(names)] for i in range(self.num_hidden_layers)] if names else []
        self.spans = [] if self.spans is None else self.spans
        self.norm = {"name": "rms"} if self.norm is None else self.norm
        self.residual = {"name": "add"} if self.residual is None else self.residual
        self.extra = {} if self.extra is None else self.extra
        self._check_layout()
        super().__post_init__(**kwargs)

    def _check_schema(self) -> None:
        if self.schema_version > SCHEMA_VERSION:
            raise ValueError(
                f"schema_version: {self.schema_version} is newer than {SCHEMA_VERSION}, the newest this hybridlm "
                "reads; upgrade hybridlm"
            )
        if self.schema_version < 1:
            raise ValueError(f"schema_version: {self.schema_version}, expected 1 to {SCHEMA_VERSION}")

    def _check_layout(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"embedding_dropout: {self.embedding_dropout}, expected at least 0 and below 1")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range: {self.initializer_range}, expected at least 0")
        if self.embedding_std is not None and not 0 < self.embedding_std < float("inf"):
            raise ValueError(f"embedding_std: {self.embedding_std}, expected above 0, or null for initializer_range")
        if not self.layer_specs:
            raise ValueError("layer_specs: empty, expected at least one recipe")
        if len(self.layer_layout) != self.num_hidden_layers:
            raise ValueError(
                f"layer_layout: names {len(self.layer_layout)} layers, expected num_hidden_layers="
                f"{self.num_hidden_layers}"
            )
        for depth, name in enumerate(self.layer_layout):
            if name not in self.layer_specs:
                raise ValueError(
                    f"layer_layout.{depth}: unknown recipe {name!r}, expected one of {sorted(self.layer_specs)}"
                )

    def _mixers(self) -> list[dict]:
        return [self.layer_specs[name].get("mixer") or {} for name in self.layer_layout]

    def _first(self, half: str, names: tuple[str, ...]) -> dict:
        parts = (self.layer_specs[recipe].get(half) or {} for recipe in self.layer_layout)
        return next((part for part in parts if part.get("name") in names), {})

    @property
    def layer_types(self) -> list[str]:
        """The layers in transformers' closed vocabulary, for tools that read it."""
        types = []
        for mixer in self._mixers():
            full, windowed = _ATTENTION_TYPES.get(mixer.get("name"), ("linear_attention",) * 2)
            types.append(full if mixer.get("window") is None else windowed)
        return types

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first attention layer; of a stack without one, 1."""
        attention = self._first("mixer", ("attention",))
        return attention.get("num_heads", 8) if attention else 1

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads of the first attention layer."""
        return self._first("mixer", ("attention",)).get("num_kv_heads") or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of a head of the first attention layer."""
        heads = self.num_attention_heads
        if not isinstance(heads, int) or heads < 1:
            heads = 1  # a wrong number is refused, with its path, when the model is built
        return self._first("mixer", ("attention",)).get("head_dim") or self.hidden_size // heads

    @property
    def intermediate_size(self) -> int:
        """Width of the first channel mixer."""
        for recipe in self.layer_layout:
            channel = self.layer_specs[recipe].get("channel_mixer") or {}
            if channel.get("intermediate_size"):
                return channel["intermediate_size"]
        return 4 * self.hidden_size

    @property
    def sliding_window(self) -> int | None:
        """Window of the first windowed attention layer."""
        return next((m["window"] for m in self._mixers() if m.get("window") is not None), None)


__all__ = ["HybridLMConfig"]
