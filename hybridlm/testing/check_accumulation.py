"""Checks of gradient accumulation as Trainer does it: `num_items_in_batch` labels in all micro-batches together."""

import torch
from torch import nn

from .base import NotApplicable, Subject, gradient_error, gradients, require_independent_tokens
from .foreign import accepts


def accumulation(subject: Subject) -> float:
    """The loss and gradient of a batch are the sums over its micro-batches, router losses left out."""
    return _accumulated(subject, subject.copy_of_model().train())


def accumulation_with_router_losses(subject: Subject) -> float:
    """The loss and gradient of a batch are the sums over its micro-batches, router losses included."""
    model = subject.copy_of_model().train()
    if not getattr(subject, "router_losses", False):
        raise NotApplicable("the model adds no router losses")
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = True
    return _accumulated(subject, model)


def _accumulated(subject: Subject, model: nn.Module) -> float:
    if not accepts(model, "num_items_in_batch"):
        raise NotApplicable("forward takes no num_items_in_batch")
    require_independent_tokens(model)
    ids, rng = subject.input_ids, subject.rng("labels")
    dropped = [[rng.random() < 0.1 + 0.2 * b for _ in row] for b, row in enumerate(ids.tolist())]
    labels = ids.masked_fill(torch.tensor(dropped, device=ids.device), -100)
    items = int((labels[:, 1:] != -100).sum())
    losses, found = [], []
    for micro_batches in ([slice(None)], [slice(0, 1), slice(1, None)]):
        total = 0.0
        for rows in micro_batches:
            with torch.enable_grad():
                arguments = {"input_ids": ids[rows], "labels": labels[rows], "use_cache": False}
                loss = subject.call(model, num_items_in_batch=items, **arguments).loss
                loss.backward()
            total += float(loss.detach())
        losses.append(total)
        found.append(gradients(model))
    return max(abs(losses[1] - losses[0]) / abs(losses[0]), gradient_error(found[1], found[0]))
