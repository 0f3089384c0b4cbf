"""Memorizing attention: what is in the store, what is found there, and how it is mixed with the window."""

import math

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hybridlm.analysis.flops import OperationCounter, mixing_flops, prefill_flops, product_flops, step_flops
from hybridlm.modeling.lookback import BLOCKS, MAX_SCORES
from hybridlm.modeling.mixer_attention import AttentionMixer
from hybridlm.modeling.mixer_memorizing import MemorizingMixer
from hybridlm.modeling.stream import RowState, build_sequence
from hybridlm.testing import scale_weights

HIDDEN, HEADS, GROUPS, WIDTH = 12, 6, 3, 2
SIZES = {"num_heads": HEADS, "num_kv_heads": GROUPS}
ROPE = {"name": "rope", "theta": 100.0}
EXACT = {"rtol": 0, "atol": 1e-10}


def build(**options):
    options = {"window": 3, "memory_size": 6, "top_k": 2, "position": ROPE} | SIZES | options
    mixer = scale_weights(MemorizingMixer(HIDDEN, **options)).double().eval()
    torch.nn.init.normal_(mixer.log_scale, mean=1.0)
    return mixer


def draw(batch, length):
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64)


def head_outputs(mixer, hidden, choose):
    """Outputs `[T, D]` of one document `[T, D]`; `choose` picks the keys of the store that a head of a token reads."""
    local = window_outputs(mixer, hidden)
    query, key, value = (p(hidden).unflatten(-1, (-1, WIDTH)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    query, key = normalize(query, dim=-1), normalize(key, dim=-1)
    outputs = []
    for t in range(len(hidden)):
        mixed = local[t].clone()
        for h in range(HEADS):
            group = h // (HEADS // GROUPS)
            similarity = {j: (query[t, h] @ key[j, group]).item() for j in range(t - mixer.window + 1) if j >= 0}
            chosen = choose(similarity, t)
            if chosen:
                scores = mixer.log_scale[h].exp() * (key[chosen, group] @ query[t, h])
                share = mixer.gate[h].sigmoid()
                mixed[h] = (1 - share) * local[t, h] + share * (scores.softmax(0) @ value[chosen, group])
        outputs.append(mixer.o_proj(mixed.flatten()))
    return torch.stack(outputs)


def window_outputs(mixer, hidden):
    """What the heads of the window read, `[T, H, K]`, from the attention mixer without its last projection."""
    twin, heads = windowed_twin(mixer), torch.eye(HEADS * WIDTH, dtype=torch.float64)
    twin.o_proj.weight = torch.nn.Parameter(heads)
    return twin(hidden[None])[0][0].unflatten(-1, (-1, WIDTH))


def windowed_twin(mixer):
    """The `attention` mixer with the same weights and window."""
    twin = AttentionMixer(HIDDEN, window=mixer.window, position=ROPE, **SIZES).double().eval()
    twin.load_state_dict({name: w for name, w in mixer.state_dict().items() if name.endswith("_proj.weight")})
    return twin


def pin_gate(mixer, value):
    torch.nn.init.constant_(mixer.gate, value)
    return mixer


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


@pytest.mark.parametrize("memory_size", [4, 30])
def test_a_top_k_as_large_as_the_store_is_softmax_attention_over_it(memory_size):
    mixer, hidden = build(memory_size=memory_size, top_k=memory_size), draw(1, 20)
    expected = head_outputs(mixer, hidden[0], lambda similarity, t: sorted(similarity)[-memory_size:])
    assert_close(mixer(hidden)[0][0], expected, **EXACT)


@pytest.mark.parametrize("sizes", [[24], [9, 15], [1] * 24], ids=str)
@pytest.mark.parametrize(("memory_size", "top_k"), [(6, 2), (6, 1), (40, 5)])
def test_it_finds_the_nearest_keys_of_an_exhaustive_search(memory_size, top_k, sizes):
    mixer, hidden = build(memory_size=memory_size, top_k=top_k), draw(1, 24)

    def search(similarity, t):
        stored = sorted(similarity)[-memory_size:]
        return sorted(stored, key=lambda j: -similarity[j])[:top_k]

    expected = head_outputs(mixer, hidden[0], search)
    assert_close(calls(mixer, hidden, sizes)[0], expected, **EXACT)


def test_a_closed_gate_leaves_attention_with_that_window():
    mixer, hidden = pin_gate(build(), -1e4), draw(2, 20)
    assert_close(mixer(hidden)[0], windowed_twin(mixer)(hidden)[0], **EXACT)


@pytest.mark.parametrize("gate", [-1e4, 0.0, 1e4])
def test_while_the_store_is_empty_the_window_speaks_alone(gate):
    mixer, hidden = pin_gate(build(window=12), gate), draw(2, 12).requires_grad_()
    output, _ = mixer(hidden)
    assert_close(output, windowed_twin(mixer)(hidden)[0], **EXACT)
    output.square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in (hidden, *mixer.parameters()))
    assert not mixer.log_scale.grad.any()


def test_an_open_gate_leaves_the_store_and_a_store_that_fills_gives_what_it_has():
    mixer, hidden = pin_gate(build(window=2, memory_size=8, top_k=5), 1e4), draw(1, 4)
    value = mixer.v_proj(hidden[0]).unflatten(-1, (-1, WIDTH)).repeat_interleave(HEADS // GROUPS, dim=1)
    assert_close(mixer(hidden)[0][0, 2], mixer.o_proj(value[0].flatten()), **EXACT)  # one key is all there is


@pytest.mark.parametrize("sizes", [[20], [7, 13], [1] * 20], ids=str)
def test_the_store_holds_the_last_tokens_that_left_the_window_of_the_own_document(sizes):
    window, memory_size = 3, 6
    mixer, hidden = build(window=window, memory_size=memory_size, top_k=memory_size), draw(1, 20)
    documents = [[0] * 8 + [1] * 12]
    expected = calls(mixer, hidden, sizes, documents)
    reach = torch.zeros(20, 20, dtype=torch.bool)
    for place in range(20):
        edited = hidden.clone()
        edited[:, place] += 1.0
        reach[:, place] = (calls(mixer, edited, sizes, documents) - expected)[0].abs().amax(-1) > 1e-9
    token, place = torch.arange(20)[:, None], torch.arange(20)
    seen = (place <= token) & (place > token - window - memory_size) & ((place < 8) == (token < 8))
    assert torch.equal(reach, seen)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1] * 12], ids=str)
