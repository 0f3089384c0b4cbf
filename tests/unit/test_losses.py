"""Router losses: pads, documents and micro-batches; transformers' formula; the balance without a loss."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from variants import ATTENTION, CHANNEL_VARIANTS, build

from hybridlm.modeling.channel_moe import MoE
from hybridlm.modeling.losses import (
    batch_load_balancing_loss,
    count_expert_load,
    document_mean_loss,
    label_tokens_per_document,
    load_balancing_loss,
    router_losses,
    router_z_loss,
    update_selection_bias,
)

EXPERTS, TOP_K = 6, 2
LENGTHS = (5, 1, 4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def document(length):
    """Draw one document: three layers of logits `[1, T, E]` and labels `[1, T]` with gaps."""
    labels = torch.randint(0, 9, (1, length)).masked_fill(torch.rand(1, length) < 0.2, -100)
    logits = [2 * torch.randn(1, length, EXPERTS, dtype=torch.float64) for _ in range(3)]
    return logits, labels


def modules(**options):
    options = {"load_balancing_coef": 0.3, "z_loss_coef": 0.2, "num_experts": EXPERTS, "top_k": TOP_K} | options
    return [MoE(8, intermediate_size=8, **options) for _ in range(3)]


def packed(documents):
    """Put documents in one row: logits, labels, segment ids."""
    logits = [torch.cat(parts, 1) for parts in zip(*(document[0] for document in documents), strict=True)]
    segment_ids = torch.cat([torch.full_like(labels, i) for i, (_, labels) in enumerate(documents)], 1)
    return logits, torch.cat([labels for _, labels in documents], 1), segment_ids


def padded(documents, width, fill=1e4):
    """Put every document in its own row, pads last: logits, labels, token mask."""

    def pad(tensor, value):
        shape = (1, width - tensor.shape[1], *tensor.shape[2:])
        return torch.cat([tensor, torch.full(shape, value, dtype=tensor.dtype)], 1)

    logits = [torch.cat([pad(x, fill) for x in parts]) for parts in zip(*(d[0] for d in documents), strict=True)]
    labels = torch.cat([pad(labels, 7) for _, labels in documents])  # even a pad's label counts for nothing
    mask = torch.arange(width) < torch.tensor([labels.shape[1] for _, labels in documents])[:, None]
    return logits, labels, mask


def assert_same_losses(left, right):
    assert left.keys() == right.keys() == {"load_balancing", "z"}
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-12, atol=1e-12)
        assert right[name] > 0


@pytest.fixture(params=["softmax", "sigmoid"])
def moes(request):
    return modules(scores=request.param)


@pytest.fixture
def separately(moes):
    """Three documents, and the sum of their losses, each in a call of its own."""
    documents = [document(length) for length in LENGTHS]
    items = sum(int((labels[:, 1:] != -100).sum()) for _, labels in documents)
    losses = [router_losses(moes, logits, labels, num_items_in_batch=items) for logits, labels in documents]
    return documents, items, {name: sum(loss[name] for loss in losses) for name in losses[0]}


def test_documents_packed_in_a_row_are_documents_apart(moes, separately):
    documents, items, expected = separately
    logits, labels, segment_ids = packed(documents)
    assert_same_losses(router_losses(moes, logits, labels, None, segment_ids, items), expected)
    # the ids may be any numbers, and the items default to the labels that are there
    assert_same_losses(router_losses(moes, logits, labels, None, 40 + 3 * segment_ids), expected)


@pytest.mark.parametrize("fill", [0.0, 1e4, float("inf"), float("nan")])
def test_pads_change_nothing_whatever_they_hold(moes, separately, fill):
    documents, items, expected = separately
    logits, labels, mask = padded(documents, 7, fill)
    assert_same_losses(router_losses(moes, logits, labels, mask, None, items), expected)


def test_packed_rows_with_pads_are_documents_apart(moes, separately):
    documents, items, expected = separately
    row, segment_ids = packed(documents[:2])[:2], packed(documents[:2])[2]
    logits, labels, mask = padded([row, documents[2]], 9)
    ids = torch.zeros(2, 9, dtype=torch.long)
    ids[0] = torch.cat([segment_ids[0], segment_ids[0, -1:].expand(3)])
    assert_same_losses(router_losses(moes, logits, labels, mask, ids, items), expected)


def test_one_batch_is_its_micro_batches(moes, separately):
    documents, items, expected = separately
    whole = padded(documents, 6)
    micro = []
    for rows in (slice(0, 1), slice(1, 3)):
        logits, labels, mask = [x[rows] for x in whole[0]], whole[1][rows], whole[2][rows]
        micro.append(router_losses(moes, logits, labels, mask, None, items))
    assert_same_losses({name: micro[0][name] + micro[1][name] for name in expected}, expected)


def test_an_empty_row_adds_nothing(moes, separately):
    documents, items, expected = separately
    logits, labels, mask = padded(documents, 6)
    mask = torch.cat([mask, torch.zeros(1, 6, dtype=torch.bool)])
    logits, labels = [torch.cat([x, x[:1]]) for x in logits], torch.cat([labels, labels[:1]])
    assert_same_losses(router_losses(moes, logits, labels, mask, None, items), expected)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_perfect_balance_gives_top_k(scores):
    turns = torch.stack([torch.arange(12).roll(shift) % EXPERTS for shift in range(TOP_K)], -1)
    logits = torch.zeros(1, 12, EXPERTS).scatter(-1, turns[None], 2.0)
    torch.testing.assert_close(load_balancing_loss(logits, TOP_K, scores=scores), torch.tensor(float(TOP_K)))


def test_all_tokens_on_the_same_experts_cost_more():
    logits = torch.zeros(1, 12, EXPERTS)
    logits[..., :TOP_K] = 30.0
    torch.testing.assert_close(load_balancing_loss(logits, TOP_K), torch.tensor(float(EXPERTS)))


def test_a_document_is_weighted_by_its_label_tokens():
    logits = torch.randn(2, 5, EXPERTS)
    each = torch.stack([load_balancing_loss(row[None], TOP_K) for row in logits])
    total = load_balancing_loss(logits, TOP_K, label_tokens=torch.tensor([[4], [1]]), num_items_in_batch=10)
    torch.testing.assert_close(total, (4 * each[0] + each[1]) / 10)
    total = router_z_loss(logits, label_tokens=torch.tensor([[4], [1]]), num_items_in_batch=torch.tensor(10))
    squares = logits.logsumexp(-1).square().mean(-1)
    torch.testing.assert_close(total, (4 * squares[0] + squares[1]) / 10)


def test_label_tokens_are_those_predicted_inside_the_document():
    labels = torch.tensor([[1, 2, -100, 4, 5, 6, 7]])
    segment_ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    mask = torch.tensor([[True] * 6 + [False]])
    assert label_tokens_per_document(labels).tolist() == [[5]]
    assert label_tokens_per_document(labels, segment_ids)[:, :2].tolist() == [[1, 3]]
    assert label_tokens_per_document(labels, segment_ids, mask)[:, :2].tolist() == [[1, 2]]
    shifted = torch.tensor([[2, -100, -100, 5, 6, 7, -100]])
    assert label_tokens_per_document(shifted, segment_ids, shifted=True)[:, :2].tolist() == [[1, 3]]


@pytest.mark.parametrize("with_mask", [False, True])
def test_batch_scope_is_the_function_of_transformers(with_mask):
    logits = [torch.randn(3, 7, EXPERTS) for _ in range(4)]
    mask = torch.arange(7) < torch.tensor([[7], [2], [5]]) if with_mask else None
    expected = load_balancing_loss_func(
        tuple(x.flatten(0, 1) for x in logits), EXPERTS, TOP_K, None if mask is None else mask.long()
    )
    torch.testing.assert_close(batch_load_balancing_loss(logits, TOP_K, token_mask=mask), expected)
    moes = [*modules(loss_scope="batch"), *modules(loss_scope="batch")[:1]]
    losses = router_losses(moes, logits, torch.zeros(3, 7, dtype=torch.long), mask, num_items_in_batch=1000)
    torch.testing.assert_close(losses["load_balancing"], 0.3 * expected)


def test_layers_of_batch_scope_that_differ_are_computed_apart():
    logits = [torch.randn(2, 5, EXPERTS), torch.randn(2, 5, 4)]
    moes = [*modules(loss_scope="batch")[:1], *modules(loss_scope="batch", num_experts=4)[:1]]
    expected = sum(batch_load_balancing_loss([x], TOP_K) for x in logits) / 2
    torch.testing.assert_close(router_losses(moes, logits)["load_balancing"], 0.3 * expected)


@pytest.mark.parametrize("scope", ["document", "batch"])
def test_total_is_the_mean_over_layers_of_coefficient_times_loss(scope):
    logits = [torch.randn(2, 5, EXPERTS) for _ in range(3)]
    moes = modules(loss_scope=scope, load_balancing_coef=0.0)
    moes[0].z_loss_coef = 0.0
    losses = router_losses(moes, logits)
    expected = sum(0.2 * x.logsumexp(-1).square().mean() for x in logits[1:]) / 3
    torch.testing.assert_close(losses["z"], expected)
    assert losses["load_balancing"] == 0


@pytest.mark.parametrize("scope", ["document", "batch"])
def test_gradients_are_right_and_zero_at_pads(scope):
    moes = modules(scores="sigmoid", loss_scope=scope)
    logits = [torch.randn(2, 4, EXPERTS, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    labels, mask = torch.zeros(2, 4, dtype=torch.long), torch.arange(4) < torch.tensor([[4], [2]])

    def total(*logits):
        return sum(router_losses(moes, logits, labels, mask).values())

    assert torch.autograd.gradcheck(total, logits)
    for gradient in torch.autograd.grad(total(*logits), logits):
        assert (gradient[1, 2:] == 0).all()
        assert (gradient[mask] != 0).any()


def test_losses_need_one_tensor_a_layer():
    with pytest.raises(ValueError, match=r"^router_logits: got 1 tensors for 3 expert layers"):
        router_losses(modules(), [torch.randn(1, 2, EXPERTS)])


def routed(moes, hidden_states):
    return [moe.router(hidden_states)[0] for moe in moes]


def test_load_counts_the_real_tokens_of_the_actual_choice():
    moes = modules(scores="sigmoid", selection_bias=True)
    moes[0].router.selection_bias[4] = 10.0
    hidden_states, mask = torch.randn(2, 7, 8), torch.arange(7) < torch.tensor([[7], [3]])
    count_expert_load(moes, routed(moes, hidden_states), mask)
    for moe in moes:
        indices = moe.router(hidden_states)[2][mask]
        assert torch.equal(moe.router.tokens_per_expert, torch.bincount(indices.flatten(), minlength=EXPERTS))
    assert moes[0].router.tokens_per_expert[4] == 10


def test_load_of_micro_batches_adds_up_and_checkpointing_counts_once():
    (moe, *_), hidden_states = modules(selection_bias=True), torch.randn(4, 5, 8)
    count_expert_load([moe], routed([moe], hidden_states))
    whole = moe.router.tokens_per_expert
    moe.router.reset_load()
    for rows in hidden_states.split(2):
        recorded = []
        hook = moe.router.register_forward_hook(lambda _, __, output, into=recorded: into.append(output[0]))
        output = checkpoint(lambda x: moe(x)[0], rows.requires_grad_(), use_reentrant=False)
        count_expert_load([moe], recorded)
        hook.remove()
        output.sum().backward()
    assert torch.equal(moe.router.tokens_per_expert, whole)


def test_the_bias_of_a_loaded_expert_falls_by_the_rate_and_counting_starts_anew():
    moe = modules(selection_bias=True, bias_update_rate=0.01)[0]
    moe.router.add_load(torch.tensor([9, 3, 5, 5, 5, 3]))  # mean 5
    update_selection_bias(torch.nn.ModuleList([moe]))
    expected = torch.tensor([-0.01, 0.01, 0.0, 0.0, 0.0, 0.01])
    torch.testing.assert_close(moe.router.selection_bias, expected)
    assert not moe.router.tokens_per_expert.any()
    update_selection_bias(moe)  # nothing was counted: nothing moves
    torch.testing.assert_close(moe.router.selection_bias, expected)


def test_the_bias_is_frozen_in_eval_mode():
    moe = modules(selection_bias=True)[0].eval()
    moe.router.add_load(torch.tensor([9, 3, 5, 5, 5, 3]))
    update_selection_bias(moe)
    assert not moe.router.selection_bias.any()


def test_bias_updates_balance_a_lopsided_router():
    moe = modules(scores="sigmoid", selection_bias=True, bias_update_rate=0.005)[0]
    moe.router.weight.data.normal_(std=0.5)  # the rate must be small against the differences of scores
    hidden_states = torch.randn(1, 300, 8) + 1.0
    loads = []
    for _ in range(200):
        count_expert_load([moe], routed([moe], hidden_states))
        loads.append(moe.router.tokens_per_expert)
        update_selection_bias(moe)
    spread = [load.max() - load.min() for load in loads]
    assert spread[-1] < 0.2 * spread[0]


def test_counts_travel_with_a_copy_and_not_with_a_checkpoint():
    moe = modules(selection_bias=True)[0]
    moe.router.add_load(torch.arange(EXPERTS))
    assert torch.equal(copy.deepcopy(moe).router.tokens_per_expert, torch.arange(EXPERTS))
    assert not any("tokens_per_expert" in name or "load" in name for name in moe.state_dict())


def test_a_layer_that_saw_some_tokens_is_judged_by_those():
    moes, mask = modules(selection_bias=True), torch.arange(7) < torch.tensor([[7], [5]])
    logits = [torch.randn(2, 7, EXPERTS, dtype=torch.float64) for _ in moes]
    reached = torch.rand(2, 7) < 0.5
    labels = torch.zeros(2, 7, dtype=torch.long)
    masks = [None, reached & mask, None]
    whole = router_losses(moes, logits, labels, mask, num_items_in_batch=10)
    some = router_losses(moes, logits, labels, mask, num_items_in_batch=10, layer_masks=masks)
    alone = [
        router_losses(moes[1:2], logits[1:2], labels, mask, num_items_in_batch=10, layer_masks=[x]) for x in masks[:2]
    ]
    for name in whole:  # the documents keep the weight of all their labels
        torch.testing.assert_close(some[name] - whole[name], (alone[1][name] - alone[0][name]) / 3)
        assert some[name] != whole[name]
    count_expert_load(moes, logits, mask, layer_masks=masks)
    assert [int(moe.router.tokens_per_expert.sum()) for moe in moes] == [
        TOP_K * int(x.sum()) for x in (mask, reached & mask, mask)
    ]
    with pytest.raises(ValueError, match=r"^layer_masks: got 1 for 3 expert layers"):
        router_losses(moes, logits, layer_masks=[None])


def test_layers_of_batch_scope_may_see_different_tokens():
    logits, reached = [torch.randn(2, 5, EXPERTS) for _ in range(3)], torch.rand(2, 5) < 0.6
    moes = modules(loss_scope="batch", z_loss_coef=0.0)
    losses = router_losses(moes, logits, layer_masks=[None, reached, None])
    kept = [torch.cat([x.flatten(0, 1) for x in (logits[0], logits[1][reached][None], logits[2])])[None]]
    torch.testing.assert_close(losses["load_balancing"], 0.3 * batch_load_balancing_loss(kept, TOP_K))


def test_the_mean_of_a_document_weighs_as_its_labels():
    values, mask = torch.randn(1, 6), torch.tensor([[True, True, False, True, True, False]])
    segments, labels = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[3, 1, 0, 0, 0, 0]])
    loss = document_mean_loss(
        values.masked_fill(~mask, float("nan")),
        token_mask=mask,
        segment_ids=segments,
        label_tokens=labels,
        num_items_in_batch=8,
    )
    torch.testing.assert_close(loss, (3 * values[0, :2].mean() + values[0, 3:5].mean()) / 8)


class Threshold(torch.nn.Module):
    """Anything with a load: a bias that moves towards a share."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.zeros(()))
        self.counts = torch.zeros(2, dtype=torch.float64)

    def load_counts(self):
        return self.counts

    def apply_load(self, counts, moves):
        self.bias += 0.1 * (0.125 - counts[0] / counts[1])
        self.counts = torch.zeros_like(counts)


