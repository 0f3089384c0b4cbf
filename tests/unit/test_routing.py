"""Where tokens go: choices without weights, capacity, expert choice and hash layers."""

import itertools

import pytest
import torch
from test_moe import EXPERTS, SIZE, WIDTH, build, seed  # noqa: F401
from torch.utils.checkpoint import checkpoint

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.modeling.dispatch import capacity_of, hashed_experts, tokens_of_experts, within_capacity
from hybridlm.modeling.losses import count_expert_load, load_balancing_loss, router_losses, update_selection_bias
from hybridlm.modeling.masks import SequenceInfo

DROPPED = EXPERTS  # the choice that is none
HASHED = [[5, 6], [2, 3], [4, 2], [4, 0], [5, 3], [4, 2]]
ROUTINGS = {
    "switch": {"routing": "switch"},
    "switch_tight": {"routing": "switch", "capacity_factor": 0.3},
    "gshard": {"routing": "gshard", "second_expert": "always", "capacity_factor": 0.5},
    "gshard_random": {"routing": "gshard"},
    "expert_choice": {"routing": "expert_choice"},
    "hash": {"routing": "hash"},
}
CHOICES = {
    "zero": {"num_zero_experts": 3},
    "copy": {"num_copy_experts": 3, "renormalize": False},
    "both": {"num_zero_experts": 2, "num_copy_experts": 2, "top_k": 4, "scores": "sigmoid", "selection_bias": True},
    "one_expert": {"num_zero_experts": 5, "num_copy_experts": 2, "top_k": 2},
}


def call(batch, tokens, mask=None, ids=None, use_cache=False):
    """What a part gets as `sequence`."""
    index = torch.arange(tokens)[None]
    ids = torch.randint(0, 50, (batch, tokens)) if ids is None else ids
    return SequenceInfo(tokens, index, index, token_mask=mask, token_ids=ids, use_cache=use_cache)


def prefix_mask(*lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


# --- every routing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*ROUTINGS.values(), *CHOICES.values()], ids=[*ROUTINGS, *CHOICES])
@pytest.mark.parametrize("training", [True, False])
def test_forward_is_the_reference_in_float64(options, training):
    moe, sequence = build(**options).double().train(training), call(3, 7, prefix_mask(7, 4, 5, width=7))
    hidden_states = torch.randn(3, 7, SIZE, dtype=torch.float64)
    results = []
    for forward in (moe.forward_reference, moe.forward):
        torch.manual_seed(1)
        results.append(forward(hidden_states, None, sequence)[0])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [*ROUTINGS.values(), *CHOICES.values()], ids=[*ROUTINGS, *CHOICES])
@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (1, 0)])
def test_grouped_is_the_loop_forward_and_backward(options, shape):
    moe, sequence, results = build(**options).train(), call(*shape), []
    hidden_states = torch.randn(*shape, SIZE)
    for implementation in ("grouped", "loop"):
        torch.manual_seed(1)
        moe.experts.implementation = implementation
        leaf = hidden_states.clone().requires_grad_()
        output = moe(leaf, None, sequence)[0]
        results.append([output, *torch.autograd.grad((output * output.detach()).sum(), [leaf, *moe.parameters()])])
    for grouped, loop in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [*ROUTINGS.values(), *CHOICES.values()], ids=[*ROUTINGS, *CHOICES])
@pytest.mark.parametrize("shape", [(2, 9), (1, 1)])
def test_the_graph_is_the_eager_forward(options, shape, monkeypatch):
    moe, sequence = build(**options).double().train(), call(*shape)
    hidden_states = torch.randn(*shape, SIZE, dtype=torch.float64)
    torch.manual_seed(1)
    expected = moe(hidden_states, None, sequence)[0]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the branches that a graph takes
    torch.manual_seed(1)
    torch.testing.assert_close(moe(hidden_states, None, sequence)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [ROUTINGS["hash"], *CHOICES.values()], ids=["hash", *CHOICES])
