"""One run of a race: train an arm with a seed, read its accuracy on the way and at the end, and keep its weights.

Arms of one seed read the same rows in the same order. Shapes: N rows, T tokens.
"""

import hashlib
import json
import logging
import math
import os
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hybridlm
from hybridlm.data.recall import NO_LABEL, RecallRows
from hybridlm.evaluation import runs
from hybridlm.evaluation.loading import file_hash, versions
from hybridlm.evaluation.symbols import token_rows
from hybridlm.modeling.losses import update_selection_bias
from hybridlm.modeling.modeling_hybridlm import HybridLMForCausalLM

from .arms import TEST_SEED, Entrant, build_model
from .file import MOST_STEPS, Race, Training

logger = logging.getLogger("hybridlm.race")
TEST_TOKENS = 16_384  # that are read in one call
CLIP = 1.0
BETAS = (0.9, 0.95)


def learning_rate(training: Training, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, in a run of `steps` steps."""
    warm = min(1.0, (step + 1) / training.warmup_steps) if training.warmup_steps else 1.0
    if training.schedule == "constant" or step < training.warmup_steps:
        return training.learning_rate * warm
    done = (step + 1 - training.warmup_steps) / max(1, steps - training.warmup_steps)
    share = training.final_share + (1 - training.final_share) * 0.5 * (1 + math.cos(math.pi * done))
    return training.learning_rate * share


def training_rows(race: Race, seed: int, step: int) -> RecallRows:
    """The rows of a step: new ones, or the next of those that were drawn once."""
    task, count = race.task, race.training.batch_size
    if task.rows is None:
        return token_rows(task.name, count, task.length, seed=seed * MOST_STEPS + step, **task.options)
    rows = _drawn_once(task.name, task.rows, task.length, seed, json.dumps(task.options))
    places = torch.arange(step * count, (step + 1) * count)
    order = torch.cat([_order(task.rows, seed, int(epoch)) for epoch in (places // task.rows).unique()])
    chosen = order[places - places[0] // task.rows * task.rows]
    return RecallRows(rows.input_ids[chosen], rows.labels[chosen], rows.chance)


@cache
def _drawn_once(task: str, count: int, length: int, seed: int, options: str) -> RecallRows:
    return token_rows(task, count, length, seed=seed * MOST_STEPS, **json.loads(options))


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * MOST_STEPS + epoch))


@torch.no_grad()
def score(model: nn.Module, race: Race, length: int) -> dict[str, int]:
    """Right answers among rows of a length that no arm is trained on, each token predicted from those before it."""
    rows = token_rows(race.task.name, race.reading.rows, length, seed=TEST_SEED, **race.task.options)
    at_once, right = max(1, TEST_TOKENS // length), 0
    training = model.training
    model.eval()
    for ids, labels in zip(rows.input_ids.split(at_once), rows.labels.split(at_once), strict=True):
        predicted = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        asked = labels[:, 1:] != NO_LABEL
        right += int((predicted == labels[:, 1:])[asked].sum())
    model.train(training)
    return {"right": right, "answers": int(rows.answers.sum())}


def train(race: Race, entrant: Entrant, seed: int) -> tuple[HybridLMForCausalLM, list[dict[str, Any]]]:
    """Train a model; also give its curve: the answers right at some steps, and the loss of the step before."""
    training, model = race.training, build_model(race, entrant, seed).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=BETAS, weight_decay=training.weight_decay, fused=True
    )
    torch.manual_seed(seed)  # of random routing and dropout
    read, curve = set(steps_of(race, entrant)), []
    for step in range(entrant.steps):
        rows = training_rows(race, seed, step)
        loss = model(input_ids=rows.input_ids, labels=rows.labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step, entrant.steps)
        optimizer.step()
        optimizer.zero_grad()
        update_selection_bias(model)
        if step + 1 in read:
            curve.append({"step": step + 1, "loss": round(loss.item(), 5), **score(model, race, race.task.length)})
    return model.eval(), curve


def own_step(race: Race, entrant: Entrant, step: int) -> int:
    """The step of an arm that a step of the race is: another one where FLOPs are matched by steps."""
    return max(1, round(step * entrant.steps / race.training.steps))


def steps_of(race: Race, entrant: Entrant) -> list[int]:
    """The steps at which an arm is read."""
    reading = race.reading
    steps = {*range(reading.every, race.training.steps + 1, reading.every), *race.steps_read}
    return sorted({own_step(race, entrant, step) for step in steps})


def run_hash(race: Race, entrant: Entrant, seed: int) -> str:
    """What a finished run must agree in to be used again."""
    said = asdict(race)
    for name in ("title", "note", "ordering", "arms", "parts", "match", "seeds"):  # of arms, the config counts
        del said[name]
    said = [said, entrant.config, entrant.steps, seed, versions(), code_hash()]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


@cache
def code_hash() -> str:
    """Of the modules that a run executes."""
    package, digest = Path(hybridlm.__file__).parent, hashlib.sha256()
    here = [Path(__file__), *(Path(__file__).with_name(name) for name in ("arms.py", "file.py"))]
    data = [package / "data" / "recall.py", package / "evaluation" / "symbols.py"]
    for path in [*sorted((package / "modeling").glob("*.py")), *data, *here]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def weights_path(folder: Path, arm: str, seed: int) -> Path:
    """Where a run's weights are."""
    return folder / f"{arm}-{seed}.safetensors"


def run(race: Race, arm: str, entrant: Entrant, seed: int, folder: Path) -> dict[str, Any]:
    """Train and test; the weights are written before the result says that they are there."""
    torch.set_num_threads(1)
    started, wall = time.process_time(), time.perf_counter()
    model, curve = train(race, entrant, seed)
    lengths = {str(length): score(model, race, length) for length in race.lengths}
    path = weights_path(folder, arm, seed)
    digest = save_weights(model, path)
    seconds = round(time.process_time() - started, 1)
    accuracy = curve[-1]["right"] / curve[-1]["answers"]
    logger.info("%-20s seed %d: %.3f right after %d steps, %.0f s", arm, seed, accuracy, entrant.steps, seconds)
    return {
        "arm": arm,
        "seed": seed,
        "hash": run_hash(race, entrant, seed),
        "weights": digest,
        "curve": curve,
        "lengths": lengths,
        "process_seconds": seconds,
        "seconds": round(time.perf_counter() - wall, 1),
    }


def save_weights(model: HybridLMForCausalLM, path: Path) -> str:
    """Write the weights, whole or not at all, a tied one once; give the file's SHA-256."""
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    save_file(weights, partial)
    partial.replace(path)
    return file_hash(path)


def load_weights(model: HybridLMForCausalLM, path: Path) -> None:
    """Read what `save_weights` wrote."""
    missing, unknown = model.load_state_dict(load_file(path), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unknown
    model.tie_weights()


def finish(race: Race, entrants: dict[str, Entrant], folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """Give a finished run from its files, or run it and write them; without its weights a run is not finished."""
    entrant, path, weights = entrants[arm], folder / f"{arm}-{seed}.json", weights_path(folder, arm, seed)
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if not weights.exists() or file_hash(weights) != result["weights"]:
            path.unlink()

    def start() -> dict[str, Any]:
        return run(race, arm, entrant, seed, folder)

    return runs.finish_run(start, path, run_hash(race, entrant, seed), f"{arm:<20} seed {seed}", logger)
