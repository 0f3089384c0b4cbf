"""Numbers with a source: the only ones that a card may print.

A template never holds a value, but a `View`: a place in a stored JSON file. Printing one gives a `Figure`, the text of
the value in a form, with the file and the JSON pointer that it came from. Text that was printed can be read again,
figure after figure: whatever digit is left over has no source.
"""

import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlm.evaluation import tables
from hybridlm.testing.report import Report

_UNSEEN = r"*_`\\\u200b-\u200d\u2060\ufeff"  # what may stand between a number and what changes it
_SIGN = re.compile(rf"[-+−‐‑‒–—﹣－.,][{_UNSEEN}]*\Z")
_UNIT = re.compile(rf"[\s{_UNSEEN}]*(?:[%‰‱％]|(?:per ?cent|thousand|million|billion|trillion)\b)")
_TAG = re.compile(r"<[^<>]*>")
_NEAR = 200  # characters beside a number that are looked at


class CardError(ValueError):
    """A card would print, or prints, a number that no result file backs."""


@dataclass(frozen=True)
class Source:
    """A stored JSON file.

    Attributes:
        file: Its path in the model folder.
        data: What it holds.
    """

    file: str
    data: Any

    @property
    def view(self) -> "View":
        """All of it."""
        return View(self, ())


@dataclass(frozen=True)
class Figure:
    """A printed value and where it came from.

    Attributes:
        value: What stands on the card; a number only in the metadata.
        form: Key of `FORMS`, which made it.
        file: The file in the model folder.
        pointer: JSON pointer into it.
    """

    value: str | int | float
    form: str
    file: str
    pointer: str

    def __str__(self) -> str:
        raise CardError(f"{self.file}#{self.pointer}: a figure is printed as it is, and takes part in nothing else")

    @property
    def place(self) -> str:
        """File and pointer."""
        return f"{self.file}#{self.pointer}"


class View:
    """A place in a source, for templates: items, truth and iteration, but no arithmetic and no text."""

    def __init__(self, source: Source, path: tuple[str | int, ...]) -> None:
        self._source, self._path = source, path

    @property
    def _data(self) -> Any:
        return walk(self._source.data, self._path)

    def __getitem__(self, key: str | int) -> "View":
        return View(self._source, (*self._path, key))

    def __getattr__(self, name: str) -> "View":
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __bool__(self) -> bool:
        return bool(self._data)

    def __eq__(self, other: object) -> bool:
        return self._data == (other._data if isinstance(other, View) else other)

    __hash__ = None

    def __iter__(self) -> Iterator["View"]:
        data = self._data or ()
        return (self[key] for key in (data if isinstance(data, dict) else range(len(data))))

    def __str__(self) -> str:
        raise CardError(f"{self._source.file}#{pointer_of(self._path)}: is printed by a form, one of {sorted(FORMS)}")

    def figure(self, form: str) -> Figure:
        """The value as a figure.

        Raises:
            CardError: There is no such value, or the form does not take it.
        """
        pointer = pointer_of(self._path)
        return Figure(derive(self._source.data, form, pointer, self._source.file), form, self._source.file, pointer)


