"""Which parameters weight decay applies to."""

from typing import Any

from torch import nn

# decay rates, skips and step sizes of recurrences: pulling them to zero changes how long a state remembers
KEPT_FREE = {"A_log", "D", "dt_bias"}


def decayed_parameter_names(model: nn.Module, decay_embeddings: bool = False) -> list[str]:
    """Names of the parameters that decay: matrices, but not `A_log`, `D`, `dt_bias`, nor, by default, embeddings.

    Norm weights, biases and other vectors never do, nor does a parameter with a true `_no_weight_decay` attribute.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2
        and name.rpartition(".")[2] not in KEPT_FREE
        and not getattr(parameter, "_no_weight_decay", False)
        and (decay_embeddings or id(parameter) not in embeddings)
    ]


def parameter_groups(model: nn.Module, weight_decay: float, decay_embeddings: bool = False) -> list[dict[str, Any]]:
    """The model's trainable parameters in two groups for an optimizer: those that decay, and the rest."""
    decayed = set(decayed_parameter_names(model, decay_embeddings))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trainable if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trainable if name not in decayed], "weight_decay": 0.0},
    ]
