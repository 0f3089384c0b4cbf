"""Compare memories at recall far behind: window attention, Mamba-2, Titans' memories, and a store of keys.

    python eval/memory.py [--quick] [--jobs 2] [--out eval/results] [--arms window,lmm,...] [--seeds 3]

Small models learn key-value recall by a curriculum of lengths to 512 tokens, then a passkey at 512; each is tested at
512 to 8192. One run a model and seed, in processes of one thread. A finished run is kept as JSON in `OUT/memory_runs`
and used again as long as its settings, its config and torch are the same. Results: `memory.json` and `memory.png`. The
exit status is 1 when a bound on recall at 512 does not hold.
"""

import argparse
import json
import logging
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# one thread a process, and threads that wait do not spin; before torch is imported, here and in the children
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch  # noqa: E402
import transformers  # noqa: E402
from memory_arms import ARMS, DEFAULT_ARMS, QUICK, QUICK_ARMS, STATE_CONTEXT, Settings, build_config  # noqa: E402
from memory_report import check_bounds, draw, sentences, summarize, table  # noqa: E402
from memory_run import run, run_hash  # noqa: E402

import hybridlm  # noqa: E402
from hybridlm.analysis.machine import processor_name  # noqa: E402

logger = logging.getLogger("memory")


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
            logger.info("%-11s seed %d: finished before", arm, seed)
            return result
    result = run(arm, settings, seed)
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


def describe(settings: Settings, arms: list[str], jobs: int) -> dict[str, Any]:
    """Everything that the figures depend on."""
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
    args.arms = args.arms.split(",") if args.arms else QUICK_ARMS if args.quick else DEFAULT_ARMS
    args.seeds = (1 if args.quick else 3) if args.seeds is None else args.seeds
    for arm in args.arms:
        if arm not in ARMS:
            parser.error(f"--arms: unknown {arm!r}, expected some of {list(ARMS)}")
    for name in ("jobs", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)}, expected at least 1")
    if args.quick and args.out is None:
        parser.error("--quick: give --out, the results are no results")
    args.out = args.out or Path(__file__).parent / "results"
    return args


def main() -> int:
    """Run, write, print; 1 if a bound does not hold."""
    args = parse()
    set_up_logging()
    settings = QUICK if args.quick else Settings()
    started = time.perf_counter()
    runs = run_all(args.arms, args.seeds, settings, args.jobs, args.out / "memory_runs")
    about = describe(settings, args.arms, args.jobs)
    arms = summarize(runs, {name: arm.about for name, arm in ARMS.items()}, about["chance"])
    bounds = check_bounds(arms, [name for name, arm in ARMS.items() if arm.is_memory])
    controls = {name: ARMS[name].control_of for name in args.arms if ARMS[name].control_of in args.arms}
    said = sentences(arms, controls, about["chance"])
    results = about | {
        "process_seconds": round(sum(run["process_seconds"] for run in runs), 1),
        "arms": arms,
        "bounds": bounds,
        "summary": said,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(run, separators=(",", ":")) for run in runs]  # one line a run
    text = json.dumps(results, indent=1)[:-2] + ',\n "runs": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    (args.out / "memory.json").write_text(text)
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
