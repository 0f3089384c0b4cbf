"""One run of the memory comparison: a curriculum of lengths, a passkey, and tests far beyond the trained length.

Arms of one seed read the same rows in the same order, stage by stage.
"""

import hashlib
import json
import logging
import time
from dataclasses import asdict
from typing import Any

import torch
from memory_arms import Settings, build_config, build_model, row_state_bytes
from torch import Tensor, nn

from hybridlm.data import RecallRows, key_value_recall, passkey
from hybridlm.data.recall import NO_LABEL

logger = logging.getLogger("memory")
TASKS = ("recall", "passkey")
TEST_SEED = 10**9  # training rows have smaller ones


def rows_of(task: str, num_rows: int, length: int, settings: Settings, seed: int) -> RecallRows:
    """Rows of one of `TASKS`."""
    if task == "recall":
        # with the answers in the row, the shortest one would hold no filler, and all later ones would
        options = {"num_pairs": settings.num_pairs, "vocabulary": settings.vocabulary, "show_answers": False}
        return key_value_recall(num_rows, length, seed=seed, **options)
    return passkey(num_rows, length, seed=seed, vocabulary=settings.vocabulary)


def targets_of(labels: Tensor) -> Tensor:
    """`[N, T]`, what each token must predict, from labels at their own places."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)


def right(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each answer, whether it has the largest logit; flat."""
    asked = targets != NO_LABEL
    return logits[asked].argmax(-1) == targets[asked]


@torch.no_grad()
def right_by_pieces(model: nn.Module, rows: RecallRows, piece: int) -> Tensor:
    """The same of whole rows, which are read piece by piece: a long row costs what its tokens cost."""
    marks, cache = [], None
    for tokens, targets in zip(rows.input_ids.split(piece, 1), targets_of(rows.labels).split(piece, 1), strict=True):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        marks.append(right(output.logits, targets))
    return torch.cat(marks)


class Trainee:
    """A model in training.

    Args:
        arm: Name of the arm.
        settings: What all runs share.
        seed: Of the weights and the rows.
    """

    def __init__(self, arm: str, settings: Settings, seed: int) -> None:
        self.arm, self.settings, self.seed = arm, settings, seed
        self.model = build_model(arm, settings, seed).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.num_steps = 0

    def step(self, rows: RecallRows) -> float:
        """Take one step; give the share of right answers before it."""
        settings = self.settings
        output = self.model(input_ids=rows.input_ids, labels=rows.labels)
        output.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (self.num_steps + 1) / settings.warmup_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        return right(output.logits.detach(), targets_of(rows.labels)).float().mean().item()

    def stage(self, task: str, number: int, length: int, num_rows: int, max_steps: int) -> dict[str, Any]:
        """Train at one length until it is solved or the steps are used up."""
        settings, shares, started = self.settings, [], time.process_time()
        for step in range(max_steps):
            # the same rows for all arms, whenever they come to this stage
            seed = (self.seed * 10 + number) * 100_000 + step
            shares.append(self.step(rows_of(task, num_rows, length, settings, seed)))
            recent = shares[-settings.patience :]
            if len(recent) == settings.patience and sum(recent) >= settings.solved * len(recent):
                break
        recent = shares[-settings.patience :]
        seconds = time.process_time() - started
        record = {"task": task, "length": length, "rows": num_rows, "max_steps": max_steps, "steps": len(shares)}
        record |= {"accuracy": round(sum(recent) / len(recent), 4), "process_seconds": round(seconds, 1)}
        logger.info(
            "%-11s seed %d: %s at %d, %d steps, %.3f right, %.0f s",
            self.arm, self.seed, task, length, len(shares), record["accuracy"], seconds,
        )  # fmt: skip
        return record

    def test(self, task: str) -> dict[str, dict[str, float | int]]:
        """Score rows that were not trained on, at every length; keys are lengths."""
        settings, scores = self.settings, {}
        self.model.eval()
        for length in settings.test_lengths:
            rows = rows_of(task, settings.test_rows, length, settings, TEST_SEED)
            started = time.process_time()
            marks = right_by_pieces(self.model, rows, settings.test_piece)
            scores[str(length)] = {
                "right": int(marks.sum()),
                "answers": marks.numel(),
                "rows": settings.test_rows,
                "process_seconds": round(time.process_time() - started, 1),
            }
        self.model.train()
        return scores


def run_hash(arm: str, settings: Settings, seed: int) -> str:
    """What a finished run must agree in to be used again: settings, the arm's config, torch."""
    config = build_config(arm, settings).to_dict()
    config.pop("transformers_version", None)
    said = [asdict(settings), config, arm, seed, torch.__version__]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def run(arm: str, settings: Settings, seed: int) -> dict[str, Any]:
    """Train through the stages, test recall, train on the passkey, test that."""
    torch.set_num_threads(1)
    started, wall = time.process_time(), time.perf_counter()
    trainee = Trainee(arm, settings, seed)
    stages = [trainee.stage("recall", number, *stage) for number, stage in enumerate(settings.stages)]
    scores = {"recall": trainee.test("recall")}
    stages.append(trainee.stage("passkey", len(settings.stages), *settings.passkey))
    scores["passkey"] = trainee.test("passkey")
    return {
        "arm": arm,
        "seed": seed,
        "hash": run_hash(arm, settings, seed),
        "parameters": trainee.model.num_parameters(),
        "state_bytes": row_state_bytes(arm, settings),
        "stages": stages,
        "scores": scores,
        "process_seconds": round(time.process_time() - started, 1),
        "seconds": round(time.perf_counter() - wall, 1),
    }
