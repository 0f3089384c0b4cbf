"""Memory as context: causal through every path, segments of each document, and a memory that moves between them."""

import random
from dataclasses import replace

import pytest
import torch
from mutants import break_own
from titans_cases import EXACT, HIDDEN, MEMORY, build, draw, mac_that_never_learns
from torch.testing import assert_close

from hybridlm import MIXERS
from hybridlm.modeling.cache_entries import fields_of
from hybridlm.modeling.stream import RowState, build_sequence
from hybridlm.testing.base import random_split

TOKENS = 19


def described(batch, tokens, rows=None, **given):
    rows = RowState.fresh(batch, torch.device("cpu")) if rows is None else rows
    sequence, _, rows = build_sequence(batch, tokens, torch.device("cpu"), rows, **given)
    sequence.use_cache = True
    return sequence, rows


def in_pieces(mixer, inputs, lengths, documents=None):
    """The output of calls of some lengths, and the last state."""
    state = rows = None
    outputs = []
    numbers = [None] * len(lengths) if documents is None else documents.split(lengths, dim=1)
    for piece, number in zip(inputs.split(lengths, dim=1), numbers, strict=True):
        sequence, rows = described(len(piece), piece.shape[1], rows, seq_idx=number)
        output, state = mixer(piece, state, sequence)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def test_no_token_reaches_what_comes_before_it_by_value_or_by_gradient():
    mixer, inputs = build("mac"), draw()
    expected = mixer(inputs)[0]
    for t in range(TOKENS):
        edited = inputs.clone()
        edited[:, t] += 1.0
        changed = (mixer(edited)[0] - expected).abs().amax((0, 2))
        assert not bool(changed[:t].any()), f"an edit of token {t} reached {changed[:t].nonzero().flatten().tolist()}"
        assert bool(changed[t])
        leaf = inputs.clone().requires_grad_()
        (found,) = torch.autograd.grad(mixer(leaf)[0][:, t].square().sum(), leaf)
        assert not bool(found[:, t + 1 :].any()), f"the gradient of token {t} reaches later ones"


@pytest.mark.parametrize("leak", ["context_prefix", "memory_before_segment"])
def test_the_two_leaks_of_the_formula_as_printed_would_be_seen(leak, monkeypatch):
    part = MIXERS["titans_mac"]
    for name in ("visible", "_learn"):  # as they are, so that they come back
        monkeypatch.setattr(part, name, part.__dict__[name])
    break_own("titans_mac", leak)
    with pytest.raises(AssertionError, match="reache"):
        test_no_token_reaches_what_comes_before_it_by_value_or_by_gradient()


@pytest.mark.parametrize("attention_residual", [True, False])
@pytest.mark.parametrize("num_persistent", [0, 3])
@pytest.mark.parametrize("segment_size", [1, 4, 7])
def test_without_learning_it_is_attention_in_segments_to_tokens_and_what_the_initial_memory_says(
    segment_size, num_persistent, attention_residual
):
    options = {"segment_size": segment_size, "num_persistent": num_persistent}
    options["attention_residual"] = attention_residual
    mixer, inputs = build("mac", {"max_learning_rate": 0.0}, **options), draw()
    assert_close(mixer(inputs)[0], mac_that_never_learns(mixer, inputs), **EXACT)


def test_in_one_long_segment_it_is_causal_attention_however_fast_the_memory_learns():
    for rate in (0.0, 5.0):
        mixer, inputs = build("mac", {"max_learning_rate": rate}, segment_size=TOKENS + 1), draw()
        assert_close(mixer(inputs)[0], mac_that_never_learns(mixer, inputs), **EXACT)


def test_the_second_segment_reads_a_memory_that_the_first_one_changed_and_the_first_does_not():
    inputs = draw()
    taught, fixed = (build("mac", {"max_learning_rate": rate})(inputs)[0] for rate in (2.0, 0.0))
    assert_close(taught[:, :4], fixed[:, :4], **EXACT)
    assert bool(((taught - fixed)[:, 4:].abs().amax((0, 2)) > 1e-4).all())


