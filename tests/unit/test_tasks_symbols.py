"""Rows over symbols: every label is what an independent reader of the row finds."""

import pytest
import torch

from hybridlm.data.recall import NO_LABEL
from hybridlm.evaluation import TOKEN_TASKS, text_of, token_rows

ROWS, LENGTH = 20, 64


def solve_pairs(tokens, labels, num_keys):
    """Keys are below `num_keys`; a key's value is what follows it where it first stands."""
    table = {}
    for place, token in enumerate(tokens[:-1]):
        if token < num_keys and labels[place + 1] == NO_LABEL and num_keys <= tokens[place + 1] < 2 * num_keys:
            table.setdefault(token, tokens[place + 1])
    return [table[tokens[place - 1]] for place, label in enumerate(labels) if label != NO_LABEL]


def solve_fuzzy(tokens, labels):
    """Motifs of keys (0 to 7) and values (8 to 15) by turns: a value is what followed the same key before."""
    runs, start = [], tokens.count(16)
    for place in range(start, len(tokens)):
        if place == start or (tokens[place] < 8) != (tokens[place - 1] < 8):
            runs.append([])
        runs[-1].append(tokens[place])
    table, found = {}, []
    for key, value in zip(runs[::2], runs[1::2], strict=True):
        if tuple(key) in table:
            found += table[tuple(key)]
        table.setdefault(tuple(key), value)
    return found


def after_mark(tokens, mark):
    return tokens[: tokens.index(mark)], tokens[tokens.index(mark) + 1 :]


def solve_lookup(tokens, labels):
    string, query = after_mark(tokens, 26)
    places = [place for place in range(len(string) - 2) if string[place : place + 2] == query[:2]]
    assert len([place for place in range(len(string) - 1) if string[place : place + 2] == query[:2]]) == 1
    return [string[places[0] + 2]]


def solve_phonebook(tokens, labels):
    book, query = after_mark(tokens, 36)
    book = [token for token in book if token != 37]
    entries = {tuple(book[start : start + 2]): book[start + 2 : start + 5] for start in range(0, len(book), 5)}
    assert len(entries) == len(book) // 5
    return entries[tuple(query[:2])]


def solve_passkey(tokens, labels):
    mark = 1 + 32 + 32
    start = tokens.index(mark)
    return tokens[start + 1 : start + 4]


SOLVERS = {
    "mqar": lambda tokens, labels: solve_pairs(tokens, labels, 64),
    "mad_in_context_recall": lambda tokens, labels: solve_pairs(tokens, labels, 8),
    "mad_noisy_recall": lambda tokens, labels: solve_pairs([t for t in tokens if t < 16], [
        label for t, label in zip(tokens, labels, strict=True) if t < 16], 8),
    "mad_fuzzy_recall": solve_fuzzy,
    "mad_selective_copy": lambda tokens, labels: [t for t in after_mark(tokens, 17)[0] if t < 16],
    "selective_copy": lambda tokens, labels: [t for t in after_mark(tokens, 17)[0] if t < 16],
    "mad_compression": lambda tokens, labels: [t for t in after_mark(tokens, 16)[0] if t < 16],
    "copying": lambda tokens, labels: [t for t in after_mark(tokens, 26)[0] if t < 26],
    "ngram_lookup": solve_lookup,
    "phonebook_symbols": solve_phonebook,
    "passkey_symbols": solve_passkey,
}  # fmt: skip


@pytest.mark.parametrize("task", SOLVERS)
@pytest.mark.parametrize("length", [LENGTH, LENGTH + 1])
def test_an_independent_reader_finds_every_label(task, length):
    rows = token_rows(task, ROWS, length, seed=3)
    assert rows.input_ids.shape == (ROWS, length)
    for tokens, labels in zip(rows.input_ids.tolist(), rows.labels.tolist(), strict=True):
        gold = [label for label in labels if label != NO_LABEL]
        assert gold
        if task == "mad_in_context_recall" and length % 2:
            tokens, labels = tokens[1:], labels[1:]  # a value that nothing asks for
        assert SOLVERS[task](tokens, labels) == gold


