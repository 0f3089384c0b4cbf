"""Plots of a race: accuracy over state bytes, over length, and over steps."""

from pathlib import Path
from typing import Any

from hybridlm.evaluation.plots import MARKERS, new_figure

from .file import Race

NAMES = ("accuracy_by_state.png", "accuracy_by_length.png", "curves.png")


def draw(race: Race, arms: dict[str, Any], chance: float, folder: Path) -> None:
    """Draw all plots into a folder.

    Raises:
        ImportError: matplotlib is not installed.
    """
    for name, plot in zip(NAMES, (_by_state, _by_length, _curves), strict=True):
        figure, colormaps = new_figure(8.5, 4.8)
        axis = figure.subplots()
        colors = [colormaps["tab20"].colors[(2 * index) % 20 + (index >= 10)] for index in range(len(arms))]
        styles = {
            arm: {"color": colors[index], "marker": MARKERS[index % len(MARKERS)], "label": arm}
            for index, arm in enumerate(arms)
        }
        plot(axis, race, arms, styles)
        if plot is not _by_length:  # there it differs by length
            axis.axhline(chance, color="black", linestyle=":", linewidth=1, label="chance")
        axis.set(ylim=(-0.03, 1.03), ylabel="share of right answers, mean and standard error")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.suptitle(f"{race.title}: {race.seeds} seed{'s' * (race.seeds != 1)}", fontsize="medium")
        figure.savefig(folder / name, dpi=110)


def _errors(scores: list[dict[str, Any]]) -> list[float]:
    return [score["standard_error"] or 0.0 for score in scores]


def _by_state(axis: Any, race: Race, arms: dict[str, Any], styles: dict[str, dict[str, Any]]) -> None:
    first, last = str(race.steps_read[0]), str(race.steps_read[-1])
    for name, arm in arms.items():
        size, end = [arm["state_bytes"]], arm["at"][last]
        axis.errorbar(size, [end["mean"]], yerr=_errors([end]), capsize=2, linestyle="none", **styles[name])
        if first != last:
            early, style = arm["at"][first], styles[name] | {"label": None}
            axis.plot(size * 2, [early["mean"], end["mean"]], color=style["color"], linewidth=0.8, alpha=0.6)
            axis.errorbar(size, [early["mean"]], yerr=_errors([early]), capsize=2, markerfacecolor="white", **style)
    context = (race.match.context if race.match else None) or race.task.length
    hollow = f", hollow at step {first}" if first != last else ""
    axis.set(
        xscale="log", xlabel=f"bytes of state of a row after {context} tokens, float32 (filled at step {last}{hollow})"
    )


def _by_length(axis: Any, race: Race, arms: dict[str, Any], styles: dict[str, dict[str, Any]]) -> None:
    for index, (name, arm) in enumerate(arms.items()):
        scores = list(arm["lengths"].values())
        # side by side, so that errors can be told apart
        places = [length * (1 + 0.015 * (index - len(arms) / 2)) for length in race.lengths]
        means = [score["mean"] for score in scores]
        axis.errorbar(places, means, yerr=_errors(scores), capsize=2, linewidth=1.2, markersize=4.5, **styles[name])
    chances = [score["chance"] for score in next(iter(arms.values()))["lengths"].values()]
    axis.plot(race.lengths, chances, color="black", linestyle=":", linewidth=1, label="chance")
    axis.set_xscale("log", base=2)
    axis.set_xticks(race.lengths, [str(length) for length in race.lengths])
    axis.set(xlabel=f"tokens of a row (trained at {race.task.length})")


def _curves(axis: Any, race: Race, arms: dict[str, Any], styles: dict[str, dict[str, Any]]) -> None:
    for name, arm in arms.items():
        steps, means = [point[0] for point in arm["curve"]], [point[1] for point in arm["curve"]]
        low, high = ([point[1] + sign * (point[2] or 0.0) for point in arm["curve"]] for sign in (-1, 1))
        axis.plot(steps, means, linewidth=1.2, markersize=3.5, **styles[name])
        axis.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.2, linewidth=0)
    axis.set(xlabel="optimizer steps")
