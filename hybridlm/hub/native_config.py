"""Native config <-> hybridlm config, by the tables of `native_families.py`.

Importing fills our paths from the native options. Exporting fills the native options from ours, imports the result
again and compares: what differs is what the native family cannot say, option by option.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..modeling.configuration_hybridlm import HybridLMConfig
from .native_tables import Family, Layout, Options, gated_width

PARTS = ("mixer", "channel_mixer")
SECTIONS = ("norm", "residual")
# these change speed, or nothing while the part they belong to is off
SILENT = {"chunk_size", "implementation", "bias_update_rate"}
# these change neither weights nor logits: initialisation, regularisation and losses
HARMLESS = {
    *("initializer_range", "embedding_std", "dt_min", "dt_max", "dt_init_floor", "a_min", "a_max"),
    *("dropout", "embedding_dropout", "load_balancing_coef", "z_loss_coef", "loss_scope", "output_router_logits"),
    *("jitter", "max_position_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
}
LEGACY_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def native_class(family: Family) -> type[PreTrainedConfig]:
    """transformers' config class of the family."""
    return CONFIG_MAPPING[family.model_type]


def to_hybrid(family: Family, native: PreTrainedConfig) -> Options:
    """Our config's arguments for a native config object.

    Raises:
        ValueError: A native option has a value that nothing here corresponds to; the text starts with its name.
    """
    for option, allowed in family.refused.items():
        if (value := getattr(native, option, allowed[0])) not in allowed:
            raise ValueError(f"{option}={value!r} has no counterpart in hybridlm, expected {allowed[0]!r}")
    values = dict(family.fixed)
    for pair in family.pairs:
        value = pair.read(native) if pair.read else getattr(native, pair.native)
        values.update(zip(pair.ours, value if isinstance(value, tuple) else (value,) * len(pair.ours), strict=True))
    config: Options = {}
    parts: dict[str, Options] = {}
    for path, value in values.items():
        section, _, option = path.rpartition(".")
        if not section:
            config[option] = value
        elif section in SECTIONS:
            config.setdefault(section, {})[option] = value
        else:
            parts.setdefault(section, {"name": section})[option] = value
    recipes: dict[str, Options] = {}
    config["layer_layout"] = []
    for mixer, channel in family.layout(native):
        name = f"{mixer}_{channel}" if channel else mixer
        recipes[name] = {"mixer": parts[mixer], "channel_mixer": parts[channel] if channel else None}
        config["layer_layout"].append(name)
    config["layer_specs"] = recipes
    if (dtype := getattr(native, "dtype", None)) is not None:
        config["dtype"] = dtype
    return config


def to_native(family: Family, config: Options) -> Options:
    """The family's options that say what `config` (ours, every option resolved) says, or come nearest to it."""
    parts: dict[str, Options] = {}
    for name in config["layer_layout"]:
        for kind in PARTS:
            if part := config["layer_specs"][name].get(kind):
                parts.setdefault(part["name"], part)
    options: Options = {}
    for pair in family.pairs:
        for path in pair.ours:
            section, _, option = path.rpartition(".")
            holder = config if not section else config.get(section) if section in SECTIONS else parts.get(section)
            if holder is not None and option in holder:
                value = holder[option]
                options[pair.native] = pair.write(value, holder, config) if pair.write else value
                break
    return options | family.layout_options(layout_of(config))


def layout_of(config: Options) -> Layout:
    """Mixer and channel mixer of every layer of our config."""
    recipes = [config["layer_specs"][name] for name in config["layer_layout"]]
    return [tuple((recipe.get(kind) or {}).get("name") for kind in PARTS) for recipe in recipes]


