"""Tasks as text: an independent reader of the context finds the answer, and guessing scores what is said."""

import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest

from hybridlm.data import build_byte_tokenizer
from hybridlm.evaluation import DoesNotFit, TextTask, batch, judge, make_document, make_documents, text_tasks
from hybridlm.evaluation.babi import PEOPLE, QUESTIONS, THINGS, tell
from hybridlm.evaluation.documents import TextDocument, encode
from hybridlm.evaluation.haystack import HAYSTACKS, hay, scatter, stdlib_sentences
from hybridlm.evaluation.needles import FORMS, build_needles
from hybridlm.evaluation.ruler import build_variables, read_questions

TOKENIZER = build_byte_tokenizer()
QA = [
    {"question": "Who wrote the log?", "answers": ["Ida", "Ida Holm"], "paragraphs": ["Ida Holm wrote the log."]},
    {"question": "Where is the well?", "answers": ["the court"], "paragraphs": ["The well is in the court."]},
    {"question": "When was the fire?", "answers": ["in 1712"], "paragraphs": ["The fire was in 1712.", "It rained."]},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "qa.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in QA))
    return text_tasks("all", questions=path)


def documents(task, length=700, num=12, seed=0):
    return [document.text for document in make_documents(task, TOKENIZER, length, num, seed=seed)]


NAMES = [*text_tasks("all"), "questions"]


@pytest.mark.parametrize("name", NAMES)
def test_documents_follow_from_seed_and_number_alone(tasks, name):
    first, again, other = (make_documents(tasks[name], TOKENIZER, 600, 3, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert make_document(tasks[name], TOKENIZER, 600, seed=1, index=2) == first[2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [400, 701])
def test_documents_keep_to_their_length_in_tokens_and_fill_it(tasks, name, length):
    made = make_documents(tasks[name], TOKENIZER, length, 4, seed=0)
    for document in made:
        text = document.text.context + document.text.answer
        assert len(TOKENIZER(text)["input_ids"]) == len(document.ids) <= document.num_tokens <= length
        # a unit of hay is at most a needle with two codes
        assert name == "questions" or document.num_tokens > length - 110


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_with_the_length_that_it_needs(tasks, name):
    with pytest.raises(DoesNotFit, match=rf"{name}: the shortest prompt has \d+ tokens .* length=12 is too short"):
        make_document(tasks[name], TOKENIZER, 12, seed=0)


def test_the_least_length_is_told_so_that_it_works():
    task = text_tasks("ruler")["niah_multivalue"]
    with pytest.raises(DoesNotFit) as caught:
        make_document(task, TOKENIZER, 12, seed=0)
    least = int(re.search(r"has (\d+) tokens", str(caught.value)).group(1))
    assert make_document(task, TOKENIZER, least, seed=0).num_tokens == least
    with pytest.raises(DoesNotFit):
        make_document(task, TOKENIZER, least - 1, seed=0)


@pytest.mark.parametrize("name", FORMS)
def test_the_needles_asked_for_are_in_the_text(tasks, name):
    for document in documents(tasks[name]):
        *_, text, question = document.context.split("\n")
        pairs = re.findall(r"The secret (?:number|code) of (\S+) is (\S+)\.", text)
        asked = re.fullmatch(r"The secret \w+ of (.*) (?:is|are)", question).group(1)
        keys = re.split(r", | and ", asked)
        answers = [value for key in keys for other, value in pairs if other == key]
        assert document.answer == f" {', '.join(answers)}"
        assert document.references == tuple(answers)
        form = FORMS[name]
        assert len(answers) == form.num_values * form.num_queries
        assert len({value for _, value in pairs}) == len(pairs) == len(document.candidates)
        if form.haystack == "needles":
            assert len(pairs) > 3


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_single_needle_stands_at_its_depth(depth):
    rng = np.random.default_rng(0)
    context = build_needles(FORMS["niah_single_2"], "sentences", rng, 40, depth, 1).context.split("\n")[1]
    assert context.index("The secret number") / len(context) == pytest.approx(depth, abs=0.05)


def test_passkey_and_phonebook_are_answered_by_their_text(tasks):
    for document in documents(tasks["passkey"]):
        assert document.answer.strip() in re.findall(r"The pass key is (\d+)\.", document.context)
    for document in documents(tasks["phonebook"]):
        book = re.findall(r"^(\w+ \w+): (\d+)$", document.context.split("\nLook up:")[0], re.MULTILINE)
        shots = re.findall(r"^(\w+ \w+): (\d+)$", document.context.split("\nLook up:")[1], re.MULTILINE)
        asked = document.context.splitlines()[-1].removesuffix(":")
        assert len(shots) == 2
        assert set(shots) < set(book)
        assert len(dict(book)) == len(book) > 5
        assert dict(book)[asked] == document.answer.strip()
        assert asked not in dict(shots)


def test_variables_are_traced_to_their_number(tasks):
    for document in documents(tasks["variable_tracking"]):
        value = re.search(r"hold (\d+) are$", document.context).group(1)
        holds = {}
        for target, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", document.context):
            holds[target] = holds.get(source, source)
        assert [name for name, held in holds.items() if held == value] == document.answer.split()
        assert len(document.references) == 5


def test_variables_of_other_chains_are_not_asked_for():
    document = build_variables("noise", np.random.default_rng(1), 30, None, 1, num_chains=3)
    value = re.search(r"hold (\d+) are$", document.context).group(1)
    holds = {}
    for target, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", document.context):
        holds[target] = holds.get(source, source)
    assert len(holds) == 15
    assert [name for name, held in holds.items() if held == value] == document.answer.split()


@pytest.mark.parametrize("length", [400, 1500])
def test_common_words_are_those_that_stand_most_often(tasks, length):
    for document in documents(tasks["common_words"], length, 4):
        counts = Counter(re.findall(r"\d+\. (\w+)", document.context))
        answers = document.answer.split()
        assert {word for word, _ in counts.most_common(len(answers))} == set(answers)
        assert min(counts[word] for word in answers) > max(counts[word] for word in counts if word not in answers)


@pytest.mark.parametrize("length", [400, 2500])
def test_frequent_words_are_the_three_after_the_dots_in_order(tasks, length):
    for document in documents(tasks["frequent_words"], length, 4):
        counts = Counter(document.context.split("\n")[1].split())
        ranked = counts.most_common(5)
        assert ranked[0][0] == "..."
        assert [word for word, _ in ranked[1:4]] == document.answer.split()
        assert len({count for _, count in ranked}) == 5


def test_questions_come_with_their_own_paragraphs_and_others(tasks):
    for document in documents(tasks["questions"], 500, 6):
        row = next(row for row in QA if row["question"] in document.context)
        assert all(paragraph in document.context for paragraph in row["paragraphs"])
        assert sum(p in document.context for other in QA for p in other["paragraphs"]) > len(row["paragraphs"])
        assert document.references == tuple(row["answers"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question"),
        ("{", "line 1: expected question, answers and paragraphs"),
        ('{"question": "?"}', "line 1: expected"),
        ('{"question": "?", "answers": [], "paragraphs": ["p"]}', "line 1: .*must not be empty"),
    ],
)
def test_a_bad_file_of_questions_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "qa.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "qa.jsonl")


def solve(story, question):
    """Live through a story and answer a question about it, by its words alone."""
    place, held, visits, gifts = {}, {name: [] for name in PEOPLE}, {name: [] for name in THINGS}, []
    for line in story:
        words = line.rstrip(".").split()
        who, verb, last = words[0], words[1], words[-1]
        if verb == "went":
            place[who] = last
            for thing in held[who]:
                visits[thing].append(last)
        elif verb == "took":
            held[who].append(last)
            visits[last] = visits[last] or [place[who]]
        elif verb == "dropped":
            held[who].remove(last)
        elif verb == "gave":
            held[who].remove(words[3])
            held[last].append(words[3])
            gifts.append((who, words[3], last))
    words = question.rstrip("?").split()
    if question.startswith("Where is the"):
        return visits[words[-1]][-1]
    if question.startswith("Where is"):
        return place[words[-1]]
    if question.startswith("Where was"):
        path = visits[words[3]]
        return path[len(path) - 1 - path[::-1].index(words[-1]) - 1]
    if question.startswith("Is"):
        return "yes" if place[words[1]] == words[-1] else "no"
    if question.startswith("How many"):
        return ("none", "one", "two", "three")[len(held[words[-2]])]
    if question.startswith("Which"):
        return ", ".join(held[words[-2]]) or "nothing"
    if question.startswith("Who"):
        return next(one for one, thing, other in gifts if (thing, other) == (words[3], words[-1]))
    return next(other for one, thing, other in gifts if (one, thing) == (words[3], words[-1]))


@pytest.mark.parametrize("name", QUESTIONS)
def test_facts_lead_to_the_answer(tasks, name):
    for document in documents(tasks[f"babi_{name}"]):
        text, question, _ = document.context.split("\n")
        story = re.findall(rf"(?:{'|'.join(PEOPLE)}) (?:went|took|dropped|gave) [^.]*\.", text)
        assert solve(story, question.removeprefix("Question: ")) == document.answer.strip()
        assert document.answer.strip() in document.candidates


@pytest.mark.parametrize("name", QUESTIONS)
def test_guessing_facts_scores_their_chance(name):
    scores, chances = [], []
    for seed in range(600):
        _, question = tell(name, np.random.default_rng(seed))
        scores.append(random.Random(seed).choice(question.candidates) == question.answer)
        chances.append(1 / len(question.candidates))
    spread = math.sqrt(sum(c * (1 - c) for c in chances)) / len(chances)
    assert sum(scores) / 600 == pytest.approx(sum(chances) / 600, abs=4 * spread)


@pytest.mark.parametrize("name", ["qa6", "qa7", "qa8"])
def test_no_constant_answer_beats_chance(name):
    answers = Counter(tell(name, np.random.default_rng(seed))[1].answer for seed in range(600))
    chance = 1 / len(tell(name, np.random.default_rng(0))[1].candidates)
    assert max(answers.values()) / 600 < chance + 4 * math.sqrt(chance * (1 - chance) / 600)


@pytest.mark.parametrize(
    "name", ["niah_multikey_1", "niah_multikey_2", "niah_multivalue", "niah_multiquery", "phonebook"]
)
def test_guessing_among_what_is_shown_scores_the_chance(tasks, name):
    generator, exact, found, chances, found_chances = random.Random(0), [], [], [], []
    for document in documents(tasks[name], 500, 150):
        count = len(document.references)
        exact.append(generator.sample(document.candidates, count) == list(document.references))
        guesses = {generator.choice(document.candidates) for _ in range(count)}
        found.append(sum(reference in guesses for reference in document.references) / count)
        chances.append(document.chance)
        found_chances.append(document.generated_chance)
    for scores, said in ((exact, chances), (found, found_chances)):
        mean = sum(said) / len(said)
        assert sum(scores) / len(scores) == pytest.approx(mean, abs=4 * math.sqrt(mean * (1 - mean) / len(said)))


@pytest.mark.parametrize("kind", HAYSTACKS)
def test_hay_is_the_same_however_much_is_asked_for(kind):
    few, many = ([next(stream) for _ in range(count)] for stream, count in (
        (hay(kind, np.random.default_rng(3)), 5), (hay(kind, np.random.default_rng(3)), 50)))  # fmt: skip
    assert many[:5] == few
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in many)


def test_hay_of_the_standard_library_is_its_docstrings():
    import argparse

    assert len(stdlib_sentences()) > 500
    said = " ".join((argparse.Action.__doc__ + argparse.ArgumentParser.__doc__).split())
    assert any(sentence in said for sentence in stdlib_sentences())


def test_hay_knows_no_places_and_things_of_the_facts():
    words = " ".join(next(stream) for stream in [hay("sentences", np.random.default_rng(0))] for _ in range(2000))
    for word in ("attic", "bathroom", "cellar", "garage", "hallway", "kitchen", *THINGS, *PEOPLE):
        assert not re.search(rf"\b{word}\b", words)


def test_an_unknown_haystack_is_refused():
    with pytest.raises(ValueError, match="haystack: unknown 'essays', expected one of"):
        text_tasks("ruler", haystack="essays")


def test_scattered_inserts_keep_their_order_and_places():
    assert scatter(["1", "2"], ["a", "b", "c"], [0.0, 0.5, 1.0]) == ["a", "1", "b", "2", "c"]
    assert scatter([], ["a", "b"], [0.9, 0.1]) == ["b", "a"]


def test_a_batch_has_the_answers_as_labels():
    made = make_documents(text_tasks("babi")["babi_qa1"], TOKENIZER, 300, 3, seed=0)
    rows = batch(made, pad_id=257)
    for row, document in enumerate(made):
        real = rows["attention_mask"][row].bool()
        assert rows["input_ids"][row][real].tolist() == document.ids
        labels = rows["labels"][row]
        assert TOKENIZER.decode(labels[labels >= 0]) == document.text.answer


def test_a_tokenizer_without_a_border_before_the_answer_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    merged = Tokenizer(models.BPE(vocab={"a": 0, " ": 1, "b": 2, "a ": 3}, merges=[("a", " ")]))
    with pytest.raises(ValueError, match="tokenizer: .* no token border before ' b'"):
        encode(TextDocument("a", " b"), PreTrainedTokenizerFast(tokenizer_object=merged))


@pytest.mark.parametrize(
    ("metric", "generated", "score"),
    [
        ("all", " 11 and 22", 1.0),
        ("all", " 22", 0.5),
        ("any", " 22", 1.0),
        ("any", " 33", 0.0),
        ("starts", " 11, 22.", 1.0),
        ("starts", " so 11, 22", 0.0),
    ],
)
def test_metrics_count_what_they_say(metric, generated, score):
    assert judge(TextDocument("x", " 11, 22", references=("11", "22"), metric=metric), generated) == score


@pytest.mark.parametrize(
    ("generated", "score"),
    [(" Kitchen.", 1.0), (" in the kitchen\nQuestion", 1.0), (" attic or kitchen", 0.0), (" no. kitchen", 0.0)],
)
def test_a_fact_must_be_the_only_one_in_the_first_sentence(generated, score):
    document = TextDocument("x", " kitchen", metric="first_sentence", candidates=("attic", "kitchen"))
    assert judge(document, generated) == score


def test_a_task_whose_filler_ends_stops_growing():
    def build(rng, size, depth, length):
        return TextDocument("a" * min(5 + size, 20), " b")

    document = make_document(TextTask("ends", "recall", build, "none"), TOKENIZER, 100, seed=0)
    assert document.num_tokens == 22
