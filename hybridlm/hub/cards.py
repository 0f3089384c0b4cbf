"""Model cards, rendered from what a run measured and nothing else."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hybridlm.analysis.planner import plan
from hybridlm.modeling.registry import span_places
from hybridlm.presets import data_path

TEMPLATE = "model_card.md.jinja"
PLACE = {"name", "start", "stop", "every"}  # of an entry of `config.spans`; the rest are the span's own options


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


def render_card(facts: Mapping[str, Any]) -> str:
    """Render the card of a trained model.

    Args:
        facts: What `training.run` measured, see `hub_cards/model_card.md.jinja` for the names. Held-out figures are
            those of `heldout`, where spans choose by their causal rule; `heldout_by_rule` is not shown.

    Returns:
        Markdown with a metadata header that the Hub reads.
    """
    source = facts["data"]["path"]
    dataset = {
        "task_type": "text-generation",
        "dataset_type": "text",
        "dataset_name": f"held-out documents of {source}",
    }
    scores = [
        EvalResult(
            **dataset,
            metric_type="bits_per_byte",
            metric_name=f"bits per byte, windows of {score['length']} tokens",
            metric_value=round(score["bits_per_byte"], 4),
        )
        for score in facts.get("heldout", [])
    ]
    parts = {row["mixer"] for row in facts["layers"]} | {row["name"] for row in facts.get("spans", [])}
    if facts.get("residual"):
        parts.add(facts["residual"]["name"])
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hybridlm", "custom_code", *sorted(parts - {"none"})],
        model_name=facts["name"],
        eval_results=scores or None,
    )
    template = data_path("hub_cards", TEMPLATE).read_text(encoding="utf-8")
    return str(ModelCard.from_template(card_data, template_str=template, **facts))
