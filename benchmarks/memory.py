"""Speed of neural memories against Mamba-2 of the same width, and bf16 training of Titans.

    python benchmarks/memory.py [--pairs 5] [--train] [--out benchmarks/results/memory.json]

Speed: one process, one thread, fp32, batch 1, hidden 256, two layers of the mixer alone, process time; a ratio is the
median over interleaved pairs, the memory's time over Mamba-2's, with its quartiles: for a training step of 2048 tokens
and for 32 decoding steps after 512 tokens.

`--train`: `tiny_titans_mac` for 300 steps and a `titans_mac` of 5 M parameters (4 heads of 64, memory 64 -> 256 -> 64,
segments of 64) for 50 steps, one row of 2048 bytes of the standard library a step, bf16 autocast. The exit status is 0
only if no loss, gradient or weight was ever infinite or NaN, no step was skipped, and the memory stayed float32.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from cpu import cpu_seconds, ratios  # sets the threads, before torch is imported

import torch  # isort: skip
import transformers  # isort: skip

from hybridlm import HybridLMConfig, HybridLMForCausalLM  # isort: skip
from hybridlm.analysis.machine import processor_name  # isort: skip
from hybridlm.data.documents import stdlib_files  # isort: skip
from hybridlm.modeling.backbone import HybridLMModel  # isort: skip
from hybridlm.presets import load_config  # isort: skip

HIDDEN, LENGTH, PAST, STEPS = 256, 2048, 512, 32
HEADS = {"num_heads": 4, "head_dim": 64}
MLP = {"memory_depth": 2, "memory_expansion": 4.0}
LMM = {"name": "neural_memory", **HEADS, "chunk_size": 64}
ATTENTION = {**HEADS, "position": {"name": "rope"}}
MEMORIES: dict[str, dict[str, Any]] = {
    "linear memory": LMM | {"memory_depth": 1},
    "memory 64 -> 256 -> 64": LMM | MLP,
    "the same, chunks of 16": LMM | MLP | {"chunk_size": 16},
    "MAC, segments of 64": {"name": "titans_mac", **ATTENTION, "segment_size": 64, "memory": HEADS | MLP},
    "MAG, window 64": {"name": "titans_mag", **ATTENTION, "window": 64, "memory": LMM | MLP},
    "MAL, window 64": {"name": "titans_mal", **ATTENTION, "window": 64, "memory": LMM | MLP},
}
MEMORIES["MAC, segments of 64"]["memory"] |= {"name": "neural_memory"}
MAMBA2 = {"name": "mamba2", "state_size": 64}


def build(mixer: dict, model: type = HybridLMModel, num_layers: int = 2, **fields: Any) -> Any:
    """Layers of one mixer."""
    torch.manual_seed(0)
    recipe = {"mixer": mixer, "channel_mixer": fields.pop("channel_mixer", None)}
    shape = {"hidden_size": HIDDEN, "vocab_size": 258, "num_hidden_layers": num_layers}
    return model(HybridLMConfig(layer_specs={"layer": recipe}, layer_layout=["layer"] * num_layers, **shape, **fields))


def measure(mixer: dict, pairs: int) -> dict:
    """Quartiles of a memory over Mamba-2, for a training step and for decoding."""
    tokens = torch.randint(258, (1, LENGTH))
    memory, mamba = build(mixer), build(MAMBA2)

    def train(model: HybridLMModel) -> None:
        model.train()(tokens).last_hidden_state.square().mean().backward()
        model.zero_grad(set_to_none=True)

    training, seconds = ratios(lambda: train(memory), lambda: train(mamba), pairs)

    @torch.no_grad()
    def decode(model: HybridLMModel) -> float:
        cache = model.eval()(tokens[:, :PAST], use_cache=True).past_key_values
        return cpu_seconds(lambda: [model(tokens[:, :1], past_key_values=cache) for _ in range(STEPS)])

    decode(memory)
    stepping = sorted(decode(memory) / decode(mamba) for _ in range(pairs))
    quartiles = [stepping[round(share * (len(stepping) - 1))] for share in (0.25, 0.5, 0.75)]
    names = {"theirs": "memory_seconds", "ours": "mamba2_seconds", "pairs": "pairs"}
    return {"training": training, "decoding": quartiles, **{names[k]: value for k, value in seconds.items()}}


def text_rows(length: int, num_rows: int) -> torch.Tensor:
    """Rows `[num_rows, length]` of successive bytes of the standard library."""
    needed, text = length * num_rows, b""
    for path in stdlib_files():
        text += path.read_bytes()
        if len(text) >= needed:
            break
    return torch.frombuffer(bytearray(text[:needed]), dtype=torch.uint8).long().view(num_rows, length)


def train_in_bfloat16(model: HybridLMForCausalLM, num_steps: int, length: int = LENGTH) -> dict:
    """Train one row a step under bf16 autocast with float32 weights; count what is not finite."""
    rows = text_rows(length, num_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    losses, skipped, begun = [], 0, time.process_time()
    for row in rows:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(row[None], labels=row[None]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(float(loss.detach()))
        if norm.isfinite():
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad(set_to_none=True)
    seconds = time.process_time() - begun
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.eval()(rows[:1], use_cache=True).past_key_values
    kept = {name: tensor for part in cache.parts().values() for name, tensor in part.named_tensors().items()}
    memories = {name: tensor for name, tensor in kept.items() if name.rsplit(".", 1)[-1] in ("memory", "momentum")}
    finite = all(bool(value.isfinite().all()) for value in [*model.parameters(), *kept.values()])
    return {
        "parameters": model.num_parameters(),
        "steps": num_steps,
        "tokens_a_step": length,
        "first_loss": losses[0],
        "last_loss": sum(losses[-10:]) / 10,
        "not_finite": sum(not abs(loss) < float("inf") for loss in losses) + (not finite),
        "skipped_steps": skipped,
        "memory_types": sorted({str(tensor.dtype) for tensor in memories.values()}),
        "seconds_a_step": seconds / num_steps,
    }


def training_models() -> dict[str, tuple[HybridLMForCausalLM, int]]:
    """What `--train` trains, and for how many steps."""
    torch.manual_seed(0)
    tiny = load_config("tiny_titans_mac")
    tiny.vocab_size = 258
    swiglu = {"name": "swiglu", "intermediate_size": 512}
    five = build(MEMORIES["MAC, segments of 64"], HybridLMForCausalLM, num_layers=4, channel_mixer=swiglu)
    return {"tiny_titans_mac": (HybridLMForCausalLM(tiny), 300), "titans_mac, 5 M": (five, 50)}


def main() -> int:
    """Measure, print, and tell whether every training run was clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="also train in bfloat16")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {**versions, "python": platform.python_version(), "processor": processor_name()}
    print(" ".join(f"{key} {value}" for key, value in machine.items()))
    speed, training = [], []
    for name, mixer in MEMORIES.items():
        row = {"mixer": name, **measure(mixer, args.pairs)}
        speed.append(row)
        shown = (
            "{:.2f} ({:.2f} .. {:.2f})".format(*(row[what][i] for i in (1, 0, 2))) for what in ("training", "decoding")
        )
        print("{:24} over Mamba-2: training {}, decoding {}".format(name, *shown), flush=True)
    for name, (model, steps) in training_models().items() if args.train else ():
        row = {"model": name, **train_in_bfloat16(model, steps)}
        training.append(row)
        print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "speed": speed, "training": training}, indent=1) + "\n")
    clean = all(
        not row["not_finite"] and not row["skipped_steps"] and row["memory_types"] == ["torch.float32"]
        for row in training
    )
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
