"""Tell which file of a checkpoint is missing or damaged, before any of it is loaded, and align what was loaded.

A safetensors file is 8 bytes that hold the length of the header, the header in JSON, and the data. The header says
where every tensor ends, so a file that was cut off shows without reading its data.
"""

import itertools
import json
from pathlib import Path

from torch import nn

ALIGNMENT = 64  # bytes, of PyTorch's own memory on a CPU
WEIGHTS, INDEX = "model{}.safetensors", "model.safetensors.index{}.json"


def check_weights(folder: str | Path, variant: str | None = None) -> None:
    """Check the safetensors files in a model folder; a folder with another kind of weights passes.

    Args:
        folder: The folder that holds the weights.
        variant: As in `from_pretrained`.

    Raises:
        OSError: The index or a file is missing or damaged; the message names it.
    """
    suffix = "" if variant is None else f".{variant}"
    single, index = Path(folder) / WEIGHTS.format(suffix), Path(folder) / INDEX.format(suffix)
    if single.is_file():
        _check_file(single)
    elif index.is_file():
        for name in _shards(index):
            _check_file(index.parent / name, listed_in=index)


def _shards(index: Path) -> list[str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{index}: not JSON ({error}); the index is damaged") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise OSError(f"{index}: no weight_map from tensors to files; the index is damaged")
    return sorted(set(shards.values()))


def _check_file(path: Path, listed_in: Path | None = None) -> None:
    if not path.is_file():
        raise OSError(f"{path}: the file is missing, and {listed_in.name} lists tensors in it")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) == 9 and start[8:] != b"{":
            raise OSError(f"{path}: not a safetensors file")
        if len(start) < 9 or size < 8 + length:
            raise OSError(f"{path}: the file is truncated, it ends in its header")
        try:
            header = json.loads(start[8:] + file.read(length - 1))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{path}: not a safetensors file, its header cannot be read") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise OSError(f"{path}: the file is {what}, it has {size} bytes and its header says {expected}")


def align_tensors(model: nn.Module) -> None:
    """Copy tensors on the CPU that do not lie where PyTorch would have put them, as in a memory-mapped file.

    Products of one row give other last bits there, so that a loaded model would not quite equal the saved one.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
