"""Hybrid language models: any stack of mixers and channel mixers, as ordinary transformers models.

Shapes: B batch, T tokens, D hidden size, V vocabulary, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .backbone import HybridLMModel, HybridLMPreTrainedModel
from .cache import HybridCache
from .configuration_hybridlm import HybridLMConfig
from .generation import HybridGeneration
from .losses import count_expert_load, router_losses
from .outputs import HybridLMCausalLMOutput, HybridLMModelOutput
from .spans import span_losses


class HybridLMForCausalLM(HybridLMPreTrainedModel, HybridGeneration, GenerationMixin):
    """The stack with a language-model head.

    Args:
        config: What to build.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridLMConfig) -> None:
        super().__init__(config)
        self.model = HybridLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **kwargs: Any,
    ) -> HybridLMCausalLMOutput:
        """Predict the next token.

        Args:
            input_ids: As in `HybridLMModel`, like the arguments that are not named here.
            labels: `[B, T]`, the token ids; -100 is left out. They are shifted here. A label is never predicted from
                another document or from a pad.
            output_router_logits: Whether to return the router logits `[B, T, E]` of each expert layer, and what each
                span chose.
            logits_to_keep: Last tokens to compute logits for (0 for all), or their columns.
            kwargs: Also `output_memory_trace`, `shift_labels` and `num_items_in_batch`, as Trainer gives them.

        Returns:
            Logits `[B, T, V]`; with labels the loss, losses of routers and spans included, and those alone as
            `aux_loss`.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        learns = self.training and self.model.moe_layers
        if past_key_values is not None and getattr(past_key_values, "recording", False):
            # assisted decoding keeps the logits of its drafts, and may take back as many
            drafts = logits_to_keep if isinstance(logits_to_keep, int) else logits_to_keep.numel()
            past_key_values.record_window = max(past_key_values.record_window, drafts)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            output_router_logits=bool(wanted or learns or (labels is not None and self.model.moe_layers)),
            **{name: value for name, value in kwargs.items() if name not in ("num_items_in_batch", "shift_labels")},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        if self.config.logit_multiplier != 1.0:
            logits = logits * self.config.logit_multiplier
        loss = aux_loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss, aux_loss = self._losses(logits, labels, outputs, **kwargs)
        if self.training:
            self._count_loads(outputs, input_ids)
        records = outputs.span_records if wanted else None
        return HybridLMCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if wanted else None,
            span_taken=None if records is None else tuple(record.taken for record in records),
            span_scores=None if records is None else tuple(record.scores for record in records),
            memory_trace=outputs.memory_trace,
        )

    def _layer_masks(self, outputs: HybridLMModelOutput) -> list[Tensor | None]:
        """For each expert layer, the tokens that reached it where that is not all."""
        masks = outputs.layer_masks or {}
        return [masks.get(depth) for depth in self.model.moe_depths]

    def _count_loads(self, outputs: HybridLMModelOutput, input_ids: Tensor | None) -> None:
        """Count what routers chose, for their biases and metrics."""
        layers = self.model.moe_layers
        if layers:
            masks = self._layer_masks(outputs)
            seen = {"layer_masks": masks, "token_ids": input_ids}
            count_expert_load(layers, outputs.router_logits, outputs.token_mask, **seen)

    def _losses(
        self, logits: Tensor, labels: Tensor | None, outputs: HybridLMModelOutput, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Cross entropy plus router losses, and the router losses alone."""
        segments, shift_labels = outputs.segment_ids, kwargs.pop("shift_labels", None)
        if labels is not None and segments is not None:
            begins = nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
            labels = labels.masked_fill(begins, -100)
        if labels is not None and outputs.token_mask is not None:
            after_pad = nn.functional.pad(~outputs.token_mask[:, :-1], (1, 0))
            labels = labels.masked_fill(after_pad, -100)
        items = kwargs.get("num_items_in_batch")
        loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.vocab_size, shift_labels=shift_labels,
            num_items_in_batch=items,
        )  # fmt: skip
        where = (shift_labels if labels is None else labels, outputs.token_mask, segments, items)
        aux_loss, layers = None, self.model.moe_layers
        if layers:
            self._check_router_gradients(outputs.router_logits)
            masks = self._layer_masks(outputs)
            aux = router_losses(layers, outputs.router_logits, *where, shifted=labels is None, layer_masks=masks)
            aux_loss = aux["load_balancing"] + aux["z"]
        if outputs.span_records:
            extra = span_losses(self.model.spans, outputs.span_records, *where, shifted=labels is None)
            if extra is not None:
                aux_loss = extra if aux_loss is None else aux_loss + extra.to(aux_loss.device)
        return loss if aux_loss is None else loss + aux_loss.to(loss.device), aux_loss

    def _check_router_gradients(self, router_logits: tuple[Tensor, ...]) -> None:
        """Refuse to train router losses on logits that were recorded without a gradient."""
        for moe, logits in zip(self.model.moe_layers, router_logits, strict=True):
            has_loss = moe.load_balancing_coef or moe.z_loss_coef
            wanted = torch.is_grad_enabled() and moe.router.weight.requires_grad
            if self.training and has_loss and wanted and not logits.requires_grad:
                raise ValueError(
                    "gradient_checkpointing: with use_reentrant=True the router losses would have no gradient; use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )


class HybridLMForSequenceClassification(HybridLMPreTrainedModel):
    """The stack with a classifier on the last real token of every row.

    Args:
        config: What to build; `num_labels` classes.
    """

    def __init__(self, config: HybridLMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HybridLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classify rows: logits `[B, num_labels]`.

        The last real token is read from the attention mask, else from `pad_token_id` in `input_ids`, else it is the
        last column.
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        scores = self.score(outputs.last_hidden_state)  # [B, T, num_labels]
        batch, length = scores.shape[:2]
        last = torch.full((batch,), length - 1, device=scores.device)
        if outputs.token_mask is not None:
            columns = torch.arange(length, device=scores.device)
            last = torch.where(outputs.token_mask, columns, -1).max(1).values.clamp(min=0)
        logits = scores[torch.arange(batch, device=scores.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class HybridLMForTokenClassification(HybridLMPreTrainedModel):
    """The stack with a classifier on every token.

    Args:
        config: What to build; `num_labels` classes.
    """

    def __init__(self, config: HybridLMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HybridLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Classify tokens: logits `[B, T, num_labels]`."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class HybridLMForQuestionAnswering(HybridLMPreTrainedModel):
    """The stack with start and end scores on every token.

    Args:
        config: What to build.
    """

    def __init__(self, config: HybridLMConfig) -> None:
        super().__init__(config)
        self.model = HybridLMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Score where the answer begins and ends: `[B, T]` each."""
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        start, end = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "HybridLMForCausalLM",
    "HybridLMForQuestionAnswering",
    "HybridLMForSequenceClassification",
    "HybridLMForTokenClassification",
    "HybridLMModel",
    "HybridLMPreTrainedModel",
]
