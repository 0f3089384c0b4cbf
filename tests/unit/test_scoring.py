"""Scores of known models are what they must be, and their controls and errors too."""

import math
import random

import numpy as np
import pytest
import torch
from lookup_model import LookupConfig, LookupForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM

from hybridlm.data import build_byte_tokenizer
from hybridlm.evaluation import (
    estimate,
    generate_answers,
    judge,
    make_documents,
    model_logits,
    score_rows,
    text_tasks,
)
from hybridlm.evaluation.chance import copy_chance, found_chance, ordered_chance
from hybridlm.evaluation.length import bits_by_length, long_texts, window_nats
from hybridlm.evaluation.scoring import gold_logits, may_pad
from hybridlm.evaluation.tables import score_text
from hybridlm.training import evaluate_bits_per_byte

TOKENIZER = build_byte_tokenizer()
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=512, **SIZES)).eval()


@pytest.fixture(scope="module")
def lookup():
    return LookupForCausalLM(LookupConfig()).eval()


def rows_of(documents):
    return [(document.ids, document.labels) for document in documents]


def test_scores_do_not_depend_on_what_goes_together(llama):
    documents = [*made("babi_qa1", 300, 5), *made("passkey", 200, 4), *made("mqar", 400, 3)]
    together = score_rows(model_logits(llama), rows_of(documents), 258, 8192)
    alone = score_rows(model_logits(llama), rows_of(documents), 258, 1)
    assert [score.exact for score in together] == [score.exact for score in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)


def made(name, length, num, **options):
    return make_documents(text_tasks("all", **options)[name], TOKENIZER, length, num, seed=0)


def test_the_likelihood_is_the_sum_over_the_answer_as_the_definition_says(llama):
    (document,) = made("babi_qa2", 300, 1)
    (score,) = score_rows(model_logits(llama), rows_of([document]), 258)
    logits = llama(torch.tensor([document.ids])).logits[0].log_softmax(-1)
    start = len(document.context_ids)
    expected = sum(logits[start + i - 1, token].item() for i, token in enumerate(document.answer_ids))
    assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
    assert score.num_tokens == len(document.answer_ids)


@pytest.mark.parametrize("name", [name for name in text_tasks("all") if name != "questions"])
def test_the_gold_answer_has_all_points_both_ways(name):
    documents = made(name, 500, 3)
    assert all(score.exact for score in score_rows(gold_logits(258), rows_of(documents), 258))
    for document in documents:
        assert judge(document.text, TOKENIZER.decode(document.answer_ids)) == 1
        assert judge(document.text, "") == 0


@pytest.mark.parametrize("name", ["passkey", "phonebook", "niah_single_1", "niah_single_3", "niah_multikey_2"])
def test_a_model_that_looks_answers_up_scores_all_points_both_ways(lookup, name):
    documents = made(name, 300, 4)
    scores = score_rows(model_logits(lookup), rows_of(documents), 258)
    answers = generate_answers(lookup, TOKENIZER, documents)
    assert [score.exact for score in scores] == [True] * 4
    assert [judge(document.text, answer) for document, answer in zip(documents, answers, strict=True)] == [1.0] * 4


def test_likelihood_and_generation_agree_on_what_is_right_and_wrong(lookup):
    documents = [*made("niah_multivalue", 400, 4), *made("phonebook", 300, 4), *made("babi_qa1", 300, 4)]
    exact = [score.exact for score in score_rows(model_logits(lookup), rows_of(documents), 258)]
    answers = generate_answers(lookup, TOKENIZER, documents)
    begins = [a.strip().startswith(d.text.answer.strip()) for d, a in zip(documents, answers, strict=True)]
    assert begins == exact
    assert 0 < sum(exact) < len(exact)


def test_generation_in_a_padded_batch_is_generation_alone(llama):
    documents = [*made("babi_qa1", 300, 2), *made("babi_qa2", 260, 2)]
    together = generate_answers(llama, TOKENIZER, documents)
    assert together == [generate_answers(llama, TOKENIZER, [document])[0] for document in documents]


def test_only_models_that_stand_it_are_padded(llama, lookup):
    assert may_pad(llama)
    assert not may_pad(lookup)


def test_generation_does_not_follow_the_settings_of_the_folder(llama):
    documents = made("babi_qa1", 300, 2)
    plain = generate_answers(llama, TOKENIZER, documents)
    before = llama.generation_config
    try:
        llama.generation_config = type(before)(do_sample=True, temperature=5.0, num_beams=3, max_new_tokens=1)
        assert generate_answers(llama, TOKENIZER, documents) == plain
    finally:
        llama.generation_config = before