def test_permuting_the_tokens_permutes_the_output(options):
    moe, order, ids = build(**options).double(), torch.randperm(9), torch.randint(0, 50, (1, 9))
    hidden_states = torch.randn(1, 9, SIZE, dtype=torch.float64)
    moved = moe(hidden_states[:, order], None, call(1, 9, ids=ids[:, order]))[0]
    torch.testing.assert_close(
        moved, moe(hidden_states, None, call(1, 9, ids=ids))[0][:, order], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", ["switch_tight", "gshard", "gshard_random"])
def test_evaluation_and_a_cache_drop_no_token(name):
    moe = build(**ROUTINGS[name])
    k = moe.top_k
    free = build(top_k=k, renormalize=moe.renormalize)
    free.load_state_dict(moe.state_dict())
    hidden_states = torch.randn(2, 9, SIZE)
    expected = free(hidden_states)[0]
    torch.testing.assert_close(moe.eval()(hidden_states, None, call(2, 9))[0], expected)
    torch.testing.assert_close(moe.train()(hidden_states, None, call(2, 9, use_cache=True))[0], expected)
    assert not torch.allclose(moe(hidden_states, None, call(2, 9))[0], expected)


@pytest.mark.parametrize("name", ["switch", "gshard"])
def test_room_for_every_token_is_the_dropless_layer(name):
    options = ROUTINGS[name] | {"capacity_factor": float(EXPERTS)}
    moe, hidden_states = build(**options), torch.randn(2, 9, SIZE)
    torch.testing.assert_close(moe.train()(hidden_states)[0], moe.eval()(hidden_states)[0])


@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
def test_pads_take_no_place_and_change_nothing(options):
    moe = build(**options).double().train()
    hidden_states, ids = torch.randn(2, 9, SIZE, dtype=torch.float64), torch.randint(0, 50, (2, 9))
    mask = prefix_mask(9, 4, width=9)
    results = []
    for fill in (0.0, 7.0):
        filled = hidden_states.where(mask[..., None], fill)
        torch.manual_seed(1)
        results.append(moe(filled, None, call(2, 9, mask, ids))[0])
        assert results[-1].isfinite().all()
    torch.testing.assert_close(results[0][mask], results[1][mask], rtol=0, atol=0)
    if options != ROUTINGS["gshard_random"]:  # random draws are made for pads too
        row = torch.cat([hidden_states[0], hidden_states[1, :4]])[None]
        alone = moe(row, None, call(1, 13, ids=torch.cat([ids[0], ids[1, :4]])[None]))[0][0]
        torch.testing.assert_close(results[0][mask], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
def test_checkpointing_changes_nothing(options):
    moe, sequence = build(**options, jitter=0.1).train(), call(2, 9)
    hidden_states = torch.randn(2, 9, SIZE, requires_grad=True)
    results = []
    for run in (
        lambda x: moe(x, None, sequence)[0],
        lambda x: checkpoint(moe, x, None, sequence, use_reentrant=False)[0],
    ):
        torch.manual_seed(1)
        output = run(hidden_states)
        results.append([output, *torch.autograd.grad(output.square().sum(), [hidden_states, moe.experts.down_proj])])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


@pytest.mark.parametrize("options", [*ROUTINGS.values(), *CHOICES.values()], ids=[*ROUTINGS, *CHOICES])
def test_every_routing_learns(options):
    moe = {"name": "moe", "num_experts": 4, "intermediate_size": 16, "jitter": 0.01} | options
    specs = {"a": {"mixer": {"name": "mamba2", "state_size": 4, "head_dim": 8}, "channel_mixer": moe}}
    config = HybridLMConfig(layer_specs=specs, num_hidden_layers=2, hidden_size=32, vocab_size=20, use_cache=False)
    model = HybridLMForCausalLM(config).train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    before = [moe.router.weight.clone() for moe in model.model.moe_layers]
    for step in range(30):
        ids = (torch.arange(16) * torch.tensor([[1], [3], [7], [9]]) + step % 5) % 20
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        update_selection_bias(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for moe, weight in zip(model.model.moe_layers, before, strict=True):
        assert not torch.equal(moe.router.weight, weight)  # the router learns too
        assert moe.router.load_record[0].sum() > 0


@pytest.mark.parametrize("options", [{}, *ROUTINGS.values(), *CHOICES.values()], ids=["top_k", *ROUTINGS, *CHOICES])
def test_experts_inside_a_span_see_the_tokens_that_entered_it(options):
    options = options | ({} if options.get("routing") in ("expert_choice", "hash") else {"load_balancing_coef": 0.1})
    span = {"name": "mixture_of_depths", "start": 1, "capacity": 0.5}
    model = small_model(layers=3, spans=[span], **options).train()
    ids, mask = torch.randint(0, 20, (2, 12)), prefix_mask(12, 8, width=12).long()
    outputs = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    taken = outputs.span_taken[0] & mask.bool()
    for depth, moe in enumerate(model.model.moe_layers):
        reached = int((taken if depth == 1 else mask).sum())
        if options.get("routing") != "expert_choice":
            assert moe.router.tokens_per_expert.sum() == moe.top_k * reached
        else:  # every expert takes as many
            assert moe.router.tokens_per_expert.unique().numel() == 1
        assert moe.router.load_counts().view(2, -1)[1].sum() == pytest.approx(reached, rel=1e-5)


# --- choices without weights ------------------------------------------------------------------------------------------


def test_a_zero_expert_gives_nothing_and_a_copy_expert_the_token():
    moe = build(top_k=2, num_zero_experts=1, num_copy_experts=1, scaling_factor=2.0)
    moe.router.weight.data.zero_()
    hidden_states = torch.rand(1, 5, SIZE)
    moe.router.weight.data[EXPERTS:] = 1.0
    torch.testing.assert_close(moe(hidden_states)[0], hidden_states)  # 2 * (0 / 2 + token / 2)
    moe.router.weight.data[EXPERTS + 1] = -1.0
    moe.router.weight.data[3] = 0.5
    _, weights, indices = moe.router(hidden_states)
    assert (indices.sort(-1).values == torch.tensor([3, EXPERTS])).all()
    gate, up = (hidden_states @ moe.experts.gate_up_proj[3].T).chunk(2, -1)
    expert = (torch.nn.functional.silu(gate) * up) @ moe.experts.down_proj[3].T
    torch.testing.assert_close(moe(hidden_states)[0], expert * weights[indices == 3].view(1, 5, 1))


def test_tokens_go_through_zero_to_k_experts():
    moe = build(top_k=3, num_zero_experts=4)
    _, _, indices = moe.router(torch.randn(200, SIZE))
    assert (indices < EXPERTS).sum(-1).unique().tolist() == [0, 1, 2, 3]


def test_only_zero_experts_leave_every_gradient_at_zero():
    moe = build(top_k=1, num_zero_experts=1, renormalize=False)
    moe.router.weight.data.zero_()
    moe.router.weight.data[-1] = 1.0
    for implementation, tokens in itertools.product(("grouped", "loop"), (1, 4)):
        moe.experts.implementation = implementation
        moe(torch.rand(1, tokens, SIZE))[0].sum().backward()
        for parameter in moe.experts.parameters():
            assert not parameter.grad.any()


# --- capacity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "top_k", "experts", "tokens", "places"),
    [(1.25, 1, 8, 64, 10), (1.25, 1, 8, 65, 11), (1.0, 2, 4, 10, 5), (1.1, 1, 1, 10, 11), (0.1, 1, 8, 0, 0)],
)
def test_capacity_is_rounded_up_exactly(factor, top_k, experts, tokens, places):
    assert capacity_of(factor, top_k, experts, tokens) == places
    assert capacity_of(factor, top_k, experts, torch.tensor(tokens)) == places


def test_first_choices_come_before_second_ones_and_early_tokens_before_late_ones():
    indices = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 2]])
    kept = within_capacity(indices, torch.ones(4, 2, dtype=torch.bool), 3, 2)
    assert kept.tolist() == [[True, True], [True, False], [True, False], [False, True]]
    wanted = torch.tensor([[False, True]] + [[True, True]] * 3)
    kept = within_capacity(indices, wanted, 3, 2)
    assert kept.tolist() == [[False, True], [True, False], [True, False], [True, True]]


