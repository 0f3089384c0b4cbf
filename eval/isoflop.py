"""Compare ways to spend computation at equal FLOPs: depth routing, token merging, experts, and less of the plain stack.

    python eval/isoflop.py [--quick] [--jobs 2] [--out eval/results] [--arms plain,mod,...] [--seeds 3] [--steps N]

Small byte models learn Python's standard library. One run a model and seed, with a constant learning rate after the
warm-up, so that its curve can be read anywhere: at the FLOPs, and at the steps, of the plain model's whole run. Held
out are documents by their hash; routed models are scored under the rule of decoding. A finished run is kept as JSON in
`OUT/isoflop_runs` and used again as long as its settings, documents and torch are the same. Results: `isoflop.json` and
`isoflop.png`.
"""

import argparse
import json
import logging
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# one thread a process, and threads that wait do not spin; before torch is imported, here and in the children
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch  # noqa: E402
import transformers  # noqa: E402
from isoflop_arms import ARMS, DEFAULT_ARMS, QUICK, Settings  # noqa: E402
from isoflop_count import flops_of_plain_step  # noqa: E402
from isoflop_report import draw, sentences, summarize, table  # noqa: E402
from isoflop_run import load_data, run, run_hash  # noqa: E402

import hybridlm  # noqa: E402
from hybridlm.analysis.machine import processor_name  # noqa: E402

logger = logging.getLogger("isoflop")
QUICK_ARMS = ["plain", "mod", "moe"]


def set_up_logging() -> None:
    """Lines with the time; one process writes many, so a bar would be torn."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO)


def finish_run(arm: str, settings: Settings, seed: int, path: Path) -> dict[str, Any]:
    """Give a finished run from its file, or run it and write the file."""
    set_up_logging()
    transformers.logging.set_verbosity_error()
    if path.exists():
        result = json.loads(path.read_text())
        if result["hash"] == run_hash(arm, settings, seed):
            logger.info("%-8s seed %d: finished before", arm, seed)
            return result
    result = {"about": ARMS[arm].about, **run(arm, settings, seed)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    partial.replace(path)
    return result


def run_all(arms: list[str], seeds: int, settings: Settings, jobs: int, folder: Path) -> list[dict[str, Any]]:
    """Run every arm with every seed, seed after seed, in `jobs` processes of one thread."""
    todo = [(arm, seed) for seed in range(seeds) for arm in arms]
    results: dict[tuple[str, int], dict[str, Any]] = {}
    started = time.perf_counter()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {
            pool.submit(finish_run, arm, settings, seed, folder / f"{arm}-{seed}.json"): (arm, seed)
            for arm, seed in todo
        }
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                logger.info("%d of %d runs, %.0f s", len(results), len(todo), time.perf_counter() - started)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [results[arm, seed] for arm in arms for seed in range(seeds)]


def describe(settings: Settings, jobs: int) -> dict[str, Any]:
    """Everything that the figures depend on."""
    rows, windows, manifest_hash = load_data(settings.length, settings.heldout_windows)
    return {
        "machine": {
            "processor": processor_name(),
            "processes": jobs,
            "threads_per_process": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hybridlm": hybridlm.__version__,
        },
        "data": {
            "source": "Python's standard library, byte level",
            "manifest_hash": manifest_hash,
            "training_bytes": rows.counts.num_bytes,
            "heldout_bytes": windows[:, 1:].numel(),
        },
        "settings": asdict(settings),
        "counted": (
            "matrix products of the forward pass, by torch's FlopCounterMode in every "
            f"{settings.count_every}th step of training, times 3; attention as the full square; these stacks have no "
            "scans; 'unpadded' leaves out what pads inside spans cost"
        ),
        "verdicts": "one-sided 5 % t-test of the differences seed by seed; no correction for the number of claims",
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, 3 arms, 1 seed: does it run at all?")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, help="default: eval/results; with --quick a folder must be given")
    parser.add_argument("--arms", help=f"separated by commas, out of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, help="default 3")
    parser.add_argument("--steps", type=int, help="steps of the plain model, whose FLOPs all arms spend")
    args = parser.parse_args(arguments)
    args.arms = args.arms.split(",") if args.arms else QUICK_ARMS if args.quick else DEFAULT_ARMS
    args.seeds = args.seeds or (1 if args.quick else 3)
    for arm in args.arms:
        if arm not in ARMS:
            parser.error(f"--arms: unknown {arm!r}, expected some of {list(ARMS)}")
    if args.steps is not None and args.steps < QUICK.num_evaluations:
        parser.error(f"--steps: {args.steps} is too few to read a curve from")
    if args.quick and args.out is None:
        parser.error("--quick: give --out, the results are no results")
    args.out = args.out or Path(__file__).parent / "results"
    return args


def main() -> int:
    """Run, write, print."""
    args = parse()
    set_up_logging()
    settings = QUICK if args.quick else Settings()
    settings = settings if args.steps is None else replace(settings, num_steps=args.steps)
    started = time.perf_counter()
    runs = run_all(args.arms, args.seeds, settings, args.jobs, args.out / "isoflop_runs")
    budget = settings.num_steps * flops_of_plain_step(settings)
    arms, claims = summarize(runs, settings.num_steps, budget)
    results = describe(settings, args.jobs) | {
        "budget_flops": budget,
        "process_seconds": round(sum(run["process_seconds"] for run in runs), 1),
        "arms": arms,
        "claims": claims,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(run, separators=(",", ":")) for run in runs]  # one line a run
    text = json.dumps(results, indent=1)[:-2] + ',\n "runs": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    (args.out / "isoflop.json").write_text(text)
    about = f"byte models of the standard library, {args.seeds} seeds: {budget:.2g} FLOPs, {settings.num_steps} steps"
    try:
        draw(runs, arms, args.out / "isoflop.png", about)
    except ImportError as error:
        logger.warning("%s; no plot was drawn", error)
    print(table(arms))
    print(*sentences(claims), sep="\n")
    print(f"{time.perf_counter() - started:.0f} s; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
