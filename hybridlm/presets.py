"""Find the data that travels with the package: model configs, run files, and what later issues add.

The files live once, in the repository. A wheel carries them as `hybridlm/_data/`; a checkout, or `pip install -e`,
uses the repository's own folders. `data_path` is the only place that knows.
"""

import contextlib
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .modeling.configuration_hybridlm import HybridLMConfig

_PACKAGE = Path(__file__).resolve().parent


def data_path(*parts: str) -> Path:
    """The packaged copy of a data file or folder, or the repository's.

    Args:
        *parts: Path below the repository root, e.g. `"configs", "models"`.

    Raises:
        FileNotFoundError: If neither place has it.
    """
    roots = [_PACKAGE / "_data"]
    if (_PACKAGE.parent / "pyproject.toml").is_file():  # a checkout, not some folder beside an installed package
        roots.append(_PACKAGE.parent)
    for root in roots:
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise FileNotFoundError(f"{'/'.join(parts)}: not among the data of this hybridlm installation")


def preset_names() -> list[str]:
    """The names of the model configs that come with the package, `tiny_*` ones last."""
    names = sorted(path.stem for path in data_path("configs", "models").glob("*.json"))
    return sorted(names, key=lambda name: name.startswith("tiny_"))


def find_config(name_or_path: str | Path) -> Path:
    """The `config.json` that a user means: the name of a preset (`-` and `_` are the same), a file, or a folder.

    Raises:
        FileNotFoundError: With the nearest preset names.
    """
    path = Path(name_or_path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return path / "config.json"
        raise FileNotFoundError(f"{path}: the folder has no config.json")
    if path.is_file():
        return path
    return _named("configs/models", str(name_or_path), ".json", "model config")


def find_run(name_or_path: str | Path) -> Path:
    """The run file that a user means: the name of one that comes with the package, or a path.

    Raises:
        FileNotFoundError: With the nearest names.
    """
    path = Path(name_or_path)
    return path if path.is_file() else _named("configs/runs", str(name_or_path), ".yaml", "run file")


def find_race(name_or_path: str | Path) -> Path:
    """The race file that a user means: the name of one that comes with the package, or a path.

    Raises:
        FileNotFoundError: With the nearest names.
    """
    path = Path(name_or_path)
    return path if path.is_file() else _named("configs/races", str(name_or_path), ".yaml", "race")


def load_config(name_or_path: str | Path) -> "HybridLMConfig":
    """Load a preset, a `config.json`, or a model folder's config.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If the file is not a hybridlm config.
    """
    path = find_config(name_or_path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict) or fields.get("model_type") != "hybridlm":
        found = fields.get("model_type") if isinstance(fields, dict) else None
        hint = "; `hybridlm import` reads native folders" if found else ""
        raise ValueError(f"{path}: model_type is {found!r}, expected 'hybridlm'{hint}")
    from .modeling.configuration_hybridlm import HybridLMConfig

    return HybridLMConfig.from_dict(fields)


def resolve(path: str | Path) -> None:
    """Rewrite a config file in the form that the Hub stores, with every option written out.

    Args:
        path: A `config.json`, short or complete.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: The first thing that is wrong with it.
    """
    path = Path(path)
    path.write_text(resolved_text(path), encoding="utf-8")


def resolved_text(path: str | Path) -> str:
    """What `resolve` would write: the text of `save_pretrained`, without the version of transformers."""
    from .modeling.registry import resolve_config

    config = load_config(path)
    resolve_config(config)
    fields = json.loads(config.to_json_string())
    fields.pop("transformers_version", None)
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _named(folder: str, name: str, suffix: str, what: str) -> Path:
    wanted = name.removesuffix(suffix).replace("-", "_")
    paths = {}
    with contextlib.suppress(FileNotFoundError):  # no such folder: nothing of that name either
        paths = {path.stem: path for path in sorted(data_path(*folder.split("/")).glob(f"*{suffix}"))}
    if wanted in paths:
        return paths[wanted]
    near = difflib.get_close_matches(wanted, paths, n=5)
    if near:
        hint = f"did you mean one of {near}?"
    else:
        hint = "see `hybridlm list`" if what == "model config" else f"the package has {list(paths)}"
    raise FileNotFoundError(f"{name}: no such {what}, file or folder; {hint}")
