"""Norms: the same function as the native ones, in every type."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hybridlm.modeling.norms import LayerNorm, RMSNorm, build_norm

SIZE = 48


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_rms_norm_in_float32_has_the_bits_of_llama():
    ours, native = RMSNorm(SIZE), LlamaRMSNorm(SIZE)
    ours.weight.data.normal_()
    native.load_state_dict(ours.state_dict())
    hidden_states = torch.randn(2, 5, SIZE)
    assert torch.equal(ours(hidden_states), native(hidden_states))


@pytest.mark.parametrize(("native", "offset"), [(LlamaRMSNorm, False), (GemmaRMSNorm, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_the_native_one(native, offset, dtype):
    ours, native = RMSNorm(SIZE, offset=offset), native(SIZE)
    ours.weight.data.normal_()
    native.load_state_dict(ours.state_dict())
    ours, native = ours.to(dtype), native.to(dtype)
    hidden_states = 3 * torch.randn(2, 5, SIZE, dtype=dtype)
    # the order of the sums may turn one rounding of bfloat16
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 2**-7}
    torch.testing.assert_close(ours(hidden_states), native(hidden_states), **tolerance)


def test_layer_norm_is_torchs():
    ours, native = LayerNorm(SIZE, eps=1e-5), nn.LayerNorm(SIZE, eps=1e-5)
    ours.weight.data.normal_()
    ours.bias.data.normal_()
    native.load_state_dict(ours.state_dict())
    hidden_states = torch.randn(2, 5, SIZE)
    torch.testing.assert_close(ours(hidden_states), native(hidden_states))


NORM_SPECS = [
    {"name": "rms"},
    {"name": "rms", "offset": True},
    {"name": "layer"},
    {"name": "layer", "bias": False, "offset": True},
]


@pytest.mark.parametrize("spec", NORM_SPECS)
def test_a_new_norm_only_normalises(spec):
    hidden_states = torch.randn(2, 5, SIZE, dtype=torch.float64)
    centred = hidden_states - hidden_states.mean(-1, keepdim=True) if spec["name"] == "layer" else hidden_states
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    norm = build_norm({**spec, "eps": 1e-3, "placement": "pre"}, SIZE).double()
    torch.testing.assert_close(norm(hidden_states), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", NORM_SPECS)
def test_the_result_has_the_inputs_type_whatever_the_weights(spec):
    norm = build_norm(spec, SIZE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert norm(torch.randn(2, SIZE).to(dtype)).dtype == dtype


@pytest.mark.parametrize("spec", NORM_SPECS)
def test_large_half_precision_values_do_not_overflow(spec):
    norm = build_norm(spec, SIZE).half()
    hidden_states = torch.tensor([3e4, -3e4] * (SIZE // 2), dtype=torch.float16)
    torch.testing.assert_close(norm(hidden_states), hidden_states.sign())


@pytest.mark.parametrize("spec", NORM_SPECS)
def test_gradients_are_right(spec):
    norm = build_norm(spec, 6).double()
    hidden_states = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: norm(hidden_states), (hidden_states, *norm.parameters()))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "batch"}, r"^name: unknown 'batch', expected one of \['layer', 'rms'\]"),
        ({}, r"^name: unknown None, expected one of \['layer', 'rms'\]"),
        ({"name": "rms", "bias": True}, r"^bias: unknown option of norm 'rms', expected one of \['eps', 'offset'\]"),
        ({"name": "rms", "eps": 0.0}, r"^eps=0.0 must be above 0"),
    ],
)
def test_a_wrong_spec_says_what_is_allowed(spec, message):
    with pytest.raises(ValueError, match=message):
        build_norm(spec, SIZE)
