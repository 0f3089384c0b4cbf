"""What the papers and the facts sheet promise of token merging; the contract tests walk its options too."""

from itertools import product

import pytest
import torch
from span_variants import MERGING, MIDDLE, STACK, merge
from variants import ATTENTION, MAMBA, VOCAB_SIZE, build, small

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.modeling.losses import update_selection_bias
from hybridlm.modeling.passage import Journal, SpanRecord
from hybridlm.modeling.span_token_merging import BOUNDARIES, REPRESENTATIVES, TokenMerging
from hybridlm.modeling.stream import RowState, build_sequence

EVERY = list(product(BOUNDARIES, REPRESENTATIVES))
WIDTH = 8


def tokens(batch=2, length=40, seed=0):
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def error(actual, expected):
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())


def records(model, input_ids, **arguments):
    return model.model(input_ids, output_router_logits=True, **arguments).span_records


def span_of(boundary, representative, **options):
    torch.manual_seed(0)
    options = ({"stride": 3} if boundary == "stride" else {"threshold": 0.2}) | options
    span = TokenMerging(WIDTH, boundary=boundary, representative=representative, **options)
    for parameter in span.parameters():
        torch.nn.init.normal_(parameter)
    return span.double()


def through(span, stream, inner):
    sequence, _, _ = build_sequence(*stream.shape[:2], stream.device, RowState.fresh(stream.shape[0], stream.device))
    sequence.journal = Journal()
    return span(stream, sequence, inner), sequence


def running_mean(entering, weight):
    """A causal inner part, `[B, T', D]`, whose output is not its input."""
    count = torch.arange(1, entering.shape[1] + 1, dtype=entering.dtype)[:, None]
    return entering + (entering.cumsum(1) / count) @ weight


def merged_by_hand(span, stream, weight):
    """One row `[T, D]`, token by token."""
    entered, outputs, held, group, gate = [], [], torch.zeros(WIDTH).double(), [], 1.0
    for t, token in enumerate(stream):
        probability = torch.tensor(1.0).double()
        if span.boundary == "stride":
            opens = t % span.stride == 0
        elif t == 0:
            opens = True
        elif span.boundary == "cosine":
            opens = bool(torch.cosine_similarity(token, stream[t - 1], dim=0) < span.threshold)
        else:
            cosine = torch.cosine_similarity(span.query_proj(token), span.key_proj(stream[t - 1]), dim=0)
            probability = ((1 - cosine + span.threshold) / 2).clamp(0, 1)
            opens = bool(probability >= 0.5)
        smooth = probability if span.boundary == "learned" else 1.0
        entering = None
        if span.representative == "first":
            entering, share = (token, smooth) if opens else (None, 0.0)
        elif span.boundary == "stride":
            group = [token] if opens else [*group, token]
            entering, share = (sum(group) / span.stride, 1.0) if len(group) == span.stride else (None, 0.0)
        else:
            if opens and t:
                entering, share = sum(group) / len(group), gate
            group, gate = ([token], smooth) if opens else ([*group, token], gate)
        if entering is not None:
            entered.append(entering)
            delta = running_mean(torch.stack(entered)[None], weight)[0, -1] - entering
            held = (1 - share) * held + share * delta
        outputs.append(token + held)
    return torch.stack(outputs)


@pytest.mark.parametrize(("boundary", "representative"), EVERY)
def test_merging_is_what_a_loop_over_tokens_gives(boundary, representative):
    span = span_of(boundary, representative)
    stream, weight = torch.randn(2, 50, WIDTH).double(), torch.randn(WIDTH, WIDTH).double()
    output, _ = through(span, stream, lambda entering, inside: running_mean(entering, weight))
    expected = torch.stack([merged_by_hand(span, row, weight) for row in stream])
    assert error(output, expected) < 1e-12


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("boundary", ["cosine", "learned"])
def test_a_threshold_above_one_is_the_plain_model(boundary, training):
    options = {"threshold": 1.01, "bias_update_rate": 0.0, "boundary": boundary}
    model = build(STACK, spans=[{"name": "token_merging"} | MIDDLE | options])
    if boundary == "cosine":
        model.model.spans[0].threshold_bias.zero_()
    plain = build(STACK)
    plain.load_state_dict(model.state_dict(), strict=False)
    model.train(training), plain.train(training)
    assert error(model(tokens()).logits, plain(tokens()).logits) < 1e-9
    record = records(model, tokens())[0]
    assert bool(record.taken.all())
    assert model.model.spans[0].expected_share() == 1


