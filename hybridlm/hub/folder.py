"""Make a model folder ready to be published: pruned code, golden logits, result files and the card."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hybridlm import presets
from hybridlm.evaluation.loading import MODEL_FILES, TOKENIZER_FILES, file_hash, folder_hash
from hybridlm.evaluation.runner import write_whole

from .cards import CONFIG, CURVE, FACTS, LEDGER, PLAN, RESULTS, RUN_FILE, TRAINING, Bundle, Card, dump, kind_of
from .cards import render_card as render
from .describe import plan_record
from .facts import check_facts, facts_of_config, load_facts
from .figures import CardError, read_json
from .folders import read_config
from .golden import GOLDEN, weight_files, write_golden
from .prune import prune_code

SHOWN = ("eval", "check", "race", "training")  # kinds of results that a card shows
OWN_FILES = (FACTS, PLAN, LEDGER)


def result_files(places: Sequence[str | Path]) -> dict[str, bytes]:
    """Result files in folders, or named, by the path that they get in the model folder.

    Raises:
        FileNotFoundError: A place does not exist, or holds no results.
        CardError: Two of one name, or a file that is named is no result.
    """
    found: dict[str, bytes] = {}
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"--results: {place} does not exist")
        paths = [place] if place.is_file() else sorted(place.glob("*.json"))
        kinds = {path: kind_of(read_json(path)) for path in paths}
        chosen = [path for path, kind in kinds.items() if kind in SHOWN]
        if not chosen:
            raise FileNotFoundError(f"--results: {place} holds no results of {', '.join(SHOWN)}")
        for path in chosen:
            name = TRAINING if kinds[path] == "training" else f"{RESULTS}/{path.name}"
            if name in OWN_FILES:
                raise CardError(f"--results: {path}: a file of this name is written with the card; rename it")
            data = path.read_bytes()
            if found.setdefault(name, data) != data:
                raise CardError(f"--results: two files would become {name}; rename one")
    return found


def build_bundle(
    source: str | Path, results: Sequence[str | Path] = (), facts: str | None = None, name: str | None = None
) -> Bundle:
    """All that a card of a folder or a preset is rendered from.

    Args:
        source: A model folder, or the name of a preset.
        results: Folders or files of results; those in the folder already are kept.
        facts: Name or file of the facts; by default those that the folder has, then those of the preset it equals.
        name: What the card calls the model; by default as before, or the name of the folder.

    Raises:
        FileNotFoundError, ValueError: Something is missing, or is of another model.
    """
    folder = Path(source)
    is_folder = folder.is_dir()
    config_path = folder / CONFIG if is_folder else presets.find_config(source)
    config = read_config(folder) if is_folder else json.loads(config_path.read_text(encoding="utf-8"))
    files = {CONFIG: config_path.read_bytes()}
    stored = _stored(folder) if is_folder else {}
    files |= {path: data for path, data in stored.items() if path not in OWN_FILES}
    given = result_files(results)
    for path, data in given.items() if is_folder else ():
        _check_name_of(path, data, {folder.resolve().name, name})
    files |= given
    training = json.loads(files[TRAINING]) if TRAINING in files else None
    if facts is None and FACTS in stored:
        files[FACTS] = stored[FACTS]
    else:
        files[FACTS] = dump({"kind": "facts", **load_facts(facts or facts_of_config(config))})
    planned = plan_record(config, training["data"]["length"] if training else None)
    if planned is not None:
        files[PLAN] = dump(planned)
    if name is None and is_folder and (folder / LEDGER).is_file():
        name = read_json(folder / LEDGER).get("name")
    default = folder.resolve().name if is_folder else config_path.stem
    bundle = Bundle(name or (training or {}).get("name") or default, files)
    if is_folder:
        bundle.has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
        bundle.has_curve = (folder / CURVE).is_file()
        if (folder / GOLDEN).is_file():
            bundle.hashes[GOLDEN] = file_hash(folder / GOLDEN)
        check_sources(files, folder)
    return bundle


def _check_name_of(path: str, data: bytes, names: set[str | None]) -> None:
    """Refuse a check report that says that it is of another model; it has no hash that could be compared."""
    content = json.loads(data)
    if kind_of(content) == "check":
        for report in content["models"]:
            if Path(report["model"]).name not in names:
                raise CardError(
                    f"{path}: a check of {report['model']!r}, expected one of {sorted(filter(None, names))}; run "
                    "`hybridlm check` on this folder"
                )


def _stored(folder: Path) -> dict[str, bytes]:
    """Result files and the run file that the folder holds already."""
    found = {RUN_FILE: (folder / RUN_FILE).read_bytes()} if (folder / RUN_FILE).is_file() else {}
    for path in sorted((folder / RESULTS).glob("*.json")):
        if kind_of(read_json(path)) in (*SHOWN, "facts"):
            found[f"{RESULTS}/{path.name}"] = path.read_bytes()
    return found


def check_sources(files: dict[str, bytes], folder: Path) -> None:
    """Refuse results that say that they are of other weights, and facts that hold numbers.

    Args:
        files: Content by path.
        folder: The model folder; its weights are read once, and only if there are results to compare them with.

    Raises:
        ValueError: They are, or do.
    """
    digest = ""
    for path, data in files.items():
        content = json.loads(data) if path.endswith(".json") else {}
        kind = kind_of(content)
        if kind == "facts":
            check_facts({key: value for key, value in content.items() if key not in ("kind", "tiny")}, path)
        elif kind == "eval":
            digest = digest or folder_hash(folder, MODEL_FILES)
            found = content["model"]["hash"]
            if found != digest:
                raise CardError(
                    f"{path}: of a model with the hash {found[:12]}, and {folder} has {digest[:12]}; "
                    "run `hybridlm eval` on this folder"
                )
        elif kind == "check" and len(content["models"]) != 1:
            raise CardError(f"{path}: holds {len(content['models'])} models, expected a check of this one")


def prepare(
    folder: str | Path,
    results: Sequence[str | Path] = (),
    *,
    facts: str | None = None,
    name: str | None = None,
    model: Any = None,
) -> list[str]:
    """Prune the code of a model folder, store golden logits, result files and the card. It may be done again.

    Args:
        folder: What `save_pretrained` wrote.
        results: As for `build_bundle`.
        facts: As for `build_bundle`.
        name: As for `build_bundle`.
        model: The model in the folder, if it is at hand in float32 on the CPU.

    Returns:
        Names of the code files that were removed.

    Raises:
        FileNotFoundError, ValueError: Something is missing, of another model, or a number would have no source.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not weight_files(folder):
        raise FileNotFoundError(f"{folder}: no weights (*.safetensors); a config alone cannot be published")
    bundle = build_bundle(folder, results, facts, name)  # before anything is changed
    removed = prune_code(folder, config)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    write_golden(folder, model)
    bundle.hashes[GOLDEN] = file_hash(folder / GOLDEN)
    write_card(folder, bundle, render(bundle))
    return removed


def write_card(folder: Path, bundle: Bundle, card: Card) -> None:
    """Write a card, what it was rendered from and the list of its figures."""
    (folder / RESULTS).mkdir(exist_ok=True)
    for path, data in bundle.files.items():
        if path != CONFIG:
            (folder / path).write_bytes(data)
    write_whole(folder / LEDGER, dump(card.ledger).decode())
    write_whole(folder / "README.md", card.text)


def remove_card(folder: Path) -> None:
    """Remove what an earlier run left in a folder that will be written anew."""
    for place in (folder / RESULTS, folder / Path(GOLDEN).parent):
        if place.is_dir():
            shutil.rmtree(place)