def test_a_token_without_a_place_keeps_its_residual_alone():
    moe = build(**ROUTINGS["switch"], num_experts=4).train()
    moe.router.weight.data.zero_()
    moe.router.weight.data[2] = 1.0
    hidden_states = torch.rand(1, 16, SIZE)
    output = moe(hidden_states)[0][0]
    assert (output[:5].abs().sum(-1) > 0).all()  # 1.25 * 16 / 4
    assert not output[5:].any()


def test_gshard_drops_second_experts_at_random_by_their_gate():
    moe = build(**ROUTINGS["gshard_random"], capacity_factor=float(EXPERTS)).train()
    hidden_states = torch.randn(1, 1, SIZE).expand(1, 4000, SIZE)
    _, weights, indices = moe.router(hidden_states)
    first, second = moe.eval().router(hidden_states[:, :1])[1][0, 0].tolist()
    assert (indices[..., 0] != DROPPED).all()
    kept = indices[..., 1] != DROPPED
    assert float(kept.double().mean()) == pytest.approx(min(2 * second, 1.0), abs=0.03)
    torch.testing.assert_close(weights[kept][:, 1], torch.full((int(kept.sum()),), second))
    assert first + second == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["switch", "gshard"])
def test_a_limited_layer_warns_once_that_logits_depend_on_the_batch(name, monkeypatch):
    said = []
    monkeypatch.setattr("hybridlm.modeling.router.logger.warning_once", said.append)
    moe, hidden_states = build(**ROUTINGS[name]), torch.randn(1, 3, SIZE)
    moe.eval()(hidden_states)
    assert not said
    moe.train()(hidden_states)
    assert "the logits of a token depend on the rest of the batch" in said[0]


