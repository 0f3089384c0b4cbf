"""One depth step: a mixer and a channel mixer, each between norms and a residual.

Placements: `pre` is x + f(norm(x)), `post` is norm(x + f(x)), `sandwich` is x + norm(f(norm(x))).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache import HybridCache
from .cache_entries import AttentionEntry, RecurrentEntry
from .cache_layer import HybridCacheLayer
from .conv import ConvState
from .masks import SequenceInfo
from .norms import build_norm
from .registry import HALVES, RESIDUALS, build_part


class HybridLMLayer(GradientCheckpointingLayer):
    """A layer built from a recipe.

    Args:
        config: A `HybridLMConfig` whose parts are resolved.
        layer_idx: Depth of the layer.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        recipe = config.layer_layout[layer_idx]
        spec, size = config.layer_specs[recipe], config.hidden_size
        norm = spec.get("norm") or config.norm
        self.placement = norm["placement"]
        for half, registry in HALVES.items():
            present = spec[half] is not None
            short = half.removesuffix("_mixer")
            path = f"layer_specs.{recipe}.{half}"
            before = present and self.placement in ("pre", "sandwich")
            after = present and self.placement in ("post", "sandwich")
            self.add_module(f"{short}_norm", build_norm(norm, size) if before else None)
            self.add_module(half, build_part(spec[half], registry, path, size) if present else None)
            self.add_module(f"{short}_post_norm", build_norm(norm, size) if after else None)
            residual = self._build_residual(config, half) if present else None
            self.add_module(f"{short}_residual", residual)

    def _build_residual(self, config: Any, half: str) -> nn.Module:
        residual = build_part(config.residual, RESIDUALS, "residual", config.hidden_size)
        if self.placement not in residual.placements:
            allowed = " or ".join(repr(name) for name in residual.placements)
            raise ValueError(
                f"residual: {config.residual['name']} needs norm placement {allowed}, recipe "
                f"{config.layer_layout[self.layer_idx]!r} has {self.placement!r}, which leaves what a sub-layer sees "
                "without a norm"
            )
        specs = [config.layer_specs[recipe] for recipe in config.layer_layout[: self.layer_idx + 1]]
        present = [(depth, name) for depth, spec in enumerate(specs) for name in HALVES if spec[name] is not None]
        residual.place(present.index((self.layer_idx, half)))
        return residual

    def new_entry(self, static_length: int | None = None) -> HybridCacheLayer:
        """Make this layer's entry for a cache; `static_length` slots, or growing when `None`."""
        entry = HybridCacheLayer(*(self._new_half(half, static_length) for half in HALVES))
        device = next(self.parameters()).device
        if device.type != "meta":  # a layer that is kept on the disk runs where its input is
            entry.device = device
        return entry

    def _new_half(self, half: str, static_length: int | None) -> Any:
        module = getattr(self, half)
        spec = getattr(module, "state_spec", None)
        if spec is None or not spec(1, torch.float32):
            return None
        is_static = static_length is not None
        if hasattr(module, "window") and module.window is None:
            convolved = getattr(module, "conv1d", None) is not None
            return AttentionEntry(static_length, RecurrentEntry(ConvState, is_static) if convolved else None)
        return RecurrentEntry(module.state_type, is_static)

    def _apply_half(
        self, half: str, hidden_states: Tensor, sequence: SequenceInfo, entries: HybridCacheLayer | None
    ) -> Tensor:
        module = getattr(self, half)
        if module is None:
            return hidden_states
        short = half.removesuffix("_mixer")
        norm, post_norm = getattr(self, f"{short}_norm"), getattr(self, f"{short}_post_norm")
        residual = getattr(self, f"{short}_residual")
        inner, context = residual(hidden_states)
        inner = inner if norm is None else norm(inner)
        entry = None if entries is None else getattr(entries, half)
        update = module(inner, None, sequence)[0] if entry is None else entry.run(module, inner, sequence)
        if self.placement == "sandwich":
            update = post_norm(update)
        hidden_states = residual.write(hidden_states, update, context)
        return post_norm(hidden_states) if self.placement == "post" else hidden_states

    def forward(
        self, hidden_states: Tensor, sequence: SequenceInfo | None = None, past_key_values: HybridCache | None = None
    ) -> Tensor:
        """Map the stream, `[B, T, D]` or `[B, T, streams, D]`, to the stream after this layer."""
        entries = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        for half in HALVES:
            hidden_states = self._apply_half(half, hidden_states, sequence, entries)
        return hidden_states
