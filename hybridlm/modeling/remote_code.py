"""Ship the model's own code with its weights, so that it loads where hybridlm is not installed.

The modeling folder is flat and imports only torch and transformers, so that shipping is copying. A part that was
registered at run time brings its own file, and a line in the copied registry.
"""

import inspect
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.utils import logging

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
    lines = []
    for registry, classes in parts.items():
        for name, part in classes.items():
            reason = _why_not(part, home)
            if reason is None:
                source = Path(inspect.getsourcefile(part))
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


def _why_not(part: type, home: Path) -> str | None:
    """Why the file of a part cannot travel, or `None`."""
    if part.__module__ == "__main__":
        return "it is defined in __main__, move it into a file"
    try:
        source = Path(inspect.getsourcefile(part) or "")
    except TypeError:
        return "its source cannot be found"
    if not source.is_file():
        return "its source cannot be found"
    if (home / source.name).exists():
        return f"its file is called {source.name}, as one of the modeling files"
    package = _own_package()
    for line in source.read_text().splitlines():
        words = line.split()
        if words[:1] in (["from"], ["import"]) and len(words) > 1 and words[1].split(".")[0] == package:
            return f"its file imports the package {package!r} (`{line.strip()}`), which is missing where code is remote"
    return None


def _own_package() -> str:
    return __name__.split(".")[0]


def foreign_parts(config: Any, registry: ModuleType | Any) -> dict[str, dict[str, type]]:
    """Parts in use that were registered at run time, by registry and config name."""
    package = __name__.rpartition(".")[0]
    found: dict[str, dict[str, type]] = {}
    used = {"MIXERS": ("mixer", registry["mixer"]), "CHANNEL_MIXERS": ("channel_mixer", registry["channel_mixer"])}
    for name, (half, classes) in used.items():
        for spec in config.layer_specs.values():
            part = classes[spec[half]["name"]] if spec.get(half) else None
            if part is not None and part.__module__.rpartition(".")[0] != package:
                found.setdefault(name, {})[spec[half]["name"]] = part
    return found
