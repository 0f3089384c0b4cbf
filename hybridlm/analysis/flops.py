"""Count the operations of a layer's parts.

A multiply-add counts 2 in matrix products and convolutions; in a recurrence every operation on an element counts 1,
exponentials included. Norms, activations, softmax, rotations and the look-up of embeddings are left out.

Shapes: D hidden size, I inner width, H heads, K head width, P width of a Mamba-2 head, N state size.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..modeling.connections import StreamResidual
from ..modeling.hold import CHUNK
from ..modeling.memory_update import NEWTON_SCHULZ_STEPS

aten = torch.ops.aten
_ELEMENTWISE = {aten.add, aten.sub, aten.mul, aten.div, aten.neg, aten.pow, aten.exp, aten.exp2, aten.rsqrt}
_REDUCTIONS = {aten.sum, aten.mean, aten.cumsum}


class OperationCounter(TorchDispatchMode):
    """Count what is run inside.

    Attributes:
        products: FLOPs of matrix products and convolutions, 2 for each multiply-add.
        others: Arithmetic on elements, and sums, 1 for each operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.products += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        elif packet is aten.mv:
            self.products += 2 * args[0].numel()
        elif packet in _ELEMENTWISE:
            self.others += output.numel()
        elif packet is aten.addcmul:
            self.others += 2 * output.numel()
        elif packet in _REDUCTIONS:
            self.others += args[0].numel()
        return output


def experts_of_token(router: nn.Module, expected: bool = False) -> float:
    """Experts with weights that a token goes through: at most, or on average when all choices are as frequent.

    The two differ where a choice may be a zero or copy expert. With expert choice both are the mean, for a token may
    have any number.
    """
    if router.routing == "expert_choice":
        return min(router.top_k * router.capacity_factor, router.num_experts)
    if expected:
        return router.top_k * router.num_experts / router.num_choices
    return min(router.top_k, router.num_experts)


def product_flops(part: nn.Module, expected: bool = False) -> int:
    """FLOPs a token of the linear layers, convolutions, routers and experts of a part: at most, or `expected`."""
    total, twice = 0, getattr(part, "applied_twice", ())
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            total += 2 * module.weight.numel() * (2 if name in twice else 1)
        elif hasattr(module, "experts"):
            chosen = sum(weight[0].numel() for weight in module.experts.parameters())
            total += 2 * module.router.weight.numel()
            total += round(2 * experts_of_token(module.router, expected) * chosen)
    return total


def stream_flops(part: nn.Module | None) -> int:
    """Operations a token of a residual part, or of the head behind the layers, with several streams; 0 for the others.

    The products that make the gates and mix the streams, and the weighted sums that read and write them. As for plain
    residuals, norms and the factors on what is added are left out; so is the Sinkhorn iteration, which is a norm too.
    """
    num_streams, hidden_size = getattr(part, "num_streams", 0), getattr(part, "hidden_size", 0)
    total = 0
    if getattr(part, "mix_weight", None) is not None:  # applied to all streams at once, or to each
        rows = num_streams * hidden_size // part.mix_weight.shape[1]
        total += 2 * part.mix_weight.numel() * rows
    total += 2 * num_streams * hidden_size  # read
    if isinstance(part, StreamResidual):
        total += 2 * num_streams**2 * hidden_size + 2 * num_streams * hidden_size  # mix, write
    return total


def holding_flops(span: nn.Module, num_streams: int, num_tokens: int) -> int:
    """FLOPs of the products with which a span spreads what it holds over `num_tokens` tokens of a call.

    Only learned boundaries blend what was held with what is new; the others repeat it, which takes no product.
    """
    if getattr(span, "boundary", None) != "learned":
        return 0
    chunks, rest = divmod(num_tokens, CHUNK)
    return 2 * num_streams * span.hidden_size * (chunks * CHUNK**2 + rest**2)


def mixing_flops(name: str, part: nn.Module, num_past: int, hidden_size: int | None = None) -> int:
    """Operations of one token's recurrence or attention after `num_past` tokens, its projections left out.

    A part without a formula here is counted: the operations for one token, without a past, of its `forward_reference`,
    or of its `forward` where it has none.

    Args:
        name: Of the part.
        part: Counted on the meta device.
        num_past: Tokens before.
        hidden_size: D, for a part that does not keep it.
    """
    if name in _FORMULAS:
        return _FORMULAS[name](part, num_past)
    with torch.device("meta"), OperationCounter() as counter:
        run = getattr(part, "forward_reference", part.forward)
        run(torch.empty(1, 1, part.hidden_size if hidden_size is None else hidden_size))
    return counter.products + counter.others - product_flops(part)


