"""Which modules stay in full precision when transformers quantises a model on loading.

A recurrence multiplies its errors along the sequence and a router turns them into other experts, so what makes step
sizes, decays and scores is left out, with the heads. A part says so itself: the class attribute `full_precision` names
its modules. Experts are fused parameters and no linear layers, so quantizers leave them alone too.
"""

import copy
from typing import Any

from .registry import HALVES, SPANS, resolve_config, span_places

HEADS = ("lm_head", "score", "qa_outputs")

# how the quantization configs of transformers call their list of modules to leave out
_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


def quantization_skip_modules(config: Any) -> list[str]:
    """Names of the modules to leave out when a model is quantised.

    Args:
        config: A `HybridLMConfig`.

    Returns:
        Module names such as `layers.0.mixer.x_proj`, without the prefix that the heads add, as the quantizers of
        transformers match them. `from_pretrained` uses them when the quantization config has no list of its own.

    Example:
        >>> BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=quantization_skip_modules(config))
    """
    names, config = [], copy.deepcopy(config)
    resolve_config(config)
    for depth, recipe in enumerate(config.layer_layout):
        for half, registry in HALVES.items():
            spec = config.layer_specs[recipe].get(half)
            part = registry.get(spec["name"]) if spec else None
            names += [f"layers.{depth}.{half}.{name}" for name in getattr(part, "full_precision", ())]
    for number, (entry, *_) in enumerate(span_places(config)):
        part = SPANS[config.spans[entry]["name"]]
        names += [f"spans.{number}.{name}" for name in getattr(part, "full_precision", ())]
    return [*names, *HEADS]


def with_skip_list(quantization_config: Any, config: Any) -> Any:
    """A copy of a quantization config that leaves out `quantization_skip_modules`, unless it has a list of its own.

    Args:
        quantization_config: One of transformers' classes, or its dictionary.
        config: A `HybridLMConfig`.
    """
    if isinstance(quantization_config, dict):
        from transformers.quantizers.auto import AutoQuantizationConfig

        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    names = [name for name in _SKIP_LISTS if hasattr(quantization_config, name)]
    if not names or any(getattr(quantization_config, name) is not None for name in names):
        return quantization_config
    filled = copy.deepcopy(quantization_config)
    setattr(filled, names[0], quantization_skip_modules(config))
    return filled
