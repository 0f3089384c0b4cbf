"""Make dataclasses out of what a YAML file holds, with errors that name the path of what does not fit."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file of keys and values.

    Raises:
        ValueError: The file holds something else, or a key twice.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        twice = next(_keys_twice(loader, node, "", set()), None)
        content = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if twice is not None:  # YAML would keep the last one
        raise ValueError(f"{path}: {twice}, expected once")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(content).__name__}")
    return content


def _keys_twice(loader: yaml.SafeLoader, node: yaml.Node | None, path: str, seen: set[int]) -> Iterator[str]:
    """Keys that are written twice in one place, as the beginning of an error; what `<<` merges may be given again."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            yield from _keys_twice(loader, item, f"{path}{place}.", seen)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
            yield from _keys_twice(loader, value, path, seen)
            continue
        name, line = str(loader.construct_object(key)), key.start_mark.line + 1
        if name in lines:
            yield f"{path}{name}: stands twice, in lines {lines[name]} and {line}"
        lines[name] = line
        yield from _keys_twice(loader, value, f"{path}{name}.", seen)


def build(kind: type, content: Any, path: str = "") -> Any:
    """Make a dataclass out of a dict.

    Args:
        kind: The dataclass; its annotations are types, unions, `list[...]`, `dict[str, ...]` and other dataclasses.
        content: Keys and values.
        path: Where `content` stands in its file.

    Raises:
        ValueError: With the path of what is unknown, missing or of the wrong type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, got {content!r}")
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for name in content:
        if name not in hints:
            raise ValueError(f"{prefix}{name}: unknown key{suggestion(str(name), hints)}")
    for item in fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in content:
            raise ValueError(f"{prefix}{item.name}: missing")
    return kind(**{name: convert(hints[name], value, prefix + name) for name, value in content.items()})


def convert(hint: Any, value: Any, path: str) -> Any:
    """The value as the annotation says; whole numbers serve as fractions, and nothing else is turned.

    Raises:
        ValueError: It is of another type.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            if isinstance(value, dict) or len(options) == 1:
                return build(option, value, path)
            continue
        origin, inside = typing.get_origin(option), typing.get_args(option)
        if origin is list and isinstance(value, list) and _all_fit(inside[0], value):
            return [convert(inside[0], item, f"{path}.{place}") for place, item in enumerate(value)]
        if origin is dict and isinstance(value, dict):
            return {str(name): convert(inside[1], item, f"{path}.{name}") for name, item in value.items()}
        if origin is not None:
            continue
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):  # no comparison would refuse NaN
                raise ValueError(f"{path}: {value}, expected a finite number")
            return float(value)
        if option is int and isinstance(value, bool):
            continue
        if option is Any or isinstance(value, option):
            return value
    raise ValueError(f"{path}: expected {type_names(options)}, got {value!r}")


def _all_fit(kind: Any, values: list) -> bool:
    """Whether a list of plain values is of one type; one of dataclasses says itself what is wrong, with its path."""
    return (
        dataclasses.is_dataclass(kind)
        or kind is Any
        or all(type(item) is kind or (kind is float and type(item) is int) for item in values)
    )


def type_names(options: Iterable[Any]) -> str:
    """The types in words."""
    names = [option.__name__ if type(option) is type else str(option) for option in options]
    return " or ".join(names).replace("NoneType", "null")


def suggestion(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, or all of them, as the rest of an error."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else f", expected one of {sorted(known)}"
