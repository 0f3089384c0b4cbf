"""Ship the model's own code with its weights, so that it loads where hybridlm is not installed.

The modeling folder is flat and imports only torch and transformers, so that shipping is copying. A part that was
registered at run time brings its own file, and a line in the copied registry.
"""

import ast
import inspect
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .registry import CHANNEL_MIXERS, MIXERS, NORMS, POSITIONS, RESIDUALS, SPANS

logger = logging.get_logger(__name__)

AUTO_CLASSES = {
    "AutoModel": "HybridLMModel",
    "AutoModelForCausalLM": "HybridLMForCausalLM",
    "AutoModelForSequenceClassification": "HybridLMForSequenceClassification",
    "AutoModelForTokenClassification": "HybridLMForTokenClassification",
    "AutoModelForQuestionAnswering": "HybridLMForQuestionAnswering",
}


def auto_map() -> dict[str, str]:
    """The `auto_map` entry of a config.json that ships the code."""
    models = {auto: f"modeling_hybridlm.{name}" for auto, name in AUTO_CLASSES.items()}
    return {"AutoConfig": "configuration_hybridlm.HybridLMConfig", **models}


def ship_code(folder: str | Path, parts: dict[str, dict[str, type]]) -> list[str]:
    """Copy the modeling files, and those of parts registered at run time, into a model folder.

    Args:
        folder: The model folder.
        parts: Registry name to the parts in use that do not live in the modeling folder, by their config names.

    Returns:
        Reasons why a part's code could not be shipped; empty when the folder is complete. They are logged too.
    """
    home, folder, reasons = Path(__file__).parent, Path(folder), []
    for path in sorted(home.glob("*.py")):
        if path.name != "__init__.py" and path.parent.resolve() != folder.resolve():
            shutil.copyfile(path, folder / path.name)
    lines: list[str] = []
    shipped: dict[str, Path] = {}
    for registry, classes in parts.items():
        for name, part in classes.items():
            reason = _why_not(part, home, shipped)
            if reason is None:
                source = Path(inspect.getsourcefile(part))
                shipped[source.name] = source
                shutil.copyfile(source, folder / source.name)
                lines += [
                    f"from .{source.stem} import {part.__name__}  # noqa: E402",
                    f'{registry}["{name}"] = {part.__name__}',
                ]
            else:
                reasons.append(f"{registry}[{name!r}]: {reason}; register it again before this folder is loaded")
    if lines:
        with (folder / "registry.py").open("a") as file:
            file.write("\n" + "\n".join(lines) + "\n")
    for reason in reasons:
        logger.warning(f"code not shipped: {reason}")
    return reasons


def _why_not(part: type, home: Path, shipped: dict[str, Path]) -> str | None:
    """Why the file of a part cannot travel, or `None`; `shipped` are the files that already do, by name."""
    if part.__module__ == "__main__":
        return "it is defined in __main__, move it into a file"
    try:
        source = Path(inspect.getsourcefile(part) or "")
    except TypeError:
        source = Path()
    if not source.is_file():
        return "its source cannot be found"
    if getattr(sys.modules.get(part.__module__), part.__name__, None) is not part:
        return f"the class {part.__name__} is not at the top of its file"
    if (home / source.name).exists():
        return f"its file is called {source.name}, as one of the modeling files"
    if shipped.get(source.name, source) != source:
        return f"its file is called {source.name}, as that of another part"
    package = __name__.split(".")[0]
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            if node.level:
                return (
                    f"its file imports {'.' * node.level}{node.module or ''}, a neighbour that does not travel with it"
                )
            names = [node.module]
        if any(name.split(".")[0] == package for name in names):
            return (
                f"its file imports the package {package!r} (line {node.lineno}), which is missing where code is remote"
            )
    return None


def foreign_parts(config: Any) -> dict[str, dict[str, type]]:
    """Parts in use that were registered at run time, by registry and config name.

    Args:
        config: A config whose parts are resolved.
    """
    package = __name__.rpartition(".")[0]
    found: dict[str, dict[str, type]] = {}
    for registry, name, part in _parts_of(config):
        if part.__module__.rpartition(".")[0] != package:
            found.setdefault(registry, {})[name] = part
    return found


def _parts_of(config: Any) -> Iterator[tuple[str, str, type]]:
    """Registry, name and class of every part in use."""
    specs = [("NORMS", NORMS, config.norm), ("RESIDUALS", RESIDUALS, config.residual)]
    specs += [("SPANS", SPANS, span) for span in config.spans]
    for recipe in config.layer_specs.values():
        mixer = recipe["mixer"]
        specs += [("MIXERS", MIXERS, mixer), ("CHANNEL_MIXERS", CHANNEL_MIXERS, recipe["channel_mixer"])]
        specs += [("NORMS", NORMS, recipe.get("norm")), ("POSITIONS", POSITIONS, (mixer or {}).get("position"))]
    for registry, classes, spec in specs:
        if spec is not None:
            yield registry, spec["name"], classes[spec["name"]]
