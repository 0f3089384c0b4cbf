"""What the layer and the cache rely on in every mixer and channel mixer, whatever its options.

A part is fed here as the model feeds it: real tokens first in every row, pads last, state handed on from call to call.
"""

import dataclasses
import inspect
import math
import typing

import pytest
import torch
from torch import nn
from variants import CHANNEL_VARIANTS, MIXER_VARIANTS, SMALL

from hybridlm import CHANNEL_MIXERS, MIXERS
from hybridlm.modeling.cache_entries import KeyValueStore, RecurrentEntry, fields_of
from hybridlm.modeling.registry import NORMS, RESIDUALS, SPANS, options_of
from hybridlm.modeling.stream import RowState, build_sequence
from hybridlm.testing import relative_error, scale_weights
from hybridlm.testing.base import gradient_error

HIDDEN, BATCH = 16, 3
EXACT = 1e-9
# three calls: real tokens of each row, and the number of each column's document
CALLS = [
    ([5, 2, 7], [0, 0, 0, 1, 1, 2, 2]),
    ([1, 0, 1], [2]),
    ([6, 9, 0], [2, 2, 3, 3, 4, 4, 4, 4, 4]),
]


def build(table, spec):
    options = {key: value for key, value in spec.items() if key != "name"}
    hidden_size = HIDDEN if spec["name"] in SMALL else 64
    part = table[spec["name"]](hidden_size, **options)
    part.hidden = hidden_size
    return scale_weights(part).double().eval()


@pytest.fixture(params=MIXER_VARIANTS)
def mixer(request):
    return build(MIXERS, MIXER_VARIANTS[request.param])


@pytest.fixture(params=CHANNEL_VARIANTS)
def channel(request):
    return build(CHANNEL_MIXERS, CHANNEL_VARIANTS[request.param])


def first_state(part):
    """What the cache hands to a part before the first token; attention over everything gets a store to fill."""
    if getattr(part, "window", 0) is not None:
        return None
    return KeyValueStore(convolution=None if getattr(part, "conv1d", None) is None else RecurrentEntry())


def draw(part, *shape, dtype=torch.float64):
    return torch.randn(*shape, part.hidden, dtype=dtype)


class Feeder:
    """Calls of one stream, with the state handed on."""

    def __init__(self, part, batch=BATCH, reference=False):
        self.run = part.forward_reference if reference else part.forward
        self.state = None if reference else first_state(part)
        self.rows = RowState.fresh(batch, torch.device("cpu"))
        self.sequence = None

    def __call__(self, hidden_states, lengths=None, documents=None):
        batch, length = hidden_states.shape[:2]
        real = None
        if lengths is not None:
            real = torch.arange(length) < torch.tensor(lengths)[:, None]
        seq_idx = None if documents is None else torch.tensor([documents])
        device = hidden_states.device
        self.sequence, _, self.rows = build_sequence(batch, length, device, self.rows, real=real, seq_idx=seq_idx)
        self.sequence.use_cache = True
        hidden_states = hidden_states[:, : self.sequence.num_tokens]
        output, self.state = self.run(hidden_states, self.state, self.sequence)
        return output if real is None else output * real[:, : output.shape[1], None]


def feed_all(part, inputs, reference=False):
    """Outputs of `CALLS` at real tokens, flattened, and the last state."""
    feeder = Feeder(part, reference=reference)
    calls = zip(inputs, CALLS, strict=True)
    outputs = [feeder(hidden, lengths, documents).flatten() for hidden, (lengths, documents) in calls]
    return torch.cat(outputs), feeder.state


def draw_calls(part):
    return [draw(part, BATCH, len(documents)) for _, documents in CALLS]


def tensors(state):
    """The tensors of a state by name, at their live size."""
    if dataclasses.is_dataclass(state):
        return fields_of(state)
    if state is None:
        return {}
    return state.tensors() | ({} if state.convolution is None else state.convolution.tensors())


def test_forward_is_the_reference(mixer):
    inputs = draw_calls(mixer)
    actual, state = feed_all(mixer, inputs)
    expected, truth = feed_all(mixer, inputs, reference=True)
    assert relative_error(actual, expected) <= EXACT
    if dataclasses.is_dataclass(truth):
        for name, value in tensors(truth).items():
            assert relative_error(tensors(state)[name], value) <= EXACT, name


