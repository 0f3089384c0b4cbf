"""What the runs of a race say: accuracies with errors, whether the known ordering shows, the recipe, a table."""

import math
from statistics import fmean
from typing import Any

from hybridlm.evaluation.chance import NUM_ERRORS
from hybridlm.evaluation.runs import group_by_arm, mean_and_error, read_out
from hybridlm.evaluation.symbols import token_rows

from .arms import TEST_SEED, Entrant
from .file import Demand, Race
from .train import BETAS, CLIP, own_step

SPEED = (
    "An accuracy after a number of steps is speed of learning under this recipe, not capacity: an arm that is low here "
    "may reach the others with more steps, or under another recipe."
)
MATCHED_WORDS = {"parameters": "parameters", "state_bytes": "bytes of state", "flops": "FLOPs"}


def chance_at(race: Race, length: int) -> float:
    """What a guess among the candidates shown scores."""
    rows = token_rows(race.task.name, race.reading.rows, length, seed=TEST_SEED, **race.task.options)
    return float(f"{rows.chance:.6g}")


def summarize(race: Race, entrants: dict[str, Entrant], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The accuracies of each arm, over its seeds."""
    chances = {str(length): chance_at(race, length) for length in race.lengths}
    by_arm = group_by_arm(runs)
    return {name: _arm(race, name, entrants[name], by_arm[name], chances) for name in race.arms}


def _arm(race: Race, name: str, entrant: Entrant, runs: list[dict[str, Any]], chances: dict[str, float]) -> dict:
    curves = [run["curve"] for run in runs]
    chance = chances[str(race.task.length)]
    at = {}
    for step in race.steps_read:
        own = own_step(race, entrant, step)
        points = [next(point for point in curve if point["step"] == own) for curve in curves]
        at[str(step)] = read_out(points, chance) | ({} if own == step else {"own_step": own})
    curve = []
    for points in zip(*curves, strict=True):
        mean, error = mean_and_error([point["right"] / point["answers"] for point in points])
        curve.append([points[0]["step"], round(mean, 4), None if error is None else round(error, 4)])
    return {
        "about": race.arms[name].about,
        "layers": race.arms[name].layers,
        "parameters": entrant.parameters,
        "state_bytes": entrant.state_bytes,
        "flops_per_token": entrant.flops_per_token,
        "steps": entrant.steps,
        "match": entrant.matched,
        "seeds": [run["seed"] for run in runs],
        "curve": curve,
        "at": at,
        "steps_to": {
            "threshold": race.reading.threshold,
            "seeds": [_steps_to(curve, race.reading.threshold) for curve in curves],
        },
        "lengths": {
            length: read_out([run["lengths"][length] for run in runs], chances[length]) | {"chance": chances[length]}
            for length in chances
        },
        "process_seconds": round(fmean(run["process_seconds"] for run in runs), 1),
    }


def _steps_to(curve: list[dict[str, Any]], threshold: float) -> int | None:
    reached = (point["step"] for point in curve if point["right"] >= threshold * point["answers"])
    return next(reached, None)


def judge(race: Race, arms: dict[str, Any]) -> dict[str, Any]:
    """Whether the known ordering shows, and why; no verdict, `None`, from a quick run."""
    if race.quick:
        return {"claim": race.ordering.claim, "shows": None, "why": "a quick run"}
    found = [_judge(race, demand, arms) for demand in race.ordering.demands]
    why = "; ".join(f"{text}: {'holds' if holds else 'DOES NOT HOLD'}" for text, holds in found)
    return {"claim": race.ordering.claim, "shows": all(holds for _, holds in found), "why": why}


def _judge(race: Race, demand: Demand, arms: dict[str, Any]) -> tuple[str, bool]:
    def score(arm: str) -> dict[str, Any]:
        if demand.length is not None:
            return arms[arm]["lengths"][str(demand.length)]
        return arms[arm]["at"][str(demand.step or race.training.steps)]

    place = (
        f"at {demand.length} tokens" if demand.length is not None else f"at step {demand.step or race.training.steps}"
    )
    own = score(demand.arm)
    text, holds = f"{demand.arm} {place} has {figure(own)}", True
    if demand.least is not None:
        text, holds = f"{text}, at least {demand.least:g}", holds and own["mean"] >= demand.least
    if demand.most is not None:
        text, holds = f"{text}, at most {demand.most:g}", holds and own["mean"] <= demand.most
    if demand.above is not None:
        other = score(demand.above)
        more = f"by {demand.by:g} " if demand.by else ""
        text = f"{text}, {more}above {demand.above} with {figure(other)}"
        holds = holds and own["mean"] - other["mean"] > demand.by
    return text, holds


def figure(score: dict[str, Any]) -> str:
    """An accuracy with its error, marked where it is not above chance."""
    error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.3f}"
    return f"{score['mean']:.3f}{error}" + ("" if score["above_chance"] else " (at chance)")


def winner(race: Race, arms: dict[str, Any]) -> tuple[str, int]:
    """The arm with the best mean at the length of training at the end, and its best seed; of equals the faster."""
    length = str(race.task.length)

    def rank(name: str) -> tuple[float, float]:
        steps = [math.inf if step is None else step for step in arms[name]["steps_to"]["seeds"]]
        return -arms[name]["lengths"][length]["mean"], fmean(steps)

    best = min(arms, key=rank)
    shares = arms[best]["lengths"][length]["seeds"]
    return best, arms[best]["seeds"][shares.index(max(shares))]


def recipe_lines(race: Race, entrants: dict[str, Entrant]) -> list[str]:
    """Everything that the figures hold under, in words."""
    task, training, model, reading = race.task, race.training, race.model, race.reading
    options = ", ".join(f"{name}={value}" for name, value in task.options.items())
    rows = "new rows every step" if task.rows is None else f"{task.rows:,} rows, drawn once for each seed"
    down = f", cosine down to {training.final_share:g} of it at the last step" if training.schedule == "cosine" else ""
    linear = "U(+-1/sqrt(fan_in))" if model.linear_init == "uniform" else "as the config says"
    fields = ", ".join(f"{name}={value}" for name, value in model.fields.items())
    lines = [
        f"task: {task.name}, {task.length} tokens" + (f", {options}" if options else "") + f"; {rows}",
        f"model: width {model.hidden_size}, {model.vocab_size} symbols, tied head unless said otherwise, normal "
        f"embeddings, linear layers and experts {linear}" + (f"; {fields}" if fields else ""),
        f"training: {training.steps} steps of {training.batch_size} rows, AdamW {BETAS}, weight decay "
        f"{training.weight_decay:g}, gradients clipped at {CLIP:g}, learning rate {training.learning_rate:g} after "
        f"{training.warmup_steps} steps of warm-up{down}; the loss is on answers only",
        f"seeds: {', '.join(map(str, range(race.seeds)))}, of weights and rows; arms of one seed read the same rows",
        f"reading: {reading.rows} rows that are not trained on, every {reading.every} steps, {race.lengths} tokens at "
        "the end, answers predicted from the true tokens before them",
    ]
    if race.match is not None:
        lines.append(_matched_line(race, entrants))
    for name, entrant in entrants.items():
        lines.append(f"{name}: {_layers(entrant)}")
    return lines


def _matched_line(race: Race, entrants: dict[str, Entrant]) -> str:
    found = [entrant.matched for entrant in entrants.values() if entrant.matched]
    worst = max(abs(matched["off"]) for matched in found)
    by = {"state_bytes": "sizes of states", "parameters": "widths of channel mixers"}.get(race.match.what)
    by = by or {"width": "widths of channel mixers", "steps": "numbers of steps"}[race.match.by]
    return (
        f"matched: {MATCHED_WORDS[race.match.what]}, at {found[0]['target']:,.0f} by {by}; the largest difference is "
        f"{100 * worst:.2f} %"
    )


def _layers(entrant: Entrant) -> str:
    """The layers of an arm with the options that a reader looks for."""
    config, texts = entrant.config, []
    for recipe in config["layer_layout"]:
        spec = config["layer_specs"][recipe]
        texts.append(" + ".join(_part(spec[half]) for half in ("mixer", "channel_mixer") if spec.get(half)))
    shown = [f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts)] if len(texts) > 2 else texts
    spans = [f"{span['name']} from layer {span['start']} to {span['stop'] - 1}" for span in config.get("spans") or []]
    order = f" in the order {' '.join(config['layer_layout'])}" if len(texts) > 2 and len(set(texts)) > 1 else ""
    return "; ".join(shown) + order + ("; " + "; ".join(spans) if spans else "")


def _part(part: dict[str, Any]) -> str:
    names = (
        "num_heads", "position", "conv_kernel", "window", "state_size", "head_dim", "intermediate_size", "num_experts",
        "top_k", "memory_size", "segment_size", "chunk_size",
    )  # fmt: skip
    options = [f"{name} {_value(part[name])}" for name in names if part.get(name) is not None]
    return f"{part['name']} ({', '.join(options)})" if options else part["name"]


def _value(value: Any) -> Any:
    return value.get("name", value) if isinstance(value, dict) else value


def sentences(race: Race, arms: dict[str, Any], ordering: dict[str, Any]) -> list[str]:
    """What the numbers say, and what they do not."""
    chance = chance_at(race, race.task.length)
    lines = ["A quick run: it shows that the race can be run, and nothing else."] if race.quick else []
    lines.append(f"Chance is {chance:.3g}: a guess among the candidates that a row shows.")
    lines.append(SPEED)
    if race.note:
        lines.append(" ".join(race.note.split()))
    for name, arm in arms.items():
        read = ", ".join(f"{figure(score)} at step {score.get('own_step', step)}" for step, score in arm["at"].items())
        steps = [str(step) if step is not None else "not reached" for step in arm["steps_to"]["seeds"]]
        reached = f"steps to {race.reading.threshold:g} by seed: {', '.join(steps)}"
        lines.append(f"{name}: {read}; {reached} (read every {race.reading.every}).")
    if ordering["shows"] is None:
        return [*lines, f"The known ordering: no verdict, {ordering['why']}."]
    verdict = "shows" if ordering["shows"] else "DOES NOT SHOW"
    lines.append(f"The known ordering {verdict}: {' '.join(ordering['claim'].split())} {ordering['why']}.")
    return lines


def table(race: Race, arms: dict[str, Any]) -> str:
    """Arms in lines of text: at steps, then at lengths at the end."""
    width = max(len("arm"), *(len(name) for name in arms))
    head = f"{'arm':{width}} {'parameters':>10} {'state bytes':>11} {'FLOPs/token':>11}"
    heads = [f"step {step}" for step in race.steps_read]
    lines = [head + "".join(f" {text:>15}" for text in heads) + f"  steps to {race.reading.threshold:g}"]
    for name, arm in arms.items():
        cells = "".join(f" {_cell(score):>15}" for score in arm["at"].values())
        steps = " ".join("-" if step is None else str(step) for step in arm["steps_to"]["seeds"])
        sizes = f"{arm['parameters']:10,} {arm['state_bytes']:11,} {arm['flops_per_token']:11,}"
        lines.append(f"{name:{width}} {sizes}{cells}  {steps}")
    if len(race.lengths) > 1:
        lines.append(f"{'at the end':{width}}" + "".join(f" {f'{length} tokens':>15}" for length in race.lengths))
        for name, arm in arms.items():
            lines.append(f"{name:{width}}" + "".join(f" {_cell(score):>15}" for score in arm["lengths"].values()))
    return "\n".join([*lines, f"* not {NUM_ERRORS} standard errors above chance"])


def _cell(score: dict[str, Any]) -> str:
    error = "     -" if score["standard_error"] is None else f" ± {score['standard_error']:.3f}"
    return f"{score['mean']:.3f}{error}{' ' if score['above_chance'] else '*'}"
