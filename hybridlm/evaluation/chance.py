"""What guessing scores, and whether a score is better than that.

The guesser knows the form of the answer and, where the text shows several candidates, which they are; not which of them
is asked for. Where the text shows a single candidate, or no form can be known, it draws from all possible answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NUM_ERRORS = 3  # standard errors above chance that count as above


def ordered_chance(num_shown: int, num_asked: int, num_possible: float) -> float:
    """Chance that different candidates, taken at random, are those asked for, in their order.

    Args:
        num_shown: Candidates that the text shows.
        num_asked: How many make up the answer.
        num_possible: Answers that are possible where only one candidate is shown.
    """
    if num_shown == 1:
        return 1 / num_possible
    return 1 / math.perm(num_shown, num_asked)


def found_chance(num_shown: int, num_asked: int, num_possible: float) -> float:
    """Expected share of the answers among as many guesses, each drawn from the candidates shown."""
    if num_shown == 1:
        return 1 / num_possible
    return 1 - (1 - 1 / num_shown) ** num_asked


def copy_chance(num_shown: float, num_values: int) -> float:
    """Chance that the value of one of the keys shown is right: the key may be right, or its value by luck."""
    return 1 / num_shown + (1 - 1 / num_shown) / num_values


@dataclass(frozen=True)
class Estimate:
    """A mean over documents, beside what guessing gets.

    Attributes:
        score: Mean.
        error: Its standard error; `None` from a single document.
        chance: Mean of the documents' chances.
        num: Documents.
    """

    score: float
    error: float | None
    chance: float
    num: int

    @property
    def above_chance(self) -> bool:
        """Whether the score is more than three standard errors above chance.

        The error is at least that of a guesser, so that two lucky answers, which have no spread, are not enough.
        """
        of_guesser = math.sqrt(max(self.chance * (1 - self.chance), 0.0) / self.num)
        return self.error is not None and self.score > self.chance + NUM_ERRORS * max(self.error, of_guesser)

    def to_dict(self) -> dict[str, float | int | bool | None]:
        """JSON-able; rounded, so that equal runs give equal files."""
        error = None if self.error is None else round(self.error, 6)
        values = {"score": round(self.score, 6), "error": error, "chance": float(f"{self.chance:.6g}")}
        return values | {"num": self.num, "above_chance": self.above_chance}


def estimate(scores: Sequence[float], chances: Sequence[float]) -> Estimate:
    """Mean and standard error of scores, one a document.

    Raises:
        ValueError: There are no scores.
    """
    if not scores:
        raise ValueError("there is no document to score")
    count, mean = len(scores), math.fsum(scores) / len(scores)
    error = None
    if count > 1:
        error = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (count - 1) / count)
    return Estimate(mean, error, math.fsum(chances) / len(chances), count)
