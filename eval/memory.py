"""Compare memories at recall far behind: window attention, Mamba-2, Titans' memories, and a store of keys.

    python eval/memory.py [--quick] [--jobs 2] [--out eval/results] [--arms window,lmm,...] [--seeds 3]

Small models learn key-value recall by a curriculum of lengths to 512 tokens, then a passkey at 512; each is tested at
512 to 8192. One run a model and seed, in processes of one thread. A finished run is kept as JSON in `OUT/memory_runs`
and used again as long as its settings, its config and torch are the same. Results: `memory.json` and `memory.png`. The
exit status is 1 when a bound on recall at 512 does not hold.
"""

import argparse
import logging
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

# one thread a process, and threads that wait do not spin; before torch is imported, here and in the children
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from memory_arms import ARMS, DEFAULT_ARMS, QUICK, QUICK_ARMS, STATE_CONTEXT, Settings, build_config  # noqa: E402
from memory_report import check_bounds, draw, sentences, summarize, table  # noqa: E402
from memory_run import run, run_hash  # noqa: E402

from hybridlm.evaluation import runs  # noqa: E402

logger = logging.getLogger("memory")


def finish_run(arm: str, settings: Settings, seed: int, path: Path) -> dict[str, Any]:
    """Give a finished run from its file, or run it and write the file."""
    about = f"{arm:<11} seed {seed}"
    return runs.finish_run(partial(run, arm, settings, seed), path, run_hash(arm, settings, seed), about, logger)


def finish_in(folder: Path, settings: Settings, arm: str, seed: int) -> dict[str, Any]:
    """The same, with the file in a folder."""
    return finish_run(arm, settings, seed, folder / f"{arm}-{seed}.json")


def describe(settings: Settings, arms: list[str], jobs: int) -> dict[str, Any]:
    """Everything that the figures depend on."""
    return {
        "machine": runs.describe_machine(jobs),
        "settings": asdict(settings),
        "optimizer": "AdamW (0.9, 0.95), no weight decay, gradients clipped at 1, loss on answers only",
        "chance": 1 / settings.vocabulary.num_values,
        "state_bytes_at": STATE_CONTEXT,
        "mixers": {arm: build_config(arm, settings).layer_specs["own"]["mixer"] for arm in arms},
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 arms, 1 seed, fewer steps: does it run at all?")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, help="default: eval/results; with --quick a folder must be given")
    parser.add_argument("--arms", help=f"separated by commas, out of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, help="default 3")
    args = parser.parse_args(arguments)
    runs.check_arguments(parser, args, list(ARMS), QUICK_ARMS, DEFAULT_ARMS)
    args.out = args.out or Path(__file__).parent / "results"
    return args


def main() -> int:
    """Run, write, print; 1 if a bound does not hold."""
    args = parse()
    runs.set_up_logging(logger)
    settings = QUICK if args.quick else Settings()
    started = time.perf_counter()
    finish = partial(finish_in, args.out / "memory_runs", settings)
    finished = runs.run_all(finish, args.arms, args.seeds, args.jobs, logger)
    about = describe(settings, args.arms, args.jobs)
    arms = summarize(finished, {name: arm.about for name, arm in ARMS.items()}, about["chance"])
    bounds = check_bounds(arms, [name for name, arm in ARMS.items() if arm.is_memory])
    controls = {name: ARMS[name].control_of for name in args.arms if ARMS[name].control_of in args.arms}
    said = sentences(arms, controls, about["chance"])
    results = about | {
        "process_seconds": round(sum(run["process_seconds"] for run in finished), 1),
        "arms": arms,
        "bounds": bounds,
        "summary": said,
    }
    runs.write_results(args.out / "memory.json", results, finished)
    title = f"models of {settings.num_parameters / 1e3:.0f}k parameters, {args.seeds} seeds"
    try:
        draw(arms, about["chance"], args.out / "memory.png", title)
    except ImportError as error:
        logger.warning("%s; no plot was drawn", error)
    print(table(arms))
    print(*said, sep="\n")
    for bound in bounds:
        print(f"{bound['bound']}: {bound['value']:.3f}, {'holds' if bound['holds'] else 'DOES NOT HOLD'}")
    print(f"{time.perf_counter() - started:.0f} s; written to {args.out}")
    return 0 if all(bound["holds"] for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
