"""Documents: where text comes from, and which of it is held out.

Every source becomes a `datasets` data set with a column `text`, one row a document. The split into training and
held-out documents depends on each document's own bytes, so it does not move when others are added.
"""

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets

STDLIB = "stdlib"
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text", ".rst": "text"}
KINDS |= {".py": "text"}
# tests are left out because some distributions leave them out
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
# files that belong to one machine: its paths, its administrator's settings
OF_ONE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Documents:
    """Training and held-out documents, each with a column `text`.

    Args:
        train: What is trained on.
        heldout: What is only ever evaluated; `None` when nothing is held out.
        manifest_hash: SHA-256 over the SHA-256 of every document in order; `None` for a stream, which is not read
            whole.
        num_skipped: Files that were left out because they are not UTF-8.
    """

    train: datasets.Dataset | datasets.IterableDataset
    heldout: datasets.Dataset | datasets.IterableDataset | None
    manifest_hash: str | None
    num_skipped: int = 0


def text_hash(text: str) -> str:
    """SHA-256 of a document's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_heldout(text: str, modulus: int) -> bool:
    """Whether a document is held out: one in `modulus`, chosen by its hash."""
    return int(text_hash(text), 16) % modulus == 0


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The `.py` files of CPython's standard library on this machine, sorted, without tests and installed packages."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        sources = [name for name in names if name.endswith(".py") and not name.startswith(OF_ONE_MACHINE)]
        found += [Path(folder, name) for name in sources]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def load_stdlib(root: Path | None = None) -> tuple[datasets.Dataset, int]:
    """Read the standard library: one document a file. Also returns how many files are not UTF-8 and were left out."""
    texts, num_skipped = [], 0
    for path in stdlib_files(root):
        try:
            texts.append(path.read_bytes().decode())
        except UnicodeDecodeError:
            num_skipped += 1
    if not texts:
        raise ValueError("data.path: 'stdlib' found no .py files of Python's standard library on this machine")
    return datasets.Dataset.from_dict({"text": texts}), num_skipped


def load_documents(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    heldout_modulus: int = 20,
) -> Documents:
    """Load documents and hold some out.

    Args:
        path: `stdlib`; a file or folder of text (one document a file), JSON lines or parquet; a folder written by
            `Dataset.save_to_disk`; or the name of a data set on the Hub.
        name: Configuration of a Hub data set.
        split: Split of a Hub data set.
        text_column: Column that holds the text.
        streaming: Read while training instead of before it.
        heldout_modulus: One document in this many is held out; 0 holds none out.

    Raises:
        ValueError: `path` is nothing of the above, or has no column `text_column`.
    """
    if heldout_modulus == 1 or heldout_modulus < 0:
        raise ValueError(f"data.heldout_modulus={heldout_modulus} must be 0 (hold nothing out) or at least 2")
    num_skipped = 0
    if path == STDLIB:
        dataset, num_skipped = load_stdlib()
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        text_column = "text"
    elif Path(path).expanduser().exists():
        dataset = _load_local(Path(path).expanduser(), streaming)
    else:
        dataset = _load_from_hub(path, name, split, streaming)
    columns = dataset.column_names
    if columns is not None and text_column not in columns:
        raise ValueError(f"data.text_column: {path!r} has no column {text_column!r}, expected one of {columns}")
    if text_column != "text":
        dataset = dataset.select_columns([text_column]).rename_column(text_column, "text")
    if streaming:
        return _split_stream(dataset, heldout_modulus)
    return _split_table(dataset, heldout_modulus, num_skipped)


def _split_stream(dataset: datasets.IterableDataset, modulus: int) -> Documents:
    if not modulus:
        return Documents(dataset, None, None)
    train = dataset.filter(lambda text: not is_heldout(text or "", modulus), input_columns="text")
    heldout = dataset.filter(lambda text: is_heldout(text or "", modulus), input_columns="text")
    return Documents(train, heldout, None)


def _split_table(dataset: datasets.Dataset, modulus: int, num_skipped: int) -> Documents:
    hashes = [text_hash(text or "") for text in _texts(dataset)]
    manifest_hash = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    if not modulus:
        return Documents(dataset, None, manifest_hash, num_skipped)
    chosen = [int(digest, 16) % modulus == 0 for digest in hashes]
    train = dataset.select([index for index, held in enumerate(chosen) if not held])
    heldout = dataset.select([index for index, held in enumerate(chosen) if held])
    return Documents(train, heldout, manifest_hash, num_skipped)


def _texts(dataset: Iterable[dict[str, str]]) -> Iterable[str]:
    return (row["text"] for row in dataset)


def _load_local(path: Path, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    if (path / "state.json").exists():
        dataset = datasets.load_from_disk(str(path))
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"data.path: {str(path)!r} holds several splits {list(dataset)}, name the folder of one")
        return dataset.to_iterable_dataset() if streaming else dataset
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in KINDS)
    kinds = {KINDS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        found = sorted({file.suffix for file in files}) or "none"
        raise ValueError(f"data.path: {str(path)!r} must hold files of one kind out of {sorted(KINDS)}, found {found}")
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    names = [str(file) for file in files]
    try:
        return datasets.load_dataset(kind, data_files=names, split="train", streaming=streaming, **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(f"data.path: {str(path)!r} could not be read as {kind}: {error.__cause__ or error}") from error


def _load_from_hub(path: str, name: str | None, split: str, streaming: bool) -> datasets.Dataset:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) or Path(path).suffix in KINDS:
        raise ValueError(f"data.path: {path!r} does not exist")
    try:
        return datasets.load_dataset(path, name, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"data.path: {path!r} does not exist here and could not be loaded from the Hub: {error}"
        ) from error
