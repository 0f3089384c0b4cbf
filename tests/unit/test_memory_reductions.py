"""Options of the memory at which it is another known rule, each written here on its own, and what it recalls."""

import pytest
import torch
from memory_cases import (
    EXACT,
    FORMS,
    HEADS,
    RULE,
    TOKENS,
    WIDTH,
    accumulated,
    draw,
    gradient,
    network,
    parts,
    predict,
    run,
    unit,
)
from torch.func import vmap
from torch.nn import functional
from torch.testing import assert_close

from hybridlm.modeling import memory as memory_module
from hybridlm.modeling.memory import MemoryNetwork
from hybridlm.modeling.memory_update import orthogonalize
from hybridlm.modeling.objectives import slope

THETA = 2 * WIDTH + RULE[0]


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_dot_without_momentum_and_forgetting_is_linear_attention(chunk_size):
    net = network(depth=1, objective="dot", momentum=False)
    queries, tokens = draw(net, forgetting=False)
    tokens[..., THETA] = 0.5
    keys, values, *_ = parts(net, tokens)
    scores = torch.einsum("bthk,bshk->bhts", queries, keys).tril()
    expected = torch.einsum("bhts,bshv->bthv", scores, values)
    expected = expected + torch.einsum("bthk,hkv->bthv", queries, net.initial_0)
    assert_close(run(net, queries, tokens, chunk_size)[0], expected, **EXACT)


def test_a_linear_memory_without_momentum_and_forgetting_is_the_delta_rule():
    net = network(depth=1, momentum=False)
    queries, tokens = draw(net, forgetting=False)
    beta = 2 * tokens[..., THETA]
    output, _ = run(net, queries, tokens, 1)
    keys, values, *_ = parts(net, tokens)
    state = net.initial_0.expand(len(queries), -1, -1, -1)
    for t in range(TOKENS):
        key = keys[:, t]
        new = beta[:, t, :, None] * (values[:, t] - torch.einsum("bhk,bhkv->bhv", key, state))
        state = state + key[..., None] * new[..., None, :]
        assert_close(output[:, t], torch.einsum("bhk,bhkv->bhv", queries[:, t], state), **EXACT)


def test_a_linear_memory_without_momentum_is_the_gated_delta_rule_of_values_before_their_decay():
    """Gated DeltaNet decays first and takes the error of what is left: theta = keep beta / 2 of values v / keep."""
    net = network(depth=1, momentum=False, forget_to="zero")
    queries, tokens = draw(net)
    keys, values, beta, _, keep, _ = parts(net, tokens.clone())
    tokens[..., WIDTH : 2 * WIDTH] /= keep[..., None]
    tokens[..., THETA] = keep * beta / 2
    output, _ = run(net, queries, tokens, 1)
    state = net.initial_0.expand(len(queries), -1, -1, -1)
    for t in range(TOKENS):
        key = keys[:, t]
        state = keep[:, t, :, None, None] * state
        new = beta[:, t, :, None] * (values[:, t] - torch.einsum("bhk,bhkv->bhv", key, state))
        state = state + key[..., None] * new[..., None, :]
        assert_close(output[:, t], torch.einsum("bhk,bhkv->bhv", queries[:, t], state), **EXACT)


