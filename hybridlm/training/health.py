"""The health of routers: how even the load of the experts is, and how even the scores are."""

import math
import re

import torch
from torch import Tensor, nn

DEAD_SHARE = 0.01  # an expert is dead with less than this fraction of the mean load


@torch.no_grad()
def router_health(model: nn.Module) -> dict[str, float]:
    """Describe what every router did since the last call, and start anew.

    The counts are those that `losses.update_selection_bias` added up over micro-batches and processes, so every process
    gets the same figures without talking to another. A zero or copy expert counts as an expert.

    Args:
        model: Any model with routers inside.

    Returns:
        For each expert layer `layer_3/expert_max_load`, the largest load over the mean load (1 is balance);
        `layer_3/router_entropy`, the entropy of the mean scores as a fraction of the largest possible; and
        `layer_3/dead_experts`, how many have less than `DEAD_SHARE` of the mean load.
    """
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        record = getattr(module, "load_record", None)
        if not hasattr(module, "tokens_per_expert") or record is None:
            continue
        module.load_record = None
        if float(record[0].sum()):
            depth = re.search(r"layers\.(\d+)\.", name)
            label = f"layer_{depth.group(1)}" if depth else name
            found |= {f"{label}/{key}": value for key, value in _figures(*record.cpu()).items()}
    return found


def _figures(load: Tensor, scores: Tensor) -> dict[str, float]:
    """The figures of one router from its summed loads and scores `[E]`."""
    mean = scores / scores.sum()
    entropy = float(torch.special.entr(mean).sum())
    return {
        "expert_max_load": float(load.max() / load.mean()),
        "router_entropy": entropy / math.log(len(mean)) if len(mean) > 1 else 1.0,
        "dead_experts": float((load < DEAD_SHARE * load.mean()).sum()),
    }
