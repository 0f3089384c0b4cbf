"""Checks of saving and loading: the same bits, and what stays float32 under casts."""

import math
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import Subject, quiet

ISLANDS = (
    "A_log",
    "D",
    "dt_bias",
    "selection_bias",
    "threshold_bias",
    "inv_freq",
    "mix_weight",
    "mix_base",
    "mix_scale",
)


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


def float32_islands(subject: Subject, names: tuple[str, ...] = ISLANDS) -> float:
    """Decays, step-size and router biases, rotary frequencies and stream gates stay float32, bit for bit, when cast."""
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