@pytest.mark.parametrize("rotation", range(4))
def test_of_equal_keys_the_latest_are_chosen_however_the_sequence_is_cut(sizes, rotation):
    """A multiple of a token has the same normalised key and another value."""
    mixer = build(memory_size=8, top_k=2)
    same = draw(1, 1) * torch.tensor([1.0, 2.0, 0.5, 3.0, 0.25, 1.5]).roll(rotation)[None, :, None]
    hidden = torch.cat([same, draw(1, 6)], dim=1)
    expected = head_outputs(mixer, hidden[0], latest_of_the_nearest(8, 2))
    assert_close(calls(mixer, hidden, sizes)[0], expected, **EXACT)


def latest_of_the_nearest(memory_size, top_k):
    def choose(similarity, t):
        stored = sorted(similarity)[-memory_size:]
        return sorted(stored, key=lambda j: (-round(similarity[j], 9), -j))[:top_k]

    return choose


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1] * 12], ids=str)
@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_reaches_the_window_and_the_store_only_if_it_is_not_detached(sizes, detach):
    mixer, hidden = build(memory_size=5, top_k=5, detach_memory=detach), draw(1, 12).requires_grad_()
    for token in (4, 11):
        (gradient,) = torch.autograd.grad(calls(mixer, hidden, sizes)[:, token].sin().sum(), hidden)
        reached = (gradient[0].abs().amax(-1) > 0).nonzero().flatten().tolist()
        assert reached == list(range(max(token - (2 if detach else 7), 0), token + 1))


def test_keys_in_the_store_are_normalised_and_without_positions():
    mixer, hidden = build(), draw(1, 7)
    key = normalize(mixer.k_proj(hidden[0]).unflatten(-1, (-1, WIDTH)), dim=-1).transpose(0, 1)  # [G, T, K]
    assert_close(mixer(hidden)[1].memory_keys[0, :, -7:], key, **EXACT)


def test_blocks_of_queries_change_nothing():
    length = BLOCKS[0] * 2 + 20
    mixer, hidden = build(memory_size=50, top_k=3), draw(1, length)
    assert_close(mixer(hidden)[0], mixer.forward_reference(hidden)[0], **EXACT)


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


def test_8192_tokens_need_no_matrix_of_all_pairs():
    mixer = MemorizingMixer(8, num_heads=2, num_kv_heads=1, window=64, memory_size=8192, top_k=4)
    with torch.no_grad(), Largest() as largest:
        output, _ = mixer(torch.randn(1, 8192, 8))
    assert bool(output.isfinite().all())
    assert largest.elements <= 1.5 * MAX_SCORES


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"window": 1}, {"window": 5, "memory_size": 30, "top_k": 7}])
def test_the_planner_counts_what_the_reference_does(options):
    mixer = build(**options).float()
    for length in (1, 4, 17):
        with torch.no_grad(), OperationCounter() as counter:
            mixer.forward_reference(torch.randn(1, length, HIDDEN))
        assert counter.products == length * product_flops(mixer) + prefill_flops("memorizing", mixer, length)
        steps = [step_flops("memorizing", mixer, t) for t in range(length)]
        assert steps == [mixing_flops("memorizing", mixer, t) for t in range(length)]
        assert prefill_flops("memorizing", mixer, length) == sum(steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide hidden_size=12"),
        ({"num_kv_heads": 4}, "num_kv_heads=4 must divide num_heads=6"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"memory_size": 0}, "memory_size=0 must be at least 1"),
        ({"top_k": 0}, "top_k=0 must lie between 1 and memory_size=6"),
        ({"top_k": 7}, "top_k=7 must lie between 1 and memory_size=6"),
        ({"scale_init": 0.0}, "scale_init=0.0 must be positive"),
        ({"position": {"name": "rope", "theta": -1.0}}, r"position\.theta=-1.0 must be positive"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_gate_and_scale_start_as_asked():
    mixer = MemorizingMixer(HIDDEN, **SIZES, gate_init=-2.0, scale_init=7.0)
    assert_close(mixer.gate.detach(), torch.full((HEADS,), -2.0))
    assert_close(mixer.log_scale.exp().detach(), torch.full((HEADS,), 7.0))
    assert MemorizingMixer(HIDDEN, **SIZES).scale_init == math.sqrt(WIDTH)
