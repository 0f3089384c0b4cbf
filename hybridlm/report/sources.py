"""Find result files, read them, and tell what they are."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .node import Node

KINDS = ("eval", "race", "training", "check", "isoflop", "memory")
METRICS = "metrics.jsonl"
_MOST_DEPTH = 3  # folders below the one that was named
# parts of runs, whose results stand in the files beside them
_LEFT_OUT = ("cells", "runs", "checkpoint-", ".")


@dataclass(frozen=True)
class Source:
    """One result file.

    Attributes:
        number: How the page refers to it.
        name: Its path, from the folder or file that was named.
        kind: One of `KINDS`.
        data: What it holds.
        digest: SHA-256 of the file.
        date: When the results were made, or, where the file does not say, when it was written.
        versions: Of the packages that made it.
        records: Training records beside it, one a logged step.
        records_digest: SHA-256 of the file of records.
        copies: Name and SHA-256 of each file that holds the same.
    """

    number: int
    name: str
    kind: str
    data: Node
    digest: str
    date: str
    versions: dict[str, str]
    records: list[Node] = field(default_factory=list)
    records_digest: str = ""
    copies: list[tuple[str, str]] = field(default_factory=list)


def read_sources(runs: Sequence[str | Path]) -> tuple[list[Source], list[str]]:
    """Read what the report is made of.

    Args:
        runs: Folders, which are searched, and files.

    Returns:
        The sources in the order given, copies behind the first, and the names of JSON files in the folders that hold
        no results.

    Raises:
        ValueError: A file is broken, or of no kind that is known.
        OSError: Something does not exist or cannot be read, or nothing holds results.
    """
    sources: list[Source] = []
    ignored: list[str] = []
    seen: set[Path] = set()
    for run in map(Path, runs):
        if not run.exists():
            raise FileNotFoundError(f"{run}: no such file or folder")
        named = run.is_file()
        base = run.resolve().parent
        for path in [run] if named else sorted(_result_files(run, 0)):
            resolved = path.resolve()
            if resolved in seen:
                continue
            seen.add(resolved)
            name = path.name if named else str(resolved.relative_to(base))
            source = _read(path, name, len(sources) + 1, named)
            if source is None:
                ignored.append(name)
            else:
                _add(source, sources)
    if not sources:
        where = ", ".join(map(str, runs)) or "nothing"
        kinds = f"expected files of kind {', '.join(KINDS)}"
        raise FileNotFoundError(f"{where}: there are no results to report; {kinds}, or a folder with {METRICS}")
    return sources, ignored


def _add(source: Source, sources: list[Source]) -> None:
    """Append a source, or name it behind the one that holds the same; of these, one with records stands first."""
    for index, other in enumerate(sources):
        if _is_copy(source, other):
            first, second = (source, other) if source.records and not other.records else (other, source)
            copies = [*other.copies, (second.name, second.digest)]
            sources[index] = replace(first, number=other.number, copies=copies)
            return
    sources.append(source)


def _is_copy(one: Source, other: Source) -> bool:
    """Whether two files have equal content, or tell of one training run, of which a model's folder has the less."""
    if one.digest == other.digest:
        return True
    if not one.kind == other.kind == "training" or "training" not in one.data or "training" not in other.data:
        return False
    left, right = one.data.value, other.data.value
    shared = left.keys() & right.keys()
    return {name: left[name] for name in shared} == {name: right[name] for name in shared}


def _result_files(folder: Path, depth: int) -> Iterator[Path]:
    """JSON files that may be results: none of a model's own, nor single parts of a run."""
    entries = sorted(folder.iterdir())
    names = {entry.name for entry in entries}
    is_model = "config.json" in names
    for entry in entries:
        if entry.is_dir():
            left_out = entry.name.startswith(_LEFT_OUT) or entry.name.endswith("_runs")
            if not left_out and depth < _MOST_DEPTH:
                yield from _result_files(entry, depth + 1)
            continue
        unfinished = entry.name == METRICS and "results.json" not in names  # of a run that has not ended
        if not is_model and (unfinished or (entry.suffix == ".json" and not entry.name.startswith("."))):
            yield entry


def _read(path: Path, name: str, number: int, named: bool) -> Source | None:
    """One file; `None` for JSON in a folder that is no result."""
    raw = _bytes(path)
    digest = hashlib.sha256(raw).hexdigest()
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    if path.suffix == ".jsonl":
        records = _records(raw, name)
        data = Node(name, "", {"name": path.resolve().parent.name})
        return Source(number, name, "training", data, digest, f"file written {written}", {}, records, digest)
    data = Node(name, "", _parse(raw, name))
    kind = _kind(data.value)
    if kind not in KINDS:
        if not named:
            return None
        found = f"unknown {kind!r}" if kind else "there is none"
        raise ValueError(f"{name}: kind: {found}, expected one of {list(KINDS)}")
    records: list[Node] = []
    records_digest = ""
    beside = path.with_name(METRICS)
    if kind == "training" and beside.is_file():
        text = _bytes(beside)
        records = _records(text, str(Path(name).with_name(METRICS)))
        records_digest = hashlib.sha256(text).hexdigest()
    date = data.optional_text("date") or f"file written {written}"
    return Source(number, name, kind, data, digest, date, _versions(data), records, records_digest)


def _kind(data: Any) -> str | None:
    """What the file says that it is, or, where it does not say, what it looks like."""
    if not isinstance(data, dict):
        return None
    if "kind" in data:
        return data["kind"] if isinstance(data["kind"], str) else None
    looks = {
        "eval": {"model", "settings", "cells"},
        "training": {"training", "data", "parameters", "tokens_seen"},
        "check": {"versions", "models"},
        "isoflop": {"arms", "budget_flops"},
        "memory": {"arms", "state_bytes_at", "chance"},
    }
    return next((kind for kind, names in looks.items() if names <= data.keys()), None)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse(raw: bytes, name: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error


def _records(raw: bytes, name: str) -> list[Node]:
    lines = raw.decode("utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # a run that is being written
                break
            raise ValueError(f"{name}: {where}: not JSON: {error}") from error
        node = Node(name, where, record)
        if not isinstance(record, dict):
            raise node.wrong("is no object")
        found.append(node)
    return found


def _versions(data: Node) -> dict[str, str]:
    """Of the packages; races and comparisons say them among the facts of the machine."""
    found = {}
    for name in ("versions", "machine"):
        said = data.get(name)
        for key, value in said.items() if said is not None else ():
            if name == "versions" or key in ("python", "torch", "transformers", "hybridlm"):
                found[key] = str(value.value)
    return found