@pytest.mark.parametrize("boundary", ["cosine", "learned"])
def test_tokens_that_are_all_equal_form_one_group(boundary):
    options = {"boundary": boundary, "threshold": 0.5 if boundary == "cosine" else 0.0}
    model = build(STACK, spans=[{"name": "token_merging", "start": 0, "stop": 2} | options])
    for projection in ("query_proj", "key_proj") if boundary == "learned" else ():
        torch.nn.init.eye_(getattr(model.model.spans[0], projection).weight)
    taken = records(model, torch.full((2, 12), 5))[0].taken
    assert taken.sum(1).tolist() == [1, 1]
    assert bool(taken[:, 0].all())
    packed = torch.tensor([[0] * 5 + [1] * 7])
    taken = records(model, torch.full((1, 12), 5), seq_idx=packed)[0].taken
    assert taken[0].nonzero().flatten().tolist() == [0, 5]


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
def test_a_stride_is_counted_from_the_start_of_every_document(stride):
    model = build(STACK, spans=[merge("stride", "mean", stride=stride)])
    lengths = (9, 1, 13)
    packed = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    taken = records(model, tokens(1, sum(lengths)), seq_idx=packed)[0].taken[0]
    expected = [t % stride == stride - 1 for length in lengths for t in range(length)]
    assert taken.tolist() == expected
    span = model.model.spans[0]
    assert span.max_tokens(20) == 20 // stride
    assert span.expected_share() == 1 / stride


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_mean_serves_no_token_before_its_group_is_complete(boundary):
    span = span_of(boundary, "mean")
    stream = torch.randn(1, 30, WIDTH).double()
    output, sequence = through(span, stream, lambda entering, inside: entering + 1)
    taken = sequence.journal.passages[0].selection.taken[0]
    first = int(taken.nonzero()[0])
    assert torch.equal(output[:, :first], stream[:, :first])
    assert first > 0
    assert bool((output[:, first:] != stream[:, first:]).all())
    through(span.eval(), stream[:, :first], lambda entering, inside: pytest.fail("ran although nothing is complete"))


@pytest.mark.parametrize("boundary", ["cosine", "learned"])
def test_a_mean_enters_with_the_position_of_its_last_token(boundary):
    span, seen = span_of(boundary, "mean"), []
    stream = torch.randn(1, 30, WIDTH).double()
    _, sequence = through(span, stream, lambda entering, inside: seen.append(inside.positions) or entering)
    taken = sequence.journal.passages[0].selection.taken[0]
    assert seen[0].flatten().tolist() == (taken.nonzero().flatten() - 1).tolist()


@pytest.mark.parametrize(("boundary", "representative"), EVERY)
def test_later_tokens_change_nothing_before_them_in_training_mode(boundary, representative):
    model = build(STACK, spans=[merge(boundary, representative)]).train()
    before = model(tokens()).logits
    for border in (1, 7, 20, 39):
        edited = torch.cat([tokens()[:, :border], tokens(seed=1)[:, border:]], dim=1)
        assert error(model(edited).logits[:, :border], before[:, :border]) < 1e-12


@pytest.mark.parametrize(("boundary", "representative"), EVERY)
def test_every_parameter_gets_a_gradient_even_where_nothing_enters(boundary, representative):
    model = build(STACK, spans=[merge(boundary, representative)]).train()
    for length in (2, 40):  # a mean of 2 tokens is not complete yet
        model.zero_grad()
        model(tokens(2, length), labels=tokens(2, length)).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    for name, parameter in model.model.spans.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("boundary", "representative"), EVERY)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_five_hundred_tokens_in_chunks_are_one_forward(boundary, representative, dtype, limit):
    model = build([(MAMBA, None), (ATTENTION, small("mlp"))], spans=[MERGING | {"start": 0, "stop": 2}]).to(dtype)
    cache, text, pieces = model.new_cache(), tokens(2, 500), []
    with torch.no_grad():
        for piece in text.split([1, 150, 1, 2, 63, 283], dim=1):
            pieces.append(model(piece, past_key_values=cache).logits)
        assert error(torch.cat(pieces, dim=1), model(text, use_cache=False).logits) < limit


