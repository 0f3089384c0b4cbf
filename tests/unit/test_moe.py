"""Mixture of experts: routing, the implementations, and the native blocks it stands for."""

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, GraniteMoeHybridConfig, JambaConfig, MixtralConfig, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMLP, GraniteMoeHybridMoE
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from hybridlm.modeling.channel_moe import MoE
from hybridlm.modeling.channel_swiglu import SwiGLU
from hybridlm.modeling.router import Router

SIZE, WIDTH, EXPERTS = 16, 24, 8
VARIANTS = {
    "mixtral": {},
    "jamba": {"renormalize": False},
    "top_1": {"top_k": 1},
    "all_experts": {"top_k": EXPERTS},
    "qwen2": {"num_shared_experts": 1, "shared_intermediate_size": 20, "shared_gate": True},
    "deepseek": {
        "scores": "sigmoid",
        "selection_bias": True,
        "num_groups": 4,
        "top_k_groups": 2,
        "top_k": 3,
        "scaling_factor": 2.5,
        "num_shared_experts": 2,
    },
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def spread(module):
    """Draw every parameter and bias wide, so that experts differ and choices are clear."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    for name, buffer in module.named_buffers():
        if "bias" in name:
            nn.init.normal_(buffer, std=0.4)
    return module


def build(**options):
    return spread(MoE(SIZE, **{"num_experts": EXPERTS, "intermediate_size": WIDTH} | options))


@pytest.fixture(params=VARIANTS, ids=str)
def moe(request):
    return build(**VARIANTS[request.param])


def test_the_loop_is_the_reference_in_float64(moe):
    moe = moe.double()
    hidden_states = torch.randn(3, 7, SIZE, dtype=torch.float64)
    expected = moe.forward_reference(hidden_states)[0]
    torch.testing.assert_close(moe(hidden_states)[0], expected, rtol=1e-12, atol=1e-12)
    one_by_one = torch.cat([moe(token)[0] for row in hidden_states.split(1) for token in row.split(1, 1)], 1)
    torch.testing.assert_close(one_by_one.view_as(expected), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 9), (1, 1)])
def test_grouped_is_the_loop_forward_and_backward(moe, shape):
    hidden_states = torch.randn(*shape, SIZE)
    results = []
    for implementation in ("grouped", "loop"):
        moe.experts.implementation = implementation
        leaf = hidden_states.clone().requires_grad_()
        output = moe(leaf)[0]
        results.append([output, *torch.autograd.grad((output * output.detach()).sum(), [leaf, *moe.parameters()])])
    for grouped, loop in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_loop_are_right():
    moe = spread(MoE(4, num_experts=3, top_k=2, intermediate_size=2, renormalize=True)).double()
    hidden_states = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: moe(hidden_states)[0], (hidden_states, *moe.parameters()))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 9)])
def test_a_compiled_graph_gives_the_same(moe, shape):
    torch._dynamo.reset()
    hidden_states = torch.randn(*shape, SIZE)
    compiled = torch.compile(moe, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden_states)[0], moe(hidden_states)[0], rtol=1e-5, atol=1e-5)


def test_identical_experts_with_renormalised_gates_are_one_dense_network():
    moe, dense = build(top_k=3).double(), SwiGLU(SIZE, intermediate_size=WIDTH).double()
    moe.experts.gate_up_proj.data[:] = torch.cat([dense.gate_proj.weight, dense.up_proj.weight]).detach()
    moe.experts.down_proj.data[:] = dense.down_proj.weight.detach()
    hidden_states = torch.randn(2, 5, SIZE, dtype=torch.float64)
    torch.testing.assert_close(moe(hidden_states)[0], dense(hidden_states)[0], rtol=1e-12, atol=1e-12)


def test_all_experts_at_once_are_a_softmax_over_them():
    moe = build(top_k=EXPERTS).double()
    hidden_states = torch.randn(1, 5, SIZE, dtype=torch.float64)
    shares = (hidden_states @ moe.router.weight.T).softmax(-1)  # [1, 5, E]
    gate, up = torch.einsum("btd,eid->btei", hidden_states, moe.experts.gate_up_proj).chunk(2, -1)
    each = torch.einsum("btei,edi->bted", nn.functional.silu(gate) * up, moe.experts.down_proj)
    torch.testing.assert_close(moe(hidden_states)[0], (shares[..., None] * each).sum(2), rtol=1e-12, atol=1e-12)


def test_permuting_the_tokens_permutes_the_output(moe):
    moe, order = moe.double(), torch.randperm(9)
    hidden_states = torch.randn(1, 9, SIZE, dtype=torch.float64)
    torch.testing.assert_close(moe(hidden_states[:, order])[0], moe(hidden_states)[0][:, order], rtol=1e-12, atol=1e-12)


def test_other_tokens_whatever_they_hold_change_nothing(moe):
    hidden_states = torch.randn(2, 6, SIZE)
    edited = hidden_states.clone()
    edited[:, 4:] = 1e3
    torch.testing.assert_close(moe(edited)[0][:, :4], moe(hidden_states)[0][:, :4])


def test_the_selection_bias_moves_the_choice_and_never_a_gate():
    router = spread(Router(SIZE, num_experts=EXPERTS, scores="sigmoid", renormalize=False, selection_bias=True))
    router.selection_bias.zero_()
    hidden_states = torch.randn(50, SIZE)
    before = router(hidden_states)
    router.selection_bias[3] = 10.0
    logits, weights, indices = router(hidden_states)
    assert (indices == 3).any(-1).all()
    assert not (before[2] == 3).any(-1).all()
    torch.testing.assert_close(weights, logits.sigmoid().gather(-1, indices))


def test_experts_come_from_the_best_groups_only():
    router = spread(Router(SIZE, num_experts=8, top_k=3, num_groups=4, top_k_groups=2))
    logits, _, indices = router(torch.randn(200, SIZE))
    groups = indices // 2
    best = logits.softmax(-1).unflatten(-1, (4, 2)).sum(-1).topk(2).indices
    assert (groups[..., None] == best[..., None, :]).any(-1).all()
    assert not torch.equal(indices.sort(-1).values, logits.topk(3).indices.sort(-1).values)


@pytest.mark.parametrize("implementation", ["grouped", "loop"])
@pytest.mark.parametrize("num_tokens", [0, 1, 4])
def test_experts_without_tokens_get_a_zero_gradient(implementation, num_tokens):
    moe = build(top_k=1, implementation=implementation)
    moe.router.weight.data.zero_()
    moe.router.weight.data[5] = 1.0
    moe(torch.rand(1, num_tokens, SIZE))[0].sum().backward()
    for parameter in moe.parameters():
        assert parameter.grad is not None
    used = moe.experts.down_proj.grad.flatten(1).abs().sum(-1) > 0
    assert used.tolist() == [expert == 5 and num_tokens > 0 for expert in range(EXPERTS)]


def test_the_selection_bias_stays_float32_and_is_saved():
    moe = build(selection_bias=True)
    bias = moe.router.selection_bias.clone()
    moe.bfloat16()
    assert torch.equal(moe.router.selection_bias, bias)
    assert moe.router.weight.dtype == torch.bfloat16
    assert "router.selection_bias" in moe.state_dict()


def test_logits_and_gates_are_float32_in_a_bfloat16_model_and_under_autocast():
    moe, hidden_states = build().bfloat16(), torch.randn(1, 4, SIZE, dtype=torch.bfloat16)
    expected = hidden_states.float() @ moe.router.weight.float().T
    torch.testing.assert_close(moe.router(hidden_states)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(moe.float().router(hidden_states.float())[0], expected)
        assert moe(hidden_states.float())[0].isfinite().all()


def test_router_keeps_the_leading_dimensions():
    logits, weights, indices = Router(SIZE, num_experts=EXPERTS, top_k=2)(torch.randn(2, 3, SIZE))
    assert (logits.shape, weights.shape, indices.shape) == ((2, 3, EXPERTS), (2, 3, 2), (2, 3, 2))


def test_selecting_again_from_the_logits_gives_the_choice(moe):
    logits, _, indices = moe.router(torch.randn(100, SIZE))
    assert torch.equal(moe.router.select(moe.router.scores(logits)), indices)


def test_init_weights_after_an_empty_load_sets_everything():
    with torch.device("meta"):
        moe = MoE(SIZE, num_experts=EXPERTS, intermediate_size=WIDTH, selection_bias=True)
    moe = moe.to_empty(device="cpu")
    for tensor in moe.state_dict().values():
        tensor.fill_(float("nan"))
    moe.init_weights(0.02)
    assert torch.equal(moe.router.selection_bias, torch.zeros(EXPERTS))
    assert torch.equal(moe.router.tokens_per_expert, torch.zeros(EXPERTS, dtype=torch.long))
    assert 0.015 < moe.experts.gate_up_proj.std() < 0.025
    assert moe.router.weight.isfinite().all()


def copy_experts(moe, router_weight, experts):
    moe.router.weight.data.copy_(router_weight)
    moe.experts.load_state_dict(experts.state_dict())


def assert_same_block(moe, native):
    hidden_states = torch.randn(2, 9, SIZE)
    torch.testing.assert_close(moe(hidden_states)[0], native(hidden_states), rtol=1e-5, atol=1e-6)
    moe, native, hidden_states = moe.double(), native.double(), hidden_states.double()
    # the native routers round to float32 on the way
    torch.testing.assert_close(moe(hidden_states)[0], native(hidden_states), rtol=1e-5, atol=1e-6)


SIZES = {"hidden_size": SIZE, "experts_implementation": "eager"}


def test_parity_with_mixtral():
    config = MixtralConfig(**SIZES, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=2)
    native = spread(MixtralSparseMoeBlock(config)).eval()
    moe = build()
    copy_experts(moe, native.gate.weight, native.experts)
    assert_same_block(moe, native)


def test_parity_with_jamba():
    config = JambaConfig(**SIZES, intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=2)
    native = spread(JambaSparseMoeBlock(config)).eval()
    moe = build(renormalize=False)
    copy_experts(moe, native.router.weight, native.experts)
    assert_same_block(moe, native)


def test_parity_with_granite():
    config = GraniteMoeHybridConfig(
        **SIZES,
        mamba_n_heads=4,
        intermediate_size=WIDTH,
        shared_intermediate_size=20,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    experts, shared = spread(GraniteMoeHybridMoE(config)), spread(GraniteMoeHybridMLP(config))
    moe = build(num_shared_experts=1, shared_intermediate_size=20)
    copy_experts(moe, experts.router.weight, experts.experts)
    gate, up = shared.input_linear.weight.chunk(2)
    moe.shared_expert.gate_proj.weight.data.copy_(gate)
    moe.shared_expert.up_proj.weight.data.copy_(up)
    moe.shared_expert.down_proj.weight.data.copy_(shared.output_linear.weight)
    hidden_states = torch.randn(2, 9, SIZE)
    expected = experts(hidden_states) + shared(hidden_states)
    torch.testing.assert_close(moe(hidden_states)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("renormalize", [False, True])
def test_parity_with_qwen2(renormalize):
    config = Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=20,
        num_experts=EXPERTS,
        num_experts_per_tok=3,
        norm_topk_prob=renormalize,
    )
    native = spread(Qwen2MoeSparseMoeBlock(config)).eval()
    moe = build(top_k=3, renormalize=renormalize, num_shared_experts=1, shared_intermediate_size=20, shared_gate=True)
    copy_experts(moe, native.gate.weight, native.experts)
    moe.shared_expert.load_state_dict(native.shared_expert.state_dict())
    moe.shared_expert_gate.load_state_dict(native.shared_expert_gate.state_dict())
    assert_same_block(moe, native)


@pytest.mark.parametrize("renormalize", [False, True])
def test_parity_with_deepseek_v3(renormalize):
    config = DeepseekV3Config(
        **SIZES,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
    )
    native = spread(DeepseekV3MoE(config)).eval()
    moe = build(**VARIANTS["deepseek"] | {"renormalize": renormalize})
    copy_experts(moe, native.gate.weight, native.experts)
    moe.router.selection_bias.copy_(native.gate.e_score_correction_bias)
    moe.shared_expert.load_state_dict(native.shared_experts.state_dict())
    assert_same_block(moe, native)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, r"^top_k=9 must be between 1 and num_experts=8"),
        ({"top_k": 0}, r"^top_k=0 must be between 1 and num_experts=8"),
        ({"num_experts": 0}, r"^num_experts=0 must be at least 1"),
        ({"num_groups": 3}, r"^num_groups=3 must divide num_experts=8"),
        ({"num_groups": 4, "top_k_groups": 5}, r"^top_k_groups=5 must be between 1 and num_groups=4"),
        ({"num_groups": 4, "top_k": 3}, r"^top_k=3 is more than the 2 experts in each of top_k_groups=1 groups"),
        ({"scores": "tanh"}, r"^scores: unknown 'tanh', expected one of \['softmax', 'sigmoid'\]"),
        ({"implementation": "fast"}, r"^implementation: unknown 'fast', expected one of \['auto', 'grouped', 'loop'\]"),
        ({"loss_scope": "layer"}, r"^loss_scope: unknown 'layer', expected one of \['document', 'batch'\]"),
        ({"num_shared_experts": -1}, r"^num_shared_experts=-1 must not be negative"),
        ({"shared_gate": True}, r"^shared_gate=True needs num_shared_experts of at least 1"),
        ({"num_shared_experts": 1, "shared_intermediate_size": 0}, r"^shared_intermediate_size=0 must be at least 1"),
        ({"load_balancing_coef": -1.0}, r"^load_balancing_coef=-1.0 must not be negative"),
        ({"z_loss_coef": -1.0}, r"^z_loss_coef=-1.0 must not be negative"),
        ({"bias_update_rate": -1.0}, r"^bias_update_rate=-1.0 must not be negative"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(SIZE, **{"num_experts": EXPERTS} | options)


def test_grouped_refuses_what_it_cannot_do():
    hidden_states = torch.randn(1, 3, SIZE, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^implementation='grouped' does not work in torch.float64"):
        build(implementation="grouped").double()(hidden_states)
    with pytest.raises(ValueError, match=r"^implementation='grouped' needs hidden and intermediate sizes"):
        build(implementation="grouped", intermediate_size=7)(hidden_states.float())
