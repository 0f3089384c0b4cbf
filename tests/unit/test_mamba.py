"""The Mamba mixer keeps the promises of a recurrent mixer and equals transformers' Mamba and Jamba."""

import pytest
import torch
from recurrent_cases import HIDDEN, RecurrentMixerCases
from torch.testing import assert_close
from transformers import JambaConfig, MambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer as NativeMambaMixer

from hybridlm.modeling.mixer_mamba import MambaMixer

NAMES = {"dt_proj.bias": "dt_bias", "dt_layernorm": "dt_norm", "b_layernorm": "b_norm", "c_layernorm": "c_norm"}


class TestMamba(RecurrentMixerCases):
    @staticmethod
    def build(**options):
        return MambaMixer(HIDDEN, **({"state_size": 4, "bias": True} | options))


class TestJambaMamba(RecurrentMixerCases):
    @staticmethod
    def build(**options):
        return MambaMixer(
            HIDDEN, **({"state_size": 3, "inner_norms": True, "dt_rank": 5, "conv_bias": False} | options)
        )


def native_mamba():
    config = MambaConfig(hidden_size=32, state_size=8, expand=3, num_hidden_layers=1, use_bias=True, time_step_rank=5)
    ours = MambaMixer(32, state_size=8, expand=3, bias=True, dt_rank=5)
    return NativeMambaMixer(config, layer_idx=0), ours


def native_jamba():
    config = JambaConfig(
        hidden_size=32, mamba_d_state=8, mamba_d_conv=3, mamba_dt_rank=6, num_hidden_layers=1, rms_norm_eps=1e-3
    )
    ours = MambaMixer(32, state_size=8, conv_kernel=3, dt_rank=6, inner_norms=True, norm_eps=1e-3)
    return JambaMambaMixer(config, layer_idx=0), ours


@pytest.mark.parametrize("twins", [native_mamba, native_jamba])
def test_the_output_equals_transformers(twins):
    native, ours = twins()
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.normal_(std=0.5)
    weights = native.state_dict()
    for old, new in NAMES.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    ours.load_state_dict(weights)
    hidden_states = torch.randn(2, 70, 32)
    with torch.no_grad():
        expected, (output, _) = native(hidden_states), ours(hidden_states)
    assert_close(output, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 0}, "state_size=0"),
        ({"conv_kernel": 0}, "conv_kernel=0"),
        ({"intermediate_size": -1}, "intermediate_size=-1"),
        ({"activation": "sillu"}, "activation='sillu'"),
        ({"dt_min": 0.2}, "dt_min=0.2"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MambaMixer(HIDDEN, **options)
