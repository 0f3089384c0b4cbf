"""Our experts are transformers' blocks: Switch's router, LongCat-Flash's copies, DeepSeek-V3's groups and bias."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import DeepseekV3Config, LongcatFlashConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
    load_balancing_loss_func,
    router_z_loss_func,
)

from hybridlm.modeling.channel_moe import MoE
from hybridlm.modeling.losses import load_balancing_loss, router_z_loss

SIZE, WIDTH, EXPERTS = 16, 24, 8
old = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="earlier its Switch never drops a token"
)


def spread(module):
    """Draw every parameter and bias wide, so that experts differ and choices are clear."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    for name, buffer in module.named_buffers():
        if "bias" in name:
            nn.init.normal_(buffer, std=0.1)
    return module


def switch_config(capacity):
    return SwitchTransformersConfig(
        d_model=SIZE, d_ff=WIDTH, num_experts=EXPERTS, expert_capacity=capacity, router_jitter_noise=0.0
    )


@old
@pytest.mark.parametrize("capacity", [1, 3, 24])
def test_the_router_of_switch_transformers(capacity):
    tokens = 24
    native = spread(SwitchTransformersTop1Router(switch_config(capacity)))
    moe = MoE(SIZE, num_experts=EXPERTS, routing="switch", capacity_factor=capacity * EXPERTS / tokens).train()
    moe.router.weight.data.copy_(native.classifier.weight)
    hidden_states = torch.randn(1, tokens, SIZE)
    chosen, gates, expected_logits = native(hidden_states)
    logits, weights, indices = moe.router(hidden_states)
    torch.testing.assert_close(logits, expected_logits)
    kept = chosen.sum(-1) > 0
    assert kept.sum() < tokens or capacity == tokens
    assert torch.equal(kept, indices[..., 0] < EXPERTS)
    assert torch.equal(chosen.argmax(-1)[kept], indices[..., 0][kept])
    torch.testing.assert_close(weights[..., 0][kept], gates[..., 0][kept])


def test_the_losses_of_switch_transformers():
    logits = torch.randn(1, 20, EXPERTS)
    expected = load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    torch.testing.assert_close(load_balancing_loss(logits, 1), expected)
    torch.testing.assert_close(router_z_loss(logits), router_z_loss_func(logits))


@old
def test_the_block_of_switch_transformers():
    """Its experts have no gate projection, so they are its own; which of them a token gets, and its gate, are ours."""
    native = spread(SwitchTransformersSparseMLP(switch_config(3))).eval()  # it drops in evaluation too
    moe = MoE(SIZE, num_experts=EXPERTS, routing="switch", capacity_factor=1.0, intermediate_size=WIDTH).train()
    moe.router.weight.data.copy_(native.router.classifier.weight)
    hidden_states = torch.randn(1, 24, SIZE)
    _, weights, indices = moe.router(hidden_states)
    experts = [native.experts[f"expert_{i}"] for i in range(EXPERTS)]
    ours = torch.zeros_like(hidden_states)
    for token in range(24):
        if (expert := int(indices[0, token, 0])) < EXPERTS:
            ours[0, token] = weights[0, token, 0] * experts[expert](hidden_states[0, token])
    torch.testing.assert_close(ours, native(hidden_states), rtol=1e-5, atol=1e-5)


def test_the_copy_experts_of_longcat_flash():
    config = LongcatFlashConfig(
        hidden_size=SIZE,
        expert_ffn_hidden_size=WIDTH,
        n_routed_experts=EXPERTS,
        zero_expert_num=4,
        moe_topk=4,
        routed_scaling_factor=6.0,
        num_layers=1,
    )
    config._experts_implementation = "eager"
    native = spread(LongcatFlashMoE(config)).eval()
    moe = MoE(
        SIZE,
        num_experts=EXPERTS,
        num_copy_experts=4,
        top_k=4,
        intermediate_size=WIDTH,
        renormalize=False,
        scaling_factor=6.0,
        selection_bias=True,
    )
    moe.router.weight.data.copy_(native.router.classifier.weight)
    moe.router.selection_bias.copy_(native.router.e_score_correction_bias)
    moe.experts.gate_up_proj.data.copy_(native.experts.gate_up_proj[:EXPERTS])
    moe.experts.down_proj.data.copy_(native.experts.down_proj)
    hidden_states = torch.randn(2, 9, SIZE)
    assert (moe.router(hidden_states)[2] >= EXPERTS).any()
    torch.testing.assert_close(moe(hidden_states)[0], native(hidden_states), rtol=1e-5, atol=1e-5)


def test_the_bias_of_deepseek_v3_moves_the_choice_inside_the_best_groups_and_no_gate():
    config = DeepseekV3Config(
        hidden_size=SIZE,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    config._experts_implementation = "eager"
    native = spread(DeepseekV3MoE(config)).eval()
    moe = MoE(
        SIZE,
        num_experts=EXPERTS,
        intermediate_size=WIDTH,
        scores="sigmoid",
        selection_bias=True,
        num_groups=4,
        top_k_groups=2,
        scaling_factor=2.5,
        num_shared_experts=1,
    )
    moe.router.weight.data.copy_(native.gate.weight)
    moe.experts.load_state_dict(native.experts.state_dict())
    moe.shared_expert.load_state_dict(native.shared_experts.state_dict())
    hidden_states, chosen = torch.randn(2, 30, SIZE), []
    for step in range(5):
        bias = 0.3 * step * torch.randn(EXPERTS)
        moe.router.selection_bias.copy_(bias)
        native.gate.e_score_correction_bias.copy_(bias)
        torch.testing.assert_close(moe(hidden_states)[0], native(hidden_states), rtol=1e-5, atol=1e-5)
        logits, weights, indices = moe.router(hidden_states)
        gates = logits.sigmoid().gather(-1, indices)
        torch.testing.assert_close(weights, 2.5 * gates / gates.sum(-1, keepdim=True))
        chosen.append(indices.sort(-1).values)
    assert any(not torch.equal(chosen[0], other) for other in chosen[1:])
