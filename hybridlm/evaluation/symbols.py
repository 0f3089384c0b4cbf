"""Synthetic tasks over a few symbols, as rows of token ids.

Every task is a function `(num_rows, length, *, seed, options) -> RecallRows`: labels stand at the answers' own places,
which the tokens before must predict. Rows are deterministic by seed. `text_of` writes a row as a text of two-letter
codes whose answer is the last labelled run.

Shapes: N rows, T tokens of a row, P pairs.
References: Arora et al. 2023, "Zoology", arXiv:2312.04927 (MQAR); Poli et al. 2024, "Mechanistic Design and Scaling of
Hybrid Architectures", arXiv:2403.17844 (MAD's six); Gu and Dao 2023, "Mamba", arXiv:2312.00752 (selective copy);
Jelassi et al. 2024, "Repeat After Me", arXiv:2402.01032 (copying, look-up of n-grams, phonebook).
Differs: MAD decodes its compression with a network of its own; here the model itself reads it out at blanks behind a
mark, and so can look back. Answers of a row never depend on what comes after.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hybridlm.data.recall import NO_LABEL, RecallRows, RecallVocabulary, key_value_recall, passkey

from .chance import copy_chance
from .documents import TextDocument

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def mqar(
    num_rows: int,
    length: int,
    *,
    seed: int,
    num_pairs: int | None = None,
    tokens_per_pair: int = 16,
    num_queries: int | None = None,
    num_keys: int = 64,
    num_values: int = 64,
    num_fillers: int = 1,
    gap_power: float = 0.01,
    show_answers: bool = False,
    fillers_imitate: bool = False,
) -> RecallRows:
    """Multi-query associative recall: pairs, then their keys again, most of them soon.

    Args:
        num_rows: N.
        length: T.
        seed: Of the rows.
        num_pairs: P; by default one for every `tokens_per_pair` tokens of the row, and at least 2.
        tokens_per_pair: 16 in the paper; with 4, and answers shown, pairs and queries fill the row.
        num_queries: Keys asked for; each once by default.
        num_keys: Symbols that are keys, the lower part of the vocabulary.
        num_values: Symbols that are values.
        num_fillers: Symbols between; with one they are blanks.
        gap_power: Weight of a gap g is g^(a - 1) with this a.
        show_answers: Whether the answer follows its query, as in text.
        fillers_imitate: Whether filler is drawn from all symbols.
    """
    _at_least("tokens_per_pair", tokens_per_pair, 1)
    num_pairs = min(max(2, length // tokens_per_pair), num_keys) if num_pairs is None else num_pairs
    rows = key_value_recall(
        num_rows, length, seed=seed, num_pairs=num_pairs, num_queries=num_queries, gap_power=gap_power,
        vocabulary=RecallVocabulary(num_keys, num_values, num_fillers), show_answers=show_answers,
        fillers_imitate=fillers_imitate,
    )  # fmt: skip
    return RecallRows(rows.input_ids, rows.labels, copy_chance(num_pairs, num_values))


def in_context_recall(num_rows: int, length: int, *, seed: int, vocabulary_size: int = 16) -> RecallRows:
    """MAD: keys and values by turns, a key's value is the same all through the row; known keys are labelled.

    Keys are the lower half of the vocabulary. The last key is one that stood before.
    """
    _at_least("length", length, 4)
    half = _half(vocabulary_size)
    rng = np.random.default_rng([seed, length, vocabulary_size, 1])
    count = length // 2
    keys = rng.integers(0, half, (num_rows, count))
    before = rng.integers(0, count - 1, num_rows)
    keys[:, -1] = keys[np.arange(num_rows), before]
    table = rng.integers(half, 2 * half, (num_rows, half))
    values = np.take_along_axis(table, keys, axis=1)
    tokens = np.zeros((num_rows, length), dtype=np.int64)
    labels = np.full_like(tokens, NO_LABEL)
    first = length - 2 * count  # a row of odd length begins with a value that nothing asks for
    tokens[:, :first] = half
    tokens[:, first::2], tokens[:, first + 1 :: 2] = keys, values
    equal = keys[:, :, None] == keys[:, None, :]
    known = np.tril(equal, -1).any(axis=2)  # [N, pairs]
    labels[:, first + 1 :: 2] = np.where(known, values, NO_LABEL)
    num_known = np.cumsum(~known, axis=1)
    return _rows(tokens, labels, copy_chance(1 / np.mean(1 / num_known[known]), half))


def noisy_recall(
    num_rows: int, length: int, *, seed: int, vocabulary_size: int = 16, noise_size: int = 16, noise: float = 0.2
) -> RecallRows:
    """MAD: in-context recall with a share `noise` of the row taken by symbols that mean nothing, between the pairs."""
    if not 0 <= noise < 1:
        raise ValueError(f"noise={noise} must lie in [0, 1)")
    _at_least("noise_size", noise_size, 1)
    num_noise = round(noise * length)
    num_noise += (length - num_noise) % 2
    pairs = in_context_recall(num_rows, length - num_noise, seed=seed, vocabulary_size=vocabulary_size)
    num_pairs = (length - num_noise) // 2
    rng = np.random.default_rng([seed, length, vocabulary_size, noise_size, 2])
    # units of the row in any order, but the last is a pair; a pair takes two places
    is_pair = np.concatenate([np.ones(num_pairs - 1, bool), np.zeros(num_noise, bool)])
    tokens = rng.integers(2 * _half(vocabulary_size), 2 * _half(vocabulary_size) + noise_size, (num_rows, length))
    labels = np.full_like(tokens, NO_LABEL)
    for row in range(num_rows):
        width = np.where(np.append(rng.permutation(is_pair), True), 2, 1)
        starts = (np.cumsum(width) - width)[width == 2]
        places = np.stack([starts, starts + 1], axis=1).ravel()
        tokens[row, places], labels[row, places] = pairs.input_ids[row].numpy(), pairs.labels[row].numpy()
    return _rows(tokens, labels, pairs.chance)


def fuzzy_recall(
    num_rows: int, length: int, *, seed: int, vocabulary_size: int = 16, longest: int = 3, num_keys: int = 8
) -> RecallRows:
    """MAD: in-context recall whose keys and values are motifs of 1 to `longest` symbols.

    Rows begin with as many blanks (the symbol behind the vocabulary) as are left over.
    """
    half = _half(vocabulary_size)
    _at_least("longest", longest, 1)
    _at_least("length", length, 4 * longest)
    rng = np.random.default_rng([seed, length, vocabulary_size, longest, num_keys, 3])
    tokens = np.full((num_rows, length), 2 * half)
    labels = np.full_like(tokens, NO_LABEL)
    shares = []
    for row in range(num_rows):
        table = _motif_table(rng, half, longest, num_keys)
        keys, used = [], 0
        while True:
            key = int(rng.integers(num_keys))
            size = len(table[key][0]) + len(table[key][1])
            if used + size > length:
                break
            keys.append(key)
            used += size
        if keys[-1] not in keys[:-1]:
            # the last one must be known: repeat the shortest that stood before, and drop what it takes the place of
            key = min(keys[:-1], key=lambda k: len(table[k][0]) + len(table[k][1])) if keys[:-1] else keys[0]
            keys[-1] = key
            while sum(len(part) for k in keys for part in table[k]) > length:
                keys.pop(0)
            if key not in keys[:-1]:
                keys = [key, key]
        place = length - sum(len(part) for key in keys for part in table[key])
        for number, key in enumerate(keys):
            known = len(set(keys[:number]))
            for part, is_value in zip(table[key], (False, True), strict=True):
                stop = place + len(part)
                tokens[row, place:stop] = part
                if is_value and key in keys[:number]:
                    labels[row, place:stop] = part
                    shares.append(1 / known)
                place = stop
    return _rows(tokens, labels, copy_chance(1 / np.mean(shares), half))


def _motif_table(rng: np.random.Generator, half: int, longest: int, num_keys: int) -> list[tuple[list[int], list[int]]]:
    """Different key motifs of the lower half, each with a value motif of the upper."""
    table: dict[tuple[int, ...], list[int]] = {}
    for _ in range(1000 * num_keys):
        if len(table) == num_keys:
            break
        key, value = (rng.integers(0, half, int(rng.integers(1, longest + 1))) for _ in range(2))
        table.setdefault(tuple(key.tolist()), (value + half).tolist())
    else:
        raise ValueError(f"num_keys={num_keys} is too many for motifs of up to {longest} out of {half} symbols")
    return [(list(key), value) for key, value in table.items()]


def selective_copy(
    num_rows: int, length: int, *, seed: int, vocabulary_size: int = 16, num_copied: int = 16, show_answers: bool = True
) -> RecallRows:
    """Symbols scattered among blanks, then a mark, then the symbols in their order.

    Blank and mark are the two symbols behind the vocabulary. MAD's form and Mamba's differ in sizes only.
    """
    _at_least("num_copied", num_copied, 1)
    _at_least("length", length, 2 * num_copied + 1)
    rng = np.random.default_rng([seed, length, vocabulary_size, num_copied, 4])
    field = length - num_copied - 1
    copied = rng.integers(0, vocabulary_size, (num_rows, num_copied))
    places = np.sort(np.argsort(rng.random((num_rows, field)), axis=1)[:, :num_copied], axis=1)
    tokens = np.full((num_rows, length), vocabulary_size)
    np.put_along_axis(tokens, places, copied, axis=1)
    return _then(tokens, field, vocabulary_size + 1, copied, show_answers, copy_chance(num_copied, vocabulary_size))


def compression(num_rows: int, length: int, *, seed: int, vocabulary_size: int = 16) -> RecallRows:
    """MAD: symbols, a mark at which they are to be summed up, and blanks at which they are read out in order."""
    rows = copying(num_rows, length, seed=seed, vocabulary_size=vocabulary_size)
    tokens = torch.where(rows.answers, vocabulary_size + 1, rows.input_ids)
    return RecallRows(tokens, rows.labels, rows.chance)


def memorization(
    num_rows: int,
    length: int,
    *,
    seed: int,
    vocabulary_size: int = 256,
    table_seed: int = 0,
    show_answers: bool = False,
) -> RecallRows:
    """MAD: keys and their values, by a table that is the same in all rows and stands in none: it must be learned.

    Where answers are hidden, a blank (the symbol behind the vocabulary) stands in their place.
    """
    _at_least("length", length, 2)
    half = _half(vocabulary_size)
    table = np.random.default_rng([table_seed, vocabulary_size]).integers(half, 2 * half, half)
    rng = np.random.default_rng([seed, length, vocabulary_size, 5])
    count = length // 2
    keys = rng.integers(0, half, (num_rows, count))
    tokens = np.full((num_rows, length), 2 * half)
    labels = np.full_like(tokens, NO_LABEL)
    first = length - 2 * count
    tokens[:, first::2], labels[:, first + 1 :: 2] = keys, table[keys]
    if show_answers:
        tokens[:, first + 1 :: 2] = table[keys]
    return _rows(tokens, labels, 1 / half)


def copying(num_rows: int, length: int, *, seed: int, vocabulary_size: int = 26) -> RecallRows:
    """A string drawn evenly, a mark (the symbol behind the vocabulary), and the string again.

    A row of even length begins with a blank.
    """
    _at_least("length", length, 3)
    rng = np.random.default_rng([seed, length, vocabulary_size, 6])
    count = (length - 1) // 2
    string = rng.integers(0, vocabulary_size, (num_rows, count))
    tokens = np.full((num_rows, length), vocabulary_size + 1)
    field = length - count - 1
    tokens[:, field - count : field] = string
    return _then(tokens, field, vocabulary_size, string, True, copy_chance(count, vocabulary_size))


def ngram_lookup(num_rows: int, length: int, *, seed: int, vocabulary_size: int = 26, order: int = 2) -> RecallRows:
    """A string, a mark, and `order` of its symbols in a row that stand there once: which symbol follows them?"""
    _at_least("order", order, 1)
    _at_least("length", length, 2 * order + 3)
    rng = np.random.default_rng([seed, length, vocabulary_size, order, 7])
    field = length - order - 2
    tokens = np.full((num_rows, length), vocabulary_size)
    labels = np.full_like(tokens, NO_LABEL)
    for row in range(num_rows):
        starts: list[int] = []
        for _ in range(1000):
            string = rng.integers(0, vocabulary_size, field)
            grams = [tuple(string[start : start + order].tolist()) for start in range(field - order + 1)]
            starts = [start for start, gram in enumerate(grams[:-1]) if grams.count(gram) == 1]
            if starts:
                break
        else:
            raise ValueError(
                f"length={length}: {vocabulary_size} symbols are too few for {order}-grams that stand once"
            )
        start = starts[int(rng.integers(len(starts)))]
        tokens[row, :field] = string
        tokens[row, field + 1 : -1] = string[start : start + order]
        tokens[row, -1] = labels[row, -1] = string[start + order]
    return _rows(tokens, labels, copy_chance(field, vocabulary_size))


def phonebook(
    num_rows: int,
    length: int,
    *,
    seed: int,
    num_names: int = 26,
    num_digits: int = 10,
    name_size: int = 2,
    size: int = 3,
) -> RecallRows:
    """Names of `name_size` symbols with numbers of `size` digits, as many as fit; a mark, a name, and its number."""
    entry = name_size + size
    count = (length - 1) // entry - 1
    _at_least("length", length, 2 * entry + 1)
    if count > num_names**name_size:
        raise ValueError(f"num_names={num_names} must give {count} different names of {name_size} symbols")
    rng = np.random.default_rng([seed, length, num_names, num_digits, name_size, size, 8])
    mark = num_names + num_digits
    tokens = np.full((num_rows, length), mark + 1)
    labels = np.full_like(tokens, NO_LABEL)
    first = length - 1 - entry * (count + 1)
    for row in range(num_rows):
        codes = rng.choice(num_names**name_size, count, replace=False)
        names = np.stack([codes // num_names**place % num_names for place in range(name_size)], axis=1)
        numbers = rng.integers(num_names, mark, (count, size))
        asked = int(rng.integers(count))
        tokens[row, first : -entry - 1] = np.concatenate([names, numbers], axis=1).ravel()
        tokens[row, -entry - 1] = mark
        tokens[row, -entry:] = np.concatenate([names[asked], numbers[asked]])
        labels[row, -size:] = numbers[asked]
    return _rows(tokens, labels, copy_chance(count, num_digits))


def hidden_passkey(num_rows: int, length: int, *, seed: int, num_tokens: int = 3, depth: float | None = None,
                   num_values: int = 32, num_fillers: int = 32) -> RecallRows:  # fmt: skip
    """A mark and a passkey somewhere in filler; the mark and the passkey again at the end."""
    vocabulary = RecallVocabulary(1, num_values, num_fillers)
    return passkey(num_rows, length, seed=seed, num_tokens=num_tokens, depth=depth, vocabulary=vocabulary)


TOKEN_TASKS: dict[str, Callable[..., RecallRows]] = {
    "mqar": mqar,
    "mad_in_context_recall": in_context_recall,
    "mad_fuzzy_recall": fuzzy_recall,
    "mad_noisy_recall": noisy_recall,
    "mad_selective_copy": selective_copy,
    "mad_compression": compression,
    "mad_memorization": memorization,
    "selective_copy": selective_copy,
    "copying": copying,
    "ngram_lookup": ngram_lookup,
    "phonebook_symbols": phonebook,
    "passkey_symbols": hidden_passkey,
}


def text_of(rows: RecallRows, chance: float | None = None) -> TextDocument:
    """The first row as text: a code of two letters a symbol; what the last labelled run hides is the answer.

    Args:
        rows: At least one row.
        chance: Of the whole answer; by default that its symbols are right one by one.
    """
    tokens, labels = rows.input_ids[0].tolist(), rows.labels[0].tolist()
    tokens = [token if label == NO_LABEL else label for token, label in zip(tokens, labels, strict=True)]
    stop = max(place for place, label in enumerate(labels) if label != NO_LABEL) + 1
    start = stop
    while start and labels[start - 1] != NO_LABEL:
        start -= 1
    words = [_code(token) for token in tokens[:stop]]
    chance = rows.chance ** (stop - start) if chance is None else chance
    return TextDocument(" ".join(words[:start]), f" {' '.join(words[start:])}", chance=chance)


def _code(symbol: int) -> str:
    """Two letters, different for each of 676 symbols."""
    if symbol >= len(LETTERS) ** 2:
        raise ValueError(f"symbol {symbol} has no code of two letters; at most {len(LETTERS) ** 2} symbols can be text")
    return LETTERS[symbol // len(LETTERS)] + LETTERS[symbol % len(LETTERS)]


def token_rows(task: str, num_rows: int, length: int, *, seed: int, **options: Any) -> RecallRows:
    """Rows of a task by its name.

    Raises:
        ValueError: There is no such task, or it has no such option.
    """
    if task not in TOKEN_TASKS:
        raise ValueError(f"task: unknown {task!r}, expected one of {list(TOKEN_TASKS)}")
    _at_least("num_rows", num_rows, 1)
    try:
        return TOKEN_TASKS[task](num_rows, length, seed=seed, **options)
    except TypeError as error:
        raise ValueError(f"task {task}: {error}") from error


def _half(vocabulary_size: int) -> int:
    if vocabulary_size < 2 or vocabulary_size % 2:
        raise ValueError(f"vocabulary_size={vocabulary_size} must be even and at least 2: keys and values share it")
    return vocabulary_size // 2


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def _then(
    tokens: np.ndarray, place: int, mark: int, answers: np.ndarray, show_answers: bool, chance: float
) -> RecallRows:
    """Put a mark at `place` and the answers behind it, to the end of the rows."""
    labels = np.full_like(tokens, NO_LABEL)
    tokens[:, place] = mark
    labels[:, place + 1 :] = answers
    if show_answers:
        tokens[:, place + 1 :] = answers
    return _rows(tokens, labels, chance)


def _rows(tokens: np.ndarray, labels: np.ndarray, chance: float) -> RecallRows:
    return RecallRows(torch.from_numpy(tokens), torch.from_numpy(labels), float(chance))
