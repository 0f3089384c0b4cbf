"""Checks of saving and loading: the same bits, and proper values for what a checkpoint lacks."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .base import Subject, quiet


def saved_is_loaded(subject: Subject) -> float:
    """`save_pretrained` then `from_pretrained` gives the same bits, weights and logits."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        subject.model.save_pretrained(folder)
        loaded = type(subject.model).from_pretrained(folder, dtype=subject.model.dtype).eval()
    before, after = subject.model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys(), f"keys differ: {sorted(before.keys() ^ after.keys())}"
    for name, value in before.items():
        if value.dtype != after[name].dtype or not torch.equal(value, after[name]):
            return math.inf
    experts = getattr(subject.model.config, "_experts_implementation", None)  # is not saved
    if experts is not None and hasattr(loaded, "set_experts_implementation"):
        loaded.set_experts_implementation(experts)
    loaded = loaded.to(subject.model.device)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()  # the last bit of a product depends on how its memory is aligned
        logits = subject.call(loaded, input_ids=subject.input_ids, use_cache=False).logits
    return 0.0 if torch.equal(logits, subject.reference) else math.inf


def missing_keys(subject: Subject) -> float:
    """A key that a checkpoint lacks gets the value that a new model gives it, and the others keep their bits."""
    model = subject.copy_of_model().float()
    fresh = [_fresh(model, seed) for seed in range(6)]
    saved = model.state_dict()
    groups: dict[int, list[str]] = {}  # tied names are present or absent together
    for name, value in saved.items():
        groups.setdefault(value.data_ptr() if value.numel() else id(value), []).append(name)
    keys = list(groups)
    for chosen in (keys, keys[::2], keys[1::2]):
        absent = {name for key in chosen for name in groups[key]}
        loaded = _load_without(model, absent)
        for name, value in saved.items():
            if name in absent:
                problem = _unlike_fresh(loaded[name], [state[name] for state in fresh])
                assert problem is None, f"{name}: {problem}"
            elif not torch.equal(loaded[name], value):
                raise AssertionError(f"{name}: was in the checkpoint and changed")
    return 0.0


def _fresh(model: nn.Module, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(model)(model.config).state_dict()


def _load_without(model: nn.Module, absent: set[str]) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder, quiet(), torch.random.fork_rng():
        torch.manual_seed(100)
        model.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        save_file({k: v for k, v in load_file(path).items() if k not in absent}, path, metadata={"format": "pt"})
        return type(model).from_pretrained(folder, dtype=model.dtype).state_dict()


def _unlike_fresh(value: Tensor, samples: list[Tensor]) -> str | None:
    """What tells a value from those of new models, or `None`."""
    if not bool(torch.isfinite(value).all()):
        return "is not finite"
    if all(torch.equal(sample, samples[0]) for sample in samples):
        return None if torch.equal(value, samples[0]) else "is not the constant that it starts with"
    value, sample = value.double(), torch.cat([sample.flatten() for sample in samples]).double()
    spread, number = float(sample.std()), value.numel()
    if abs(float(value.mean() - sample.mean())) > 6 * spread / math.sqrt(number):
        return f"has mean {float(value.mean()):.3g}, a new one {float(sample.mean()):.3g}"
    if number >= 30 and not 0.5 < float(value.std()) / spread < 2:
        return f"has standard deviation {float(value.std()):.3g}, a new one {spread:.3g}"
    return None


def _casts(model_type: type) -> dict[str, Callable[[nn.Module], nn.Module]]:
    def reload(dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
        def cast(model: nn.Module) -> nn.Module:
            with tempfile.TemporaryDirectory() as folder, quiet():
                model.save_pretrained(folder)
                return model_type.from_pretrained(folder, dtype=dtype)

        return cast

    return {
        ".bfloat16()": lambda model: model.bfloat16(),
        ".half()": lambda model: model.half(),
        ".to(bfloat16)": lambda model: model.to(torch.bfloat16),
        ".to(float16)": lambda model: model.to(dtype=torch.float16),
        "from_pretrained(bfloat16)": reload(torch.bfloat16),
        "from_pretrained(float16)": reload(torch.float16),
    }


def float32_islands(
    subject: Subject, names: tuple[str, ...] = ("A_log", "D", "dt_bias", "selection_bias", "inv_freq")
) -> float:
    """Decays, step-size and router biases and rotary frequencies stay float32, bit for bit, under every cast."""
    for label, cast in _casts(type(subject.model)).items():
        model = subject.copy_of_model().float()
        before = {name: value.clone() for name, value in _tensors(model).items()}
        after = _tensors(cast(model))
        for name, value in before.items():
            if name.rsplit(".", 1)[-1] in names:
                assert after[name].dtype == torch.float32, f"{name} is {after[name].dtype} after {label}"
                assert torch.equal(after[name], value), f"{name} changed in {label}"
            elif value.is_floating_point():
                assert after[name].dtype in (torch.bfloat16, torch.float16), f"{name} stayed wide in {label}"
    return 0.0


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
