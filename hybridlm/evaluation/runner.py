"""Run a suite on a model, so that it can be killed at any moment and goes on where it was.

The unit is a cell: one task at one length. A finished cell is a file, written under another name and renamed; its name
holds a hash of all that it depends on, so that cells of other models or settings are never taken for it, nor lost. The
results of a run are the cells of its plan in one file.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from .cells import score_bits, score_own, score_text
from .documents import DoesNotFit
from .haystack import haystack_hash
from .length import read_texts
from .loading import Evaluated, check_generates, own_task, versions
from .suites import BITS, check_suite, choose_lengths, choose_window_lengths, longest_allowed, text_tasks

SCORED, NO_ROOM = "scored", "does not fit"
FORMAT = 1
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Attributes:
        suite: One of `SUITES`.
        lengths: In tokens; `None` for some that the model was trained for.
        beyond: How many times the trained length is allowed.
        samples: Documents a cell.
        generated: Of these, how many are also answered by generating; 0 for none.
        seed: Of the documents.
        haystack: What needles are hidden in; `None` for what each task takes by default.
        questions: JSON lines for RULER's questions.
        text: File or folder for bits per byte; `None` for the standard library.
        batch_tokens: Tokens that go through the model together.
    """

    suite: str = "all"
    lengths: tuple[int, ...] | None = None
    beyond: int = 1
    samples: int = 32
    generated: int = 8
    seed: int = 0
    haystack: str | None = None
    questions: str | None = None
    text: str | None = None
    batch_tokens: int = 8192

    def check(self) -> None:
        """Raise `ValueError` for what cannot be run with any model."""
        check_suite(self.suite)
        for name, value, least in (("samples", self.samples, 2), ("seed", self.seed, 0)):
            if value < least:
                raise ValueError(f"--{name}: {value} must be at least {least}")
        if not 0 <= self.generated <= self.samples:
            raise ValueError(f"--generated: {self.generated} must lie between 0 and --samples, {self.samples}")
        for name, path in (("questions", self.questions), ("text", self.text)):
            if path is not None and not Path(path).exists():
                raise ValueError(f"--{name}: {path} does not exist")


@dataclass(frozen=True)
class Cell:
    """One task at one length.

    Attributes:
        task: Its name.
        suite: Its suite.
        length: In tokens.
        score: Computes it.
    """

    task: str
    suite: str
    length: int
    score: Callable[[], dict[str, Any]]


def plan_cells(found: Evaluated, settings: Settings) -> tuple[list[Cell], list[str]]:
    """The cells of a run, and what is left out and why.

    Raises:
        ValueError: The tokenizer is missing, or a length is not allowed.
    """
    suite, own, skipped = settings.suite, own_task(found.folder), []
    cells: list[Cell] = []
    if own is not None and suite in ("recall", "all"):
        if settings.lengths is not None and found.tokenizer is None:
            raise ValueError(
                f"--lengths: {found.folder} has a task of its own, scored at 1, 2 and 4 times the length in its "
                "task.json, and no tokenizer for other tasks; leave it out"
            )
        most = longest_allowed(found, settings.beyond)
        lengths = [own["length"] * by for by in (1, 2, 4) if most is None or own["length"] * by <= most]
        for length in lengths:
            cells.append(Cell(f"own_{own['task']}", "recall", length, partial(score_own, found, own, length, settings)))
    if found.tokenizer is None:
        if not cells:
            raise ValueError(
                f"tokenizer: {found.folder} has none (tokenizer.json); save the model's tokenizer into the folder, or, "
                "for a model of a synthetic task, its task.json, which suite 'recall' runs without a tokenizer"
            )
        return cells, [f"all other tasks of suite {suite!r}: the folder has no tokenizer"]
    _check_vocabulary(found)
    tasks = text_tasks(suite, haystack=settings.haystack, questions=settings.questions)
    if tasks:
        for length in choose_lengths(found, settings.lengths, settings.beyond):
            for task in tasks.values():
                cells.append(Cell(task.name, task.suite, length, partial(score_text, found, task, length, settings)))
    if suite in ("ruler", "all") and settings.questions is None:
        skipped.append("questions: no local data; --questions FILE gives JSON lines of question, answers, paragraphs")
    if suite in ("length", "all"):
        lengths = choose_window_lengths(found, settings.lengths if suite == "length" else None)
        texts = read_texts(settings.text)
        for length in lengths:
            score = partial(score_bits, found, texts, length, max(lengths), settings)
            cells.append(Cell(BITS, "length", length, score))
    return cells, skipped


