"""The chunk-parallel memory equals what the papers write down, each written here or in `memory_cases.py` on its own."""

import pytest
import torch
from memory_cases import (
    EXACT,
    FORMS,
    HEADS,
    TOKENS,
    WIDTH,
    accumulated,
    draw,
    gates,
    gradient,
    loss,
    network,
    papers_loop,
    parts,
    predict,
    run,
)
from torch.func import vmap
from torch.testing import assert_close

from hybridlm.modeling.memory import MemoryNetwork
from hybridlm.modeling.memory_gates import coefficients
from hybridlm.modeling.objectives import OBJECTIVES, objective, slope


def running_product(factors):
    """`[C, C]`, entry i, j the product of the factors j + 1 to i, by multiplication one at a time."""
    size = len(factors)
    made = torch.zeros(size, size, dtype=factors.dtype)
    for j in range(size):
        made[j, j] = 1.0
        for i in range(j + 1, size):
            made[i, j] = made[i - 1, j] * factors[i]
    return made


def closed_form(queries, keys, values, theta, eta, keep, memory, momentum):
    """A chunk of a linear memory `y = q M` that forgets to 0: outputs `[C, K]`, memory and momentum behind it."""
    momentum_products, keep_products = running_product(eta), running_product(keep)
    weights = keep_products @ momentum_products @ torch.diag(theta)
    beta, slow = keep.cumprod(0), eta.cumprod(0)
    follow = keep_products @ slow
    error = keys @ memory - values
    output = beta[:, None] * (queries @ memory) + follow[:, None] * (queries @ momentum)
    output = output - 2 * ((queries @ keys.T) * weights) @ error
    last = (momentum_products @ torch.diag(theta))[-1]
    after = beta[-1] * memory + follow[-1] * momentum - 2 * (keys * weights[-1, :, None]).T @ error
    return output, after, slow[-1] * momentum - 2 * (keys * last[:, None]).T @ error


@pytest.mark.parametrize("chunk_size", [1, 4, 13])
def test_a_linear_memory_equals_its_closed_form(chunk_size):
    net = network(depth=1, forget_to="zero")
    queries, tokens = draw(net)
    output, state = run(net, queries, tokens, chunk_size)
    keys, values, theta, eta, keep, _ = parts(net, tokens)
    for b in range(len(queries)):
        for h in range(HEADS):
            memory, momentum = net.initial_0[h], torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
            for start in range(0, TOKENS, chunk_size):
                cut = (b, slice(start, start + chunk_size), h)
                chunk = [x[cut] for x in (queries, keys, values, theta, eta, keep)]
                expected, after, speed = closed_form(*chunk, memory, momentum)
                assert_close(output[cut], expected, **EXACT)
                if len(expected) == chunk_size:
                    memory, momentum = after, speed
            assert_close(accumulated(net, state, b, h)[0], memory, **EXACT)
            assert_close(net.split(state["momentum"])[0][b, h], momentum, **EXACT)


