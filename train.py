"""Train from a run file.

python train.py configs/runs/demo.yaml
accelerate launch train.py configs/runs/demo.yaml --set training.max_steps=5
"""

import argparse
import logging
import sys

import datasets
import transformers

from hybridlm.training import CheckpointError, run, summarize


def main() -> int:
    """Run and report; the exit status is 1 when the run file's demands are not met."""
    parser = argparse.ArgumentParser(description="Train from a run file.")
    parser.add_argument("run_file", help="path of a run file, or the name of one in configs/runs")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="replace a setting, e.g. training.max_steps=5"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for chatty in ("httpx", "httpx2", "huggingface_hub", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        results = run(arguments.run_file, resume=arguments.resume, overrides=arguments.set)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if results:
        print(summarize(results))
        return 1 if results["failures"] else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
