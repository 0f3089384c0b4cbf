"""What a config says of a model, as rows of JSON: layers, spans, residual, cost."""

import dataclasses
from typing import Any

from hybridlm.analysis.planner import plan
from hybridlm.modeling.configuration_hybridlm import HybridLMConfig
from hybridlm.modeling.registry import resolve_config, span_places

PLACE = {"name", "start", "stop", "every"}  # of an entry of `config.spans`; the rest are the span's own options
DEFAULT_CONTEXT = 4096


def layer_rows(config: Any) -> list[dict[str, str]]:
    """One row a layer for the card's table: recipe and the names of both parts."""
    specs = getattr(config, "layer_specs", None) or {}
    layout = getattr(config, "layer_layout", None) or []

    def part_name(recipe: str, half: str) -> str:
        return (specs[recipe].get(half) or {}).get("name", "none")

    halves = ("mixer", "channel_mixer")
    return [{"recipe": recipe} | {half: part_name(recipe, half) for half in halves} for recipe in layout]


def span_rows(config: Any, context: int) -> list[dict[str, Any]]:
    """One row a span: where it stands, how it is meant to choose, and what that lets in of `context` tokens.

    Args:
        config: Of any model; only our own has spans.
        context: Tokens of one document.

    Returns:
        Dicts with `name`, `layers` (as "2" or "2 to 4"), `start`, `stop`, `parent`, the span's own `options`,
        `expected_share` of the tokens that come to it, `context`, `max_tokens` and `expected_tokens`; JSON-able.
    """
    if not getattr(config, "layer_specs", None) or not config.spans:
        return []
    rows = []
    entries = [config.spans[entry] for entry, *_ in span_places(config)]
    for entry, span in zip(entries, plan(config, context=context).spans, strict=True):
        last = span.stop - 1
        rows.append(
            {
                "name": span.span,
                "layers": str(last) if span.start == last else f"{span.start} to {last}",
                **{key: getattr(span, key) for key in ("start", "stop", "parent", "expected_share")},
                "options": {key: value for key, value in entry.items() if key not in PLACE},
                "context": context,
                "max_tokens": span.max_tokens,
                "expected_tokens": span.expected_tokens,
            }
        )
    return rows


def residual_of(config: Any) -> dict[str, Any] | None:
    """The residual connection with its options, `None` where a layer's result is just added."""
    residual = getattr(config, "residual", None) or {}
    return dict(residual) if residual.get("name", "add") != "add" else None


def plan_record(fields: dict[str, Any], context: int | None = None) -> dict[str, Any] | None:
    """What the planner says of a config, as it is stored with a card; `None` if the config is not ours.

    Args:
        fields: Content of a `config.json`.
        context: Tokens that it is for; by default the length trained for.
    """
    if fields.get("model_type") != HybridLMConfig.model_type:
        return None
    config = HybridLMConfig.from_dict(dict(fields))
    resolve_config(config)
    context = context or fields.get("max_position_embeddings") or DEFAULT_CONTEXT
    planned = plan(config, context=context)
    rows = span_rows(config, context)
    spans = [dataclasses.asdict(span) | row for span, row in zip(planned.spans, rows, strict=True)]
    return {"kind": "plan", **planned.to_dict(), "spans": spans}
