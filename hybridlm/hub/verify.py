"""Hold a model folder to what it says of itself: hashes, golden logits, and every number on its card."""

import json
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hybridlm.evaluation.loading import TOKENIZER_FILES, file_hash
from hybridlm.testing.base import NotApplicable
from hybridlm.testing.workers import POOL

from .card_text import check_metadata, split_card, unbacked_metadata
from .cards import CONFIG, LEDGER, PLAN, RESULTS, TRAINING, Bundle, kind_of, render_card, template_hash, template_text
from .describe import plan_record
from .figures import CardError, derive, has_digit, read_json, unbacked
from .folder import check_sources
from .golden import GOLDEN, Golden, read_golden, wrong_hashes
from .safety import unsafe_files

TIMEOUT = 600.0


def verify(folder: str | Path, *, dtype: str = "float32", run: bool = True) -> list[str]:
    """What is wrong with a folder.

    Files that could run code are looked for first; only a folder without any is loaded, by the code that it ships, in a
    process of its own which cannot import hybridlm.

    Args:
        folder: The model folder.
        dtype: What the golden logits are compared in: `float32`, `bfloat16` or `float16`.
        run: Whether to load it.

    Returns:
        Reasons, none if all is well.

    Raises:
        FileNotFoundError: There is no such folder, or no config in it.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no model folder, it has no config.json")
    problems = list(unsafe_files(folder))
    if problems:
        return problems
    problems = list(card_problems(folder))
    try:
        golden = read_golden(folder)
    except (FileNotFoundError, ValueError) as error:
        return [*problems, str(error)]
    problems += wrong_hashes(folder, golden)
    return problems + (load_problems(folder, golden, dtype) if run else [])


def load_problems(folder: Path, golden: Golden, dtype: str = "float32") -> list[str]:
    """Load the folder as a user would, and compare logits."""
    if dtype not in golden.tolerance:
        raise ValueError(f"dtype: {dtype!r} has no tolerance, expected one of {sorted(golden.tolerance)}")
    worker = POOL.worker("remote", "hybridlm")
    try:
        # under a name of its own: a process that has loaded the code of one folder keeps it for the next of that name
        with tempfile.TemporaryDirectory() as place:
            link = Path(place) / f"verified_{uuid.uuid4().hex}"
            link.symlink_to(folder.resolve(), target_is_directory=True)
            worker.start("remote", str(link), golden.input_ids, dtype)
            logits, _, module = worker.finish(TIMEOUT)
    except (NotApplicable, RuntimeError, TimeoutError) as error:
        return [f"it does not load where hybridlm is not installed: {error}"]
    problems = []
    if "auto_map" in read_json(folder / CONFIG) and not module.startswith("transformers_modules."):
        problems.append(f"it was not loaded by its own code, but by {module}")
    difference, tolerance = golden.difference(logits[0]), golden.tolerance[dtype]
    if not difference <= tolerance:
        problems.append(
            f"{GOLDEN}: the logits differ by {difference:.1e} of their scale, more than {tolerance:.0e} in {dtype}"
        )
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        try:
            AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            problems.append(f"the tokenizer does not load: {error}")
    return problems


def card_problems(folder: Path) -> Iterator[str]:
    """What the card says that the stored files do not."""
    try:
        yield from _card_problems(folder)
    except (ValueError, OSError) as error:  # CardError is a ValueError
        yield str(error)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        yield f"{LEDGER}, or a file that it names, is not as `hybridlm card` writes it: {reason}"


def _card_problems(folder: Path) -> Iterator[str]:
    if not (folder / "README.md").is_file():
        yield "README.md: missing; `hybridlm card FOLDER` writes it"
        return
    if not (folder / LEDGER).is_file():
        yield f"{LEDGER}: missing, so no number of README.md has a source; `hybridlm card FOLDER` writes it"
        return
    ledger = read_json(folder / LEDGER)
    bundle = Bundle(ledger["name"], {}, ledger["has_tokenizer"], ledger["has_curve"])
    missing = False
    for file in ledger["files"]:
        path = folder / file["path"]
        if Path(file["path"]).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
            raise CardError(f"{LEDGER}: {file['path']} lies outside of the folder")
        if not path.is_file():
            missing = True
            yield f"{file['path']}: missing, and the card's numbers come from it"
        elif (digest := file_hash(path)) != file["sha"]:
            yield f"{file['path']}: its hash {digest[:12]} is not {file['sha'][:12]}, which the card names"
        if path.is_file() and file["path"] != GOLDEN:
            bundle.files[file["path"]] = path.read_bytes()
        else:
            bundle.hashes[file["path"]] = file["sha"]
    for path in sorted((folder / RESULTS).glob("*.json")):
        if kind_of(read_json(path)) != "card" and f"{RESULTS}/{path.name}" not in bundle.files:
            yield f"{RESULTS}/{path.name}: no file that the card names; `hybridlm card FOLDER` adds it"
    yield from _figure_problems(folder, ledger, bundle)
    if not missing:
        yield from _source_problems(folder, ledger, bundle)


def _figure_problems(folder: Path, ledger: dict[str, Any], bundle: Bundle) -> Iterator[str]:
    """Derive every figure again, and read the card with them."""
    sources = {path: source.data for path, source in bundle.sources().items()} | {LEDGER: ledger}
    for value, form, file, pointer in [*ledger["figures"], *ledger["metadata"].values()]:
        if file not in sources:
            continue  # it is missing, which was said
        found = derive(sources[file], form, pointer, file)
        if found != value:
            yield f"{file}#{pointer}: gives {found!r}, and {LEDGER} says {value!r}"
    text = (folder / "README.md").read_text(encoding="utf-8")
    header, body = split_card(text)
    yield from (f"README.md: {problem}" for problem in unbacked_metadata(header, ledger["metadata"]))
    figures = [(value, f"{file}#{pointer}") for value, _, file, pointer in ledger["figures"] if has_digit(value)]
    problem = unbacked(body, figures, first_line=text[: -len(body)].count("\n") + 1)
    if problem is not None:
        yield f"README.md: {problem}"
    check_metadata(text)


def _source_problems(folder: Path, ledger: dict[str, Any], bundle: Bundle) -> Iterator[str]:
    """Hold the stored files against the model, and the list of figures against what the template prints."""
    check_sources(bundle.files, folder)
    if PLAN in bundle.files:
        training = json.loads(bundle.files[TRAINING]) if TRAINING in bundle.files else None
        planned = plan_record(json.loads(bundle.files[CONFIG]), training["data"]["length"] if training else None)
        if json.loads(json.dumps(planned)) != json.loads(bundle.files[PLAN]):
            yield f"{PLAN}: is not what the planner says of config.json"
    template = template_text()
    if template_hash(template) == ledger["template"]:
        again = render_card(bundle).ledger
        for key in ("figures", "metadata"):
            if json.loads(json.dumps(again[key])) != ledger[key]:
                yield f"{LEDGER}: its {key} are not those that a card of these files has"
