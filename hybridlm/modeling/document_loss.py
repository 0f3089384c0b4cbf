"""Sums over the documents of a batch, so that a loss depends neither on packing, pads nor micro-batches.

Shapes: B batch, T tokens, M documents a row (1, or T when documents are packed; most of the T are then empty).
"""

import torch
from torch import Tensor, nn

from .precision import state_dtype


def _documents(segment_ids: Tensor) -> Tensor:
    """Number the segments of each row from 0, `[B, T]`, whatever their ids are."""
    borders = segment_ids[:, 1:] != segment_ids[:, :-1]
    return nn.functional.pad(borders.long().cumsum(-1), (1, 0))


def sum_by_document(values: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Sum `[B, T, ...]` over the tokens of each document, giving `[B, M, ...]`."""
    if segment_ids is None:
        return values.sum(1, keepdim=True)
    index = _documents(segment_ids)
    index = index.view(*index.shape, *(1,) * (values.dim() - 2)).expand_as(values)
    return torch.zeros_like(values).scatter_add(1, index, values)


def spread_over_documents(values: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Give every token the value of its document: `[B, M]` as `[B, T]`, or `[B, 1]` for one document a row."""
    return values if segment_ids is None else values.gather(1, _documents(segment_ids))


def label_tokens_per_document(
    labels: Tensor, segment_ids: Tensor | None = None, token_mask: Tensor | None = None, *, shifted: bool = False
) -> Tensor:
    """Count the tokens of each document that have a label to predict.

    Args:
        labels: `[B, T]`, laid out as the router logits are, -100 where there is none. The label at t + 1 is predicted
            at t, so a document's first label is predicted by nobody.
        segment_ids: `[B, T]` or None for one document a row.
        token_mask: `[B, T]`, true at real tokens, or None for all.
        shifted: Whether `labels` are `shift_labels`, with the label predicted at t at t.

    Returns:
        `[B, M]`, int64.
    """
    predicted = labels != -100
    if not shifted:
        predicted = predicted[:, 1:]
        if segment_ids is not None:
            predicted = predicted & (segment_ids[:, 1:] == segment_ids[:, :-1])
        if token_mask is not None:
            predicted = predicted & token_mask[:, 1:].bool()
        predicted = nn.functional.pad(predicted, (0, 1))
    if token_mask is not None:
        predicted = predicted & token_mask.bool()
    return sum_by_document(predicted.long(), segment_ids)


def weigh_documents(
    losses: Tensor, num_tokens: Tensor, label_tokens: Tensor | None, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Sum losses of documents `[B, M]`, each times its label tokens, divided by the items in the batch."""
    weights = num_tokens if label_tokens is None else label_tokens.to(losses.dtype)
    if num_items_in_batch is None:
        num_items_in_batch = weights.sum().clamp(min=1)
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return (losses * weights).sum() / num_items_in_batch


def document_mean_loss(
    values: Tensor,
    *,
    token_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    label_tokens: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean of a value over the real tokens of each document, weighted as the cross entropy weighs documents.

    Args:
        values: `[B, T]`, one value a token; what stands at pads is never read.
        token_mask: `[B, T]`, true at the tokens that count; None for all.
        segment_ids: `[B, T]`, non-decreasing; None for one document a row.
        label_tokens: `[B, M]` from `label_tokens_per_document`; None weighs a document by its tokens. A document
            without a token that counts adds 0.
        num_items_in_batch: Label tokens of all micro-batches together; None for the sum of the weights here.

    Returns:
        The scalar `sum_d label_tokens_d * mean_d / num_items_in_batch`.
    """
    values = values.to(state_dtype(values.dtype))
    real = torch.ones_like(values) if token_mask is None else token_mask.to(values.dtype)
    if token_mask is not None:
        values = values.where(token_mask.bool(), 0.0)
    num_tokens = sum_by_document(real, segment_ids)  # [B, M]
    means = sum_by_document(values, segment_ids) / num_tokens.clamp(min=1)
    return weigh_documents(means, num_tokens, label_tokens, num_items_in_batch)
