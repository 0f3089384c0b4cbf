"""What models return, and how what layers recorded gets back into the caller's layout.

Layers see compacted rows, and layers inside a span see the tokens that entered; the caller sees columns.

Shapes: B batch, T columns of the call.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .masks import Compaction
from .passage import Journal, Passage, SpanRecord, lift_all
from .record import map_tensors


@dataclass
class HybridLMModelOutput(MoeModelOutputWithPast):
    """What the base model returns.

    Attributes:
        token_mask: `[B, T]`, True at real tokens; `None` when all are.
        segment_ids: `[B, T]`, number of the document inside the row; `None` when a row holds one.
        span_records: What each span did; in training, or when router logits are asked for.
        layer_masks: By depth, `[B, T]`, True at the tokens that reached a layer inside a span.
        memory_trace: With `output_memory_trace=True`, for every layer with a neural memory `[B, T, H, 5]`: surprise
            (norm of the token's gradient), norm of the memory's weights where the token's chunk began, learning rate,
            momentum decay and share forgotten; 0 at tokens that did not reach the layer.
    """

    token_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    span_records: tuple[SpanRecord, ...] | None = None
    layer_masks: dict[int, Tensor] | None = None
    memory_trace: tuple[Tensor, ...] | None = None


@dataclass
class HybridLMCausalLMOutput(MoeCausalLMOutputWithPast):
    """What the causal language model returns.

    Attributes:
        span_taken: For every span `[B, T]`, True at the tokens that went through it; with the router logits.
        span_scores: For every span `[B, T]`, the scores that its choice was made from, 0 at tokens that did not reach
            it; with the router logits.
        memory_trace: With `output_memory_trace=True`, for every layer with a neural memory `[B, T, H, 5]`: surprise
            (norm of the token's gradient), norm of the memory's weights where the token's chunk began, learning rate,
            momentum decay and share forgotten; 0 at tokens that did not reach the layer.
    """

    span_taken: tuple[Tensor, ...] | None = None
    span_scores: tuple[Tensor, ...] | None = None
    memory_trace: tuple[Tensor, ...] | None = None


def leave_traces(output: HybridLMModelOutput, journal: Journal) -> None:
    """Put what memories recorded into the output, for the tokens around all spans."""
    where = dict(journal.layers)
    traces = {depth: torch.cat(pieces, dim=1) for depth, pieces in sorted(journal.traces.items())}
    output.memory_trace = tuple(lift_all(where[depth], trace) for depth, trace in traces.items())


def leave_spans(
    output: HybridLMModelOutput,
    journal: Journal,
    moe_depths: list[int],
    attention_depths: list[int],
    with_records: bool,
) -> None:
    """Bring what was recorded inside spans back to the tokens of the model.

    Attention weights are brought back where no key lies in the cache; otherwise their keys are the slots of the layer.

    Args:
        output: What the layers returned and transformers' hooks recorded.
        journal: What the spans did.
        moe_depths: Depths of the expert layers.
        attention_depths: Depths of the attention layers.
        with_records: Whether to tell what each span did.
    """
    where = dict(journal.layers)

    def at(depth: int) -> Passage | None:
        return where.get(depth)

    if output.hidden_states:  # the first came into layer 0, the last left the model
        last = len(output.hidden_states) - 1
        states = (output.hidden_states[0], *output.hidden_states[1:last])
        lifted = [x if x is None else lift_all(at(max(depth - 1, 0)), x, before=True) for depth, x in enumerate(states)]
        output.hidden_states = (*lifted, output.hidden_states[last])
    if output.router_logits:
        output.router_logits = tuple(
            lift_all(at(depth), x) for depth, x in zip(moe_depths, output.router_logits, strict=True)
        )
    if output.attentions:
        output.attentions = tuple(
            _lift_attention(at(depth), x) for depth, x in zip(attention_depths, output.attentions, strict=True)
        )
    if with_records:
        output.span_records = tuple(_record(passage) for passage in journal.passages)
        output.layer_masks = {
            depth: lift_all(passage.outer, passage.selection.taken)
            for depth, passage in journal.layers
            if passage is not None
        }


def _record(passage: Passage) -> SpanRecord:
    chosen, outer = passage.selection, passage.outer
    reached = torch.ones_like(chosen.taken) if passage.mask is None else passage.mask
    values = (chosen.scores, chosen.taken, chosen.wished, reached, chosen.sizes)
    return SpanRecord(passage.number, *(value if value is None else lift_all(outer, value) for value in values))


def _lift_attention(passage: Passage | None, weights: Tensor) -> Tensor:
    """Attention weights `[B, H, T', S']` inside spans as `[B, H, T, S]`."""
    if passage is None:
        return weights
    queries = lift_all(passage, weights.movedim(2, 1)).movedim(1, 2)
    if weights.shape[2] != weights.shape[3]:
        return queries
    return lift_all(passage, queries.movedim(3, 1)).movedim(1, 3)


def leave_compaction(output: HybridLMModelOutput, compaction: Compaction, attention_mask: Any) -> None:
    """Bring what was recorded for compacted tokens into the caller's layout, 0 at pads."""
    output.last_hidden_state = compaction.restore(output.last_hidden_state)
    if output.segment_ids is not None:
        output.segment_ids = compaction.carry(output.segment_ids)  # a pad inside a document does not end it
    for name in ("hidden_states", "router_logits", "memory_trace"):
        if getattr(output, name, None):
            output[name] = tuple(compaction.restore(x) for x in getattr(output, name))
    if output.span_records is not None:
        output.span_records = tuple(map_tensors(record, compaction.restore) for record in output.span_records)
        output.layer_masks = {depth: compaction.restore(x) for depth, x in output.layer_masks.items()}
    if getattr(output, "attentions", None):
        keys = compaction
        if isinstance(attention_mask, Tensor) and attention_mask.shape[1] != compaction.real.shape[1]:
            keys = Compaction.from_mask(attention_mask.bool())
        output.attentions = tuple(
            keys.restore(weights, dim=3) if weights.shape[3] == keys.num_tokens else weights
            for weights in (compaction.restore(w, dim=2) for w in output.attentions)
        )
