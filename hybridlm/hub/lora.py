"""Which modules and parameters of a hybrid model low-rank adapters go on.

Reference: Hu et al. 2021, "LoRA", arXiv:2106.09685.
"""

import copy
from typing import Any

import torch
from torch import nn

from ..modeling.backbone import HybridLMModel
from ..modeling.experts import Experts


def lora_targets(config: Any, *, experts: bool = True) -> dict[str, list[str]]:
    """Name the targets of low-rank adapters, as arguments of peft's `LoraConfig`.

    Every linear projection of every mixer and channel mixer is covered; routers, their gates, convolutions, the
    embedding and the head are not. Fused experts are no modules, so peft adapts them as parameters, which does not go
    together with `lora_dropout`.

    Args:
        config: A `HybridLMConfig`.
        experts: Whether the fused experts are adapted.

    Returns:
        `target_modules` and, where there are any, `target_parameters`.

    Example:
        >>> peft.get_peft_model(model, peft.LoraConfig(r=8, **lora_targets(model.config)))
    """
    with torch.device("meta"):
        layers = HybridLMModel(copy.deepcopy(config)).layers
    modules, parameters = set(), set()
    for name, module in layers.named_modules():
        half, _, inner = name.partition(".")[2].partition(
            "."
        )  # "0.mixer.in_proj": a half of a layer, and what is in it
        if half not in ("mixer", "channel_mixer"):
            continue
        if isinstance(module, nn.Linear) and not inner.endswith("shared_expert_gate"):
            modules.add(inner.rpartition(".")[2])
        elif isinstance(module, Experts) and experts:
            parameters.update(f"{inner}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))
    targets = {"target_modules": sorted(modules)}
    return targets | {"target_parameters": sorted(parameters)} if parameters else targets
