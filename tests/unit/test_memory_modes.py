"""The outer gradient through the inner update, the inner gradient in every mode of PyTorch, and what both hold."""

import pytest
import torch
from memory_cases import EXACT, draw, gradient, network, parts, run
from torch.func import functional_call, vmap
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hybridlm.modeling.masks import SequenceInfo, plain_sequence
from hybridlm.modeling.mixer_neural_memory import NeuralMemoryMixer
from hybridlm.modeling.neural_memory import MemoryScan

BOUNDS = {"max_gradient": 0.9, "max_curvature": 0.8}
DIFFERENTIATED = {
    "linear": {"depth": 1},
    "linear_to_zero_without_momentum": {"depth": 1, "momentum": False, "forget_to": "zero"},
    "mlp": {"depth": 2},
    "mlp_bounded": {"depth": 2, **BOUNDS},
    "mlp_with_biases": {"depth": 3, "bias": True, "activation": "silu"},
    "residual": {"depth": 2, "residual_norm": True, "objective": "huber", **BOUNDS},
    "omega": {"depth": 2, "window": 3},
    "muon": {"depth": 2, "optimizer": "muon"},
    "atlas_linear": {"depth": 1, "optimizer": "muon", "window": 2},
    "lq": {"depth": 1, "retention": "lq", "objective": "lp"},
    "kl": {"depth": 1, "retention": "kl", "objective": "kl"},
    "elastic_net": {"depth": 2, "retention": "elastic_net"},
}


@pytest.mark.parametrize("form", DIFFERENTIATED)
def test_the_outer_gradient_through_queries_keys_values_gates_and_initial_weights(form):
    options = dict(DIFFERENTIATED[form])
    window = options.pop("window", 1)
    net = network(heads=1, width=2, **options)
    queries, tokens = draw(net, window, tokens=5, batch=1)
    scan, sequence = MemoryScan(net, 2, window, False), plain_sequence(queries)
    names = [name for name, _ in scan.named_parameters()]

    def outputs(queries, keys, values, rule, *weights):
        tokens = torch.cat([keys, values, rule], dim=-1)
        found = functional_call(scan, dict(zip(names, weights, strict=True)), (queries, tokens, None, sequence))
        return found[0], *(x for x in found[2].values() if x is not None)

    pieces = tokens.split([2, 2, tokens.shape[-1] - 4], dim=-1)
    inputs = [x.detach().clone().requires_grad_() for x in (queries, *pieces, *scan.parameters())]
    assert torch.autograd.gradcheck(outputs, inputs)


def mixer_of(dtype=torch.float32, **options):
    made = NeuralMemoryMixer(16, num_heads=2, chunk_size=4, max_learning_rate=4.0, **options)
    return made.to(dtype).eval()


MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
FORMS = {"linear": {"memory_depth": 1}, "mlp": {}, "muon": {"optimizer": "muon"}, "omega": {"omega_window": 3}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_the_memory_learns_without_autograd_what_it_learns_with_it(mode, form):
    mixer, hidden_states = mixer_of(**FORMS[form]), torch.randn(2, 11, 16)
    expected, state = mixer(hidden_states)
    with MODES[mode]():
        output, found = mixer(hidden_states)
    assert float(state.memory.detach().norm()) > 0.1
    assert torch.equal(output, expected)
    assert torch.equal(found.memory, state.memory)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    mixer, found = mixer_of(torch.float64), []
    inputs = torch.randn(2, 11, 16, dtype=torch.float64)
    for checkpointed in (False, True):
        leaf = inputs.clone().requires_grad_()
        output = (
            checkpoint(lambda x: mixer(x)[0], leaf, use_reentrant=use_reentrant) if checkpointed else mixer(leaf)[0]
        )
        output.square().sum().backward()
        found.append([leaf.grad, *(p.grad.clone() for p in mixer.parameters())])
        mixer.zero_grad()
    for a, b in zip(*found, strict=True):
        assert_close(b, a, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_the_inner_update_is_that_of_float32(form):
    mixer, calls = mixer_of(**FORMS[form]), []
    mixer.scan.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    with torch.autocast("cpu", torch.bfloat16):
        _, state = mixer(torch.randn(2, 11, 16))
    (queries, tokens, before, sequence), (output, _, kept) = calls.pop()
    assert {x.dtype for x in (queries, tokens, output, state.memory, state.momentum)} == {torch.float32}
    expected, _, learned = mixer.scan(queries, tokens, before, sequence)
    assert torch.equal(output, expected)
    for name, value in kept.items():
        assert value is None or torch.equal(value, learned[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_step_is_the_step(form):
    mixer, hidden_states = mixer_of(torch.float64, **FORMS[form]), torch.randn(2, 10, 16, dtype=torch.float64)
    expected, last = mixer(hidden_states)
    _, state = mixer(hidden_states[:, :1])

    def step(token, state, past):
        return mixer(token, state, SequenceInfo(1, past[:, None], past[:, None], num_past=past, uniform_past=None))

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    with torch.no_grad():
        for t in range(1, 10):
            output, state = compiled(hidden_states[:, t : t + 1], state, torch.full((2,), t))
            assert_close(output, expected[:, t : t + 1], **EXACT)
    assert_close(state.memory, last.memory, **EXACT)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that is made inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return output


@pytest.mark.parametrize("options", [{"depth": 1}, {"depth": 2}, {"depth": 3, "momentum": False}, {"window": 3}])
def test_no_gradient_of_a_token_by_the_weights_is_made_forward_or_backward(options):
    window = options.get("window", 1)
    options = {key: value for key, value in options.items() if key != "window"}
    net, length = network(heads=1, width=32, **{"depth": 2} | options), 48
    queries, tokens = (x.requires_grad_() for x in draw(net, window, tokens=length, batch=1))
    for chunk_size in (24, 48):
        with Largest() as held:
            run(net, queries, tokens, chunk_size, window)[0].sum().backward()
        assert held.elements < chunk_size * net.num_weights / 4  # of a chunk already, let alone of all tokens
    keys, values, *_ = (x[0, :, 0].detach() for x in parts(net, tokens)[:2])
    weights = [w[0].detach() for w in net.initial]
    with Largest() as held:  # what torch.func makes
        vmap(lambda k, v: gradient(net, 0, weights, k, v))(keys, values)
    assert held.elements >= length * net.num_weights / net.depth


def test_a_detached_memory_has_the_same_values_and_no_gradient_to_earlier_chunks():
    net, chunk_size = network(depth=2), 4
    queries, tokens = draw(net, tokens=12)
    found = {}
    for detach in (False, True):
        leaves = [x.clone().requires_grad_() for x in (queries, tokens)]
        output, state = run(net, *leaves, chunk_size, detach=detach)
        grads = torch.autograd.grad(output[:, 9].sum(), leaves, allow_unused=True)
        found[detach] = output, state["memory"], grads
    assert torch.equal(found[True][0], found[False][0])
    assert torch.equal(found[True][1], found[False][1])
    full, cut = (found[detach][2] for detach in (False, True))
    assert full[1][:, :8].abs().amax() > 1e-3
    assert not cut[1][:, :8].any()
    assert not cut[0][:, :8].any()
    assert cut[1][:, 8:10].abs().amax() > 1e-3
    assert not cut[1][:, 10:].any()