def test_one_update_reaches_routers_and_whatever_else_has_a_load():
    moe, threshold = modules(selection_bias=True, bias_update_rate=0.01)[0], Threshold()
    moe.router.add_load(torch.tensor([9, 3, 5, 5, 5, 3]))
    threshold.counts += torch.tensor([5.0, 10.0])
    update_selection_bias(torch.nn.ModuleList([threshold, moe]))
    torch.testing.assert_close(threshold.bias, torch.tensor(-0.0375))
    assert moe.router.selection_bias[0] == -0.01
    threshold.eval()
    update_selection_bias(threshold)
    torch.testing.assert_close(threshold.bias, torch.tensor(-0.0375))


def test_pads_inside_a_packed_document_change_no_loss():
    model = build([(ATTENTION, CHANNEL_VARIANTS["moe-losses"])])
    ids = torch.randint(0, 31, (1, 12))
    numbers = torch.tensor([[0] * 5 + [1] * 7])
    labels = ids.clone()
    labels[0, 8] = -100  # as it is behind a pad, from which nothing is predicted
    expected = model(ids, seq_idx=numbers, labels=labels)

    def with_pads(values, fill):
        return torch.cat([values[:, :8], torch.full((1, 2), fill), values[:, 8:]], dim=1)

    mask = with_pads(torch.ones_like(ids), 0)
    padded = model(with_pads(ids, 0), mask, seq_idx=with_pads(numbers, 1), labels=with_pads(labels, -100))
    torch.testing.assert_close(padded.aux_loss, expected.aux_loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(padded.loss, expected.loss, rtol=1e-6, atol=0)
