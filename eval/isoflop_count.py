"""Count the FLOPs of a run of the isoFLOP comparison.

Counted are matrix products, by torch's FlopCounterMode (2 for each multiply-add); attention as the full square that
eager attention computes, also where a kernel runs that the mode does not know. These stacks hold no scan. A step of
training counts as three forward passes. In a batch the rows inside a span are padded to the longest; what those pads
cost is in the count, and a second count leaves it out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from isoflop_arms import Settings, build_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hybridlm import HybridLMForCausalLM
from hybridlm.analysis.flops import product_flops

BACKWARD = 3  # a step of training in forward passes


def _cpu_attention(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


@contextmanager
def counted(totals: list[int]) -> Iterator[None]:
    """Append the FLOPs of the matrix products that are run inside."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: _cpu_attention}) as counter:
        yield
    totals.append(counter.get_total_flops())


class LayerWatch:
    """Count the tokens that reach each layer, and what pads among them cost.

    Args:
        model: The model whose layers are watched as long as this lives.
    """

    def __init__(self, model: HybridLMForCausalLM) -> None:
        self.num_layers = len(model.model.layers)
        self.pad_flops = 0
        self._clear()
        self.handles = [model.model.embed_tokens.register_forward_pre_hook(self._count_all)]
        for index, layer in enumerate(model.model.layers):
            self.handles.append(layer.register_forward_pre_hook(self._counter(index, layer), with_kwargs=True))

    def _clear(self) -> None:
        self.real, self.computed, self.num_tokens = [0] * self.num_layers, [0] * self.num_layers, 0

    def _count_all(self, module: nn.Module, args: tuple) -> None:
        self.num_tokens += args[0].numel()

    def _counter(self, index: int, layer: nn.Module) -> Callable[..., None]:
        products = sum(product_flops(part) for part in (layer.mixer, layer.channel_mixer))
        square = 4 * layer.mixer.num_heads * layer.mixer.head_dim  # scores, and values times weights

        def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            batch, longest = args[0].shape[:2]
            mask = kwargs["sequence"].token_mask
            lengths = [longest] * batch if mask is None else mask.sum(1).tolist()
            real = sum(lengths)
            self.computed[index] += batch * longest
            self.real[index] += real
            self.pad_flops += products * (batch * longest - real)
            self.pad_flops += square * (batch * longest**2 - sum(length**2 for length in lengths))

        return count

    def shares(self) -> dict[str, list[float]]:
        """Share of the tokens that each layer was given, without and with pads, since the last call of this."""
        counts = {"real": self.real, "computed": self.computed}
        total = max(self.num_tokens, 1)
        shares = {name: [round(count / total, 4) for count in layers] for name, layers in counts.items()}
        self._clear()
        return shares

    def close(self) -> None:
        """Stop counting."""
        for handle in self.handles:
            handle.remove()


def flops_of_plain_step(settings: Settings) -> int:
    """FLOPs of one step of the plain model."""
    model, totals = HybridLMForCausalLM(build_config("plain", settings)), []
    with torch.no_grad(), counted(totals):
        model(input_ids=torch.zeros(settings.batch_size, settings.length, dtype=torch.long))
    return BACKWARD * totals[0]
