"""Facts scattered in filler, and a question that needs one, two or three of them: BABILong's qa1-3 and qa5-8.

A small world of people, places and things is simulated; the story tells what happens in it. Answers that no symmetry of
the world makes even (yes or no, counts, lists) are drawn first, and a story that leads to them is looked for.

References: Weston et al. 2015, "Towards AI-Complete Question Answering", arXiv:1502.05698 (the tasks); Kuratov et al.
2024, "BABILong", arXiv:2406.10149 (scattered in filler).
Differs: the simulator, names and sentences are our own.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np

from .documents import TextDocument, TextTask
from .haystack import SENTENCES, hay, scatter
from .words import pick

PEOPLE = ("Anna", "Boris", "Clara", "David")
PLACES = ("attic", "bathroom", "cellar", "garage", "hallway", "kitchen")
THINGS = ("ball", "book", "cup")
COUNTS = ("none", "one", "two", "three")
LISTS = ("nothing", *THINGS, *(f"{one}, {two}" for one in THINGS for two in THINGS if one != two))
SOURCE = "BABILong, arXiv:2406.10149"


@dataclass
class World:
    """Who and what is where, and what was told of it.

    Attributes:
        rng: Random numbers.
        place_of: The place of each person who has moved.
        held: What each person carries, in the order of taking.
        visits: Places that each thing has been at, in order, without repeats.
        gifts: `(giver, thing, receiver)` in order.
        story: Sentences.
    """

    rng: np.random.Generator
    place_of: dict[str, str] = field(default_factory=dict)
    held: dict[str, list[str]] = field(default_factory=lambda: {person: [] for person in PEOPLE})
    visits: dict[str, list[str]] = field(default_factory=lambda: {thing: [] for thing in THINGS})
    gifts: list[tuple[str, str, str]] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    def move(self) -> None:
        """Someone goes to another place, with all that they carry."""
        person = pick(self.rng, PEOPLE)
        place = pick(self.rng, [place for place in PLACES if place != self.place_of.get(person)])
        self.place_of[person] = place
        for thing in self.held[person]:
            self.visits[thing].append(place)
        self.story.append(f"{person} went to the {place}.")

    def take(self) -> None:
        """Someone whose place is known takes a thing that lies there, or that nobody has seen yet."""
        for person in self._shuffled([person for person in PEOPLE if person in self.place_of]):
            here = self.place_of[person]
            carried = {thing for things in self.held.values() for thing in things}
            free = [thing for thing in THINGS if thing not in carried and self.visits[thing][-1:] in ([], [here])]
            if free:
                thing = pick(self.rng, free)
                self.held[person].append(thing)
                if not self.visits[thing]:
                    self.visits[thing].append(here)
                self.story.append(f"{person} took the {thing}.")
                return
        self.move()

    def drop(self) -> None:
        """Someone leaves a thing where they are."""
        for person in self._shuffled([person for person in PEOPLE if self.held[person]]):
            thing = pick(self.rng, self.held[person])
            self.held[person].remove(thing)
            self.story.append(f"{person} dropped the {thing}.")
            return
        self.take()

    def give(self) -> None:
        """Someone gives a thing that they carry to another."""
        for person in self._shuffled([person for person in PEOPLE if self.held[person]]):
            thing = pick(self.rng, self.held[person])
            other = pick(self.rng, [name for name in PEOPLE if name != person])
            self.held[person].remove(thing)
            self.held[other].append(thing)
            self.gifts.append((person, thing, other))
            self.story.append(f"{person} gave the {thing} to {other}.")
            return
        self.take()

    def _shuffled(self, names: list[str]) -> list[str]:
        return [names[index] for index in self.rng.permutation(len(names))]


@dataclass(frozen=True)
class Question:
    """What is asked about a world.

    Attributes:
        text: The question.
        answer: Its answer.
        candidates: What a guesser chooses from.
    """

    text: str
    answer: str
    candidates: tuple[str, ...]


def _live(world: World, num_events: int, kinds: str) -> None:
    events = {"m": world.move, "t": world.take, "d": world.drop, "g": world.give}
    for _ in range(num_events):
        events[pick(world.rng, list(kinds))]()


def _told_places(world: World) -> tuple[str, ...]:
    return tuple(place for place in PLACES if any(place in sentence for sentence in world.story))


def one_fact(world: World) -> Question | None:
    """qa1: where is a person?"""
    _live(world, int(world.rng.integers(4, 8)), "m")
    person = pick(world.rng, [person for person in PEOPLE if person in world.place_of])
    return Question(f"Where is {person}?", world.place_of[person], _told_places(world))


def two_facts(world: World) -> Question | None:
    """qa2: where is a thing, which its bearer took along?"""
    _live(world, int(world.rng.integers(5, 9)), "mmtd")
    moved = [thing for thing in THINGS if len(world.visits[thing]) > 1]
    if not moved:
        return None
    thing = pick(world.rng, moved)
    return Question(f"Where is the {thing}?", world.visits[thing][-1], _told_places(world))


def three_facts(world: World) -> Question | None:
    """qa3: where was a thing before it came to a place?"""
    _live(world, int(world.rng.integers(6, 11)), "mmmtd")
    choices = []
    for thing, visits in world.visits.items():
        # the place must have been reached once, or the question has several answers
        last = [place for place in range(1, len(visits)) if visits.count(visits[place]) == 1]
        choices += [(thing, visits[place], visits[place - 1]) for place in last]
    if not choices:
        return None
    thing, place, before = choices[int(world.rng.integers(len(choices)))]
    others = tuple(name for name in _told_places(world) if name != place)
    return Question(f"Where was the {thing} before the {place}?", before, others)


def three_arguments(world: World) -> Question | None:
    """qa5: who gave what to whom?"""
    _live(world, int(world.rng.integers(5, 9)), "mtgg")
    once = [gift for gift in world.gifts if sum(gift[:2] == other[:2] for other in world.gifts) == 1]
    once = [gift for gift in once if sum(gift[1:] == other[1:] for other in world.gifts) == 1]
    if not once:
        return None
    giver, thing, receiver = once[int(world.rng.integers(len(once)))]
    told = " ".join(world.story)
    if world.rng.integers(2):
        people = tuple(person for person in PEOPLE if person in told and person != giver)
        return Question(f"To whom did {giver} give the {thing}?", receiver, people)
    people = tuple(person for person in PEOPLE if person in told and person != receiver)
    return Question(f"Who gave the {thing} to {receiver}?", giver, people)


def yes_or_no(world: World) -> Question | None:
    """qa6: is a person at a place?"""
    _live(world, int(world.rng.integers(4, 8)), "m")
    person = pick(world.rng, [person for person in PEOPLE if person in world.place_of])
    place = pick(world.rng, _told_places(world))
    answer = "yes" if world.place_of[person] == place else "no"
    return Question(f"Is {person} in the {place}?", answer, ("yes", "no"))


def counting(world: World) -> Question | None:
    """qa7: how many things does a person carry?"""
    _live(world, int(world.rng.integers(5, 10)), "mtttdg")
    person = pick(world.rng, [person for person in PEOPLE if person in " ".join(world.story)])
    return Question(f"How many things does {person} carry?", COUNTS[len(world.held[person])], COUNTS)


def lists(world: World) -> Question | None:
    """qa8: which things does a person carry, in the order of taking, at most two?"""
    _live(world, int(world.rng.integers(5, 10)), "mtttdg")
    person = pick(world.rng, [person for person in PEOPLE if person in " ".join(world.story)])
    if len(world.held[person]) > 2:
        return None
    answer = ", ".join(world.held[person]) or "nothing"
    return Question(f"Which things does {person} carry?", answer, LISTS)


QUESTIONS = {
    "qa1": one_fact,
    "qa2": two_facts,
    "qa3": three_facts,
    "qa5": three_arguments,
    "qa6": yes_or_no,
    "qa7": counting,
    "qa8": lists,
}
# answers that do not follow from a symmetry of the world: one is drawn before the story
_DRAWN = {"qa6": ("yes", "no"), "qa7": COUNTS, "qa8": LISTS}


def tell(name: str, rng: np.random.Generator) -> tuple[list[str], Question]:
    """A story and a question about it.

    Args:
        name: `qa1`, `qa2`, `qa3`, `qa5`, `qa6`, `qa7` or `qa8`.
        rng: Random numbers.
    """
    wanted = pick(rng, _DRAWN[name]) if name in _DRAWN else None
    for _ in range(100_000):
        world = World(rng)
        question = QUESTIONS[name](world)
        if question is not None and wanted in (None, question.answer):
            return world.story, question
    raise AssertionError(f"{name}: no story leads to {wanted!r}")


def build_facts(
    name: str, haystack: str, rng: np.random.Generator, size: int, depth: float | None, length: int
) -> TextDocument:
    """A story whose sentences stand among `size` sentences of filler, in their order."""
    story, question = tell(name, rng)
    places = sorted(rng.random(len(story)).tolist())
    text = scatter(list(islice(hay(haystack, rng), size)), story, places)
    context = f"{' '.join(text)}\nQuestion: {question.text}\nAnswer:"
    return TextDocument(
        context,
        f" {question.answer}",
        metric="first_sentence",
        chance=1 / len(question.candidates),
        depths=tuple(places),
        candidates=question.candidates,
    )


def fact_tasks(haystack: str = SENTENCES) -> list[TextTask]:
    """The seven tasks."""
    return [
        TextTask(f"babi_{name}", "babi", partial(build_facts, name, haystack), SOURCE, haystack, (), 4)
        for name in QUESTIONS
    ]