def ttt(net, layers, queries, keys, values, rate, chunk_size):
    """TTT-Linear or TTT-MLP of one head: f(x) = x + LN(W x + b), or of two layers, in mini-batches."""

    def answer(x, weights):
        hidden = x
        for i, (weight, offset) in enumerate(weights):
            hidden = functional.gelu(hidden) if i else hidden
            hidden = hidden @ weight + offset
        return x + functional.layer_norm(hidden, x.shape[-1:], net.norm_weight[0], net.norm_bias[0], 1e-6)

    weights, outputs = layers, []
    for start in range(0, len(keys), chunk_size):
        base = [[p.detach().requires_grad_() for p in layer] for layer in weights]
        for t in range(start, min(start + chunk_size, len(keys))):
            error = (answer(keys[t], base) - values[t]).square().sum()
            found = iter(torch.autograd.grad(error, [p for layer in base for p in layer]))
            weights = [[p - rate * next(found) for p in layer] for layer in weights]
            outputs.append(answer(queries[t], weights))
    return torch.stack(outputs)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_ttt_linear_and_ttt_mlp_are_special_cases(depth, chunk_size):
    net = network(heads=1, depth=depth, expansion=4.0, bias=True, residual_norm=True, momentum=False)
    queries, tokens = draw(net, batch=1, forgetting=False)
    tokens[..., THETA] = 0.1
    keys, values, *_ = parts(net, tokens)
    layers = [(weight[0, :-1], weight[0, -1]) for weight in net.initial]
    expected = ttt(net, layers, queries[0, :, 0], keys[0, :, 0], values[0, :, 0], 0.1, chunk_size)
    assert_close(run(net, queries, tokens, chunk_size)[0][0, :, 0], expected, **EXACT)


@pytest.mark.parametrize("form", ["mlp", "deep_with_biases", "residual", "linear"])
def test_a_memory_that_never_learns_answers_as_in_the_beginning(form):
    net = network(**FORMS[form])
    queries, tokens = draw(net)
    tokens[..., THETA] = 0.0
    output, state = run(net, queries, tokens, 4)
    for h in range(HEADS):
        for b in range(len(queries)):
            first = vmap(lambda q, h=h: predict(net, h, [w[h] for w in net.initial], q))(queries[b, :, h])
            assert_close(output[b, :, h], first, **EXACT)
    assert not state["memory"].any()


@pytest.mark.parametrize("form", ["linear", "mlp", "residual"])
def test_muon_without_orthogonalisation_at_rate_one_is_the_plain_rule_at_borders(form, monkeypatch):
    monkeypatch.setattr(memory_module, "orthogonalize", lambda matrix: matrix)
    assert_same_at_borders(FORMS[form], {"optimizer": "muon"}, rate=1.0)


@pytest.mark.parametrize(("retention", "number"), [("lq", 2.0), ("elastic_net", 0.0)])
@pytest.mark.parametrize("form", ["linear", "mlp", "mlp_to_zero"])
def test_the_neutral_numbers_of_retentions_are_decay_at_borders(form, retention, number):
    assert_same_at_borders(FORMS[form], {"retention": retention, "retention_q": number})


def assert_same_at_borders(form, options, rate=None, chunk_size=4):
    plain, other = network(**form), network(**form, **options)
    other.load_state_dict(plain.state_dict())
    queries, tokens = draw(plain)
    if rate is not None:
        tokens[..., THETA] = rate / chunk_size  # an orthogonalised step is as long as the sum of the rates
    (expected, state), (output, found) = (run(net, queries, tokens, chunk_size) for net in (plain, other))
    ends = torch.arange(chunk_size - 1, TOKENS, chunk_size)
    assert_close(output[:, ends], expected[:, ends], **EXACT)
    assert_close(found["memory"], state["memory"], **EXACT)
    assert other.at_borders
    assert not plain.at_borders


def test_within_a_chunk_a_memory_that_moves_at_borders_answers_as_at_its_start():
    net = network(depth=2, optimizer="muon")
    queries, tokens = draw(net)
    output, _ = run(net, queries, tokens, 5)
    first = vmap(lambda q: predict(net, 1, [w[1] for w in net.initial], q))(queries[0, :, 1])
    assert_close(output[0, :4, 1], first[:4], **EXACT)
    assert not torch.allclose(output[0, 4:, 1], first[4:])


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape):
    left, _, right = torch.linalg.svd(torch.randn(20, *shape, dtype=torch.float64), full_matrices=False)
    values = torch.rand(20, min(shape), dtype=torch.float64) * 0.9 + 0.1
    turned = orthogonalize(left @ torch.diag_embed(values * 37.0) @ right)
    core = left.transpose(-1, -2) @ turned @ right.transpose(-1, -2)
    size = torch.diagonal(core, dim1=-2, dim2=-1)
    assert bool((size > 0.6).all())
    assert bool((size < 1.25).all())
    assert_close(core, torch.diag_embed(size), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "lp", "objective_p": 2.0},
        {"objective": "huber", "objective_threshold": 1e6},
    ],
)
def test_lp_of_exponent_two_and_huber_without_threshold_are_l2(options):
    net, other = network(depth=2), network(depth=2, **options)
    other.load_state_dict(net.state_dict())
    queries, tokens = draw(net)
    assert_close(run(other, queries, tokens, 4)[0], run(net, queries, tokens, 4)[0], **EXACT)


