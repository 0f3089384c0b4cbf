"""Train a model from a run file, or with the parts one by one."""

from .bits_per_byte import HeldoutScore, evaluate_bits_per_byte
from .callbacks import SelectionBiasCallback
from .command import train
from .job import build_model, run
from .ngram import WittenBell
from .parameter_groups import decayed_parameter_names, parameter_groups
from .report import summarize
from .run_file import RunFile, load_run_file
from .trainer import CheckpointError, EpochSampler, HybridTrainer

__all__ = [
    "CheckpointError",
    "EpochSampler",
    "HeldoutScore",
    "HybridTrainer",
    "RunFile",
    "SelectionBiasCallback",
    "WittenBell",
    "build_model",
    "decayed_parameter_names",
    "evaluate_bits_per_byte",
    "load_run_file",
    "parameter_groups",
    "run",
    "summarize",
    "train",
]
