"""Spans and mixture of depths: what the paper says, and what the bounds promise."""

import logging
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from span_variants import STACK, mod
from variants import ATTENTION, MAMBA, small
from variants import build as build_in_training

from hybridlm import HybridLMForTokenClassification
from hybridlm.modeling.hold import hold_last, hold_mean
from hybridlm.modeling.loads import PATIENCE
from hybridlm.modeling.losses import update_selection_bias
from hybridlm.modeling.masks import SequenceInfo
from hybridlm.modeling.span_mixture_of_depths import MixtureOfDepths, top_share
from hybridlm.modeling.spans import under_ceiling
from hybridlm.modeling.stream import RowState, build_sequence, select_tokens

IDS = torch.randint(0, 31, (3, 40), generator=torch.Generator().manual_seed(3))
DOCUMENTS = torch.tensor([[0] * 11 + [1] * 9 + [2] * 20])
NEVER, ALWAYS = -1e9, 1e9


def build(*args, **kwargs):
    return build_in_training(*args, **kwargs).eval()


def with_bias(model, value):
    for span in model.model.spans:
        span.threshold_bias.fill_(value)
    return model


def close(actual, expected, tolerance=1e-9):
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


# what enters, what leaves ----------------------------------------------------------------------------------------


def test_a_span_that_no_token_enters_is_the_identity():
    model = with_bias(build(STACK, spans=[mod()]), NEVER)
    plain = build([STACK[0], STACK[3]])
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("model.spans")}
    names = {name: name.replace("layers.1.", "layers.3.", 1) for name in plain.state_dict()}
    plain.load_state_dict({name: state[names[name]] for name in names})
    close(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("weight", ["raw", "sigmoid"])
@pytest.mark.parametrize("rule", ["auxiliary_loss", "threshold"])
def test_at_capacity_one_every_token_gets_the_weighted_change(rule, weight):
    model = build(STACK, spans=[mod(capacity=1.0, rule=rule, weight=weight)])
    if rule == "threshold":
        with_bias(model, ALWAYS)
    model.train()  # by the top k where the rule has one
    seen = {}
    model.model.layers[1].register_forward_hook(lambda m, args, out: seen.update(before=args[0]))
    model.model.layers[2].register_forward_hook(lambda m, args, out: seen.update(inner=out))
    model.model.layers[3].register_forward_hook(lambda m, args, out: seen.update(after=args[0]))
    output = model(IDS, output_router_logits=True)
    scores = output.span_scores[0]
    factor = scores.sigmoid() if weight == "sigmoid" else scores
    assert bool(output.span_taken[0].all())
    close(seen["after"], seen["before"] + factor[..., None] * (seen["inner"] - seen["before"]))


def test_tokens_inside_keep_their_positions_and_see_only_each_other():
    model = build([(ATTENTION, small("mlp"))], spans=[mod(start=0, stop=1, rule="random")])
    taken = model(IDS, output_router_logits=True).span_taken[0][0]
    only = taken.nonzero()[:, 0]
    base, device = model.model, IDS.device
    entering = base.embed_tokens(IDS[:1, only])
    sequence, _, _ = build_sequence(1, len(only), device, RowState.fresh(1, device), position_ids=only[None])
    changed = base.layers[0](entering, sequence=sequence) - entering
    stream = base.embed_tokens(IDS[:1]).clone()
    scores = model(IDS[:1], output_router_logits=True).span_scores[0]
    stream[:, only] += scores.sigmoid()[:, only, None] * changed
    close(model(IDS[:1]).logits, model.lm_head(base.norm(stream)))


def test_the_router_learns_from_the_loss_only_at_tokens_that_enter():
    span = build(STACK, spans=[mod(rule="predictor")]).model.spans[0].train()
    stream = torch.randn(2, 30, 16, dtype=torch.float64)
    sequence, _, _ = build_sequence(2, 30, stream.device, RowState.fresh(2, stream.device))
    selection, _ = span.select(stream, None, sequence)
    (gradient,) = torch.autograd.grad((selection.weight * selection.wished).sum(), selection.weight)
    assert torch.equal(gradient != 0, selection.wished)


def test_the_predictor_does_not_touch_what_the_stream_learns():
    gradients = []
    for coefficient in (0.0, 5.0):
        model = build(STACK, spans=[mod(rule="predictor", loss_coef=coefficient)]).train()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if "predictor" in name:
            assert float(gradient.abs().max()) == 0 < float(gradients[1][name].abs().max())
        else:
            close(gradients[1][name], gradient)


# the top k --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0.125, 0.2, 0.5, 1.0])
def test_top_k_takes_exactly_the_capacity_of_every_document_and_no_pad(capacity):
    scores = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 23:] = False
    segments = torch.tensor([[0] * 5 + [1] * 25, [0] * 10 + [1] * 20])
    sequence = SequenceInfo(30, torch.arange(30)[None], torch.arange(30)[None], mask, segment_ids=segments)
    taken = top_share(scores, capacity, sequence)
    for row, document in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        member = (segments[row] == document) & mask[row]
        count = math.ceil(capacity * int(member.sum()) - 1e-9)
        best = scores[row].masked_fill(~member, -9).topk(count).indices
        assert sorted(best.tolist()) == (taken[row] & member).nonzero()[:, 0].tolist()
    assert not bool(taken[1, 23:].any())


