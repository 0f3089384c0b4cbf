"""What the runs of the memory comparison say: accuracies with errors, bounds, a table, sentences and a plot."""

from pathlib import Path
from statistics import fmean
from typing import Any

from hybridlm.evaluation.chance import NUM_ERRORS
from hybridlm.evaluation.plots import MARKERS, new_figure
from hybridlm.evaluation.runs import group_by_arm, read_out

TASK_WORDS = {"recall": "key-value recall", "passkey": "passkey"}
WINDOW_AT_MOST, MEMORY_AT_LEAST, BOUND_LENGTH = 0.25, 0.8, "512"
SEEDS_TO_SEPARATE = 3


def summarize(runs: list[dict[str, Any]], about: dict[str, str], chance: float) -> dict[str, Any]:
    """Accuracies by arm, task and length."""
    arms = {}
    for arm, of_arm in group_by_arm(runs).items():
        scores = {
            task: {
                length: read_out([run["scores"][task][length] for run in of_arm], chance)
                for length in of_arm[0]["scores"][task]
            }
            for task in of_arm[0]["scores"]
        }
        arms[arm] = {
            "about": about[arm],
            "parameters": of_arm[0]["parameters"],
            "state_bytes": of_arm[0]["state_bytes"],
            "stages": [_stage(of_arm, number) for number in range(len(of_arm[0]["stages"]))],
            "process_seconds": round(fmean(run["process_seconds"] for run in of_arm), 1),
            "scores": scores,
        }
    return arms


def _stage(runs: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """One stage of training: what is the same for all seeds, and steps and accuracies by seed."""
    stages = [run["stages"][number] for run in runs]
    same = {key: stages[0][key] for key in ("task", "length", "rows", "max_steps")}
    return same | {key: [stage[key] for stage in stages] for key in ("steps", "accuracy")}


def check_bounds(arms: dict[str, Any], memories: list[str]) -> list[dict[str, Any]]:
    """What must hold of recall at the longest trained length, of the arms that ran."""

    def recall(arm: str) -> float:
        return arms[arm]["scores"]["recall"][BOUND_LENGTH]["mean"]

    bounds = []
    if "window" in arms:
        value = recall("window")
        text = f"recall of the window alone at {BOUND_LENGTH} is at most {WINDOW_AT_MOST}"
        bounds.append({"bound": text, "value": value, "holds": value <= WINDOW_AT_MOST})
    ran = [arm for arm in memories if arm in arms]
    if ran:
        best = max(ran, key=recall)
        text = f"recall of the best memory, {best}, at {BOUND_LENGTH} is at least {MEMORY_AT_LEAST}"
        bounds.append({"bound": text, "value": recall(best), "holds": recall(best) >= MEMORY_AT_LEAST})
    return bounds


def figure_of(score: dict[str, Any]) -> str:
    """An accuracy with its error, marked where it is not above chance."""
    error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.3f}"
    return f"{score['mean']:.3f}{error}" + ("" if score["above_chance"] else " (at chance)")


def table(arms: dict[str, Any]) -> str:
    """One block of lines for each task."""
    lines = []
    for task, words in TASK_WORDS.items():
        lengths = list(next(iter(arms.values()))["scores"][task])
        lines.append(
            f"{words:16} {'parameters':>10} {'state':>9} {'CPU s':>6}  " + " ".join(f"{n:>15}" for n in lengths)
        )
        for name, arm in arms.items():
            cells = []
            for length in lengths:
                score = arm["scores"][task][length]
                error = "     -" if score["standard_error"] is None else f" ± {score['standard_error']:.3f}"
                cells.append(f"{score['mean']:.3f}{error}{' ' if score['above_chance'] else '*'}".rjust(15))
            head = f"{name:16} {arm['parameters']:10,} {arm['state_bytes']:9,} {arm['process_seconds']:6.0f}  "
            lines.append(head + " ".join(cells))
    return "\n".join([*lines, f"* not {NUM_ERRORS} standard errors above chance"])