def differences(ours: Options, native: Options, family: str) -> tuple[list[str], list[str]]:
    """What our config says and the native family (imported: `native`) does not.

    Returns:
        Sentences about what changes weights or logits, and about what changes neither. Each names the config path.
    """
    flat = set(HybridLMConfig.__annotations__) - {"layer_specs", "layer_layout", "extra", *SECTIONS}
    found = list(_unequal(*({key: config[key] for key in sorted(flat)} for config in (ours, native)), ""))
    found += _unequal(ours["residual"], native["residual"], "residual")
    found += _unequal(_norm(ours), _norm(native), "norm")
    elsewhere: dict[tuple[str, Any, Any], list[str]] = {}
    for depth, (name, other) in enumerate(zip(ours["layer_layout"], native["layer_layout"], strict=True)):
        recipe, expected = ours["layer_specs"][name], native["layer_specs"][other]
        for kind in PARTS:
            part, wanted = recipe.get(kind) or {}, expected.get(kind) or {}
            if part.get("name") != wanted.get("name"):
                place = (f" ({name!r}).{kind}", part.get("name"), wanted.get("name"))
                elsewhere.setdefault(place, []).append(str(depth))
            else:
                found += _part_differences(part, ours, wanted, native, f"layer_specs.{name}.{kind}")
        if recipe.get("norm"):
            found += _unequal(_norm(ours, recipe), _norm(native, expected), f"layer_specs.{name}.norm")
    found += [(f"layer_layout.{','.join(depths)}{path}", *values) for (path, *values), depths in elsewhere.items()]
    blocking: dict[str, str] = {}
    harmless: dict[str, str] = {}
    for path, value, expected in found:
        option = path.rpartition(".")[2]
        if option not in SILENT:
            target = harmless if option in HARMLESS else blocking
            target.setdefault(path, f"{path} is {value!r}, {family} has {expected!r}")
    return list(blocking.values()), list(harmless.values())


def _norm(config: Options, recipe: Mapping[str, Any] | None = None) -> Options:
    return {**((recipe or {}).get("norm") or config["norm"])}


def _part_differences(
    part: Options, ours: Options, wanted: Options, native: Options, path: str
) -> Iterator[tuple[str, Any, Any]]:
    part, wanted = _canonical(part, ours), _canonical(wanted, native)
    # an option that is idle on one side differs through the option that wakes it
    shared = [key for key in part if key in wanted]
    yield from _unequal(*({key: side[key] for key in shared} for side in (part, wanted)), path)


def _unequal(ours: Mapping[str, Any], native: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any, Any]]:
    for key in [*ours, *(key for key in native if key not in ours)]:
        value, expected = ours.get(key), native.get(key)
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and isinstance(expected, Mapping):
            if value.get("name") != expected.get("name"):  # two parts; their options cannot be compared
                value, expected = {"name": value.get("name")}, {"name": expected.get("name")}
            yield from _unequal(value, expected, name)
        elif value != expected:
            yield name, value, expected


def _canonical(part: Options, config: Options) -> Options:
    """The part's options with derived sizes written out and without those that have no effect."""
    part, hidden = dict(part), config["hidden_size"]
    idle: tuple[str, ...] = ()
    match part.get("name"):
        case "attention":
            part["scale"] = None if part["scale"] == part["head_dim"] ** -0.5 else part["scale"]
            idle = (*(() if part["qk_norm"] else ("qk_norm_eps",)), *(("num_sinks",) if part["window"] is None else ()))
        case "mamba":
            part["intermediate_size"] = part.get("intermediate_size") or part["expand"] * hidden
            idle = ("expand",) if part["inner_norms"] else ("expand", "norm_eps")
        case "mamba2":
            idle = ("expand",) if part["gate_norm"] else ("expand", "norm_eps", "norm_before_gate")
        case "swiglu":
            part["intermediate_size"] = gated_width(part["intermediate_size"], config)
        case "moe":
            part["intermediate_size"] = gated_width(part["intermediate_size"], config)
            idle = () if part["num_shared_experts"] else ("shared_gate", "shared_intermediate_size")
            if part["top_k_groups"] == part["num_groups"]:
                idle += ("num_groups", "top_k_groups")
            idle += ("capacity_factor",) if part["routing"] == "top_k" else ()
            idle += () if part["routing"] == "gshard" else ("second_expert",)
            idle += () if part["routing"] == "hash" else ("hash_seed",)
    return {key: value for key, value in part.items() if key not in idle}
