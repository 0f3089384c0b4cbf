"""Speed of layers inside a span against the same layers for every token.

    python benchmarks/spans.py [--pairs 7] [--out benchmarks/results/spans.json]

One process, one thread, fp32, batch 1, hidden 512, two layers, process time; a ratio is the median over interleaved
pairs of runs, span over dense, printed with its quartiles. In the prefill every token asks to enter and the ceiling of
0.2 lets one in five: no text can make it slower. In the decoding step no token enters. The exit status is 0 only if
every prefill takes at most 0.3 of the dense layers' time.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

from cpu import ratios  # sets the threads, before torch is imported

import torch  # isort: skip
import transformers  # isort: skip

from hybridlm import HybridLMConfig  # isort: skip
from hybridlm.analysis.machine import processor_name  # isort: skip
from hybridlm.modeling.backbone import HybridLMModel  # isort: skip

LENGTH, BOUND = 4096, 0.3
SWIGLU = {"name": "swiglu", "intermediate_size": 1536}
MOE = {"name": "moe", "num_experts": 8, "intermediate_size": 768}
HEADS = {"name": "attention", "num_heads": 8, "num_kv_heads": 4, "position": {"name": "rope"}}
STACKS = {
    "attention": {"mixer": HEADS, "channel_mixer": SWIGLU},
    "attention, experts": {"mixer": HEADS, "channel_mixer": MOE},
    "window of 512": {"mixer": HEADS | {"window": 512}, "channel_mixer": SWIGLU},
    "mamba": {"mixer": {"name": "mamba"}, "channel_mixer": SWIGLU},
    "mamba2": {"mixer": {"name": "mamba2", "state_size": 64}, "channel_mixer": SWIGLU},
}
SPAN = {"name": "mixture_of_depths", "start": 0, "stop": 2, "capacity": 0.125, "ceiling": 0.2}


def build(recipe: dict, spans: list[dict]) -> HybridLMModel:
    """Two layers without a head."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "vocab_size": 258, "num_hidden_layers": 2, "max_position_embeddings": LENGTH}
    config = HybridLMConfig(layer_specs={"layer": recipe}, layer_layout=["layer"] * 2, spans=spans, **shape)
    return HybridLMModel(config).eval()


@torch.no_grad()
def measure(recipe: dict, pairs: int) -> dict:
    """Quartiles of span over dense, for a prefill and for a decoding step."""
    tokens = torch.randint(258, (1, LENGTH))
    dense, routed = build(recipe, []), build(recipe, [SPAN])
    bias = routed.spans[0].threshold_bias
    bias.fill_(1e9)
    prefill, seconds = ratios(lambda: routed(tokens, use_cache=True), lambda: dense(tokens, use_cache=True), pairs)
    caches = []
    for model in (routed, dense):
        bias.fill_(1e9)
        caches.append(model(tokens[:, :512], use_cache=True).past_key_values)
    bias.fill_(-1e9)

    def steps(model: HybridLMModel, number: int) -> None:
        for _ in range(20):
            model(tokens[:, :1], past_key_values=caches[number])

    decode, _ = ratios(lambda: steps(routed, 0), lambda: steps(dense, 1), pairs)
    names = {"theirs": "span_seconds", "ours": "dense_seconds", "pairs": "pairs"}
    return {"prefill": prefill, "decode": decode, **{names[key]: value for key, value in seconds.items()}}


def main() -> int:
    """Measure, print, and tell whether every prefill is quick enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {**versions, "python": platform.python_version(), "processor": processor_name()}
    print(" ".join(f"{key} {value}" for key, value in machine.items()))
    rows = []
    for name, recipe in STACKS.items():
        row = {"layers": name, **measure(recipe, args.pairs)}
        row["met"] = row["prefill"][1] <= BOUND
        rows.append(row)
        shown = {
            what: "{:.2f} ({:.2f} .. {:.2f})".format(*(row[what][i] for i in (1, 0, 2)))
            for what in ("prefill", "decode")
        }
        verdict = "yes" if row["met"] else "NO"
        print(
            f"{name:20} prefill of {LENGTH}: {shown['prefill']} <= {BOUND} {verdict}; step: {shown['decode']}",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
