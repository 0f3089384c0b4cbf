"""Read a card again: its metadata, what of them has no source, and whether the Hub accepts them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from .figures import CardError, has_digit, pointer_of

_HEADER = re.compile(r"\A---\n(.*?)\n---\n(.*)\Z", re.DOTALL)


class _NoDuplicates(yaml.SafeLoader):
    """Refuse a key that stands twice: readers differ in which one they take."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} stands twice")
        return super().construct_mapping(node, deep)


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card.

    Raises:
        CardError: It has no metadata, or they are no YAML.
    """
    match = _HEADER.match(text)
    if match is None:
        raise CardError("README.md: no metadata between two lines of three dashes")
    try:
        header = yaml.load(match[1], Loader=_NoDuplicates)  # a SafeLoader
    except yaml.YAMLError as error:
        raise CardError(f"README.md: the metadata are no YAML: {error}") from error
    if not isinstance(header, dict):
        raise CardError("README.md: the metadata are no keys and values")
    return header, match[2]


def unbacked_metadata(header: dict[str, Any], metadata: Mapping[str, list]) -> Iterator[str]:
    """What the metadata say without a source, or fail to say."""
    left = dict(metadata)
    for path, leaf in leaves(header):
        place = pointer_of(path)
        if place in left:
            value, _, file, pointer = left.pop(place)
            if leaf != value or type(leaf) is not type(value):
                yield f"metadata {place}: {leaf!r} stands where {value!r} of {file}#{pointer} is expected"
        elif not isinstance(leaf, str | bool | None) or (isinstance(leaf, str) and has_digit(leaf)):
            yield f"metadata {place}: {leaf!r} has no source"
        elif any(has_digit(str(key)) for key in path if not isinstance(key, int)):
            yield f"metadata {place}: the key has no source"
    for place, (value, _, file, pointer) in left.items():
        yield f"metadata {place}: {value!r} of {file}#{pointer} is missing"


def check_metadata(text: str) -> None:
    """Hold the metadata against what huggingface_hub accepts.

    Raises:
        CardError: It does not accept them.
    """
    header = split_card(text)[0]
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
        results = model_index_to_eval_results(header["model-index"])[1] if "model-index" in header else []
    except (ValueError, KeyError, TypeError) as error:
        raise CardError(f"README.md: metadata that the Hub refuses: {error}") from error
    if len(results) != len(data.eval_results or []):
        raise CardError("README.md: model-index holds results that the Hub does not read")
    for name in ("library_name", "pipeline_tag"):
        if not getattr(data, name, None):
            raise CardError(f"README.md: metadata lack {name}")


def leaves(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value that is no container, with its path."""
    if isinstance(data, dict | list) and data:
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, key))
    else:
        yield path, data if not isinstance(data, dict | list) else None
