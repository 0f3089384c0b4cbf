"""Score a model on recall, long context, facts in filler and bits per byte; everything is made offline.

    python eval/run.py MODEL --suite all --out eval/results/NAME

is `hybridlm eval`; `--help` lists the options. Stopped at any moment, the same command goes on.
"""

import sys

from hybridlm.cli import app

if __name__ == "__main__":
    app(["eval", *sys.argv[1:]])
