"""Models that are not ours: what they name, which cache they keep, and what a caller must tell them.

transformers' causal language models count positions from the columns of the cache, not from the attention mask, so that
whoever pads passes `position_ids`, as `generate` always does. So do the checks, but for two rows that leave positions
to the model: chunks and single steps without pads.

Shapes: B batch, T tokens.
"""

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from .base import NotApplicable, Subject


class Refused(Exception):
    """The model says that it cannot do what a check is about; the message says how it says so."""


class ForeignSubject(Subject):
    """A causal language model that follows transformers' conventions and promises no more than they do.

    Args:
        model: The model under test.
        explicit_positions: Whether `position_ids` are passed in every call through a cache, as `generate` does.
        options: As in `Subject`.
    """

    def __init__(self, model: nn.Module, *args: Any, explicit_positions: bool = True, **options: Any) -> None:
        self.explicit_positions = explicit_positions
        super().__init__(model, *args, **options)

    def without_positions(self) -> "ForeignSubject":
        """The same model, called as by a loop that leaves positions to it."""
        return type(self)(self.model, self.input_ids, seed=self.seed, explicit_positions=False)

    @cached_property
    def cache_argument(self) -> str:
        """How `forward` calls its cache."""
        return "cache_params" if names(self.model, "cache_params") else "past_key_values"

    @cached_property
    def cache_type(self) -> type | None:
        """The class of the cache that one call makes, or `None`."""
        if not accepts(self.model, "use_cache"):
            return None
        with torch.no_grad():
            outputs = self.model(input_ids=self.input_ids[:1, :2], use_cache=True)
        return next((type(value) for value in outputs.values() if isinstance(value, Cache)), None)

    @property
    def keeps_cache(self) -> bool:
        """Whether one call returns a cache."""
        return self.cache_type is not None

    def arguments(self, cache: Any = None, **arguments: Any) -> dict[str, Any]:
        """The arguments of `forward`: the cache under its name, and positions where rows hold pads."""
        if not accepts(self.model, "use_cache"):
            arguments.pop("use_cache", None)
        mask = arguments.get("attention_mask")
        if cache is not None and self.cache_argument == "cache_params" and mask is not None:
            given = arguments.get("input_ids")
            if given is not None and given.shape[1] == 1:  # these take a mask with the prompt only, so does generate
                mask = arguments.pop("attention_mask")
        padded = mask is not None and not bool(mask.all())
        wanted = padded or (cache is not None and self.explicit_positions)
        if wanted and names(self.model, "position_ids") and arguments.get("position_ids") is None:
            arguments["position_ids"] = self._positions(arguments, mask, cache)
        return super().arguments(cache, **arguments)

    def _positions(self, arguments: dict[str, Any], mask: Tensor | None, cache: Any) -> Tensor | None:
        given = arguments.get("input_ids")
        batch, length = (given if given is not None else arguments["inputs_embeds"]).shape[:2]
        if mask is None:
            past = _columns(cache)
            if past is None:
                return None
            mask = torch.ones(batch, past + length, dtype=torch.long, device=self.model.device)
        # contiguous: a compiled step must not see a stride change
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:].contiguous()

    def forward(self, input_ids: Tensor | None, cache: Any = None, **kwargs: Any) -> Tensor:
        """Logits `[B, T, V]` without gradients; without a cache unless one is given."""
        kwargs.setdefault("use_cache", cache is not None)
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        with torch.no_grad():
            return self.call(cache=cache, **kwargs).logits

    def new_cache(self, **options: Any) -> Any:
        """An empty cache of the kind that the model makes itself.

        Raises:
            NotApplicable: The model keeps no cache, or has none of that kind.
        """
        kind = self.cache_type
        if kind is None:
            raise NotApplicable("forward returns no cache object")
        static, length = options.pop("static", False), options.pop("max_length", None)
        if options:
            raise NotApplicable(f"the model has no new_cache({', '.join(options)})")
        if static and kind is not DynamicCache:
            raise NotApplicable(f"the model keeps a {kind.__name__} of its own, which has no static form")
        if static:
            return StaticCache(config=self.model.config, max_cache_len=length)
        return DynamicCache(config=self.model.config) if kind is DynamicCache else kind()

    @property
    def window(self) -> int | None:
        """The shortest attention window, which transformers counts in columns of the cache, pads included."""
        config = self.model.config.get_text_config()
        found = [getattr(config, name, None) for name in ("sliding_window", "attention_window_size")]
        return min((size for size in found if size), default=None)


def _columns(cache: Any) -> int | None:
    """Columns that a cache holds, by its attention layers; `None` if it has none, since recurrent ones do not count."""
    lengths = [int(layer.get_seq_length()) for layer in cache.layers if hasattr(layer, "get_seq_length")]
    return max(lengths) if lengths else (0 if not cache.layers else None)


def parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a model's `forward`."""
    return dict(inspect.signature(model.forward).parameters)


def names(model: nn.Module, argument: str) -> bool:
    """Whether `forward` names an argument."""
    return argument in parameters(model)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether `forward` names an argument or takes any."""
    found = parameters(model)
    return argument in found or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())