def test_top_k_is_used_in_training_without_a_cache_only():
    model = build(STACK, spans=[mod(rule="auxiliary_loss", capacity=0.25)])

    def shares(**arguments):
        return model(IDS, output_router_logits=True, **arguments).span_taken[0].double().mean(1).tolist()

    causal = shares()
    assert causal != [0.25] * 3
    model.train()
    assert shares() == [0.25] * 3
    assert shares(past_key_values=model.new_cache()) == causal


# the ceiling ------------------------------------------------------------------------------------------------------


def by_counting(wishes, starts, ceiling, count=0, length=0):
    taken = []
    for wish, start in zip(wishes, starts, strict=True):
        count, length = (0, 0) if start else (count, length)
        length += 1
        enters = wish and count < math.ceil(ceiling * length - 1e-9)
        count += enters
        taken.append(enters)
    return taken


@settings(max_examples=60, deadline=None)
@given(
    wishes=st.lists(st.booleans(), min_size=2, max_size=40),
    seed=st.integers(0, 999),
    ceiling=st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.9, 1.0]),
)
def test_the_ceiling_in_parallel_and_through_a_cache_is_the_count_token_by_token(wishes, seed, ceiling):
    rng, length = random.Random(seed), len(wishes)
    numbers = torch.tensor([sorted(rng.choices(range(3), k=length))])
    starts = [i > 0 and bool(numbers[0, i] != numbers[0, i - 1]) for i in range(length)]
    expected = by_counting(wishes, starts, ceiling)
    cut = rng.randrange(1, length)
    for pieces in ([(0, length)], [(0, cut), (cut, length)], [(i, i + 1) for i in range(length)]):
        outer, inner = RowState.fresh(1, torch.device("cpu")), RowState.fresh(1, torch.device("cpu"))
        got = []
        for a, b in pieces:
            sequence, _, outer = build_sequence(1, b - a, torch.device("cpu"), outer, seq_idx=numbers[:, a:b])
            taken = under_ceiling(torch.tensor([wishes[a:b]]), ceiling, sequence, inner)
            if bool(taken.any()):
                inner = select_tokens(sequence, taken, inner)[2]
            got += taken[0].tolist()
        assert got == expected


@pytest.mark.parametrize("length", [1, 7, 64, 200])
def test_keys_inside_are_at_most_the_ceiling_of_the_text_and_one(length):
    spans = [mod(start=1, stop=2, capacity=0.125, ceiling=0.2)]
    model = with_bias(build([(MAMBA, None), (ATTENTION, None)], spans=spans), ALWAYS)
    ids = torch.randint(0, 31, (2, length))
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    assert cache.layers[1].keys.shape[2] == math.ceil(0.2 * length) <= 0.2 * length + 1
    static = model.new_cache(static=True, max_length=length)
    close(model(ids, past_key_values=static).logits, model(ids).logits)
    assert static.layers[1].keys.shape[2] <= 0.2 * length + 1 + 1  # and the slot to spare that every static store has


