"""What keeps a neural memory stable: reads, memory and outer gradient are bounded over long inputs, by each bound.

Every head of a memory here has other gates, pinned at either end, so that one call runs them all.
"""

import pytest
import torch

from hybridlm.modeling.mixer_neural_memory import NeuralMemoryMixer

HIDDEN, WIDTH, CHUNK = 8, 8, 64
READ, MOVED, GRADIENT = 4.0, 8.0, 100.0  # values have length 1, the loss weighs outputs with random numbers
# biases of learning rate, momentum and forgetting: all ends of the last two at the highest rate, and no learning
PINS = [(30.0, momentum, forgetting) for momentum in (-30.0, 3.0, 30.0) for forgetting in (-30.0, 30.0)]
PINS += [(-30.0, 3.0, -30.0), (0.0, 0.0, -5.0)]
FASTEST = [(30.0, -30.0, -30.0), (30.0, 3.0, -30.0)]


def pinned(pins=PINS, scale=1.0, **options):
    """A mixer with a head for each choice of gates; `scale` multiplies its projections."""
    mixer = NeuralMemoryMixer(HIDDEN, num_heads=len(pins), head_dim=WIDTH, **{"chunk_size": CHUNK} | options)
    with torch.no_grad():
        mixer.qkv_proj.weight.mul_(scale)
        mixer.gates.proj.bias[: 3 * len(pins)] = torch.tensor(pins).T.flatten()
    return mixer


def draw(kind, num_tokens):
    tokens = torch.randn(1, 1 if kind == "repeated" else num_tokens, HIDDEN)
    return tokens.expand(1, num_tokens, HIDDEN).clone()


def measure(mixer, hidden_states):
    """Length of the longest read, of what a head's memory has moved, and of the outer gradient of a token."""
    found, hidden_states = {}, hidden_states.requires_grad_()
    mixer.scan.register_forward_hook(lambda _, inputs, output: found.update(read=output[0]))
    output, state = mixer(hidden_states)
    (output * torch.randn_like(output)).sum().backward()
    for tensor in (output, state.memory, *(p.grad for p in mixer.parameters())):
        assert bool(torch.isfinite(tensor).all())
    lengths = (found["read"], state.memory, hidden_states.grad)
    return [float(x.detach().norm(dim=-1).max()) for x in lengths]


def moved(mixer, hidden_states):
    """How far the memory of each head has come from its learned initial weights, `[H]`."""
    with torch.no_grad():
        return mixer(hidden_states)[1].memory.norm(dim=-1)[0]


def assert_bounded(mixer, hidden_states):
    read, distance, gradient = measure(mixer, hidden_states)
    assert read <= READ
    assert distance <= MOVED
    assert gradient <= GRADIENT


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ["random", "repeated"])
def test_long_inputs_leave_reads_memory_and_gradients_bounded_whatever_the_gates(kind, depth):
    assert_bounded(pinned(memory_depth=depth), draw(kind, 4096))


def test_the_fastest_step_lands_on_the_value_and_never_beyond_it():
    """Beyond it the error of a repeated token would change its sign for ever, and the outer gradient grow with it."""
    mixer = pinned(FASTEST[:1], scale=30.0, memory_depth=1, chunk_size=1, max_gradient=None)
    width, hidden_states = mixer.head_dim, draw("repeated", 3)
    calls = []
    mixer.scan.register_forward_hook(lambda _, inputs, output: calls.append(inputs))
    mixer(hidden_states)
    _, tokens, state, sequence = calls.pop()
    read, _, _ = mixer.scan(tokens[..., :width], tokens, state, sequence)  # the keys as queries
    torch.testing.assert_close(read, tokens[..., width : 2 * width], rtol=0, atol=2e-3)


@pytest.mark.parametrize("chunk_size", [4, 16])
def test_the_outer_gradient_does_not_grow_with_the_repetitions_of_a_token_at_the_highest_rate(chunk_size):
    assert_bounded(pinned(FASTEST[:1], chunk_size=chunk_size), draw("repeated", 1024))


@pytest.mark.parametrize("kind", ["random", "repeated"])
def test_the_outer_gradient_of_a_deep_memory_does_not_grow_with_tokens_that_are_chunks_of_their_own(kind):
    read, _, gradient = measure(pinned(FASTEST[:1], chunk_size=1), draw(kind, 512))
    assert read <= 2 * READ
    assert gradient <= GRADIENT


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ["random", "repeated"])
def test_16k_tokens_leave_reads_memory_and_gradients_bounded_whatever_the_gates(kind, depth, chunk_size):
    assert_bounded(pinned(memory_depth=depth, chunk_size=chunk_size), draw(kind, 16384))


@pytest.mark.parametrize(
    "options",
    [
        {"memory_depth": 1},
        {"memory_depth": 1, "max_curvature": None},  # unit keys alone bound the curvature of a linear memory
        {"memory_depth": 1, "max_gradient": None},
        {"memory_depth": 2},
    ],
)
@pytest.mark.parametrize("kind", ["random", "repeated"])
def test_projections_of_any_size_leave_a_memory_bounded(kind, options):
    assert_bounded(pinned(FASTEST, scale=30.0, chunk_size=16, **options), draw(kind, 1024))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"omega_window": 8, "memory_depth": 1},
        {"memory_depth": 1},
        {"memory_bias": True, "memory_residual": True},
        {"memory_depth": 4, "memory_activation": "silu"},
        {"objective": "lp"},
        {"objective": "kl", "objective_threshold": 0.1},
        {"objective": "dot"},
    ],
)
def test_a_chunk_moves_the_memory_by_its_bounds_at_most_however_large_the_learned_weights_are(options):
    """By the largest rate, 1, times the largest gradient, `max_gradient` times the root of `max_curvature`."""
    mixer, bound = pinned(FASTEST, **options), 2.0 * 0.5**0.5
    with torch.no_grad():
        for weight in mixer.scan.network.initial:
            weight.mul_(8.0)
    for kind in ("random", "repeated"):
        assert bool((moved(mixer, draw(kind, CHUNK)) <= bound + 1e-4).all())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_values": False},  # the slope is bounded by max_gradient
        {"max_gradient": None},  # the slope is bounded by unit values
        {"max_gradient": None, "max_curvature": None},
    ],
)
def test_a_memory_that_is_pushed_one_way_for_ever_stays_in_a_ball(options):
    """Objective `dot` pushes without end; at the radius forgetting gives up what a token adds, 2 / C or 1 / C."""
    floor, chunk_size = 0.01, 16
    options = {"objective": "dot", "memory_depth": 1, "min_forgetting": floor, "chunk_size": chunk_size} | options
    radius = (1 if options.get("max_curvature", 0.5) else 2) / (chunk_size * floor)
    length = moved(pinned(FASTEST, scale=30.0, **options), draw("repeated", 1024))
    assert bool((length <= radius + 1e-3).all())
    assert bool((length >= 0.5 * radius).any())


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "muon"},
        {"omega_window": 8},
        {"objective": "lp", "retention": "lq"},
        {"objective": "huber", "retention": "elastic_net"},
        {"retention": "kl", "forget_to": "zero"},
    ],
)
def test_what_atlas_and_miras_add_stays_finite(options):
    for kind in ("random", "repeated"):
        measure(pinned(FASTEST, chunk_size=16, **options), draw(kind, 1024))
