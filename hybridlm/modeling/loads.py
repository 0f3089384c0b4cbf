"""What a span chose, in sums: added over micro-batches and processes, and read as metrics.

Shapes: B batch, T tokens, R bins of the histogram over rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

PATIENCE = 256  # forwards in training after which somebody should have applied what was counted
ROW_BINS = 1000  # a share of a row is known to a thousandth; sums of a histogram add up over processes, rows do not
_TOTALS = ("wished", "reached", "taken", "judged", "predicted", "hits", "correct", "num_rows", "row_shares")
NUM_COUNTS = len(_TOTALS) + ROW_BINS + 1


@dataclass
class SpanLoad:
    """Sums over the tokens that a span could choose from.

    Attributes:
        wished: Tokens that would have entered without the ceiling.
        reached: Tokens that came to the span: those that entered the span around it.
        taken: Tokens that entered.
        judged: Tokens of which a causal decision was made that is only being learned.
        predicted: Of those, the tokens of which it said that they enter.
        hits: Of those, the tokens that entered.
        correct: Judged tokens of which it said the truth.
        num_rows: Rows with a token that came to the span.
        row_shares: Sum of their shares taken/reached.
        histogram: `[R]`, rows by their share, rounded.
    """

    wished: Tensor
    reached: Tensor
    taken: Tensor
    judged: Tensor
    predicted: Tensor
    hits: Tensor
    correct: Tensor
    num_rows: Tensor
    row_shares: Tensor
    histogram: Tensor

    @classmethod
    def from_counts(cls, counts: Tensor) -> "SpanLoad":
        """Read what `span_counts` wrote."""
        return cls(*counts[: len(_TOTALS)].unbind(), counts[len(_TOTALS) :])


@torch.no_grad()
def span_counts(record: Any, predicted: Tensor | None = None) -> Tensor:
    """Count what a span did in one forward.

    Args:
        record: A `SpanRecord`; each of its fields `[B, T]`.
        predicted: `[B, T]`, True where a causal decision says that the token enters; `None` if there is none.

    Returns:
        The fields of `SpanLoad` in one row `[NUM_COUNTS]`, float64, on the device of the record.
    """
    reached = record.reached
    taken, wished = record.taken & reached, record.wished & reached
    judged = torch.zeros_like(reached) if predicted is None else reached
    predicted = judged if predicted is None else predicted & judged
    masks = (wished, reached, taken, judged, predicted, predicted & taken, (predicted == taken) & judged)
    totals = torch.stack([mask.sum() for mask in masks]).double()
    among = reached.sum(1).double()
    counted, shares = (among > 0).double(), taken.sum(1) / among.clamp(min=1)
    bins = (shares * ROW_BINS).round().long()
    histogram = torch.zeros(ROW_BINS + 1, dtype=torch.double, device=taken.device).scatter_add(0, bins, counted)
    return torch.cat([totals, torch.stack([counted.sum(), (shares * counted).sum()]), histogram])


def warn_if_nobody_applies(num_unapplied: int) -> int:
    """Count a forward in training, and say once when a bias should have moved long ago.

    Args:
        num_unapplied: Forwards since the bias could last move.

    Returns:
        One more.
    """
    if num_unapplied + 1 == PATIENCE:
        logger.warning_once(
            f"{PATIENCE} forwards in training, and no bias of a router or span has moved: give Trainer "
            "callbacks=[hybridlm.training.SelectionBiasCallback()], or call "
            "hybridlm.modeling.losses.update_selection_bias(model) after each optimizer step"
        )
    return num_unapplied + 1
