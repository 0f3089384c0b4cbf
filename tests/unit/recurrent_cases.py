"""What every mixer with a short convolution and a recurrence promises; the test files of the mixers inherit it.

Everything is float64 where not said otherwise, and every case is so scaled that the state matters.
"""

import pytest
import torch
from torch.testing import assert_close

from hybridlm.modeling.masks import SequenceInfo
from hybridlm.modeling.recurrent import RecurrentState

HIDDEN, TOKENS = 12, 45
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def describe(lengths=None, starts=None, num_tokens=TOKENS, batch=1):
    """The call's `SequenceInfo`: real tokens of each row, and the positions where each row's documents begin."""
    lengths = None if lengths is None else torch.tensor(lengths)
    batch = batch if lengths is None else len(lengths)
    mask = None if lengths is None else torch.arange(num_tokens) < lengths[:, None]
    flags, segment_ids = None, None
    if starts is not None:
        flags = torch.zeros(batch, num_tokens, dtype=torch.bool)
        for row, begin in enumerate(starts):
            flags[row, begin] = True
        segment_ids = flags.long().cumsum(1)
    index = torch.arange(num_tokens)[None]
    return SequenceInfo(num_tokens, index, index, mask, lengths, flags, segment_ids)


def rows(state, picked):
    return RecurrentState(state.conv_states[picked], state.recurrent_states[picked])


def assert_states_close(actual, expected, **tolerance):
    assert_close(actual.conv_states, expected.conv_states, **(tolerance or EXACT))
    assert_close(actual.recurrent_states, expected.recurrent_states, **(tolerance or EXACT))