def separated(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether every seed of the first lies above every seed of the second."""
    return min(first["seeds"]) > max(second["seeds"])


def sentences(arms: dict[str, Any], controls: dict[str, str], chance: float) -> list[str]:
    """What the numbers say, and what they do not."""
    some = next(iter(arms.values()))["scores"]
    lengths = list(some["recall"])
    lines = [f"Chance is {chance:.4g}.", _sizes(arms), *_learning(arms)]
    enough = len(some["recall"][lengths[0]]["seeds"]) >= SEEDS_TO_SEPARATE
    if not enough:
        lines.append(f"Fewer than {SEEDS_TO_SEPARATE} seeds: nothing is said of what separates.")
    for task, words in TASK_WORDS.items():
        for length in lengths:
            lines.append(
                _best(words, length, {name: arm["scores"][task][length] for name, arm in arms.items()}, enough)
            )
        if enough:
            lines += [
                _compare(words, arms[arm], arms[control], task, arm, control) for control, arm in controls.items()
            ]
        lines += _fading(words, arms, task, lengths)
    return lines


def _sizes(arms: dict[str, Any]) -> str:
    counts = [arm["parameters"] for arm in arms.values()]
    spread = 100 * (max(counts) / min(counts) - 1)
    by_size: dict[int, list[str]] = {}
    for name, arm in arms.items():
        by_size.setdefault(arm["state_bytes"], []).append(name)
    states = "; ".join(f"{size:,} bytes: {', '.join(names)}" for size, names in sorted(by_size.items()))
    return f"Parameters differ by {spread:.1f} % at most. State of a row: {states}."


def _learning(arms: dict[str, Any]) -> list[str]:
    """How many steps the first stage took, which is speed of learning under this recipe, not capacity."""
    lines = []
    for name, arm in arms.items():
        first = arm["stages"][0]
        steps = ", ".join(
            str(steps) if steps < first["max_steps"] else f"not in {steps} ({accuracy:.2f} right)"
            for steps, accuracy in zip(first["steps"], first["accuracy"], strict=True)
        )
        lines.append(f"{name}: steps until {first['length']} tokens are solved, by seed: {steps}.")
    return lines


def _best(words: str, length: str, scores: dict[str, Any], enough: bool) -> str:
    best = max(scores, key=lambda name: scores[name]["mean"])
    text = f"{words} at {length}: best is {best} with {figure_of(scores[best])}"
    if enough:
        below = [name for name in scores if separated(scores[best], scores[name])]
        beside = [name for name in scores if name != best and name not in below]
        text += f"; every seed of it lies above every seed of {', '.join(below)}" if below else ""
        text += f"; it does not separate from {', '.join(beside)}" if beside else ""
    guessing = [name for name, score in scores.items() if not score["above_chance"]]
    return text + (f"; at chance: {', '.join(guessing)}." if guessing else ".")


def _compare(words: str, arm: dict[str, Any], control: dict[str, Any], task: str, name: str, of_control: str) -> str:
    pairs = {n: (arm["scores"][task][n], control["scores"][task][n]) for n in arm["scores"][task]}
    above = [n for n, (first, second) in pairs.items() if separated(first, second)]
    below = [n for n, (first, second) in pairs.items() if separated(second, first)]
    text = f"{words}: {name} lies above its control {of_control} with every seed at {', '.join(above) or 'no length'}"
    return text + (f", and below at {', '.join(below)}." if below else ".")


def _fading(words: str, arms: dict[str, Any], task: str, lengths: list[str]) -> list[str]:
    """How long what works at the trained length goes on working."""
    lines = []
    for name, arm in arms.items():
        scores = arm["scores"][task]
        if scores[lengths[0]]["mean"] < MEMORY_AT_LEAST:
            continue
        kept = [n for n in lengths if scores[n]["mean"] >= MEMORY_AT_LEAST]
        longest = next((lengths[i - 1] for i, n in enumerate(lengths) if n not in kept), lengths[-1])
        last = scores[lengths[-1]]
        spread = f"{min(last['seeds']):.3f} to {max(last['seeds']):.3f} by seed"
        lines.append(
            f"{words}: {name} keeps {MEMORY_AT_LEAST} up to {longest}; at {lengths[-1]} it has "
            f"{figure_of(last)}, {spread}."
        )
    return lines


def draw(arms: dict[str, Any], chance: float, path: Path, about: str) -> None:
    """Draw accuracy over length for both tasks, with standard errors and chance.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, colormaps = new_figure(12, 4.8)
    axes = figure.subplots(1, len(TASK_WORDS), sharey=True)
    for axis, (task, words) in zip(axes, TASK_WORDS.items(), strict=True):
        for index, (name, arm) in enumerate(arms.items()):
            scores = arm["scores"][task]
            # side by side, so that errors can be told apart
            places = [int(length) * (1 + 0.02 * (index - len(arms) / 2)) for length in scores]
            axis.errorbar(
                places, [score["mean"] for score in scores.values()],
                yerr=[score["standard_error"] or 0.0 for score in scores.values()],
                label=name, color=colormaps["tab20"].colors[(2 * index) % 20 + (index >= 10)],
                marker=MARKERS[index % len(MARKERS)], markersize=4.5, capsize=2, linewidth=1.2,
            )  # fmt: skip
        axis.axhline(chance, color="black", linestyle=":", linewidth=1, label="chance")
        lengths = [int(length) for length in scores]
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set(xlabel="tokens of a row (trained to 512)", title=words, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of right answers, mean and standard error over seeds")
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(about, fontsize="medium")
    figure.savefig(path, dpi=120)
