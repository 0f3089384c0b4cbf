"""Weights with which state matters.

A freshly initialised model hardly uses its state: attention is uniform, and a small step size writes next to nothing
into a recurrence. A check of the state would pass on it whatever the code does.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .base import Subject, relative_error


@torch.no_grad()
def scale_weights(model: nn.Module, seed: int = 0, gain: float = 1.2) -> nn.Module:
    """Give a model random weights with which every token leaves a trace in the logits of later ones.

    Matrices are drawn with standard deviation `gain / sqrt(fan in)`, norms around one, biases and learned sinks around
    zero, ties between residual streams around what they are. Step sizes lie between 0.1 and 0.7 and decays between 0.1
    and 1 per unit step, so that a recurrence remembers a few to a few dozen tokens.

    Args:
        model: Any model; it is changed in place.
        seed: Where the random numbers start.
        gain: Size of the matrices; a larger one makes attention sharper.

    Returns:
        The model.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    seen = set()
    for name, parameter in [*model.named_parameters(), *_float_buffers(model)]:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        leaf = name.rsplit(".", 1)[-1]
        parameter.copy_(_draw(name, leaf, parameter, id(parameter) in norms, gain, generator))
    return model


def _float_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Biases that are kept as buffers; other buffers follow from the config."""
    return [(name, b) for name, b in model.named_buffers() if b.is_floating_point() and name.endswith("bias")]


def _draw(name: str, leaf: str, parameter: Tensor, is_norm: bool, gain: float, generator: torch.Generator) -> Tensor:
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(parameter.shape, generator=generator, dtype=torch.float64)

    normal = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if leaf == "dt_bias" or name.endswith("dt_proj.bias"):
        return uniform(0.1, 0.7).expm1().log()  # inverse of softplus
    if leaf == "A_log":
        return uniform(0.1, 1.0).log()
    if leaf == "mix_base":  # random ones would cut the streams apart, or let them blow up
        return parameter.detach().double() + 0.1 * normal
    if leaf == "mix_scale":
        return uniform(0.1, 0.2)
    if leaf == "threshold_bias":
        return 0.05 * normal  # some tokens enter a span, and some do not
    if is_norm:
        around = parameter.detach().double().mean().round().item() if leaf == "weight" else 0.0
        return around + 0.2 * normal
    if parameter.dim() < 2:
        return 0.3 * normal
    if "conv" in name:
        return normal * gain / math.sqrt(parameter.shape[-1])
    if "embed" in name:
        return normal
    return normal * gain / math.sqrt(parameter.shape[-1])


def state_influence(subject: Subject, num_past: int | None = None) -> dict[str, float]:
    """How far the logits of the next tokens move when one tensor of the cache is set to zero.

    Args:
        subject: A model of ours.
        num_past: Tokens in the cache; half of the text by default.

    Returns:
        For every tensor of every layer, `"0.mixer.recurrent_states"` and so on, the relative change.
    """
    ids = subject.input_ids
    num_past = ids.shape[1] // 2 if num_past is None else num_past

    def run(spoil: Any = None) -> Tensor:
        cache = subject.new_cache()
        subject.forward(ids[:, :num_past], cache)
        if spoil is not None:
            number, name = spoil
            cache.parts()[number].named_tensors()[name].zero_()
        return subject.forward(ids[:, num_past:], cache)

    cache, expected = subject.new_cache(), run()
    subject.forward(ids[:, :num_past], cache)
    tensors = [(number, *item) for number, part in cache.parts().items() for item in part.named_tensors().items()]
    names = [(number, name) for number, name, tensor in tensors if tensor.numel()]
    return {f"{number}.{name}": relative_error(run((number, name)), expected) for number, name in names}
