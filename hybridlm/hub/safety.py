"""What must not be published: pickles, secrets, links out of the folder, files of unknown kinds, too much."""

import io
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npz", ".mar"}
KNOWN = {".json", ".jsonl", ".md", ".py", ".safetensors", ".txt", ".yaml", ".yml", ".jinja", ".model", ".tiktoken"} | {
    *(".png", ".svg", ".html", ".csv", ".npy")
}
NAMES = {"LICENSE", "NOTICE", ".gitattributes"}  # files without a suffix
BINARY = {".safetensors", ".png", ".npy", ".model"}
MAX_FILE_BYTES, MAX_TOTAL_BYTES = 50 * 10**9, 300 * 10**9
# what `hf download` and git leave in a folder, and `HfApi.upload_folder` leaves out
_LEFT_OUT = ("/.cache/huggingface/", "/.git/")
_READ = 1 << 20

SECRETS = {
    "a Hugging Face token": re.compile(
        r"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{24,}\b|hf_(?:oauth|jwt)_[A-Za-z0-9_.-]{20,})"
    ),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b"),
    "an AWS secret key": re.compile(r"(?i)aws.{0,20}?secret.{0,20}?[=:\"'\s]+[A-Za-z0-9/+=]{40}(?![A-Za-z0-9/+=])"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b"),
    "a GitLab token": re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "a Weights & Biases key": re.compile(r"(?i)wandb.{0,20}?key[=:\"'\s]+[0-9a-f]{40}\b"),
    "a Google API key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "a Slack token": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{20,}\b"),
    "an API key": re.compile(r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}\b"),
}


def folder_files(folder: Path) -> list[Path]:
    """Every file and link below a folder that would be uploaded, in order."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path for path in found if not any(part in _place(path, folder) for part in _LEFT_OUT))


def _place(path: Path, folder: Path) -> str:
    return f"/{path.relative_to(folder).as_posix()}/"


def unsafe_files(folder: Path) -> Iterator[str]:
    """Files that could run code when they are read, cannot be read, or do not lie in the folder; with the reason."""
    root = folder.resolve()
    for path in folder_files(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            yield f"{name}: a link out of the folder; copy the file instead"
            continue
        if not path.is_file():
            yield f"{name}: neither a file nor a folder"
            continue
        reason = _reason_against(path)
        if reason:
            yield f"{name}: {reason}"
    if not any(folder.glob("*.safetensors")):
        yield "no weights: there is no *.safetensors"


def _reason_against(path: Path) -> str:
    pickled = pickle_reason(path)
    if pickled:
        return f"{pickled}; weights are published as safetensors only"
    if path.suffix.lower() not in KNOWN and path.name not in NAMES:
        return f"not a kind of file that is published ({', '.join(sorted(KNOWN))})"
    if path.name.startswith(".") and path.name not in NAMES:
        return "a hidden file"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                list(file.keys())
        except (SafetensorError, OSError) as error:
            return f"no safetensors file: {error}"
    elif path.suffix not in BINARY:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return "not text, which its name promises"
        if "\0" in text:  # of UTF-16, say, in which no secret would be found
            return "not text in UTF-8, which its name promises"
    return ""


def pickle_reason(path: Path) -> str:
    """Why a file is or may hold a pickle, by name and by content; empty if it is none."""
    if path.suffix.lower() in PICKLES:
        return f"a pickle by its name ({path.suffix})"
    with path.open("rb") as file:
        head = file.read(_READ)
    if head.startswith(b"\x93NUMPY"):
        return "a NumPy array of objects, which is a pickle" if _holds_objects(head) else ""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            return "an archive that is torn"
        return "a PyTorch archive with a pickle" if any(name.endswith("data.pkl") for name in names) else "an archive"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")) or head[257:262] == b"ustar":
        return "an archive, whose content cannot be checked"
    return "a pickle by its content" if _is_pickle(head) else ""


def _holds_objects(head: bytes) -> bool:
    """Whether a NumPy header names a type with objects in it."""
    match = re.search(rb"'descr':\s*(.*?)'fortran_order'", head[:4096], re.DOTALL)
    return match is None or re.search(rb"['\"][|<>=]?O\d*['\"]", match[1]) is not None


def _is_pickle(head: bytes) -> bool:
    """Whether bytes begin with a pickle: of a binary protocol, or of a text protocol that is whole or makes objects.

    Text may happen to begin with what a pickle could begin with: `i` and `c` are instructions that read two lines.
    """
    stream, seen, complete = io.BytesIO(head), set(), False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # text that is no pickle may hold escapes that Python warns of
            for operation, _, _ in pickletools.genops(stream):
                seen.add(operation.name)
        complete = True
    except Exception:  # pickletools raises many types
        if stream.tell() < len(head):  # else the pickle goes on behind what was read
            return False
    if head[:1] == b"\x80":
        return len(seen) > 1
    makes = bool(seen & {"GLOBAL", "STACK_GLOBAL"} and seen & {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "BUILD"})
    whole = complete and len(seen) > 2 and not head[stream.tell() :].strip()
    return whole or ((makes or {"INST", "MARK"} <= seen) and (complete or len(head) == _READ))


def secrets(folder: Path, own: Sequence[str] = ()) -> Iterator[str]:
    """Where secrets stand; what they are is never said.

    Args:
        folder: The model folder.
        own: Secrets of this machine, such as the token in use.
    """
    for path in folder_files(folder):
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            continue
        name = path.relative_to(folder).as_posix()
        for line, kind in _secrets_in(path, own):
            yield f"{name}{f', line {line}' if line else ''}: holds {kind}; remove it and revoke it"


def _secrets_in(path: Path, own: Sequence[str]) -> Iterator[tuple[int, str]]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                text = json.dumps(file.metadata() or {})
        except (SafetensorError, OSError):
            return
    else:
        text = path.read_bytes().decode("utf-8", errors="replace")
    found = False
    for number, line in enumerate(text.splitlines(), 1):
        for kind in _kinds(line, own):
            found = True
            yield number, kind
    if not found and path.suffix in (".json", ".jsonl"):  # JSON may write any character as an escape
        try:
            parts = [text] if path.suffix == ".json" else filter(str.strip, text.splitlines())
            values = [value for part in parts for value in _texts(json.loads(part))]
        except (json.JSONDecodeError, RecursionError):
            return
        yield from dict.fromkeys((0, kind) for value in values for kind in _kinds(value, own))


def _kinds(text: str, own: Sequence[str]) -> Iterator[str]:
    yield from (kind for kind, pattern in SECRETS.items() if pattern.search(text))
    if any(secret and secret in text for secret in own):
        yield "the token that you are logged in with"


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield key
            yield from _texts(value)
    elif isinstance(data, list):
        for value in data:
            yield from _texts(value)


def too_large(folder: Path, max_file: int = MAX_FILE_BYTES, max_total: int = MAX_TOTAL_BYTES) -> Iterator[str]:
    """Files, and the whole, beyond what the Hub takes."""
    sizes = {path: path.stat().st_size for path in folder_files(folder) if path.is_file()}
    for path, size in sizes.items():
        if size > max_file:
            yield f"{path.relative_to(folder).as_posix()}: {size:,} bytes, more than {max_file:,}; save smaller shards"
    if sum(sizes.values()) > max_total:
        yield f"{len(sizes)} files: {sum(sizes.values()):,} bytes in all, more than {max_total:,}"
