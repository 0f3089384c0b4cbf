"""Published suites, run by lm-eval on their own data, which comes from the network.

    python eval/published.py MODEL --suites ruler,babilong --out eval/results/NAME

Where there is no network, or no lm-eval, a suite is skipped with the reason. `--list` says what each needs and how
those are run that lm-eval does not have. What needs no network is `hybridlm eval`.
"""

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HUB = ("huggingface.co", 443)


@dataclass(frozen=True)
class Suite:
    """A published suite.

    Attributes:
        about: What it measures.
        needs: What is downloaded or installed.
        task: Its name in lm-eval; empty where it is run by its own code.
        how: How it is run by its own code.
        lengths: Whether it takes lengths of prompts.
    """

    about: str
    needs: str
    task: str = ""
    how: str = ""
    lengths: bool = False


SUITES = {
    "ruler": Suite("13 tasks at 4K to 128K tokens", "essays, SQuAD, HotpotQA; pip install wonderwords nltk", "ruler",
                   lengths=True),
    "babilong": Suite("facts scattered in books, to 128K", "RMT-team/babilong", "babilong"),
    "longbench": Suite("21 sets of real documents", "Xnhyacinth/LongBench", "longbench"),
    "longbench2": Suite("503 choices over documents of 8K to 2M words", "recursal/longbench-v2", "longbench2"),
    "infinitebench": Suite("12 tasks over 100K tokens", "xinrongzhang2022/InfiniteBench", "infinitebench"),
    "swde": Suite("values in web pages", "hazyresearch/based-swde", "swde"),
    "fda": Suite("values in reports", "hazyresearch/based-fda", "fda"),
    "squad_completion": Suite("answers in paragraphs", "hazyresearch/based-squad", "squad_completion"),
    "helmet": Suite(
        "7 categories to 128K, with citing, reranking and summaries",
        "34 GB of data; OpenAI's GPT-4o as the judge of two categories",
        how="clone github.com/princeton-nlp/HELMET, run its scripts/download_data.sh, then python eval.py --config "
        "configs/recall.yaml --model_name_or_path MODEL --use_chat_template False --output_dir OUT",
    ),
    "nolima": Suite(
        "needles that share no word with their question",
        "its data, amodaresi/NoLiMa; its licence forbids commercial use",
        how="clone github.com/adobe-research/NoLiMa, run its data/download_NoLiMa_data.sh, serve MODEL by an "
        "OpenAI-like API (it uses vLLM; `transformers serve` is one too), name it in "
        "evaluation/model_configs and a run in evaluation/run_config, then evaluation/run_tests.sh",
    ),
}  # fmt: skip


def why_not(suite: str) -> str | None:
    """Why a suite cannot be run here; `None` if it can."""
    if not SUITES[suite].task:
        return f"lm-eval does not have it: {SUITES[suite].how}"
    if importlib.util.find_spec("lm_eval") is None:
        return "lm-eval is not installed: pip install 'hybridlm[eval]'"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no"):
        return f"HF_HUB_OFFLINE is set, and it needs {SUITES[suite].needs}"
    try:
        socket.create_connection(HUB, timeout=5).close()
    except OSError as error:
        return f"{HUB[0]} cannot be reached ({error}), and it needs {SUITES[suite].needs}"
    return None


def command(suite: str, args: argparse.Namespace) -> list[str]:
    """How lm-eval is called."""
    trust = ",trust_remote_code=True" if args.trust_remote_code else ""
    call = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", SUITES[suite].task]
    # lm-eval cuts prompts on the left: the length must be one that the model takes
    call += ["--model_args", f"pretrained={args.model},max_length={max(args.lengths)}{trust}"]
    call += ["--output_path", str(args.out / suite), "--batch_size", str(args.batch_size), "--log_samples"]
    if SUITES[suite].lengths:
        call += ["--metadata", json.dumps({"max_seq_lengths": args.lengths})]
    return call if args.limit is None else [*call, "--limit", str(args.limit)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or name on the Hub")
    parser.add_argument("--suites", default="ruler,babilong", help=f"separated by commas, out of {', '.join(SUITES)}")
    parser.add_argument(
        "--lengths", default="4096", help="tokens of prompts, '4096,8192'; the largest bounds all suites"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/published"))
    parser.add_argument("--limit", type=int, help="documents a task")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--list", action="store_true", help="say what there is")
    args = parser.parse_args(arguments)
    args.suites = args.suites.split(",")
    for suite in args.suites:
        if suite not in SUITES:
            parser.error(f"--suites: unknown {suite!r}, expected some of {list(SUITES)}")
    try:
        args.lengths = [int(length) for length in args.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths: {args.lengths!r} is no list of whole numbers")
    if min(args.lengths) < 1:
        parser.error(f"--lengths: {min(args.lengths)} must be at least 1")
    if args.model is None and not args.list:
        parser.error("name a model, or --list")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run what can be run; the exit code is 1 if a run failed."""
    args = parse(arguments)
    if args.list:
        for name, suite in SUITES.items():
            print(f"{name:<18} {suite.about}; needs {suite.needs}{'; ' if suite.how else ''}{suite.how}")
        return 0
    failed = False
    for suite in args.suites:
        reason = why_not(suite)
        if reason is not None:
            print(f"{suite}: skipped: {reason}")
            continue
        failed |= subprocess.run(command(suite, args)).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