def step_flops(name: str, part: nn.Module, num_past: int, hidden_size: int | None = None) -> int:
    """The same for a token that comes alone, as in decoding, where a part does something else then."""
    if name in _STEPS:
        return _STEPS[name](name, part, num_past)
    return mixing_flops(name, part, num_past, hidden_size)


def prefill_flops(name: str, part: nn.Module, num_tokens: int, hidden_size: int | None = None) -> int:
    """The sum of `mixing_flops` over the first tokens of a document; it grows by equal steps between `_BREAKS`."""
    breaks = _BREAKS[name](part, num_tokens) if name in _BREAKS else ()
    borders = sorted({0, num_tokens, *(place for place in breaks if place < num_tokens)})
    total = 0
    for start, stop in zip(borders, borders[1:], strict=False):
        ends = sum(mixing_flops(name, part, place, hidden_size) for place in (start, stop - 1))
        total += (stop - start) * ends // 2
    return total


def _attention(part: nn.Module, num_past: int) -> int:
    visible = num_past + 1
    if part.window is not None:
        visible = min(visible, part.window + part.num_sinks)
    return 4 * part.num_heads * part.head_dim * visible  # scores, and values times weights


def _attention_breaks(part: nn.Module, num_tokens: int) -> Iterable[int]:
    return () if part.window is None else (part.window + part.num_sinks,)


def _memorizing(part: nn.Module, num_past: int) -> int:
    local, stored = min(num_past + 1, part.window), min(max(num_past + 1 - part.window, 0), part.memory_size)
    products = 2 * local + stored + min(stored, part.top_k)  # every stored key is compared, the chosen are read
    return 2 * part.num_heads * part.head_dim * products


def _memorizing_breaks(part: nn.Module, num_tokens: int) -> Iterable[int]:
    return (part.window, part.window + part.top_k, part.window + part.memory_size)


def _xl_visible(part: nn.Module, num_past: int) -> int:
    return min(num_past, num_past % part.segment_size + part.memory_size) + 1


def _transformer_xl(part: nn.Module, num_past: int) -> int:
    width = part.num_heads * part.head_dim
    encoded = 2 * width * part.hidden_size if num_past <= part.farthest else 0  # one more distance, until all are
    return encoded + 6 * width * _xl_visible(part, num_past)  # scores by content and distance, and values


def _transformer_xl_step(name: str, part: nn.Module, num_past: int) -> int:
    """The query is brought to the distances, instead of the distances to the heads."""
    visible = _xl_visible(part, num_past)
    by_distance = part.num_heads * part.hidden_size * (part.head_dim + visible)
    return 2 * by_distance + 4 * part.num_heads * part.head_dim * visible


def _transformer_xl_breaks(part: nn.Module, num_tokens: int) -> Iterable[int]:
    return (part.farthest + 1, *range(0, num_tokens, part.segment_size))


def _recurrent_shape(part: nn.Module) -> tuple[int, ...]:
    return part.state_spec(1, torch.float32)["recurrent_states"][0]


def _ema_memory(part: nn.Module, num_past: int) -> int:
    return 8 * part.hidden_size


def _mamba(part: nn.Module, num_past: int) -> int:
    inner, num_states = _recurrent_shape(part)
    return inner * (7 * num_states + 3)


def _mamba2(part: nn.Module, num_past: int) -> int:
    num_heads, head_dim, num_states = _recurrent_shape(part)
    return num_heads * (5 * head_dim * num_states + 3 * head_dim + 2)


