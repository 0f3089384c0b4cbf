"""Whatever a caller does with a cache, the logits are those of full forwards of the documents that were kept.

Hypothesis makes up the calls: chunks, pads and borders anywhere, crops, moves of rows, copies, files.
"""

import tempfile
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from span_variants import span_subject
from variants import hybrid_subject, mixer_subject

from hybridlm import MIXERS
from hybridlm.testing import Stream

WINDOW = 8
BASES = [*MIXERS, "attention-window_and_sinks"]
TOKEN, BEGIN, PAD = "token", "begin", "pad"


def chunks(kinds, rows):
    """A call: what stands in each column of each row."""
    width = st.integers(1, 7)
    return width.flatmap(
        lambda n: st.lists(st.lists(st.sampled_from(kinds), min_size=n, max_size=n), min_size=rows, max_size=rows)
    )


def feeds(kinds, rows):
    return st.tuples(st.just("feed"), chunks(kinds, rows))


def crops():
    return st.tuples(st.just("crop"), st.integers(1, WINDOW))


def moves(rows):
    orders = st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)
    return st.tuples(st.sampled_from(["move", "copy", "file"]), orders)


def play(subject, events, rows, borders, record):
    """Run the events through one cache and return the largest error."""
    rng = Random(0)
    cache = subject.recording_cache(WINDOW) if record else subject.new_cache()
    stream = Stream(subject, rows, cache, borders=borders)
    documents, recorded, settled = [0] * rows, 0, True
    for event, what in events:
        if event == "feed":
            columns = []
            for b, kinds in enumerate(what):
                columns.append([])
                for kind in kinds:
                    documents[b] += kind == BEGIN
                    columns[b].append(None if kind == PAD else (rng.randrange(subject.vocab_size), documents[b]))
            stream.feed(columns)
            recorded, settled = recorded + len(what[0]), True
        elif event == "crop" and recorded:
            depth = min(what, recorded)
            stream.crop(depth)
            recorded, settled = recorded - depth, False
        elif event == "move" and settled:
            stream.select(what, "reorder_cache")
            documents, recorded = [documents[b] for b in what], 0
        elif event == "copy":
            stream = stream.branch()
        elif event == "file" and settled and stream.num_columns:
            stream.cache = reloaded(subject, stream.cache, record)
            recorded = 0
    return stream.check()


def reloaded(subject, cache, record):
    with tempfile.TemporaryDirectory() as folder:
        cache.save(folder)
        other = subject.new_cache(record_window=WINDOW)
        other.load(folder)
    if record:
        other.activate_past_recording()
    return other


ANYTHING = st.lists(
    st.one_of(feeds([TOKEN, TOKEN, TOKEN, BEGIN, PAD], 2), feeds([TOKEN], 2), crops(), moves(2)), min_size=1, max_size=8
)


@settings(max_examples=40)
@given(events=ANYTHING)
def test_any_use_of_a_recording_cache_is_exact_in_a_hybrid(events):
    assert play(hybrid_subject(), events, 2, "seq_idx", record=True) <= 1e-9


@pytest.mark.parametrize("variant", BASES)
@settings(max_examples=20)
@given(events=ANYTHING)
def test_any_use_of_a_recording_cache_is_exact(variant, events):
    assert play(mixer_subject(variant), events, 2, "seq_idx", record=True) <= 1e-9


@pytest.mark.parametrize("variant", ["mod-threshold", "mod-nested", "merge-around_depths", "merge-inside_depths"])
@settings(max_examples=15)
@given(events=ANYTHING)
def test_any_use_of_a_recording_cache_is_exact_with_spans(variant, events):
    assert play(span_subject(variant), events, 2, "seq_idx", record=True) <= 1e-9


@settings(max_examples=25)
@given(events=st.lists(st.one_of(feeds([TOKEN, BEGIN, PAD], 3), moves(3)), min_size=1, max_size=8))
def test_any_use_of_a_plain_cache_is_exact(events):
    assert play(hybrid_subject(), events, 3, "seq_idx", record=False) <= 1e-9


@settings(max_examples=25)
@given(events=st.lists(st.one_of(feeds([TOKEN, TOKEN, BEGIN], 2), crops(), moves(2)), min_size=1, max_size=8))
def test_borders_read_from_positions_are_exact(events):
    assert play(hybrid_subject(), events, 2, "position_ids", record=True) <= 1e-9


@settings(max_examples=25)
@given(events=st.lists(st.one_of(feeds([TOKEN, TOKEN, BEGIN], 1), crops()), min_size=1, max_size=8))
def test_borders_read_from_lengths_are_exact(events):
    assert play(hybrid_subject(), events, 1, "cu_seq_lens", record=True) <= 1e-9


@settings(max_examples=25)
@given(chunks=st.lists(chunks([TOKEN, TOKEN, BEGIN, PAD], 2), min_size=1, max_size=5))
def test_any_use_of_a_static_cache_is_exact(chunks):
    subject = hybrid_subject()
    length = sum(len(rows[0]) for rows in chunks)
    stream, rng, documents = None, Random(0), [0, 0]
    stream = Stream(subject, 2, subject.new_cache(static=True, max_length=length), borders="seq_idx")
    for rows in chunks:
        columns = [[], []]
        for b, kinds in enumerate(rows):
            for kind in kinds:
                documents[b] += kind == BEGIN
                columns[b].append(None if kind == PAD else (rng.randrange(subject.vocab_size), documents[b]))
        stream.feed(columns)
    assert stream.check() <= 1e-9
