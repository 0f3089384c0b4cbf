"""Values of a result file that know where they stand, so that what is wrong with them can be said."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LARGEST = 1e100  # that a result may be


@dataclass(frozen=True)
class Node:
    """A value of a JSON file.

    Attributes:
        file: Name of the file.
        where: Path of the value in the file; empty for the whole.
        value: The value.
    """

    file: str
    where: str
    value: Any

    def __getitem__(self, key: str | int) -> "Node":
        found = self.get(key)
        if found is None:
            raise self.wrong(f"{key!r} is missing")
        return found

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __iter__(self) -> Iterator["Node"]:
        if not isinstance(self.value, list):
            raise self.wrong("is no list")
        return (self._at(index, value) for index, value in enumerate(self.value))

    def get(self, *keys: str | int) -> "Node | None":
        """What stands below, or `None` where it is missing or null."""
        node = self
        for key in keys:
            if isinstance(key, int):
                inside = isinstance(node.value, list) and -len(node.value) <= key < len(node.value)
            elif isinstance(node.value, dict):
                inside = key in node.value
            else:
                raise node.wrong("is no object")
            if not inside or node.value[key] is None:
                return None
            node = node._at(key, node.value[key])
        return node

    def each(self, *keys: str | int) -> "list[Node]":
        """The entries of a list below; none where it is missing."""
        found = self.get(*keys)
        return [] if found is None else list(found)

    def items(self) -> Iterator[tuple[str, "Node"]]:
        """Names and values of an object; nulls are left out."""
        if not isinstance(self.value, dict):
            raise self.wrong("is no object")
        return ((key, self._at(key, value)) for key, value in self.value.items() if value is not None)

    def number(self) -> float:
        """A finite number."""
        good = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not good or not abs(self.value) <= _LARGEST:  # so that NaN fails too
            raise self.wrong(f"{_short(self.value)} is no finite number")
        return float(self.value)

    def by_number(self, *keys: str | int) -> "list[tuple[float, Node]]":
        """Entries of an object below whose names are numbers, such as lengths, in order; none where it is missing."""
        below = self.get(*keys)
        if below is None:
            return []
        found = []
        for name, node in below.items():
            try:
                number = float(name)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise below.wrong(f"{_short(name)} is no number")
            found.append((number, node))
        return sorted(found, key=lambda item: item[0])

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            raise self.wrong(f"{_short(self.value)} is no text")
        return self.value

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self.wrong(f"{_short(self.value)} is neither true nor false")
        return self.value

    def optional_number(self, *keys: str | int) -> float | None:
        """A number below, or `None` where there is none; one that is not finite counts as missing."""
        found = self.get(*keys)
        if found is None or (isinstance(found.value, float) and not math.isfinite(found.value)):
            return None
        return found.number()

    def optional_text(self, *keys: str | int) -> str | None:
        """A string below, or `None`."""
        found = self.get(*keys)
        return None if found is None else found.text()

    def wrong(self, reason: str) -> ValueError:
        """An error that names file and place."""
        place = f" {self.where}:" if self.where else ""
        return ValueError(f"{self.file}:{place} {reason}")

    def _at(self, key: str | int, value: Any) -> "Node":
        step = f"[{key}]" if isinstance(key, int) else f".{key}" if self.where else key
        return Node(self.file, f"{self.where}{step}", value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