def _neural_memory(part: nn.Module, num_past: int) -> int:
    return -(-memory_chunk_flops(part) // part.chunk_size)


def _neural_memory_step(name: str, part: nn.Module, num_past: int) -> int:
    return memory_step_flops(part)


def memory_chunk_flops(memory: nn.Module) -> int:
    """Matrix products of a full chunk of a neural memory, in the chunk-parallel form; its tokens share them equally.

    Those with which it learns, and those that read it with the chunk's queries. As for attention, what is done to
    elements is left out.
    """
    return learning_flops(memory) + _reading_flops(memory, memory.chunk_size)


def memory_step_flops(memory: nn.Module) -> int:
    """The same for a token that comes alone, when it closes the chunk: it learns all of the open chunk anew."""
    return learning_flops(memory) + _reading_flops(memory, 1)


def _reading_flops(memory: nn.Module, num_queries: int) -> int:
    network = memory.scan.network
    if network.at_borders:  # only the last token reads another memory than that of the start
        reading = (num_queries + 1) * network.num_weights
    else:  # the weights at the start, those to forget to, the momentum, and the gradients
        reading = num_queries * network.num_weights * (1 + (network.forget_to == "initial") + network.momentum)
        sources = memory.chunk_size + memory.window - 1
        reading += num_queries * sources * sum(a + b for a, b in network.shapes)
    return 2 * network.num_heads * reading


def learning_flops(memory: nn.Module) -> int:
    """Matrix products with which a neural memory learns a full chunk.

    Those that weigh gradients by decays, that make the gradients (two for each layer, but one for the first), and that
    move the memory on.
    """
    network, size, sources = memory.scan.network, memory.chunk_size, memory.chunk_size + memory.window - 1
    weights, first = network.num_weights, network.shapes[0][0] * network.shapes[0][1]
    gradients = sources * (2 * weights - first)
    moving = (1 + network.momentum) * sources * weights
    rules = size**2 * (size + 1) if network.momentum else 0
    rules += (size + 1) * size * sources if memory.window > 1 else 0
    if network.optimizer == "muon":
        for a, b in network.shapes:
            low, high = min(a, b), max(a, b)
            moving += NEWTON_SCHULZ_STEPS * low * low * (2 * high + low)
    return 2 * network.num_heads * (rules + gradients + moving)


def _titans_window(part: nn.Module, num_past: int) -> int:
    visible = min(num_past + 1, part.window) + part.attention.num_persistent
    return 4 * part.num_heads * part.head_dim * visible + _neural_memory(part.memory, num_past)


def _titans_window_step(name: str, part: nn.Module, num_past: int) -> int:
    own = mixing_flops(name, part, num_past) - _neural_memory(part.memory, num_past)
    return own + memory_step_flops(part.memory)


def _titans_window_breaks(part: nn.Module, num_tokens: int) -> Iterable[int]:
    return (part.window,)


def _titans_mac_own(part: nn.Module, num_past: int) -> int:
    """All but the learning: attention to h and to x, and reading the memory for h and for the gate."""
    visible = 2 * (num_past % part.segment_size + 1) + part.attention.num_persistent
    reading = 2 * 2 * part.memory.num_heads * part.memory.scan.network.num_weights
    return 4 * part.num_heads * part.head_dim * visible + reading


def _titans_mac(part: nn.Module, num_past: int) -> int:
    return _titans_mac_own(part, num_past) - (-learning_flops(part.memory) // part.segment_size)


def _titans_mac_step(name: str, part: nn.Module, num_past: int) -> int:
    """A token that closes its segment, at most; the others learn nothing."""
    return _titans_mac_own(part, part.segment_size - 1) + learning_flops(part.memory)


def _titans_mac_breaks(part: nn.Module, num_tokens: int) -> Iterable[int]:
    return range(0, num_tokens, part.segment_size)


def _none(part: nn.Module, num_past: int) -> int:
    return 0


_FORMULAS: dict[str, Callable[[nn.Module, int], int]] = {
    "attention": _attention,
    "ema_memory": _ema_memory,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "memorizing": _memorizing,
    "neural_memory": _neural_memory,
    "titans_mac": _titans_mac,
    "titans_mag": _titans_window,
    "titans_mal": _titans_window,
    "transformer_xl": _transformer_xl,
    "mlp": _none,
    "swiglu": _none,
    "moe": _none,
}
# tokens from which on a formula grows by other steps than before
_BREAKS: dict[str, Callable[[nn.Module, int], Iterable[int]]] = {
    "attention": _attention_breaks,
    "memorizing": _memorizing_breaks,
    "titans_mac": _titans_mac_breaks,
    "titans_mag": _titans_window_breaks,
    "titans_mal": _titans_window_breaks,
    "transformer_xl": _transformer_xl_breaks,
}
_STEPS: dict[str, Callable[[str, nn.Module, int], int]] = {
    "neural_memory": _neural_memory_step,
    "titans_mac": _titans_mac_step,
    "titans_mag": _titans_window_step,
    "titans_mal": _titans_window_step,
    "transformer_xl": _transformer_xl_step,
}
