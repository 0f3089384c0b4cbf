"""Make the pictures of a report page that the docs show, from models trained and scored here.

    python benchmarks/report_pictures.py --work outputs/report [--more eval/results] [--steps 700]

Two small byte models learn to copy and to find needles in short texts: a hybrid with experts and a mixture of depths,
and two layers of attention that train half as long. `hybridlm eval` scores both at the trained length and beyond. They
train too briefly to recall anything, and the page says so; a short `hybridlm race` beside them has a winner that does.
`hybridlm report` makes the page, with whatever `--more` names as well, and Chromium takes the pictures (packages
chromium, chromium-driver and selenium). What is finished in the work folder is not made again.
"""

import argparse
import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from hybridlm.data import build_byte_tokenizer
from hybridlm.evaluation.documents import make_documents
from hybridlm.evaluation.suites import text_tasks
from hybridlm.presets import find_race

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TASKS = ("copying", "ngram_lookup", "passkey", "niah_single_1", "niah_single_2")
LENGTH = 384
NUM_TEXTS = 3000
RACE_STEPS = 250
SEED_OF_TEXTS = 1000  # the scored documents have seed 0

MAMBA2 = {"name": "mamba2", "state_size": 16, "head_dim": 16}
ATTENTION = {
    "name": "attention", "num_heads": 4, "num_kv_heads": 4, "conv_kernel": 4, "position": {"name": "none"},
}  # fmt: skip
EXPERTS = {
    "name": "moe", "num_experts": 4, "top_k": 2, "intermediate_size": 64, "scores": "sigmoid", "selection_bias": True,
}  # fmt: skip
SWIGLU = {"name": "swiglu", "intermediate_size": 128}
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "max_position_embeddings": LENGTH, "initializer_range": 0.1}
TITLE = "Two small models that look for needles, and comparisons of this repository"
# name: width, height, how the id of the section begins (the top of the page if none), dark
VIEWS = {
    "report-light": (1280, 1500, "race", False),
    "report-dark": (1280, 1500, "memory", True),
    "report-phone": (375, 1500, None, False),
}
MODELS = {
    "hybrid": {
        "layer_specs": {
            "ssm": {"mixer": MAMBA2, "channel_mixer": None},
            "ssm_experts": {"mixer": MAMBA2, "channel_mixer": EXPERTS},
            "attn_experts": {"mixer": ATTENTION, "channel_mixer": EXPERTS},
        },
        "layer_layout": ["ssm", "attn_experts", "ssm_experts", "attn_experts"],
        "spans": [{"name": "mixture_of_depths", "start": 2, "stop": 3, "capacity": 0.25}],
    },
    "attention": {
        "layer_specs": {"attn": {"mixer": ATTENTION, "channel_mixer": SWIGLU}},
        "layer_layout": ["attn"] * 2,
        "num_hidden_layers": 2,
        "initializer_range": 0.072,
        "embedding_std": 0.4,
        "tie_word_embeddings": True,
    },
}


def run(*arguments: object) -> None:
    """One `hybridlm` command."""
    command = [sys.executable, "-m", "hybridlm.cli", *map(str, arguments)]
    print("hybridlm", *arguments[:2], flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def write_texts(folder: Path) -> None:
    """Documents with needles in them, of another seed than those that are scored."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, tasks = build_byte_tokenizer(), text_tasks("all")
    for name in TASKS:
        for number, length in enumerate((192, 256, LENGTH - 2)):
            documents = make_documents(tasks[name], tokenizer, length, NUM_TEXTS // 3, seed=SEED_OF_TEXTS + number)
            for index, document in enumerate(documents):
                text = document.text.context + document.text.answer
                (folder / f"{name}-{length}-{index}.txt").write_text(text, encoding="utf-8")


def train(name: str, texts: Path, folder: Path, steps: int) -> None:
    """Train one model from a run file that is written beside it."""
    run_file = {
        "output_dir": str(folder),
        "overwrite": True,
        "tokenizer": "byte",
        "model": {"config": SIZES | MODELS[name]},
        "data": {"path": str(texts), "length": LENGTH, "heldout_modulus": 50},
        "training": {
            "max_steps": steps, "per_device_train_batch_size": 12, "learning_rate": 4e-3, "logging_steps": 20,
            "save_strategy": "no", "seed": 0, "disable_tqdm": True,
        },
        "evaluation": {"lengths": [LENGTH, 2 * LENGTH], "max_bytes": 60000},
        "publish": {"name": f"needle-{name}", "card": False},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(json.dumps(run_file, indent=1), encoding="utf-8")  # JSON is YAML
    run("train", path)


def score(model: Path, out: Path) -> None:
    """Score one model at the trained length and beyond; finished cells are kept."""
    lengths = f"256,{LENGTH},{2 * LENGTH}"
    options = ("--lengths", lengths, "--beyond", 2, "--samples", 24, "--generated", 2, "--batch-tokens", 8192)
    run("eval", model, "--suite", "all", "--out", out, *options)


def race(folder: Path) -> None:
    """Three arms of the default race for as long as its ordering needs; the winner is scored on its own task."""
    file = yaml.safe_load(find_race("default").read_text(encoding="utf-8"))
    file["title"] = "attention, Mamba-2 and a hybrid, all with a short convolution, on MQAR"
    file["arms"] = {name: file["arms"][name] for name in ("attention_conv", "mamba2_conv", "hybrid_conv")}
    file["training"]["steps"], file["seeds"], file["note"] = RACE_STEPS, 2, ""
    file["reading"] |= {"steps": [100, 200], "every": 25}
    file["ordering"]["demands"] = [one for one in file["ordering"]["demands"] if one["arm"] in file["arms"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "race.yaml").write_text(yaml.safe_dump(file, sort_keys=False), encoding="utf-8")
    run("race", folder / "race.yaml", "--out", folder / "results", "--jobs", 1)
    run("eval", folder / "results" / "winner", "--suite", "recall", "--out", folder / "winner-scores")


def take_pictures(page: Path) -> None:
    """Desktop in both themes and a phone, of the sections that `VIEWS` names."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        for name, (width, height, section, dark) in VIEWS.items():
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            driver.get(page.as_uri())
            if dark:
                driver.find_element("id", "theme").click()
            top = 0
            if section is not None:
                top = driver.execute_script(f"return document.querySelector('section[id^={section}]').offsetTop")
            clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
            taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
            (DOCS / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))
            print("wrote", f"docs/{name}.png", flush=True)
    finally:
        driver.quit()


def main() -> None:
    """Train, score, report, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "report")
    parser.add_argument("--more", type=Path, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=700, help="of the hybrid; attention takes half as many")
    options = parser.parse_args()
    work = options.work.resolve()
    if not (work / "texts").is_dir():
        write_texts(work / "texts")
    for name in MODELS:
        folder = work / name
        if not (folder / "results.json").exists():
            train(name, work / "texts", folder, options.steps // (1 if name == "hybrid" else 2))
    for name in MODELS:
        model = work / "models" / f"needle-{name}"  # results name a model after its folder
        shutil.copytree(work / name / "model", model, dirs_exist_ok=True)
        score(model, work / name / "eval")
    if not (work / "race" / "winner-scores" / "recall.json").exists():
        race(work / "race")
    run(
        "report",
        work / "race",
        *(work / name for name in MODELS),
        *options.more,
        "--out",
        work / "report",
        "--title",
        TITLE,
    )
    take_pictures(work / "report" / "report.html")


if __name__ == "__main__":
    main()
