"""Checks that need another process: data parallelism, remote code, a snapshot that goes on elsewhere."""

import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from .base import NotApplicable, Subject, gradient_error, gradients, quiet, require_independent_tokens
from .stream import Stream
from .worker import digest
from .workers import POOL, finish_all

LARGEST = 300_000_000  # parameters of a model that other processes load


def _check_size(subject: Subject) -> None:
    total = sum(p.numel() for p in subject.model.parameters())
    if total > LARGEST:
        raise NotApplicable(f"{total:,} parameters are too many for several processes")
    if subject.model.device.type != "cpu":
        raise NotApplicable("the workers run on the CPU")


def _save(model: nn.Module, folder: str) -> tuple[type, str, torch.dtype, str | None]:
    """Save a model for another process; what `worker.load` takes."""
    with quiet():
        model.save_pretrained(f"{folder}/model")
    return type(model), f"{folder}/model", model.dtype, getattr(model.config, "_experts_implementation", None)


def data_parallel(subject: Subject, timeout: float = 60.0) -> float:
    """Two gloo processes under DistributedDataParallel give the loss and gradients of one process."""
    _check_size(subject)
    model = subject.copy_of_model().train()
    require_independent_tokens(model)
    batch = {"input_ids": subject.input_ids[:2], "labels": subject.input_ids[:2]}
    batches = [{name: value[rank : rank + 1] for name, value in batch.items()} for rank in range(2)]
    workers, rendezvous = POOL.ranks()
    with tempfile.TemporaryDirectory() as folder:
        source = _save(model, folder)
        for rank, worker in enumerate(workers):
            worker.start("data_parallel", source, batches[rank], rank, 2, rendezvous)
        with torch.enable_grad():
            loss = subject.call(model, **batch).loss
            loss.backward()
        expected, loss = gradients(model), float(loss.detach())
        answers = finish_all(workers, timeout)
    together = sum(answer[0] for answer in answers) / 2
    return max(abs(together - loss) / abs(loss), *(gradient_error(found, expected) for _, found in answers))


def remote_code(subject: Subject, timeout: float = 60.0) -> float:
    """The code that a saved folder ships gives the weights and logits of the package, where that is not installed."""
    _check_size(subject)
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            subject.model.save_pretrained(folder)
        if "auto_map" not in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")):
            raise NotApplicable("a saved folder ships no code")
        worker = POOL.worker("remote", "hybridlm")
        worker.start("remote", folder, subject.input_ids)
        logits, weights, module = worker.finish(timeout)
    assert module.startswith("transformers_modules."), f"{module} was loaded instead of the code in the folder"
    assert weights == digest(subject.model), "the weights differ"
    return subject.error(logits, subject.reference)


def snapshot_elsewhere(subject: Subject, timeout: float = 60.0) -> float:
    """A cache that was saved goes on in another process."""
    stream = Stream(subject, subject.input_ids.shape[0])
    if not hasattr(stream.cache, "save"):
        raise NotApplicable(f"a {type(stream.cache).__name__} has no save()")
    _check_size(subject)
    rng = subject.rng("elsewhere")
    for num_tokens in (5, 1, 6):
        stream.feed_tokens(rng, num_tokens)
    calls = [subject.random_ids(rng, len(stream.rows), num_tokens) for num_tokens in (1, 3)]
    worker = POOL.worker("rank 0")
    with tempfile.TemporaryDirectory() as folder:
        source, saved = _save(subject.model, folder), f"{folder}/cache"
        stream.cache.save(saved)
        worker.start("go_on", source, saved, calls)
        here = [subject.forward(ids, stream.cache) for ids in calls]
        there = worker.finish(timeout)
    return max(subject.error(a, b) for a, b in zip(there, here, strict=True))
