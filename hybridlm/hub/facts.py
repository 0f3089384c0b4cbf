"""Facts of a model: words for its card, one file for each model of the zoo in `hub_cards/facts`.

They are words alone. A measured number belongs into a result file, so a digit is refused here unless it is part of an
arXiv id, a year, or a name that the file lists.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import yaml

from hybridlm import presets

TINY = "tiny_"
GENERIC = "generic"  # of a model that is no preset
PAPER = re.compile(r"\d{4}\.\d{4,5}")
_YEAR = re.compile(r"(?:19|20)\d\d")
_NAME = re.compile(r"[A-Za-z][\w.-]*")
_WORD = re.compile(r"[^\s,;:()\"'`/]*\d[^\s,;:()\"'`/]*")
_FIELDS = {
    "description": str,
    "mechanism": str,
    "papers": list,
    "license": str | None,
    "intended_use": str,
    "limits": str,
    "base_model": str | None,
    "language": list,
    "data": str,
    "names": list,
}
_SHAPE = ("layer_specs", "layer_layout", "spans", "residual", "hidden_size")
_OPTIONAL = ("base_model", "language", "names", "license")


def facts_names() -> list[str]:
    """The facts files that come with the package."""
    return sorted(path.stem for path in presets.data_path("hub_cards", "facts").glob("*.yaml"))


def load_facts(name_or_path: str | Path) -> dict[str, Any]:
    """Facts of a preset (a tiny one has those of its model), or from a file.

    Raises:
        FileNotFoundError: There are none of that name.
        ValueError: The file does not say what a card needs, or holds a measured number.
    """
    path, name = Path(name_or_path), str(name_or_path).replace("-", "_")
    tiny = False
    if path.suffix not in (".yaml", ".yml"):
        tiny = name.startswith(TINY)
        folder = presets.data_path("hub_cards", "facts")
        path = folder / f"{name.removeprefix(TINY)}.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"facts: no {name!r} in {facts_names()}; name one of these, or a YAML file")
    elif not path.is_file():
        raise FileNotFoundError(f"facts: {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    facts = check_facts(content, str(path))
    return facts | {"tiny": tiny}


def check_facts(content: Any, where: str) -> dict[str, Any]:
    """Facts with every field.

    Raises:
        ValueError: A field is missing, unknown or of another type, or holds a number.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected keys and values")
    for key in content:
        if key not in _FIELDS:
            raise ValueError(f"{where}: {key}: unknown, expected one of {sorted(_FIELDS)}")
    facts: dict[str, Any] = {}
    for key, kind in _FIELDS.items():
        if key not in content and key not in _OPTIONAL:
            raise ValueError(f"{where}: {key}: missing")
        value = content.get(key, [] if kind is list else None)
        if not isinstance(value, kind) or (kind is list and not all(isinstance(item, str) for item in value)):
            raise ValueError(f"{where}: {key}: expected {'a list of texts' if kind is list else 'a text'}")
        facts[key] = " ".join(value.split()) if isinstance(value, str) else value
    for paper in facts["papers"]:
        if not PAPER.fullmatch(paper):
            raise ValueError(f"{where}: papers: {paper!r} is no arXiv id, expected as in '2312.00752'")
    for name in facts["names"]:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{where}: names: {name!r} does not begin with a letter")
    for key in _FIELDS.keys() - {"papers", "names"}:
        for text in facts[key] if isinstance(facts[key], list) else [facts[key] or ""]:
            _refuse_numbers(text, facts["names"], f"{where}: {key}", is_license=key == "license")
    return facts


def _refuse_numbers(text: str, names: list[str], where: str, is_license: bool) -> None:
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w%]|\.\d)", "", text)
    text = re.sub(rf"arXiv:{PAPER.pattern}", "", text)
    if is_license and re.fullmatch(r"[a-z][a-z0-9.-]*", text):
        return
    for word in _WORD.findall(text):
        if not _YEAR.fullmatch(word.strip(".")):
            raise ValueError(
                f"{where}: {word!r} holds a number; facts are words: measured numbers come from result files, and a "
                "name with digits is listed under `names`"
            )


def facts_of_config(config: dict[str, Any]) -> str:
    """Name of the facts that fit a config: those of the preset that it equals in its layers, or the generic ones."""
    shape = [config.get(part) for part in _SHAPE]
    return next(
        (name for name, preset in _configs().items() if [preset.get(part) for part in _SHAPE] == shape), GENERIC
    )


def is_preset_source(text: str | None) -> bool:
    """Whether a config's `extra.source` is that of a preset; any other text could claim anything."""
    return text is not None and text in {(config.get("extra") or {}).get("source") for config in _configs().values()}


@functools.cache
def _configs() -> dict[str, dict[str, Any]]:
    """The presets' configs by name."""
    paths = {name: presets.find_config(name) for name in presets.preset_names()}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}