def test_a_full_segment_trains_the_memory_on_what_attention_said_by_one_step_of_descent():
    mixer = build("mac", {"momentum": False, "forgetting": False, "max_gradient": None, "max_curvature": None})
    inputs, seen, associate = draw(1, 4), [], mixer.memory.associate
    mixer.memory.associate = lambda *given: seen.append(associate(*given)) or seen[-1]
    _, state = mixer(inputs)
    ((_, tokens),) = seen
    keys, values, theta = tokens.split([4, 4, 3], dim=-1)
    weights = [w[None].detach().requires_grad_() for w in mixer.network.initial]
    prediction = mixer.network.read(weights, keys.transpose(1, 2)).transpose(1, 2)
    loss = (theta[..., 0] * (prediction - values).square().sum(-1)).sum()
    found = torch.autograd.grad(loss, weights, retain_graph=True)
    assert_close(state.memory, -torch.cat([g.flatten(2) for g in found], dim=-1), **EXACT)


@pytest.mark.parametrize("seed", range(8))
def test_any_split_also_inside_a_segment_gives_the_same(seed):
    rng, inputs = random.Random(seed), draw(2, 29)
    mixer = build("mac", segment_size=rng.choice([2, 3, 5, 8]), num_persistent=seed % 3)
    expected, truth = mixer(inputs)
    actual, state = in_pieces(mixer, inputs, random_split(rng, 29, 11))
    assert_close(actual, expected, **EXACT)
    for name, value in fields_of(truth).items():
        assert_close(getattr(state, name), value, **EXACT)


@pytest.mark.parametrize("seed", range(4))
def test_segments_are_counted_from_the_start_of_each_document_of_each_row(seed):
    rng, mixer, inputs = random.Random(seed), build("mac"), draw(2, 25)
    documents = torch.stack(
        [torch.repeat_interleave(torch.arange(len(cuts)), torch.tensor(cuts)) for cuts in ([3, 9, 1, 12], [6, 2, 17])]
    )
    packed, state = in_pieces(mixer, inputs, random_split(rng, 25, 9), documents)
    for b in range(2):
        alone = []
        for number in documents[b].unique():
            output, last = mixer(inputs[b : b + 1, documents[b] == number])
            alone.append(output)
        assert_close(packed[b : b + 1], torch.cat(alone, dim=1), **EXACT)
        for name, value in fields_of(last).items():
            assert_close(getattr(state, name)[b : b + 1], value, **EXACT)
    assert (packed - mixer(inputs)[0]).abs().max() > 1e-3  # borders matter


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_reaches_all_segments_and_from_memory_to_memory_only_if_it_is_not_detached(detach):
    mixer = build("mac", {"detach_memory": detach, "conv_kernel": 1})
    inputs = draw(1, 12).requires_grad_()
    (found,) = torch.autograd.grad(mixer(inputs)[0][:, 8:].square().sum(), inputs)
    assert bool((found[0].abs().amax(-1) > 1e-9).all())
    torch.nn.init.zeros_(mixer.memory.out_proj.weight)  # nothing is read any more: only the memory itself goes on
    _, rows = described(1, 4)
    state = mixer(inputs[:, :4])[1]
    before = state.memory.detach().requires_grad_()
    _, after = mixer(inputs[:, 4:8], replace(state, memory=before), described(1, 4, rows)[0])
    (found,) = torch.autograd.grad(after.memory.square().sum(), before)
    assert bool(found.any()) != detach


def test_a_detached_memory_gives_the_same_numbers():
    inputs = draw()
    first, second = (build("mac", {"detach_memory": detach})(inputs)[0] for detach in (False, True))
    assert torch.equal(first, second)


def test_the_gradient_of_a_few_segments_is_that_of_finite_differences():
    mixer = build("mac", segment_size=2)
    inputs = draw(1, 5).requires_grad_()
    names = [
        "attention.persistent_keys",
        "memory.gates.proj.bias",
        "memory.scan.network.initial_1",
        "query_conv.weight",
    ]
    parameters = [mixer.get_parameter(name) for name in names]

    def run(inputs, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (inputs,))[0]

    torch.autograd.gradcheck(run, (inputs, *parameters), atol=1e-7, rtol=1e-5)


def test_a_document_shorter_than_a_segment_leaves_no_parameter_without_a_gradient():
    mixer = build("mac")
    mixer(draw(2, 3))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in mixer.parameters())
    assert not bool(mixer.memory.gates.proj.weight.grad.any())


def test_the_chunk_of_the_memory_is_the_segment():
    assert build("mac", segment_size=6).memory.chunk_size == 6
    assert build("mac", {"chunk_size": 6}, segment_size=6).memory.chunk_size == 6
    with pytest.raises(ValueError, match="memory.chunk_size=5 must be null or segment_size=6"):
        MIXERS["titans_mac"](HIDDEN, segment_size=6, memory=MEMORY | {"chunk_size": 5})
