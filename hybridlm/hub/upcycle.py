"""Turn a dense checkpoint into one with experts that computes the same.

Every expert of a chosen layer is a copy of its SwiGLU, and a token's gates sum to one, so the logits are those of the
dense model until training moves the copies apart.

Reference: Komatsuzaki et al. 2022, "Sparse Upcycling", arXiv:2212.05055.
Differs: gates are always renormalised, as the paper does for vision models; tokens are never dropped.
"""

import copy
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import modeling_hybridlm
from ..modeling.backbone import HybridLMPreTrainedModel
from ..modeling.configuration_hybridlm import HybridLMConfig
from .folders import copy_companions, read_config, whole_folder
from .native import import_native
from .native_families import FAMILIES

EVERY_OTHER, ALL = "every_other", "all"


def upcycle(
    src: str | PathLike,
    out: str | PathLike,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    layers: str | Sequence[int] = EVERY_OTHER,
    load_balancing_coef: float = 0.01,
    noise: float = 0.0,
    seed: int = 0,
) -> Path:
    """Replace the SwiGLU of some layers by experts that are its copies.

    Args:
        src: A hybridlm model folder with any head, or a native folder that `import_native` reads.
        out: Folder to make; it may exist when it is empty. It appears complete or not at all.
        num_experts: Experts a layer.
        top_k: Experts a token.
        layers: "every_other": the second, fourth, ... layer with a SwiGLU; "all" of them; or depths, counted from 0.
        load_balancing_coef: Factor of the load balancing loss in the training to come.
        noise: Standard deviation of what is added to the copies, as a fraction of that of each weight; with 0 the
            logits are those of the dense model.
        seed: Of the routers, which are new, and of the noise.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: The config or the weights are missing.
        FileExistsError: `out` is there and not empty.
        ValueError: A folder of another family, a layer that cannot become experts, or an option out of range.
    """
    src = Path(src)
    raw = read_config(src)
    if noise < 0:
        raise ValueError(f"noise={noise} must not be negative")
    if raw.get("model_type") in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            dense = _load(import_native(src, Path(folder) / "imported"))
    elif raw.get("model_type") == HybridLMConfig.model_type:
        dense = _load(src)
    else:
        known = ["hybridlm", *sorted(FAMILIES)]
        raise ValueError(f"{src / 'config.json'}: model_type is {raw.get('model_type')!r}, expected one of {known}")
    options = {"num_experts": num_experts, "top_k": top_k, "load_balancing_coef": load_balancing_coef}
    with whole_folder(out) as temporary:
        upcycle_model(dense, layers, options, noise, seed).save_pretrained(temporary)
        copy_companions(src, temporary)
    return Path(out)


def _load(folder: Path) -> HybridLMPreTrainedModel:
    """The model of a folder, with the head and in the number format it was saved with."""
    architectures = read_config(folder).get("architectures") or ["HybridLMForCausalLM"]
    if architectures[0] not in modeling_hybridlm.__all__:
        raise ValueError(f"{folder / 'config.json'}: architectures is {architectures!r}, not a model of hybridlm")
    return getattr(modeling_hybridlm, architectures[0]).from_pretrained(folder, dtype="auto")


def upcycle_model(
    dense: HybridLMPreTrainedModel,
    layers: str | Sequence[int] = EVERY_OTHER,
    options: dict[str, Any] | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> HybridLMPreTrainedModel:
    """The same as `upcycle` for a model in memory, which is left as it is.

    Args:
        dense: The model.
        layers: As in `upcycle`.
        options: Options of the `moe` part, but for its width, activation and `renormalize`.
        noise: As in `upcycle`.
        seed: As in `upcycle`.

    Raises:
        ValueError: As in `upcycle`.
    """
    chosen = _chosen_layers(dense.config, layers)
    config = _config_with_experts(dense.config, chosen, options or {})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sparse = type(dense)(config).to(dense.dtype)
        ours, theirs = sparse.base_model.layers, dense.base_model.layers
        known = dense.state_dict()
        sparse.load_state_dict({name: known.get(name, tensor) for name, tensor in sparse.state_dict().items()})
        for depth in chosen:
            _copy_into_experts(theirs[depth].channel_mixer, ours[depth].channel_mixer, noise)
    return sparse.train(dense.training)


def _chosen_layers(config: HybridLMConfig, layers: str | Sequence[int]) -> list[int]:
    parts = [config.layer_specs[recipe]["channel_mixer"] or {"name": None} for recipe in config.layer_layout]
    dense = [depth for depth, part in enumerate(parts) if part["name"] == "swiglu"]
    if isinstance(layers, str):
        if layers not in (EVERY_OTHER, ALL):
            raise ValueError(f"layers: unknown {layers!r}, expected {EVERY_OTHER!r}, {ALL!r} or depths")
        chosen = dense if layers == ALL else dense[1::2]
        if not chosen:
            raise ValueError(f"layers: {len(dense)} of {len(parts)} layers have a 'swiglu', {layers!r} chooses none")
    else:
        chosen = sorted(set(layers))
        if not chosen:
            raise ValueError("layers: expected at least one")
    for depth in chosen:
        if not 0 <= depth < len(parts):
            raise ValueError(f"layers: {depth} is not a layer, expected 0 to {len(parts) - 1}")
        path = f"layer_specs.{config.layer_layout[depth]}.channel_mixer"
        if parts[depth]["name"] != "swiglu":
            raise ValueError(f"layers: layer {depth} has {path}.name={parts[depth]['name']!r}, expected 'swiglu'")
        if parts[depth]["bias"]:
            raise ValueError(f"layers: layer {depth} has {path}.bias=True, and experts have no bias")
    return chosen


def _config_with_experts(dense: HybridLMConfig, chosen: list[int], options: dict[str, Any]) -> HybridLMConfig:
    """The config with a recipe `<name>_experts` for every recipe of a chosen layer."""
    fields = copy.deepcopy(dense.to_dict())
    specs, layout = fields["layer_specs"], fields["layer_layout"]
    for depth in chosen:
        recipe = layout[depth]
        name = f"{recipe}_experts"
        while name in dense.layer_specs:
            name += "_"
        part = specs[recipe]["channel_mixer"]
        kept = {key: part[key] for key in ("intermediate_size", "activation", "dropout")}
        specs[name] = specs[recipe] | {"channel_mixer": {"name": "moe", **kept, **options, "renormalize": True}}
        layout[depth] = name
    fields["layer_specs"] = {name: spec for name, spec in specs.items() if name in layout}
    extra = {key: value for key, value in fields["extra"].items() if key != "native"}  # it is no native model any more
    fields["extra"] = extra | {"upcycled": {**options, "layers": chosen}}
    return type(dense).from_dict(fields)


@torch.no_grad()
def _copy_into_experts(dense: nn.Module, moe: nn.Module, noise: float) -> None:
    gate_up = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])  # [2I, D]
    for experts, weight in ((moe.experts.gate_up_proj, gate_up), (moe.experts.down_proj, dense.down_proj.weight)):
        experts.copy_(_with_noise(weight.expand_as(experts), noise * float(weight.float().std())))


def _with_noise(weights: Tensor, std: float) -> Tensor:
    return weights + std * torch.randn_like(weights) if std else weights