def test_top_k_training_stores_at_most_the_capacity():
    model = build(STACK, spans=[mod(rule="predictor", capacity=0.125)]).train()
    lengths = []
    model.model.layers[1].register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    model(torch.randint(0, 31, (1, 400)))
    assert lengths == [50]


def test_a_static_cache_with_a_ceiling_refuses_packed_rows_and_changes_nothing():
    spans = [mod(start=1, stop=2, rule="random", capacity=0.2, ceiling=0.2)]
    model = build([(MAMBA, None), (ATTENTION, None)], spans=spans)
    cache = model.new_cache(static=True, max_length=20)
    model(IDS[:1, :5], past_key_values=cache)
    with pytest.raises(ValueError, match=r"one document a row inside span 0 \(4 of 20 tokens\)"):
        model(IDS[:1, 5:10], past_key_values=cache, seq_idx=torch.arange(5)[None])
    assert cache.num_columns == 5
    close(model(IDS[:1, 5:10], past_key_values=cache).logits, model(IDS[:1, :10]).logits[:, 5:])


# nobody enters ----------------------------------------------------------------------------------------------------


def test_decoding_runs_no_layer_of_a_span_that_no_row_enters():
    model = with_bias(build(STACK, spans=[mod()]), NEVER)
    ran = []
    for depth, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, args, out, depth=depth: ran.append(depth))
    cache = model.new_cache()
    for t in range(3):
        model(IDS[:, t : t + 1], past_key_values=cache)
    assert ran == [0, 3] * 3
    with_bias(model, ALWAYS)
    model(IDS[:, 3:4], past_key_values=cache)
    assert ran[6:] == [0, 1, 2, 3]


def test_with_no_token_taken_every_parameter_gets_a_gradient_of_zero():
    model = with_bias(build(STACK, spans=[mod()]), NEVER).train()
    model(IDS, labels=IDS).loss.backward()
    inner = [layer for layer in model.model.layers[1:3]]
    for parameter in [p for layer in inner for p in layer.parameters()] + [model.model.spans[0].router.weight]:
        assert parameter.grad is not None
        # the experts' balance is a loss of its own, of the tokens that reach them: none
        assert float(parameter.grad.abs().max()) == 0


# the bias ---------------------------------------------------------------------------------------------------------


def test_the_bias_moves_once_a_step_by_the_share_of_all_micro_batches_and_not_in_evaluation():
    model = build(STACK, spans=[mod(capacity=0.25, bias_update_rate=0.5)])
    span, before = model.model.spans[0], model.model.spans[0].threshold_bias.clone()
    model.eval()
    model(IDS, labels=IDS)
    update_selection_bias(model)
    assert torch.equal(span.threshold_bias, before)
    model.train()
    mask = torch.ones_like(IDS)
    mask[0, 25:] = 0
    batches = [(IDS[:1], mask[:1]), (IDS[1:], mask[1:])]
    wanted = sum(
        (model(ids, attention_mask=m, output_router_logits=True).span_scores[0] + before > 0)[m.bool()].sum()
        for ids, m in batches
    )
    assert torch.equal(span.threshold_bias, before)
    update_selection_bias(model)
    expected = before + 0.5 * (0.25 - float(wanted) / float(mask.sum()))
    close(span.threshold_bias, expected, 1e-6)
    update_selection_bias(model)  # nothing was counted since
    close(span.threshold_bias, expected, 1e-6)


def test_gradient_checkpointing_counts_a_token_once():
    model = build(STACK, spans=[mod()]).train()
    counts = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        counts.append(model.model.spans[0].load_counts())
        model.model.spans[0].reset_load()
    assert torch.equal(*counts)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("capacity", [0.125, 0.5])
