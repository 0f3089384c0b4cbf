"""Model cards, rendered from what a run measured and nothing else."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hybridlm.presets import data_path

TEMPLATE = "model_card.md.jinja"


def layer_rows(config: Any) -> list[dict[str, str]]:
    """One row a layer for the card's table: recipe and the names of both parts."""
    specs = getattr(config, "layer_specs", None) or {}
    layout = getattr(config, "layer_layout", None) or []

    def part_name(recipe: str, half: str) -> str:
        return (specs[recipe].get(half) or {}).get("name", "none")

    halves = ("mixer", "channel_mixer")
    return [{"recipe": recipe} | {half: part_name(recipe, half) for half in halves} for recipe in layout]


def render_card(facts: Mapping[str, Any]) -> str:
    """Render the card of a trained model.

    Args:
        facts: What `training.run` measured, see `hub_cards/model_card.md.jinja` for the names.

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
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hybridlm", "custom_code", *sorted({row["mixer"] for row in facts["layers"]} - {"none"})],
        model_name=facts["name"],
        eval_results=scores or None,
    )
    template = data_path("hub_cards", TEMPLATE).read_text(encoding="utf-8")
    return str(ModelCard.from_template(card_data, template_str=template, **facts))
