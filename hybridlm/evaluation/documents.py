"""Documents of a task as text, and as tokens that keep to a length.

A document is a context and the answer that goes on from it, so it can be scored by its likelihood and by generating.
Its length is counted in tokens of the model's own tokenizer, the answer included; what does not fit is refused.

Shapes: N rows, T tokens of a row.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridlm.data.recall import NO_LABEL

METRICS = ("starts", "all", "any", "first_sentence")


class DoesNotFit(ValueError):
    """Even the shortest document of a task is longer than the length asked for."""


@dataclass(frozen=True)
class TextDocument:
    """A question and its answer.

    Attributes:
        context: All text before the answer; it ends without a blank.
        answer: What follows, beginning with a blank.
        references: What a generated text must hold; by default the answer.
        metric: How a generated text is judged: it `starts` with the answer, holds `all` references (the share that it
            holds) or `any`, or has one in its `first_sentence`.
        chance: Of a guesser, that the whole answer is right.
        generated_chance: Of a guesser, under `metric`; by default `chance`.
        depths: Where the needles stand, from 0 to 1.
        candidates: What a guesser chooses from, where the text shows it.
    """

    context: str
    answer: str
    references: tuple[str, ...] = ()
    metric: str = "starts"
    chance: float = 0.0
    generated_chance: float | None = None
    depths: tuple[float, ...] = ()
    candidates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.context == self.context.rstrip() != "", "a context must end in a word"
        assert self.answer.startswith(" "), "an answer must begin with a blank"
        assert self.answer.strip(), "an answer must not be empty"
        assert self.metric in METRICS, self.metric
        if not self.references:
            object.__setattr__(self, "references", (self.answer.strip(),))
        if self.generated_chance is None:
            object.__setattr__(self, "generated_chance", self.chance)


Build = Callable[[np.random.Generator, int, float | None, int], TextDocument]


@dataclass(frozen=True)
class TextTask:
    """A family of documents that can be made for any length.

    Attributes:
        name: As the results name it.
        suite: It belongs to.
        build: Makes a document from a generator of random numbers, the number of units of filler, the depth of the
            needle and the length asked for. More units must give more tokens, and the rest must not depend on them.
        source: Where it comes from.
        haystack: Name of what surrounds the needles; `None` where the task has no filler of words.
        depths: Depths that documents take by turns; none where the task has no single needle.
        extra_tokens: Tokens that a generated answer may be longer than the reference.
    """

    name: str
    suite: str
    build: Build = field(repr=False)
    source: str
    haystack: str | None = None
    depths: tuple[float, ...] = ()
    extra_tokens: int = 0


@dataclass(frozen=True)
class TokenDocument:
    """A document as tokens.

    Attributes:
        text: The document.
        context_ids: Tokens of its context.
        answer_ids: Tokens of its answer.
        num_new: Tokens that a generated answer may have.
    """

    text: TextDocument
    context_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    num_new: int

    @property
    def num_tokens(self) -> int:
        """Tokens of context and answer, and those that a generated answer may have more."""
        return len(self.context_ids) + self.num_new

    @property
    def ids(self) -> list[int]:
        """Context and answer, `[T]`."""
        return [*self.context_ids, *self.answer_ids]

    @property
    def labels(self) -> list[int]:
        """The answer at its own place, `[T]`, -100 before."""
        return [NO_LABEL] * len(self.context_ids) + list(self.answer_ids)


def encode(text: TextDocument, tokenizer: Any, extra_tokens: int = 0) -> TokenDocument:
    """Cut a document into tokens: the whole at once, and the context is what it is without the answer.

    Raises:
        ValueError: A token lies across the border between context and answer.
    """
    whole = tokenizer(text.context + text.answer, verbose=False)["input_ids"]
    context = tokenizer(text.context, verbose=False)["input_ids"]
    if whole[: len(context)] != context or len(whole) == len(context):
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} has no token border before {text.answer[:20]!r}, where the answer "
            "begins; a tokenizer that begins words at a blank and adds nothing at the end has one"
        )
    answer = whole[len(context) :]
    return TokenDocument(text, tuple(context), tuple(answer), len(answer) + extra_tokens)


def document_rng(task: str, seed: int, index: int) -> np.random.Generator:
    """Random numbers of one document; its length has no part in them."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), index])


def make_document(task: TextTask, tokenizer: Any, length: int, *, seed: int, index: int = 0) -> TokenDocument:
    """The document number `index`, with about as much filler as fits.

    Args:
        task: The task.
        tokenizer: The model's.
        length: Tokens that it may have, answer included.
        seed: Of all documents.
        index: Its number, which also chooses its depth.

    Raises:
        DoesNotFit: Without any filler it is longer.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    depth = task.depths[index % len(task.depths)] if task.depths else None

    def of_size(size: int) -> TokenDocument:
        text = task.build(document_rng(task.name, seed, index), size, depth, length)
        return encode(text, tokenizer, task.extra_tokens)

    best, size, too_many = of_size(0), 0, None
    if best.num_tokens > length:
        raise DoesNotFit(
            f"{task.name}: the shortest prompt has {best.num_tokens} tokens with its answer, "
            f"length={length} is too short"
        )
    base, step = best.num_tokens, 1
    while too_many is None or too_many - size > 1:
        found = of_size(size + step)
        if found.text == best.text:
            break  # there is no more filler, as where questions come from a small file
        if found.num_tokens <= length:
            best, size = found, size + step
        else:
            too_many = size + step
        a_unit = max((found.num_tokens - base) / max(size, too_many or 0), 1.0)
        left = length - best.num_tokens
        if too_many is not None and left < a_unit / 2:
            break
        step = max(1, int(left / a_unit))
        if too_many is not None:
            step = min(step, max(1, too_many - size - 1))
    assert best.num_tokens <= length
    return best


def make_documents(task: TextTask, tokenizer: Any, length: int, num: int, *, seed: int) -> list[TokenDocument]:
    """The first `num` documents of a task at a length.

    Raises:
        DoesNotFit: One of them is too long.
    """
    return [make_document(task, tokenizer, length, seed=seed, index=index) for index in range(num)]


def batch(documents: Sequence[TokenDocument], pad_id: int = 0) -> dict[str, Tensor]:
    """Rows for training or scoring, padded on the right: `input_ids`, `labels` and `attention_mask`, each `[N, T]`."""
    longest = max(len(document.ids) for document in documents)
    fields = {"input_ids": pad_id, "labels": NO_LABEL, "attention_mask": 0}
    rows = {name: torch.full((len(documents), longest), value) for name, value in fields.items()}
    for row, document in enumerate(documents):
        count = len(document.ids)
        rows["input_ids"][row, :count] = torch.tensor(document.ids)
        rows["labels"][row, :count] = torch.tensor(document.labels)
        rows["attention_mask"][row, :count] = 1
    return rows
