"""The two scans equal their token loops, have exact gradients, and are linear in length and accurate in float32."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from hybridlm.modeling import scan
from hybridlm.modeling.scan import selective_scan, selective_scan_reference
from hybridlm.modeling.ssd import ssd_scan, ssd_scan_reference


def selective_inputs(batch=2, tokens=11, channels=3, states=2, dtype=torch.float64):
    value, dt = torch.randn(2, batch, tokens, channels, dtype=dtype)
    key, query = torch.randn(2, batch, tokens, states, dtype=dtype)
    rate, state = -torch.rand(channels, states, dtype=dtype) * 3, torch.randn(batch, channels, states, dtype=dtype)
    return [value, dt.abs(), rate, key, query, torch.randn(channels, dtype=dtype), state]


def ssd_inputs(batch=2, tokens=11, heads=4, groups=2, width=2, states=3, dtype=torch.float64):
    value, dt = torch.randn(batch, tokens, heads, width, dtype=dtype), torch.rand(batch, tokens, heads, dtype=dtype)
    key, query = torch.randn(2, batch, tokens, groups, states, dtype=dtype)
    rate, state = -torch.rand(heads, dtype=dtype) * 3, torch.randn(batch, heads, width, states, dtype=dtype)
    return [value, dt, rate, key, query, torch.randn(heads, dtype=dtype), state]


def short_ssd_scan(*inputs):
    return ssd_scan(*inputs, chunk_size=4)


CASES = pytest.mark.parametrize(
    ("run", "reference", "build"),
    [(selective_scan, selective_scan_reference, selective_inputs), (short_ssd_scan, ssd_scan_reference, ssd_inputs)],
    ids=["selective", "ssd"],
)


@pytest.fixture
def starts():
    flags = torch.zeros(2, 11, dtype=torch.bool)
    flags[0, [0, 5, 6]] = flags[1, [8, 10]] = True
    return flags


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(scan._SelectiveScan, "BLOCK_ELEMENTS", 1)


@CASES
def test_gradients_of_all_inputs_and_of_the_state_are_exact(run, reference, build, starts):
    inputs = [tensor.requires_grad_() for tensor in build()]
    for flags in (None, starts):
        assert gradcheck(lambda *tensors, flags=flags: run(*tensors, flags), inputs, fast_mode=True)


@CASES
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_scan_equals_the_token_loop(run, reference, build, tokens, batch):
    inputs = build(batch=batch, tokens=tokens)
    flags = torch.rand(batch, tokens) < 0.2
    for arguments in ([*inputs, flags], [*inputs, None], [*inputs[:5], None, None, None]):
        for actual, expected in zip(run(*arguments), reference(*arguments), strict=True):
            assert_close(actual, expected)


@CASES
def test_a_token_without_step_size_changes_nothing(run, reference, build):
    inputs = build()
    inputs[1] = torch.zeros_like(inputs[1])
    _, state = run(*inputs)
    assert_close(state, inputs[-1], rtol=0, atol=1e-15)


@CASES
def test_nothing_before_a_start_reaches_what_follows(run, reference, build, starts):
    inputs = [tensor.requires_grad_() for tensor in build()]
    output, state = run(*inputs, starts)
    gradients = torch.autograd.grad(output[0, 6:].sin().sum() + state[0].sin().sum(), inputs)
    assert (gradients[0][0, :6] == 0).all()
    assert (gradients[-1][0] == 0).all()
    assert (gradients[0][0, 6:] != 0).all()


@CASES
def test_half_precision_is_computed_in_float32(run, reference, build):
    inputs = [tensor.bfloat16() for tensor in build()]
    output, state = run(*inputs)
    expected, last = reference(*[tensor.float() for tensor in inputs])
    assert output.dtype == state.dtype == torch.float32
    assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert_close(state, last, rtol=1e-4, atol=1e-5)


@CASES
@pytest.mark.parametrize("scale", [0.03, 1.0, 30.0])
def test_float32_error_is_that_of_rounding(run, reference, build, scale):
    inputs = build(batch=1, tokens=300)
    inputs[1] = inputs[1] * scale
    expected, _ = reference(*inputs)
    output, _ = run(*[tensor.float() for tensor in inputs])
    assert (output - expected).norm() < 4e-7 * expected.norm()


@CASES
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_saturated_decays_stay_finite_with_their_gradients(run, reference, build, starts, scale):
    inputs = [tensor.float() for tensor in build()]
    inputs[1] *= scale
    inputs = [tensor.requires_grad_() for tensor in inputs]
    output, state = run(*inputs, starts)
    for gradient in torch.autograd.grad((output / scale).sum() + (state / scale).sum(), inputs):
        assert gradient.isfinite().all()


@CASES
def test_what_backward_keeps_is_linear_in_length_and_far_below_one_state_per_token(run, reference, build, monkeypatch):
    monkeypatch.undo()

    def kept(tokens):
        """Elements that were stored, each storage once."""
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
            return tensor

        inputs = [tensor.requires_grad_() for tensor in build(batch=1, tokens=tokens, states=64)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = sum(tensor.sum() for tensor in run(*inputs))  # alive until the storages are counted
        return sum(storages.values()) * (loss == loss).item(), inputs[0].numel()

    (short, _), (long, values) = kept(256), kept(512)
    assert long < 2.1 * short
    assert long < values * 64


def test_the_selective_scan_never_builds_a_tensor_of_all_states(monkeypatch):
    monkeypatch.undo()
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal biggest
            result = function(*arguments, **(options or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    biggest = max(biggest, tensor.numel())
            return result

    inputs = [tensor.requires_grad_() for tensor in selective_inputs(batch=1, tokens=512, channels=16, states=16)]
    with Watch():
        selective_scan(*inputs)[0].sum().backward()
    assert biggest <= 512 * 16
