"""Checks that ask of any causal language model what transformers' conventions let a caller expect.

Shapes: B batch, T tokens, V vocabulary.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from .base import NotApplicable, Subject, relative_error
from .check_rows import feed_random
from .foreign import Refused
from .stream import Stream


class WeakState(Exception):
    """Some state hardly moves the logits, so that checks of it say little."""


def state_matters(subject: Subject, least: float = 0.01) -> float:
    """Every tensor of the state moves the logits of the next tokens when it is lost.

    Raises:
        WeakState: One moves them by less than `least` of their scale.
    """
    moved = influences(subject)
    weakest = min(moved, key=lambda name: moved[name])
    if moved[weakest] < least:
        raise WeakState(f"{weakest} moves the logits by {moved[weakest]:.1e} of their scale only")
    return 0.0


def influences(subject: Subject, num_tokens: int = 8) -> dict[str, float]:
    """How far the logits of the next tokens move when one tensor of the cache is set to zero, by its name."""
    half = subject.input_ids.shape[1] // 2
    past, ahead = subject.input_ids[:, :half], subject.input_ids[:, half : half + num_tokens]
    cache = subject.new_cache()
    subject.forward(past, cache)

    def go_on(cache: Any) -> Tensor:
        return torch.cat([subject.forward(ids, cache) for ids in ahead.split(1, dim=1)], dim=1)

    expected, found = go_on(copy.deepcopy(cache)), {}
    for name in state_tensors(cache):
        spoilt = copy.deepcopy(cache)
        state_tensors(spoilt)[name].zero_()
        found[name] = relative_error(go_on(spoilt), expected, subject.scale)
    if not found:
        raise NotApplicable(f"a {type(cache).__name__} holds no tensors that are known by name")
    return found


def state_tensors(cache: Any) -> dict[str, Tensor]:
    """The tensors of a cache by layer and name: `"3.recurrent_states.0"`."""
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if hasattr(layer, "named_tensors"):
            named = layer.named_tensors()
        else:
            kinds = ("keys", "values", "conv_states", "recurrent_states")
            named = {name: getattr(layer, name, None) for name in kinds}
        found |= _tensors_of(named, f"{number}.")
    return found | _tensors_of(dict(enumerate(getattr(cache, "linear_cache", ()))), "linear.")


def _tensors_of(value: Any, name: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name.rstrip("."): value} if value.is_floating_point() and value.numel() else {}
    if isinstance(value, dict):
        return {key: t for part, item in value.items() for key, t in _tensors_of(item, f"{name}{part}.").items()}
    return {}


def reordered_rows(subject: Subject) -> float:
    """`reorder_cache`, as beam search calls it, permutes and repeats the rows that go on."""
    last = subject.input_ids.shape[0] - 1
    moves = ([last, *range(last)], [0, 0, *range(last - 1)], [last] * (last + 1))
    return max(_moved(subject, lambda stream, m=move: stream.select(m[: last + 1], "reorder_cache")) for move in moves)


def repeated_and_selected_rows(subject: Subject) -> float:
    """`batch_repeat_interleave` and `batch_select_indices` repeat and select the rows that go on."""
    last = subject.input_ids.shape[0] - 1
    return max(
        _moved(subject, lambda stream: stream.repeat(2)),
        _moved(subject, lambda stream: stream.select([last, 0], "batch_select_indices")),
        _moved(subject, lambda stream: stream.select([last], "batch_select_indices")),
    )


def _moved(subject: Subject, move: Any) -> float:
    rng = subject.rng("moved")
    stream = Stream(subject, subject.input_ids.shape[0])
    for num_tokens in (7, 1, 1):
        feed_random(stream, rng, num_tokens)
    move(stream)
    for _ in range(4):  # as in beam search; chunks have a row of their own
        feed_random(stream, rng, 1)
    return stream.check()


def static_cache(subject: Subject) -> float:
    """A prompt and single tokens through a static cache give the logits of one full forward, also after a reset."""
    ids, prompt = subject.input_ids, 9
    cache, worst = subject.new_cache(static=True, max_length=ids.shape[1] + 3), 0.0
    for _ in range(2):
        parts = [subject.forward(ids[:, :prompt], cache)]
        parts += [subject.forward(ids[:, t : t + 1], cache) for t in range(prompt, ids.shape[1])]
        worst = max(worst, subject.error(torch.cat(parts, dim=1), subject.reference))
        cache.reset()
    return worst


def cropped(subject: Subject, window: int = 6, depths: tuple[int, ...] = (1, 3, 6)) -> float:
    """`activate_past_recording()`, then `crop(-k)` takes back k tokens, recurrent state included.

    Raises:
        Refused: The cache says that it cannot be cropped.
    """
    worst = 0.0
    for calls in ((15,), (9, 1, 1, 4)):
        rng = subject.rng(f"cropped {calls}")
        stream = Stream(subject, 1, subject.recording_cache(window))
        for num_tokens in calls:
            feed_random(stream, rng, num_tokens)
        croppable = getattr(stream.cache, "is_croppable", True)
        for depth in depths:
            branch = stream.branch()
            try:
                branch.crop(depth)
                for _ in range(4):
                    feed_random(branch, rng, 1)
                worst = max(worst, branch.check())
            except Exception as error:
                if croppable:
                    raise
                raise Refused(f"cache.is_croppable is False ({error})") from error
    if not croppable:
        effect = "gives a wrong state" if worst > 1e-3 else "gives the right state"
        raise Refused(f"cache.is_croppable is False; crop() itself raises nothing and {effect} (error {worst:.1e})")
    return worst


def bf16_is_near(subject: Subject) -> float:
    """In bfloat16 logits are finite and near the float32 ones, whole and token by token.

    Returns:
        The root mean square of a token's difference as a fraction of that of all float32 logits, for the token in the
        middle: a near tie between two experts may move single tokens far.
    """
    wide = subject.like(subject.copy_of_model().float(), subject.input_ids)
    narrow = subject.like(subject.copy_of_model().float().bfloat16(), subject.input_ids)
    found = [narrow.reference]
    if subject.keeps_cache:
        cache = narrow.new_cache()
        found.append(torch.cat([narrow.forward(ids, cache) for ids in subject.input_ids.split(1, dim=1)], dim=1))
    size, worst = wide.reference.square().mean().sqrt(), 0.0
    for logits in found:
        if not bool(torch.isfinite(logits).all()):
            return math.inf
        of_tokens = (logits.float() - wide.reference).square().mean(-1).sqrt()
        worst = max(worst, float(of_tokens.median() / size))
    return worst
