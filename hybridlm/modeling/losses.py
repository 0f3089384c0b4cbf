"""Losses of the routers: load balance, z-loss, and the balance without a loss.

Shapes: B batch, T tokens, E experts, k experts a token, M documents a row (1, or T when documents are packed; most of
the T are then empty).
Reference: Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961, section 2.2 (load balance); Zoph et al. 2022,
"ST-MoE", arXiv:2202.08906, section 3.1 (z-loss); DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437,
section 2.1.2 (balance inside a sequence); Wang et al. 2024, arXiv:2408.15664 (selection bias).
Differs: in document scope each loss is computed inside a document, weighted by the document's label tokens and divided
by `num_items_in_batch`, as the cross entropy is. So the total does not depend on how documents are packed, padded or
split into micro-batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .document_loss import document_mean_loss, label_tokens_per_document, sum_by_document, weigh_documents
from .precision import state_dtype


def _without_pads(router_logits: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Set the logits of pads to 0, whatever they were; also return 1 at real tokens and 0 at pads, `[B, T]`."""
    router_logits = router_logits.to(state_dtype(router_logits.dtype))
    if token_mask is None:
        return router_logits, torch.ones_like(router_logits[..., 0])
    token_mask = token_mask.bool()
    return router_logits.where(token_mask[..., None], 0.0), token_mask.to(router_logits.dtype)


def _probabilities(router_logits: Tensor, scores: str) -> Tensor:
    """Each expert's share of a token `[..., E]`; they sum to one."""
    if scores == "softmax":
        return router_logits.softmax(-1)
    if scores == "sigmoid":
        values = router_logits.sigmoid()
        return values / (values.sum(-1, keepdim=True) + 1e-20)
    raise ValueError(f"scores: unknown {scores!r}, expected one of ['softmax', 'sigmoid']")


def _chosen(probabilities: Tensor, top_k: int) -> Tensor:
    """1 at the k largest of `[..., E]`, without any selection bias, as DeepSeek-V3 counts."""
    indices = probabilities.topk(top_k, dim=-1).indices
    return torch.zeros_like(probabilities).scatter(-1, indices, 1.0)


