"""A card prints words, and numbers that have a source; nothing else can reach it."""

import functools
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import hybridlm
from hybridlm import presets
from hybridlm.analysis import plan
from hybridlm.hub.card_text import split_card
from hybridlm.hub.cards import CONFIG, FACTS, PLAN, TRAINING, Bundle, dump, render_card, template_text
from hybridlm.hub.describe import plan_record
from hybridlm.hub.facts import GENERIC, check_facts, facts_names, facts_of_config, load_facts
from hybridlm.hub.figures import FORMS, CardError, Source, derive, unbacked

LENGTH = 64
HELDOUT = {"length": LENGTH, "bits_per_byte": 3.4567, "num_bytes": 999, "num_documents": 1}


def record(**changes):
    """What a run leaves."""
    return {
        "kind": "training",
        "name": "demo",
        "base_model": None,
        "parameters": 1234,
        "data": {"path": "stdlib", "hub": False, "manifest_hash": None, "num_documents": 11, "length": LENGTH},
        "tokens_seen": 5000,
        "training": {"steps": 3, "rows_per_step": 4, "learning_rate": 0.001, "schedule": "cosine", "seconds": 9.0}
        | {"device": "1 CPU thread", "seed": 0},
        "versions": {"python": "3.11"},
    } | changes


ESTIMATE = {"score": 0.5, "error": 0.25, "chance": 0.25, "above_chance": False}
CELL = {"task": "qa1", "suite": "babi", "length": 64, "status": "scored", "num_documents": 4, "likelihood": ESTIMATE}
EVAL = {
    "kind": "eval",
    "model": {"name": "demo", "hash": "ab12", "parameters": 1234, "trained_length": 64, "tokenizer": "T"}
    | {"dtype": "fp32", "device": "cpu"},
    "settings": {"suite": "babi", "lengths": [64], "samples": 4, "seed": 0},
    "versions": {"torch": "2.13.0"},
    "cells": [CELL | {"gold": {"likelihood": 1.0}}],
    "skipped": [],
}
RACE = {
    "kind": "race",
    "title": "recall",
    "task": {"task": "mqar", "length": 32},
    "chance": 0.0625,
    "arms": {"mamba2": {"parameters": 5, "state_bytes": 7, "at": {"200": {"mean": 0.11, "standard_error": 0.01}}}},
    "summary": ["At step 200 it is at chance."],
}
RACE["arms"]["mamba2"]["at"]["200"]["above_chance"] = False


@functools.cache
def files_of(name):
    text = presets.find_config(name).read_bytes()
    facts = dump({"kind": "facts", **load_facts(name)})
    return {CONFIG: text, FACTS: facts, PLAN: dump(plan_record(json.loads(text), LENGTH))}


def bundle_of(name, training=None, **results):
    files = dict(files_of(name))
    if training is not None:
        files[TRAINING] = dump(training)
    return Bundle("demo", files | {f"results/{key}.json": dump(value) for key, value in results.items()})


def test_a_card_has_a_row_a_span_and_says_how_much_of_the_model_works_on_a_token():
    text = render_card(bundle_of("tiny_mod_llama")).text
    planned = plan(presets.load_config("tiny_mod_llama"), context=LENGTH)
    assert len(planned.spans) == 2
    for span in planned.spans:
        assert f"| mixture_of_depths | {span.start} | 25 % | {span.expected_tokens} | {span.max_tokens} |" in text
    assert f"enters every layer passes through {planned.total.num_active_parameters:,} of them" in text
    assert f"passes through {planned.total.expected_active_parameters:,} on average" in text
    assert planned.total.expected_active_parameters < planned.total.num_active_parameters
    assert "mixture_of_depths" in ModelCard(text).data.tags


def test_a_card_names_a_residual_that_does_more_than_add():
    text = render_card(bundle_of("tiny_mhc_jamba")).text
    assert "`manifold_hyper_connections` with 4 streams" in text
    assert "manifold_hyper_connections" in ModelCard(text).data.tags


def test_a_card_of_plain_layers_has_neither():
    text = render_card(bundle_of("tiny_llama")).text
    for word in ("### Spans", "Residual", "on average", "expected at the targets"):
        assert word not in text


def test_a_card_shows_the_causal_figure_and_never_the_leak():
    leak = {"causal": HELDOUT, "top_k (leak)": HELDOUT | {"bits_per_byte": 2.3456}}
    text = render_card(bundle_of("tiny_mod_llama", record(heldout=[HELDOUT], heldout_by_rule=leak))).text
    assert "3.4567" in text
    assert "2.3456" not in text
    assert "leak" not in text


