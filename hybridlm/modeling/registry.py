"""The parts by name, and how a config's entries become parts.

A part is `{"name": ..., option: value, ...}`. Names come from the dictionaries below, options from the part's
constructor, types from its annotations. Adding a part is a file and a line here; `MIXERS["mine"] = Mine` at run time
works too.
"""

import inspect
import types
import typing
from typing import Any

import torch
from torch import nn

from .channel_mlp import MLP
from .channel_moe import MoE
from .channel_swiglu import SwiGLU
from .memories import MEMORIES
from .mixer_attention import AttentionMixer
from .mixer_ema_memory import EMAMemoryMixer
from .mixer_mamba import MambaMixer
from .mixer_mamba2 import Mamba2Mixer
from .mixer_memorizing import MemorizingMixer
from .mixer_neural_memory import NeuralMemoryMixer
from .mixer_titans_mac import TitansMACMixer
from .mixer_titans_mag import TitansMAGMixer
from .mixer_titans_mal import TitansMALMixer
from .mixer_transformer_xl import TransformerXLMixer
from .norms import NORMS
from .positions import POSITIONS
from .residual_add import AddResidual
from .residual_hyper_connections import HyperConnectionsResidual
from .residual_manifold_hyper_connections import ManifoldHyperConnectionsResidual
from .span_mixture_of_depths import MixtureOfDepths
from .span_token_merging import TokenMerging

MIXERS = {
    "attention": AttentionMixer,
    "ema_memory": EMAMemoryMixer,
    "mamba": MambaMixer,
    "mamba2": Mamba2Mixer,
    "memorizing": MemorizingMixer,
    "neural_memory": NeuralMemoryMixer,
    "titans_mac": TitansMACMixer,
    "titans_mag": TitansMAGMixer,
    "titans_mal": TitansMALMixer,
    "transformer_xl": TransformerXLMixer,
}
CHANNEL_MIXERS = {"mlp": MLP, "moe": MoE, "swiglu": SwiGLU}
RESIDUALS = {
    "add": AddResidual,
    "hyper_connections": HyperConnectionsResidual,
    "manifold_hyper_connections": ManifoldHyperConnectionsResidual,
}
SPANS = {"mixture_of_depths": MixtureOfDepths, "token_merging": TokenMerging}
SPAN_KEYS = {"start": None, "stop": None, "every": None}
PLACEMENTS = ("pre", "post", "sandwich")

HALVES = {"mixer": MIXERS, "channel_mixer": CHANNEL_MIXERS}
_NESTED = {"memory": (MEMORIES, "neural_memory"), "position": (POSITIONS, "none")}  # table, and the default


def options_of(part: type) -> dict[str, inspect.Parameter]:
    """The options of a part: the keyword-only arguments of its constructor."""
    parameters = inspect.signature(part.__init__).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value has the annotated type; an int passes as a float, a bool as neither."""
    if annotation is Any or annotation is inspect.Parameter.empty:
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is type(None) or annotation is None:
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or annotation
    return isinstance(value, (list, tuple) if kind in (list, tuple) else kind)


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def resolve_part(spec: Any, registry: dict[str, type], path: str, extra: dict[str, Any] | None = None) -> dict:
    """Check a part's entry and write out its options.

    Args:
        spec: The entry.
        registry: Names and classes that may stand here.
        path: Where the entry stands in the config, for errors.
        extra: Keys with defaults that belong to the entry and not to the constructor.

    Returns:
        A new entry with every option.

    Raises:
        ValueError: An unknown name or option, or a value of the wrong type; the message starts with the path.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise ValueError(f"{path}: expected a part such as {{'name': {sorted(registry)[0]!r}}}, got {spec!r}")
    name = spec["name"]
    if name not in registry:
        raise ValueError(f"{path}.name: unknown {name!r}, expected one of {sorted(registry)}")
    options, extra = options_of(registry[name]), extra or {}
    hints = typing.get_type_hints(registry[name].__init__)
    for key, value in spec.items():
        if key == "name" or key in extra:
            continue
        if key not in options:
            raise ValueError(f"{path}: unknown option {key!r}, expected one of {sorted([*options, *extra])}")
        if not _fits(value, hints.get(key, Any)):
            kind = _type_name(hints[key])
            raise ValueError(f"{path}.{key}: expected {kind}, got {value!r} ({type(value).__name__})")
    resolved = {"name": name}
    for key, parameter in options.items():
        value = spec.get(key, None if parameter.default is parameter.empty else parameter.default)
        if key in _NESTED:
            table, default = _NESTED[key]
            value = resolve_part({"name": default} if value is None else value, table, f"{path}.{key}")
        resolved[key] = value
    return resolved | {key: spec.get(key, default) for key, default in extra.items()}


def build_part(spec: dict, registry: dict[str, type], path: str, size: int) -> nn.Module:
    """Build a part from its resolved entry.

    Raises:
        ValueError: The constructor refused a value; the message starts with the path.
    """
    others = ("name", *SPAN_KEYS) if registry is SPANS else ("name", "placement")
    options = {key: value for key, value in spec.items() if key not in others}
    try:
        return registry[spec["name"]](size, **options)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from error


def build_residual_head(spec: dict, size: int) -> nn.Module | None:
    """Build what stands before the first and after the last layer for a resolved `residual` entry, or `None`."""
    return RESIDUALS[spec["name"]].head(size, **{key: value for key, value in spec.items() if key != "name"})


