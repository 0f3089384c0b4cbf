"""What a config costs: parameters, state bytes and FLOPs, layer by layer, without building any weights.

Parameters are those of the model on the meta device, so they are exact by construction. State bytes come from each
part's `state_spec`: what one row keeps after a number of tokens, free slots of a growing buffer not counted. FLOPs are
defined in `flops.py`. What lies inside spans sees a part of the tokens: at most what a static cache has room for, and
on average what the spans aim at. Training by the top k of whole documents keeps to the target and not to that bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..modeling.configuration_hybridlm import HybridLMConfig
from ..modeling.modeling_hybridlm import HybridLMForCausalLM
from ..modeling.precision import state_dtype
from ..modeling.registry import span_places
from ..modeling.spans import Span
from .figures import Figures, LayerPlan, Plan, SpanPlan
from .flops import experts_of_token, holding_flops, prefill_flops, product_flops, step_flops, stream_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Reach:
    """How many tokens come to a place inside spans.

    Attributes:
        spans: The spans around it, outermost first.
    """

    spans: tuple[Span, ...] = ()

    def most(self, num_tokens: int) -> int:
        """Of the first tokens of a document, those that come at most."""
        for span in self.spans:
            num_tokens = span.max_tokens(num_tokens)
        return num_tokens

    @property
    def share(self) -> float:
        """Share of the tokens that is meant to come."""
        return math.prod(span.expected_share() for span in self.spans)

    def expected(self, num_tokens: int) -> int:
        """Of the first tokens of a document, those that are meant to come."""
        return min(round(self.share * num_tokens), self.most(num_tokens))


def plan(config: HybridLMConfig, *, context: int = 4096, dtype: str = "bf16", rollback_window: int = 0) -> Plan:
    """Plan a causal language model.

    Args:
        config: Any config; parts and options are checked as when it is built.
        context: Tokens that the state and the FLOPs are for.
        dtype: `fp32`, `bf16`, `fp16` or `fp64`.
        rollback_window: Also bound the cost of `cache.activate_past_recording(rollback_window)`.

    Raises:
        ValueError: For an unknown number format, a negative count, or a config that cannot be built.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: unknown {dtype!r}, expected one of {sorted(DTYPES)}")
    for name, value, least in (("context", context, 1), ("rollback_window", rollback_window, 0)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    with torch.device("meta"):
        model = HybridLMForCausalLM(config)
    kind, inside = DTYPES[dtype], _reaches(model)
    names = [config.spans[entry]["name"] for entry, *_ in span_places(config)]
    streams = num_streams(model)
    layers = tuple(
        _plan_layer(config, index, layer, reach, context, kind)
        for index, (layer, reach) in enumerate(zip(model.model.layers, inside, strict=True))
    )
    spans = tuple(
        _plan_span(name, span, _around(model.model.spans, span), streams, context, kind)
        for name, span in zip(names, model.model.spans, strict=True)
    )
    rollback_bytes = 0
    if rollback_window:
        rollback_bytes = sum(
            _rollback_bytes(part, config.hidden_size, context, rollback_window, kind)
            for layer in model.model.layers
            for part in (layer.mixer, layer.channel_mixer)
            if part is not None
        )
        rollback_bytes += sum(_span_rollback_bytes(span, streams, rollback_window, kind) for span in model.model.spans)
    outer = _plan_outer(model, (*layers, *spans), context)
    return Plan(context, dtype, layers, outer, rollback_window, rollback_bytes, spans)


def num_streams(model: HybridLMForCausalLM) -> int:
    """Residual streams between the embedding and the final norm."""
    return getattr(model.model.residual_head, "num_streams", 1)


def _around(spans: Sequence[Span], span: Span) -> Reach:
    """The spans around a span."""
    outer: tuple[Span, ...] = ()
    while span.parent is not None:
        span = spans[span.parent]
        outer = (span, *outer)
    return Reach(outer)


def _reaches(model: HybridLMForCausalLM) -> list[Reach]:
    """For every layer, the spans around it."""
    spans, inside = model.model.spans, [Reach() for _ in model.model.layers]
    for span in spans:  # the innermost comes last
        reach = Reach((*_around(spans, span).spans, span))
        inside[span.start : span.stop] = [reach] * (span.stop - span.start)
    return inside


def _plan_layer(
    config: HybridLMConfig, index: int, layer: nn.Module, reach: Reach, context: int, dtype: torch.dtype
) -> LayerPlan:
    recipe, size = config.layer_layout[index], config.hidden_size
    spec = config.layer_specs[recipe]
    names = [(spec.get(half) or {}).get("name") for half in ("mixer", "channel_mixer")]
    parts = [(name, part) for name, part in zip(names, (layer.mixer, layer.channel_mixer), strict=True) if part]
    num_parameters = sum(parameter.numel() for parameter in layer.parameters())
    streams = stream_flops(layer.mixer_residual) + stream_flops(layer.channel_residual)
    products, expected = (streams + sum(product_flops(part, mean) for _, part in parts) for mean in (False, True))
    most, likely = reach.most(context), reach.expected(context)
    step, likely_step = (
        sum(step_flops(name, part, past, size) for name, part in parts)
        for past in (reach.most(context + 1) - 1, likely)
    )
    prefill, likely_prefill = (
        sum(prefill_flops(name, part, tokens, size) for name, part in parts) for tokens in (most, likely)
    )
    return LayerPlan(
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - _idle_parameters(layer),
        state_bytes=sum(state_bytes(part, most, dtype) for _, part in parts),
        step_flops=products + step,
        prefill_flops=products * most + prefill,
        expected_state_bytes=sum(state_bytes(part, likely, dtype) for _, part in parts),
        expected_step_flops=round(reach.share * (expected + likely_step)),
        expected_prefill_flops=expected * likely + likely_prefill,
        expected_active_parameters=round(reach.share * (num_parameters - _idle_parameters(layer, expected=True))),
        index=index,
        recipe=recipe,
        mixer=names[0],
        channel_mixer=names[1],
        max_tokens=most,
        expected_tokens=likely,
    )


def _plan_span(name: str, span: Span, outer: Reach, streams: int, context: int, dtype: torch.dtype) -> SpanPlan:
    """The choice is made, and what is held is read, for every token that comes to the span."""
    inner = Reach((*outer.spans, span))
    num_parameters = sum(parameter.numel() for parameter in span.parameters())
    products = product_flops(span)
    kept = _bytes(span.state_spec(streams, dtype))

    def prefill(num_tokens: int) -> int:
        return products * num_tokens + holding_flops(span, streams, num_tokens)

    step = products + holding_flops(span, streams, 1)
    return SpanPlan(
        num_parameters=num_parameters,
        num_active_parameters=num_parameters,
        state_bytes=kept,
        step_flops=step,
        prefill_flops=prefill(outer.most(context)),
        expected_state_bytes=kept,
        expected_step_flops=round(outer.share * step),
        expected_prefill_flops=prefill(outer.expected(context)),
        expected_active_parameters=round(outer.share * num_parameters),
        index=span.number,
        span=name,
        start=span.start,
        stop=span.stop,
        parent=span.parent,
        max_tokens=inner.most(context),
        expected_tokens=inner.expected(context),
        expected_share=span.expected_share(),
    )


def _idle_parameters(layer: nn.Module, expected: bool = False) -> int:
    """Parameters of the experts that a token is not sent to: at least, or on average."""
    idle = 0
    for module in layer.modules():
        if hasattr(module, "router"):
            size = sum(weight[0].numel() for weight in module.experts.parameters())
            idle += round(size * (module.router.num_experts - experts_of_token(module.router, expected)))
    return idle


def _bytes(spec: Spec) -> int:
    return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in spec.values())


