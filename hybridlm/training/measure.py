"""What a run measured: facts about the training, held-out bits per byte, n-gram baselines."""

import importlib.metadata
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from hybridlm.analysis.planner import plan
from hybridlm.analysis.span_rules import bits_per_byte_by_rule
from hybridlm.data import Documents, PackedRows, PackedStream
from hybridlm.data.documents import STDLIB
from hybridlm.hub.describe import layer_rows, residual_of, span_rows
from hybridlm.modeling.configuration_hybridlm import HybridLMConfig

from .bits_per_byte import evaluate_bits_per_byte
from .ngram import NUM_BYTES, START, WittenBell
from .run_file import RunFile
from .trainer import HybridTrainer


def seen_segments(rows: PackedRows, indices: list[int]) -> list[np.ndarray]:
    """The byte tokens of the given rows, cut where documents start: what a model with empty states could learn from."""
    segments = []
    for index in indices:
        tokens, starts = rows.row(index)
        segments += np.split(tokens, np.flatnonzero(starts[1:]) + 1)
    return segments


def shared_line_fraction(documents: Documents, heldout: list[str], shortest: int = 20) -> float:
    """Fraction of the held-out bytes in lines that training documents also hold (lines of `shortest` and more)."""
    known = {line for row in documents.train for line in (row["text"] or "").splitlines() if len(line) >= shortest}
    lines = [line for text in heldout for line in text.splitlines(keepends=True)]
    shared = sum(len(line.encode()) for line in lines if line.rstrip("\r\n") in known)
    return shared / max(sum(len(line.encode()) for line in lines), 1)


def describe_run(
    run_file: RunFile, trainer: HybridTrainer, documents: Documents, data: PackedRows | PackedStream, seconds: float
) -> dict[str, Any]:
    """Everything about a run that is known when training ends."""
    args: TrainingArguments = trainer.args
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    threads = torch.get_num_threads()
    device = args.device.type if args.device.type != "cpu" else f"{threads} CPU thread{'s' * (threads != 1)}"
    config = trainer.model.config
    active, expected_active = _active_parameters(config)
    local = Path(run_file.data.path).exists() or run_file.data.path == STDLIB
    base = run_file.model.pretrained
    return {
        "kind": "training",
        "name": run_file.publish.name,
        "base_model": base if base is None or not Path(base).exists() else Path(base).resolve().name,
        "parameters": trainer.model.num_parameters(),
        "active_parameters": active,
        "expected_active_parameters": expected_active,
        "layers": layer_rows(config),
        "spans": span_rows(config, run_file.data.length),
        "residual": residual_of(config),
        "data": {
            "path": Path(run_file.data.path).name if Path(run_file.data.path).exists() else run_file.data.path,
            "hub": not local,
            "length": run_file.data.length,
            "manifest_hash": documents.manifest_hash,
            "num_skipped_files": documents.num_skipped,
            **asdict(data.counts),
        },
        "training": {
            "steps": trainer.state.global_step,
            "rows_per_step": rows_per_step,
            "learning_rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)).replace("_", " "),
            "seconds": seconds,
            "device": device,
            "seed": args.seed,
        },
        "tokens_seen": trainer.state.global_step * rows_per_step * run_file.data.length,
        "versions": {
            "hybridlm": _own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _active_parameters(config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """Parameters that a token which enters every layer passes through, and the mean; `None` if it is not our model."""
    if config.model_type != HybridLMConfig.model_type:
        return None, None
    total = plan(config).total
    return total.num_active_parameters, total.expected_active_parameters


def _own_version() -> str:
    try:
        return importlib.metadata.version("hybridlm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def measure_heldout(
    run_file: RunFile,
    trainer: HybridTrainer,
    tokenizer: PreTrainedTokenizerBase,
    data: PackedRows | PackedStream,
    heldout: list[str],
) -> dict[str, Any]:
    """Held-out bits per byte of the model, and of n-gram models fitted on what training saw."""
    options, length = run_file.evaluation, run_file.data.length
    if not heldout:
        return {}
    started = time.perf_counter()
    lengths = [length, 2 * length, 4 * length] if options.lengths is None else options.lengths
    scores = [
        asdict(evaluate_bits_per_byte(trainer.model, heldout, tokenizer, length, options.batch_tokens))
        for length in lengths
    ]
    results: dict[str, Any] = {"heldout": scores}
    if options.leaky_top_k and lengths:
        rules = bits_per_byte_by_rule(trainer.model, heldout, tokenizer, lengths[0], options.batch_tokens)
        results["heldout_by_rule"] = {rule: asdict(score) for rule, score in rules.items()}
    results["evaluation_seconds"] = time.perf_counter() - started
    if options.ngram_orders:
        segments = seen_segments(data, trainer.rows_seen())
        results["bytes_seen"] = int(sum((segment < NUM_BYTES).sum() for segment in segments))
        targets = [np.array([START, *text.encode()]) for text in heldout]
        results["ngrams"] = [
            {"order": order, "bits_per_byte": WittenBell(order, segments).bits_per_byte(targets)}
            for order in options.ngram_orders
        ]
    return results


def unmet_demands(run_file: RunFile, results: dict[str, Any]) -> list[str]:
    """Say which of the run file's demands the results do not meet."""
    failures = []
    order = run_file.evaluation.below_ngram_order
    if order is not None:
        measured = results["heldout"][0]["bits_per_byte"] if results.get("heldout") else float("inf")
        baseline = next(ngram["bits_per_byte"] for ngram in results["ngrams"] if ngram["order"] == order)
        if not measured < baseline:
            failures.append(
                f"held-out bits per byte {measured:.4f}, not below {baseline:.4f} of the order-{order} model"
            )
    if "reload" in results and not results["reload"]["logits_equal"]:
        difference = results["reload"]["max_difference"]
        failures.append(f"the reloaded model's logits differ from the saved one's by up to {difference:.3g}")
    return failures
