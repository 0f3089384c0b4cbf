"""Train several small architectures on one synthetic task, and say which learns it, how fast, and how far."""

from .file import Race
from .load import load_race, race_names
from .race import run_race

__all__ = ["Race", "load_race", "race_names", "run_race"]