def state_bytes(part: nn.Module, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one row's state after a number of tokens."""
    return _bytes(_spec_of(part, num_tokens, dtype))


def _spec_of(part: nn.Module, num_tokens: int, dtype: torch.dtype) -> Spec:
    """What a part keeps; nothing where it says nothing, as in a cache."""
    return part.state_spec(num_tokens, dtype) if hasattr(part, "state_spec") else {}


def _rollback_bytes(part: nn.Module, hidden_size: int, context: int, window: int, dtype: torch.dtype) -> int:
    """Two checkpoints and the inputs since the older one; tensors that only grow are cut and need neither.

    A new checkpoint is due once `window` tokens lie behind the last one, and calls of nearly `window` tokens can delay
    it by as much: 4 windows of inputs at the worst, 2 where tokens come one by one.
    """
    one, two = _spec_of(part, 1, dtype), _spec_of(part, 2, dtype)
    fixed = {name: kept for name, kept in _spec_of(part, context, dtype).items() if one[name] == two[name]}
    return 2 * _bytes(fixed) + 4 * window * hidden_size * dtype.itemsize if fixed else 0


def _span_rollback_bytes(span: Span, streams: int, window: int, dtype: torch.dtype) -> int:
    """The same for what a span keeps: its choice reads the streams, what it holds reads updates and a flag."""
    values, total = streams * span.hidden_size, 2 * _bytes(span.state_spec(streams, dtype))
    if span.choice_type is not None:
        total += 4 * window * values * dtype.itemsize
    if span.holds:
        total += 4 * window * (1 + values) * state_dtype(dtype).itemsize
    return total


def _plan_outer(model: HybridLMForCausalLM, parts: tuple[Figures, ...], context: int) -> Figures:
    num_parameters = sum(p.numel() for p in model.parameters()) - sum(part.num_parameters for part in parts)
    step = 2 * model.lm_head.weight.numel() + stream_flops(model.model.residual_head)
    return Figures(
        num_parameters=num_parameters,
        num_active_parameters=num_parameters,
        step_flops=step,
        prefill_flops=step * context,
        expected_step_flops=step,
        expected_prefill_flops=step * context,
        expected_active_parameters=num_parameters,
    )
