"""Compare ways to spend computation at equal FLOPs: depth routing, token merging, experts, and less of the plain stack.

    python eval/isoflop.py [--quick] [--jobs 2] [--out eval/results] [--arms plain,mod,...] [--seeds 3] [--steps N]

Small byte models learn Python's standard library. One run a model and seed, with a constant learning rate after the
warm-up, so that its curve can be read anywhere: at the FLOPs, and at the steps, of the plain model's whole run. Held
out are documents by their hash; routed models are scored under the rule of decoding. A finished run is kept as JSON in
`OUT/isoflop_runs` and used again as long as its settings, documents and torch are the same. Results: `isoflop.json` and
`isoflop.png`.
"""

import argparse
import logging
import os
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

# one thread a process, and threads that wait do not spin; before torch is imported, here and in the children
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from isoflop_arms import ARMS, DEFAULT_ARMS, QUICK, Settings  # noqa: E402
from isoflop_count import flops_of_plain_step  # noqa: E402
from isoflop_report import draw, sentences, summarize, table  # noqa: E402
from isoflop_run import load_data, run, run_hash  # noqa: E402

from hybridlm.evaluation import runs  # noqa: E402

logger = logging.getLogger("isoflop")
QUICK_ARMS = ["plain", "mod", "moe"]


def about_and_run(arm: str, settings: Settings, seed: int) -> dict[str, Any]:
    """A run, with what its arm is."""
    return {"about": ARMS[arm].about, **run(arm, settings, seed)}


def finish_in(folder: Path, settings: Settings, arm: str, seed: int) -> dict[str, Any]:
    """Give a finished run from its file in a folder, or run it and write the file."""
    path, about = folder / f"{arm}-{seed}.json", f"{arm:<8} seed {seed}"
    return runs.finish_run(
        partial(about_and_run, arm, settings, seed), path, run_hash(arm, settings, seed), about, logger
    )


def describe(settings: Settings, jobs: int) -> dict[str, Any]:
    """Everything that the figures depend on."""
    rows, windows, manifest_hash = load_data(settings.length, settings.heldout_windows)
    return {
        "machine": runs.describe_machine(jobs),
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
    runs.check_arguments(parser, args, list(ARMS), QUICK_ARMS, DEFAULT_ARMS)
    if args.steps is not None and args.steps < QUICK.num_evaluations:
        parser.error(f"--steps: {args.steps} is too few to read a curve from")
    args.out = args.out or Path(__file__).parent / "results"
    return args


def main() -> int:
    """Run, write, print."""
    args = parse()
    runs.set_up_logging(logger)
    settings = QUICK if args.quick else Settings()
    settings = settings if args.steps is None else replace(settings, num_steps=args.steps)
    started = time.perf_counter()
    finish = partial(finish_in, args.out / "isoflop_runs", settings)
    finished = runs.run_all(finish, args.arms, args.seeds, args.jobs, logger)
    budget = settings.num_steps * flops_of_plain_step(settings)
    arms, claims = summarize(finished, settings.num_steps, budget)
    results = describe(settings, args.jobs) | {
        "budget_flops": budget,
        "process_seconds": round(sum(run["process_seconds"] for run in finished), 1),
        "arms": arms,
        "claims": claims,
    }
    runs.write_results(args.out / "isoflop.json", results, finished)
    about = f"byte models of the standard library, {args.seeds} seeds: {budget:.2g} FLOPs, {settings.num_steps} steps"
    try:
        draw(finished, arms, args.out / "isoflop.png", about)
    except ImportError as error:
        logger.warning("%s; no plot was drawn", error)
    print(table(arms))
    print(*sentences(claims), sep="\n")
    print(f"{time.perf_counter() - started:.0f} s; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
