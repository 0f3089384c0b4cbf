"""What spans did in training: how many tokens entered, in how many rows many did, and how well that is foretold.

Names say which span is meant by its number, kind and layers: `span_2_mixture_of_depths_layer_3/share`,
`span_0_token_merging_layers_1_to_4/share`; those of a span stand together in TensorBoard. All shares are fractions of 1
since the last record, over micro-batches and processes.

- `share`: of the tokens that came to the span, those that entered. A token comes to a nested span by entering the span
  around it. Beside it, `layer_3/token_share`: of all tokens, those that reached layer 3; only for layers in spans.
- `wished_share`: the share that would have entered without the ceiling.
- `row_share_mean`, `row_share_p95`: mean and 95th percentile (to 0.001) of the share over rows.
- `threshold_bias`: the bias now, where the span has one. Larger lets more tokens in: a mixture of depths adds it to
  the score (it starts at the normal quantile of the capacity), token merging to the threshold (it starts at 0).
- `predictor_precision`, `predictor_recall`, `predictor_accuracy`: how a causal decision that is learned beside the top
  k foretells it; `always_skip_accuracy`: what never letting a token in would score. A precision without a positive
  decision, and a recall without a token that entered, are left out.
"""

import re

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
        The figures by name, as the head of this file lists them.
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
        label, share = span_label(span), float(load.taken / load.reached)
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


def span_label(span: nn.Module) -> str:
    """Number, kind and layers: `span_2_mixture_of_depths_layer_3`, `span_0_token_merging_layers_1_to_4`."""
    kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(span).__name__).lower()  # remote code has no registry
    last = span.stop - 1
    place = f"layer_{last}" if span.start == last else f"layers_{span.start}_to_{last}"
    return f"span_{span.number}_{kind}_{place}"


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
