"""How `generate` gets the right cache."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig

from .cache import DEFAULT_RECORD_WINDOW, HybridCache

_STATIC = ("static",)
_DYNAMIC = (None, "dynamic")


class HybridGeneration:
    """Overrides of `GenerationMixin`; stands before it among the bases of the causal language model."""

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a cache of ours into `model_kwargs`, or mark the user's own."""
        kind = generation_config.cache_implementation
        given = model_kwargs.get("past_key_values")
        if given is not None:
            if kind is not None:
                raise ValueError("cache_implementation: give it or past_key_values, not both")
            self.check_cache(given)
            given._is_user_defined = True
            cache = given
        elif generation_config.use_cache is False:
            return
        elif kind not in _STATIC + _DYNAMIC:
            raise ValueError(
                f"cache_implementation: {kind!r} is not available for this model, expected 'dynamic' or 'static'"
            )
        else:
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            cache = self.new_cache(static=kind in _STATIC, max_length=length if kind in _STATIC else None)
        cache.record_window = max(cache.record_window, self._draft_tokens(generation_config, max_cache_length))
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    @staticmethod
    def _draft_tokens(generation_config: GenerationConfig, max_cache_length: int) -> int:
        """The most tokens that assisted decoding may take back at once."""
        if generation_config.is_assistant and generation_config.num_assistant_tokens_schedule != "constant":
            return max_cache_length  # the schedule raises the number of drafts without a bound
        drafts = (generation_config.prompt_lookup_num_tokens, generation_config.num_assistant_tokens)
        return max(DEFAULT_RECORD_WINDOW, *(2 * count for count in drafts if count))

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: HybridCache, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Which tokens of this call are real, at a shape that does not change; called for static caches.

        Keys of earlier tokens sit at their index, so that their mask is not needed.
        """
        batch, length = inputs_embeds.shape[:2]
        if attention_mask is None:
            return {"token_mask": torch.ones(batch, length, dtype=torch.bool, device=inputs_embeds.device)}
        return {"token_mask": attention_mask[:, -length:].bool()}

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, after a check that no row ends in pads.

        Raises:
            ValueError: A prompt is padded on the right.
        """
        if kwargs.get("is_first_iteration") and attention_mask is not None and attention_mask.dim() == 2:
            right_padded = (attention_mask[:, -1] == 0) & (attention_mask != 0).any(1)
            if bool(right_padded.any()):
                raise ValueError(
                    "attention_mask: generate reads the last column, but row "
                    f"{int(right_padded.nonzero()[0])} ends in pads; use left padding (padding_side='left')"
                )
        return super().prepare_inputs_for_generation(input_ids, *args, attention_mask=attention_mask, **kwargs)
