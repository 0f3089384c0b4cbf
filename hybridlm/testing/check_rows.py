"""Checks of rows and of rollback: moves of rows through the cache, and `crop`."""

import random

from .base import Subject
from .stream import Column, Stream


def _starter(subject: Subject, rng: random.Random, padded: bool, window: int | None = None) -> Stream:
    """A stream with a few calls behind it."""
    cache = subject.new_cache() if window is None else subject.recording_cache(window)
    stream = Stream(subject, subject.input_ids.shape[0], cache)
    for num_tokens in (7, 1, 2):
        feed_random(stream, rng, num_tokens, pad_rate=0.4 if padded else 0.0)
    return stream


def feed_random(stream: Stream, rng: random.Random, num_tokens: int, pad_rate: float = 0.0, document: int = 0) -> None:
    """Feed random tokens and pads to every row."""
    size = stream.subject.vocab_size

    def column() -> Column:
        return None if rng.random() < pad_rate else (rng.randrange(size), document)

    stream.feed([[column() for _ in range(num_tokens)] for _ in stream.rows])


def rows_are_independent(subject: Subject) -> float:
    """A row alone gives the logits that it gives in a batch, whatever the other rows hold."""
    ids = subject.input_ids
    alone = max(subject.error(subject.forward(ids[b : b + 1]), subject.reference[b : b + 1]) for b in range(len(ids)))
    order = list(reversed(range(len(ids))))
    return max(alone, subject.error(subject.forward(ids[order]), subject.reference[order]))


def rows_move_with_the_cache(subject: Subject) -> float:
    """Permuting, repeating and selecting rows of a cache permutes, repeats and selects the logits that follow."""
    worst = 0.0
    for padded in (False, True):
        rng = subject.rng(f"rows {padded}")
        start = _starter(subject, rng, padded)
        last = len(start.rows) - 1
        moved = []
        for indices, method in (
            ([last, *range(last)], "reorder_cache"),
            ([0, 0, *range(last - 1)], "reorder_cache"),
            ([last, 0], "batch_select_indices"),
            ([last], "batch_select_indices"),
        ):
            moved.append(start.branch())
            moved[-1].select(indices, method)
        moved.append(start.branch())
        moved[-1].repeat(3)
        for stream in moved:
            feed_random(stream, rng, 1)
            feed_random(stream, rng, 4, pad_rate=0.4 if padded else 0.0)
            worst = max(worst, stream.check())
    return worst


