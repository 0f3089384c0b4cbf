"""Rows of key-value recall and of the passkey."""

import pytest
import torch

from hybridlm.data import RecallVocabulary, key_value_recall, passkey

VOCABULARY = RecallVocabulary()
TASKS = {"recall": key_value_recall, "passkey": passkey}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_rows_follow_from_their_seed_alone(task):
    first, again, other = (task(5, 64, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.input_ids, other.input_ids)


@pytest.mark.parametrize("num_queries", [3, 8, 20])
@pytest.mark.parametrize("gap_power", [1.0, 0.01])
def test_each_answer_is_the_value_behind_its_key(num_queries, gap_power):
    rows = key_value_recall(16, 96, seed=0, num_queries=num_queries, gap_power=gap_power)
    for tokens, answers in zip(rows.input_ids.tolist(), rows.answers, strict=True):
        pairs = dict(zip(tokens[0:16:2], tokens[1:16:2], strict=True))
        assert len(pairs) == 8
        places = answers.nonzero()[:, 0].tolist()
        assert len(places) == num_queries
        assert min(places) > 16
        assert all(tokens[place] == pairs[tokens[place - 1]] for place in places)
        asked = [tokens[place - 1] for place in places]
        assert max(asked.count(key) for key in asked) == -(-num_queries // 8)
        others = set(range(16, 96)) - {place - back for place in places for back in (0, 1)}
        assert all(tokens[place] in VOCABULARY.fillers for place in others)


def test_labels_stand_where_answers_do_also_when_these_are_hidden():
    shown, hidden = (key_value_recall(8, 64, seed=1, show_answers=show) for show in (True, False))
    assert torch.equal(shown.labels, hidden.labels)
    assert torch.equal(shown.labels[shown.answers], shown.input_ids[shown.answers])
    assert torch.equal(shown.input_ids[~shown.answers], hidden.input_ids[~shown.answers])
    assert (hidden.input_ids[hidden.answers] >= VOCABULARY.fillers.start).all()


def test_a_small_gap_power_asks_soon():
    even, soon = (key_value_recall(200, 512, seed=0, gap_power=power).answers for power in (1.0, 0.01))
    mean = [answers.nonzero()[:, 1].double().mean() for answers in (even, soon)]
    assert abs(mean[0] - (16 + 512) / 2) < 10
    assert mean[1] < 0.5 * mean[0]


def test_filler_that_imitates_is_drawn_from_keys_and_values_too():
    rows = key_value_recall(8, 256, seed=0, fillers_imitate=True)
    assert len(rows.input_ids[:, 16:].unique()) == VOCABULARY.marks.start


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 28), (1.0, 56)])
def test_the_passkey_stands_at_its_depth_and_is_asked_for_at_the_end(depth, place):
    rows = passkey(4, 64, seed=0, depth=depth)
    assert torch.equal(rows.input_ids[:, place : place + 4], rows.input_ids[:, -4:])
    assert (rows.input_ids == VOCABULARY.marks.start).sum(1).tolist() == [2] * 4
    assert rows.answers.nonzero()[:, 1].tolist() == [61, 62, 63] * 4
    assert torch.equal(rows.labels[:, -3:], rows.input_ids[:, -3:])


def test_a_passkey_without_a_depth_stands_anywhere():
    starts = (passkey(300, 40, seed=0).input_ids == VOCABULARY.marks.start).int().argmax(1)
    assert starts.unique().tolist() == list(range(33))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_chance_is_what_a_guess_among_the_values_gets(task):
    vocabulary = RecallVocabulary(num_values=4)
    rows = task(2000, 40, seed=0, vocabulary=vocabulary)
    answers = rows.labels[rows.answers]
    guesses = torch.randint(4, answers.shape) + vocabulary.values.start
    assert rows.chance == 0.25
    assert (guesses == answers).double().mean().item() == pytest.approx(rows.chance, abs=0.025)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: key_value_recall(1, 31, seed=0), "length=31 must be at least 32 for 8 pairs and 8 queries"),
        (lambda: key_value_recall(1, 99, seed=0, num_pairs=33), "num_pairs=33 must be at most num_keys=32"),
        (lambda: key_value_recall(0, 99, seed=0), "num_rows=0 must be at least 1"),
        (lambda: key_value_recall(1, 99, seed=0, gap_power=0.0), "gap_power=0.0 must be above 0"),
        (lambda: passkey(1, 7, seed=0), "length=7 must be at least 8 for 3 tokens"),
        (lambda: passkey(1, 64, seed=0, depth=1.5), r"depth=1.5 must lie in \[0, 1\]"),
        (lambda: RecallVocabulary(num_values=0), "num_values=0 must be at least 1"),
    ],
)
def test_rows_that_cannot_be_made_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