def load_balancing_loss(
    router_logits: Tensor,
    top_k: int,
    *,
    scores: str = "softmax",
    token_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    label_tokens: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Load balancing loss of one layer, inside each document.

    A document's loss is `E * sum_i f_i P_i`. `f_i` is the fraction of its tokens that have expert i among their k best
    scores (these sum to k, as in transformers) and `P_i` the mean of its share of the scores: perfect balance gives k.

    Args:
        router_logits: `[B, T, E]`.
        top_k: Experts a token k.
        scores: "softmax" or "sigmoid"; sigmoid scores are divided by their sum.
        token_mask: `[B, T]`, true at real tokens; None for all.
        segment_ids: `[B, T]`, non-decreasing; None for one document a row.
        label_tokens: `[B, M]` from `label_tokens_per_document`; None weighs a document by its real tokens.
        num_items_in_batch: Label tokens of all micro-batches together; None for the sum of the weights here.

    Returns:
        The scalar `sum_d label_tokens_d * loss_d / num_items_in_batch`.
    """
    router_logits, real = _without_pads(router_logits, token_mask)
    probabilities = _probabilities(router_logits, scores)
    counts = sum_by_document(_chosen(probabilities, top_k) * real[..., None], segment_ids)  # [B, M, E]
    shares = sum_by_document(probabilities * real[..., None], segment_ids)
    num_tokens = sum_by_document(real, segment_ids)  # [B, M]
    losses = router_logits.shape[-1] * (counts * shares).sum(-1) / num_tokens.clamp(min=1).square()
    return weigh_documents(losses, num_tokens, label_tokens, num_items_in_batch)


def router_z_loss(
    router_logits: Tensor,
    *,
    token_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    label_tokens: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Router z-loss of one layer: the mean of `logsumexp(logits) ** 2` inside each document.

    Args:
        router_logits: `[B, T, E]`.
        token_mask: As in `load_balancing_loss`.
        segment_ids: As in `load_balancing_loss`.
        label_tokens: As in `load_balancing_loss`.
        num_items_in_batch: As in `load_balancing_loss`.

    Returns:
        The scalar `sum_d label_tokens_d * loss_d / num_items_in_batch`.
    """
    router_logits, _ = _without_pads(router_logits, token_mask)
    return document_mean_loss(
        router_logits.logsumexp(-1).square(),
        token_mask=token_mask,
        segment_ids=segment_ids,
        label_tokens=label_tokens,
        num_items_in_batch=num_items_in_batch,
    )


def batch_load_balancing_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    *,
    scores: str = "softmax",
    token_mask: Tensor | Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Load balancing loss over the tokens of all layers and rows at once, transformers' `load_balancing_loss_func`.

    It is not additive: the value changes with the batch size and with gradient accumulation.

    Args:
        router_logits: One `[B, T, E]` a layer.
        top_k: Experts a token k.
        scores: As in `load_balancing_loss`.
        token_mask: `[B, T]`, true at real tokens; None for all. Or a list with one a layer.
    """
    masks = token_mask if isinstance(token_mask, (list, tuple)) else [token_mask] * len(router_logits)
    parts = [_without_pads(logits, mask) for logits, mask in zip(router_logits, masks, strict=True)]
    stacked, real = (torch.cat(x) for x in zip(*parts, strict=True))  # [layers * B, T, E], [layers * B, T]
    probabilities = _probabilities(stacked, scores)
    counts = (_chosen(probabilities, top_k) * real[..., None]).sum((0, 1))  # [E]
    shares = (probabilities * real[..., None]).sum((0, 1))
    return stacked.shape[-1] * (counts * shares).sum() / real.sum().clamp(min=1).square()


def batch_router_z_loss(router_logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """Mean of `logsumexp(logits) ** 2` over the real tokens of `[B, T, E]`; not additive."""
    router_logits, real = _without_pads(router_logits, token_mask)
    return (router_logits.logsumexp(-1).square() * real).sum() / real.sum().clamp(min=1)


def _masks_of_layers(
    layer_masks: Sequence[Tensor | None] | None, token_mask: Tensor | None, num_layers: int
) -> list[Tensor | None]:
    """The mask of each expert layer."""
    if layer_masks is None:
        return [token_mask] * num_layers
    if len(layer_masks) != num_layers:
        raise ValueError(f"layer_masks: got {len(layer_masks)} for {num_layers} expert layers")
    return [token_mask if mask is None else mask for mask in layer_masks]


def router_losses(
    moe_modules: Sequence[nn.Module],
    router_logits: Sequence[Tensor],
    labels: Tensor | None = None,
    token_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    *,
    shifted: bool = False,
    layer_masks: Sequence[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Add up the router losses of a model, each times its layer's coefficient.

    In document scope a loss is the mean over the L expert layers of `coefficient * loss`. In batch scope the load
    balancing loss is computed over all layers together, as transformers does; layers that differ in E, k, scores or
    coefficient are computed apart and weighted by their share of the L layers.

    Args:
        moe_modules: The L `MoE` modules, in order.
        router_logits: Their recorded logits, `[B, T, E]` each.
        labels: `[B, T]` as in `label_tokens_per_document`; None weighs documents by their real tokens.
        token_mask: `[B, T]`, true at real tokens; None for all.
        segment_ids: `[B, T]`; None for one document a row.
        num_items_in_batch: As in `load_balancing_loss`.
        shifted: Whether `labels` are `shift_labels`.
        layer_masks: `[B, T]` for each expert layer, true at the tokens that reached it, for layers that see only some;
            None, as a whole or for a layer, for `token_mask`. Documents keep the weight of all their label tokens.

    Returns:
        `{"load_balancing": scalar, "z": scalar}`, to be added to the cross entropy.
    """
    if len(moe_modules) != len(router_logits):
        raise ValueError(f"router_logits: got {len(router_logits)} tensors for {len(moe_modules)} expert layers")
    label_tokens = None
    if labels is not None:
        label_tokens = label_tokens_per_document(labels, segment_ids, token_mask, shifted=shifted)
    where = {"segment_ids": segment_ids, "label_tokens": label_tokens, "num_items_in_batch": num_items_in_batch}
    balance, z, batch_groups = [], [], {}
    masks = _masks_of_layers(layer_masks, token_mask, len(moe_modules))
    for moe, logits, mask in zip(moe_modules, router_logits, masks, strict=True):
        top_k, scores = moe.router.balanced_top_k, moe.router.score_function
        if moe.load_balancing_coef and moe.loss_scope == "batch":
            key = (logits.shape[-1], top_k, scores, moe.load_balancing_coef)
            batch_groups.setdefault(key, []).append((logits, mask))
        elif moe.load_balancing_coef:
            loss = load_balancing_loss(logits, top_k, scores=scores, token_mask=mask, **where)
            balance.append(moe.load_balancing_coef * loss)
        if moe.z_loss_coef and moe.loss_scope == "batch":
            z.append(moe.z_loss_coef * batch_router_z_loss(logits, token_mask=mask))
        elif moe.z_loss_coef:
            z.append(moe.z_loss_coef * router_z_loss(logits, token_mask=mask, **where))
    for (_, top_k, scores, coef), group in batch_groups.items():
        logits, masks = ([pair[i] for pair in group] for i in (0, 1))
        loss = batch_load_balancing_loss(logits, top_k, scores=scores, token_mask=masks)
        balance.append(coef * len(group) * loss)
    zero = router_logits[0].new_zeros(()) if router_logits else torch.zeros(())
    return {
        "load_balancing": sum(balance, zero) / max(len(moe_modules), 1),
        "z": sum(z, zero) / max(len(moe_modules), 1),
    }


@torch.no_grad()
def count_expert_load(
    moe_modules: Sequence[nn.Module],
    router_logits: Sequence[Tensor],
    token_mask: Tensor | None = None,
    *,
    layer_masks: Sequence[Tensor | None] | None = None,
    token_ids: Tensor | None = None,
) -> None:
    """Add the real tokens each expert got to the routers' `tokens_per_expert`; a token that was dropped counts too.

    Call it once a forward in training, with the recorded logits: counting inside the layers would count twice under
    gradient checkpointing.

    Args:
        moe_modules: The `MoE` modules, in order.
        router_logits: Their recorded logits, `[B, T, E]` each.
        token_mask: `[B, T]`, true at real tokens; None for all.
        layer_masks: As in `router_losses`.
        token_ids: `[B, T]`; only hash routing needs them.
    """
    masks = _masks_of_layers(layer_masks, token_mask, len(moe_modules))
    for moe, logits, mask in zip(moe_modules, router_logits, masks, strict=True):
        chosen = moe.router.choices(logits, mask, token_ids)  # [B, T, E]
        logits, real = _without_pads(logits, mask)
        shares = _probabilities(logits, moe.router.score_function) * real[..., None]
        moe.router.add_load(chosen.sum((0, 1)), shares.sum((0, 1)))


@torch.no_grad()
def update_selection_bias(model: nn.Module, process_group: "torch.distributed.ProcessGroup | None" = None) -> None:
    """Move every bias that balances a load without a loss, and start counting anew; call it once an optimizer step.

    It reaches every module that has `load_counts() -> Tensor`, what it counted since the last call (1-D, float64), and
    `apply_load(counts, moves)`, which gets the sum over all processes, moves the bias and resets the counts. A module
    in eval mode is left as it is, and one whose parameters are all frozen keeps its bias: an adapter that is trained on
    it would not carry the change.

    Args:
        model: Any module with such modules inside.
        process_group: Ranks whose counts are added up; None for the default group, if `torch.distributed` runs.
    """
    modules = [module for module in model.modules() if hasattr(module, "apply_load") and module.training]
    if not modules:
        return
    counts = [module.load_counts() for module in modules]
    total = torch.cat([count.to(counts[0].device, torch.float64) for count in counts])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total, group=process_group)
    whole = any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)
    for module, share in zip(modules, total.split([len(count) for count in counts]), strict=True):
        own = [parameter.requires_grad for parameter in module.parameters()]
        module.apply_load(share, moves=any(own) if own else whole)
