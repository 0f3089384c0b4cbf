"""Which rules see the future, and what that is worth."""

import pytest
import torch

from hybridlm import HybridLMConfig
from hybridlm.analysis.span_rules import bits_per_byte_by_rule, leaky_top_k
from hybridlm.data import build_byte_tokenizer
from hybridlm.modeling.modeling_hybridlm import HybridLMForCausalLM
from hybridlm.training import evaluate_bits_per_byte

SPECS = {
    "a": {"mixer": {"name": "attention", "num_heads": 2}, "channel_mixer": {"name": "mlp"}},
    "m": {"mixer": {"name": "mamba", "state_size": 4}, "channel_mixer": None},
}
RULES = ["threshold", "random", "auxiliary_loss", "predictor"]
CHANGED = 20  # the column at which two texts begin to differ


def build(rule, **options):
    torch.manual_seed(0)
    spans = [{"name": "mixture_of_depths", "start": 1, "stop": 3, "capacity": 0.3, "rule": rule} | options]
    sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 4}
    config = HybridLMConfig(layer_specs=SPECS, layer_layout=["a", "m", "a", "m"], spans=spans, **sizes)
    model = HybridLMForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "router" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def change_of_the_past(model, **options):
    """Largest difference of logits before the first changed token, over texts that end otherwise."""
    ids = torch.randint(0, 258, (4, 32), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, CHANGED:] = torch.randint(0, 258, (4, 32 - CHANGED), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (model(x, **options).logits[:, :CHANGED] for x in (ids, other))
    return float((before - after).abs().max())


@pytest.mark.parametrize("rule", RULES)
def test_top_k_lets_later_tokens_decide_and_the_causal_rules_do_not(rule):
    """In evaluation every rule is causal; in training those are that take no top k there."""
    model = build(rule)
    assert change_of_the_past(model, use_cache=False) < 1e-9
    with leaky_top_k(model):
        assert change_of_the_past(model, use_cache=False) > 1e-3
        assert change_of_the_past(model, use_cache=True) < 1e-9
    assert change_of_the_past(model, use_cache=False) < 1e-9
    changed = change_of_the_past(model.train())
    assert changed < 1e-9 if rule in ("threshold", "random") else changed > 1e-3


@pytest.mark.parametrize("rule", ["threshold", "random"])
def test_a_ceiling_is_causal_too(rule):
    model = build(rule, ceiling=0.3)
    with torch.no_grad():
        taken = model(torch.randint(0, 258, (4, 32)), output_router_logits=True).span_taken[0]
    assert 0.1 < taken.double().mean() <= 10 / 32
    assert change_of_the_past(model, use_cache=False) < 1e-9
    assert change_of_the_past(model.train()) < 1e-9


def test_the_measurement_takes_the_top_k_and_leaves_everything_as_it_was():
    model = build("threshold", capacity=0.25)
    ids = torch.randint(0, 258, (2, 32))

    def share():
        with torch.no_grad():
            return model(ids, output_router_logits=True, use_cache=False).span_taken[0].double().mean(1).tolist()

    before = share()
    with leaky_top_k(model):
        assert share() == [0.25, 0.25]
    assert share() == before != [0.25, 0.25]
    with pytest.raises(RuntimeError), leaky_top_k(model):
        raise RuntimeError
    assert share() == before


def test_bits_per_byte_stand_side_by_side_and_the_leak_is_labelled():
    model, tokenizer = build("auxiliary_loss"), build_byte_tokenizer()
    texts = ["a text that is long enough to have some tokens that enter", "another one"]
    scores = bits_per_byte_by_rule(model, iter(texts), tokenizer, 16)
    assert list(scores) == ["causal", "top_k (leak)"]
    assert scores["causal"] == evaluate_bits_per_byte(model, texts, tokenizer, 16)
    with leaky_top_k(model):
        assert scores["top_k (leak)"] == evaluate_bits_per_byte(model, texts, tokenizer, 16)
    assert scores["causal"].bits_per_byte != scores["top_k (leak)"].bits_per_byte
    assert not any(span.top_k_in_evaluation for span in model.model.spans)


@pytest.mark.parametrize("spans", [[], [{"name": "token_merging", "start": 1}]])
def test_a_model_without_the_rule_is_refused(spans):
    sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 4}
    config = HybridLMConfig(layer_specs=SPECS, layer_layout=["a", "m", "a", "m"], spans=spans, **sizes)
    with pytest.raises(ValueError, match="model: the model has no mixture_of_depths span"):
        bits_per_byte_by_rule(HybridLMForCausalLM(config), ["text"], build_byte_tokenizer(), 8)
