"""A stream of calls through one cache, and what every call must give.

Every row is a list of columns, each a token of a numbered document or a pad. Whatever the calls, the crops and the
moves of rows, the logits of a token are those that one full forward of its document gives at its place.

Shapes: B batch, T tokens of a call, V vocabulary.
"""

import copy
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Subject

Column = tuple[int, int] | None  # a token id and the number of its document; `None` is a pad
BORDERS = ("none", "position_ids", "seq_idx", "cu_seq_lens")


class Stream:
    """Feed a cache and remember what must come out.

    Args:
        subject: The model under test.
        batch_size: Number of rows B.
        cache: An empty cache; a new one by default.
        borders: How the model is told where documents begin.
        always_mask: Whether an attention mask is given even without pads.
        no_cache: Whether the one call goes without a cache.
    """

    def __init__(
        self,
        subject: Subject,
        batch_size: int,
        cache: Any = None,
        *,
        borders: str = "none",
        always_mask: bool = False,
        no_cache: bool = False,
    ) -> None:
        assert borders in BORDERS
        self.subject, self.borders, self.always_mask = subject, borders, always_mask
        self.cache = subject.new_cache() if cache is None and not no_cache else cache
        self.rows: list[list[Column]] = [[] for _ in range(batch_size)]
        self.outputs: list[list[Tensor]] = [[] for _ in range(batch_size)]
        self.error = 0.0
        self.pad_rng = subject.rng("pads")

    @property
    def num_columns(self) -> int:
        """Columns fed so far."""
        return len(self.rows[0])

    def branch(self) -> "Stream":
        """A copy with a cache of its own."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        other.rows, other.outputs = ([list(row) for row in rows] for rows in (self.rows, self.outputs))
        return other

    def feed(self, columns: Sequence[Sequence[Column]], **kwargs: Any) -> Tensor:
        """Run one call.

        Args:
            columns: The new columns of every row, equally many.
            kwargs: Passed to the model.

        Returns:
            The logits `[B, T, V]`.
        """
        for row, new in zip(self.rows, columns, strict=True):
            row.extend(new)
        num_tokens = len(columns[0])
        ids = torch.tensor(
            [[self.pad_rng.randrange(self.subject.vocab_size) if c is None else c[0] for c in row] for row in columns],
            device=self.subject.model.device,
        )
        logits = self.subject.forward(ids, self.cache, **self._borders(num_tokens), **self._mask(), **kwargs)
        if not bool(torch.isfinite(logits).all()):
            self.error = math.inf
        for outputs, new in zip(self.outputs, logits, strict=True):
            outputs.extend(new)
        return logits

    def feed_tokens(self, rng: random.Random, num_tokens: int, document: int = 0) -> Tensor:
        """Feed random tokens of one document to all rows."""
        size = self.subject.vocab_size
        return self.feed([[(rng.randrange(size), document) for _ in range(num_tokens)] for _ in self.rows])

    def crop(self, count: int) -> None:
        """Check what will be lost, then take back the last `count` columns."""
        self.check()
        self.cache.crop(-count)
        for lines in (*self.rows, *self.outputs):
            del lines[len(lines) - count :]

    def select(self, indices: Sequence[int], method: str) -> None:
        """Move rows with `reorder_cache` or `batch_select_indices`."""
        getattr(self.cache, method)(torch.tensor(indices, device=self.subject.model.device))
        self.rows = [list(self.rows[i]) for i in indices]
        self.outputs = [list(self.outputs[i]) for i in indices]

    def repeat(self, repeats: int) -> None:
        """Repeat every row."""
        self.cache.batch_repeat_interleave(repeats)
        self.rows = [list(row) for row in self.rows for _ in range(repeats)]
        self.outputs = [list(row) for row in self.outputs for _ in range(repeats)]

    def check(self) -> float:
        """Compare all logits so far with full forwards, and return the largest error of the whole stream."""
        found: dict[tuple[int, ...], list[Tensor]] = {}
        for row, outputs in zip(self.rows, self.outputs, strict=True):
            for tokens, logits in _documents(row, outputs):
                found.setdefault(tokens, []).append(logits)
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for tokens in found:
            by_length.setdefault(len(tokens), []).append(tokens)
        for group in by_length.values():
            expected = self.subject.forward(torch.tensor(group, device=self.subject.model.device))
            for tokens, logits in zip(group, expected, strict=True):
                for actual in found[tokens]:
                    self.error = max(self.error, self.subject.error(actual, logits))
        return self.error

    def _mask(self) -> dict[str, Tensor]:
        if not self.always_mask and all(column is not None for row in self.rows for column in row):
            return {}
        mask = [[int(column is not None) for column in row] for row in self.rows]
        return {"attention_mask": torch.tensor(mask, device=self.subject.model.device)}

    def _borders(self, num_tokens: int) -> dict[str, Tensor]:
        if self.borders == "none":
            return {}
        numbers = [_numbers(row)[-num_tokens:] for row in self.rows]
        device = self.subject.model.device
        if self.borders == "seq_idx":
            return {"seq_idx": torch.tensor(numbers, device=device)}
        if self.borders == "position_ids":
            places = [_places(row)[-num_tokens:] for row in self.rows]
            return {"position_ids": torch.tensor(places, device=device)}
        changes = [t for t in range(1, num_tokens) if numbers[0][t] != numbers[0][t - 1]]
        queries = torch.tensor([0, *changes, num_tokens], dtype=torch.int32, device=device)
        keys = queries.clone()
        keys[1:] += _places(self.rows[0])[-num_tokens]  # tokens of the first document that are cached
        return {"cu_seq_lens_q": queries, "cu_seq_lens_k": keys}


def _numbers(row: list[Column]) -> list[int]:
    """Document number of every column; a pad carries that of the token before."""
    numbers, last = [], next((column[1] for column in row if column is not None), 0)
    for column in row:
        last = last if column is None else column[1]
        numbers.append(last)
    return numbers


def _places(row: list[Column]) -> list[int]:
    """Place of every token in its document."""
    places: list[int] = []
    for t, column in enumerate(row):
        goes_on = t > 0 and row[t - 1] is not None and column is not None and row[t - 1][1] == column[1]
        places.append(places[-1] + 1 if goes_on else 0)
    return places


def _documents(row: list[Column], outputs: list[Tensor]) -> list[tuple[tuple[int, ...], Tensor]]:
    """The documents of a row: tokens and logits `[tokens, V]`."""
    documents: list[tuple[list[int], list[Tensor]]] = []
    last = None
    for column, logits in zip(row, outputs, strict=True):
        if column is None:
            continue
        if last is None or column[1] != last:
            documents.append(([], []))
        last = column[1]
        documents[-1][0].append(column[0])
        documents[-1][1].append(logits)
    return [(tuple(tokens), torch.stack(logits)) for tokens, logits in documents]
