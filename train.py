"""Train from a run file.

python train.py configs/runs/demo.yaml
accelerate launch train.py configs/runs/demo.yaml training.max_steps=5
"""

import argparse
import os
import sys


def main() -> None:
    """Run and report. Exit status 1: a demand of the run file was not met; 2: the run file or the data is wrong."""
    parser = argparse.ArgumentParser(description="Train from a run file.")
    parser.add_argument("run_file", help="path of a run file, or the name of one in configs/runs")
    parser.add_argument("overrides", nargs="*", metavar="PATH=VALUE", help="replaces a setting of the file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    arguments = parser.parse_args()
    # Before torch is imported, which reads it then: threads that wait by spinning make small models several times
    # slower as soon as another program uses a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hybridlm.training import CheckpointError, train

    try:
        train(arguments.run_file, arguments.overrides, resume=arguments.resume)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
