"""The short convolution of attention's queries, keys and values: what it computes, how it starts, what it keeps."""

import math

import pytest
import torch
from torch.nn import functional
from variants import ATTENTION, CONVOLVED, WINDOW, build

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.modeling.masks import plain_sequence
from hybridlm.modeling.mixer_attention import AttentionMixer
from hybridlm.testing import Subject, scale_weights

HIDDEN = 16


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"num_kv_heads": 1, "qkv_bias": True}, {"window": 4}])
@pytest.mark.parametrize("kernel", [2, 4])
def test_it_is_attention_to_projections_that_conv1d_has_filtered(kernel, options):
    options = {"position": {"name": "rope", "theta": 100.0}, "num_heads": 4, "num_kv_heads": 2} | options
    mixer = scale_weights(AttentionMixer(HIDDEN, conv_kernel=kernel, **options)).double()
    hidden_states = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    heads, first = [], 0
    for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
        projected = projection(hidden_states).transpose(1, 2)  # [B, C, T]
        weight = mixer.conv1d.weight[first : first + projected.shape[1]]
        first += len(weight)
        filtered = functional.conv1d(functional.pad(projected, (kernel - 1, 0)), weight, groups=len(weight))
        heads.append(filtered.transpose(1, 2).unflatten(-1, (-1, mixer.head_dim)))
    query, key, value = heads
    if mixer.q_norm is not None:
        query, key = mixer.q_norm(query), mixer.k_norm(key)
    query, key = mixer.position(query.transpose(1, 2), key.transpose(1, 2), plain_sequence(hidden_states))
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible = visible if mixer.window is None else visible.triu(1 - mixer.window)
    groups = {"attn_mask": visible, "enable_gqa": True}
    output = functional.scaled_dot_product_attention(query, key, value.transpose(1, 2), **groups)
    expected = mixer.o_proj(output.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(hidden_states)[0], expected, rtol=0, atol=1e-12)


def filled(mixer, num_tokens=6):
    """The cache after some tokens."""
    with torch.no_grad():
        return build([(mixer, None)]).eval()(torch.arange(num_tokens)[None]).past_key_values


def model_of(**fields):
    specs = {"a": {"mixer": CONVOLVED, "channel_mixer": None}}
    sizes = {"vocab_size": 31, "hidden_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return HybridLMForCausalLM(HybridLMConfig(layer_specs=specs, **sizes | fields))


@pytest.mark.parametrize("initializer_range", [0.02, 0.5])
def test_it_starts_as_published_whatever_the_initializer_range(initializer_range):
    model = model_of(initializer_range=initializer_range)
    weight = model.model.layers[0].mixer.conv1d.weight.detach()
    bound = 3**-0.5
    assert 0.9 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)  # of a uniform distribution


def test_without_it_nothing_is_added():
    mixer = AttentionMixer(HIDDEN)
    assert {name.split(".")[0] for name in mixer.state_dict()} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    cache = filled(ATTENTION)
    assert set(cache.layers[0].named_tensors()) == {"mixer.keys", "mixer.values"}
    assert cache.is_croppable


def test_keys_still_grow_by_doubling_and_are_not_kept_twice():
    subject = Subject(build([(CONVOLVED, None)]), num_tokens=300, batch_size=1)
    cache, addresses = subject.new_cache(), []
    cache.activate_past_recording()
    for t in range(300):
        subject.forward(subject.input_ids[:, t : t + 1], cache)
        addresses.append(cache.layers[0].mixer.state.keys.data_ptr())
    moves = sum(a != b for a, b in zip(addresses, addresses[1:], strict=False))
    assert moves <= math.ceil(math.log2(300)) - 4  # the first buffer has room for 64
    convolution = cache.layers[0].convolution
    for state in (convolution.state, convolution.base, convolution.mark):
        assert state.conv_states.shape == (1, 32, 2)  # the record holds tails and inputs, not keys


def test_the_projections_of_a_first_call_are_not_kept_alive():
    cache = filled(CONVOLVED | {"position": {"name": "none"}}, 20)
    for name, tensor in cache.layers[0].named_tensors().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("mixer", [CONVOLVED, WINDOW | {"conv_kernel": 3}])
def test_tokens_are_taken_back_only_while_the_past_is_recorded(mixer):
    cache = filled(mixer)
    with pytest.raises(ValueError, match="crop: this cache holds recurrent or windowed state and does not record"):
        cache.crop(-1)


def test_a_cache_shows_its_tail_under_the_name_of_transformers():
    cache = filled(CONVOLVED)
    assert cache.layers[0].conv_states.shape == (1, 32, 2)
    assert cache.layers[0].keys.shape[2] == 6
    assert cache.layers[0].recurrent_states is None
