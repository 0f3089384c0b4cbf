"""Checks of half precision and of long inputs."""

import math

import torch

from .base import Subject

# tensors of a state that a recurrence or a memory moves on
WIDE_STATES = ("recurrent_states", "memory", "momentum", "open_tokens", "recent_tokens")


def bf16_is_close(subject: Subject) -> float:
    """In bfloat16 logits are bfloat16, finite, and near the float32 ones, whole and token by token.

    Returns:
        The root mean square of the difference as a fraction of that of the float32 logits: a near tie between two
        experts may move single logits far.
    """
    wide = subject.like(subject.copy_of_model().float(), subject.input_ids)
    narrow = subject.like(subject.copy_of_model().float().bfloat16(), subject.input_ids)
    assert narrow.reference.dtype == torch.bfloat16, f"bfloat16 weights gave {narrow.reference.dtype} logits"
    cache = narrow.new_cache()
    steps = [narrow.forward(ids, cache) for ids in subject.input_ids.split(1, dim=1)]
    worst = 0.0
    for logits in (narrow.reference, torch.cat(steps, dim=1)):
        if not bool(torch.isfinite(logits).all()):
            return math.inf
        difference = (logits.float() - wide.reference).square().mean().sqrt()
        worst = max(worst, float(difference / wide.reference.square().mean().sqrt()))
    return worst


def recurrent_states_are_wide(subject: Subject) -> float:
    """In a bfloat16 model recurrent states, and what spans keep, are float32."""
    narrow = subject.like(subject.copy_of_model().float().bfloat16(), subject.input_ids)
    cache = narrow.new_cache()
    narrow.forward(subject.input_ids, cache)
    for number, part in cache.parts().items():
        of_span = number.startswith("span")
        for name, state in part.named_tensors().items():
            if state.is_floating_point() and (of_span or name.rsplit(".", 1)[-1] in WIDE_STATES):
                assert state.dtype == torch.float32, f"{number}.{name} is {state.dtype}"
    return 0.0


def long_input(subject: Subject, num_tokens: int = 16384, dtype: torch.dtype = torch.bfloat16) -> float:
    """Long inputs give no inf and no NaN, whole and when decoding goes on after them."""
    model = subject.copy_of_model().float().to(dtype)
    long = subject.like(model, batch_size=1, num_tokens=num_tokens)
    cache = long.new_cache() if long.keeps_cache else None
    logits = [long.forward(long.input_ids, cache)]
    if long.keeps_cache:
        logits += [long.forward(long.input_ids[:, t : t + 1], cache) for t in range(4)]
    return 0.0 if all(bool(torch.isfinite(part).all()) for part in logits) else math.inf