def test_the_load_counts_wishes_whether_or_not_there_was_a_place():
    moe = build(**ROUTINGS["switch_tight"]).train()
    hidden_states, mask = torch.randn(2, 9, SIZE), prefix_mask(9, 4, width=9)
    logits = moe.router(hidden_states, call(2, 9, mask))[0]
    count_expert_load([moe], [logits], mask)
    assert moe.router.tokens_per_expert.sum() == 13
    assert torch.equal(moe.router.tokens_per_expert, torch.bincount(logits[mask].argmax(-1), minlength=EXPERTS))


def test_the_balance_of_gshard_counts_first_choices():
    moe, logits = build(**ROUTINGS["gshard"]), torch.randn(2, 9, EXPERTS)
    expected = 0.01 * load_balancing_loss(logits, 1)
    torch.testing.assert_close(router_losses([moe], [logits])["load_balancing"], expected)


def test_jitter_is_small_and_for_training_only():
    moe, hidden_states = build(**ROUTINGS["switch"], jitter=0.01), torch.randn(1, 5, SIZE)
    expected = build(**ROUTINGS["switch"]).eval()
    expected.load_state_dict(moe.state_dict())
    assert torch.equal(moe.eval().router(hidden_states)[0], expected.router(hidden_states)[0])
    jittered = moe.train().router(hidden_states)[0]
    moved = (jittered - expected.router(hidden_states)[0]).abs()
    assert 0 < moved.max() <= 0.01 * (hidden_states.abs() @ moe.router.weight.abs().T).max()


# --- expert choice ----------------------------------------------------------------------------------------------------


def test_every_expert_takes_its_best_tokens():
    scores, mask = torch.rand(12, 4), torch.rand(12) < 0.7
    chosen = tokens_of_experts(scores, mask, 3)
    assert chosen.sum(0).tolist() == [3, 3, 3, 3]
    for expert in range(4):
        best = scores[:, expert].masked_fill(~mask, -1.0).topk(3).indices
        assert set(chosen[:, expert].nonzero()[:, 0].tolist()) == set(best.tolist())


def test_the_load_of_expert_choice_is_even():
    moe = build(**ROUTINGS["expert_choice"]).train()
    hidden_states, mask = torch.randn(2, 12, SIZE), prefix_mask(12, 4, width=12)
    logits, weights, indices = moe.router(hidden_states, call(2, 12, mask))
    assert torch.bincount(indices[indices < EXPERTS], minlength=EXPERTS).tolist() == [4] * EXPERTS  # 2 * 16 / 8
    assert (indices[~mask] == DROPPED).all()
    torch.testing.assert_close(weights[indices < EXPERTS].sum(), logits.softmax(-1).gather(
        -1, indices.clamp(max=EXPERTS - 1)
    )[indices < EXPERTS].sum())  # fmt: skip
    count_expert_load([moe], [logits], mask)
    assert moe.router.tokens_per_expert.tolist() == [4] * EXPERTS