def _fill(stream: Stream, rng: random.Random, style: str, total: int, pad_rate: float) -> None:
    calls = {"steps": [1] * total, "one call": [total], "calls": [total // 2, 1, 1, total - total // 2 - 2]}[style]
    for num_tokens in calls:
        if num_tokens > 0:
            feed_random(stream, rng, num_tokens, pad_rate)


def rollback(
    subject: Subject,
    window: int = 6,
    lengths: tuple[int, ...] = (5, 19),
    styles: tuple[str, ...] = ("steps", "one call", "calls"),
    batch_sizes: tuple[int, ...] = (1, 3),
    depths: tuple[int, ...] | None = None,
) -> float:
    """`crop(-k)` takes back k tokens for every k up to the recorded window, at any length, pads or not.

    Args:
        subject: The model under test.
        window: Tokens that the cache is asked to record.
        lengths: Tokens fed before the crop.
        styles: How they are fed: "steps", "one call", "calls".
        batch_sizes: Rows; more than one row is padded.
        depths: The values of k; by default all from 1 to the window.
    """
    worst = 0.0
    for style in styles:
        for length in lengths:
            for batch_size in batch_sizes:
                rng = subject.rng(f"rollback {style} {length} {batch_size}")
                stream = Stream(subject, batch_size, subject.recording_cache(window))
                pad_rate = 0.3 if batch_size > 1 else 0.0
                _fill(stream, rng, style, length, pad_rate)
                for depth in depths or range(1, min(window, length) + 1):
                    if depth <= length:
                        worst = max(worst, _rolled_back(stream, rng, depth, pad_rate))
    return worst


def _rolled_back(stream: Stream, rng: random.Random, depth: int, pad_rate: float) -> float:
    branch = stream.branch()
    branch.crop(depth)
    feed_random(branch, rng, 1)
    feed_random(branch, rng, 3, pad_rate)
    return branch.check()


def rollback_beyond_the_record(subject: Subject, window: int = 4, length: int = 30) -> float:
    """`crop` beyond the record raises an error and changes nothing, or is right."""
    rng, worst = subject.rng("beyond"), 0.0
    for style in ("steps", "calls"):
        stream = Stream(subject, 2, subject.recording_cache(window))
        _fill(stream, rng, style, length, 0.0)
        for depth in (length + 1, length, length - 1, 3 * window, 2 * window, window + 1):
            branch = stream.branch()
            try:
                branch.crop(depth)
            except ValueError:
                branch.crop(window)  # still there
            feed_random(branch, rng, 1)
            worst = max(worst, branch.check())
        for wrong in (1, stream.num_columns):
            try:
                stream.cache.crop(wrong)
            except ValueError:
                continue
            raise AssertionError(f"crop({wrong}) was accepted")
        stream.crop(window)
        feed_random(stream, rng, 2)
        worst = max(worst, stream.check())
    return worst


def rollback_again_and_again(subject: Subject, window: int = 8, rounds: int = 12) -> float:
    """Drafts of any size, each taken back in part, leave the state of what was kept; copies share nothing."""
    worst = 0.0
    for padded in (False, True):
        rng = subject.rng(f"drafts {padded}")
        stream = _starter(subject, rng, padded, window)
        for _ in range(rounds):
            draft = rng.randint(1, window)
            if rng.random() < 0.5:
                feed_random(stream, rng, draft, pad_rate=0.3 if padded else 0.0)
            else:
                for _ in range(draft):
                    feed_random(stream, rng, 1, pad_rate=0.3 if padded else 0.0)
            other = stream.branch()
            other.crop(rng.randint(1, window))
            stream.crop(rng.randint(0, draft))
            feed_random(other, rng, 2)
            worst = max(worst, other.check())
        worst = max(worst, stream.check())
    return worst


def rollback_across_documents(subject: Subject, window: int = 8) -> float:
    """`crop` back over the border of a document goes on with the earlier one, or begins another."""
    worst = 0.0
    for borders in ("position_ids", "seq_idx"):
        for steps in (False, True):
            for depth in range(1, window + 1):
                rng = subject.rng(f"documents {borders} {steps} {depth}")
                stream = Stream(subject, 2, subject.recording_cache(window), borders=borders)
                new = [(rng.randrange(subject.vocab_size), document) for document in (0, 1, 1, 2) for _ in range(3)]
                for row in [new] if not steps else [[column] for column in new]:
                    stream.feed([row, row])
                stream.crop(depth)
                goes_on = stream.branch()
                last = stream.rows[0][-1][1]
                feed_random(goes_on, rng, 3, document=last)
                feed_random(stream, rng, 3, document=last + 1)
                worst = max(worst, stream.check(), goes_on.check())
    return worst


def anything_goes(subject: Subject, num_streams: int = 2, num_events: int = 14, window: int = 6) -> float:
    """Chunks, pads, documents, crops, copies and moves of rows in one stream give what full forwards give."""
    worst = 0.0
    for number in range(num_streams):
        rng = subject.rng(f"anything {number}")
        stream = Stream(subject, 2, subject.recording_cache(window), borders="seq_idx")
        recorded, document, settled = 0, 0, True
        for _ in range(num_events):
            event = rng.choice(["feed", "feed", "feed", "border", "crop", "move"])
            if event == "crop" and recorded:
                depth = rng.randint(1, min(window, recorded))
                stream.crop(depth)
                recorded, settled = recorded - depth, False
            elif event == "move" and settled:
                stream.select([1, 0] if rng.random() < 0.5 else [0, 0], "reorder_cache")
                recorded = 0
            else:
                document += event == "border"
                num_tokens = rng.choice([1, 1, 2, 5, 9])
                feed_random(stream, rng, num_tokens, pad_rate=rng.choice([0.0, 0.3]), document=document)
                recorded, settled = recorded + num_tokens, True
        worst = max(worst, stream.check())
    return worst
