"""Each guard of the state in spans, removed: a check of the promises must fail, or it could not fail at all."""

from dataclasses import replace

import pytest
from span_variants import span_subject

from hybridlm.modeling import spans
from hybridlm.modeling.record import Stream
from hybridlm.modeling.stream import RowState
from hybridlm.testing import CHECKS


def forget_borders(monkeypatch):
    """Documents run into one another among the tokens that entered."""
    select = spans.select_tokens

    def without_borders(sequence, taken, rows, positions=None):
        nothing = dict.fromkeys(("starts", "segment_ids", "doc_start", "past_doc_start"))
        return select(replace(sequence, **nothing, memo={}), taken, rows, positions)

    monkeypatch.setattr(spans, "select_tokens", without_borders)


def forget_the_count(monkeypatch):
    """The ceiling counts anew in every call."""
    count = spans.under_ceiling

    def from_zero(wished, ceiling, sequence, rows):
        return count(wished, ceiling, sequence, RowState.fresh(wished.shape[0], wished.device))

    monkeypatch.setattr(spans, "under_ceiling", from_zero)


def keep_what_was_taken_back(monkeypatch):
    """`crop` reaches the stream of all tokens only."""
    apply = Stream.apply

    def outermost_only(self, undo):
        if undo.num_kept is not None or undo.rows is None or undo.rows.last_segment.min() < 0:
            apply(self, undo)

    monkeypatch.setattr(Stream, "apply", outermost_only)


def hold_across_borders(monkeypatch):
    """A document begins with what the one before held."""
    for name in ("hold_last", "hold_mean"):
        hold = getattr(spans, name)

        def without_reset(packed, state, sequence, hold=hold):
            if sequence is not None and sequence.starts is not None:
                packed = packed.clone()
                packed[..., 0] = packed[..., 0].masked_fill(sequence.starts & (packed[..., 1:] == 0).all(-1), 1.0)
            return hold(packed, state, sequence)

        monkeypatch.setattr(spans, name, without_reset)


def hold_in_the_type_of_the_stream(monkeypatch):
    """What later tokens read is kept in bfloat16."""
    monkeypatch.setattr(spans, "state_dtype", lambda dtype: dtype)


GUARDS = [
    (forget_borders, "mod-threshold", "packed_with_pads"),
    (forget_the_count, "mod-ceiling", "step_is_scan"),
    (keep_what_was_taken_back, "mod-threshold", "rollback_again_and_again"),
    (hold_across_borders, "merge-stride-mean", "packed_with_pads"),
    (hold_in_the_type_of_the_stream, "merge-stride-first", "recurrent_states_are_wide"),
]


@pytest.mark.parametrize(("remove", "variant", "check"), GUARDS, ids=[remove.__name__ for remove, *_ in GUARDS])
def test_a_removed_guard_is_noticed(monkeypatch, remove, variant, check):
    subject = span_subject(variant)
    assert subject.reference is not None  # of the code as it is
    assert CHECKS[check](subject) <= 1e-9
    remove(monkeypatch)
    try:
        error = CHECKS[check](subject)
    except Exception:  # a state that does not fit is noticed too
        return
    assert error > 1e-9