def small_model(layers=2, spans=(), **options):
    moe = {"name": "moe", "num_experts": 4, "intermediate_size": 8} | options
    specs = {"a": {"mixer": {"name": "mamba2", "state_size": 4, "head_dim": 8}, "channel_mixer": moe}}
    sizes = {"num_hidden_layers": layers, "hidden_size": 16, "vocab_size": 20}
    return HybridLMForCausalLM(HybridLMConfig(layer_specs=specs, spans=list(spans), **sizes))


def test_expert_choice_trains_and_refuses_to_decode():
    model, ids = small_model(routing="expert_choice"), torch.randint(0, 20, (2, 6))
    assert model.train()(input_ids=ids, labels=ids).loss.isfinite()
    model.eval()
    alternative = r"the exact alternative is routing='top_k' with selection_bias=True"
    for refused in (
        lambda: model(input_ids=ids),
        lambda: model(input_ids=ids, use_cache=True),
        lambda: model.generate(ids, max_new_tokens=2),
        lambda: model.generate(ids, max_new_tokens=2, num_beams=2),
        lambda: model.generate(ids, max_new_tokens=2, use_cache=False),
        model.new_cache,
    ):
        with pytest.raises(NotImplementedError, match=alternative):
            refused()
    with pytest.raises(NotImplementedError, match=alternative):
        build(**ROUTINGS["expert_choice"])(torch.randn(1, 2, SIZE), None, call(1, 2, use_cache=True))


def test_an_evaluation_of_expert_choice_is_labelled_and_leaks(monkeypatch):
    said = []
    monkeypatch.setattr("hybridlm.modeling.router.logger.warning_once", said.append)
    model, ids = small_model(routing="expert_choice", capacity_factor=0.5).eval(), torch.randint(0, 20, (1, 12))
    moved = 0.0
    for token in range(20):
        edited = ids.clone()
        edited[0, -1] = token
        moved += float((model(edited, use_cache=False).logits - model(ids, use_cache=False).logits)[:, :-1].abs().max())
    assert moved > 0
    assert "not causal" in said[0]


# --- hash -------------------------------------------------------------------------------------------------------------


def test_the_hash_is_the_same_everywhere_and_for_ever():
    experts = hashed_experts(torch.arange(6), 2, 8, 0)
    assert experts.tolist() == HASHED
    assert hashed_experts(torch.arange(6)[None], 2, 8, 1)[0].tolist() != HASHED
    with torch.device("meta"):
        assert hashed_experts(torch.arange(6), 2, 8, 0).shape == (6, 2)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (5, 5), (64, 6), (1, 1)])
def test_the_hash_chooses_different_experts_and_each_as_often(experts, top_k):
    chosen = hashed_experts(torch.arange(20000), top_k, experts, 3)
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()
    share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    assert float((share * experts - 1).abs().max()) < 0.15


def test_a_token_id_goes_to_its_experts_whatever_it_holds():
    moe, ids = build(**ROUTINGS["hash"]), torch.randint(0, 50, (2, 9))
    _, weights, indices = moe.router(torch.randn(2, 9, SIZE), call(2, 9, ids=ids))
    assert torch.equal(indices, hashed_experts(ids, 2, EXPERTS, 0))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    single = build(routing="hash", top_k=1)
    assert torch.equal(single.router(torch.randn(2, 9, SIZE), call(2, 9, ids=ids))[1], torch.ones(2, 9, 1))


def test_hash_routing_refuses_embeddings_and_leaves_the_cache_alone():
    model, ids = small_model(routing="hash").eval(), torch.randint(0, 20, (1, 5))
    message = r"^inputs_embeds: routing='hash' chooses experts by token id, give input_ids"
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=torch.randn(1, 3, 16), past_key_values=cache)
    again = model(ids, use_cache=True).past_key_values
    following = torch.randint(0, 20, (1, 2))
    torch.testing.assert_close(
        model(following, past_key_values=cache).logits, model(following, past_key_values=again).logits, rtol=0, atol=0
    )
    with pytest.raises(ValueError, match=message):
        build(**ROUTINGS["hash"])(torch.randn(1, 2, SIZE))