@pytest.mark.parametrize(("boundary", "representative"), EVERY)
def test_the_inner_layers_store_one_key_a_group(boundary, representative):
    model = build(STACK, spans=[merge(boundary, representative)])
    cache, text = model.new_cache(), tokens(1, 60)
    taken = sum(int(records(model, piece, past_key_values=cache)[0].taken.sum()) for piece in text.split(7, dim=1))
    assert cache.layers[1].mixer.tensors()["keys"].shape[2] == taken == int(records(model, text)[0].taken.sum())
    assert cache.layers[3].mixer.tensors()["keys"].shape[2] > 0  # outside the span


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_sizes_add_up_to_the_tokens_of_complete_groups(boundary):
    model = build(STACK, spans=[merge(boundary, "mean")])
    cache, text = model.new_cache(), tokens(3, 60)
    whole = records(model, text)[0].sizes
    parts = [records(model, piece, past_key_values=cache)[0].sizes for piece in text.split(7, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    complete = whole.sum(1)
    if boundary == "stride":
        assert complete.tolist() == [60] * 3  # 12 groups of 5
    else:
        opened = cache.spans[0].choice.state.size
        assert (complete + opened).tolist() == [60] * 3
    assert records(build(STACK, spans=[merge(boundary, "first")]), text)[0].sizes is None


def test_the_ratio_loss_is_that_of_the_paper_in_every_document():
    span = span_of("learned", "first", target_ratio=4.0, loss_coef=0.1).train()
    probability = torch.rand(1, 30, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0] * 12 + [1] * 18])
    reached = torch.ones(1, 30, dtype=torch.bool)
    reached[0, 25:] = False
    taken = probability >= 0.5
    losses = span.token_losses(SpanRecord(0, probability, taken, taken, reached), segments)
    for document in (slice(0, 12), slice(12, 25)):
        share, mean = taken[0, document].double().mean(), probability[0, document].mean()
        expected = 4 / 3 * (3 * share * mean + (1 - share) * (1 - mean))  # equation 10
        torch.testing.assert_close(losses[0, document].mean(), 0.1 * expected)
    balanced = torch.tensor([[0.9, 0.0, 0.0, 0.1]], dtype=torch.float64)
    record = SpanRecord(0, balanced, balanced >= 0.5, balanced >= 0.5, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(span.token_losses(record, None).mean(), torch.tensor(0.1).double())
    assert span.eval().token_losses(record, None) is None


def train(boundary, seed, steps=100, **options):
    """Train a tiny model on text with structure; return the shares of tokens that entered, and the model."""
    torch.manual_seed(seed)
    attention = {"name": "attention", "num_heads": 4, "position": {"name": "rope"}}
    config = HybridLMConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=3,
        layer_specs={"a": {"mixer": attention, "channel_mixer": {"name": "swiglu", "intermediate_size": 32}}},
        layer_layout=["a"] * 3,
        spans=[{"name": "token_merging", "start": 1, "stop": 2, "boundary": boundary} | options],
    )
    model, shares = HybridLMForCausalLM(config).train(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    words = torch.randint(0, VOCAB_SIZE, (12, 5))
    for _ in range(steps):
        text = words[torch.randint(0, 12, (4, 12))].flatten(1)
        outputs = model(text, labels=text, output_router_logits=True)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_selection_bias(model)
        shares.append(float(outputs.span_taken[0].double().mean()))
    return shares, model


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("boundary", "ratio"), [("cosine", 2.0), ("cosine", 4.0), ("learned", 2.0)])
def test_after_100_steps_the_groups_have_their_size(boundary, ratio, seed):
    shares, _ = train(boundary, seed, target_ratio=ratio)
    share = sum(shares[-20:]) / 20
    assert abs(share * ratio - 1) < 0.3, shares[::10]


def test_a_fixed_threshold_stays():
    _, model = train("cosine", 0, steps=3, bias_update_rate=0.0)
    assert model.model.spans[0].threshold_bias == 0


def test_the_threshold_moves_only_in_training():
    model = build(STACK, spans=[merge("cosine", "first")])
    span = model.model.spans[0]
    before = span.threshold_bias.clone()
    model.eval()(tokens())
    update_selection_bias(model)
    assert torch.equal(span.threshold_bias, before)
    model.train()(tokens())
    update_selection_bias(model.eval())
    assert torch.equal(span.threshold_bias, before)


def test_one_whole_step_of_calibration_meets_the_target_on_what_was_counted():
    model = build(STACK, spans=[merge("cosine", "first", bias_update_rate=1.0, target_ratio=3.0)]).train()
    text = tokens(8, 100)
    for part in text.split(2):  # micro-batches
        model(part)
    update_selection_bias(model)
    assert abs(float(records(model, text)[0].taken.double().mean()) - 1 / 3) < 0.01
    assert model.model.spans[0].load_record is not None
