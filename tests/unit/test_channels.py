"""Dense channel mixers: the same function as the native ones."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from hybridlm.modeling.channel_mlp import MLP
from hybridlm.modeling.channel_moe import MoE
from hybridlm.modeling.channel_swiglu import SwiGLU

SIZE = 24


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_swiglu_has_the_bits_of_llama():
    native = LlamaMLP(LlamaConfig(hidden_size=SIZE, intermediate_size=40, num_attention_heads=4))
    ours = SwiGLU(SIZE, intermediate_size=40)
    ours.load_state_dict(native.state_dict())
    hidden_states = torch.randn(2, 5, SIZE)
    assert torch.equal(ours(hidden_states)[0], native(hidden_states))


def test_mlp_is_up_activation_down():
    mlp = MLP(SIZE, intermediate_size=40, activation="relu", bias=True)
    hidden_states = torch.randn(2, 5, SIZE)
    inner = (hidden_states @ mlp.up_proj.weight.T + mlp.up_proj.bias).clamp(min=0)
    torch.testing.assert_close(mlp(hidden_states)[0], inner @ mlp.down_proj.weight.T + mlp.down_proj.bias)


@pytest.mark.parametrize(("size", "width"), [(24, 64), (512, 1408), (768, 2048)])
def test_swiglu_is_eight_thirds_wide_rounded_up_to_64(size, width):
    assert SwiGLU(size).up_proj.out_features == width


def test_mlp_is_four_times_as_wide():
    assert MLP(SIZE).up_proj.out_features == 4 * SIZE


@pytest.mark.parametrize("channel", [MLP, SwiGLU, MoE])
def test_channels_work_in_any_type_and_agree_with_their_reference(channel):
    channel = channel(SIZE).double()
    hidden_states = torch.randn(2, 5, SIZE, dtype=torch.float64)
    output, state = channel(hidden_states)
    assert state is None
    assert channel.state_spec(100, torch.float32) == {}
    torch.testing.assert_close(output, channel.forward_reference(hidden_states)[0], rtol=1e-12, atol=1e-12)
    assert channel.bfloat16()(hidden_states.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("channel", [MLP, SwiGLU, MoE])
def test_dropout_acts_in_training_only(channel):
    channel = channel(SIZE, dropout=0.5)
    hidden_states = torch.randn(2, 5, SIZE)
    dropped = (channel(hidden_states)[0] == 0).float().mean()
    assert 0.3 < dropped < 0.7
    assert torch.equal(channel.eval()(hidden_states)[0], channel(hidden_states)[0])
    assert (channel(hidden_states)[0] != 0).all()


@pytest.mark.parametrize("channel", [MLP, SwiGLU, MoE])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "sulu"}, r"^activation: unknown 'sulu', expected one of \['gelu'|^activation: .*'silu'"),
        ({"intermediate_size": 0}, r"^intermediate_size=0 must be at least 1"),
        ({"dropout": 1.0}, r"^dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(channel, options, message):
    with pytest.raises(ValueError, match=message):
        channel(SIZE, **options)
