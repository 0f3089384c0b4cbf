"""From the arguments of a call to what its layers see, against definitions in plain Python."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.modeling.masks import Compaction, join
from hybridlm.modeling.stream import RowState, build_sequence, current_mask, segments_from_lengths
from hybridlm.modeling.window import extend, slot_index

CPU = torch.device("cpu")


def tensor(*values):
    return torch.tensor(values)


def fresh(batch=1):
    return RowState.fresh(batch, CPU)


def run(calls, **fixed):
    """Describe successive calls `(real, seq_idx)`; `[B, T]` lists each. Returns the descriptions."""
    rows, sequences = fresh(len(calls[0][0])), []
    for real, seq_idx in calls:
        real = torch.tensor(real).bool()
        given = {"real": None if bool(real.all()) else real} | fixed
        if seq_idx is not None:
            given["seq_idx"] = torch.tensor(seq_idx)
        sequence, _, rows = build_sequence(real.shape[0], real.shape[1], CPU, rows, **given)
        sequences.append(sequence)
    return sequences, rows


# real tokens come first ------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
def test_compaction_puts_real_tokens_first_in_order_and_back(mask):
    real, values = torch.tensor(mask), torch.arange(len(mask) * 7).view(-1, 7) + 1
    compaction = Compaction.from_mask(real)
    moved = compaction.apply(values)
    for row, keep, source in zip(moved, real, values, strict=True):
        kept = source[keep]
        assert row[: len(kept)].tolist() == kept.tolist()
    assert compaction.num_tokens == max(1, int(real.sum(1).max()))
    assert compaction.restore(moved).tolist() == (values * real).tolist()


def test_compaction_keeps_the_other_dimensions():
    real = tensor([False, True, True], [True, False, True])
    values = torch.randn(2, 3, 5)
    compaction = Compaction.from_mask(real)
    assert torch.equal(compaction.restore(compaction.apply(values)), values * real[..., None])
    weights = torch.randn(2, 4, compaction.num_tokens, 6)
    assert compaction.restore(weights, dim=2).shape == (2, 4, 3, 6)


def test_rows_that_are_padded_on_the_right_are_not_moved():
    assert Compaction.from_mask(tensor([True, True, False], [True, False, False])).order is None


@pytest.mark.parametrize(
    ("mask", "expected"),
    [(None, None), ([[1, 1, 1, 1, 1]], None), ([[1, 1, 0, 1, 1]], [[False, True, True]]), ([[0, 0, 1, 1, 1]], None)],
)
def test_the_mask_of_a_call_is_its_last_columns(mask, expected):
    mask = None if mask is None else torch.tensor(mask)
    found = current_mask(mask, 1, 3, 2)
    assert found is expected if expected is None else found.tolist() == expected


# index, position, document ----------------------------------------------------------------------------------------


def test_the_index_counts_real_tokens_over_all_calls():
    (first, second, third), rows = run([([[0, 1, 1], [1, 1, 1]], None), ([[1], [0]], None), ([[1, 1], [1, 0]], None)])
    assert first.index.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert first.token_mask.tolist() == [[True, True, False], [True, True, True]]
    assert second.index.tolist() == [[2], [3]]
    assert second.lengths.tolist() == [1, 0]
    assert third.index.tolist() == [[3, 4], [3, 4]]
    assert third.num_past.tolist() == [3, 3]
    assert rows.num_tokens.tolist() == [5, 4]
    assert rows.uniform is None


def test_rows_without_pads_know_their_length_without_a_tensor():
    (_, second), rows = run([([[1, 1]], None), ([[1]], None)])
    assert second.uniform_past == 2
    assert rows.uniform == 3


def test_positions_are_counted_inside_documents_and_through_pads():
    calls = [([[1, 0, 1, 1]], [[4, 4, 4, 7]]), ([[1, 0, 1]], [[7, 7, 9]])]
    (first, second), rows = run(calls)
    assert first.positions.tolist() == [[0, 1, 0]]
    assert first.starts.tolist() == [[False, False, True]]
    assert first.doc_start.tolist() == [[0, 0, 2]]
    assert second.positions.tolist() == [[1, 0]]
    assert second.starts.tolist() == [[False, True]]
    assert second.past_doc_start.tolist() == [2]
    assert rows.doc_start.tolist() == [4]


def test_a_document_goes_on_when_its_number_does_and_ends_when_it_does_not():
    (_, same), _ = run([([[1, 1]], [[3, 3]]), ([[1, 1]], [[3, 3]])])
    assert same.starts is None
    (_, other), _ = run([([[1, 1]], [[3, 3]]), ([[1, 1]], [[0, 0]])])
    assert other.starts.tolist() == [[True, False]]


def test_positions_are_borders_only_when_they_are_asked_for():
    positions = tensor([0, 1, 0, 1, 2])
    sequence, _, rows = build_sequence(1, 5, CPU, fresh(), position_ids=positions, borders_from_positions=True)
    assert sequence.starts.tolist() == [[False, False, True, False, False]]
    after, _, _ = build_sequence(1, 2, CPU, rows, position_ids=tensor([3, 4]), borders_from_positions=True)
    assert after.starts is None
    anew, _, _ = build_sequence(1, 2, CPU, rows, position_ids=tensor([0, 1]), borders_from_positions=True)
    assert anew.starts.tolist() == [[True, False]]
    plain, _, _ = build_sequence(1, 5, CPU, fresh(), position_ids=positions)
    assert plain.starts is None
    assert plain.positions.tolist() == positions.tolist()


def test_one_row_of_positions_serves_all_rows():
    sequence, _, _ = build_sequence(3, 2, CPU, fresh(3), position_ids=tensor([5, 6]))
    assert sequence.positions.tolist() == [[5, 6]] * 3


@pytest.mark.parametrize(
    ("queries", "keys", "expected"),
    [((0, 2, 5), None, [0, 0, 1, 1, 1]), ((0, 5), None, [0] * 5), ((0, 2, 2, 5), None, [0, 0, 2, 2, 2])],
)
def test_lengths_become_document_numbers(queries, keys, expected):
    found = segments_from_lengths(torch.tensor(queries, dtype=torch.int32), keys, 5, 1)
    assert found.tolist() == [expected]


def test_lengths_with_more_keys_than_queries_go_on_from_the_cache():
    _, _, rows = build_sequence(1, 3, CPU, fresh(), cu_seq_lens_q=torch.tensor([0, 3]))
    queries = torch.tensor([0, 2, 4])
    on, _, _ = build_sequence(1, 4, CPU, rows, cu_seq_lens_q=queries, cu_seq_lens_k=torch.tensor([0, 5, 7]))
    assert on.starts.tolist() == [[False, False, True, False]]
    anew, _, _ = build_sequence(1, 4, CPU, rows, cu_seq_lens_q=queries, cu_seq_lens_k=queries)
    assert anew.starts.tolist() == [[True, False, True, False]]


# what a query sees ------------------------------------------------------------------------------------------------


def draw_calls(rng, batch, num_calls, width=6):
    """Calls with random pads, and documents that begin at random."""
    calls, numbers = [], [0] * batch
    for _ in range(num_calls):
        length, real, documents = rng.randint(1, width), [], []
        for b in range(batch):
            real.append([int(rng.random() < 0.8) for _ in range(length)])
            documents.append([])
            for _ in range(length):
                numbers[b] += rng.random() < 0.15
                documents[b].append(numbers[b])
        calls.append((real, documents))
    return calls


def documents_of(calls, row):
    """The document number of every real token of a row, in order."""
    return [n for real, numbers in calls for r, n in zip(real[row], numbers[row], strict=True) if r]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("window", "num_sinks"), [(None, 0), (3, 0), (1, 0), (3, 2), (2, 4)])
def test_a_query_sees_its_document_its_window_and_its_sinks(seed, window, num_sinks):
    calls = draw_calls(Random(seed), 2, 4)
    sequences, _ = run(calls)
    for b in range(2):
        numbers = documents_of(calls, b)
        for sequence in sequences:
            seen = sequence.visible(torch.arange(len(numbers))[None], window, num_sinks).expand(2, -1, -1, -1)[b, 0]
            count = sequence.num_tokens if sequence.lengths is None else int(sequence.lengths[b])
            for t in range(count):
                query = int(sequence.index[b, t])
                first = next(
                    i for i in range(query + 1) if numbers[i : query + 1].count(numbers[query]) == query + 1 - i
                )
                expected = [
                    first <= key <= query and (window is None or key > query - window or key - first < num_sinks)
                    for key in range(len(numbers))
                ]
                assert seen[t].tolist() == expected


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("window", "num_sinks"), [(3, 0), (1, 0), (4, 2), (2, 3)])
def test_a_window_keeps_every_key_that_a_later_query_may_see(seed, window, num_sinks):
    batch, state = 2, None
    calls = draw_calls(Random(seed), batch, 6)
    sequences, rows = run(calls)
    for sequence in sequences:
        index = sequence.index[:, None, :, None].double()  # a key that tells its own index
        state = extend(state, index, index, sequence, window, num_sinks)
    after, _, _ = build_sequence(
        batch, 1, CPU, rows, seq_idx=torch.tensor([[calls[-1][1][b][-1]] for b in range(batch)])
    )
    slots = slot_index(after, batch, window, num_sinks, CPU)
    for b in range(batch):
        numbers = documents_of(calls, b)
        held = {int(i): int(k) for i, k in zip(slots[b], state.keys[b, 0, :, 0], strict=True) if i >= 0}
        assert all(index == key for index, key in held.items()), "a slot holds another token than it says"
        start, count = int(rows.doc_start[b]), len(numbers)
        needed = {*range(max(start, count - window + 1), count), *range(start, min(start + num_sinks, count))}
        assert needed <= set(held)


# cutting and joining ----------------------------------------------------------------------------------------------

FIELDS = ("index", "positions", "starts", "doc_start")


def as_lists(sequence, name, count):
    """A field at the real tokens of each row; what is absent is filled with its meaning."""
    value, batch = getattr(sequence, name), len(count)
    if value is None:
        value = torch.zeros(batch, sequence.num_tokens, dtype=torch.long)
    return [[int(v) for v in row[:n]] for row, n in zip(value.expand(batch, -1), count, strict=True)]


def lengths_of(sequence, batch):
    return [sequence.num_tokens] * batch if sequence.lengths is None else sequence.lengths.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_a_call_cut_in_two_is_two_calls(seed):
    rng = Random(seed)
    calls = draw_calls(rng, 2, 2, width=9)
    sequence = run(calls)[0][-1]
    counts = lengths_of(sequence, 2)
    cut = rng.randint(0, min(counts))
    parts = [sequence.narrow(0, cut), sequence.narrow(cut, sequence.num_tokens)]
    for name in FIELDS:
        whole = as_lists(sequence, name, counts)
        pieces = [as_lists(part, name, lengths_of(part, 2)) for part in parts]
        assert [a + b for a, b in zip(*pieces, strict=True)] == whole
    assert parts[1].num_past.tolist() == (sequence.num_past + cut).tolist()


@pytest.mark.parametrize("seed", range(10))
def test_calls_without_pads_joined_are_one_call(seed):
    calls = [([[1] * len(row) for row in real], numbers) for real, numbers in draw_calls(Random(seed), 2, 3)]
    sequences, _ = run(calls)
    together = [[sum((numbers[b] for _, numbers in calls), []) for b in range(2)]]
    whole = run([([[1] * len(row) for row in together[0]], together[0])])[0][0]
    joined = join(sequences)
    for name in FIELDS:
        assert as_lists(joined, name, [joined.num_tokens] * 2) == as_lists(whole, name, [whole.num_tokens] * 2)


@pytest.mark.parametrize("seed", range(5))
def test_a_shortened_call_ends_earlier_in_every_row(seed):
    rng = Random(seed)
    sequence = run(draw_calls(rng, 2, 1, width=9))[0][0]
    counts = lengths_of(sequence, 2)
    removed = torch.tensor([rng.randint(0, n) for n in counts])
    shorter = sequence.shorten(removed)
    assert shorter.lengths.tolist() == [n - int(r) for n, r in zip(counts, removed, strict=True)]
    assert shorter.token_mask.sum(1).tolist() == shorter.lengths.tolist()