@pytest.mark.parametrize("chunk_size", [1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_the_scan_equals_the_recurrence_of_the_paper(form, chunk_size):
    net = network(**FORMS[form])
    queries, tokens = draw(net, tokens=10)
    output, state = run(net, queries, tokens, chunk_size)
    expected, last = papers_loop(net, queries, tokens, chunk_size)
    assert_close(output, expected, **EXACT)
    for (b, h), weights in last.items():
        assert_close(accumulated(net, state, b, h), weights, **EXACT)


def test_the_scan_equals_the_recurrence_of_the_paper_in_float32():
    net = network(depth=2, dtype=torch.float32)
    queries, tokens = draw(net, tokens=20)
    expected, _ = papers_loop(net.double(), queries.double(), tokens.double(), 4)
    output, _ = run(net.float(), queries, tokens, 4)
    assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("window", "chunk_size"), [(2, 5), (3, 1), (4, 3), (8, 3), (50, 4)])
@pytest.mark.parametrize("form", ["linear", "mlp", "huber"])
def test_the_omega_rule_equals_a_loop_over_its_window(form, window, chunk_size):
    net = network(**FORMS[form])
    queries, tokens = draw(net, window, tokens=9)
    expected, _ = papers_loop(net, queries, tokens, chunk_size, window)
    assert_close(run(net, queries, tokens, chunk_size, window)[0], expected, **EXACT)


@pytest.mark.parametrize("momentum", [True, False])
def test_a_window_of_one_token_with_weight_one_is_titans(momentum):
    rule = gates(2, HEADS, 6, window=2)
    rule[..., 3] = 1.0
    windowed = coefficients(rule, rule.new_zeros(2, HEADS, 0), momentum)
    assert_close(tuple(windowed), tuple(coefficients(rule, None, momentum)), **EXACT)


@pytest.mark.parametrize("objective_name", OBJECTIVES)
@pytest.mark.parametrize("residual_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_rank_one_gradients_equal_vmap_of_grad(depth, bias, residual_norm, objective_name):
    net = network(
        depth=depth, bias=bias, residual_norm=residual_norm, objective=objective_name, objective_threshold=0.4
    )
    keys, values = torch.randn(2, 1, HEADS, 7, WIDTH, dtype=torch.float64)
    weights = [w[None] for w in net.initial]
    found = net.gradients(weights, keys, values)
    squares = 0.0
    for h in range(HEADS):
        per_token = vmap(lambda k, v, h=h: gradient(net, h, [w[0, h] for w in weights], k, v))
        for layer, expected in enumerate(per_token(keys[0, h], values[0, h])):
            made = found.inputs[layer][0, h, :, :, None] * found.deltas[layer][0, h, :, None, :]
            assert_close(made, expected, **EXACT)
            squares = squares + expected.square().sum((-1, -2)) * torch.eye(HEADS, dtype=torch.float64)[h, :, None]
    assert_close(found.surprise[0], squares.sqrt(), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("form", ["linear", "mlp", "deep_with_biases", "residual"])
def test_the_bounds_scale_a_gradient_and_turn_it_nowhere(form):
    free, limits = network(**FORMS[form]), {"max_gradient": 0.7, "max_curvature": 0.9}
    bounded = MemoryNetwork(HEADS, WIDTH, **(FORMS[form] | limits)).double()
    bounded.load_state_dict(free.state_dict())
    keys, values = torch.randn(2, 1, HEADS, 40, WIDTH, dtype=torch.float64)
    weights = [w[None] for w in free.initial]
    plain, held = (net.gradients(weights, keys, values) for net in (free, bounded))
    error = torch.stack([predict_all(free, h, weights, keys) - values[0, h] for h in range(HEADS)])[None]
    length = 2 * error.norm(dim=-1)
    curvature = plain.surprise.square() / length.square()
    factor = (0.7 / length).clamp(max=1) * (0.9 / curvature).clamp(max=1)
    assert bool((length > 0.7).any())
    assert bool((curvature > 0.9).any())
    for a, b in zip(plain.deltas, held.deltas, strict=True):
        assert_close(b, a * factor[..., None], rtol=1e-8, atol=1e-10)


def predict_all(net, head, weights, keys):
    return vmap(lambda k: predict(net, head, [w[0, head] for w in weights], k))(keys[0, head])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_slopes_are_the_derivatives_of_objectives_and_objectives_those_of_pytorch(name):
    prediction, value = torch.randn(2, 50, WIDTH, dtype=torch.float64)
    prediction.requires_grad_()
    made = objective(name, prediction, value, 3.0, 0.4)
    net = network(objective=name, objective_threshold=0.4)
    assert_close(made, torch.stack([loss(net, p, v) for p, v in zip(prediction, value, strict=True)]), **EXACT)
    (expected,) = torch.autograd.grad(made.sum(), prediction)
    assert_close(slope(name, prediction, value, 3.0, 0.4), expected, **EXACT)
