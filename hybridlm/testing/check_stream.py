"""Checks of one stream without pads: chunks, single steps, static and compiled caches, causality, snapshots."""

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor

from .base import NotApplicable, Subject, random_split
from .stream import Stream


def _columns(ids: Tensor) -> list[list[tuple[int, int]]]:
    return [[(token, 0) for token in row] for row in ids.tolist()]


def _feed_split(subject: Subject, split: list[int], cache: Any = None) -> float:
    stream, start = Stream(subject, subject.input_ids.shape[0], cache), 0
    for chunk in split:
        stream.feed(_columns(subject.input_ids[:, start : start + chunk]))
        start += chunk
    return stream.check()


def chunked_continuation(subject: Subject, num_splits: int = 4) -> float:
    """Any split of a sequence into chunks gives the logits of one full forward."""
    rng, total = subject.rng("chunked"), subject.input_ids.shape[1]
    return max(_feed_split(subject, random_split(rng, total)) for _ in range(num_splits))


def step_is_scan(subject: Subject) -> float:
    """Single tokens through the cache give the logits of one full forward."""
    return _feed_split(subject, [1] * subject.input_ids.shape[1])


def last_logits_only(subject: Subject) -> float:
    """Asking for some logits gives those logits."""
    ids, columns = subject.input_ids, torch.tensor([0, subject.input_ids.shape[1] // 2])
    last = subject.forward(ids, logits_to_keep=2)
    some = subject.forward(ids, logits_to_keep=columns.to(ids.device))
    return max(subject.error(last, subject.reference[:, -2:]), subject.error(some, subject.reference[:, columns]))


def embeddings_are_tokens(subject: Subject) -> float:
    """Embeddings instead of token ids give the same logits, whole and in chunks."""
    with torch.no_grad():
        embeds = subject.model.get_input_embeddings()(subject.input_ids)
    half = embeds.shape[1] // 2
    cache = subject.new_cache()
    parts = [subject.forward(None, cache, inputs_embeds=part) for part in (embeds[:, :half], embeds[:, half:])]
    whole = subject.forward(None, inputs_embeds=embeds)
    return max(subject.error(actual, subject.reference) for actual in (whole, torch.cat(parts, dim=1)))


def causal_by_perturbation(subject: Subject, places: int = 4) -> float:
    """Changing a token changes no logit before it."""
    rng, worst = subject.rng("causal"), 0.0
    length = subject.input_ids.shape[1]
    for place in [length - 1, *(rng.randrange(1, length) for _ in range(places - 1))]:
        edited = subject.input_ids.clone()
        edited[:, place] = (edited[:, place] + rng.randrange(1, subject.vocab_size)) % subject.vocab_size
        logits = subject.forward(edited)
        worst = max(worst, subject.error(logits[:, :place], subject.reference[:, :place]))
    return worst


def causal_by_gradient(subject: Subject) -> float:
    """The gradient of a logit with respect to later inputs is zero, and with respect to earlier ones it is not."""
    with torch.no_grad():
        embeds = subject.model.get_input_embeddings()(subject.input_ids)
    embeds.requires_grad_()
    worst, seen = 0.0, 0.0
    for place in range(embeds.shape[1] // 2, embeds.shape[1] - 1):  # a token may pass by all layers that mix tokens
        with torch.enable_grad():
            logits = subject.call(inputs_embeds=embeds, use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits[:, place].square().sum(), embeds)
        scale = float(gradient.abs().max())
        worst = max(worst, float(gradient[:, place + 1 :].abs().max()) / scale)
        seen = float(gradient[:, :place].abs().max()) / scale
        if seen > 1e-4:
            break
    assert seen > 1e-4, "the logits do not depend on earlier tokens"
    return worst


def static_is_dynamic(subject: Subject) -> float:
    """A static cache gives the logits of a growing one, also after a reset."""
    ids = subject.input_ids
    cache, worst = subject.new_cache(static=True, max_length=ids.shape[1] + 3), 0.0
    half = ids.shape[1] // 2
    for split in ([half] + [1] * 5 + [ids.shape[1] - half - 5], [1] * 7 + [ids.shape[1] - 7]):
        worst = max(worst, _feed_split(subject, split, cache))
        cache.reset()
    return worst


def compiled_decode(
    subject: Subject,
    num_steps: int = 6,
    backend: str = "eager",
    dynamic: bool | None = False,
    most_graphs: int | None = 2,
) -> float:
    """A decoding step compiled without graph breaks gives the logits of the eager one.

    Args:
        subject: The model under test.
        num_steps: Steps to decode.
        backend: Of `torch.compile`.
        dynamic: As in `torch.compile`; by default a number that changes is compiled anew.
        most_graphs: Graphs that may be compiled.
    """
    ids, worst = subject.input_ids, 0.0
    start = ids.shape[1] - num_steps
    cache = subject.new_cache(static=True, max_length=ids.shape[1])
    subject.forward(ids[:, :start], cache)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(subject.model.forward, backend=backend, fullgraph=True, dynamic=dynamic)
    try:
        for place in range(start, ids.shape[1]):
            with torch.no_grad():
                logits = step(**subject.arguments(cache, input_ids=ids[:, place : place + 1], use_cache=True)).logits
            worst = max(worst, subject.error(logits[:, 0], subject.reference[:, place]))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.reset()
    assert most_graphs is None or graphs <= most_graphs, f"{graphs} graphs were compiled for {num_steps} steps"
    return worst


def repeatable(subject: Subject) -> float:
    """The same call twice gives the same bits."""
    return 0.0 if torch.equal(subject.forward(subject.input_ids), subject.reference) else float("inf")


def snapshots(subject: Subject) -> float:
    """A cache can be copied, put back, saved and loaded into another cache, and continued each time."""
    rng = subject.rng("snapshots")
    stream = Stream(subject, subject.input_ids.shape[0])
    if not hasattr(stream.cache, "snapshot"):
        raise NotApplicable("the cache has no snapshot()")
    stream.feed_tokens(rng, 5)
    stream.feed_tokens(rng, 1)
    stream.feed_tokens(rng, 6)
    kept = stream.branch()
    kept.cache = stream.cache.snapshot()
    loaded = stream.branch()
    loaded.cache = subject.new_cache()
    with tempfile.TemporaryDirectory() as folder:
        stream.cache.save(folder)
        loaded.cache.load(folder)
    restored = stream.branch()
    stream.feed_tokens(rng, 4)
    restored.cache = copy.deepcopy(stream.cache)
    restored.cache.restore(kept.cache)
    streams = [stream, kept, loaded, restored]
    for _ in range(2):
        for other in streams:
            other.feed_tokens(rng, 1)
            other.feed_tokens(rng, 3)
    return max(other.check() for other in streams)
