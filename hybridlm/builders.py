"""Write a stack of layers the way papers do: as a pattern string, or as Jamba's periods and offsets.

`config.json` always stores the explicit list; these functions expand the short forms into it.

    build_config(
        layer_specs={"ssm": {"mixer": {"name": "mamba2"}}, "attn": {"mixer": {"name": "attention"}}},
        layout="(MMM*)x6",
        symbols={"M": "ssm", "*": "attn"},
        hidden_size=256,
    )
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .modeling.configuration_hybridlm import HybridLMConfig

_RESERVED = "()x"
_MAX_LAYERS = 10_000


def expand_pattern(pattern: str, symbols: Mapping[str, str]) -> list[str]:
    """Expand a pattern such as `"(MMM*)x6"` into a list of recipe names.

    One character stands for one layer; `(...)` groups; `xN` repeats the layer or group before it N times; groups
    nest; blanks mean nothing.

    Args:
        pattern: The pattern.
        symbols: What each character stands for, e.g. `{"M": "ssm", "*": "attn"}`. The characters `(`, `)`, `x`,
            digits and blanks are taken.

    Raises:
        ValueError: With the position (from 0) of what cannot be read.
    """
    for symbol in symbols:
        if len(symbol) != 1 or symbol in _RESERVED or symbol.isdigit() or symbol.isspace():
            raise ValueError(f"symbols: {symbol!r} must be one character, not a digit, a blank or one of '(', ')', 'x'")
    open_groups: list[tuple[int, list[str]]] = [(0, [])]
    last: list[str] | None = None  # what an `x` would repeat; already part of the innermost open group
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character == "(":
            open_groups.append((position, []))
            last = None
        elif character == ")":
            if len(open_groups) == 1:
                raise _pattern_error(pattern, position, "')' closes nothing")
            start, last = open_groups.pop()
            if not last:
                raise _pattern_error(pattern, start, "the group is empty")
            open_groups[-1][1].extend(last)
        elif character == "x":
            if last is None:
                raise _pattern_error(pattern, position, "'x' must follow a layer or a group")
            digits = _digits(pattern, position + 1)
            if not digits or int(digits) == 0:
                raise _pattern_error(pattern, position, "'x' must be followed by a count of at least 1")
            if len(last) * int(digits) > _MAX_LAYERS:
                raise _pattern_error(pattern, position, f"more than {_MAX_LAYERS} layers")
            open_groups[-1][1].extend(last * (int(digits) - 1))
            last = None
            position += len(digits)
        elif character in symbols:
            last = [symbols[character]]
            open_groups[-1][1].extend(last)
        elif not character.isspace():
            raise _pattern_error(pattern, position, f"unknown {character!r}, expected one of {sorted(symbols)}")
        position += 1
    if len(open_groups) > 1:
        raise _pattern_error(pattern, open_groups[-1][0], "'(' is never closed")
    if not open_groups[0][1]:
        raise ValueError(f"pattern {pattern!r}: no layers")
    return open_groups[0][1]


def _digits(pattern: str, start: int) -> str:
    end = start
    while end < len(pattern) and pattern[end] in "0123456789":
        end += 1
    return pattern[start:end]


def _pattern_error(pattern: str, position: int, what: str) -> ValueError:
    return ValueError(f"pattern {pattern!r}, position {position}: {what}")


def jamba_layers(
    num_hidden_layers: int,
    *,
    mixer: Mapping[str, Any],
    attention: Mapping[str, Any],
    channel_mixer: Mapping[str, Any],
    experts: Mapping[str, Any] | None = None,
    attn_layer_period: int = 8,
    attn_layer_offset: int = 4,
    expert_layer_period: int = 2,
    expert_layer_offset: int = 1,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Expand Jamba's periods and offsets (Lieber et al. 2024, arXiv:2403.19887, section 3.1).

    Layer `i` attends when `i % attn_layer_period == attn_layer_offset`, and has experts when
    `i % expert_layer_period == expert_layer_offset`.

    Args:
        num_hidden_layers: Depth of the stack.
        mixer: The mixer of the other layers, e.g. `{"name": "mamba"}`.
        attention: The mixer of the attending layers.
        channel_mixer: The channel mixer of the dense layers.
        experts: The channel mixer of the expert layers; None leaves every layer dense.
        attn_layer_period: One attending layer in so many.
        attn_layer_offset: The first attending layer.
        expert_layer_period: One expert layer in so many.
        expert_layer_offset: The first expert layer.

    Returns:
        `layer_specs`, with those of the recipes `mixer`, `mixer_experts`, `attention` and `attention_experts` that
        occur, and `layer_layout`.
    """
    if num_hidden_layers < 1:
        raise ValueError(f"num_hidden_layers={num_hidden_layers} must be at least 1")
    _check_period("attn_layer", attn_layer_period, attn_layer_offset)
    _check_period("expert_layer", expert_layer_period, expert_layer_offset)
    specs: dict[str, dict[str, Any]] = {}
    layout = []
    for index in range(num_hidden_layers):
        attends = index % attn_layer_period == attn_layer_offset
        has_experts = experts is not None and index % expert_layer_period == expert_layer_offset
        token = attention if attends else mixer
        channel = experts if has_experts else channel_mixer
        name = ("attention" if attends else "mixer") + ("_experts" if has_experts else "")
        specs[name] = {"mixer": dict(token), "channel_mixer": dict(channel)}
        layout.append(name)
    return specs, layout


def _check_period(name: str, period: int, offset: int) -> None:
    if period < 1:
        raise ValueError(f"{name}_period={period} must be at least 1")
    if not 0 <= offset < period:
        raise ValueError(f"{name}_offset={offset} must lie in [0, {name}_period={period})")


def build_config(
    layer_specs: Mapping[str, Mapping[str, Any]],
    layout: str | Sequence[str],
    *,
    symbols: Mapping[str, str] | None = None,
    **fields: Any,
) -> "HybridLMConfig":
    """Make a config from recipes and a layout.

    Args:
        layer_specs: The recipes by name, as in `config.json`.
        layout: The name of the recipe at each depth, or a pattern string (see `expand_pattern`).
        symbols: What the characters of a pattern string stand for; by default each recipe whose name is one
            character stands for itself.
        **fields: Every other field of `HybridLMConfig`.

    Raises:
        ValueError: If the pattern cannot be read, names an unknown recipe, or contradicts `num_hidden_layers`.
    """
    from .modeling.configuration_hybridlm import HybridLMConfig

    if isinstance(layout, str):
        if symbols is None:
            symbols = {name: name for name in layer_specs if len(name) == 1}
        for symbol, name in symbols.items():
            if name not in layer_specs:
                raise ValueError(f"symbols[{symbol!r}]: unknown recipe {name!r}, expected one of {sorted(layer_specs)}")
        layout = expand_pattern(layout, symbols)
    elif symbols is not None:
        raise ValueError("symbols: only for a pattern string, and layout is a list of recipe names")
    depth = fields.pop("num_hidden_layers", len(layout))
    if depth != len(layout):
        raise ValueError(f"num_hidden_layers={depth} contradicts the layout, which has {len(layout)} layers")
    specs = {name: dict(spec) for name, spec in layer_specs.items()}
    return HybridLMConfig(layer_specs=specs, layer_layout=list(layout), num_hidden_layers=depth, **fields)
