"""Vocabulary of the tables in `native_families.py`: options, layouts and tensor names that several families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]
Layout = list[tuple[str, str | None]]
"""Per layer: the name of its mixer and of its channel mixer."""


@dataclass(frozen=True)
class Pair:
    """One native option and the places it fills in ours.

    Args:
        native: Name of the native option.
        ours: Paths such as `"hidden_size"`, `"norm.eps"` or `"mamba.bias"` (part name, option).
        read: The value for our paths, from the native config object; a tuple has one value for each path.
        write: The native value, from our value (of the first path), the options of its part and the whole config.
    """

    native: str
    ours: tuple[str, ...]
    read: Callable[[Any], Any] | None = None
    write: Callable[[Any, Options, Options], Any] | None = None


@dataclass(frozen=True)
class Family:
    """A native family: `model_type`, its causal LM class, its options, its layers and its tensor names.

    Args:
        layout: Mixer and channel mixer of every layer, from the native config object.
        layout_options: The native options that give such a layout, or the nearest one there is.
        pairs: Options with a counterpart.
        fixed: Our paths whose value the family cannot change.
        refused: Native options without a counterpart here, with the values at which they do nothing.
        modules: Our module names -> native ones; `{part}` keys stand inside a layer.
    """

    model_type: str
    architecture: str
    layout: Callable[[Any], Layout]
    layout_options: Callable[[Layout], Options]
    pairs: tuple[Pair, ...]
    fixed: Mapping[str, Any]
    modules: Mapping[str, str]
    refused: Mapping[str, tuple] = field(default_factory=dict)


def same(native: str, *ours: str) -> Pair:
    """One value under two names, or under several of ours."""
    return Pair(native, ours or (native,))


def number(native: str, *ours: str) -> Pair:
    """A float that native configs also write as an int or as null for 0."""
    return Pair(native, ours, read=lambda config: float(getattr(config, native) or 0))


# --- rope -------------------------------------------------------------------------------------------------------------

ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def _read_position(config: Any, partial: bool = False) -> Options:
    parameters = {key: value for key, value in config.rope_parameters.items() if key != "type"}
    rope_type, theta = parameters.pop("rope_type", "default"), parameters.pop("rope_theta")
    factor = parameters.pop("partial_rotary_factor", 1.0)
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"rope_parameters.rope_type={rope_type!r} has no exact counterpart, expected one of {list(ROPE_TYPES)}; "
            "frequencies that depend on the length give logits that depend on chunking: 'yarn' does not"
        )
    if not partial and factor != 1.0:
        # these families rotate the whole head: the default type overlooks the factor, the others fail on it
        if rope_type != "default":
            raise ValueError(f"rope_parameters.partial_rotary_factor={factor} fails in this family, expected 1.0")
        factor = 1.0
    scaling = None if rope_type == "default" else {"rope_type": rope_type, **parameters}
    return {"name": "rope", "theta": float(theta), "partial_rotary_factor": float(factor), "scaling": scaling}


def _write_position(partial: bool) -> Callable[[Any, Options, Options], Options]:
    def write(position: Options, options: Options, config: Options) -> Options:
        parameters = {"rope_type": "default", **(position.get("scaling") or {}), "rope_theta": position.get("theta")}
        if partial:
            parameters["partial_rotary_factor"] = position.get("partial_rotary_factor", 1.0)
        return {key: value for key, value in parameters.items() if value is not None}

    return write


def rope(partial: bool = False) -> Pair:
    """`rope_parameters`; `partial` where the family can rotate a part of each head."""
    return Pair(
        "rope_parameters",
        ("attention.position",),
        read=lambda config: _read_position(config, partial),
        write=_write_position(partial),
    )


# --- options shared by several families -------------------------------------------------------------------------------

TOP = (
    same("vocab_size"),
    same("hidden_size"),
    same("num_hidden_layers"),
    same("initializer_range"),
    same("tie_word_embeddings"),
    same("use_cache"),
    same("pad_token_id"),
    same("bos_token_id"),
    same("eos_token_id"),
)
LENGTH = same("max_position_embeddings")
PLAIN = {
    "norm.name": "rms",
    "norm.offset": False,
    "norm.placement": "pre",
    "residual.name": "add",
    "residual.multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logit_multiplier": 1.0,
}

ATTENTION = (
    same("num_attention_heads", "attention.num_heads"),
    same("num_key_value_heads", "attention.num_kv_heads"),
    Pair(
        "head_dim",
        ("attention.head_dim",),
        read=lambda config: getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    ),
    number("attention_dropout", "attention.dropout"),
)
PLAIN_ATTENTION = {
    "attention.window": None,
    "attention.num_sinks": 0,
    "attention.conv_kernel": None,
    "attention.qk_norm": False,
    "attention.output_gate": False,
    "attention.logit_softcap": None,
    "attention.learned_sinks": False,
    "attention.scale": None,
}
NO_BIAS = {"attention.qkv_bias": False, "attention.out_bias": False}
BIAS = same("attention_bias", "attention.qkv_bias", "attention.out_bias")
WINDOW = same("sliding_window", "attention.window")


def gated_width(width: int | None, config: Options) -> int:
    """Width of a gated channel mixer; null is the default of ours."""
    return 64 * -(-8 * config["hidden_size"] // 192) if width is None else width


def inner_width(*ours: str) -> Pair:
    """`intermediate_size` of a gated channel mixer or of an expert."""
    return Pair("intermediate_size", ours, write=lambda width, options, config: gated_width(width, config))


SWIGLU = (inner_width("swiglu.intermediate_size"), same("hidden_act", "swiglu.activation"))


def moe(experts: str) -> tuple[Pair, ...]:
    """Options of the experts; `experts` is the native name of their number."""
    return (
        same(experts, "moe.num_experts"),
        same("num_experts_per_tok", "moe.top_k"),
        number("router_aux_loss_coef", "moe.load_balancing_coef"),
        same("output_router_logits"),
    )


PLAIN_MOE = {
    "moe.scores": "softmax",
    "moe.scaling_factor": 1.0,
    "moe.num_groups": 1,
    "moe.top_k_groups": 1,
    "moe.selection_bias": False,
    "moe.num_shared_experts": 0,
    "moe.num_zero_experts": 0,
    "moe.num_copy_experts": 0,
    "moe.routing": "top_k",
    "moe.z_loss_coef": 0.0,
    "moe.loss_scope": "batch",
}


def write_expand(expand: Any, options: Options, config: Options) -> Any:
    """The native width is `expand * hidden_size`; ours may be given as `intermediate_size` instead."""
    width = options.get("intermediate_size")
    return expand if width is None or width % config["hidden_size"] else width // config["hidden_size"]


def _read_limit(config: Any) -> tuple[float, float | None]:
    low, high = config.time_step_limit if config.time_step_limit is not None else (0.0, float("inf"))
    return float(low), None if high == float("inf") else float(high)


def _write_limit(low: float, options: Options, config: Options) -> list[float]:
    high = options.get("dt_limit_max")
    return [low, float("inf") if high is None else high]


LIMIT = Pair("time_step_limit", ("mamba2.dt_limit_min", "mamba2.dt_limit_max"), read=_read_limit, write=_write_limit)
PLAIN_MAMBA2 = {"mamba2.gate_norm": True, "mamba2.norm_before_gate": False}

# --- layouts ----------------------------------------------------------------------------------------------------------


def uniform(mixer: str, channel: str | None) -> tuple[Callable[[Any], Layout], Callable[[Layout], Options]]:
    """The same mixers in every layer."""
    return lambda config: [(mixer, channel)] * config.num_hidden_layers, lambda layout: {}


def jamba_layout(config: Any) -> Layout:
    """Attention once in a period, Mamba otherwise; experts once in another period."""
    return [
        (kind, "moe" if experts > 1 else "swiglu")
        for kind, experts in zip(config.layers_block_type, config.layers_num_experts, strict=True)
    ]


def _period(chosen: list[bool]) -> tuple[int, int]:
    """Period and offset that pick the layers in `chosen`, or as nearly as they can."""
    count = len(chosen)
    never = (count + 1, count)
    periods = [(period, offset) for period in range(1, count + 1) for offset in range(period)]
    return min([*periods, never], key=lambda p: sum((i % p[0] == p[1]) != c for i, c in enumerate(chosen)))


def jamba_layout_options(layout: Layout) -> Options:
    """Both periods and offsets."""
    attention, experts = [mixer == "attention" for mixer, _ in layout], [channel == "moe" for _, channel in layout]
    attention_period, attention_offset = _period(attention)
    options = {"attn_layer_period": attention_period, "attn_layer_offset": attention_offset}
    if not any(experts):
        return options | {"num_experts": 1}
    expert_period, expert_offset = _period(experts)
    return options | {"expert_layer_period": expert_period, "expert_layer_offset": expert_offset}


def bamba_layout(config: Any) -> Layout:
    """Attention in listed layers, Mamba-2 otherwise."""
    attention = set(config.attn_layer_indices or ())
    return [("attention" if i in attention else "mamba2", "swiglu") for i in range(config.num_hidden_layers)]


def bamba_layout_options(layout: Layout) -> Options:
    """The list."""
    return {"attn_layer_indices": [i for i, (mixer, _) in enumerate(layout) if mixer == "attention"] or None}


# --- tensor names -----------------------------------------------------------------------------------------------------

TRANSFORMER_MODULES = {
    "model.embed_tokens": "model.embed_tokens",
    "model.norm": "model.norm",
    "model.layers": "model.layers",
    "mixer_norm": "input_layernorm",
    "channel_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "swiglu": "mlp",
}
HYBRID_MODULES = TRANSFORMER_MODULES | {
    "model.norm": "model.final_layernorm",
    "channel_norm": "pre_ff_layernorm",
    "swiglu": "feed_forward",
    "moe": "feed_forward",
    "mamba": "mamba",
    "mamba2": "mamba",
    "mamba.dt_bias": "dt_proj.bias",
    "mamba.dt_norm": "dt_layernorm",
    "mamba.b_norm": "b_layernorm",
    "mamba.c_norm": "c_layernorm",
    "moe.gate": "gate_proj",
    "moe.up": "up_proj",
    "moe.down": "down_proj",
}
MAMBA_MODULES = {
    "model.embed_tokens": "backbone.embeddings",
    "model.norm": "backbone.norm_f",
    "model.layers": "backbone.layers",
    "mixer_norm": "norm",
    "mamba": "mixer",
    "mamba2": "mixer",
    "mamba.dt_bias": "dt_proj.bias",
}
MIXTRAL_MODULES = TRANSFORMER_MODULES | {
    "moe": "block_sparse_moe",
    "moe.router": "gate",
    "moe.gate": "w1",
    "moe.up": "w3",
    "moe.down": "w2",
}
