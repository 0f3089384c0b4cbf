"""Model folders: their config, what travels along, and writing one whole or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .native_tensors import read_json

COPIED = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("chat_template*", "additional_chat_templates", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"),
)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a model folder as it stands in the file.

    Raises:
        FileNotFoundError: There is no such folder, or no config in it.
        ValueError: It is not a JSON object.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'}: missing")
    return PreTrainedConfig._decode_special_floats(read_json(folder / "config.json"))


def copy_companions(src: Path, out: Path) -> None:
    """Copy the generation config, the tokenizer and the licence."""
    for pattern in COPIED:
        for path in src.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out / path.name)
            elif path.suffix != ".py":
                shutil.copyfile(path, out / path.name)


@contextmanager
def whole_folder(out: str | PathLike) -> Iterator[Path]:
    """A sibling of `out` to write into; it becomes `out` when all went well and is removed otherwise."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
