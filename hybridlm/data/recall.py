"""Synthetic recall: key-value pairs that are asked for later (MQAR), and a passkey in noise.

Rows are deterministic by seed, on any machine. The vocabulary is in ranges: keys, values, filler, marks. Answers are
among the values, and a row's labels are those of transformers: the token to predict at its own place, -100 elsewhere.

Shapes: N rows, T tokens of a row, P pairs, Q queries.
Reference: Arora et al. 2023, "Zoology", arXiv:2312.04927 (MQAR); Mohtashami and Jaggi 2023, arXiv:2305.16300 (passkey).
Differs: filler has tokens of its own, unless `fillers_imitate`; the answer follows its query, unless `show_answers` is
off.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -100


@dataclass(frozen=True)
class RecallVocabulary:
    """Token ids in four ranges that follow one another.

    Args:
        num_keys: Tokens that are asked for.
        num_values: Tokens that are answers.
        num_fillers: Tokens that mean nothing.
        num_marks: Tokens that say what comes.
    """

    num_keys: int = 32
    num_values: int = 32
    num_fillers: int = 32
    num_marks: int = 1

    def __post_init__(self) -> None:
        for name in ("num_keys", "num_values", "num_fillers", "num_marks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def size(self) -> int:
        """Number of token ids."""
        return self.marks.stop

    @property
    def keys(self) -> range:
        """Ids of keys."""
        return range(self.num_keys)

    @property
    def values(self) -> range:
        """Ids of values."""
        return range(self.keys.stop, self.keys.stop + self.num_values)

    @property
    def fillers(self) -> range:
        """Ids of filler."""
        return range(self.values.stop, self.values.stop + self.num_fillers)

    @property
    def marks(self) -> range:
        """Ids of marks."""
        return range(self.fillers.stop, self.fillers.stop + self.num_marks)


@dataclass(frozen=True)
class RecallRows:
    """Rows of a task.

    Attributes:
        input_ids: `[N, T]`.
        labels: `[N, T]`, the answers at their own places, which the tokens before must predict; -100 elsewhere.
        chance: Share of answers that a guess among the values gets right.
    """

    input_ids: Tensor
    labels: Tensor
    chance: float

    @property
    def answers(self) -> Tensor:
        """`[N, T]`, where the answers are."""
        return self.labels != NO_LABEL


def key_value_recall(
    num_rows: int,
    length: int,
    *,
    seed: int,
    num_pairs: int = 8,
    num_queries: int | None = None,
    vocabulary: RecallVocabulary | None = None,
    gap_power: float = 1.0,
    show_answers: bool = True,
    fillers_imitate: bool = False,
) -> RecallRows:
    """Pairs of key and value first, then queries, each a key and its value, in filler.

    Args:
        num_rows: N.
        length: T.
        seed: Of the rows.
        num_pairs: P; their keys differ.
        num_queries: Q; P by default, each key once. Fewer leave keys out, more ask again.
        vocabulary: Token ids.
        gap_power: The place g of a query has the weight g^(a - 1) with this a: 1 for evenly, 0.01 as in the paper for
            most of them soon.
        show_answers: Whether the answer follows its query, as in text; else filler does, as in the paper.
        fillers_imitate: Whether filler is drawn from all keys, values and fillers.

    Raises:
        ValueError: Too few keys, or a row too short for pairs and queries.
    """
    vocabulary = RecallVocabulary() if vocabulary is None else vocabulary
    num_queries = num_pairs if num_queries is None else num_queries
    for name, value in (("num_rows", num_rows), ("num_pairs", num_pairs), ("num_queries", num_queries)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if num_pairs > vocabulary.num_keys:
        raise ValueError(f"num_pairs={num_pairs} must be at most num_keys={vocabulary.num_keys}")
    if gap_power <= 0:
        raise ValueError(f"gap_power={gap_power} must be above 0")
    space = (length - 2 * num_pairs) // 2  # places of two tokens
    if space < num_queries:
        need = 2 * (num_pairs + num_queries)
        raise ValueError(f"length={length} must be at least {need} for {num_pairs} pairs and {num_queries} queries")
    rng = np.random.default_rng([seed, length, num_pairs, num_queries])
    keys = _distinct(rng, num_rows, vocabulary.num_keys, num_pairs) + vocabulary.keys.start
    values = rng.integers(vocabulary.values.start, vocabulary.values.stop, (num_rows, num_pairs))
    pool = range(vocabulary.fillers.stop) if fillers_imitate else vocabulary.fillers
    tokens = rng.integers(pool.start, pool.stop, (num_rows, length))
    tokens[:, 0 : 2 * num_pairs : 2], tokens[:, 1 : 2 * num_pairs : 2] = keys, values
    # the largest of log weights with Gumbel noise are a draw without putting back
    weights = (gap_power - 1) * np.log(np.arange(1, space + 1)) + rng.gumbel(size=(num_rows, space))
    places = 2 * num_pairs + 2 * np.argsort(-weights, axis=1)[:, :num_queries]
    asked = np.argsort(rng.random((num_rows, num_pairs)), axis=1)[:, np.arange(num_queries) % num_pairs]
    answers = np.take_along_axis(values, asked, axis=1)
    np.put_along_axis(tokens, places, np.take_along_axis(keys, asked, axis=1), axis=1)
    if show_answers:
        np.put_along_axis(tokens, places + 1, answers, axis=1)
    labels = np.full_like(tokens, NO_LABEL)
    np.put_along_axis(labels, places + 1, answers, axis=1)
    return _rows(tokens, labels, vocabulary)


def passkey(
    num_rows: int,
    length: int,
    *,
    seed: int,
    num_tokens: int = 3,
    depth: float | None = None,
    vocabulary: RecallVocabulary | None = None,
) -> RecallRows:
    """A mark and a passkey somewhere in filler; the mark and the passkey again at the end.

    Args:
        num_rows: N.
        length: T.
        seed: Of the rows.
        num_tokens: Tokens of the passkey, drawn from the values.
        depth: Where the passkey stands, 0 at the start and 1 right before the question; `None` for anywhere, evenly.
        vocabulary: Token ids.

    Raises:
        ValueError: A row too short, or a depth outside [0, 1].
    """
    vocabulary = RecallVocabulary() if vocabulary is None else vocabulary
    for name, value in (("num_rows", num_rows), ("num_tokens", num_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must lie in [0, 1]")
    room = length - 2 * (num_tokens + 1)
    if room < 0:
        raise ValueError(f"length={length} must be at least {2 * (num_tokens + 1)} for {num_tokens} tokens")
    rng = np.random.default_rng([seed, length, num_tokens])
    tokens = rng.integers(vocabulary.fillers.start, vocabulary.fillers.stop, (num_rows, length))
    secret = rng.integers(vocabulary.values.start, vocabulary.values.stop, (num_rows, num_tokens))
    start = rng.integers(0, room + 1, (num_rows, 1)) if depth is None else np.full((num_rows, 1), round(depth * room))
    needle = np.concatenate([np.full((num_rows, 1), vocabulary.marks.start), secret], axis=1)
    np.put_along_axis(tokens, start + np.arange(num_tokens + 1), needle, axis=1)
    tokens[:, length - num_tokens - 1 :] = needle
    labels = np.full_like(tokens, NO_LABEL)
    labels[:, length - num_tokens :] = secret
    return _rows(tokens, labels, vocabulary)


def _distinct(rng: np.random.Generator, num_rows: int, num_choices: int, count: int) -> np.ndarray:
    """`[N, count]`, different whole numbers below `num_choices` in each row."""
    return np.argsort(rng.random((num_rows, num_choices)), axis=1)[:, :count]


def _rows(tokens: np.ndarray, labels: np.ndarray, vocabulary: RecallVocabulary) -> RecallRows:
    return RecallRows(torch.from_numpy(tokens), torch.from_numpy(labels), 1 / vocabulary.num_values)
