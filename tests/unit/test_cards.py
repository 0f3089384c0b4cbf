"""The published card tells of spans and residuals, and never of a leak."""

import json

import pytest
from huggingface_hub import ModelCard

from hybridlm import presets
from hybridlm.analysis import plan
from hybridlm.hub.cards import layer_rows, render_card, residual_of, span_rows
from hybridlm.modeling.registry import resolve_config

LENGTH = 64


def facts_of(name, **changes):
    config = presets.load_config(name)
    resolve_config(config)
    total = plan(config).total
    return {
        "name": "demo",
        "parameters": total.num_parameters,
        "active_parameters": total.num_active_parameters,
        "expected_active_parameters": total.expected_active_parameters,
        "layers": layer_rows(config),
        "spans": span_rows(config, LENGTH),
        "residual": residual_of(config),
        "data": {"path": "stdlib", "manifest_hash": None, "num_documents": 11, "length": LENGTH},
        "tokens_seen": 5000,
        "training": {"steps": 3, "rows_per_step": 4, "learning_rate": 0.001, "schedule": "cosine", "seconds": 9.0}
        | {"device": "1 CPU thread", "seed": 0},
        "versions": {"python": "3.11"},
    } | changes


def test_a_card_has_a_row_a_span_and_says_how_much_of_the_model_works_on_a_token():
    facts = facts_of("tiny_mod_llama")
    text = render_card(facts)
    planned = plan(presets.load_config("tiny_mod_llama"), context=LENGTH)
    assert len(planned.spans) == 2
    for span in planned.spans:
        assert f"| mixture_of_depths | {span.start} | 25 % | {span.expected_tokens} | {span.max_tokens} |" in text
    assert f"enters every layer passes through {planned.total.num_active_parameters:,} of them" in text
    assert f"passes through {planned.total.expected_active_parameters:,} (" in text
    assert planned.total.expected_active_parameters < planned.total.num_active_parameters
    assert "work on a given token" not in text
    assert "mixture_of_depths" in ModelCard(text).data.tags
    assert json.loads(json.dumps(facts["spans"])) == facts["spans"]
    assert facts["spans"][0]["options"]["capacity"] == 0.25


def test_a_card_names_a_residual_that_does_more_than_add():
    text = render_card(facts_of("tiny_mhc_jamba"))
    assert "`manifold_hyper_connections` with 4 streams" in text
    assert "manifold_hyper_connections" in ModelCard(text).data.tags


def test_a_card_of_plain_layers_has_neither():
    facts = facts_of("tiny_llama")
    text = render_card(facts)
    assert (facts["spans"], facts["residual"]) == ([], None)
    assert f"enters every layer passes through {facts['active_parameters']:,} of them." in text
    for word in ("## Spans", "Residual", "on average"):
        assert word not in text


@pytest.mark.parametrize("leak", [1.2345, 2.3456])
def test_a_card_shows_the_causal_figure_and_never_the_leak(leak):
    causal = {"length": LENGTH, "bits_per_byte": 3.4567, "num_bytes": 999, "num_documents": 1}
    rules = {"causal": causal, "top_k (leak)": causal | {"bits_per_byte": leak}}
    text = render_card(facts_of("tiny_mod_llama", heldout=[causal], heldout_by_rule=rules))
    assert "3.4567" in text
    assert f"{leak:.4f}" not in text
    assert "leak" not in text
    assert "1 document (" in text