# -- chance and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shown", "asked"), [(4, 1), (4, 4), (6, 3)])
def test_chances_are_what_guessers_score(shown, asked):
    generator, tries = random.Random(0), 40_000
    gold = list(range(asked))
    ordered = sum(generator.sample(range(shown), asked) == gold for _ in range(tries)) / tries
    found = sum(len(set(generator.choices(range(shown), k=asked)) & set(gold)) / asked for _ in range(tries)) / tries
    for measured, said in ((ordered, ordered_chance(shown, asked, 9)), (found, found_chance(shown, asked, 9))):
        assert measured == pytest.approx(said, abs=4 * math.sqrt(said * (1 - said) / tries))


def test_a_single_candidate_is_guessed_from_all_that_are_possible():
    assert ordered_chance(1, 1, 50) == found_chance(1, 1, 50) == 1 / 50


def test_the_chance_of_copying_counts_equal_values():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (40_000, 3))  # of three keys, out of four values; the first is asked for
    copied = values[np.arange(40_000), rng.integers(0, 3, 40_000)]
    assert np.mean(copied == values[:, 0]) == pytest.approx(copy_chance(3, 4), abs=0.01)


def test_the_error_is_that_of_the_mean():
    found = estimate([0, 0, 1, 1, 1, 0, 1, 1], [0.1] * 8)
    assert found.score == 0.625
    assert found.error == pytest.approx(np.std([0, 0, 1, 1, 1, 0, 1, 1], ddof=1) / math.sqrt(8))


def test_guessers_are_called_above_chance_at_most_as_often_as_three_errors_allow():
    rng = np.random.default_rng(0)
    for chance, num in ((0.1, 32), (0.5, 32), (0.25, 8)):
        called = np.mean(
            [estimate((rng.random(num) < chance).tolist(), [chance] * num).above_chance for _ in range(4000)]
        )
        assert called < 0.02


@pytest.mark.parametrize(("scores", "above"), [([1, 1], False), ([1] * 32, True), ([1], False), ([0] * 32, False)])
def test_a_score_without_spread_must_still_beat_a_lucky_guesser(scores, above):
    assert estimate(scores, [0.5] * len(scores)).above_chance is above


def test_what_is_not_above_chance_is_printed_so():
    assert score_text(estimate([0, 1, 0, 0], [0.25] * 4).to_dict()) == "at chance (0.250 ± 0.250)"
    assert score_text(estimate([1] * 30 + [0, 0], [0.1] * 32).to_dict()).startswith("0.938 ± 0.0")


# -- bits per byte -------------------------------------------------------------------------------------------------

TEXTS = ["Ein Käse für die Mäuse, und noch einer. " * 30, "def main():\n    return 1\n" * 60]


@pytest.mark.parametrize("length", [16, 50, 600])
def test_bits_per_byte_are_those_of_training_runs(llama, length):
    texts = long_texts(TEXTS, TOKENIZER, 600, 2)
    found = bits_by_length(model_logits(llama), texts, length, 258)["bits_per_byte"]["score"]
    cut = [TOKENIZER.decode(ids[1:].tolist()) for ids in texts.ids]
    assert found == pytest.approx(evaluate_bits_per_byte(llama, cut, TOKENIZER, length).bits_per_byte, rel=1e-4)


def test_bits_by_position_add_up_to_the_mean(llama):
    texts = long_texts(TEXTS, TOKENIZER, 600, 2)
    found = bits_by_length(model_logits(llama), texts, 150, 258)
    assert [bucket["stop"] for bucket in found["by_position"]] == [16, 32, 64, 128, 150]
    total = sum(b["bits_per_byte"] * (b["stop"] - b["start"]) for b in found["by_position"]) / 150
    assert total == pytest.approx(found["bits_per_byte"]["score"], rel=0.01)


def test_every_token_is_read_once_with_the_same_neighbours_whatever_goes_together(llama):
    texts = long_texts(TEXTS, TOKENIZER, 100, 2)
    whole, small = (window_nats(model_logits(llama), texts, 30, 258, size) for size in (8192, 1))
    np.testing.assert_allclose(whole, small, atol=1e-4)
    logits = llama(torch.tensor(texts.ids[:1, 90:100].astype(np.int64))).logits[0].log_softmax(-1)
    expected = [-logits[i, token].item() for i, token in enumerate(texts.ids[0, 91:])]
    np.testing.assert_allclose(whole[0, 90:], expected, atol=1e-4)


def test_gold_needs_no_bits_and_an_even_guess_is_at_chance():
    texts = long_texts(TEXTS, TOKENIZER, 600, 2)
    assert bits_by_length(gold_logits(258), texts, 64, 258)["bits_per_byte"]["score"] == 0
    even = bits_by_length(lambda ids, wanted: torch.zeros(*ids.shape, 258), texts, 64, 258)["bits_per_byte"]
    assert even["score"] == pytest.approx(math.log2(258))
    assert not even["above_chance"]


def test_bytes_of_tokens_add_up_to_the_text():
    texts = long_texts(["Käse " * 40], TOKENIZER, 198, 1)
    assert texts.num_bytes.sum() == len(TOKENIZER.decode(texts.ids[0, 1:].tolist()).encode())
