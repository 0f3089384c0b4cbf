"""How `generate` gets the right cache."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from .cache import HybridCache

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
        """Put a cache of ours into `model_kwargs`, or mark the user's own.

        Raises:
            ValueError: A prompt is padded on the right or holds pads only, or the kind of cache is not ours.
            NotImplementedError: Experts choose tokens (`expert_choice`), which cannot decode, with a cache or without.
        """
        for moe in self.base_model.moe_layers:
            moe.router.check_decodes()
        if not generation_config.is_assistant:  # transformers guesses an assistant's mask from pad ids in the text
            self._check_prompt(model_kwargs.get("attention_mask"))
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
        cache.drafting = generation_mode == GenerationMode.ASSISTED_GENERATION
        if generation_config.is_assistant:
            # one call makes one draft, and all of it may be taken back; twice, since another tokenizer may cut it anew
            cache.record_window = max(cache.record_window, 2 * (generation_config.max_new_tokens or max_cache_length))
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    @staticmethod
    def _check_prompt(attention_mask: Tensor | None) -> None:
        """Refuse prompts whose last column cannot be read."""
        if attention_mask is None or attention_mask.dim() != 2:
            return
        real = attention_mask != 0
        if bool(real[:, -1].all()):
            return
        for row, has_tokens in enumerate(real.any(1).tolist()):
            if not has_tokens:
                raise ValueError(f"attention_mask: row {row} has no real token")
        raise ValueError(
            f"attention_mask: generate reads the last column, but row {int((~real[:, -1]).nonzero()[0])} ends in pads; "
            "use left padding (padding_side='left')"
        )

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
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: HybridCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, with a filled cache in assisted decoding too.

        Raises:
            ValueError: Nothing is left to feed: the text is not longer than what the cache holds.
        """
        if is_first_iteration and getattr(past_key_values, "drafting", False) and past_key_values.num_columns:
            next_sequence_length = input_ids.shape[1] - past_key_values.num_columns  # transformers feeds all again
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                f"input_ids: past_key_values holds {past_key_values.num_columns} tokens, and {next_sequence_length} "
                "are left to feed; give the whole text, what the cache holds included"
            )
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: its paged cache has no place for recurrent state.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "continuous batching keeps a paged cache, which has no recurrent state; use generate() with a padded "
            "batch, or model.new_cache()"
        )
