"""Native tensors <-> ours: names, fused experts, and a stream from shard to shard.

E experts, I expert width, D hidden size. Nothing is held but one output shard and, while a tensor is assembled, one
input tensor.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .native_tables import Family, Layout

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
}


class Checkpoint(AbstractContextManager):
    """The safetensors of a folder, one file or sharded with an index; opened lazily, header by header.

    Raises:
        FileNotFoundError: No weights, or a shard of the index is missing.
        ValueError: A truncated or corrupt file, or an index that contradicts its shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        self._file_of = self._from_index() if (folder / INDEX).is_file() else self._from_file()

    def __exit__(self, *error: object) -> None:
        self._handles.clear()
        self._stack.close()

    def _from_file(self) -> dict[str, str]:
        if not (self.folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{self.folder}: no weights, expected {WEIGHTS} or {INDEX}")
        return {name: WEIGHTS for name in self._open(WEIGHTS).keys()}  # noqa: SIM118

    def _from_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{path}: no weight_map from tensor names to files")
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise ValueError(f"{path}: shard {file!r} is not a file name")
            held = set(self._open(file).keys())
            listed = {name for name, shard in weight_map.items() if shard == file}
            if held != listed:
                name = sorted(held ^ listed)[0]
                where = "holds" if name in held else "does not hold"
                raise ValueError(f"{self.folder / file}: {where} {name}, unlike {INDEX} says")
        return weight_map

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.folder / file
            if not path.is_file():
                raise FileNotFoundError(f"{path}: shard named by {INDEX} is missing")
            try:
                self._handles[file] = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path}: truncated or corrupt safetensors file ({error})") from error
        return self._handles[file]

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header."""
        spelled = self._open(self._file_of[name]).get_slice(name).get_dtype()
        if spelled not in DTYPES:
            raise ValueError(f"{self.where(name)}: {name} has type {spelled}, expected one of {sorted(DTYPES)}")
        return DTYPES[spelled]

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> Tensor:
        """A tensor, or `tensor[index]`, without reading the rest of it."""
        handle = self._open(self._file_of[name])
        return handle.get_slice(name)[index] if index else handle.get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; errors name the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected an object")
    return content


# --- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Our tensor at `index` is the native tensor `name`."""

    name: str
    index: tuple[int | slice, ...] = ()


def native_pieces(family: Family, layout: Layout, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """The native tensors that our tensor `name` of `shape` consists of: one, or one to two for each expert.

    Raises:
        KeyError: The family has no such tensor.
    """
    modules = family.modules
    if name == "lm_head.weight":
        return [Piece(name)]
    if not name.startswith("model.layers."):
        module, leaf = name.rsplit(".", 1)
        return [Piece(f"{modules[module]}.{leaf}")]
    _, _, depth, half, rest = name.split(".", 4)
    prefix = f"{modules['model.layers']}.{depth}"
    if half.endswith("_norm"):
        return [Piece(f"{prefix}.{modules[half]}.{rest}")]
    mixer, channel = layout[int(depth)]
    part = mixer if half == "mixer" else channel if half == "channel_mixer" else None
    if part is None:
        raise KeyError(half)
    prefix = f"{prefix}.{modules[part]}"
    if rest.startswith("experts."):
        return list(_expert_pieces(modules, prefix, rest.removeprefix("experts."), shape))
    first, dot, leaf = rest.partition(".")
    return [Piece(f"{prefix}.{modules.get(f'{part}.{first}', first)}{dot}{leaf}")]


def _expert_pieces(modules: Mapping[str, str], prefix: str, leaf: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    for expert in range(shape[0]):
        path = f"{prefix}.experts.{expert}"
        if leaf == "down_proj":  # [E, D, I]
            yield Piece(f"{path}.{modules['moe.down']}.weight", (expert,))
        elif leaf == "gate_up_proj":  # [E, 2I, D], the gates before the values
            width = shape[1] // 2
            yield Piece(f"{path}.{modules['moe.gate']}.weight", (expert, slice(0, width)))
            yield Piece(f"{path}.{modules['moe.up']}.weight", (expert, slice(width, None)))
        else:
            raise KeyError(leaf)


def piece_shape(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[int, ...]:
    """Shape of `tensor[index]`."""
    return tuple(torch.empty(shape, device="meta")[index].shape)


# --- streaming out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """One tensor to be written: name, bytes, and how to make it when its turn comes."""

    name: str
    num_bytes: int
    make: Callable[[], Tensor]


def num_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def write_shards(folder: Path, outputs: list[Output], max_shard_bytes: int) -> None:
    """Write the tensors in order, a file at a time, with an index when there is more than one file."""
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.num_bytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({output.name: output.make().contiguous() for output in shard}, folder / file, {"format": "pt"})
        weight_map |= {output.name: file for output in shard}
    if len(shards) > 1:
        total = {"total_size": sum(output.num_bytes for output in outputs)}
        index = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(index + "\n", encoding="utf-8")