def test_memorization_has_one_table_for_all_rows_and_seeds():
    table = {}
    for seed in (0, 1):
        rows = token_rows("mad_memorization", 50, 32, seed=seed)
        keys, values = rows.input_ids[:, ::2].flatten().tolist(), rows.labels[:, 1::2].flatten().tolist()
        for key, value in zip(keys, values, strict=True):
            assert table.setdefault(key, value) == value
    assert len(table) > 100


@pytest.mark.parametrize("task", TOKEN_TASKS)
def test_rows_follow_from_their_seed_alone(task):
    first, again, other = (token_rows(task, 4, LENGTH, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.input_ids, other.input_ids)


@pytest.mark.parametrize("task", ["mqar", "mad_in_context_recall", "mad_noisy_recall"])
def test_the_chance_of_recall_is_what_copying_any_shown_value_scores(task):
    rows = token_rows(task, 400, LENGTH, seed=0)
    num_keys = 64 if task == "mqar" else 8
    right = total = 0.0
    for tokens, labels in zip(rows.input_ids.tolist(), rows.labels.tolist(), strict=True):
        # the expectation over the keys shown before, in place of a draw
        shown = {}
        for place, token in enumerate(tokens):
            if labels[place] != NO_LABEL:
                right += sum(value == labels[place] for value in shown.values()) / len(shown)
                total += 1
            elif place and num_keys <= token < 2 * num_keys and tokens[place - 1] < num_keys:
                shown.setdefault(tokens[place - 1], token)
    assert right / total == pytest.approx(rows.chance, rel=0.1)


@pytest.mark.parametrize("task", ["copying", "mad_selective_copy", "ngram_lookup"])
def test_the_chance_of_copying_is_what_a_random_shown_symbol_scores(task):
    rows = token_rows(task, 2000, 40, seed=0)
    size = 16 if task == "mad_selective_copy" else 26
    scores = []
    for tokens, labels in zip(rows.input_ids.tolist(), rows.labels.tolist(), strict=True):
        first = next(place for place, label in enumerate(labels) if label != NO_LABEL)
        shown = [token for token in tokens[:first] if token < size]
        shown = shown[:-2] if task == "ngram_lookup" else shown
        scores.append(shown.count(labels[-1]) / len(shown))
    assert sum(scores) / len(scores) == pytest.approx(rows.chance, rel=0.06)


def test_fuzzy_rows_are_not_easier_than_their_chance_says():
    rows = token_rows("mad_fuzzy_recall", 300, LENGTH, seed=0)
    answers = rows.labels[rows.answers]
    most = max((answers == value).double().mean().item() for value in range(8, 16))
    assert most < rows.chance


@pytest.mark.parametrize("task", TOKEN_TASKS)
def test_text_shows_the_last_labelled_run_as_the_answer(task):
    rows = token_rows(task, 1, LENGTH, seed=1)
    text = text_of(rows)
    words = (text.context + text.answer).split()
    stop = int(rows.answers[0].nonzero()[-1]) + 1
    shown = torch.where(rows.answers, rows.labels, rows.input_ids)[0, :stop].tolist()
    assert [26 * (ord(word[0]) - 97) + ord(word[1]) - 97 for word in words] == shown
    assert all(rows.answers[0, stop - len(text.answer.split()) : stop])


@pytest.mark.parametrize(
    ("task", "length", "options", "message"),
    [
        ("mqrr", 64, {}, "task: unknown 'mqrr'"),
        ("mqar", 64, {"num_pear": 3}, "task mqar: .*num_pear"),
        ("mqar", 8, {"num_pairs": 8}, "length=8 must be at least"),
        ("mad_in_context_recall", 64, {"vocabulary_size": 7}, "vocabulary_size=7 must be even"),
        ("mad_noisy_recall", 64, {"noise": 1.5}, "noise=1.5"),
        ("selective_copy", 16, {}, "length=16 must be at least 33"),
        ("phonebook_symbols", 64, {"num_names": 2}, "num_names=2"),
        ("mad_fuzzy_recall", 64, {"vocabulary_size": 2, "num_keys": 9}, "num_keys=9 is too many"),
    ],
)
def test_what_cannot_be_made_is_said(task, length, options, message):
    with pytest.raises(ValueError, match=message):
        token_rows(task, 2, length, seed=0, **options)
