"""What a checkpoint lacks gets a proper initial value: a check that knows files, not the names inside a model.

transformers may rename and merge the tensors of a file while it loads, so keys are left out of the file, and the
loading report says which parameters are missing.
"""

import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .base import NotApplicable, Subject, quiet


def missing_keys(subject: Subject) -> float:
    """A key that a checkpoint lacks gets the value that a new model gives it, and the others keep their bits."""
    model = subject.copy_of_model().float()
    small = sum(p.numel() for p in model.parameters()) < 5_000_000
    fresh = [_fresh(model, seed) for seed in range(1, 9 if small else 3)]  # a few values alone tell no spread
    saved = model.state_dict()
    with tempfile.TemporaryDirectory() as folder, quiet(), torch.random.fork_rng():
        torch.manual_seed(subject.seed)
        model.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        if not path.is_file():
            raise NotApplicable("the checkpoint is saved in several files")
        tensors = load_file(path)
        groups: dict[str, list[str]] = {}
        for key in sorted(tensors):  # experts that are merged into one parameter are missing together
            groups.setdefault(re.sub(r"experts\.\d+\..*", "experts", key), []).append(key)
        keys = list(groups.values())
        for dropped in (keys, keys[::2], keys[1::2]):
            absent = {key for group in dropped for key in group}
            kept = {key: value for key, value in tensors.items() if key not in absent}
            save_file(kept, path, metadata={"format": "pt"})
            with _garbage_is_nan():
                loaded, report = type(model).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
            _check(loaded, set(report["missing_keys"]), saved, fresh)
    return 0.0


@contextmanager
def _garbage_is_nan() -> Iterator[None]:
    """Let PyTorch fill memory that is not initialised with NaN: it often happens to hold what was there before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills


def _fresh(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The state of a new model, non-persistent buffers included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _tensors(type(model)(model.config))


def _tensors(model: Any) -> dict[str, Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}


def _check(loaded: nn.Module, missing: set[str], saved: dict[str, Tensor], fresh: list[dict[str, Tensor]]) -> None:
    for name, value in _tensors(loaded).items():
        if name in missing or name not in saved:
            problem = _unlike_fresh(value, [state[name] for state in fresh])
            assert problem is None, f"{name}: {problem}"
        elif not missing & _tied(loaded, name):
            assert torch.equal(value, saved[name]), f"{name}: was in the checkpoint and changed"


def _tied(model: nn.Module, name: str) -> set[str]:
    """All names of one tensor."""
    state = model.state_dict()
    return {other for other, value in state.items() if value.data_ptr() == state[name].data_ptr()}


def _unlike_fresh(value: Tensor, fresh: list[Tensor]) -> str | None:
    """What tells a value from those of new models, or `None`."""
    if not bool(torch.isfinite(value).all()):
        return "is not finite"
    if all(torch.equal(fresh[0], other) for other in fresh):
        return None if torch.equal(value, fresh[0]) else "is not the constant that it starts with"
    value, sample = value.double(), torch.cat([other.flatten() for other in fresh]).double()
    spread, number = float(sample.std()), value.numel()
    if abs(float(value.mean() - sample.mean())) > 6 * spread / math.sqrt(number):
        return f"has mean {float(value.mean()):.3g}, a new one {float(sample.mean()):.3g}"
    if number >= 30 and not 0.5 < float(value.std()) / spread < 2:
        return f"has standard deviation {float(value.std()):.3g}, a new one {spread:.3g}"
    return None
