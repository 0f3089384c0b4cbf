"""What needles are hidden in: generated sentences, repeated noise, or the documentation of Python's standard library.

A haystack gives sentences one after another; the first n are the same however many are asked for.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from .words import sentence

SENTENCES, NOISE, STDLIB = "sentences", "noise", "stdlib"
HAYSTACKS = (SENTENCES, NOISE, STDLIB)
_NOISE = (
    "The road is long.",
    "The rain has stopped.",
    "A train leaves the town.",
    "It will come back.",
    "So the day goes by.",
)
# modules with much prose that every CPython has
_MODULES = (
    "argparse",
    "_pydecimal",
    "datetime",
    "difflib",
    "doctest",
    "fractions",
    "functools",
    "heapq",
    "inspect",
    "logging/__init__",
    "optparse",
    "os",
    "pathlib",
    "pdb",
    "pickle",
    "random",
    "shutil",
    "smtplib",
    "socket",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "traceback",
    "turtle",
    "typing",
    "unittest/mock",
    "uuid",
    "weakref",
    "zipfile",
)


@cache
def stdlib_sentences() -> tuple[str, ...]:
    """The sentences of the docstrings of some modules of CPython, in the order of modules and lines.

    Raises:
        ValueError: This Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for module in _MODULES:
        path = root / f"{module}.py"
        if not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    found.update(dict.fromkeys(_prose(paragraph)))
    if not found:
        raise ValueError("haystack: 'stdlib' found no sources of Python's standard library on this machine")
    return tuple(found)


def _prose(paragraph: str) -> list[str]:
    """Sentences without code: from a capital letter to a full stop."""
    text = " ".join(paragraph.split())
    if ">>>" in text or not text.isascii():
        return []
    return [
        part for part in re.split(r"(?<=\.) (?=[A-Z])", text) if re.fullmatch(r"[A-Z][\w ,;:'()/-]{20,180}\.", part)
    ]


def hay(kind: str, rng: np.random.Generator) -> Iterator[str]:
    """Sentences without end.

    Args:
        kind: One of `HAYSTACKS`.
        rng: Where they start, or what they are.

    Raises:
        ValueError: There is no such haystack.
    """
    check_haystack(kind)
    if kind == NOISE:
        yield from cycle(_NOISE)
    elif kind == STDLIB:
        texts = stdlib_sentences()
        yield from islice(cycle(texts), int(rng.integers(len(texts))), None)
    while True:
        yield sentence(rng)


def check_haystack(kind: str) -> None:
    """Raise `ValueError` for a haystack that does not exist."""
    if kind not in HAYSTACKS:
        raise ValueError(f"haystack: unknown {kind!r}, expected one of {list(HAYSTACKS)}")


def haystack_hash(kind: str) -> str | None:
    """SHA-256 of a haystack that depends on the machine; `None` for those that depend on the seed alone."""
    if kind != STDLIB:
        return None
    return hashlib.sha256("\n".join(stdlib_sentences()).encode()).hexdigest()


def scatter(units: list[str], inserts: list[str], places: list[float]) -> list[str]:
    """Put `inserts` between `units`, each at its share of them, in the order of the places.

    Args:
        units: Sentences.
        inserts: What is hidden.
        places: In [0, 1], one an insert: 0 before the first sentence, 1 after the last.
    """
    slots: list[list[str]] = [[] for _ in range(len(units) + 1)]
    for place, index in sorted((place, index) for index, place in enumerate(places)):
        slots[round(place * len(units))].append(inserts[index])
    mixed = list(slots[0])
    for unit, slot in zip(units, slots[1:], strict=True):
        mixed += [unit, *slot]
    return mixed
