"""Made-up result files of every kind, in the form that the commands write."""

import json
from pathlib import Path
from typing import Any

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "hybridlm": "0.1.0"}
DATE = "2026-01-02T03:04:05+00:00"


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def score(value: float, error: float | None = 0.03, chance: float = 0.1, above: bool | None = None) -> dict[str, Any]:
    found = {"score": value, "error": error, "chance": chance, "num": 20}
    return found | ({} if above is None else {"above_chance": above})


def needle(length: int, likelihood: dict[str, Any], depths: dict[float, float], **more: Any) -> dict[str, Any]:
    return {
        "task": "passkey", "suite": "recall", "length": length, "status": "scored", "haystack": "sentences",
        "beyond_training": length > 512, "num_documents": 20, "likelihood": likelihood, "generated": likelihood,
        "gold": {"likelihood": 1.0, "generated": 1.0},
        "by_depth": [{"depth": depth, "score": value, "num": 10} for depth, value in depths.items()],
    } | more  # fmt: skip


def bits(length: int, value: float) -> dict[str, Any]:
    buckets = [(0, 64), (64, 128), (128, length)]
    return {
        "task": "bits_per_byte", "suite": "length", "length": length, "status": "scored", "source": "a text",
        "beyond_training": length > 512, "num_documents": 4, "gold": {"bits_per_byte": 0.0},
        "bits_per_byte": {"score": value, "error": 0.02, "chance": 8.0, "num": 4, "above_chance": value < 7.9},
        "by_position": [
            {"start": start, "stop": stop, "bits_per_byte": value + 0.1 * n} for n, (start, stop) in enumerate(buckets)
        ],
    }  # fmt: skip


def eval_file(name: str = "small", digest: str = "a" * 64, shift: float = 0.0, **settings: Any) -> dict[str, Any]:
    """`hybridlm eval` of one model: a needle solved at 256, not at 1024, and bits per byte."""
    return {
        "kind": "eval",
        "format": 1,
        "model": {
            "name": name, "class": "X", "hash": digest, "parameters": 123456, "trained_length": 512,
            "tokenizer": "ByteTokenizer", "tokenizer_hash": "b" * 64, "dtype": "fp32", "device": "cpu",
        },
        "settings": {"suite": "all", "lengths": [256, 1024], "beyond": 2, "seed": 0, "samples": 20} | settings,
        "versions": VERSIONS,
        "date": DATE,
        "cells": [
            needle(256, score(0.9 - shift, above=True), {0.0: 1.0, 0.5: 0.8}),
            needle(1024, score(0.125, 0.05, above=False), {0.0: 0.25, 0.5: 0.0}),
            bits(512, 1.5 + shift),
            bits(1024, 1.75 + shift),
            {"task": "niah_single_1", "suite": "ruler", "length": 256, "status": "does not fit", "reason": "too short"},
        ],
        "skipped": [],
        "seconds": 3.0,
    }  # fmt: skip


def accuracy(mean: float, error: float | None, above: bool) -> dict[str, Any]:
    return {"mean": mean, "standard_error": error, "seeds": [mean] * 3, "above_chance": above}


def arm(good: float, size: int, slow: int | None = 180) -> dict[str, Any]:
    return {
        "about": "an arm", "parameters": 5000, "state_bytes": size, "flops_per_token": 10000, "seeds": [0, 1, 2],
        "curve": [[0, 0.06, None], [100, good / 2, 0.02], [200, good, 0.01]],
        "at": {"100": accuracy(good / 2, 0.02, good > 0.3), "200": accuracy(good, 0.01, good > 0.2)},
        "steps_to": {"threshold": 0.95, "seeds": [160, slow, 170]},
        "lengths": {"32": accuracy(good, 0.01, good > 0.2), "128": accuracy(good / 2, 0.02, good > 0.3)},
    }  # fmt: skip


def race_file(**arms: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "race", "name": "made_up", "title": "Made-up race",
        "task": {"task": "mqar", "length": 32, "options": {}},
        "recipe": {"training": {"steps": 200, "learning_rate": 0.004}},
        "machine": VERSIONS | {"processor": "some", "processes": 2},
        "chance": 0.0625, "matched": "state_bytes",
        "arms": arms or {"hybrid": arm(0.99, 8192), "mamba2": arm(0.07, 4096, None)},
        "ordering": {"claim": "hybrid beats mamba2", "shows": True, "why": "hybrid has 0.99"},
        "summary": ["A sentence of the race."], "runs": [],
    }  # fmt: skip


def training_folder(folder: Path, name: str = "trained", steps: int = 5) -> Path:
    """What train.py leaves: results.json, and a record a step with a router and a span."""
    results = {
        "name": name, "parameters": 4242, "active_parameters": 4000, "expected_active_parameters": 3000,
        "layers": [], "spans": [], "data": {"path": "texts", "length": 128, "num_documents": 9},
        "training": {
            "steps": steps, "rows_per_step": 2, "learning_rate": 0.001, "schedule": "cosine", "seconds": 12.5,
            "device": "1 CPU thread", "seed": 0,
        },
        "tokens_seen": 1280, "versions": VERSIONS,
        "heldout": [{"length": 128, "bits_per_byte": 3.25, "num_bytes": 999, "num_tokens": 999, "num_documents": 3}],
        "ngrams": [{"order": 1, "bits_per_byte": 3.5}],
    }  # fmt: skip
    write(folder / "results.json", results)
    records = [
        {
            "step": step, "loss": 6.0 / step, "bits_per_byte": 8.0 / step,
            "layer_1/expert_max_load": 1.5, "layer_1/router_entropy": 0.75, "layer_1/dead_experts": 1.0,
            "span_0_mixture_of_depths_layer_2/share": 0.25, "span_0_mixture_of_depths_layer_2/wished_share": 0.3,
            "layer_2/token_share": 0.25,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "data.json").write_text('{"manifest_hash": "x"}')
    return folder


def check_file(name: str = "checked", reason: str = "cannot") -> dict[str, Any]:
    results = [
        {"check": "chunks", "promise": "chunks change nothing", "compared": "", "verdict": "ok", "error": 1e-12,
         "tolerance": 1e-9, "reason": "", "seconds": 0.1},
        {"check": "packed", "promise": "packing changes nothing", "compared": "", "verdict": "differs", "error": 0.25,
         "tolerance": 1e-9, "reason": reason, "seconds": 0.1},
        {"check": "beams", "promise": "beams change nothing", "compared": "", "verdict": "raises", "error": "inf",
         "tolerance": None, "reason": reason, "seconds": 0.1},
        {"check": "rows", "promise": "rows", "compared": "", "verdict": "not applicable", "error": None,
         "tolerance": None, "reason": "", "seconds": 0.0},
    ]  # fmt: skip
    model = {"model": name, "results": results, "dtype": "fp64", "seed": 0, "problem": "", "versions": VERSIONS}
    return {"command": "hybridlm check", "versions": VERSIONS, "models": [model]}


def write_all(folder: Path, name: str = "small") -> Path:
    """A folder with results of every kind, of two models."""
    write(folder / "eval" / "all.json", eval_file(name))
    write(folder / "eval" / "cells" / "passkey-256-abc.json", {"task": "passkey"})
    write(folder / "other" / "all.json", eval_file("other", "c" * 64, shift=0.2))
    write(folder / "race" / "race.json", race_file())
    training_folder(folder / "train", name)
    write(folder / "check.json", check_file(name))
    return folder