def walk(data: Any, path: Sequence[str | int]) -> Any:
    """The value at a path; `None` where there is none."""
    for key in path:
        try:
            data = data[int(key)] if isinstance(data, list) else data[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return data


def pointer_of(path: Sequence[str | int]) -> str:
    """A path as a JSON pointer (RFC 6901)."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)


def path_of(pointer: str) -> tuple[str, ...]:
    """A JSON pointer as a path."""
    return tuple(key.replace("~1", "/").replace("~0", "~") for key in pointer.split("/")[1:])


def derive(data: Any, form: str, pointer: str, file: str) -> str | int | float:
    """What a form makes of a value.

    Raises:
        CardError: There is no such form or value, or the form does not take the value.
    """
    if form not in FORMS:
        raise CardError(f"{file}#{pointer}: unknown form {form!r}, expected one of {sorted(FORMS)}")
    path = path_of(pointer)
    value = walk(data, path)
    if value is None:
        raise CardError(f"{file}#{pointer}: there is no such value")
    try:
        return FORMS[form](value, path[-1] if path else "")
    except KeyError as error:
        raise CardError(f"{file}#{pointer}: form {form!r} does not take it: {error} is missing") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise CardError(f"{file}#{pointer}: form {form!r} does not take it: {error}") from error


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return " ".join(value.split()).replace("|", "\\|")


def _plain(value: Any, key: str) -> str:
    """A number or a text as it stands in the file."""
    return value if isinstance(value, str) else json.dumps(value)


def _integer(value: Any, key: str) -> str:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no whole number")
    return f"{value:,}"


def _pairs(value: dict[str, Any], key: str) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items())


def _estimate(value: dict[str, Any], key: str) -> str:
    """A mean over seeds with its standard error, marked where it is not above chance."""
    return tables.score_text(
        {"score": value["mean"], "error": value["standard_error"], "above_chance": value["above_chance"]}
    )


def _estimates(value: dict[str, dict[str, Any]], key: str) -> str:
    return "; ".join(f"{at}: {_estimate(estimate, at)}" for at, estimate in value.items()) or "–"


def _arxiv(value: str, key: str) -> str:
    return f"[arXiv:{value}](https://arxiv.org/abs/{value})"


def _metric(value: dict[str, Any], key: str) -> str:
    """Name of an evaluation cell's metric, with what a bare number would hide."""
    if "bits_per_byte" in value:
        return f"bits per byte at {value['length']} tokens"
    likelihood = value["likelihood"]
    marked = "" if likelihood["above_chance"] else f", {tables.AT_CHANCE}"
    return f"exact match by likelihood at {value['length']} tokens{marked} (guessing: {likelihood['chance']:.2g})"


def _cell_score(value: dict[str, Any], key: str) -> float:
    return round((value.get("bits_per_byte") or value["likelihood"])["score"], 4)


def _eval_command(value: dict[str, Any], key: str) -> str:
    """The command that repeats an evaluation."""
    settings, words = value["settings"], ["hybridlm eval FOLDER"]
    for name in ("suite", "lengths", "beyond", "samples", "generated", "seed", "haystack", "questions", "text"):
        given = settings.get(name)
        if given is not None and (name, given) not in (("beyond", 1),):
            words.append(f"--{name} {','.join(map(str, given)) if isinstance(given, list) else given}")
    return " ".join([*words, f"--dtype {value['model']['dtype']}"])


# A form is a function of the value and of its key. Stored cards name them: change none, add new ones.
FORMS: dict[str, Callable[[Any, str], str | int | float]] = {
    "text": _text,
    "plain": _plain,
    "key": lambda value, key: key,
    "integer": _integer,
    "decimal": lambda value, key: f"{value:.4f}",
    "percent": lambda value, key: f"{100 * value:.4g} %",
    "rounded": lambda value, key: f"{value:.0f}",
    "short_hash": lambda value, key: value[:12],
    "listed": lambda value, key: ", ".join(value),
    "pairs": _pairs,
    "arxiv": _arxiv,
    "arxiv_tag": lambda value, key: f"arxiv:{value}",
    "estimates": _estimates,
    "number": lambda value, key: round(float(value), 4),
    "bits_name": lambda value, key: f"bits per byte, windows of {value['length']} tokens",
    "cell_row": lambda value, key: " | ".join(next(tables.rows({"cells": [value]}))),
    "cell_metric": _metric,
    "cell_score": _cell_score,
    "eval_command": _eval_command,
    "eval_notes": lambda value, key: "\n\n".join(tables.notes(value)),
    "check_table": lambda value, key: Report.from_dict(value).to_markdown().strip(),
}


def has_digit(text: str) -> bool:
    """Whether any character counts, in any script."""
    return any(char.isnumeric() for char in text)


def unbacked(text: str, figures: Sequence[tuple[str, str]], first_line: int = 1) -> str | None:
    """Read a text again: every digit must be part of the next figure.

    Args:
        text: Of a card, without its metadata.
        figures: Printed text and place of every figure, in order.
        first_line: Number of the text's first line in its file.

    Returns:
        The first thing that is wrong, `None` if nothing is.
    """
    position = 0
    for expected, place in figures:
        found = text.find(expected, position)
        stray = _first_digit(text, position, len(text) if found < 0 else found)
        if stray is not None:
            start, shown = _difference(text, position, stray, expected) if found < 0 else (stray, expected)
            return f"{_where(text, start, first_line)} stands where {_shown(shown)} of {place} is expected"
        if found < 0:
            return f"{_shown(expected)} of {place} is missing"
        end = found + len(expected)
        if _is_changed(text, found, end):
            return f"{_where(text, found, first_line)} is more than {_shown(expected)} of {place}"
        position = end
    stray = _first_digit(text, position, len(text))
    return None if stray is None else f"{_where(text, stray, first_line)} has no source"


def _difference(text: str, position: int, stray: int, expected: str) -> tuple[int, str]:
    """Where a text leaves a long figure that it begins, and what the figure has there; else the stray digit and all."""
    start = text.rfind(expected[:4], position, stray + 4)
    if len(expected) <= 12 or start < 0:
        return stray, expected
    same = next(n for n in range(len(expected) + 1) if text[start : start + n + 1] != expected[: n + 1])
    word = max(expected.rfind(space, 0, same) for space in " \n|") + 1
    return start + same, re.split(r"[ \n|]", expected[word:], maxsplit=1)[0] or expected


def _is_changed(text: str, start: int, end: int) -> bool:
    """Whether what stands around a figure gives it another meaning."""
    before, after = (
        html.unescape(_TAG.sub("", near)) for near in (text[max(0, start - _NEAR) : start], text[end : end + _NEAR])
    )
    if text[start].isnumeric() and (before[-1:].isnumeric() or _SIGN.search(before)):
        return True
    return text[end - 1].isnumeric() and (text[end : end + 1].isalnum() or _UNIT.match(after) is not None)


def _first_digit(text: str, start: int, stop: int) -> int | None:
    return next((place for place in range(start, stop) if text[place].isnumeric()), None)


def _where(text: str, position: int, first_line: int) -> str:
    """Line and word at a position."""
    start = max(text.rfind(space, 0, position) for space in " \n|") + 1
    end = min(place for space in " \n|" if (place := (text + "\n").find(space, position)) >= 0)
    return f"line {text.count(chr(10), 0, position) + first_line}: {_shown(text[start:end])}"


def _shown(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else text
    return repr(first if len(first) <= 60 else f"{first[:57]}...")


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        CardError: It is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CardError(f"{path}: missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"{path}: not JSON: {error}") from error
