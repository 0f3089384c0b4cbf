"""The suites: which tasks belong to them, and at which lengths."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hybridlm.data.recall import NO_LABEL, RecallRows

from .babi import fact_tasks
from .chance import copy_chance
from .documents import TextDocument, TextTask
from .haystack import NOISE, SENTENCES, check_haystack
from .length import FACTORS
from .loading import Evaluated
from .needles import needle_tasks, passkey_task, phonebook_task
from .ruler import list_tasks
from .symbols import TOKEN_TASKS, text_of

SUITES = ("recall", "ruler", "babi", "length", "all")
LENGTHS = (256, 512, 1024)
LONGEST_BY_DEFAULT = 8192  # of the length suite, where attention would take long
BITS = "bits_per_byte"
_MAD, _RAM = "MAD, arXiv:2403.17844", "Repeat After Me, arXiv:2402.01032"


def build_symbols(
    make: Callable[..., RecallRows], least: int, rng: np.random.Generator, size: int, depth: float | None, length: int
) -> TextDocument:
    """A row of `least + size` symbols as text."""
    return text_of(make(1, least + size, seed=int(rng.integers(2**31))))


def build_mqar(rng: np.random.Generator, size: int, depth: float | None, length: int) -> TextDocument:
    """MQAR as text: a row with answers shown, and one more query behind it, for any of the keys.

    Differs: the paper has no query at the end; without it most texts would end soon after the pairs.
    """
    num_symbols = 16 + size
    rows = TOKEN_TASKS["mqar"](1, num_symbols, seed=int(rng.integers(2**31)), show_answers=True)
    num_pairs = max(2, num_symbols // 16)
    num_pairs = min(num_pairs, 64)
    asked = 2 * int(rng.integers(num_pairs))
    pair = rows.input_ids[:, asked : asked + 2]
    labels = torch.full((1, num_symbols + 2), NO_LABEL)
    labels[0, -1] = pair[0, 1]
    return text_of(RecallRows(torch.cat([rows.input_ids, pair], dim=1), labels, copy_chance(num_pairs, 64)))


# name, least symbols, source
_SYMBOL_TASKS = (
    ("mad_in_context_recall", 6, _MAD),
    ("mad_fuzzy_recall", 16, _MAD),
    ("mad_noisy_recall", 10, _MAD),
    ("mad_selective_copy", 33, _MAD),
    ("mad_compression", 5, _MAD),
    ("copying", 5, _RAM),
    ("ngram_lookup", 9, _RAM),
)


def symbol_tasks() -> list[TextTask]:
    """MQAR, MAD's without memorization, selective copy, copying, look-up of n-grams.

    Memorization is left out: its table stands in no text, so only a model trained on it can know it.
    """
    tasks = [TextTask("mqar", "recall", build_mqar, "Zoology, arXiv:2312.04927")]
    for name, least, source in _SYMBOL_TASKS:
        tasks.append(TextTask(name, "recall", partial(build_symbols, TOKEN_TASKS[name], least), source))
    make = partial(TOKEN_TASKS["selective_copy"], num_copied=8)
    build = partial(build_symbols, make, 17)
    return [*tasks, TextTask("selective_copy", "recall", build, "Mamba, arXiv:2312.00752")]


def text_tasks(suite: str, *, haystack: str | None = None, questions: str | Path | None = None) -> dict[str, TextTask]:
    """The tasks of a suite by name, without bits per byte.

    Args:
        suite: One of `SUITES`.
        haystack: Takes the place of what each task hides its needles in by default; tasks that need noise keep it.
        questions: JSON lines for RULER's questions, which are left out without it.

    Raises:
        ValueError: No such suite or haystack.
    """
    check_suite(suite)
    if haystack is not None:
        check_haystack(haystack)
    tasks: list[TextTask] = []
    if suite in ("recall", "all"):
        tasks += [*symbol_tasks(), phonebook_task(), passkey_task(haystack or NOISE)]
    if suite in ("ruler", "all"):
        tasks += [*needle_tasks(haystack or SENTENCES), *list_tasks(haystack or NOISE, questions)]
    if suite in ("babi", "all"):
        tasks += fact_tasks(haystack or SENTENCES)
    return {task.name: task for task in tasks}


def check_suite(suite: str) -> None:
    """Raise `ValueError` for a suite that does not exist."""
    if suite not in SUITES:
        raise ValueError(f"--suite: unknown {suite!r}, expected one of {list(SUITES)}")


def longest_allowed(found: Evaluated, beyond: int) -> int | None:
    """Tokens that the model may be given; `None` without a limit.

    Args:
        found: The model.
        beyond: How many times the trained length a user allows.

    Raises:
        ValueError: `beyond` is below 1, or more than the model can.
    """
    if beyond < 1:
        raise ValueError(f"--beyond: {beyond} must be at least 1")
    if beyond > 1 and found.has_position_table:
        raise ValueError(
            f"--beyond: {beyond} must be 1 for {found.name}: its table of positions ends at {found.trained_length}"
        )
    return None if found.trained_length is None else beyond * found.trained_length


def choose_lengths(found: Evaluated, lengths: Sequence[int] | None, beyond: int = 1) -> list[int]:
    """Lengths of texts: those asked for, or some that the model was trained for.

    Raises:
        ValueError: A length below 1, or over the longest that is allowed.
    """
    most = longest_allowed(found, beyond)
    if lengths is not None and not lengths:
        raise ValueError("--lengths: empty, expected numbers of tokens: 256,512")
    if lengths is None:
        return [length for length in LENGTHS if most is None or length <= most] or [int(most or LENGTHS[0])]
    allowed = "1 or more" if most is None else f"1 to {most}"
    for length in lengths:
        if length < 1 or (most is not None and length > most):
            table = "" if most is None else f" (max_position_embeddings of {found.name} is {found.trained_length})"
            way = (
                ""
                if length < 1 or found.has_position_table
                else "; --beyond FACTOR allows more than it was trained for"
            )
            raise ValueError(f"--lengths: {length} is not allowed, expected {allowed}{table}{way}")
    return sorted(set(lengths))


def choose_window_lengths(found: Evaluated, lengths: Sequence[int] | None) -> list[int]:
    """Lengths of windows for bits per byte: 1 to 32 times the trained length.

    Raises:
        ValueError: A length below 1, or over 32 times the trained one.
    """
    factor = 1 if found.has_position_table else FACTORS[-1]
    if lengths is not None:
        return choose_lengths(found, lengths, factor)
    base = found.trained_length or LENGTHS[0]
    found_lengths = [base * by for by in FACTORS if by <= factor and base * by <= LONGEST_BY_DEFAULT]
    return found_lengths or [min(base, LONGEST_BY_DEFAULT)]
