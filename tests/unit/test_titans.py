"""Memory as gate and as layer: what the paper and the module say of them, and what all three share."""

import pytest
import torch
from titans_cases import EXACT, MEMORY, attended, build, draw, gated, norm, untaught, window_mask
from torch.testing import assert_close
from variants import ROPE, small
from variants import build as build_model

from hybridlm import HybridLMConfig
from hybridlm.modeling.masks import plain_sequence
from hybridlm.modeling.neural_memory import TRACE
from hybridlm.testing import scale_weights

KINDS = ("mac", "mag", "mal")
FROZEN = {"max_learning_rate": 0.0}  # and what is forgotten leads back to the initial memory


@pytest.mark.parametrize("num_persistent", [0, 3])
def test_a_gate_whose_memory_never_learns_is_a_fixed_function_of_the_last_tokens(num_persistent):
    mixer, inputs = build("mag", FROZEN, num_persistent=num_persistent), draw()
    attention = attended(mixer.attention, inputs, inputs, window_mask(inputs.shape[1], mixer.window))
    assert_close(mixer(inputs)[0], gated(mixer.gate, attention, untaught(mixer.memory, inputs)), **EXACT)


@pytest.mark.parametrize("num_persistent", [0, 3])
def test_a_layer_whose_memory_never_learns_is_two_layers_with_a_residual_and_a_norm_between(num_persistent):
    mixer, inputs = build("mal", FROZEN, num_persistent=num_persistent), draw()
    remembered = untaught(mixer.memory, inputs)
    between = norm(mixer.norm, inputs + remembered)
    attention = attended(mixer.attention, between, between, window_mask(inputs.shape[1], mixer.window))
    assert_close(mixer(inputs)[0], remembered + attention, **EXACT)


def test_a_layer_whose_memory_says_nothing_is_attention_in_a_window():
    mixer, inputs = build("mal"), draw()
    torch.nn.init.zeros_(mixer.memory.out_proj.weight)
    inputs_of_attention = norm(mixer.norm, inputs)
    visible = window_mask(inputs.shape[1], mixer.window)
    expected = attended(mixer.attention, inputs_of_attention, inputs_of_attention, visible)
    assert_close(mixer(inputs)[0], expected, **EXACT)


@pytest.mark.parametrize("kind", ["mag", "mal"])
def test_only_the_memory_reaches_beyond_the_window(kind):
    for rate in (0.0, 2.0):
        mixer = build(kind, {"max_learning_rate": rate, "conv_kernel": 1})
        inputs = draw(1).requires_grad_()
        (found,) = torch.autograd.grad(mixer(inputs)[0][0, -1].square().sum(), inputs)
        far = found[0, : -mixer.window]
        assert bool(far.any()) == (rate > 0), rate


@pytest.mark.parametrize("kind", KINDS)
def test_persistent_tokens_have_no_position_and_are_always_there(kind):
    mixer, inputs = build(kind, position=ROPE), draw()
    here, there = plain_sequence(inputs), plain_sequence(inputs)
    there.positions = there.positions + 1000
    assert_close(mixer(inputs, None, there)[0], mixer(inputs, None, here)[0], rtol=1e-7, atol=1e-8)
    expected = mixer(inputs)[0]
    with torch.no_grad():
        mixer.attention.persistent_values.add_(1.0)
    moved = (mixer(inputs)[0] - expected).abs().amax((0, 2))
    assert bool((moved > 1e-3).all())


@pytest.mark.parametrize("kind", KINDS)
def test_without_persistent_tokens_there_are_no_parameters_of_them(kind):
    names = [name for name, _ in build(kind, num_persistent=0).named_parameters()]
    assert not [name for name in names if "persistent" in name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pads", [1, 3, 6])
def test_left_pads_shift_windows_segments_and_persistent_tokens_with_each_row(kind, pads):
    model = build_model([(small(f"titans_{kind}"), None)])
    ids = torch.randint(0, 31, (2, 15))
    padded = torch.cat([torch.zeros_like(ids[:, :pads]), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[0, :pads] = 0
    mixed = padded.clone()
    mixed[1] = torch.cat([ids[1], ids[1, :pads]])  # a row of another length beside it
    with torch.no_grad():
        actual = model(mixed, attention_mask=mask).logits
        assert_close(actual[:1, pads:], model(ids[:1]).logits, **EXACT)
        assert_close(actual[1:], model(mixed[1:]).logits, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_is_an_option_with_options_that_the_config_stores(kind):
    size = {"segment_size": 4} if kind == "mac" else {"window": 4}
    options = {"name": "neural_memory", "num_heads": 2, "objective": "huber", "omega_window": 2}
    mixer = {"name": f"titans_{kind}", "num_heads": 4, "memory": options} | size

    def resolved(mixer):
        specs = {"a": {"mixer": mixer, "channel_mixer": None}}
        model = scale_weights(build_model_of(specs))
        return model.config.layer_specs["a"]["mixer"], model.model.layers[0].mixer

    stored, part = resolved(mixer)
    assert stored["memory"].items() >= options.items()
    assert stored["memory"]["head_dim"] == 8  # what was derived is stored too
    assert stored["memory"]["detach_memory"] is False
    assert stored["memory"]["chunk_size"] == part.memory.chunk_size == (4 if kind == "mac" else 64)
    assert part.memory.scan.network.objective == "huber"
    assert resolved(stored)[0] == stored
    default, _ = resolved({"name": f"titans_{kind}", "num_heads": 4} | size)
    assert default["memory"]["name"] == "neural_memory"


def build_model_of(specs):
    from hybridlm import HybridLMForCausalLM

    return HybridLMForCausalLM(HybridLMConfig(hidden_size=16, vocab_size=31, num_hidden_layers=1, layer_specs=specs))


def test_traces_of_all_three_are_the_same_however_the_text_is_cut():
    model = build_model([(small(f"titans_{kind}"), None) for kind in KINDS])
    ids = torch.randint(0, 31, (2, 14))
    with torch.no_grad():
        whole = model(ids, output_memory_trace=True).memory_trace
        cache, pieces = model.new_cache(), []
        for piece in ids.split([3, 1, 6, 4], dim=1):
            pieces.append(model(piece, past_key_values=cache, output_memory_trace=True).memory_trace)
    assert [tuple(trace.shape) for trace in whole] == [(2, 14, 2, len(TRACE))] * 3
    for expected, *parts in zip(whole, *pieces, strict=True):
        assert_close(torch.cat(parts, dim=1), expected, **EXACT)
        assert bool((expected[..., : TRACE.index("momentum")] > 0).all())


def test_recorded_attentions_are_those_of_attention_layers_alone():
    model = build_model([(small("titans_mac"), None), (small("attention"), None), (small("titans_mag"), None)])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.randint(0, 31, (2, 9)), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 9, 9)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_is_trained_in_float32_under_bfloat16_autocast(kind):
    mixer = build(kind, MEMORY | {"max_learning_rate": 1.0}).float()
    inputs = draw(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = mixer(inputs)
    output.float().square().sum().backward()
    assert state.memory.dtype == state.open_tokens.dtype == torch.float32
    for name, parameter in mixer.named_parameters():
        assert bool(torch.isfinite(parameter.grad).all()), name
