"""Golden logits: what the weights gave when they were stored, so that anyone can see that they still do."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridlm.evaluation.loading import file_hash

# in a folder of its own: some loaders take every safetensors file beside the config for weights
GOLDEN = "golden/golden.safetensors"
PROMPT_LENGTH, NUM_POSITIONS = 24, 3
# largest |difference| over largest |logit|, by what the model computes in
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass
class Golden:
    """Stored logits.

    Attributes:
        input_ids: `[1, T]`, the prompt.
        positions: `[P]`, where logits are kept.
        logits: `[P, V]`, in float32, computed in float32.
        tolerance: By dtype, relative to the largest logit.
        weights: SHA-256 of every weight file, by name.
    """

    input_ids: Tensor
    positions: Tensor
    logits: Tensor
    tolerance: dict[str, float]
    weights: dict[str, str]

    def difference(self, logits: Tensor) -> float:
        """Largest difference of `[T, V]` logits from those stored, relative to the largest."""
        found = logits.float()[self.positions]
        if found.shape != self.logits.shape or not bool(torch.isfinite(found).all()):
            return float("inf")
        return float((found - self.logits).abs().max() / self.logits.abs().max().clamp_min(1e-12))


def weight_files(folder: Path) -> list[Path]:
    """The weights of a model folder."""
    return sorted(folder.glob("*.safetensors"))


def golden_prompt(vocab_size: int) -> Tensor:
    """`[1, T]` token ids spread over the vocabulary, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (1, PROMPT_LENGTH), generator=generator)


@torch.no_grad()
def write_golden(folder: Path, model: Any) -> None:
    """Store logits of a model beside its weights.

    Args:
        folder: What its `save_pretrained` wrote.
        model: The model, on the CPU, in float32 and evaluation mode.

    Raises:
        ValueError: There are no weights, or the logits are not finite.
    """
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder}: no weights (*.safetensors)")
    input_ids = golden_prompt(model.config.get_text_config().vocab_size)
    logits = model(input_ids=input_ids, use_cache=False).logits[0].float()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{folder}: the model's logits are not finite")
    positions = torch.linspace(0, PROMPT_LENGTH - 1, NUM_POSITIONS).long()
    (folder / GOLDEN).parent.mkdir(exist_ok=True)
    tensors = {"input_ids": input_ids, "positions": positions, "logits": logits[positions].contiguous()}
    weights = {path.name: file_hash(path) for path in files}
    said = json.dumps({"tolerance": TOLERANCES, "weights": weights})  # one entry: safetensors keeps no order of several
    save_file(tensors, folder / GOLDEN, metadata={"golden": said})


def read_golden(folder: Path) -> Golden:
    """The logits stored in a folder.

    Raises:
        FileNotFoundError: There are none.
        ValueError: The file is not as `write_golden` makes it.
    """
    path = folder / GOLDEN
    if not path.is_file():
        raise FileNotFoundError(f"{GOLDEN}: missing; `hybridlm card FOLDER` writes it")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("input_ids", "positions", "logits")}
            said = json.loads((file.metadata() or {})["golden"])
        golden = Golden(**tensors, tolerance=said["tolerance"], weights=said["weights"])
        _check_shapes(golden)
        return golden
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{GOLDEN}: not readable: {error}") from error


def _check_shapes(golden: Golden) -> None:
    ids, positions, logits = golden.input_ids, golden.positions, golden.logits
    fits = ids.ndim == logits.ndim == 2 and len(ids) == 1 and positions.shape == logits.shape[:1] and logits.numel()
    if not fits or not 0 <= int(positions.min()) <= int(positions.max()) < ids.shape[1]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (ids, positions, logits))
        raise ValueError(f"input_ids, positions and logits of shapes {shapes}, expected [1, T], [P] below T, [P, V]")


def wrong_hashes(folder: Path, golden: Golden) -> list[str]:
    """Weight files that are not those that the logits were made with."""
    found = {path.name: file_hash(path) for path in weight_files(folder)}
    problems = [f"{name}: missing, but the golden logits were made with it" for name in golden.weights.keys() - found]
    for name, digest in found.items():
        stored = golden.weights.get(name)
        if stored is None:
            problems.append(f"{name}: not among the weights that the golden logits were made with")
        elif stored != digest:
            problems.append(f"{name}: its hash {digest[:12]} is not {stored[:12]}, stored with the golden logits")
    return sorted(problems)
