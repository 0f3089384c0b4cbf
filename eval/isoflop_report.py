"""What the runs of the isoFLOP comparison say: read-outs with standard errors, claims, a table and a plot."""

from pathlib import Path
from statistics import fmean
from typing import Any

from hybridlm.evaluation.plots import new_figure
from hybridlm.evaluation.runs import group_by_arm, mean_and_error

# 95 % quantile of Student's t, by degrees of freedom: one-sided, because claims have a direction
T_QUANTILES = {1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13, 5: 2.02, 6: 1.94, 7: 1.89}
READINGS = {
    "equal_flops": "equal FLOPs",
    "equal_flops_unpadded": "equal FLOPs without pads",
    "equal_steps": "equal steps",
}
# what is better, than what, read where, in words, and by how much of the loss it may be worse
CLAIMS: list[tuple[Any, ...]] = [
    ("mod", "plain", "equal_flops", "mixture of depths at 12.5 % beats the plain model (arXiv 2404.02258)"),
    ("mod", "plain", "equal_steps", "mixture of depths at 12.5 % loses at most 1 % to the plain model", 0.01),
    ("mod", "random", "equal_flops", "learned routing beats random routing (arXiv 2404.02258)"),
    ("mod", "random", "equal_steps", "learned routing beats random routing (arXiv 2404.02258)"),
    ("mod", "fewer", "equal_flops", "routing tokens through a layer beats leaving the layer out"),
    ("mod", "fewer", "equal_steps", "routing tokens through a layer beats leaving the layer out"),
    ("mod", "mod_half", "equal_flops", "12.5 % of the tokens beats 50 % (arXiv 2404.02258)"),
    ("mod_topk", "mod", "equal_flops", "training by top-k beats the causal threshold"),
    ("merge", "plain", "equal_flops", "merging tokens 2:1 beats the plain model (arXiv 2507.07955)"),
    ("merge", "mod_half", "equal_flops", "merging tokens 2:1 beats depth routing at 50 %, which costs as much"),
    ("moe", "plain", "equal_flops", "experts beat the plain model of the same width"),
    ("moe_mod", "moe", "equal_flops", "mixture of depths helps a model of experts too (arXiv 2404.02258)"),
]


def at_step(curve: list[dict[str, Any]], step: int) -> float:
    """The held-out loss at a step."""
    return _interpolate([(point["step"], point["heldout"]) for point in curve], step)


def at_flops(curve: list[dict[str, Any]], flops: float, key: str = "flops") -> float:
    """The held-out loss when that many FLOPs were spent."""
    return _interpolate([(point[key], point["heldout"]) for point in curve], flops)


def _interpolate(points: list[tuple[float, float]], place: float) -> float:
    """Straight between the two points around `place`; it must not lie outside of all."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= place <= x1:
            return y0 + (y1 - y0) * (place - x0) / (x1 - x0)
    if points and points[-1][0] == place:
        return points[-1][1]
    raise ValueError(f"the curve does not reach {place:g}")


def read_out(runs: list[dict[str, Any]], num_steps: int, budget: float) -> dict[str, dict[int, float]]:
    """Bits per byte of one arm by reading and seed."""
    return {
        "equal_flops": {run["seed"]: at_flops(run["curve"], budget) for run in runs},
        "equal_flops_unpadded": {run["seed"]: at_flops(run["curve"], budget, "unpadded_flops") for run in runs},
        "equal_half_flops": {run["seed"]: at_flops(run["curve"], budget / 2) for run in runs},
        "equal_steps": {run["seed"]: at_step(run["curve"], num_steps) for run in runs},
    }


def summarize(runs: list[dict[str, Any]], num_steps: int, budget: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read-outs of each arm, and what they say of each claim."""
    by_arm = group_by_arm(runs)
    readings = {arm: read_out(of_arm, num_steps, budget) for arm, of_arm in by_arm.items()}
    arms = {arm: _arm_summary(by_arm[arm], readings[arm], num_steps) for arm in by_arm}
    claims = [_judge(*claim, readings=readings) for claim in CLAIMS if claim[0] in readings and claim[1] in readings]
    return arms, claims


def _arm_summary(runs: list[dict[str, Any]], reading: dict[str, dict[int, float]], num_steps: int) -> dict[str, Any]:
    summary: dict[str, Any] = {key: runs[0][key] for key in ("about", "parameters")}
    for key in ("flops_per_token", "unpadded_flops_per_token", "process_seconds"):
        summary[key] = round(fmean(run[key] for run in runs), 1)
    for name, values in reading.items():
        mean, error = mean_and_error(list(values.values()))
        summary[name] = {"mean": round(mean, 4), "standard_error": None if error is None else round(error, 4)}
    summary["steps_at_end"] = [run["curve"][-1]["step"] for run in runs]
    for name in ("real", "computed"):
        points = [point for run in runs for point in run["curve"][1:]]  # the first is before any training
        shares = [fmean(point["share"][name]) for point in points]
        summary[f"share_of_layers_{name}"] = round(fmean(shares), 4)
    rules = [run["heldout_under_training_rule"] for run in runs]
    if None not in rules:
        # with top-k in training, this is what looking ahead is worth: a leak, not a gain
        gaps = [rule - run["curve"][-1]["heldout"] for rule, run in zip(rules, runs, strict=True)]
        summary["training_rule_minus_decoding_rule"] = round(fmean(gaps), 5)
    return summary


