"""Runs of a comparison: every arm with every seed, each a file that is there whole or not at all, in processes.

A finished run is used again as long as the hash of what it depends on is the same; so a comparison that was killed goes
on where it was. Processes have one thread each, and end when their parent does.
"""

import json
import logging
import math
import os
import platform
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import transformers

import hybridlm
from hybridlm.analysis.machine import processor_name

from .chance import NUM_ERRORS
from .runner import write_whole

# one thread, and threads that wait do not spin; read when torch is imported
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

Run = dict[str, Any]
Finish = Callable[[str, int], Run]


def set_up_logging(logger: logging.Logger) -> None:
    """Lines with the time; several processes write them, so a bar would be torn."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO)


def finish_run(run: Callable[[], Run], path: Path, run_hash: str, about: str, logger: logging.Logger) -> Run:
    """Give a finished run from its file, or run it and write the file.

    Args:
        run: Runs it; its result holds `hash`.
        path: The file.
        run_hash: What the file's `hash` must be.
        about: The run's name in the log.
        logger: Of the comparison.
    """
    set_up_logging(logger)
    transformers.logging.set_verbosity_error()
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["hash"] == run_hash:
            logger.info("%s: finished before", about)
            return result
    result = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, separators=(",", ":")) + "\n")
    return result


def run_all(finish: Finish, arms: Sequence[str], seeds: int, jobs: int, logger: logging.Logger) -> list[Run]:
    """Run every arm with every seed, seed after seed, in processes of one thread.

    Args:
        finish: Finishes the run of an arm and a seed; it goes to the processes, so it must be a function of a module.
        arms: Names.
        seeds: How many; they are 0, 1, ...
        jobs: Processes.
        logger: Told after each run.

    Returns:
        The runs, arm after arm.

    Raises:
        ChildProcessError: A process was killed.
    """
    todo = [(arm, seed) for seed in range(seeds) for arm in arms]
    results: dict[tuple[str, int], Run] = {}
    started = time.perf_counter()
    with _environment(ONE_THREAD), ProcessPoolExecutor(jobs, get_context("spawn"), _end_with_parent) as pool:
        futures = {pool.submit(finish, arm, seed): (arm, seed) for arm, seed in todo}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                logger.info("%d of %d runs, %.0f s", len(results), len(todo), time.perf_counter() - started)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"runs: a process was killed, with {len(results)} of {len(todo)} runs finished (too little memory?); "
                "these are kept, and the same command goes on"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [results[arm, seed] for arm in arms for seed in range(seeds)]


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _end_with_parent() -> None:
    """End this process when its parent does, however that ends: nobody is left to take its result."""
    parent = parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def describe_machine(jobs: int) -> dict[str, Any]:
    """What figures of time, and the last digits of all others, depend on."""
    return {
        "processor": processor_name(),
        "processes": jobs,
        "threads_per_process": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hybridlm": hybridlm.__version__,
    }


def write_results(path: Path, results: dict[str, Any], runs: Sequence[Run]) -> None:
    """Write results with their runs under `runs`, a line each."""
    lines = ",\n  ".join(json.dumps(run, separators=(",", ":")) for run in runs)
    text = json.dumps(results, indent=1)[:-2] + f',\n "runs": [\n  {lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def check_arguments(
    parser: ArgumentParser, args: Namespace, arms: Sequence[str], quick_arms: Sequence[str], all_arms: Sequence[str]
) -> None:
    """Check what a comparison's command line says, and put defaults in place.

    Args:
        parser: Told what is wrong.
        args: With `arms`, `seeds`, `jobs`, `quick` and `out`.
        arms: Names that are known.
        quick_arms: What `--quick` runs.
        all_arms: What is run without it.
    """
    args.arms = args.arms.split(",") if args.arms else list(quick_arms if args.quick else all_arms)
    args.seeds = (1 if args.quick else 3) if args.seeds is None else args.seeds
    for arm in args.arms:
        if arm not in arms:
            parser.error(f"--arms: unknown {arm!r}, expected some of {list(arms)}")
    for name in ("jobs", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)}, expected at least 1")
    if args.quick and args.out is None:
        parser.error("--quick: give --out, the results are no results")


def group_by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each arm, in their order."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run["arm"], []).append(run)
    return arms


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error over seeds; no error from a single one."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def read_out(scores: Sequence[dict[str, int]], chance: float) -> dict[str, Any]:
    """The accuracy of one arm over its seeds, from the number of `answers` and of those `right`.

    It is above chance if it lies `NUM_ERRORS` standard errors above, by the larger of two errors: that of the seeds,
    and that of a guess at as many answers.
    """
    shares = [score["right"] / score["answers"] for score in scores]
    mean, error = mean_and_error(shares)
    of_guessing = math.sqrt(chance * (1 - chance) / sum(score["answers"] for score in scores))
    return {
        "mean": round(mean, 4),
        "standard_error": None if error is None else round(error, 4),
        "seeds": [round(share, 4) for share in shares],
        "above_chance": mean > chance + NUM_ERRORS * max(of_guessing, error or 0.0),
    }
