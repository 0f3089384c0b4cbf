"""Transformer-XL: segments of each document, their memory, and scores by distance."""

import math

import pytest
import torch
from torch.testing import assert_close

from hybridlm.analysis.flops import OperationCounter, mixing_flops, prefill_flops, product_flops, step_flops
from hybridlm.modeling.lookback import BLOCKS
from hybridlm.modeling.mixer_transformer_xl import TransformerXLMixer, rel_shift, sinusoids
from hybridlm.modeling.stream import RowState, build_sequence
from hybridlm.testing import scale_weights

HIDDEN, HEADS, WIDTH = 12, 3, 4
EXACT = {"rtol": 0, "atol": 1e-10}


def build(**options):
    options = {"num_heads": HEADS, "segment_size": 4, "memory_size": 3} | options
    return scale_weights(TransformerXLMixer(HIDDEN, **options)).double().eval()


def draw(batch, length):
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64)


def encoding(distance):
    """R_d of the paper, `[D]`."""
    angles = [distance / 10000 ** (i / HIDDEN) for i in range(0, HIDDEN, 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def segment_loop(mixer, hidden):
    """The paper's recurrence for one document `[T, D]`: segments in turn, keys and values from [memory; segment]."""

    def heads(projection, states):
        return projection(states).view(-1, HEADS, WIDTH)

    outputs, size, memory = [], mixer.segment_size, hidden[:0]
    for segment in hidden.split(size):
        context = torch.cat([memory, segment])
        query, key, value = heads(mixer.q_proj, segment), heads(mixer.k_proj, context), heads(mixer.v_proj, context)
        for i in range(len(segment)):
            me, mixed = len(memory) + i, []
            for h in range(HEADS):
                scores = []
                for j in range(me + 1):
                    content = (query[i, h] + mixer.content_bias[h]) @ key[j, h]
                    place = (query[i, h] + mixer.position_bias[h]) @ (mixer.r_weight[h] @ encoding(me - j))
                    scores.append((content + place) / math.sqrt(WIDTH))
                mixed.append(torch.stack(scores).softmax(0) @ value[: me + 1, h])
            outputs.append(mixer.o_proj(torch.cat(mixed)))
        memory = context[max(len(context) - mixer.memory_size, 0) :]
    return torch.stack(outputs)


def calls(mixer, hidden, sizes, documents=None):
    """Feed `[B, T, D]` in calls of the given sizes."""
    rows, state, outputs = RowState.fresh(hidden.shape[0], hidden.device), None, []
    documents = torch.zeros(hidden.shape[:2]) if documents is None else torch.tensor(documents)
    for piece, ids in zip(hidden.split(sizes, 1), documents.split(sizes, 1), strict=True):
        sequence, _, rows = build_sequence(len(hidden), piece.shape[1], hidden.device, rows, seq_idx=ids)
        sequence.use_cache = True
        output, state = mixer(piece, state, sequence)
        outputs.append(output)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(("queries", "columns"), [(1, 1), (1, 6), (3, 3), (4, 7), (5, 30)])
def test_rel_shift_equals_a_gather(queries, columns):
    by_distance = torch.randn(2, 3, queries, columns)
    shifted = rel_shift(by_distance)
    for t in range(queries):
        own = columns - queries + t
        for column in range(own + 1):
            assert torch.equal(shifted[..., t, column], by_distance[..., t, columns - 1 - (own - column)])


def test_without_memory_a_segment_is_causal_attention_with_relative_scores():
    mixer, hidden = build(segment_size=9, memory_size=0), draw(1, 9)
    query, key, value = (p(hidden[0]).view(9, HEADS, WIDTH) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    distance = torch.arange(9)[:, None] - torch.arange(9)
    encoded = torch.stack([torch.stack([encoding(int(d)) for d in row]) for row in distance.clamp(min=0)])
    scores = torch.einsum("ihk,jhk->hij", query + mixer.content_bias, key)
    scores = scores + torch.einsum("ihk,hkd,ijd->hij", query + mixer.position_bias, mixer.r_weight, encoded)
    weights = (scores / math.sqrt(WIDTH)).masked_fill(distance < 0, -math.inf).softmax(-1)
    expected = mixer.o_proj(torch.einsum("hij,jhk->ihk", weights, value).flatten(1))
    assert_close(mixer(hidden)[0][0], expected, **EXACT)


@pytest.mark.parametrize(("segment", "memory"), [(4, 4), (4, 3), (3, 8), (5, 0), (1, 4)])
def test_it_is_the_paper_s_loop_over_segments(segment, memory):
    mixer, hidden = build(segment_size=segment, memory_size=memory), draw(1, 17)
    assert_close(mixer(hidden)[0][0], segment_loop(mixer, hidden[0]), **EXACT)


@pytest.mark.parametrize("sizes", [[1] * 17, [5, 1, 11], [3, 14]], ids=str)
def test_segments_follow_the_document_and_not_the_call(sizes):
    mixer, hidden = build(), draw(2, 17)
    documents = [[0] * 6 + [1] * 11, [0] * 17]
    output = calls(mixer, hidden, sizes, documents)
    apart = torch.cat([segment_loop(mixer, hidden[0, :6]), segment_loop(mixer, hidden[0, 6:])])
    assert_close(output[0], apart, **EXACT)
    assert_close(output[1], segment_loop(mixer, hidden[1]), **EXACT)


def test_blocks_of_queries_change_nothing():
    length = 2 * BLOCKS[0] + 40
    mixer, hidden = build(segment_size=7, memory_size=30), draw(2, length)
    assert_close(mixer(hidden)[0], mixer.forward_reference(hidden)[0], **EXACT)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1] * 12], ids=str)