def test_every_model_of_the_zoo_has_a_card_that_the_hub_reads():
    for name in presets.preset_names():
        if name.startswith("tiny_"):
            data = ModelCard(render_card(bundle_of(name)).text).data
            assert (data.library_name, data.pipeline_tag, data.license) == (
                "transformers",
                "text-generation",
                "apache-2.0",
            )
            assert "hybridlm" in data.tags


def test_results_reach_the_table_and_the_index_with_what_a_bare_number_hides():
    card = render_card(bundle_of("tiny_llama", record(heldout=[HELDOUT]), babi=EVAL, race=RACE))
    assert "| qa1 | 64 | 4 | at chance (0.500 ± 0.250) | – | 0.25 | 100 % |" in card.text
    assert "| mamba2 | 5 | 7 | 200: at chance (0.110 ± 0.010) |" in card.text
    assert "hybridlm eval FOLDER --suite babi --lengths 64 --samples 4 --seed 0 --dtype fp32" in card.text
    bits, score = ModelCard(card.text).data.eval_results
    assert (bits.metric_type, bits.metric_value) == ("bits_per_byte", 3.4567)
    assert (score.dataset_name, score.metric_value) == ("qa1", 0.5)
    assert "at chance" in score.metric_name
    assert "0.25" in score.metric_name


def test_every_figure_of_a_card_is_derived_again_from_its_file():
    bundle = bundle_of("tiny_everything", record(heldout=[HELDOUT]), babi=EVAL)
    card = render_card(bundle)
    sources = {path: source.data for path, source in bundle.sources().items()} | {"results/card.json": card.ledger}
    figures = [*card.ledger["figures"], *card.ledger["metadata"].values()]
    assert len(figures) > 40
    for value, form, file, pointer in figures:
        assert derive(sources[file], form, pointer, file) == value


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("It scores 0.97.", "line .* '0.97.' has no source"),
        ("{{ 0.97 }}", "prints 0.97, which has no source"),
        ("{{ '97 percent' }}", "which has no source"),
        ("{{ plan.total.num_parameters + parameters }}", "unsupported operand"),
        ("{{ 'about ' ~ plan.total.num_parameters }}", "is printed by a form"),
        ("{{ (plan.total.num_parameters | integer) ~ '' }}", "takes part in nothing else"),
        ("{{ plan.layers | length }}", "has no len|which has no source"),
        ("{{ 17 | integer }}", "only places in result files"),
        ("{{ plan.total.accuracy | decimal }}", "there is no such value"),
        ("{{ training.heldout }}", "prints Undefined, which has no source"),
        ("{% for layer in plan.layers %}{{ loop.index }}{% endfor %}", "which has no source"),
        ("{{ plan.total.num_parameters | integer }} %", "is more than"),
        ("-{{ plan.total.num_parameters | integer }}", "is more than"),
        ("½ of it", "has no source"),
    ],
)
def test_a_template_cannot_print_a_number_of_its_own(line, reason):
    bundle = bundle_of("tiny_llama")
    with pytest.raises(CardError, match=reason):
        render_card(bundle, f"{{{{ facts.limits }}}}\n{line}\n")


def test_a_template_prints_what_has_a_source():
    text = render_card(bundle_of("tiny_llama"), "{{ plan.total.num_parameters | integer }} parameters").text
    total = plan(presets.load_config("tiny_llama")).total
    assert text.endswith(f"{total.num_parameters:,} parameters\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a 12 b 0.5 c", None),
        ("a 12 b 0.6 c", "line 1: '0.6' stands where '0.5' of f#/1"),
        ("a 12 b 0.55 c", "line 1: '0.55'"),
        ("a 12 b 10.5 c", "line 1: '10.5' stands where"),
        ("a 12 b -0.5 c", "is more than '0.5'"),
        ("a 12 b 0.5 % c", "is more than '0.5'"),
        ("a 12 b 0.5k c", "is more than '0.5'"),
        ("a 12 b –0.5 c", "is more than '0.5'"),
        ("a 12 b &minus;0.5 c", "is more than '0.5'"),
        ("a 12 b -**0.5** c", "is more than '0.5'"),
        ("a 12 b 0.5\u00a0% c", "is more than '0.5'"),
        ("a 12 b 0.5\n% c", "is more than '0.5'"),
        ("a 12 b 0.5 &percnt; c", "is more than '0.5'"),
        ("a 12 b 0.5**%** c", "is more than '0.5'"),
        ("a 12 b 0.5 <b>％</b> c", "is more than '0.5'"),
        ("a 12 b 0.5 million c", "is more than '0.5'"),
        ("- 12\n- **0.5** – c", None),
        ("<b>12</b> millions, `0.5` &amp; c", None),
        ("a 12 b c", "'0.5' of f#/1 is missing"),
        ("a 12 b 0.5 c\n\n7 d", "line 3: '7' has no source"),
        ("a 3 12 b 0.5 c", "line 1: '3' stands where '12'"),
        ("a 0.5 b 12", "line 1: '0.5' stands where '12'"),
        ("other words 12, and 0.5", None),
    ],
)
def test_a_text_is_read_again_figure_after_figure(text, problem):
    found = unbacked(text, [("12", "f#/0"), ("0.5", "f#/1")])
    assert (found is None) if problem is None else (problem in found), found