def test_after_100_steps_every_span_takes_its_share(capacity, seed):
    torch.manual_seed(seed)
    spans = [mod(start=1, stop=2, every=2, capacity=capacity)]
    layers = [(ATTENTION, small("swiglu")), (ATTENTION, small("swiglu")), (MAMBA, small("mlp")), (MAMBA, small("mlp"))]
    model = build(layers, hidden_size=32, spans=spans).float().train()
    for module in model.modules():  # fresh weights: those of the contract tests are large
        model._init_weights(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.randint(0, 31, (4096,)).sort().values.roll(7)  # not white noise, so that there is something to learn
    shares = []
    for _ in range(100):
        begins = torch.randint(0, len(text) - 64, (4,)).tolist()
        ids = torch.stack([text[b : b + 64] for b in begins])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append([float(s.load_counts()[0] / s.load_counts()[1]) for s in model.model.spans])
        update_selection_bias(model)
    for number, mean in enumerate(torch.tensor(shares).mean(0).tolist()):
        assert abs(mean / capacity - 1) <= 0.3, f"span {number} took {mean:.3f} of the tokens"


# what is held -----------------------------------------------------------------------------------------------------


def test_holding_is_the_recurrence_token_by_token():
    torch.manual_seed(0)
    keep, updates = torch.rand(2, 150, dtype=torch.float64), torch.randn(2, 150, 3, dtype=torch.float64)
    keep[:, ::7] = 0
    expected, held = [], torch.zeros(2, 3, dtype=torch.float64)
    for t in range(150):
        held = keep[:, t, None] * held + updates[:, t]
        expected.append(held)
    output, state = hold_mean(torch.cat([keep[..., None], updates], -1), None, None)
    close(output, torch.stack(expected, 1), 1e-12)
    close(state.values, held, 1e-12)
    whole = (keep > 0).double()
    packed = torch.cat([whole[..., None], updates * (1 - whole[..., None])], -1)
    assert torch.equal(hold_last(packed, None, None)[0], hold_mean(packed, None, None)[0])


@pytest.mark.parametrize("option", ["capacity", "ceiling"])
def test_a_whole_number_of_one_is_a_share(option):
    assert MixtureOfDepths(8, **{"capacity": 1, option: 1}).max_tokens(10) == 10


def test_the_bias_moves_under_any_head():
    causal = build(STACK, spans=[mod()])
    model = HybridLMForTokenClassification(causal.config).double().train()
    model(IDS, labels=IDS % 2).loss.backward()
    span = model.model.spans[0]
    before = span.threshold_bias.clone()
    update_selection_bias(model)
    assert span.threshold_bias != before


def test_frozen_routers_keep_their_biases_so_that_an_adapter_meets_them_again():
    merge = {"name": "token_merging", "start": 3, "stop": 4}
    experts = small("moe") | {"selection_bias": True}
    model = build([*STACK[:3], (MAMBA, experts)], spans=[mod(), merge]).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapter = torch.nn.Parameter(torch.zeros(1))
    model.register_parameter("lora_A", adapter)
    router = model.model.layers[3].channel_mixer.router
    biases = [*(span.threshold_bias for span in model.model.spans), router.selection_bias]
    before = [bias.clone() for bias in biases]
    model(IDS, labels=IDS)
    update_selection_bias(model)
    assert all(torch.equal(a, b) for a, b in zip(biases, before, strict=True))
    assert model.model.spans[0].load_record is not None  # what was chosen is told all the same
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(IDS, labels=IDS)
    update_selection_bias(model)
    assert not any(torch.equal(a, b) for a, b in zip(biases, before, strict=True))


def test_a_bias_that_nobody_moves_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hybridlm"), "propagate", True)
    model = build([(MAMBA, None)], spans=[mod(start=0, stop=1)]).train()
    for _ in range(PATIENCE + 2):
        model(IDS[:1, :2])
    assert sum("SelectionBiasCallback" in record.message for record in caplog.records) == 1
