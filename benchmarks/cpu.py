"""Speed and memory on a CPU against transformers' own classes, with the same weights.

    python benchmarks/cpu.py --against transformers [--only mamba,jamba] [--out benchmarks/results/cpu.json]

One process, one thread, fp32, batch 1, process time. A ratio is the median over interleaved pairs of runs (theirs over
ours, so more is better) and is printed with its quartiles. Memory is the growth of the peak resident set during one
prefill, in a fresh process each. A bound within 5 % of 1 is met when the upper quartile meets it. The exit status is 0
only if every bound is met.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402

import hybridlm  # noqa: E402, F401  registers the classes
from hybridlm.analysis.machine import processor_name  # noqa: E402
from hybridlm.hub.native import import_native  # noqa: E402

SHAPE = {"hidden_size": 512, "vocab_size": 8192, "max_position_embeddings": 16384}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": {"num_hidden_layers": 8, "intermediate_size": 1536, **HEADS},
    "mixtral": {"num_hidden_layers": 8, "intermediate_size": 768, **HEADS, **EXPERTS},
    "mamba": {"num_hidden_layers": 16, "state_size": 16},
    "mamba2": {
        "num_hidden_layers": 16, "num_heads": 16, "head_dim": 64, "state_size": 64, "n_groups": 1, "chunk_size": 256,
        "expand": 2,
    },
    "jamba": {
        "num_hidden_layers": 8, "intermediate_size": 768, **HEADS, "num_experts": 8, "num_experts_per_tok": 2,
        "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 16, "use_mamba_kernels": False,
    },
}  # fmt: skip


@dataclass
class Bound:
    """A measurement and what it must reach: `at_least` for ratios, `at_most` for growth and memory."""

    family: str
    what: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, quartiles: list[float]) -> bool:
        """Whether the measured quartiles (or a single number) meet the bound."""
        middle = quartiles[len(quartiles) // 2]
        if self.at_most is not None:
            return middle <= self.at_most
        return (quartiles[-1] if abs(self.at_least - 1) <= 0.05 else middle) >= self.at_least


BOUNDS = [
    Bound("mamba", "prefill 2048", at_least=2.0),
    Bound("mamba2", "prefill 2048", at_least=1.8),
    Bound("jamba", "prefill 2048", at_least=1.6),
    Bound("llama", "prefill 2048", at_least=0.98),
    Bound("mixtral", "prefill 2048", at_least=0.98),
    Bound("mamba", "train 256", at_least=6.0),
    Bound("jamba", "train 256", at_least=3.0),
    Bound("mamba", "train growth", at_most=2.2),
    Bound("jamba", "train growth", at_most=2.2),
    Bound("jamba", "memory 8192", at_most=0.4),
]


def native_model(family: str) -> PreTrainedModel:
    """Transformers' own class with seeded random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **CONFIGS[family]})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    return AutoModelForCausalLM.from_config(config).eval()


def our_model(native: PreTrainedModel) -> PreTrainedModel:
    """The same weights in our class."""
    with tempfile.TemporaryDirectory() as folder:
        native.save_pretrained(Path(folder) / "native")
        import_native(Path(folder) / "native", Path(folder) / "ours")
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "ours").eval()