class RecurrentMixerCases:
    """Inherit and give `build(**options)`."""

    @staticmethod
    def build(**options):
        raise NotImplementedError

    @pytest.fixture
    def mixer(self):
        mixer = self.build().double()
        with torch.no_grad():
            for name, parameter in mixer.named_parameters():
                if name.endswith("_proj.weight"):
                    parameter.normal_(std=0.4)
            mixer.dt_bias.uniform_(-3.0, 0.0)
            mixer.D.normal_()
        return mixer

    def random_state(self, mixer, batch):
        spec = mixer.state_spec(0, torch.float64)
        return RecurrentState(
            **{name: torch.randn(batch, *shape, dtype=dtype) for name, (shape, dtype) in spec.items()}
        )

    def test_the_scan_equals_the_token_loop_with_its_gradients(self, mixer):
        hidden_states = torch.randn(4, TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
        state = self.random_state(mixer, 4)
        sequence = describe([TOKENS, 7, 0, 40], [[0, 2, 33], [6], [], [32, 39]])
        inputs = [hidden_states, state.conv_states, state.recurrent_states, *mixer.parameters()]
        results = []
        for run in (mixer.forward, mixer.forward_reference):
            state.conv_states.requires_grad_()
            state.recurrent_states.requires_grad_()
            output, after = run(hidden_states, state, sequence)
            output = output[sequence.token_mask]
            loss = output.sin().sum() + after.recurrent_states.sin().sum() + after.conv_states.sin().sum()
            results.append([output, after.conv_states, after.recurrent_states, *torch.autograd.grad(loss, inputs)])
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected, **EXACT)

    @pytest.mark.parametrize("sizes", [[1] * TOKENS, [33, 1, 1, 10], [2, 3, 31, 8, 1], [44, 1]], ids=str)
    def test_any_split_equals_the_whole(self, mixer, sizes):
        hidden_states = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
        expected, last = mixer(hidden_states)
        outputs, state = [], None
        for piece in hidden_states.split(sizes, dim=1):
            output, state = mixer(piece, state)
            outputs.append(output)
        assert_close(torch.cat(outputs, dim=1), expected, **EXACT)
        assert_states_close(state, last)

    def test_the_given_state_matters_and_is_not_modified(self, mixer):
        hidden_states = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
        for part in ("conv_states", "recurrent_states"):
            for size in (1, 3, TOKENS):
                state = self.random_state(mixer, 2)
                kept = RecurrentState(state.conv_states.clone(), state.recurrent_states.clone())
                with_state, _ = mixer(hidden_states[:, :size], state)
                assert_states_close(state, kept, rtol=0, atol=0)
                setattr(state, part, torch.zeros_like(getattr(state, part)))
                without, _ = mixer(hidden_states[:, :size], state)
                assert (with_state - without).abs().max() > 0.01 * with_state.abs().max()

    @pytest.mark.parametrize("borders", [[0, 20], [1, 2, 3, 44], [31, 32, 33]], ids=str)
    @pytest.mark.parametrize("cut", [None, 20, 21, 34])
    def test_packed_documents_equal_separate_ones_with_their_gradients(self, mixer, borders, cut):
        packed = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
        edges = sorted({0, *borders, TOKENS})
        separate = [
            mixer(document) for document in packed.split([b - a for a, b in zip(edges, edges[1:], strict=False)], 1)
        ]
        expected = torch.cat([output for output, _ in separate], dim=1)
        starts = describe(starts=[borders]).starts
        outputs, state = [], None
        for piece, flags in zip(packed.tensor_split([cut or 0], 1), starts.tensor_split([cut or 0], 1), strict=True):
            if piece.shape[1]:
                sequence = describe(starts=[flags[0].nonzero()[:, 0].tolist()], num_tokens=piece.shape[1])
                output, state = mixer(piece, state, sequence)
                outputs.append(output)
        actual = torch.cat(outputs, dim=1)
        assert_close(actual, expected, **EXACT)
        assert_states_close(state, separate[-1][1])
        weight = torch.randn_like(expected)
        parameters = [packed, *mixer.parameters()]
        gradients = [torch.autograd.grad((weight * output).sum(), parameters) for output in (actual, expected)]
        for got, wanted in zip(*gradients, strict=True):
            assert_close(got, wanted, **EXACT)

    def test_a_start_in_a_single_token_call_forgets_the_past(self, mixer):
        hidden_states = torch.randn(2, 1, HIDDEN, dtype=torch.float64)
        state = self.random_state(mixer, 2)
        output, after = mixer(hidden_states, state, describe(starts=[[0], []], num_tokens=1, batch=2))
        fresh, fresh_state = mixer(hidden_states[:1])
        going_on, going_on_state = mixer(hidden_states[1:], rows(state, slice(1, 2)))
        assert_close(output, torch.cat([fresh, going_on]), **EXACT)
        assert_states_close(rows(after, [0]), fresh_state)
        assert_states_close(rows(after, [1]), going_on_state)

    def test_pads_at_the_end_of_a_row_change_nothing(self, mixer):
        lengths = [TOKENS, 33, 2, 1, 0]
        hidden_states = torch.randn(5, TOKENS, HIDDEN, dtype=torch.float64)
        for state in (None, self.random_state(mixer, 5)):
            output, after = mixer(hidden_states, state, describe(lengths))
            assert output.isfinite().all()
            for row, length in enumerate(lengths):
                before = None if state is None else rows(state, [row])
                if length == 0:
                    before = before or RecurrentState(after.conv_states[[row]] * 0, after.recurrent_states[[row]] * 0)
                    assert_states_close(rows(after, [row]), before, rtol=0, atol=0)
                    continue
                expected, last = mixer(hidden_states[[row], :length], before)
                assert_close(output[[row], :length], expected, **EXACT)
                assert_states_close(rows(after, [row]), last)

    def test_a_single_pad_leaves_the_state_alone(self, mixer):
        state = self.random_state(mixer, 2)
        hidden_states = torch.randn(2, 1, HIDDEN, dtype=torch.float64)
        _, after = mixer(hidden_states, state, describe([0, 1], num_tokens=1))
        assert_states_close(rows(after, [0]), rows(state, [0]), rtol=0, atol=0)
        assert (after.recurrent_states[1] - state.recurrent_states[1]).abs().max() > 1e-3

    def test_no_gradient_flows_from_the_past_to_the_future(self, mixer):
        hidden_states = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
        output, _ = mixer(hidden_states)
        (gradient,) = torch.autograd.grad(output[:, 20].sin().sum(), hidden_states)
        assert (gradient[:, 21:] == 0).all()
        assert (gradient[:, :21].abs().amax(-1) > 0).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_decays_and_state_stay_float32_in_a_half_precision_model(self, dtype):
        mixer = self.build()
        wide = {name: parameter.clone() for name, parameter in mixer.named_parameters()}
        mixer = mixer.to(dtype)
        for name in ("A_log", "D", "dt_bias"):
            assert_close(getattr(mixer, name), wide[name], rtol=0, atol=0)
        with torch.no_grad():
            output, state = mixer(torch.randn(1, 16384, HIDDEN, dtype=dtype))
        assert output.dtype == dtype
        assert output.isfinite().all()
        assert state.recurrent_states.isfinite().all()
        for name, (shape, kind) in mixer.state_spec(16384, dtype).items():
            assert getattr(state, name).shape == (1, *shape)
            assert getattr(state, name).dtype == kind

    def test_a_model_built_in_bfloat16_keeps_its_decays_in_float32(self):
        torch.set_default_dtype(torch.bfloat16)
        try:
            mixer = self.build()
        finally:
            torch.set_default_dtype(torch.float32)
        assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_bias.dtype} == {torch.float32}
        assert mixer.out_proj.weight.dtype == torch.bfloat16

    def test_autocast_leaves_the_recurrence_in_float32(self):
        mixer = self.build()
        hidden_states = torch.randn(1, 40, HIDDEN)
        with torch.autocast("cpu", torch.bfloat16):
            output, state = mixer(hidden_states)
            output.float().sum().backward()
        assert state.recurrent_states.dtype == torch.float32
        assert state.conv_states.dtype == torch.float32
        assert_close(output.float(), mixer(hidden_states)[0], rtol=0.1, atol=0.05)
        assert mixer.A_log.grad.isfinite().all()

    @pytest.mark.parametrize("bias", [-200.0, 30.0, 3e4])
    def test_saturated_step_sizes_stay_finite_with_their_gradients(self, bias):
        mixer = self.build()
        torch.nn.init.constant_(mixer.dt_bias, bias)
        output, state = mixer(torch.randn(2, TOKENS, HIDDEN), None, describe(starts=[[3], [0, 35]], batch=2))
        (output.sum() + state.recurrent_states.sum()).backward()
        assert output.isfinite().all()
        for name, parameter in mixer.named_parameters():
            assert parameter.grad.isfinite().all(), name

    def test_float32_equals_float64(self, mixer):
        hidden_states = torch.randn(3, TOKENS, HIDDEN, dtype=torch.float64)
        expected, last = mixer(hidden_states, None, describe([TOKENS, 30, 1]))
        output, state = mixer.float()(hidden_states.float(), None, describe([TOKENS, 30, 1]))
        scale = expected[0].abs().max().item()
        assert_close(output[0].double(), expected[0], rtol=0, atol=1e-5 * scale)
        assert_states_close(
            state, RecurrentState(last.conv_states.float(), last.recurrent_states.float()), rtol=1e-4, atol=1e-4
        )

    def test_a_step_compiles_without_a_graph_break(self, mixer):
        hidden_states = torch.randn(2, 1, HIDDEN, dtype=torch.float64)
        state = self.random_state(mixer, 2)
        step = torch.compile(mixer, backend="eager", fullgraph=True)
        with torch.no_grad():
            for sequence in (None, describe([1, 0], num_tokens=1)):
                output, after = step(hidden_states, state, sequence)
                expected, last = mixer(hidden_states, state, sequence)
                assert_close(output[:1], expected[:1], **EXACT)
                assert_states_close(after, last)

    def test_every_layer_inside_is_called_so_that_lora_and_offloading_reach_it(self, mixer):
        leaves = {
            name for name, module in mixer.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv1d)
        }
        called = set()
        for name in leaves:
            mixer.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        mixer(torch.randn(1, 3, HIDDEN, dtype=torch.float64))
        assert called == leaves

    def test_initial_values_are_the_published_ones_also_after_a_meta_load(self):
        with torch.device("meta"):
            mixer = self.build()
        mixer = mixer.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.fill_(torch.nan)
        mixer.init_weights(0.02)
        step_size = torch.nn.functional.softplus(mixer.dt_bias)
        assert (step_size > 0.99e-3).all()
        assert (step_size < 0.101).all()
        assert (mixer.D == 1).all()
        rate = mixer.A_log.exp()
        assert (rate > 0.999).all()
        assert (rate < 16.001).all()
        assert mixer.conv1d.weight.abs().max() <= 0.5
        mixer.dt_bias._is_hf_initialized = True
        kept = mixer.dt_bias.detach().clone()
        mixer.init_weights(0.02)
        assert_close(mixer.dt_bias.detach(), kept, rtol=0, atol=0)

    def test_state_size_counts_the_state(self, mixer):
        _, state = mixer(torch.randn(1, 5, HIDDEN, dtype=torch.float64))
        assert mixer.state_size(5) == state.conv_states.numel() + state.recurrent_states.numel()

    @pytest.mark.parametrize("width", [1, 2])
    def test_narrow_convolutions_keep_the_promises(self, width):
        mixer = self.build(conv_kernel=width).double()
        hidden_states = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
        sequence = describe([9, 4], [[5], [2]], num_tokens=9)
        output, state = mixer(hidden_states, None, sequence)
        expected, last = mixer.forward_reference(hidden_states, None, sequence)
        assert_close(output[sequence.token_mask], expected[sequence.token_mask], **EXACT)
        assert_states_close(state, last)