def test_gradients_are_those_of_the_reference(mixer):
    inputs = draw_calls(mixer)
    found = []
    for reference in (False, True):
        leaves = [hidden.clone().requires_grad_() for hidden in inputs]
        output, _ = feed_all(mixer, leaves, reference)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64)
        (output * weights).sum().backward()
        grads = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
        found.append(grads | {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)})
        mixer.zero_grad()
    assert gradient_error(*found) <= EXACT


def test_every_parameter_has_a_gradient(mixer):
    output, _ = feed_all(mixer, draw_calls(mixer))
    output.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert bool(torch.isfinite(parameter.grad).all()), name


def test_whatever_pads_hold_the_state_is_that_of_the_real_tokens(mixer):
    hidden, lengths = draw(mixer, BATCH, 6), [6, 3, 1]
    together = Feeder(mixer)
    together(hidden, lengths)
    other = Feeder(mixer)
    pads = torch.arange(6)[None, :] >= torch.tensor(lengths)[:, None]
    other(torch.where(pads[..., None], 1e6, hidden), lengths)
    for b, length in enumerate(lengths):
        alone = Feeder(mixer, batch=1)
        alone(hidden[b : b + 1, :length])
        for name, value in tensors(alone.state).items():
            for feeder in (together, other):
                row = tensors(feeder.state)[name][b : b + 1]
                row = row[:, :, : value.shape[2]] if name in ("keys", "values") else row  # slots of other rows' tokens
                assert relative_error(row, value) <= EXACT, f"{name} of row {b}"


def test_a_row_without_tokens_keeps_its_state_and_gives_numbers(mixer):
    feeder = Feeder(mixer)
    feeder(draw(mixer, BATCH, 5))
    before = {name: value.clone() for name, value in tensors(feeder.state).items()}
    hidden = draw(mixer, BATCH, 4)
    batch, length = hidden.shape[:2]
    real = torch.arange(length) < torch.tensor([4, 0, 2])[:, None]
    sequence, _, _ = build_sequence(batch, length, hidden.device, feeder.rows, real=real)
    sequence.use_cache = True
    output, after = feeder.run(hidden, feeder.state, sequence)
    assert bool(torch.isfinite(output).all())
    for name, value in before.items():
        kept = tensors(after)[name][1]
        assert torch.equal(kept[:, : value.shape[2]] if name in ("keys", "values") else kept, value[1]), name


def test_the_given_state_is_not_changed(mixer):
    feeder = Feeder(mixer)
    feeder(draw(mixer, BATCH, 5))
    if not dataclasses.is_dataclass(feeder.state):
        pytest.skip("a key-value store grows in place")
    given, before = feeder.state, {name: value.clone() for name, value in tensors(feeder.state).items()}
    feeder(draw(mixer, BATCH, 4), [4, 0, 2], [0, 1, 1, 1])
    for name, value in before.items():
        assert torch.equal(tensors(given)[name], value), name


def test_a_document_that_begins_forgets_everything(mixer):
    feeder, fresh, hidden = Feeder(mixer), Feeder(mixer), draw(mixer, BATCH, 6)
    feeder(draw(mixer, BATCH, 7), documents=[0] * 7)
    again = feeder(hidden, documents=[1] * 6)
    assert relative_error(again, fresh(hidden)) <= EXACT


def test_the_tensors_of_a_state_share_no_memory(mixer):
    feeder = Feeder(mixer)
    for length in (1, 9):
        feeder(draw(mixer, BATCH, length))
        places = [value.untyped_storage().data_ptr() for value in tensors(feeder.state).values() if value.numel()]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_state_is_as_specified(mixer, dtype):
    mixer = mixer.float().to(dtype) if dtype != torch.float64 else mixer
    feeder, num_tokens = Feeder(mixer, batch=2), 0
    for length in (3, 1, 9):
        num_tokens += length
        output = feeder(draw(mixer, 2, length, dtype=dtype))
        assert output.dtype == dtype
        built = {name: (tuple(value.shape[1:]), value.dtype) for name, value in tensors(feeder.state).items()}
        assert built == mixer.state_spec(num_tokens, dtype)
        assert mixer.state_size(num_tokens) == sum(math.prod(shape) for shape, _ in built.values())