def test_a_form_says_what_it_does_not_take():
    with pytest.raises(CardError, match=r"f#/a: form 'integer' does not take it: 'x' is no whole number"):
        Source("f", {"a": "x"}).view.a.figure("integer")
    with pytest.raises(CardError, match=r"unknown form 'percents', expected one of"):
        Source("f", {"a": 1}).view.a.figure("percents")
    assert "percent" in FORMS


def test_no_word_of_the_template_counts():
    literal = re.sub(r"{[{%].*?[%}]}", "", template_text())
    assert not [char for char in literal if char.isnumeric()]


def test_every_preset_has_facts_that_its_config_leads_to():
    for name in presets.preset_names():
        facts = load_facts(name)
        assert facts["tiny"] == name.startswith("tiny_")
        assert facts["license"], name
        assert facts["papers"], name
        assert facts_of_config(json.loads(presets.find_config(name).read_text())) == name
    assert facts_of_config({"hidden_size": 3}) == GENERIC


def test_every_facts_file_is_of_a_model_and_cites_what_the_package_cites():
    runs = [yaml.safe_load(path.read_text()) for path in presets.data_path("configs").glob("runs/*.yaml")]
    named = {run.get("publish", {}).get("facts") for run in runs}
    assert set(facts_names()) - set(presets.preset_names()) <= {GENERIC, *named}
    known = "".join(path.read_text() for path in Path(hybridlm.__file__).parent.rglob("*.py"))
    for name in facts_names():
        for paper in load_facts(name)["papers"]:
            assert f"arXiv:{paper}" in known or (name, paper) == ("samba", "2406.07522"), (name, paper)


GOOD = {
    **{"description": "A model.", "mechanism": "Layers.", "papers": ["2312.00752"], "license": "mit"},
    **{"intended_use": "Research.", "limits": "Many.", "data": "None."},
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"limits": "It recalls 97 % of all."}, "limits: '97' holds a number"),
        ({"mechanism": "It is 3x faster."}, "'3x' holds a number"),
        ({"description": "Mamba-2 scores .5"}, "'Mamba-2' holds a number"),
        ({"description": "Mamba-2.5 is it", "names": ["Mamba-2"]}, "'Mamba-2.5' holds a number"),
        ({"names": ["97"]}, "names: '97' does not begin with a letter"),
        ({"papers": ["Titans"]}, "papers: 'Titans' is no arXiv id"),
        ({"limits": None}, "limits: expected a text"),
        ({"accuracy": "high"}, "accuracy: unknown"),
    ],
)
def test_facts_are_words(changes, reason):
    check_facts(GOOD | {"limits": "As of 2024, after arXiv:2312.00752."}, "facts")
    check_facts(GOOD | {"description": "Mamba-2 alone.", "names": ["Mamba-2"]}, "facts")
    with pytest.raises(ValueError, match=f"facts: .*{re.escape(reason)}"):
        check_facts(GOOD | changes, "facts")


def test_facts_that_lack_a_field_or_are_unknown_are_named(tmp_path):
    with pytest.raises(ValueError, match="limits: missing"):
        check_facts({key: value for key, value in GOOD.items() if key != "limits"}, "facts")
    with pytest.raises(FileNotFoundError, match="facts: no 'jambo'"):
        load_facts("jambo")
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml does not exist"):
        load_facts(tmp_path / "nowhere.yaml")


def test_a_data_set_and_a_base_model_of_the_hub_are_linked():
    data = record()["data"] | {"path": "org/texts-2", "hub": True}
    card = render_card(bundle_of("tiny_llama", record(data=data, base_model="org/base-7b"))).text
    found = ModelCard(card).data
    assert (found.datasets, found.base_model) == (["org/texts-2"], "org/base-7b")
    assert "Base model: org/base-7b." in card


def test_a_config_cannot_claim_a_number_in_its_source():
    bundle = bundle_of("tiny_mhc_jamba")
    assert "Shape: " in render_card(bundle).text
    config = json.loads(bundle.files[CONFIG])
    config["extra"]["source"] = "scores 99 %"
    bundle.files[CONFIG] = dump(config)
    assert "99 %" not in render_card(bundle).text


def test_the_metadata_are_those_of_the_text():
    text = render_card(bundle_of("tiny_llama", record(heldout=[HELDOUT]))).text
    header, body = split_card(text)
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == 3.4567
    assert body.startswith("\n# demo\n")
    with pytest.raises(CardError, match="no metadata"):
        split_card("# demo\n")
