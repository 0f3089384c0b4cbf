"""One run of the isoFLOP comparison: the data, the training, the curve.

Arms of one seed read the same rows in the same order.

Shapes: B batch, T tokens of a row.
"""

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import torch
from isoflop_arms import ARMS, Settings, build_config, build_model
from isoflop_count import BACKWARD, LayerWatch, counted, flops_of_plain_step
from torch import Tensor, nn
from torch.utils.data import default_collate

from hybridlm.data import Framer, PackedRows, build_byte_tokenizer, load_documents, pack_documents
from hybridlm.data.documents import text_hash
from hybridlm.modeling.losses import update_selection_bias
from hybridlm.training.parameter_groups import parameter_groups
from hybridlm.training.trainer import EpochSampler

logger = logging.getLogger("isoflop")


@cache
def load_data(length: int, num_windows: int) -> tuple[PackedRows, Tensor, str]:
    """Training rows, held-out windows `[N, T + 1]`, and the hash of the documents.

    Windows are taken from held-out documents in the order of their hashes; each starts with the token before its first
    byte, and is read from an empty state, as a row in training is.
    """
    tokenizer = build_byte_tokenizer()
    documents = load_documents("stdlib")
    rows = pack_documents(documents.train, tokenizer, length)
    texts = sorted((row["text"] for row in documents.heldout if row["text"]), key=text_hash)
    windows = []
    for ids in Framer(tokenizer).encode(texts):
        starts = range(0, len(ids) - length, length)
        # spread over many documents: at most an eighth of the windows from one
        windows += [ids[start : start + length + 1] for start in starts][: max(1, num_windows // 8)]
        if len(windows) >= num_windows:
            break
    return rows, torch.from_numpy(np.stack(windows[:num_windows]).astype(np.int64)), documents.manifest_hash


def batches(rows: PackedRows, settings: Settings, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end, in an order that depends on the seed only."""
    sampler, epoch = EpochSampler(len(rows), seed), 0
    while True:
        order = sampler.order(epoch)
        for first in range(0, len(order) - settings.batch_size + 1, settings.batch_size):
            yield default_collate([rows[index] for index in order[first : first + settings.batch_size]])
        epoch += 1


@torch.no_grad()
def heldout_bits(model: nn.Module, windows: Tensor, batch_size: int = 32) -> float:
    """Bits per byte of windows `[N, T + 1]`, in the mode that the model is in."""
    nats = 0.0
    for chunk in windows.split(batch_size):
        logits = model(input_ids=chunk[:, :-1], use_cache=False).logits
        nats += nn.functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / windows[:, 1:].numel()


class Trainee:
    """A model in training, with its FLOPs.

    Args:
        arm: Name of the arm.
        settings: What all runs share.
        seed: Of the weights, of the order of rows, and of random routing.
    """

    def __init__(self, arm: str, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.model = build_model(arm, settings, seed).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.num_steps, self.flops, self.unpadded_flops = 0, 0, 0
        self._of_last_count: tuple[int, int] | None = None  # FLOPs of a step, all and without pads
        self.varies = bool(ARMS[arm].spans(settings))
        self.losses: list[float] = []
        self.watch = LayerWatch(self.model)
        torch.manual_seed(seed)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Take one step; every so often its FLOPs are counted, and stand for those of the steps after it."""
        totals: list[int] = []
        if self._of_last_count is None or (self.varies and self.num_steps % self.settings.count_every == 0):
            self.watch.pad_flops = 0
            with counted(totals):
                output = self.model(**batch)
            self._of_last_count = BACKWARD * totals[0], BACKWARD * (totals[0] - self.watch.pad_flops)
        else:
            output = self.model(**batch)
        output.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1.0, (self.num_steps + 1) / self.settings.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * warm
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_selection_bias(self.model)
        self.num_steps += 1
        self.flops += self._of_last_count[0]
        self.unpadded_flops += self._of_last_count[1]
        self.losses.append((output.loss - (0 if output.aux_loss is None else output.aux_loss)).item())

    def evaluate(self, windows: Tensor) -> dict[str, Any]:
        """Read the held-out loss under the rule of decoding; also the training loss and shares since the last time."""
        training = self.watch.shares()
        self.model.eval()
        bits = heldout_bits(self.model, windows)
        self.model.train()
        point = {
            "step": self.num_steps,
            "flops": self.flops,
            "unpadded_flops": self.unpadded_flops,
            "heldout": round(bits, 5),
            "training": round(float(np.mean(self.losses)) / math.log(2), 5) if self.losses else None,
            "share": training,
            "heldout_share": self.watch.shares()["real"],
        }
        self.losses.clear()
        return point

    def heldout_under_training_rule(self, windows: Tensor) -> float | None:
        """The held-out loss under the rule of training; top-k looks ahead there, so that it measures a leak."""
        if not self.varies:
            return None
        self.watch.close()
        return round(heldout_bits(copy.deepcopy(self.model).train(), windows), 5)


def run_hash(arm: str, settings: Settings, seed: int) -> str:
    """What a finished run must agree in to be used again: settings, the arm's config, documents, torch."""
    config = build_config(arm, settings).to_dict()
    config.pop("transformers_version", None)
    manifest_hash = load_data(settings.length, settings.heldout_windows)[2]
    said = [asdict(settings), config, arm, seed, manifest_hash, torch.__version__]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def run(arm: str, settings: Settings, seed: int, max_seconds: float | None = None) -> dict[str, Any]:
    """Train an arm until it has taken the plain model's steps and spent its FLOPs, whichever comes later.

    Args:
        arm: A key of `ARMS`.
        settings: What all runs share.
        seed: Of the weights, the rows and random routing.
        max_seconds: Stop after that much process time: for a trial of the speed.

    Returns:
        The settings' hash, sizes, times and the curve.
    """
    torch.set_num_threads(1)
    rows, windows, _ = load_data(settings.length, settings.heldout_windows)
    budget = settings.num_steps * flops_of_plain_step(settings)
    started, evaluating = time.process_time(), 0.0
    trainee = Trainee(arm, settings, seed)
    curve = [trainee.evaluate(windows)]
    source = batches(rows, settings, seed)
    interval = max(1, settings.num_steps // settings.num_evaluations)
    while True:
        trainee.step(next(source))
        seconds = time.process_time() - started
        timed_out = max_seconds is not None and seconds > max_seconds
        done = timed_out or (trainee.num_steps >= settings.num_steps and trainee.unpadded_flops >= budget)
        if done or trainee.num_steps % interval == 0:
            before = time.process_time()
            curve.append(trainee.evaluate(windows))
            evaluating += time.process_time() - before
            logger.info(
                "%-8s seed %d: step %4d, %3.0f %% of the FLOPs, held out %.4f bits per byte, %.0f s",
                arm, seed, trainee.num_steps, 100 * trainee.flops / budget, curve[-1]["heldout"], seconds,
            )  # fmt: skip
        if done:
            break
    num_tokens = trainee.num_steps * settings.batch_size * settings.length
    return {
        "arm": arm,
        "seed": seed,
        "hash": run_hash(arm, settings, seed),
        "parameters": trainee.model.num_parameters(),
        "flops_per_token": trainee.flops // num_tokens,
        "unpadded_flops_per_token": trainee.unpadded_flops // num_tokens,
        "heldout_under_training_rule": trainee.heldout_under_training_rule(windows),
        "process_seconds": round(time.process_time() - started, 1),
        "evaluation_seconds": round(evaluating, 1),
        "curve": curve,
    }
