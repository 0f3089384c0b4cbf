"""RULER's other families as text: variable tracking, common words, frequent words, and questions from a local file.

Reference: Hsieh et al. 2024, "RULER", arXiv:2404.06654.
Differs: words are our own; variable tracking gives no worked example, which a few hundred bytes would not hold; below
1024 tokens there are 5 common words, 3 times each, and below 2048 coded words have 3 letters; answers have an order, so
that they can be scored by likelihood: the order of the text, and for frequent words that of their counts.
"""

import json
import math
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np

from .chance import found_chance, ordered_chance
from .documents import TextDocument, TextTask
from .haystack import NOISE, hay, scatter
from .words import distinct, number, pseudo_word

SOURCE = "RULER, arXiv:2404.06654"
SHORT = 1024  # tokens below which lists are smaller
_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def build_variables(
    haystack: str, rng: np.random.Generator, size: int, depth: float | None, length: int, *, num_chains: int = 1,
    num_hops: int = 4,
) -> TextDocument:  # fmt: skip
    """Chains `VAR A = 12345.`, `VAR B = VAR A.`, in filler: which variables hold the number of the first chain?

    Args:
        haystack: What the assignments stand in.
        rng: Random numbers.
        size: Sentences around.
        depth: Unused: assignments stand anywhere, in their order.
        length: Unused.
        num_chains: Numbers that are handed on.
        num_hops: Variables a chain has beside its first.
    """

    def name(generator: np.random.Generator) -> str:
        return "".join(_CAPITALS[i] for i in generator.integers(0, len(_CAPITALS), 5))

    names = distinct(rng, name, num_chains * (num_hops + 1))
    values = distinct(rng, partial(number, num_digits=5), num_chains)
    chains = [names[start : start + num_hops + 1] for start in range(0, len(names), num_hops + 1)]
    lines, places = [], []
    for chain, value in zip(chains, values, strict=True):
        sources = [value, *(f"VAR {source}" for source in chain)]
        lines += [f"VAR {target} = {source}." for target, source in zip(chain, sources, strict=False)]
        places += sorted(rng.random(len(chain)).tolist())
    text = scatter(list(islice(hay(haystack, rng), size)), lines, places)
    context = f"Track which variable holds which number.\n{' '.join(text)}\nThe variables that hold {values[0]} are"
    answers, shown = chains[0], len(names)
    return TextDocument(
        context,
        f" {' '.join(answers)}",
        references=tuple(answers),
        metric="all",
        chance=ordered_chance(shown, len(answers), 26.0**5),
        generated_chance=found_chance(shown, len(answers), 26.0**5),
        depths=tuple(places),
        candidates=tuple(names),
    )


def build_common_words(rng: np.random.Generator, size: int, depth: float | None, length: int) -> TextDocument:
    """A numbered list in which some words stand several times: which are they?"""
    num_common, common_times, other_times = (10, 30, 3) if length >= 4 * SHORT else (10, 6, 1)
    if length < SHORT:
        num_common, common_times = 5, 3
    streams = rng.spawn(2)
    words = distinct(streams[0], lambda generator: pseudo_word(generator, 5), num_common + 1 + size)
    common = words[:num_common]
    entries = [*common * common_times, *words[num_common:] * other_times]
    order = streams[1].permutation(len(entries))
    entries = [entries[index] for index in order]
    text = " ".join(f"{index + 1}. {word}" for index, word in enumerate(entries))
    answers = sorted(common, key=entries.index)
    context = f"Some words stand in this list more often than the others.\n{text}\nThe {num_common} words are"
    return TextDocument(
        context,
        f" {' '.join(answers)}",
        references=tuple(answers),
        metric="all",
        chance=ordered_chance(len(words), num_common, math.inf),
        generated_chance=found_chance(len(words), num_common, math.inf),
        candidates=tuple(words),
    )


