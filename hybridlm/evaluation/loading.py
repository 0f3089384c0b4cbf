"""Load what is to be evaluated, and say what it is: model, tokenizer, hashes, versions."""

import hashlib
import inspect
import json
import platform
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "merges.txt",
)
MODEL_FILES = ("config.json", "*.safetensors", "*.bin")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PACKAGES = ("hybridlm", "numpy", "tokenizers", "torch", "transformers")


@dataclass
class Evaluated:
    """A model that is ready to be evaluated.

    Attributes:
        model: In evaluation mode.
        tokenizer: Its own; `None` where the folder has none.
        name: What results call it.
        folder: Where it lies.
        dtype: What it computes in.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    folder: Path
    dtype: str = "fp32"
    notes: list[str] = field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.model.config.get_text_config().vocab_size

    @property
    def trained_length(self) -> int | None:
        """The length that its config says it was trained for; `None` where it says nothing."""
        config = self.model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)

    @property
    def has_position_table(self) -> bool:
        """Whether positions are looked up in a table, which has an end."""
        parts = self.model.named_modules()
        return any(isinstance(part, nn.Embedding) and ("pos" in name or name.endswith("wpe")) for name, part in parts)

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 of the config and the weights."""
        return folder_hash(self.folder, MODEL_FILES)

    @cached_property
    def tokenizer_hash(self) -> str | None:
        """SHA-256 of the tokenizer's files."""
        return None if self.tokenizer is None else folder_hash(self.folder, TOKENIZER_FILES)

    def to_dict(self) -> dict[str, Any]:
        """What the results say of it."""
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "hash": self.model_hash,
            "parameters": self.model.num_parameters(),
            "trained_length": self.trained_length,
            "tokenizer": None if self.tokenizer is None else type(self.tokenizer).__name__,
            "tokenizer_hash": self.tokenizer_hash,
            "dtype": self.dtype,
            "device": self.model.device.type,
        }


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path, patterns: tuple[str, ...]) -> str:
    """SHA-256 over names and contents of the files that match, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode() + b"\0" + bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def load(
    folder: str | Path, *, dtype: str = "fp32", device: str | None = None, trust_remote_code: bool = False
) -> Evaluated:
    """Load a causal language model and its tokenizer from a folder.

    Args:
        folder: What `save_pretrained` wrote.
        dtype: A key of `DTYPES`.
        device: Where to run; a GPU if there is one.
        trust_remote_code: Whether code in the folder may run.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no weights.
        ValueError: It is no causal language model, or the dtype is unknown.
    """
    import hybridlm  # noqa: F401 - registers our models with the Auto classes

    folder = Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: unknown {dtype!r}, expected one of {list(DTYPES)}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model: {folder} has no config.json; give a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise FileNotFoundError(f"model: {folder} has no weights (*.safetensors); a config alone cannot be evaluated")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: {folder} is an encoder-decoder ({config.model_type}), expected a causal language model"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, local_files_only=True
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"model: {folder} ({config.model_type}) is no causal language model") from error
    if getattr(model.config, "is_decoder", None) is False and _looks_ahead(model):
        raise ValueError(f"model: {folder} ({config.model_type}) is an encoder: its tokens see later ones")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Evaluated(
        model.to(device).eval(), load_tokenizer(folder, trust_remote_code), folder.resolve().name, folder, dtype
    )


@torch.inference_mode()
def _looks_ahead(model: PreTrainedModel) -> bool:
    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    edited = ids.clone()
    edited[:, -1] = (edited[:, -1] + 1) % model.config.get_text_config().vocab_size
    logits, moved = (model.eval()(input_ids=x).logits for x in (ids, edited))
    return not torch.allclose(logits[:, 0], moved[:, 0])


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer; `None` where it has none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: {folder} has one that cannot be read: {error}") from error


def check_generates(found: Evaluated) -> None:
    """Let the model generate two tokens.

    Raises:
        ValueError: It cannot.
    """
    way = "--no-generate scores by likelihood alone"
    model = found.model
    if not hasattr(model, "generate") or not model.can_generate():
        raise ValueError(f"model: {found.name} ({type(model).__name__}) cannot generate; {way}")
    ids = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"model: {found.name} ({type(model).__name__}) cannot generate: {error}; {way}") from error


def takes(model: PreTrainedModel, option: str) -> bool:
    """Whether `forward` knows an option."""
    return option in inspect.signature(model.forward).parameters


def versions() -> dict[str, str]:
    """Of Python and the packages that scores depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def own_task(folder: Path) -> dict[str, Any] | None:
    """The synthetic task that the model was trained on, from its `task.json`: `task`, `length`, `options`.

    Raises:
        ValueError: The file does not say that.
    """
    path = folder / "task.json"
    if not path.is_file():
        return None
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(task["task"], str) and isinstance(task["length"], int) and isinstance(task["options"], dict)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"task: {path} must hold task, length and options: {error}") from error
    if not good:
        raise ValueError(f"task: {path} must hold task (a name), length (a number) and options (an object)")
    return task
