"""Needles in a haystack as text: RULER's eight, the passkey, the phonebook.

References: Hsieh et al. 2024, "RULER", arXiv:2404.06654; Mohtashami and Jaggi 2023, arXiv:2305.16300 (passkey); Jelassi
et al. 2024, "Repeat After Me", arXiv:2402.01032 (phonebook).
Differs: words, sentences and haystacks are our own; the instruction is short, so that a few hundred bytes hold it.
"""

from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from .chance import found_chance, ordered_chance
from .documents import TextDocument, TextTask
from .haystack import NOISE, SENTENCES, hay, scatter
from .words import distinct, hex_code, joined, key_name, num_numbers, number, person

NEEDLES = "needles"  # a haystack that is made of other needles
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAKERS = {"words": key_name, "number": number, "code": hex_code}
_PLURALS = {"number": "numbers", "code": "codes"}


@dataclass(frozen=True)
class NeedleForm:
    """One of RULER's needle tasks.

    Attributes:
        haystack: `noise`, `needles`, or `sentences`, which the user may replace.
        num_keys: Needles that are told apart by their key; the haystack of needles has as many as fit.
        num_values: Values a key.
        num_queries: Keys that are asked for.
        key: `words` or `code`.
        value: `number` or `code`.
    """

    haystack: str = SENTENCES
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    key: str = "words"
    value: str = "number"


FORMS = {
    "niah_single_1": NeedleForm(haystack=NOISE),
    "niah_single_2": NeedleForm(),
    "niah_single_3": NeedleForm(value="code"),
    "niah_multikey_1": NeedleForm(num_keys=4),
    "niah_multikey_2": NeedleForm(haystack=NEEDLES),
    "niah_multikey_3": NeedleForm(haystack=NEEDLES, key="code", value="code"),
    "niah_multivalue": NeedleForm(num_values=4),
    "niah_multiquery": NeedleForm(num_keys=4, num_queries=4),
}


def build_needles(
    form: NeedleForm, haystack: str, rng: np.random.Generator, size: int, depth: float | None, length: int
) -> TextDocument:
    """A text with needles `The secret number of KEY is VALUE.`, and the question for one or several of them.

    Args:
        form: What is hidden and asked for.
        haystack: What it is hidden in.
        rng: Random numbers.
        size: Sentences, or other needles, around.
        depth: Of a single needle; several stand anywhere.
        length: Unused: needles are the same at every length.
    """
    noun, of_others = form.value, form.haystack == NEEDLES
    count = size + 1 if of_others else form.num_keys
    make_key, make_value = _MAKERS[form.key], _MAKERS[form.value]
    places = rng.random(form.num_keys * form.num_values).tolist()
    if depth is not None:
        places[0] = depth
    asked_places = rng.random(form.num_queries)
    streams = rng.spawn(3)  # so that one more key does not change the values, nor one more value the hay
    keys = distinct(streams[0], make_key, count)
    values = distinct(streams[1], make_value, count * form.num_values)
    by_key = {key: values[i * form.num_values : (i + 1) * form.num_values] for i, key in enumerate(keys)}
    # the first keys are asked for: the order in which needles stand is drawn apart
    asked = keys[: form.num_queries]
    needles = [(key, value) for key in keys for value in by_key[key]]
    said = {pair: f"The secret {noun} of {pair[0]} is {pair[1]}." for pair in needles}
    if of_others:
        place = round((places[0] if depth is None else depth) * size)
        order = [*needles[1 : place + 1], needles[0], *needles[place + 1 :]]
        text = [said[pair] for pair in order]
    else:
        order = [needles[index] for _, index in sorted((place, index) for index, place in enumerate(places))]
        units = list(islice(hay(haystack, streams[2]), size))
        text = scatter(units, [said[pair] for pair in needles], places)
    asked = [asked[index] for index in np.argsort(asked_places)]
    answers = [value for key in asked for pair_key, value in order if pair_key == key]
    several, shown = len(answers) > 1, len(needles)
    subject = f"The secret {_PLURALS[noun] if several else noun} of {joined(asked)} {'are' if several else 'is'}"
    context = f"Remember every secret {noun} in this text.\n{' '.join(text)}\n{subject}"
    possible = 2.0**128 if form.value == "code" else float(num_numbers())
    return TextDocument(
        context,
        f" {', '.join(answers)}",
        references=tuple(answers),
        metric="all",
        chance=ordered_chance(shown, len(answers), possible),
        generated_chance=found_chance(shown, len(answers), possible),
        depths=(depth,) if depth is not None else tuple(places),
        candidates=tuple(value for _, value in needles),
    )


def build_passkey(haystack: str, rng: np.random.Generator, size: int, depth: float | None, length: int) -> TextDocument:
    """A pass key of five digits, said twice at its place, and asked for at the end."""
    key = number(rng, 5)
    units = list(islice(hay(haystack, rng), size))
    place = 0.5 if depth is None else depth
    text = scatter(units, [f"The pass key is {key}. Remember it: {key} is the pass key."], [place])
    context = f"There is a pass key in this text.\n{' '.join(text)}\nThe pass key is"
    return TextDocument(context, f" {key}", chance=1 / num_numbers(5), depths=(place,), candidates=(key,))


def build_phonebook(rng: np.random.Generator, size: int, depth: float | None, length: int) -> TextDocument:
    """Lines `NAME: NUMBER`, two of them asked and answered, and a third one to answer.

    Differs: numbers have seven digits without an area code.
    """
    streams = rng.spawn(3)
    names = distinct(streams[0], person, size + 3)
    numbers = distinct(streams[1], number, size + 3)
    asked, shots = 0, (1, 2)  # their places among the others are drawn
    entries = [f"{name}: {digits}" for name, digits in zip(names, numbers, strict=True)]
    place = float(streams[2].random()) if depth is None else depth
    others = scatter(entries[3:], [entries[shot] for shot in shots], streams[2].random(2).tolist())
    index = round(place * len(others))
    lines = [*others[:index], entries[asked], *others[index:]]
    example = "\n".join(entries[shot] for shot in shots)
    context = f"Phone book:\n{chr(10).join(lines)}\nLook up:\n{example}\n{names[asked]}:"
    chance = ordered_chance(size + 3, 1, num_numbers())
    candidates = tuple(numbers)
    return TextDocument(context, f" {numbers[asked]}", chance=chance, depths=(place,), candidates=candidates)


def needle_tasks(haystack: str = SENTENCES) -> list[TextTask]:
    """RULER's needle tasks.

    Args:
        haystack: Takes the place of RULER's essays.
    """
    tasks = []
    for name, form in FORMS.items():
        around = haystack if form.haystack == SENTENCES else form.haystack
        depths = DEPTHS if form.num_keys * form.num_values == 1 else ()
        build = partial(build_needles, form, around)
        source = "RULER, arXiv:2404.06654"
        # several answers may be generated with other words between them
        extra = 0 if form.num_values * form.num_queries == 1 else 16
        tasks.append(TextTask(name, "ruler", build, source, around, depths, extra))
    return tasks


def passkey_task(haystack: str = NOISE) -> TextTask:
    """The passkey in a text."""
    build = partial(build_passkey, haystack)
    return TextTask("passkey", "recall", build, "arXiv:2305.16300", haystack, DEPTHS)


def phonebook_task() -> TextTask:
    """The phonebook."""
    return TextTask("phonebook", "recall", build_phonebook, "Repeat After Me, arXiv:2402.01032", None, DEPTHS)