def prefill(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """One prefill; returns the last logits."""
    with torch.no_grad():
        return model(tokens, use_cache=True, logits_to_keep=1).logits


def train_step(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """One forward and backward; returns the loss."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    model.eval()
    return loss.detach()


def cpu_seconds(run: Callable[[], object]) -> float:
    """Process time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def ratios(theirs: Callable[[], object], ours: Callable[[], object], pairs: int) -> tuple[list[float], dict]:
    """Quartiles of theirs / ours over interleaved pairs, and the median seconds of each."""
    ours()
    first = cpu_seconds(theirs)
    pairs = 3 if first > 10 else pairs
    times = []
    for pair in range(pairs):
        if pair % 2:
            b, a = cpu_seconds(ours), cpu_seconds(theirs)
        else:
            a, b = cpu_seconds(theirs), cpu_seconds(ours)
        times.append((a, b))
    values = [a / b for a, b in times]
    seconds = {"theirs": statistics.median(a for a, _ in times), "ours": statistics.median(b for _, b in times)}
    return statistics.quantiles(values, n=4, method="inclusive"), {**seconds, "pairs": pairs}


def growth(ours: PreTrainedModel, pairs: int) -> tuple[list[float], dict]:
    """Quartiles of the time at 2048 tokens over that at 1024, training."""
    short, long = (torch.randint(SHAPE["vocab_size"], (1, length)) for length in (1024, 2048))
    quartiles, seconds = ratios(lambda: train_step(ours, long), lambda: train_step(ours, short), pairs)
    return quartiles, {"seconds_1024": seconds["ours"], "seconds_2048": seconds["theirs"], "pairs": seconds["pairs"]}


def memory_growth(family: str, side: str, length: int) -> float:
    """Growth of the peak resident set of one prefill in a fresh process, MiB."""
    command = [sys.executable, __file__, "--memory-of", f"{family}:{side}:{length}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def report_memory(request: str) -> None:
    """Child process of `memory_growth`."""
    family, side, length = request.split(":")
    model = native_model(family)
    model = our_model(model) if side == "ours" else model
    prefill(model, torch.randint(SHAPE["vocab_size"], (1, 16)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    prefill(model, torch.randint(SHAPE["vocab_size"], (1, int(length))))
    print((_status("VmHWM") - before) / 1024)


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])


def measure(bound: Bound, native: PreTrainedModel, ours: PreTrainedModel, pairs: int) -> tuple[list[float], dict]:
    """Quartiles and raw figures of one bound."""
    kind, _, length = bound.what.partition(" ")
    if bound.what == "train growth":
        return growth(ours, pairs)
    if kind == "memory":
        theirs_mib, ours_mib = (memory_growth(bound.family, side, int(length)) for side in ("theirs", "ours"))
        return [ours_mib / theirs_mib], {"theirs_mib": theirs_mib, "ours_mib": ours_mib}
    tokens = torch.randint(SHAPE["vocab_size"], (1, int(length)))
    run = prefill if kind == "prefill" else train_step
    return ratios(lambda: run(native, tokens), lambda: run(ours, tokens), pairs)


def main() -> int:
    """Measure, print, and tell whether every bound is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=["transformers"], default="transformers")
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--what", default="", help="only measurements whose name contains this")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.memory_of:
        report_memory(args.memory_of)
        return 0
    families = [name for name in args.only.split(",") if name] or list(CONFIGS)
    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    machine.update(python=platform.python_version(), processor=processor_name())
    print(" ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'family':8} {'what':14} {'median':>7} {'quartiles':>15} {'bound':>8}  met")
    rows = []
    for family in families:
        native = native_model(family)
        ours = our_model(native)
        tokens = torch.randint(SHAPE["vocab_size"], (1, 64))
        expected, got = prefill(native, tokens), prefill(ours, tokens)
        error = float((expected - got).abs().max() / expected.abs().max())
        if error > 1e-4:
            raise SystemExit(f"{family}: logits differ by {error:.1e}, nothing to compare")
        for bound in BOUNDS:
            if bound.family != family or args.what not in bound.what:
                continue
            quartiles, figures = measure(bound, native, ours, args.pairs)
            limit = f">= {bound.at_least}" if bound.at_most is None else f"<= {bound.at_most}"
            met = bound.met(quartiles)
            middle = quartiles[len(quartiles) // 2]
            spread = f"{quartiles[0]:.2f} .. {quartiles[-1]:.2f}"
            print(
                f"{family:8} {bound.what:14} {middle:7.2f} {spread:>15} {limit:>8}  {'yes' if met else 'NO'}",
                flush=True,
            )
            row = {"family": family, "what": bound.what, "quartiles": quartiles, "bound": limit, "met": met}
            rows.append({**row, **figures, "logit_error": error})
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
