"""Checks of training: gradient checkpointing, and losses that add up over micro-batches."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from .base import NotApplicable, Subject, add_gradients, gradient_error, gradients, require_independent_tokens


def _labels(subject: Subject, rows: Tensor) -> Tensor:
    rng = subject.rng("labels")
    labels = rows.clone()
    drop = [[rng.random() < 0.2 for _ in row] for row in labels.tolist()]
    return labels.masked_fill(torch.tensor(drop, device=labels.device), -100)


def _loss_gradients(model: nn.Module, **batch: Tensor | int | None) -> tuple[float, dict[str, Tensor]]:
    with torch.enable_grad():
        loss = model(use_cache=False, **batch).loss
        loss.backward()
    return float(loss.detach()), gradients(model)


def _enable_checkpointing(model: nn.Module, reentrant: bool) -> None:
    # the old name warns since transformers 5.23 and is the only one before it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def gradient_checkpointing(subject: Subject) -> float:
    """Gradient checkpointing changes neither the loss nor a gradient, or says that it cannot be used."""
    model = subject.copy_of_model().train()
    if not model.supports_gradient_checkpointing:
        raise NotApplicable("the model does not support gradient checkpointing")
    batch = {"input_ids": subject.input_ids, "labels": _labels(subject, subject.input_ids)}
    seed = subject.rng("training").randrange(2**31)  # dropout and jitter draw the same in every run
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss, expected = _loss_gradients(model, **batch)
    worst = 0.0
    for reentrant in (False, True):
        _enable_checkpointing(model, reentrant)
        if reentrant:
            model.enable_input_require_grads()
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                again, actual = _loss_gradients(model, **batch)
        except ValueError:
            if reentrant:  # side outputs recorded inside a reentrant checkpoint have no gradient
                continue
            raise
        worst = max(worst, abs(again - loss) / abs(loss), gradient_error(actual, expected))
    return worst


def losses_add_up(subject: Subject) -> float:
    """The loss and gradient of a padded batch are the sums over its micro-batches, router losses included."""
    model = subject.copy_of_model().train()
    require_independent_tokens(model)
    ids = subject.input_ids
    labels, mask = _labels(subject, ids), torch.ones_like(ids)
    for b in range(1, len(ids)):
        mask[b, : 2 * b] = 0
    labels = labels.masked_fill(mask == 0, -100)
    items = int((labels[:, 1:] != -100).sum())
    total, expected = _loss_gradients(
        model, input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=items
    )
    added, parts = 0.0, {}
    for rows in (slice(0, 1), slice(1, None)):
        loss, found = _loss_gradients(
            model, input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows], num_items_in_batch=items
        )
        added += loss
        parts = add_gradients(parts, found)
    return max(abs(added - total) / abs(total), gradient_error(parts, expected))


def packed_losses_add_up(subject: Subject, borders: str = "seq_idx") -> float:
    """The loss and gradient of packed documents are the sums over the documents, router losses included."""
    model = subject.copy_of_model().train()
    require_independent_tokens(model)
    ids = subject.input_ids[:1]
    labels, third = _labels(subject, ids), ids.shape[1] // 3
    cuts = [0, third, third + 1, ids.shape[1]]  # the one in the middle has a single token and no label to predict
    items = sum(int((labels[:, a + 1 : b] != -100).sum()) for a, b in pairwise(cuts))
    numbers = torch.cat([torch.full((1, b - a), i) for i, (a, b) in enumerate(pairwise(cuts))], 1)
    places = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)])[None]
    given = {"seq_idx": numbers} if borders == "seq_idx" else {"position_ids": places}
    given = {name: value.to(ids.device) for name, value in given.items()}
    total, expected = _loss_gradients(model, input_ids=ids, labels=labels, num_items_in_batch=items, **given)
    added, parts = 0.0, {}
    for a, b in pairwise(cuts):
        loss, found = _loss_gradients(model, input_ids=ids[:, a:b], labels=labels[:, a:b], num_items_in_batch=items)
        added += loss
        parts = add_gradients(parts, found)
    return max(abs(added - total) / abs(total), gradient_error(parts, expected))