def _check_vocabulary(found: Evaluated) -> None:
    largest = max(found.tokenizer.get_vocab().values())
    if largest >= found.vocab_size:
        raise ValueError(
            f"tokenizer: {found.folder} has token {largest}, but the model's vocabulary has {found.vocab_size} tokens"
        )


def evaluate(found: Evaluated, settings: Settings, out: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run a suite, or the rest of it, and write `SUITE.json`.

    Args:
        found: The model.
        settings: What to run.
        out: Folder for the results; cells go into `cells/`.
        progress: Called with a cell's name, its number and how many there are, before each.

    Returns:
        What the file holds.

    Raises:
        ValueError: The settings do not fit the model, or no cell fits its length.
        FileExistsError: The folder holds results of another run of this suite.
        OSError: The folder cannot be written to.
    """
    settings.check()
    if settings.generated:
        check_generates(found)
    cells, skipped = plan_cells(found, settings)
    common = _common(found, settings)
    out = writable_folder(out)
    path = out / f"{settings.suite}.json"
    _check_free(path, common)
    started, results = time.perf_counter(), []
    for number, cell in enumerate(cells):
        if progress is not None:
            progress(f"{cell.task} at {cell.length}", number, len(cells))
        results.append(_finish(cell, common, out / "cells"))
    if all(result["status"] == NO_ROOM for result in results):
        raise ValueError(f"--lengths: nothing fits; {results[0]['reason']}")
    seconds = round(time.perf_counter() - started, 3)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    whole = {"kind": "eval"} | common | {"cells": results, "skipped": skipped, "seconds": seconds, "date": date}
    write_whole(path, json.dumps(whole, indent=1) + "\n")
    return whole


def _common(found: Evaluated, settings: Settings) -> dict[str, Any]:
    """What all cells depend on."""
    said = asdict(settings)
    for name in ("questions", "text"):
        if said[name] is not None:  # by content: a path says nothing on another machine
            said[name] = Path(said[name]).name
            said[f"{name}_hash"] = _content_hash(Path(getattr(settings, name)))
    haystacks = {settings.haystack: haystack_hash(settings.haystack)} if settings.haystack else {}
    # through JSON, as it is read back: tuples become lists
    return json.loads(
        json.dumps(
            {
                "format": FORMAT,
                "model": found.to_dict(),
                "settings": said,
                "haystack_hash": haystacks,
                "versions": versions(),
            }
        )
    )


def _content_hash(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def earlier_results(path: Path) -> dict[str, Any] | None:
    """What a results file holds; `None` where there is none.

    Raises:
        FileExistsError: It is no results file, which must not be written over.
    """
    if not path.exists():
        return None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        before = None
    if not isinstance(before, dict):
        raise FileExistsError(f"--out: {path} is not a results file; choose another folder")
    return before


def _check_free(path: Path, common: dict[str, Any]) -> None:
    """Refuse to write over results of another model or other settings."""
    before = earlier_results(path)
    if before is None:
        return
    differing = [name for name in common if before.get(name) != common[name]]
    if differing:
        raise FileExistsError(
            f"--out: {path} holds results of another run, which differs in {' and '.join(differing)}; "
            "choose another folder"
        )


def cell_key(cell: Cell, common: dict[str, Any]) -> str:
    """Hash of all that a cell depends on; which other cells are run is no part of it."""
    settings = {name: value for name, value in common["settings"].items() if name not in ("suite", "lengths", "beyond")}
    said = [common | {"settings": settings}, cell.task, cell.suite, cell.length]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def _finish(cell: Cell, common: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The cell from its file, or computed and written."""
    path = folder / f"{cell.task}-{cell.length}-{cell_key(cell, common)}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    started = time.perf_counter()
    result: dict[str, Any] = {"task": cell.task, "suite": cell.suite, "length": cell.length}
    try:
        result |= {"status": SCORED, **cell.score()}
    except DoesNotFit as error:
        result |= {"status": NO_ROOM, "reason": str(error)}
    result["seconds"] = round(time.perf_counter() - started, 3)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result) + "\n")
    return result


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial_path.write_text(text, encoding="utf-8")
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


def writable_folder(out: str | Path) -> Path:
    """The folder, made if need be.

    Raises:
        OSError: It cannot be made or written to.
    """
    out = Path(out)
    probe = out / f".probe.{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out: {out} is no folder that can be written to: {error}") from error
    return out


def mean_scores(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int, float]]:
    """Suite, length and mean score by likelihood over the tasks that were scored."""
    groups: dict[tuple[str, int], list[float]] = {}
    for cell in results:
        if cell["status"] == SCORED and "likelihood" in cell:
            groups.setdefault((cell["suite"], cell["length"]), []).append(cell["likelihood"]["score"])
    for (suite, length), scores in groups.items():
        yield suite, length, fmean(scores)
