"""The command behind `train.py` and `hybridlm train`: run, report, and say by the exit status how it went."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import transformers

from .job import run
from .report import summarize

CHATTY = ("datasets", "httpx", "httpx2", "huggingface_hub")


def train(source: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> None:
    """Run a run file and write what was measured to the standard output.

    Args:
        source: Path or name of a run file.
        overrides: Settings that replace the file's, such as `training.max_steps=5`.
        resume: Go on from the last checkpoint.

    Raises:
        SystemExit: With status 1, when a demand of the run file was not met.
        FileNotFoundError, ValueError, CheckpointError: As `run` does.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results = run(source, resume=resume, overrides=list(overrides))
    if results:
        sys.stdout.write(summarize(results) + "\n")
        if results["failures"]:
            raise SystemExit(1)
