"""Words of our own, and sentences, names and numbers made of them."""

from collections.abc import Callable, Sequence

import numpy as np


def _split(*lines: str) -> tuple[str, ...]:
    return tuple(word for line in lines for word in line.split())


ADJECTIVES = _split(
    "amber ancient brave brief bright broad bronze calm careful clever coastal copper cosy crisp curious damp dark",
    "deep distant dusty eager early empty even faint famous fresh frosty gentle golden grand green hidden hollow",
    "honest humble icy idle ivory jolly keen kind late lazy light little lonely loud lucky mellow mild misty modest",
    "narrow neat noble northern old open orange pale patient plain proud purple quick quiet rapid rare red rocky",
    "round rusty sandy secret shy silent silver simple slow small smooth soft steady stone strange striped sunny",
    "swift tall tame tidy tiny warm western wide wild windy wise wooden yellow young",
)
NOUNS = _split(
    "anchor apple arrow basket beacon bell bench bird blanket boat bottle branch bridge brook bucket button cabin",
    "candle canyon castle cedar chimney circle cloud comet cradle crane creek crown curtain desert dune eagle engine",
    "falcon farmer feather fence ferry field finger flag flute forest fountain fox glacier glove grove hammer harbour",
    "hawk hedge heron hill horse island jacket kettle ladder lagoon lantern leaf lemon lighthouse lizard maple",
    "market meadow mill mirror monkey moon mountain needle oak orchard otter owl painter paper peach pebble pencil",
    "pepper pilot pine planet pocket pond poplar quarry rabbit raven ribbon ridge river robin sailor saddle",
    "shadow shell shepherd signal sparrow spoon spring spruce squirrel star stream summit teapot temple thunder",
    "tiger tower trail tunnel turtle valley velvet village violin wagon walnut weaver whale willow window winter",
)
VERBS = _split(
    "admires answers borrows carries changes circles copies covers crosses describes draws escapes faces fears",
    "follows forgets greets guards guides hears helps hides holds honours ignores imitates invites joins keeps",
    "leaves lifts likes meets mends misses moves needs notices orders paints passes praises protects pulls pushes",
    "reaches recalls repairs replaces respects returns saves seeks sees shelters shows startles supports surprises",
    "teaches trusts visits wakes warns watches welcomes",
)
ADVERBS = _split(
    "again alone always gladly hardly indoors loudly never often outdoors quietly rarely slowly soon today",
)
FIRST_NAMES = _split(
    "Ada Alma Anton Basil Bea Carla Cyril Dora Edgar Elsa Emil Fay Felix Flora Gus Hanna Hugo Ida Igor Iris Jonas",
    "June Karl Kira Lars Lena Leo Lola Marta Max Mina Nils Nora Olga Oscar Otto Paul Petra Rita Rosa Rufus Sara Theo",
    "Tilda Ugo Vera Viktor Wanda Xenia Yara Zeno Zoe",
)
LAST_NAMES = _split(
    "Abel Arden Bloom Brandt Carver Cole Dale Drake Ellis Engel Fisk Frost Gale Grove Hart Holm Ingram Jarvis Keller",
    "Kern Lang Lind Marsh Moss Nash Noble Oakes Olsen Page Pike Quinn Reed Ross Sand Stone Tate Thorne Ulrich Vale",
    "Voss Wade West Yates York Zander",
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    """One of the words."""
    return words[int(rng.integers(len(words)))]


def sentence(rng: np.random.Generator) -> str:
    """A sentence of four to ten words that says nothing of use."""
    subject = f"The {pick(rng, ADJECTIVES)} {pick(rng, NOUNS)} {pick(rng, VERBS)}"
    kind = int(rng.integers(3))
    if kind == 0:
        return f"{subject} the {pick(rng, NOUNS)}."
    if kind == 1:
        return f"{subject} the {pick(rng, ADJECTIVES)} {pick(rng, NOUNS)} {pick(rng, ADVERBS)}."
    return f"{subject} a {pick(rng, NOUNS)} near the {pick(rng, ADJECTIVES)} {pick(rng, NOUNS)}."


def pseudo_word(rng: np.random.Generator, num_letters: int) -> str:
    """Letters that can be spoken: consonants and vowels by turns."""
    return "".join(pick(rng, (_CONSONANTS, _VOWELS)[i % 2]) for i in range(num_letters))


def distinct(rng: np.random.Generator, make: Callable[[np.random.Generator], str], count: int) -> list[str]:
    """`count` different results of `make(rng)`, in the order in which they came.

    The first n are the same for every count.
    """
    found: dict[str, None] = {}
    for _ in range(1000 * (count + 1)):
        if len(found) == count:
            return list(found)
        found[make(rng)] = None
    raise ValueError(f"{count} different ones were asked for, and there are only about {len(found)}")


def key_name(rng: np.random.Generator) -> str:
    """A name for a thing: two words with a hyphen."""
    return f"{pick(rng, ADJECTIVES)}-{pick(rng, NOUNS)}"


def number(rng: np.random.Generator, num_digits: int = 7) -> str:
    """A number of so many digits that does not begin with 0."""
    return str(int(rng.integers(10 ** (num_digits - 1), 10**num_digits)))


def num_numbers(num_digits: int = 7) -> int:
    """How many numbers `number` draws from."""
    return 9 * 10 ** (num_digits - 1)


def hex_code(rng: np.random.Generator) -> str:
    """128 random bits, written like a UUID."""
    digits = rng.bytes(16).hex()
    return "-".join(digits[start:stop] for start, stop in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


def person(rng: np.random.Generator) -> str:
    """First and last name."""
    return f"{pick(rng, FIRST_NAMES)} {pick(rng, LAST_NAMES)}"


def joined(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
