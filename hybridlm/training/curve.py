"""The loss curve as a picture."""

from pathlib import Path
from typing import Any

from hybridlm.evaluation.plots import new_figure


def plot_loss_curve(history: list[dict[str, Any]], path: Path, title: str = "Training") -> None:
    """Draw bits per byte (or the loss, where there are none) over the steps into a PNG file.

    Args:
        history: Records of the Trainer, as in `metrics.jsonl`.
        path: The file to write.
        title: Text above the curve.

    Raises:
        ImportError: matplotlib is not installed.
    """
    records = [record for record in history if "loss" in record]
    key = "bits_per_byte" if records and all("bits_per_byte" in record for record in records) else "loss"
    figure, _ = new_figure(7, 4)
    axes = figure.add_subplot()
    axes.plot([record["step"] for record in records], [record[key] for record in records], label="training")
    evaluated = [record for record in history if f"eval_{key}" in record]
    if evaluated:
        steps = [record["step"] for record in evaluated]
        axes.plot(steps, [record[f"eval_{key}"] for record in evaluated], "o-", label="held out")
        axes.legend()
    axes.set(title=title, xlabel="optimizer step", ylabel=key.replace("_", " "))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