def resolve_norm(spec: Any, path: str) -> dict:
    """Check a `norm` entry and write out its options.

    Raises:
        ValueError: As `resolve_part`, or an unknown placement.
    """
    resolved = resolve_part(spec, NORMS, path, extra={"placement": "pre"})
    if resolved["placement"] not in PLACEMENTS:
        raise ValueError(f"{path}.placement: unknown {resolved['placement']!r}, expected one of {sorted(PLACEMENTS)}")
    return resolved


def _fill_derived(spec: dict, part: nn.Module) -> dict:
    """Replace options left at `None` by what the part made of them, so that the file stores numbers."""
    filled = dict(spec)
    for key, value in spec.items():
        made = getattr(part, key, None)
        if value is None and isinstance(made, bool | int | float | str):
            filled[key] = made
        elif key in _NESTED:
            filled[key] = _fill_derived(value, made)
    return filled


def resolve_config(config: Any) -> None:
    """Check every part of a config and write out its options, in place.

    Args:
        config: A `HybridLMConfig`.

    Raises:
        ValueError: The first thing that is wrong; the message starts with its path.
    """
    config.norm = resolve_norm(config.norm, "norm")
    config.residual = resolve_part(config.residual, RESIDUALS, "residual")
    specs = {}
    with torch.device("meta"):
        config.spans = [_resolve_span(number, spec, config) for number, spec in enumerate(config.spans)]
        span_places(config)
        build_part(config.residual, RESIDUALS, "residual", config.hidden_size)
        build_part(config.norm, NORMS, "norm", config.hidden_size)
        for recipe, spec in config.layer_specs.items():
            specs[recipe] = _resolve_recipe(recipe, spec, config.hidden_size)
    config.layer_specs = specs


def _resolve_recipe(recipe: str, spec: Any, hidden_size: int) -> dict:
    path = f"layer_specs.{recipe}"
    allowed = [*HALVES, "norm"]
    if not isinstance(spec, dict):
        raise ValueError(f"{path}: expected a dictionary with {allowed}, got {spec!r}")
    for key in spec:
        if key not in allowed:
            raise ValueError(f"{path}: unknown key {key!r}, expected one of {allowed}")
    if all(spec.get(half) is None for half in HALVES):
        raise ValueError(f"{path}: needs a mixer or a channel_mixer")
    resolved: dict[str, Any] = {}
    for half, registry in HALVES.items():
        entry = spec.get(half)
        if entry is not None:
            entry = resolve_part(entry, registry, f"{path}.{half}")
            entry = _fill_derived(entry, build_part(entry, registry, f"{path}.{half}", hidden_size))
        resolved[half] = entry
    if spec.get("norm") is not None:
        resolved["norm"] = resolve_norm(spec["norm"], f"{path}.norm")
        build_part(resolved["norm"], NORMS, f"{path}.norm", hidden_size)
    return resolved


def _resolve_span(number: int, spec: Any, config: Any) -> dict:
    """Check one entry of `spans` and write out its options."""
    path, depth = f"spans.{number}", config.num_hidden_layers
    resolved = resolve_part(spec, SPANS, path, extra=SPAN_KEYS)
    start, stop, every = (resolved[key] for key in SPAN_KEYS)
    for key in SPAN_KEYS:
        if resolved[key] is not None and not _fits(resolved[key], int):
            raise ValueError(f"{path}.{key}: expected a whole number, got {resolved[key]!r}")
    if start is None:
        raise ValueError(f"{path}.start: is needed, the first layer of the span")
    stop = resolved["stop"] = start + 1 if stop is None else stop
    if not 0 <= start < depth:
        raise ValueError(f"{path}.start: {start} is not a layer, expected 0 to {depth - 1}")
    if not start < stop <= depth:
        raise ValueError(f"{path}.stop: {stop}, expected {start + 1} to num_hidden_layers={depth}")
    if every is not None and every < stop - start:
        raise ValueError(f"{path}.every: {every} repeats a span of {stop - start} layers into itself")
    part = build_part(resolved, SPANS, path, config.hidden_size)
    return _fill_derived(resolved, part) | {key: resolved[key] for key in SPAN_KEYS}


def span_places(config: Any) -> list[tuple[int, int, int, int | None]]:
    """Where the spans of a resolved config stand, repetitions written out, each after the span around it.

    Returns:
        Tuples (entry of `config.spans`, first layer, layer after the last, number of the tuple around it or `None`).

    Raises:
        ValueError: Two spans cross.
    """
    places = []
    for number, spec in enumerate(config.spans):
        start, stop = spec["start"], spec["stop"]
        step = spec["every"] or config.num_hidden_layers
        for shift in range(0, config.num_hidden_layers - stop + 1, step):
            places.append((start + shift, -(stop + shift), number))
    nested: list[tuple[int, int, int, int | None]] = []
    for start, minus_stop, number in sorted(places):
        stop, parent = -minus_stop, None
        for other, (entry, low, high, _) in enumerate(nested):
            if low <= start and stop <= high:
                parent = other
            elif start < high and low < stop:
                raise ValueError(
                    f"spans.{number}: layers {start} to {stop - 1} cross spans.{entry}, layers {low} to {high - 1}; "
                    "spans may be disjoint or one inside the other"
                )
        nested.append((number, start, stop, parent))
    return nested