def test_a_loaded_model_hashes_as_the_saved_one(tmp_path):
    model, ids = small_model(routing="hash", hash_seed=7).eval(), torch.randint(0, 20, (2, 6))
    model.save_pretrained(tmp_path)
    loaded = HybridLMForCausalLM.from_pretrained(tmp_path)  # on the meta device first
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    text = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=5, do_sample=False), text)


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_left_open_are_stored_as_numbers():
    config = small_model(routing="switch").config.layer_specs["a"]["channel_mixer"]
    stored = {key: config[key] for key in ("top_k", "renormalize", "capacity_factor", "load_balancing_coef")}
    assert stored == {"top_k": 1, "renormalize": False, "capacity_factor": 1.25, "load_balancing_coef": 0.01}
    config = small_model().config.layer_specs["a"]["channel_mixer"]
    stored = {key: config[key] for key in stored}
    assert stored == {"top_k": 2, "renormalize": True, "capacity_factor": None, "load_balancing_coef": 0.0}


WRONG = [
    ({"routing": "top-k"}, "routing: unknown 'top-k', expected one of ['top_k', 'switch', 'gshard',"),
    ({"top_k": 5}, "top_k=5 must be between 1 and num_experts=4"),
    (
        {"top_k": 8, "num_zero_experts": 1},
        "top_k=8 must be between 1 and num_experts=4 and the 1 zero and copy experts",
    ),
    ({"num_zero_experts": -1}, "num_zero_experts=-1 must not be negative"),
    ({"num_copy_experts": -1}, "num_copy_experts=-1 must not be negative"),
    ({"num_copy_experts": 1, "routing": "switch"}, "num_copy_experts=1 needs routing='top_k', got 'switch'"),
    ({"num_zero_experts": 1, "num_groups": 2}, "num_groups=2 needs routing='top_k' without zero and copy experts"),
    ({"routing": "gshard", "num_groups": 2}, "num_groups=2 needs routing='top_k'"),
    ({"routing": "switch", "top_k": 2}, "top_k=2 does not go with routing='switch', which takes 1"),
    ({"routing": "gshard", "top_k": 3}, "top_k=3 does not go with routing='gshard', which takes 2"),
    ({"routing": "gshard", "num_experts": 1}, "top_k=2 must be between 1 and num_experts=1"),
    ({"routing": "switch", "renormalize": True}, "renormalize=True makes the gate of routing='switch' always 1"),
    ({"routing": "expert_choice", "renormalize": True}, "renormalize=True does not go with routing='expert_choice'"),
    ({"routing": "expert_choice", "selection_bias": True}, "selection_bias=True does not go with routing='expert_cho"),
    ({"routing": "hash", "selection_bias": True}, "selection_bias=True does not go with routing='hash'"),
    (
        {"routing": "hash", "load_balancing_coef": 0.1},
        "load_balancing_coef=0.1 has nothing to balance in routing='hash'",
    ),
    ({"capacity_factor": 1.0}, "capacity_factor=1.0 needs a routing of ['switch', 'gshard', 'expert_choice'], got"),
    ({"routing": "switch", "capacity_factor": 0.0}, "capacity_factor=0.0 must be above 0"),
    ({"routing": "switch", "capacity_factor": "much"}, "capacity_factor: expected float | None, got 'much'"),
    (
        {"routing": "gshard", "second_expert": "never"},
        "second_expert: unknown 'never', expected one of ['random', 'alw",
    ),
    ({"jitter": 1.0}, "jitter=1.0 must be in [0, 1)"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_a_wrong_option_is_refused_with_its_path_when_the_model_is_built(options, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        small_model(**options)
    text = str(refused.value)
    assert text.startswith("layer_specs.a.channel_mixer.")
    assert text.removeprefix("layer_specs.a.channel_mixer.").startswith(message)