def test_the_gradient_stops_exactly_at_the_border_of_the_segment(sizes):
    mixer, hidden = build(segment_size=4, memory_size=4), draw(1, 12).requires_grad_()
    for token in range(12):
        output = calls(mixer, hidden, sizes)
        (gradient,) = torch.autograd.grad(output[:, token].sin().sum(), hidden)
        reached = (gradient[0].abs().amax(-1) > 0).nonzero().flatten().tolist()
        assert reached == list(range(token // 4 * 4, token + 1))


def test_without_detaching_the_gradient_reaches_all_of_the_memory():
    mixer, hidden = build(memory_size=3, detach_memory=False), draw(1, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(hidden)[0][:, 9].sin().sum(), hidden)
    assert (gradient[0].abs().amax(-1) > 0).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


def test_the_memory_moves_the_output_although_no_gradient_flows():
    mixer, hidden = build(), draw(1, 8)
    edited = hidden.clone()
    edited[:, 2] += 1.0
    assert (mixer(edited)[0] - mixer(hidden)[0])[:, 4:6].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_context_grows_by_the_memory_with_every_layer(depth):
    size, length = 3, 16
    layers, hidden = [build(segment_size=size, memory_size=size) for _ in range(depth)], draw(1, length)

    def run(states):
        for layer in layers:
            states = states + layer(states)[0]
        return states

    token = 12  # first of its segment: what it sees lies in memories alone
    expected = run(hidden)[:, token]
    moved = []
    for place in range(length):
        edited = hidden.clone()
        edited[:, place] += 1.0
        moved.append(bool((run(edited)[:, token] - expected).abs().max() > 1e-9))
    assert moved.index(True) == token - depth * size
    assert all(moved[token - depth * size : token + 1])
    assert not any(moved[token + 1 :])


def test_encodings_go_from_the_farthest_to_the_nearest():
    table = sinusoids(5, HIDDEN, torch.empty(0, dtype=torch.float64))
    for row, distance in enumerate(range(4, -1, -1)):
        assert_close(table[row], encoding(distance), **EXACT)


@pytest.mark.parametrize("options", [{}, {"memory_size": 9}, {"memory_size": 0}, {"segment_size": 1, "memory_size": 4}])
def test_the_planner_counts_what_the_reference_does(options):
    mixer = TransformerXLMixer(32, **{"num_heads": 4, "segment_size": 5, "memory_size": 5} | options)

    for length in (1, 7, 23):
        with torch.no_grad(), OperationCounter() as counter:
            mixer.forward_reference(torch.randn(1, length, 32))
        assert counter.products == length * product_flops(mixer) + prefill_flops("transformer_xl", mixer, length)
        assert prefill_flops("transformer_xl", mixer, length) == sum(
            mixing_flops("transformer_xl", mixer, t) for t in range(length)
        )


def test_the_planner_counts_a_step_from_a_full_memory():
    mixer = TransformerXLMixer(32, num_heads=4, segment_size=5, memory_size=6)
    past = 29  # the last token of a segment sees all that is remembered
    _, state = mixer(torch.randn(1, past, 32))
    rows = build_sequence(1, past, torch.device("cpu"), RowState.fresh(1, torch.device("cpu")))[2]
    sequence, _, _ = build_sequence(1, 1, torch.device("cpu"), rows)
    with torch.no_grad(), OperationCounter() as counter:
        mixer(torch.randn(1, 1, 32), state, sequence)
    assert counter.products == product_flops(mixer) + step_flops("transformer_xl", mixer, past)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide hidden_size=12"),
        ({"head_dim": 0}, "head_dim=0 must be positive"),
        ({"segment_size": 0}, "segment_size=0 must be at least 1"),
        ({"memory_size": -1}, "memory_size=-1 must be at least 0"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