def _judge(
    better: str, worse: str, reading: str, text: str, allowed: float = 0.0, *, readings: dict[str, Any]
) -> dict[str, Any]:
    """Compare two arms seed by seed: they share weights at the start and the order of the data."""
    first, second = readings[better][reading], readings[worse][reading]
    seeds = sorted(first.keys() & second.keys())
    gains = [second[seed] - first[seed] for seed in seeds]
    mean, error = mean_and_error(gains)
    margin = allowed * fmean(second.values())
    if error is None:
        verdict = "one seed, no verdict"
    else:
        quantile = T_QUANTILES.get(len(seeds) - 1, 1.8)
        opposite = " (the opposite shows)" if mean + margin < -quantile * error else ""
        verdict = "shows" if mean + margin > quantile * error else f"does not show at this size{opposite}"
    rounded = {"gain": round(mean, 4), "standard_error": None if error is None else round(error, 4)}
    return {"claim": text, "arms": [better, worse], "read_at": reading, **rounded, "verdict": verdict}


def _with_error(value: dict[str, float | None]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.4f}" + (" ±   -   " if error is None else f" ± {error:.4f}")


def table(arms: dict[str, Any]) -> str:
    """Arms in lines of text."""
    head = f"{'arm':9} {'parameters':>10} {'FLOP/token':>10} {'no pads':>8} {'share':>6}"
    lines = [head + f"  {'equal FLOPs':>15}  {'without pads':>15}  {'equal steps':>15} {'CPU s':>6}"]
    for name, arm in arms.items():
        lines.append(
            f"{name:9} {arm['parameters']:10,} {arm['flops_per_token'] / 1e6:9.3f}M "
            f"{arm['unpadded_flops_per_token'] / 1e6:7.3f}M {arm['share_of_layers_real']:6.3f}  "
            f"{_with_error(arm['equal_flops'])}  {_with_error(arm['equal_flops_unpadded'])}  "
            f"{_with_error(arm['equal_steps'])} {arm['process_seconds']:6.0f}"
        )
    return "\n".join(lines)


def sentences(claims: list[dict[str, Any]]) -> list[str]:
    """One sentence for each claim, with its numbers."""
    lines = []
    for claim in claims:
        error = "" if claim["standard_error"] is None else f" ± {claim['standard_error']:.4f}"
        lines.append(
            f"{claim['claim']}, at {READINGS[claim['read_at']]}: {claim['arms'][0]} needs {claim['gain']:+.4f}{error} "
            f"bits per byte less than {claim['arms'][1]}: {claim['verdict']}"
        )
    return lines


def draw(runs: list[dict[str, Any]], arms: dict[str, Any], path: Path, about: str) -> None:
    """Draw the loss over FLOPs, and bars of the two readings.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, colormaps = new_figure(12, 4.8)
    curves, bars = figure.subplots(1, 2, width_ratios=[3, 2])
    colors = dict(zip(arms, colormaps["tab10"].colors, strict=False))
    for run in runs:
        points = run["curve"][1:]  # the first is before any training
        first = run["seed"] == min(other["seed"] for other in runs if other["arm"] == run["arm"])
        curves.plot(
            [point["flops"] for point in points], [point["heldout"] for point in points], color=colors[run["arm"]],
            alpha=0.75, linewidth=1.1, label=run["arm"] if first else None,
        )  # fmt: skip
    curves.set(xscale="log", xlabel="FLOPs of training (matrix products)", ylabel="held-out bits per byte")
    curves.legend(fontsize="small")
    curves.grid(alpha=0.3, which="both")
    for offset, reading, hatch in ((-0.2, "equal_flops", None), (0.2, "equal_steps", "//")):
        places = [index + offset for index in range(len(arms))]
        errors = [arm[reading]["standard_error"] or 0.0 for arm in arms.values()]
        means = [arm[reading]["mean"] for arm in arms.values()]
        bars.bar(
            places, means, 0.38, yerr=errors, capsize=2, hatch=hatch, color=[colors[name] for name in arms],
            alpha=0.9 if hatch is None else 0.5, edgecolor="white", label=READINGS[reading],
        )  # fmt: skip
    values = [arm[reading]["mean"] for arm in arms.values() for reading in ("equal_flops", "equal_steps")]
    margin = 0.25 * (max(values) - min(values)) + 1e-3
    bars.set_ylim(min(values) - margin, max(values) + margin)
    bars.set_xticks(range(len(arms)), list(arms), rotation=35, ha="right")
    bars.set_ylabel("held-out bits per byte")
    bars.legend(fontsize="small")
    figure.suptitle(about, fontsize="medium")
    figure.savefig(path, dpi=120)