def test_autocast_leaves_recurrences_alone(mixer):
    mixer = mixer.float()
    hidden = draw(mixer, BATCH, 9, dtype=torch.float32)
    plain, cast = Feeder(mixer), Feeder(mixer)
    expected = plain(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = cast(hidden)
    difference = (actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert difference < 0.05
    for name, value in tensors(cast.state).items():
        assert name in ("keys", "values", "conv_states") or value.dtype == torch.float32, name


def test_modules_that_quantizers_must_leave_alone_are_there(mixer):
    for name in getattr(mixer, "full_precision", ()):
        assert isinstance(mixer.get_submodule(name), nn.Linear), name


def test_a_plain_call_needs_neither_state_nor_sequence(mixer):
    hidden = draw(mixer, BATCH, 9)
    assert relative_error(mixer(hidden)[0], Feeder(mixer)(hidden)) <= EXACT


def test_initialisation_sets_every_parameter_after_an_empty_load(mixer):
    with torch.no_grad():
        for tensor in [*mixer.parameters(), *mixer.buffers()]:
            tensor.fill_(math.nan)
        for module in mixer.modules():  # children first does not matter, the part last does
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        for module in reversed(list(mixer.modules())):
            if hasattr(module, "init_weights"):
                module.init_weights(0.02)
    for name, tensor in [*mixer.named_parameters(), *mixer.named_buffers()]:
        assert bool(torch.isfinite(tensor).all()), name
    assert bool(torch.isfinite(mixer(draw(mixer, 1, 5))[0]).all())


def with_ids(hidden):
    """The call of `[B, T, D]` with a token id for each place, which hash routing reads."""
    batch, length, _ = hidden.shape
    sequence, _, _ = build_sequence(batch, length, hidden.device, RowState.fresh(batch, hidden.device))
    sequence.token_ids = torch.arange(batch * length).view(batch, length)
    return sequence


def test_a_channel_mixer_is_its_reference_and_keeps_no_state(channel):
    hidden = draw(channel, BATCH, 7)
    sequence = with_ids(hidden)
    output, state = channel(hidden, None, sequence)
    assert state is None
    assert channel.state_spec(9, torch.float32) == {}
    assert channel.state_size(9) == 0
    assert relative_error(output, channel.forward_reference(hidden, None, sequence)[0]) <= EXACT


def test_a_channel_mixer_looks_at_one_token_at_a_time(channel):
    hidden = draw(channel, BATCH, 7)
    edited = hidden.clone()
    edited[:, 3] = math.nan  # not even a number that is no number may leak
    others, sequence = [0, 1, 2, 4, 5, 6], with_ids(hidden)
    expected = channel(hidden, None, sequence)[0][:, others]
    assert relative_error(channel(edited, None, sequence)[0][:, others], expected) <= EXACT


def test_a_channel_mixer_keeps_the_type(channel):
    channel = channel.float().bfloat16()
    hidden = draw(channel, 2, 5, dtype=torch.bfloat16)
    assert channel(hidden, None, with_ids(hidden))[0].dtype == torch.bfloat16


TABLES = {"mixer": MIXERS, "channel_mixer": CHANNEL_MIXERS, "norm": NORMS, "residual": RESIDUALS, "span": SPANS}
PARTS = [pytest.param(part, id=f"{kind}-{name}") for kind, table in TABLES.items() for name, part in table.items()]


@pytest.mark.parametrize("part", PARTS)
def test_options_are_keywords_with_defaults_types_and_a_line_of_documentation(part):
    parameters = list(inspect.signature(part.__init__).parameters.values())[1:]
    assert parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, "the first argument is the width"
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[1:])
    hints, documented = typing.get_type_hints(part.__init__), inspect.getdoc(part)
    for name, parameter in options_of(part).items():
        assert parameter.default is not parameter.empty, f"{name} has no default"
        assert name in hints, f"{name} has no type"
        assert f"    {name}:" in documented, f"{name} is not documented"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_works_with_its_defaults(part):
    built = part(64)
    if part in MIXERS.values() or part in CHANNEL_MIXERS.values():
        assert built(torch.randn(2, 3, 64))[0].shape == (2, 3, 64)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_is_documented_with_its_paper(name):
    assert "Reference: " in inspect.getdoc(inspect.getmodule(MIXERS[name]))
