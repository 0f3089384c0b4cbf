"""What the planner says of memories equals a count of what is run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from variants import MIXER_VARIANTS

from hybridlm import MIXERS
from hybridlm.analysis.flops import (
    OperationCounter,
    learning_flops,
    memory_chunk_flops,
    mixing_flops,
    prefill_flops,
    product_flops,
    step_flops,
)
from hybridlm.modeling.masks import SequenceInfo, plain_sequence
from hybridlm.modeling.neural_memory import NeuralMemoryState

VARIANTS = [name for name, spec in MIXER_VARIANTS.items() if spec["name"] == "neural_memory"]
HIDDEN = 16


@pytest.fixture(params=VARIANTS)
def memory(request):
    options = {key: value for key, value in MIXER_VARIANTS[request.param].items() if key != "name"}
    return MIXERS["neural_memory"](HIDDEN, **options)


def draw(memory, num_tokens):
    """Queries and tokens as the scan takes them."""
    shape = (1, num_tokens, memory.num_heads)
    width = 2 * memory.head_dim + memory.gates.num_gates
    return torch.randn(*shape, memory.head_dim), torch.randn(*shape, width).clamp(max=0.0)


def test_the_scan_of_a_memory_equals_a_count_of_its_products(memory):
    queries, tokens = draw(memory, 3 * memory.chunk_size)
    with torch.no_grad(), OperationCounter() as counter:
        memory.scan(queries, tokens, None, plain_sequence(queries))
    assert counter.products == 3 * memory_chunk_flops(memory)
    share = mixing_flops("neural_memory", memory, 7)
    assert share - 1 < counter.products / (3 * memory.chunk_size) <= share


def test_a_step_of_a_memory_costs_most_when_it_closes_the_chunk_and_just_what_is_planned(memory):
    found = []
    for past in range(memory.chunk_size):
        queries, tokens = draw(memory, 1)
        spec = memory.state_spec(past, torch.float32)
        state = NeuralMemoryState(**{name: torch.zeros(1, *shape) for name, (shape, _) in spec.items()})
        place = torch.tensor([[past]])
        sequence = SequenceInfo(1, place, place, num_past=place[0], uniform_past=past)
        with torch.no_grad(), OperationCounter() as counter:
            memory.scan(queries, tokens, state, sequence)
        found.append(counter.products)
    assert max(found) == found[-1] == step_flops("neural_memory", memory, 7)


def test_projections_and_convolutions_of_a_memory_are_counted_once(memory):
    hidden_states = torch.randn(1, 2 * memory.chunk_size, HIDDEN)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        memory(hidden_states)
    expected = 2 * memory.chunk_size * product_flops(memory) + 2 * memory_chunk_flops(memory)
    assert counter.get_total_flops() == expected


def titans(*names):
    """Variants of mixers with pieces of more than one token, which the counter sees whole."""
    sizes = {name: spec.get("segment_size", spec.get("window")) for name, spec in MIXER_VARIANTS.items()}
    return [name for name, spec in MIXER_VARIANTS.items() if spec["name"] in names and sizes[name] > 1]


def counted(variant, num_segments=3):
    """A mixer, and the products of a call of some segments or chunks."""
    options = {key: value for key, value in MIXER_VARIANTS[variant].items() if key != "name"}
    part = MIXERS[MIXER_VARIANTS[variant]["name"]](HIDDEN, **options)
    num_tokens = num_segments * part.memory.chunk_size
    with torch.no_grad(), OperationCounter() as counter:
        part(torch.randn(1, num_tokens, HIDDEN))
    return part, num_tokens, counter.products


@pytest.mark.parametrize("variant", titans("titans_mac"))
def test_a_memory_as_context_equals_a_count_of_its_products(variant):
    part, num_tokens, products = counted(variant)
    size, own = part.segment_size, 4 * part.num_heads * part.head_dim
    later = own * 3 * size * (size - 1)  # the mask hides on average (size - 1) / 2 of h and of x
    planned = 3 * learning_flops(part.memory) + num_tokens * product_flops(part)
    reads = 4 * num_tokens * part.memory.num_heads * part.memory.scan.network.num_weights
    attention = sum(own * (2 * (t % size + 1) + part.attention.num_persistent) for t in range(num_tokens))
    assert products == planned + reads + attention + later
    mixing = prefill_flops("titans_mac", part, num_tokens)
    assert mixing == sum(mixing_flops("titans_mac", part, t) for t in range(num_tokens))
    assert mixing - num_tokens < products - later - num_tokens * product_flops(part) <= mixing
    assert step_flops("titans_mac", part, 9) == max(
        mixing_flops("titans_mac", part, t) for t in range(size)
    ) + learning_flops(part.memory) - -(-learning_flops(part.memory) // size)


@pytest.mark.parametrize("variant", titans("titans_mag", "titans_mal"))
def test_a_memory_beside_a_window_equals_a_count_of_its_products(variant):
    part, num_tokens, products = counted(variant)
    name, own = MIXER_VARIANTS[variant]["name"], 4 * part.num_heads * part.head_dim
    visible = sum(min(t + 1, part.window) + part.attention.num_persistent for t in range(num_tokens))
    seen = num_tokens * (num_tokens + part.attention.num_persistent)  # in one block, the mask hides the rest
    memory = num_tokens // part.memory.chunk_size * memory_chunk_flops(part.memory)
    assert products == num_tokens * product_flops(part) + memory + own * seen
    mixing = prefill_flops(name, part, num_tokens)
    assert mixing == sum(mixing_flops(name, part, t) for t in range(num_tokens))
    assert mixing - num_tokens < memory + own * visible <= mixing