def build_frequent_words(
    rng: np.random.Generator, size: int, depth: float | None, length: int, *, alpha: float = 2.0
) -> TextDocument:
    """Coded words whose counts fall as their rank to the power -alpha; the first rank is dots. Which three come next?

    Args:
        rng: Random numbers.
        size: Words more than the least that tells four ranks apart.
        depth: Unused.
        length: Tokens; short texts have short words.
        alpha: Of the zeta distribution.
    """
    total = _least_words(alpha) + size
    counts = _zipf_counts(total, alpha)
    streams = rng.spawn(2)
    letters = 6 if length >= 2 * SHORT else 3
    words = ["...", *distinct(streams[0], lambda generator: pseudo_word(generator, letters), len(counts) - 1)]
    entries = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    text = " ".join(entries[index] for index in streams[1].permutation(len(entries)))
    context = f"Count the words and leave out dots.\n{text}\nThe three most frequent words are"
    answers, shown = words[1:4], len(words) - 1
    return TextDocument(
        context,
        f" {' '.join(answers)}",
        references=tuple(answers),
        metric="all",
        chance=ordered_chance(shown, 3, math.inf),
        generated_chance=found_chance(shown, 3, math.inf),
        candidates=tuple(words[1:]),
    )


@cache
def _zeta(alpha: float) -> float:
    return math.fsum(rank**-alpha for rank in range(1, 10_000))


def _zipf_counts(total: int, alpha: float) -> list[int]:
    """How often the words of each rank stand, in all `total`; the tail of the distribution is words that stand once."""
    counts = [int(total * rank**-alpha / _zeta(alpha)) for rank in range(1, max(total // 20, 5) + 1)]
    counts = [count for count in counts if count]
    return [*counts, *[1] * (total - sum(counts))]


@cache
def _least_words(alpha: float) -> int:
    """The smallest text in which the ranks 2 to 5 have counts of their own."""
    for total in range(10, 100_000):
        # more words must not bring them together again
        ahead = [_zipf_counts(more, alpha)[1:5] for more in range(total, total + 60)]
        if all(len(set(counts)) == 4 for counts in ahead):
            return total
    raise ValueError(f"alpha={alpha} must let counts fall")


def read_questions(path: str | Path) -> list[dict]:
    """Questions of a JSON-lines file: `question`, `answers` (a list) and `paragraphs` (the first holds the answer).

    Raises:
        ValueError: The file has none, or a line lacks a field.
    """
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    questions = []
    for index, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            good = row["question"].strip() and all(row["answers"]) and row["answers"] and row["paragraphs"][0].strip()
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"qa: {path}, line {index}: expected question, answers and paragraphs: {error}") from error
        if not good:
            raise ValueError(f"qa: {path}, line {index}: question, answers and paragraphs must not be empty")
        questions.append(row)
    if not questions:
        raise ValueError(f"qa: {path} holds no question")
    return questions


def build_question(
    questions: list[dict], rng: np.random.Generator, size: int, depth: float | None, length: int
) -> TextDocument:
    """A question among `size` paragraphs that belong to other questions, and those of its own.

    No chance is known: 0.
    """
    streams = rng.spawn(2)
    index = int(streams[0].integers(len(questions)))
    asked = questions[index]
    own = list(dict.fromkeys(" ".join(paragraph.split()) for paragraph in asked["paragraphs"]))
    others = [" ".join(p.split()) for number, row in enumerate(questions) if number != index for p in row["paragraphs"]]
    others = [paragraph for paragraph in dict.fromkeys(others) if paragraph not in own]
    chosen = [others[number] for number in streams[1].permutation(len(others))[:size]]
    place = 0.5 if depth is None else depth
    text = scatter(chosen, own, [place] * len(own))
    question = " ".join(asked["question"].split())
    context = f"{chr(10).join(text)}\nQuestion: {question}\nAnswer:"
    references = tuple(asked["answers"])
    return TextDocument(context, f" {references[0]}", references=references, metric="any", depths=(place,))


def list_tasks(haystack: str = NOISE, questions: str | Path | None = None) -> list[TextTask]:
    """Variable tracking, common and frequent words; questions where a file of them is given."""
    tasks = [
        TextTask("variable_tracking", "ruler", partial(build_variables, haystack), SOURCE, haystack, (), 16),
        TextTask("common_words", "ruler", build_common_words, SOURCE, extra_tokens=16),
        TextTask("frequent_words", "ruler", build_frequent_words, SOURCE, extra_tokens=16),
    ]
    if questions is not None:
        build = partial(build_question, read_questions(questions))
        tasks.append(TextTask("questions", "ruler", build, SOURCE, "paragraphs", (0.0, 0.5, 1.0), 16))
    return tasks
