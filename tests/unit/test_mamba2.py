"""The Mamba-2 mixer keeps the promises of a recurrent mixer and equals transformers' Mamba-2, Bamba and Granite 4."""

import pytest
import torch
from recurrent_cases import HIDDEN, RecurrentMixerCases, describe
from torch.testing import assert_close
from transformers import BambaConfig, GraniteMoeHybridConfig, Mamba2Config
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as NativeMamba2Mixer

from hybridlm.modeling.mixer_mamba2 import GatedRMSNorm, Mamba2Mixer


class TestMamba2(RecurrentMixerCases):
    @staticmethod
    def build(**options):
        return Mamba2Mixer(HIDDEN, **({"state_size": 4, "head_dim": 8, "chunk_size": 16, "bias": True} | options))


class TestGroupedMamba2(RecurrentMixerCases):
    @staticmethod
    def build(**options):
        grouped = {"state_size": 3, "head_dim": 4, "num_heads": 6, "num_groups": 2, "chunk_size": 7}
        rest = {"conv_bias": False, "norm_before_gate": True, "dt_limit_min": 0.01, "dt_limit_max": 0.4}
        return Mamba2Mixer(HIDDEN, **(grouped | rest | options))


class TestMamba2WithoutNorm(RecurrentMixerCases):
    @staticmethod
    def build(**options):
        return Mamba2Mixer(HIDDEN, **({"state_size": 4, "head_dim": 12, "gate_norm": False} | options))


SIZES = {"state_size": 8, "head_dim": 8, "num_heads": 8, "num_groups": 2, "chunk_size": 32}


def native_mamba2():
    config = Mamba2Config(
        hidden_size=32, state_size=8, head_dim=8, num_heads=8, n_groups=2, chunk_size=16, num_hidden_layers=1,
        use_bias=True, time_step_limit=(0.05, 0.6), layer_norm_epsilon=1e-3,
    )  # fmt: skip
    ours = Mamba2Mixer(32, **SIZES, bias=True, dt_limit_min=0.05, dt_limit_max=0.6, norm_eps=1e-3)
    return NativeMamba2Mixer(config, layer_idx=0), ours


def hybrid_options():
    return {
        "hidden_size": 32, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 2,
        "mamba_chunk_size": 16, "mamba_expand": 2, "num_hidden_layers": 1, "rms_norm_eps": 1e-3,
    }  # fmt: skip


def native_bamba():
    return BambaMixer(BambaConfig(**hybrid_options()), layer_idx=0), Mamba2Mixer(32, **SIZES, norm_eps=1e-3)


def native_granite():
    config = GraniteMoeHybridConfig(**hybrid_options(), layer_types=["mamba"])
    return GraniteMoeHybridMambaLayer(config, layer_idx=0), Mamba2Mixer(32, **SIZES, norm_eps=1e-3)


@pytest.mark.parametrize("twins", [native_mamba2, native_bamba, native_granite])
def test_the_output_equals_transformers(twins):
    native, ours = twins()
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.normal_(std=0.5)
    ours.load_state_dict(native.state_dict())
    hidden_states = torch.randn(2, 70, 32)
    with torch.no_grad():
        expected, (output, _) = native(hidden_states), ours(hidden_states)
    assert_close(output, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_the_gated_norm_equals_transformers_on_both_sides_of_the_gate(norm_before_gate):
    native = FalconH1RMSNormGated(24, eps=1e-3, n_groups=3, norm_before_gate=norm_before_gate)
    ours = GatedRMSNorm(24, eps=1e-3, num_groups=3, norm_before_gate=norm_before_gate)
    torch.nn.init.normal_(native.weight)
    ours.load_state_dict(native.state_dict())
    hidden_states, gate = torch.randn(2, 2, 5, 24)
    assert_close(ours(hidden_states, torch.nn.functional.silu(gate)), native(hidden_states, gate))


@pytest.mark.parametrize("chunk_size", [1, 5, 45, 64])
def test_the_chunk_size_changes_nothing(chunk_size):
    mixer = TestGroupedMamba2.build().double()
    hidden_states = torch.randn(2, 45, HIDDEN, dtype=torch.float64)
    sequence = describe([45, 30], [[1, 28], [7]])
    expected, last = mixer(hidden_states, None, sequence)
    mixer.chunk_size = chunk_size
    output, state = mixer(hidden_states, None, sequence)
    assert_close(output[sequence.token_mask], expected[sequence.token_mask])
    assert_close(state.recurrent_states, last.recurrent_states)


def test_scan_and_step_clamp_step_sizes_alike():
    mixer = TestGroupedMamba2.build(dt_limit_min=0.2, dt_limit_max=0.3).double()
    torch.nn.init.normal_(mixer.in_proj.weight)
    hidden_states = torch.randn(1, 6, HIDDEN, dtype=torch.float64)
    expected, _ = mixer(hidden_states)
    state, outputs = None, []
    for token in hidden_states.split(1, dim=1):
        output, state = mixer(token, state)
        outputs.append(output)
    assert_close(torch.cat(outputs, dim=1), expected)
    mixer.dt_limits = (0.0, None)
    assert (mixer(hidden_states)[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, "head_dim=7 must divide"),
        ({"head_dim": 8, "num_groups": 2}, "num_groups=2 must divide num_heads=3"),
        ({"head_dim": 8, "chunk_size": 0}, "chunk_size=0"),
        ({"head_dim": 8, "activation": "sillu"}, "activation='sillu'"),
        ({"head_dim": 8, "dt_limit_min": 1.0, "dt_limit_max": 0.5}, "dt_limit_min=1.0"),
        ({"head_dim": 8, "a_min": 0.0}, "a_min=0.0"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Mamba2Mixer(HIDDEN, **options)
