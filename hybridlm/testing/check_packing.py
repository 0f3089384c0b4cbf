"""Checks of documents packed into one row, forward and backward."""

import random
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .base import Subject, gradient_error, gradients, random_split
from .stream import Column, Stream


def _packed_row(rng: random.Random, ids: list[int]) -> list[Column]:
    """Cut a row of ids into documents of 1 to 12 tokens; one of a single token is always among them."""
    row: list[Column] = []
    document, start = 0, 0
    while start < len(ids):
        size = 1 if document == 1 else rng.randint(2, 12)
        row += [(token, document) for token in ids[start : start + size]]
        document, start = document + 1, start + size
    return row


def _packed(subject: Subject, name: str, batch_size: int) -> list[list[Column]]:
    rng = subject.rng(name)
    return [_packed_row(rng, ids) for ids in subject.input_ids[:batch_size].tolist()]


def _run(subject: Subject, columns: list[list[Column]], borders: str, split: list[int], use_cache: bool) -> float:
    stream = Stream(subject, len(columns), borders=borders)
    if not use_cache:
        stream.cache = None
    start = 0
    for chunk in split:
        stream.feed([row[start : start + chunk] for row in columns])
        start += chunk
    return stream.check()


def _packed_forward(subject: Subject, borders: str, batch_size: int) -> float:
    columns, rng = _packed(subject, borders, batch_size), subject.rng("splits")
    total = len(columns[0])
    errors = [_run(subject, columns, borders, [total], use_cache) for use_cache in (False, True)]
    splits = [random_split(rng, total, 9), [1] * total]
    return max(*errors, *(_run(subject, columns, borders, split, True) for split in splits))


def packed_by_position_ids(subject: Subject) -> float:
    """Documents packed by position ids are documents apart, with and without a cache, whole and in chunks."""
    return _packed_forward(subject, "position_ids", subject.input_ids.shape[0])


def packed_by_seq_idx(subject: Subject) -> float:
    """Documents packed by seq_idx are documents apart, with and without a cache, whole and in chunks."""
    return _packed_forward(subject, "seq_idx", subject.input_ids.shape[0])


def packed_by_cu_seq_lens(subject: Subject) -> float:
    """Documents packed by cu_seq_lens are documents apart, with and without a cache, whole and in chunks."""
    return _packed_forward(subject, "cu_seq_lens", 1)


def _gradients_of(subject: Subject, logits: Tensor, weights: Tensor) -> None:
    (logits * weights).sum().backward()


def packed_gradients(subject: Subject, borders: tuple[str, ...] = ("position_ids", "seq_idx", "cu_seq_lens")) -> float:
    """The gradient of a loss over packed documents is the sum of their own, and inputs of other documents get none."""
    (columns,) = _packed(subject, "gradients", 1)
    ids = torch.tensor([[column[0] for column in columns]], device=subject.model.device)
    numbers = [column[1] for column in columns]
    cuts = [0, *(t for t in range(1, len(numbers)) if numbers[t] != numbers[t - 1]), len(numbers)]
    generator = torch.Generator().manual_seed(subject.seed)
    shape = (1, ids.shape[1], subject.vocab_size)
    weights = torch.randn(shape, generator=generator).to(subject.reference)
    places = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)])[None]
    arguments: dict[str, dict[str, Any]] = {
        "position_ids": {"position_ids": places},
        "seq_idx": {"seq_idx": torch.tensor([numbers])},
        "cu_seq_lens": dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor(cuts, dtype=torch.int32)),
    }
    subject.model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        for start, stop in pairwise(cuts):
            logits = subject.model(input_ids=ids[:, start:stop], use_cache=False).logits
            _gradients_of(subject, logits, weights[:, start:stop])
        expected, worst = gradients(subject.model), 0.0
        for kind in borders:
            given = {name: value.to(ids.device) for name, value in arguments[kind].items()}
            logits = subject.model(input_ids=ids, use_cache=False, **given).logits
            _gradients_of(subject, logits, weights)
            worst = max(worst, gradient_error(gradients(subject.model), expected))
    return worst


def padded_gradients(subject: Subject) -> float:
    """The gradient of a loss over padded rows is the sum of the rows' own."""
    texts, rng = subject.input_ids.tolist(), subject.rng("padded gradients")
    lengths = [len(text) - rng.randrange(0, len(text) // 2) for text in texts]
    rows = [text[:n] for text, n in zip(texts, lengths, strict=True)]
    width = max(lengths) + 2
    starts = [(width - n) * (b % 2) for b, n in enumerate(lengths)]  # right- and left-padded rows take turns
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[b, start : start + len(row)], mask[b, start : start + len(row)] = torch.tensor(row), 1
    device = subject.model.device
    ids, mask = ids.to(device), mask.to(device)
    generator = torch.Generator().manual_seed(subject.seed)
    weights = torch.randn(*ids.shape, subject.vocab_size, generator=generator).to(subject.reference)
    subject.model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
            stop = start + len(row)
            logits = subject.model(input_ids=ids[b : b + 1, start:stop], use_cache=False).logits
            _gradients_of(subject, logits, weights[b : b + 1, start:stop])
        expected = gradients(subject.model)
        logits = subject.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        _gradients_of(subject, logits, weights * mask[..., None])
    return gradient_error(gradients(subject.model), expected)


def packed_with_pads(subject: Subject) -> float:
    """Packed rows with pads between and inside their documents are documents apart, whole and in chunks."""
    rng = subject.rng("packed with pads")
    columns = []
    for row in _packed(subject, "packed with pads", subject.input_ids.shape[0]):
        spread: list[Column] = []
        for column in row[:-8]:
            spread += [None] * rng.choice([0, 0, 0, 0, 1, 3])
            spread.append(column)
        columns.append(spread)
    width = max(len(row) for row in columns)
    columns = [row + [None] * (width - len(row)) for row in columns]
    split = random_split(rng, width, 9)
    return max(_run(subject, columns, "seq_idx", [width], False), _run(subject, columns, "seq_idx", split, True))


def caching_does_not_change_gradients(subject: Subject) -> float:
    """Asking for the cache changes no gradient, and gradients flow through the cache from chunk to chunk."""
    ids, half = subject.input_ids, subject.input_ids.shape[1] // 2
    generator = torch.Generator().manual_seed(subject.seed)
    weights = torch.randn(subject.reference.shape, generator=generator).to(subject.reference)
    subject.model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        _gradients_of(subject, subject.model(input_ids=ids, use_cache=False).logits, weights)
        expected = gradients(subject.model)
        _gradients_of(subject, subject.model(input_ids=ids, use_cache=True).logits, weights)
        cached = gradients(subject.model)
        cache = subject.new_cache()
        parts = [subject.model(input_ids=x, past_key_values=cache).logits for x in (ids[:, :half], ids[:, half:])]
        _gradients_of(subject, torch.cat(parts, dim=1), weights)
        chunked = gradients(subject.model)
    return max(gradient_error(cached, expected), gradient_error(chunked, expected))
