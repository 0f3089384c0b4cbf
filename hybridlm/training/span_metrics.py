"""What spans did in training: how many tokens entered, in how many rows many did, and how well that is foretold."""

import torch
from torch import Tensor, nn

from hybridlm.modeling.loads import ROW_BINS, SpanLoad


@torch.no_grad()
def span_metrics(model: nn.Module) -> dict[str, float]:
    """Describe what every span chose since the last call, and start anew.

    The counts are those that `losses.update_selection_bias` added up over micro-batches and processes, so every process
    gets the same figures without talking to another. Tokens of nested spans count where they came to the span.

    Args:
        model: Any model with spans inside.

    Returns:
        For each span, as fractions of 1: `span_0/share` of the tokens that came to it entered, and
        `span_0/wished_share` would have without the ceiling; `span_0/row_share_mean` and `span_0/row_share_p95` are the
        mean and the 95th percentile (to 0.001) of the share over rows; `span_0/threshold_bias` is what the threshold
        has moved. Where a causal decision is learned beside the top k, `span_0/predictor_precision`, `_recall` and
        `_accuracy`, and `span_0/always_skip_accuracy` of never letting a token enter; a precision without a positive
        decision is left out. For each layer inside a span, `layer_3/token_share` of all tokens reached it.
    """
    spans = [module for module in model.modules() if hasattr(module, "expected_share")]  # remote code too
    found: dict[str, float] = {}
    entered: dict[int, float] = {}  # by span, share of all tokens
    for span in spans:  # a span comes after the one around it
        if span.load_record is None:
            continue
        load, span.load_record = SpanLoad.from_counts(span.load_record.cpu()), None
        if not load.reached:
            continue
        label, share = f"span_{span.number}", float(load.taken / load.reached)
        found |= {
            f"{label}/share": share,
            f"{label}/wished_share": float(load.wished / load.reached),
            f"{label}/row_share_mean": float(load.row_shares / load.num_rows),
            f"{label}/row_share_p95": percentile(load.histogram, 0.95),
        }
        if load.judged:
            found |= {f"{label}/{key}": value for key, value in _prediction(load).items()}
        if getattr(span, "threshold_bias", None) is not None:
            found[f"{label}/threshold_bias"] = float(span.threshold_bias)
        entered[span.number] = share * (1.0 if span.parent is None else entered.get(span.parent, 1.0))
        found |= {f"layer_{depth}/token_share": entered[span.number] for depth in range(span.start, span.stop)}
    return found


def percentile(histogram: Tensor, fraction: float) -> float:
    """The least share that at least `fraction` of the rows do not exceed."""
    below = histogram.cumsum(0)
    return int(torch.searchsorted(below, fraction * below[-1])) / ROW_BINS


def _prediction(load: SpanLoad) -> dict[str, float]:
    """How well a causal decision foretells which tokens enter."""
    figures = {"predictor_accuracy": load.correct / load.judged, "always_skip_accuracy": 1 - load.taken / load.reached}
    if load.predicted:
        figures["predictor_precision"] = load.hits / load.predicted
    if load.taken:
        figures["predictor_recall"] = load.hits / load.taken
    return {name: float(value) for name, value in figures.items()}
