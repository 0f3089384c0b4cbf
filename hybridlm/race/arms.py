"""The configs of a race's arms, and what is made equal among them.

Parameters and FLOPs are matched by one factor on the widths of all channel mixers of an arm, state bytes by one factor
on the sizes of its states.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hybridlm.analysis.planner import plan
from hybridlm.builders import build_config
from hybridlm.evaluation.symbols import token_rows
from hybridlm.modeling.configuration_hybridlm import HybridLMConfig
from hybridlm.modeling.experts import Experts
from hybridlm.modeling.modeling_hybridlm import HybridLMForCausalLM
from hybridlm.modeling.registry import resolve_config

from .file import MOST_STEPS, Race

# the option that sets how large a mixer's state is; those of neural memories follow from their widths
STATE_OPTIONS = {
    "attention": "window",
    "mamba": "state_size",
    "mamba2": "state_size",
    "memorizing": "memory_size",
    "transformer_xl": "memory_size",
}
WIDTH = "intermediate_size"
TRAINING_FLOPS = 3  # of a step, in forward passes
MOST_SCALE = 64.0
TEST_SEED = 10**9  # rows of training have smaller ones

Place = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class Entrant:
    """An arm that is ready to run.

    Attributes:
        config: Its config's fields.
        steps: Optimizer steps.
        parameters: Of the model.
        state_bytes: Of a row after the context that states are compared at, in float32.
        flops_per_token: Of the forward pass in a row of training.
        matched: What was made equal: its value, the target, and the relative difference.
    """

    config: dict[str, Any]
    steps: int
    parameters: int
    state_bytes: int
    flops_per_token: int
    matched: dict[str, float] | None = None


def build_arm(race: Race, name: str) -> HybridLMConfig:
    """The config of an arm as the file says it, with all options written out.

    Raises:
        ValueError: The arm cannot be built; the message starts with its path, or with that of one of its parts.
    """
    arm, shared = race.arms[name], race.model
    specs = {key: _layer(part, shared.channel_mixer) for key, part in race.parts.items()}
    if isinstance(arm.layers, list):
        specs = {key: spec for key, spec in specs.items() if key in arm.layers}
    fields = {"use_cache": True, "tie_word_embeddings": True, "max_position_embeddings": race.task.length}
    fields |= {"vocab_size": shared.vocab_size, "hidden_size": shared.hidden_size} | shared.fields | arm.fields
    try:
        config = build_config(copy.deepcopy(specs), arm.layers, **copy.deepcopy(fields))
        config.layer_specs = {key: spec for key, spec in config.layer_specs.items() if key in config.layer_layout}
        resolve_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(_placed(race, name, str(error))) from error
    return config


def _placed(race: Race, name: str, error: str) -> str:
    """An error of an arm, with the place of the race file that it is about."""
    for key, part in race.parts.items():
        own = {"mixer": f"parts.{key}", "channel_mixer": "model.channel_mixer"}
        for half, place in own.items():
            start = f"layer_specs.{key}.{half}"
            if error.startswith((f"{start}.", f"{start}:")):
                place = f"parts.{key}.{half}" if "mixer" in part else place
                return f"{place}{error.removeprefix(start)} (in arms.{name})"
    return f"arms.{name}: {error}"


def _layer(part: dict[str, Any], channel_mixer: dict[str, Any] | None) -> dict[str, Any]:
    return part if "mixer" in part else {"mixer": part, "channel_mixer": channel_mixer}


def build_model(race: Race, entrant: Entrant, seed: int) -> HybridLMForCausalLM:
    """A model with its initial weights."""
    torch.manual_seed(seed)
    model = HybridLMForCausalLM(HybridLMConfig.from_dict(copy.deepcopy(entrant.config)))
    if race.model.linear_init == "uniform":
        draw_linear_layers(model)
    return model


@torch.no_grad()
def draw_linear_layers(model: HybridLMForCausalLM) -> None:
    """Draw weights of linear layers and experts from U(+-1/sqrt(fan_in)), the head only where it has its own.

    Parts with an initialisation of their own (routers, gates of memories, convolutions) keep it.
    """
    tied = model.config.tie_word_embeddings
    for module in model.modules():
        weights = []
        if type(module) is torch.nn.Linear and not (tied and module is model.lm_head):
            weights = [module.weight]
        elif isinstance(module, Experts):
            weights = [module.gate_up_proj, module.down_proj]
        for weight in weights:
            bound = weight.shape[-1] ** -0.5
            weight.uniform_(-bound, bound)


def measure(config: HybridLMConfig, length: int, context: int) -> dict[str, int]:
    """Parameters, state bytes and FLOPs a token of the forward pass."""
    at_length = plan(config, context=length, dtype="fp32").total
    state = at_length if context == length else plan(config, context=context, dtype="fp32").total
    return {
        "parameters": at_length.num_parameters,
        "state_bytes": state.state_bytes,
        "flops": at_length.expected_prefill_flops // length,
    }


def enter(race: Race) -> dict[str, Entrant]:
    """Build all arms, and make equal what the race says.

    Raises:
        ValueError: An arm cannot be built or matched, or the task does not fit the vocabulary.
    """
    check_rows(race)
    length, match = race.task.length, race.match
    context = (match.context if match else None) or length
    configs = {name: build_arm(race, name) for name in race.arms}
    figures: dict[str, dict[str, int]] = {}
    for name, config in configs.items():
        try:
            figures[name] = measure(config, length, context)
        except (ValueError, TypeError) as error:
            raise ValueError(_placed(race, name, str(error))) from error
    steps, matched = dict.fromkeys(configs, race.training.steps), {}
    if match is not None:
        by_arm = {name: figures[name][match.what] for name in configs}
        target = match.target or (by_arm[match.of] if match.of else max(by_arm.values()))
        for name in configs:
            if match.by == "steps":
                # equal FLOPs: steps are those of the arm that the target is
                steps[name] = max(1, round(race.training.steps * target / by_arm[name]))
                value = steps[name] * by_arm[name] / race.training.steps
                if steps[name] >= MOST_STEPS:
                    raise ValueError(f"arms.{name}: {steps[name]} steps at equal FLOPs, expected below {MOST_STEPS}")
            else:
                figures[name], configs[name] = _fit(race, configs[name], target, context)
                value = figures[name][match.what]
            matched[name] = {"value": value, "target": target, "off": round(value / target - 1, 5)}
            _check_match(race, name, matched[name])
    return {
        name: Entrant(
            config=_fields(configs[name]),
            steps=steps[name],
            parameters=figures[name]["parameters"],
            state_bytes=figures[name]["state_bytes"],
            flops_per_token=figures[name]["flops"],
            matched=matched.get(name),
        )
        for name in configs
    }


def _fields(config: HybridLMConfig) -> dict[str, Any]:
    fields = config.to_diff_dict()
    fields.pop("transformers_version", None)
    return fields


def _fit(race: Race, config: HybridLMConfig, target: int, context: int) -> tuple[dict[str, int], HybridLMConfig]:
    """The config with the factor on its sizes that brings it nearest to the target, and its figures."""
    what, length = race.match.what, race.task.length
    find = state_sizes if what == "state_bytes" else widths
    found: dict[tuple[int, ...], tuple[dict[str, int], HybridLMConfig]] = {}

    def scaled(scale: float) -> int:
        """What it comes to; never less with a larger scale."""
        other = copy.deepcopy(config)
        places = find(other)
        for options, key in places:
            options[key] = max(1, round(options[key] * scale))
        sizes = tuple(options[key] for options, key in places)
        if sizes not in found:
            found[sizes] = measure(other, length, context), other
        return found[sizes][0][what]

    scaled(1.0)
    if find(config):
        low, high = _bracket(scaled, target)
        for _ in range(16):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if scaled(middle) < target else (low, middle)
    return min(found.values(), key=lambda pair: abs(pair[0][what] - target))


def _bracket(scaled: Callable[[float], int], target: int) -> tuple[float, float]:
    low, high = 0.5, 2.0
    while scaled(low) > target and low > 1 / MOST_SCALE:
        low /= 2
    while scaled(high) < target and high < MOST_SCALE:
        high *= 2
    return low, high


def widths(config: HybridLMConfig) -> list[Place]:
    """Where the widths of channel mixers stand."""
    channels = [spec.get("channel_mixer") or {} for spec in config.layer_specs.values()]
    return [(channel, WIDTH) for channel in channels if isinstance(channel.get(WIDTH), int)]


def state_sizes(config: HybridLMConfig) -> list[Place]:
    """Where the sizes of states stand."""
    mixers = [spec.get("mixer") or {} for spec in config.layer_specs.values()]
    places = [(mixer, STATE_OPTIONS.get(mixer.get("name"), "")) for mixer in mixers]
    return [(mixer, key) for mixer, key in places if isinstance(mixer.get(key), int)]


def _check_match(race: Race, name: str, matched: dict[str, float]) -> None:
    match = race.match
    if abs(matched["off"]) <= match.tolerance:
        return
    way = {
        "parameters": f"the {WIDTH} of its channel mixers",
        "state_bytes": f"{sorted(set(STATE_OPTIONS.values()))} of its mixers, where they are given",
        "flops": "its steps" if match.by == "steps" else f"the {WIDTH} of its channel mixers",
    }[match.what]
    raise ValueError(
        f"arms.{name}: cannot be matched to {matched['target']:,} {match.what} by {way}: it comes to "
        f"{matched['value']:,.0f}, expected a difference of at most match.tolerance={match.tolerance}"
    )


def check_rows(race: Race) -> None:
    """Draw rows of every length once.

    Raises:
        ValueError: The task refuses them, or they hold symbols that the model has not.
    """
    for length in race.lengths:
        try:
            rows = token_rows(race.task.name, 64, length, seed=TEST_SEED, **race.task.options)
        except ValueError as error:
            raise ValueError(f"task.options: {race.task.name} at {length} tokens: {error}") from error
        largest = max(int(rows.input_ids.max()), int(rows.labels.max()))
        if largest >= race.model.vocab_size:
            raise ValueError(
                f"model.vocab_size: {race.model.vocab_size}, but {race.task.name} at {length} tokens has symbol "
                f"{largest}, expected at least {largest + 1}"
            )
