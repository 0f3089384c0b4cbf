"""What memories record stands where the tokens stand, whatever way the tokens came."""

import pytest
import torch
from stacks import prompt

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.modeling.neural_memory import TRACE
from hybridlm.testing import scale_weights

MEMORY = {"name": "neural_memory", "num_heads": 2, "chunk_size": 4, "head_dim": 8}


def build(scale=True, **fields):
    torch.manual_seed(0)
    specs = {
        "memory": {"mixer": MEMORY, "channel_mixer": {"name": "mlp"}},
        "attention": {"mixer": {"name": "attention", "num_heads": 4}, "channel_mixer": None},
    }
    layout = ["memory", "attention", "memory"]
    fields = {"vocab_size": 48, "hidden_size": 32} | fields
    config = HybridLMConfig(num_hidden_layers=3, layer_specs=specs, layer_layout=layout, **fields)
    model = HybridLMForCausalLM(config)
    return (scale_weights(model) if scale else model).eval()


@pytest.fixture(scope="module")
def model():
    return build()


def trace_of(model, ids, **arguments):
    with torch.no_grad():
        return model(ids, output_memory_trace=True, **arguments).memory_trace


def test_a_call_records_nothing_unless_it_is_asked_to(model):
    with torch.no_grad():
        assert model(prompt(2)).memory_trace is None


def test_a_trace_has_a_number_of_each_kind_for_every_token_and_head(model):
    ids = prompt(2)
    traces = trace_of(model, ids)
    assert [tuple(trace.shape) for trace in traces] == [(*ids.shape, 2, len(TRACE))] * 2
    by_name = dict(zip(TRACE, traces[0].unbind(-1), strict=True))
    assert (by_name["surprise"] > 0).all()
    assert (by_name["memory_norm"] > 0).all()
    bounds = {"learning_rate": 1 / MEMORY["chunk_size"], "momentum": 1.0, "forgetting": 1.0}
    for name, bound in bounds.items():
        assert (by_name[name] > 0).all(), name
        assert (by_name[name] < bound).all(), name


def test_traces_are_the_same_in_chunks_step_by_step_padded_and_rolled_back(model):
    ids = prompt(2)
    whole = trace_of(model, ids)
    cache, pieces = model.new_cache(), []
    cache.activate_past_recording()
    for piece in ids.split([3, 1, ids.shape[1] - 4], dim=1):
        pieces.append(trace_of(model, piece, past_key_values=cache))
    for expected, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    cache.crop(-2)
    for expected, again in zip(whole, trace_of(model, ids[:, -2:], past_key_values=cache), strict=True):
        torch.testing.assert_close(again, expected[:, -2:])
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    for expected, trace in zip(whole, trace_of(model, padded, attention_mask=mask), strict=True):
        torch.testing.assert_close(trace[:, 3:], expected)
        assert not trace[:, :3].any()


def test_a_trace_inside_a_span_is_zero_at_the_tokens_that_went_around_it():
    model = build(spans=[{"name": "mixture_of_depths", "start": 2, "stop": 3, "capacity": 0.5}])
    with torch.no_grad():
        out = model(prompt(2), output_memory_trace=True, output_router_logits=True)
    taken = out.span_taken[0]
    assert 0 < taken.sum() < taken.numel()
    assert (out.memory_trace[1].abs().sum((-1, -2)) > 0).equal(taken)


def test_the_same_token_again_surprises_less():
    model = build(scale=False)
    ids = torch.full((1, 64), 7)
    surprise = trace_of(model, ids)[0][0, :, :, TRACE.index("surprise")]
    assert (surprise[-1] < 0.5 * surprise[4]).all()


def test_gates_of_a_new_model_start_at_the_biases_of_the_config():
    for model in (build(scale=False), build(scale=False, initializer_range=0.0)):
        bias = model.model.layers[0].mixer.gates.proj.bias.view(3, 2)
        assert bias.tolist() == [[0.0, 0.0], [0.0, 0.0], [-5.0, -5.0]]
