"""What a config costs: parameters, state bytes and FLOPs, layer by layer, without building any weights.

Parameters are those of the model on the meta device, so they are exact by construction. State bytes come from each
part's `state_spec`: what one row keeps after a number of tokens, free slots of a growing buffer not counted. FLOPs are
defined in `flops.py`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..modeling.configuration_hybridlm import HybridLMConfig
from ..modeling.modeling_hybridlm import HybridLMForCausalLM
from .flops import experts_of_token, mixing_flops, product_flops, stream_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Figures:
    """The cost of a part of the model.

    Attributes:
        num_parameters: All parameters; a tied matrix counts once.
        num_active_parameters: Those that one token passes through: of E experts the k chosen. Where a token may choose
            none, the most.
        state_bytes: What one row keeps between calls after `context` tokens.
        step_flops: FLOPs of the token after those; where they depend on the data, at most.
        prefill_flops: FLOPs of a forward over `context` tokens, logits of every token included; likewise at most.
        expected_step_flops: FLOPs of that token when data-dependent choices are as frequent as they are meant to be.
        expected_prefill_flops: The same of the forward.
    """

    num_parameters: int = 0
    num_active_parameters: int = 0
    state_bytes: int = 0
    step_flops: int = 0
    prefill_flops: int = 0
    expected_step_flops: int = 0
    expected_prefill_flops: int = 0

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


@dataclass(frozen=True)
class LayerPlan(Figures):
    """The cost of one layer, and what stands in it."""

    index: int = 0
    recipe: str = ""
    mixer: str | None = None
    channel_mixer: str | None = None


@dataclass(frozen=True)
class Plan:
    """The cost of a model.

    Attributes:
        context: Tokens that the state and the FLOPs are for.
        dtype: Name of the number format of weights and keys; recurrences stay float32.
        layers: One entry a layer.
        outer: Embeddings, head, final norm, and what makes one stream of several.
        rollback_window: Tokens that `cache.crop` may take back; 0 without a record of the past.
        rollback_bytes: Upper bound on what recording them adds for one row.
    """

    context: int
    dtype: str
    layers: tuple[LayerPlan, ...]
    outer: Figures
    rollback_window: int = 0
    rollback_bytes: int = 0

    @property
    def total(self) -> Figures:
        """All layers and what stands around them."""
        return sum(self.layers, self.outer)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {**dataclasses.asdict(self), "total": dataclasses.asdict(self.total)}


def _values(figures: Figures) -> list[int]:
    return [getattr(figures, field.name) for field in dataclasses.fields(Figures)]


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
    layers = tuple(
        _plan_layer(index, recipe, config.layer_specs[recipe], layer, context, DTYPES[dtype])
        for index, (recipe, layer) in enumerate(zip(config.layer_layout, model.model.layers, strict=True))
    )
    rollback_bytes = 0
    if rollback_window:
        rollback_bytes = sum(
            _rollback_bytes(part, config.hidden_size, context, rollback_window, DTYPES[dtype])
            for layer in model.model.layers
            for part in (layer.mixer, layer.channel_mixer)
            if part is not None
        )
    return Plan(context, dtype, layers, _plan_outer(model, layers, context), rollback_window, rollback_bytes)


def _plan_layer(
    index: int, recipe: str, spec: dict[str, Any], layer: nn.Module, context: int, dtype: torch.dtype
) -> LayerPlan:
    names = [(spec.get(half) or {}).get("name") for half in ("mixer", "channel_mixer")]
    parts = [(name, part) for name, part in zip(names, (layer.mixer, layer.channel_mixer), strict=True) if part]
    num_parameters = sum(parameter.numel() for parameter in layer.parameters())
    products, expected = (sum(product_flops(part, mean) for _, part in parts) for mean in (False, True))
    streams = stream_flops(layer.mixer_residual) + stream_flops(layer.channel_residual)
    products, expected = products + streams, expected + streams
    step = sum(mixing_flops(name, part, context) for name, part in parts)
    prefill = sum(_prefill_mixing(name, part, context) for name, part in parts)
    return LayerPlan(
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - _idle_parameters(layer),
        state_bytes=sum(state_bytes(part, context, dtype) for _, part in parts),
        step_flops=products + step,
        prefill_flops=products * context + prefill,
        expected_step_flops=expected + step,
        expected_prefill_flops=expected * context + prefill,
        index=index,
        recipe=recipe,
        mixer=names[0],
        channel_mixer=names[1],
    )


def _prefill_mixing(name: str, part: nn.Module, context: int) -> int:
    """The sum of `mixing_flops` over the tokens; it grows by equal steps until it stays constant."""
    first, last = mixing_flops(name, part, 0), mixing_flops(name, part, context - 1)
    if last == first:
        return first * context
    step = mixing_flops(name, part, 1) - first
    rising = (last - first) // step  # tokens before it stays constant, or all but one
    return first * rising + step * rising * (rising - 1) // 2 + last * (context - rising)


def _idle_parameters(layer: nn.Module) -> int:
    """Parameters of the experts that a token is not sent to."""
    idle = 0
    for module in layer.modules():
        if hasattr(module, "router"):
            size = sum(weight[0].numel() for weight in module.experts.parameters())
            idle += round(size * (module.router.num_experts - experts_of_token(module.router)))
    return idle


def state_bytes(part: nn.Module, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one row's state after a number of tokens."""
    spec = part.state_spec(num_tokens, dtype)
    return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in spec.values())


def _rollback_bytes(part: nn.Module, hidden_size: int, context: int, window: int, dtype: torch.dtype) -> int:
    """Two checkpoints and the inputs since the older one; a state that only grows is cut and needs neither.

    A new checkpoint is due once `window` tokens lie behind the last one, and calls of nearly `window` tokens can delay
    it by as much: 4 windows of inputs at the worst, 2 where tokens come one by one.
    """
    spec = part.state_spec(1, dtype)
    if not spec or spec != part.state_spec(2, dtype):
        return 0
    return 2 * state_bytes(part, context, dtype) + 4 * window * hidden_size * dtype.itemsize


def _plan_outer(model: HybridLMForCausalLM, layers: tuple[LayerPlan, ...], context: int) -> Figures:
    num_parameters = sum(p.numel() for p in model.parameters()) - sum(layer.num_parameters for layer in layers)
    head = 2 * model.lm_head.weight.numel() + stream_flops(model.model.residual_head)
    return Figures(num_parameters, num_parameters, 0, head, head * context, head, head * context)
