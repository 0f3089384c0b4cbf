"""Checks of packed rows for any causal language model: borders as transformers' collator gives them.

`DataCollatorWithFlattening` gives `position_ids`, and on request `seq_idx` and `cu_seq_lens_*` beside them.

Shapes: T tokens.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .base import Differs, NotApplicable, Subject, gradient_error, gradients
from .foreign import accepts, names

_CLEAR = 0.01  # a difference that no rounding explains
_FIRST_ARGUMENT = {"seq_idx": "seq_idx", "cu_seq_lens": "cu_seq_lens_q"}


@dataclass
class PackedRow:
    """One row of documents: ids `[1, T]`, where each begins, and all ways to say so."""

    ids: Tensor
    cuts: list[int]

    @classmethod
    def of(cls, subject: Subject) -> "PackedRow":
        """Cut the first text into documents of 2 to 12 tokens, with one of a single token among them."""
        rng, length = subject.rng("documents"), subject.input_ids.shape[1]
        cuts = [0]
        while cuts[-1] < length:
            cuts.append(min(length, cuts[-1] + (1 if len(cuts) == 2 else rng.randint(2, 12))))
        return cls(subject.input_ids[:1], cuts)

    def borders(self, kind: str, alone: bool) -> dict[str, Any]:
        """The arguments of `forward` that tell where documents begin."""
        sizes, device = [b - a for a, b in pairwise(self.cuts)], self.ids.device
        places = torch.cat([torch.arange(size) for size in sizes])[None].to(device)
        given: dict[str, Any] = {} if alone else {"position_ids": places}
        if kind == "seq_idx":
            numbers = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
            given["seq_idx"] = numbers[None].to(device=device, dtype=torch.int32)
        elif kind == "cu_seq_lens":
            cuts = torch.tensor(self.cuts, dtype=torch.int32, device=device)
            given |= {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts}
            given |= {"max_length_q": max(sizes), "max_length_k": max(sizes)}
        return given


def packed_by_positions(subject: Subject) -> float:
    """Documents packed by position ids are documents apart, forward and gradient, with use_cache=False."""
    return packed(subject, "position_ids")


def packed_by_positions_with_default_cache(subject: Subject) -> float:
    """Documents packed by position ids are documents apart, forward and gradient, when use_cache is left out."""
    return packed(subject, "position_ids", use_cache=None)


def packed_by_seq_idx(subject: Subject) -> float:
    """Documents packed by seq_idx and position ids are documents apart, forward and gradient."""
    return packed(subject, "seq_idx")


def packed_by_cu_seq_lens(subject: Subject) -> float:
    """Documents packed by cu_seq_lens and position ids are documents apart, forward and gradient."""
    return packed(subject, "cu_seq_lens")


def packed_by_seq_idx_alone(subject: Subject) -> float:
    """Documents packed by seq_idx alone are documents apart, forward and gradient."""
    return packed(subject, "seq_idx", alone=True)


def packed_by_cu_seq_lens_alone(subject: Subject) -> float:
    """Documents packed by cu_seq_lens alone are documents apart, forward and gradient."""
    return packed(subject, "cu_seq_lens", alone=True)


def packed(subject: Subject, kind: str, alone: bool = False, use_cache: bool | None = False) -> float:
    """Compare a packed row with its documents, forward and gradient.

    Args:
        subject: The model under test.
        kind: "position_ids", "seq_idx" or "cu_seq_lens".
        alone: Whether borders come without position ids.
        use_cache: Passed to `forward` unless `None`.

    Raises:
        NotApplicable: `forward` does not take, or, when they come alone, does not name these borders.
    """
    argument = _FIRST_ARGUMENT.get(kind, kind)
    if not accepts(subject.model, argument):
        raise NotApplicable(f"forward takes no {argument}")
    if alone and not names(subject.model, argument):
        raise NotApplicable(f"forward does not name {argument}")
    row, model = PackedRow.of(subject), subject.model
    given = row.borders(kind, alone)
    if use_cache is not None:
        given["use_cache"] = use_cache
    generator = torch.Generator().manual_seed(subject.seed)
    shape = (1, row.ids.shape[1], subject.vocab_size)
    weights = torch.randn(shape, generator=generator).to(subject.reference)
    with torch.enable_grad():
        apart = []
        for start, stop in pairwise(row.cuts):
            apart.append(_backward(subject, weights[:, start:stop], input_ids=row.ids[:, start:stop], use_cache=False))
        expected = gradients(model)
        together = _backward(subject, weights, input_ids=row.ids, **given)
        found = gradients(model)
    forward, backward = subject.error(together, torch.cat(apart, dim=1)), gradient_error(found, expected)
    if max(forward, backward) > _CLEAR:
        raise Differs(max(forward, backward), f"logits by {forward:.1e}, gradients by {backward:.1e}")
    return max(forward, backward)


def _backward(subject: Subject, weights: Tensor, **arguments: Any) -> Tensor:
    logits = subject.call(**arguments).logits
    (logits * weights).sum().backward()
    return logits.detach()
