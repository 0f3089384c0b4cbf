"""Train the demo and four small models of equal size, and measure them alike: the figures of `hub_cards/results`.

    python eval/matched.py [--models attention,mamba2,...] [--work outputs/matched] [--out hub_cards/results]

Each is trained by its run file in `configs/runs`, unless it was before; scored by `hybridlm eval`, which goes on where
it was stopped; and given a folder in OUT with the results and the card that follows from them. `OUT/README.md`
compares them, with one plot.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hybridlm import HybridLMConfig
from hybridlm.analysis.planner import plan
from hybridlm.evaluation.plots import new_figure

ROOT = Path(__file__).parents[1]
MODELS = {
    "demo": "Mamba-2, attention, experts; 3 layers",
    "attention": "attention with rotary positions",
    "mamba2": "Mamba-2",
    "hybrid": "3 Mamba-2, 1 attention",
    "everything": "Mamba-2, neural memory, attention; experts; a layer for half of the tokens",
}
SUITES = {"length": [], "recall": ["--lengths", "256,1024", "--beyond", "4", "--no-generate"]}
LENGTHS = (256, 1024, 8192)
STATE_CONTEXT = 8192


def call(*command: Any) -> None:
    """Run a command of the repository and stop where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, env=environment)


def measure(model: str, work: Path, out: Path) -> None:
    """Train and score one model and put what was measured into its folder of results."""
    run_file = f"configs/runs/{'demo' if model == 'demo' else f'matched_{model}'}.yaml"
    if not (work / model / "model" / "README.md").exists():  # the card is written last
        call("train.py", run_file, f"output_dir={work / model}")
    folder, results = work / model / "model", out / model
    results.mkdir(parents=True, exist_ok=True)
    for suite, options in SUITES.items():
        scored = work / model / "eval"
        call("-m", "hybridlm", "eval", folder, "--suite", suite, "--name", model, *options, "--out", scored)
        shutil.copy(scored / f"{suite}.json", results)
    shutil.copy(folder / "results" / "training.json", results)  # without where it lies
    shutil.copy(folder / "config.json", results)
    call("-m", "hybridlm", "card", folder, "--results", work / model / "eval", "--out", results / "card.md")


def figures(results: Path) -> dict[str, Any]:
    """What the table says of one model."""
    training = json.loads((results / "training.json").read_text())
    config = HybridLMConfig.from_json_file(results / "config.json")
    cells = json.loads((results / "length.json").read_text())["cells"]
    bits = {cell["length"]: cell["bits_per_byte"] for cell in cells if cell["task"] == "bits_per_byte"}
    recall = json.loads((results / "recall.json").read_text())["cells"]
    scored = [cell for cell in recall if cell["status"] == "scored"]
    return {
        "parameters": training["parameters"],
        "active": training["expected_active_parameters"],
        "state_bytes": plan(config, context=STATE_CONTEXT, dtype="fp32").total.state_bytes,
        "bits": bits,
        "above_chance": sum(cell["likelihood"]["above_chance"] for cell in scored),
        "scored": len(scored),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row a model, as Markdown."""
    lengths = " | ".join(f"bits per byte at {length}" for length in LENGTHS)
    head = f"| | layers | parameters | for a token | state at {STATE_CONTEXT} | {lengths} | recall above chance |"
    rows = [head, "|---" * (6 + len(LENGTHS)) + "|"]
    for model, of in found.items():
        bits = " | ".join(f"{of['bits'][n]['score']:.3f} ± {of['bits'][n]['error']:.3f}" for n in LENGTHS)
        counts = f"{of['parameters']:,} | {of['active']:,} | {of['state_bytes']:,} B"
        rows.append(f"| {model} | {MODELS[model]} | {counts} | {bits} | {of['above_chance']} of {of['scored']} |")
    return "\n".join(rows)


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Bits per byte against the length of the window."""
    figure, _ = new_figure(7, 4)
    axes = figure.add_subplot()
    for model, of in found.items():
        lengths = sorted(of["bits"])
        scores = [of["bits"][length]["score"] for length in lengths]
        axes.plot(lengths, scores, marker="o", label=f"{model}, {of['state_bytes'] / 1024:,.0f} KiB of state")
    axes.axvline(256, color="grey", linestyle=":", linewidth=1)
    axes.annotate("trained", (256, 1), xycoords=("data", "axes fraction"), xytext=(4, -12), textcoords="offset points")
    axes.set(xscale="log", xlabel="tokens of a window", ylabel="bits per byte, held-out files")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> int:
    """Measure what is asked for, and compare all that was ever measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"separated by commas, out of {', '.join(MODELS)}")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "matched", help="where they are trained")
    parser.add_argument("--out", type=Path, default=ROOT / "hub_cards" / "results")
    args = parser.parse_args()
    asked = args.models.split(",")
    for model in asked:
        if model not in MODELS:
            parser.error(f"--models: unknown {model!r}, expected some of {list(MODELS)}")
    for model in asked:
        measure(model, args.work.resolve(), args.out.resolve())
    found = {model: figures(args.out / model) for model in MODELS if (args.out / model / "recall.json").exists()}
    versions = json.loads((args.out / asked[0] / "length.json").read_text())["versions"]
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = [
        "# The demo and four models of equal size",
        "Made by `python eval/matched.py`: 1000 steps of 2048 bytes of Python's standard library, one seed.",
        table(found),
        "![Bits per byte against the length of the window](matched.png)",
        "± is the standard error over documents. Recall: tasks and lengths of `hybridlm eval --suite recall` whose "
        "score lies three standard errors above chance; the models have seen code only.",
        f"Versions: {about}.",
    ]
    (args.out / "README.md").write_text("\n\n".join(text) + "\n")
    draw(found, args.out / "matched.png")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