def test_kl_at_a_high_temperature_tends_to_l2_of_centred_errors():
    prediction, value = torch.randn(2, 30, WIDTH, dtype=torch.float64)
    error = prediction - value
    expected = 2 * (error - error.mean(-1, keepdim=True))
    for temperature in (1e2, 1e4, 1e6):
        scaled = slope("kl", prediction, value, threshold=temperature) * 2 * WIDTH * temperature**2
        assert_close(scaled, expected, rtol=0, atol=20 / temperature)


def test_retention_kl_accumulates_as_titans_and_reads_its_softmax():
    net, titans = (network(depth=1, objective="dot", **o) for o in ({"retention": "kl", "retention_q": 2.0}, {}))
    net.load_state_dict(titans.state_dict())
    queries, tokens = draw(net)
    (output, state), (_, expected) = (run(n, queries, tokens, 5) for n in (net, titans))
    assert_close(state["memory"], expected["memory"], **EXACT)
    weights = 2.0 * accumulated(titans, expected, 1, 0)[0].softmax(0)
    assert_close(output[1, 9:, 0], queries[1, 9:, 0] @ weights, **EXACT)


def test_retention_kl_is_the_exponentiated_gradient_of_memora():
    """W_t = softmax((1 - alpha) log W_{t-1} - theta grad), each unit's weights over its inputs."""
    net = network(depth=1, retention="kl", momentum=False, forget_to="zero")
    queries, tokens = draw(net)
    output, _ = run(net, queries, tokens, 1)
    keys, values, theta, _, keep, _ = parts(net, tokens)
    weights = net.initial_0[0].softmax(0)
    for t in range(TOKENS):
        (found,) = gradient(net, 0, [weights], keys[0, t, 0], values[0, t, 0])
        weights = weights ** keep[0, t, 0] * torch.exp(-theta[0, t, 0] * found)
        weights = weights / weights.sum(0)
        assert_close(output[0, t, 0], queries[0, t, 0] @ weights, **EXACT)


@pytest.mark.parametrize("depth", [1, 2])
def test_random_pairs_are_recalled_the_better_the_more_often_they_were_seen(depth):
    """With the default bounds and initial weights; the values have length 1, which is the error of an answer of 0."""
    net, width = MemoryNetwork(1, 16, depth=depth).double().requires_grad_(False), 16
    keys, values = unit(torch.randn(2, 1, 8, 1, width, dtype=torch.float64))
    rule = torch.tensor([(1 - 0.5) / 8, 0.5, 0.9999], dtype=torch.float64)
    pairs = torch.cat([keys, values, torch.cat([rule[:1], rule[1:].log()]).expand(1, 8, 1, 3)], dim=-1)
    asked = torch.cat([keys, values, torch.tensor([0.0, -30.0, 0.0], dtype=torch.float64).expand(1, 8, 1, 3)], dim=-1)
    errors = []
    for times in (0, 1, 4, 16, 64, 256):
        queries, tokens = keys.repeat(1, times + 1, 1, 1), torch.cat([pairs] * times + [asked], dim=1)
        output, _ = run(net, queries, tokens, 8)
        errors.append(float((output[:, -8:] - values).norm(dim=-1).mean()))
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 0.1
