"""Manifold hyper-connections equal DeepSeek-V4's in transformers, sub-layer and head, with random weights."""

from types import SimpleNamespace

import pytest
import torch

from hybridlm.modeling.residual_manifold_hyper_connections import ManifoldHead, ManifoldHyperConnectionsResidual

native = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4", exc_type=ImportError)
HIDDEN = 24


def names(num_streams, iterations):
    return SimpleNamespace(
        hidden_size=HIDDEN, hc_mult=num_streams, hc_sinkhorn_iters=iterations, hc_eps=1e-4, rms_norm_eps=1e-5
    )


def share_weights(ours, theirs, prefix=""):
    """Draw weights with which every gate varies, and give them to both."""
    with torch.no_grad():
        for mine, other in (("mix_weight", "fn"), ("mix_base", "base"), ("mix_scale", "scale")):
            value = torch.randn_like(getattr(ours, mine))
            getattr(ours, mine).copy_(value)
            getattr(theirs, prefix + other).copy_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_streams", "iterations"), [(4, 20), (4, 1), (3, 2), (2, 20)])
def test_a_sub_layer_reads_and_writes_as_the_decoder_layer_does(num_streams, iterations, dtype):
    torch.manual_seed(0)
    ours = ManifoldHyperConnectionsResidual(
        HIDDEN, num_streams=num_streams, sinkhorn_iterations=iterations, eps=1e-4, norm_eps=1e-5
    )
    theirs = native.DeepseekV4HyperConnection(names(num_streams, iterations))
    share_weights(ours, theirs)
    ours = ours.to(dtype)
    stream, update = torch.randn(2, 5, num_streams, HIDDEN).to(dtype), torch.randn(2, 5, HIDDEN).to(dtype)
    post, comb, collapsed = theirs(stream)
    # the body of DeepseekV4DecoderLayer.forward
    expected = post.to(dtype).unsqueeze(-1) * update.unsqueeze(-2)
    expected = expected + torch.matmul(comb.to(dtype).transpose(-1, -2), stream)
    inner, context = ours(stream)
    torch.testing.assert_close(context.mix, comb)
    torch.testing.assert_close(inner, collapsed)
    torch.testing.assert_close(ours.write(stream, update, context), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_collapses_as_the_native_one_does(dtype):
    torch.manual_seed(0)
    ours = ManifoldHead(HIDDEN, num_streams=4, eps=1e-4, norm_eps=1e-5)
    theirs = native.DeepseekV4HyperHead(names(4, 20))
    share_weights(ours, theirs, prefix="hc_")
    stream = torch.randn(2, 5, 4, HIDDEN).to(dtype)
    torch.testing.assert_close(ours.to(dtype).collapse(stream), theirs(stream))
