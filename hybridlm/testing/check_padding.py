"""Checks of pads: on the left, on the right, anywhere in a cached stream."""

import random

import torch

from .base import Subject
from .stream import Column, Stream


def _texts(subject: Subject) -> list[list[Column]]:
    return [[(token, 0) for token in row] for row in subject.input_ids.tolist()]


def left_padding(subject: Subject, widths: tuple[int, ...] = (1, 3, 17)) -> float:
    """Left padding of any width changes nothing at real tokens, in one forward and in decoding."""
    texts, worst = _texts(subject), 0.0
    for width in widths:
        pads = [width * (len(texts) - 1 - b) // max(len(texts) - 1, 1) for b in range(len(texts))]
        length = min(len(text) + pad for text, pad in zip(texts, pads, strict=True))
        columns = [[None] * pad + text[: length - pad] for text, pad in zip(texts, pads, strict=True)]
        worst = max(worst, _whole_and_decoded(subject, columns, length - 5))
    return worst


def _whole_and_decoded(subject: Subject, columns: list[list[Column]], prompt: int) -> float:
    whole = Stream(subject, len(columns), no_cache=True)
    whole.feed(columns)
    if not subject.keeps_cache:
        return whole.check()
    stream = Stream(subject, len(columns))
    stream.feed([row[:prompt] for row in columns])
    for place in range(prompt, len(columns[0])):
        stream.feed([row[place : place + 1] for row in columns])
    return max(stream.check(), whole.check())


def right_padding(subject: Subject) -> float:
    """Right padding changes nothing, and decoding by forward with the mask goes on from each row's last token."""
    texts, rng = _texts(subject), subject.rng("right")
    lengths = [len(text) - 6 - (rng.randrange(1, 6) if b else 0) for b, text in enumerate(texts)]
    columns = [text[:n] + [None] * (max(lengths) - n) + text[n : n + 5] for text, n in zip(texts, lengths, strict=True)]
    return _whole_and_decoded(subject, columns, max(lengths))


def pads_in_stream(subject: Subject, num_streams: int = 2) -> float:
    """Pads anywhere in a cached stream, inside its chunks too, change nothing at real tokens."""
    rng, worst = subject.rng("pads"), 0.0
    for _ in range(num_streams):
        stream = Stream(subject, subject.input_ids.shape[0])
        left = [iter(text) for text in _texts(subject)]
        for _ in range(8):
            num_tokens = rng.choice([1, 1, 2, 3, 7])
            columns = [[_next_or_pad(rng, text) for _ in range(num_tokens)] for text in left]
            stream.feed(columns)
        worst = max(worst, stream.check())
    return worst


def _next_or_pad(rng: random.Random, text) -> Column:
    return next(text, None) if rng.random() < 0.6 else None


def chunks_of_pads(subject: Subject) -> float:
    """A chunk in which a row, or every row, is all pads changes nothing and gives no NaN."""
    texts, worst = _texts(subject), 0.0
    for chunk in (1, 4):
        stream, places = Stream(subject, len(texts)), [0] * len(texts)
        empty = range(len(texts))
        for absent in ({0}, set(empty), set(empty) - {0}, {0}, set(), set(empty), {1 % len(texts)}, set()):
            columns = []
            for b, text in enumerate(texts):
                fed = [] if b in absent else text[places[b] : places[b] + chunk]
                places[b] += len(fed)
                columns.append([None] * (chunk - len(fed)) + fed)
            stream.feed(columns)
        worst = max(worst, stream.check())
    return worst


def mask_of_ones(subject: Subject) -> float:
    """A mask without any pad changes nothing, and may come and go between calls."""
    ids, half = subject.input_ids, subject.input_ids.shape[1] // 2
    whole = subject.forward(ids, attention_mask=torch.ones_like(ids))
    cache = subject.new_cache()
    first = subject.forward(ids[:, :half], cache, attention_mask=torch.ones_like(ids[:, :half]))
    second = subject.forward(ids[:, half : half + 3], cache)
    third = subject.forward(ids[:, half + 3 :], cache, attention_mask=torch.ones_like(ids))
    parts = torch.cat([first, second, third], dim=1)
    return max(subject.error(whole, subject.reference), subject.error(parts, subject.reference))


def static_with_pads(subject: Subject) -> float:
    """A static cache takes left-padded rows and pads between chunks."""
    texts = _texts(subject)
    stream = Stream(subject, len(texts), subject.new_cache(static=True, max_length=len(texts[0]) + 5))
    pads = [3 * b for b in range(len(texts))]
    columns = [[None] * pad + text for text, pad in zip(texts, pads, strict=True)]
    start = 0
    for chunk in (9, 1, 1, 6, 1):
        stream.feed([row[start : start + chunk] for row in columns])
        start += chunk
    return stream.check()
