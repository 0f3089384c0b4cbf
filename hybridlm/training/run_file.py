"""A run file: one YAML file that says what is trained on what, checked before anything starts."""

import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from hybridlm.presets import find_run
from hybridlm.typed import build, convert, read_yaml, suggestion, type_names

# what a run uses unless its file says otherwise
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "logging_first_step": True,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "none",
}
# set by the run itself
TRAINING_TAKEN = {"output_dir", "remove_unused_columns"}


@dataclass
class ModelOptions:
    """What is trained: exactly one of `config` and `pretrained`.

    Args:
        config: A config written out, the name of a preset, or the path of a `config.json`. The model starts random.
        pretrained: A folder or Hub name; the model starts from its weights.
        trust_remote_code: Whether code that comes with `pretrained` may run.
    """

    config: dict | str | None = None
    pretrained: str | None = None
    trust_remote_code: bool = False


@dataclass
class DataOptions:
    """What it is trained on.

    Args:
        path: `stdlib`, a file, a folder, or a Hub name; see `hybridlm.data.load_documents`.
        length: Tokens in a row.
        name: Configuration of a Hub data set.
        split: Split of a Hub data set.
        text_column: Column that holds the text.
        streaming: Read documents while training.
        shuffle_buffer: Documents a stream shuffles among; 0 keeps its order.
        heldout_modulus: One document in this many is held out; 0 holds none out.
    """

    path: str
    length: int = 1024
    name: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    shuffle_buffer: int = 0
    heldout_modulus: int = 20


@dataclass
class EvaluationOptions:
    """What is measured on held-out documents when training ends.

    Args:
        lengths: Window lengths in tokens; by default 1, 2 and 4 times `data.length`. Empty: nothing is measured.
        max_bytes: Stop taking documents when this much text is reached.
        batch_tokens: Tokens in one forward pass.
        ngram_orders: Byte n-gram models to fit on the bytes that training saw and to measure beside the model.
        below_ngram_order: The run fails unless the model beats this order at the first length.
        leaky_top_k: Measure mixture-of-depths spans at the first length by the top k too, beside their causal rule. It
            sees later tokens, and is labelled a leak.
    """

    lengths: list[int] | None = None
    max_bytes: int | None = None
    batch_tokens: int = 8192
    ngram_orders: list[int] = field(default_factory=list)
    below_ngram_order: int | None = None
    leaky_top_k: bool = False


@dataclass
class PublishOptions:
    """What is made of the trained model, in the folder `model` of the run.

    Args:
        name: The model's name on its card.
        card: Whether a model card is written.
        check_reload: Load the folder in a new process without `hybridlm`, and fail unless the logits are equal.
        prompt: Text that the reloaded model continues.
        max_new_tokens: Length of the continuation.
        facts: Name of a zoo model, or a YAML file, whose words the card takes; by default those of the preset that the
            config equals.
    """

    name: str = "hybridlm-model"
    card: bool = True
    check_reload: bool = False
    prompt: str | None = None
    max_new_tokens: int = 200
    facts: str | None = None


@dataclass
class RunFile:
    """A whole run. `training` takes every field of `transformers.TrainingArguments` but `output_dir`."""

    output_dir: str
    model: ModelOptions
    data: DataOptions
    tokenizer: str = "byte"
    training: dict = field(default_factory=dict)
    decay_embeddings: bool = False
    overwrite: bool = False
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    publish: PublishOptions = field(default_factory=PublishOptions)


def load_run_file(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> RunFile:
    """Read and check a run file.

    Args:
        source: A path, the name of a run file that comes with the package, or its content.
        overrides: Settings that replace the file's, such as `training.max_steps=5`; the value is YAML. Of a model that
            is named (`model.config: jamba`) the name can be replaced, and not a field.

    Raises:
        FileNotFoundError: There is no such run file.
        ValueError: With the path of what is unknown, missing or of the wrong type.
    """
    content = dict(source) if isinstance(source, dict) else read_yaml(find_run(source))
    for override in overrides or []:
        _override(content, override)
    run_file = build(RunFile, content, "")
    if (run_file.model.config is None) == (run_file.model.pretrained is None):
        raise ValueError("model: give exactly one of `config` and `pretrained`")
    training_arguments(run_file)  # only for its errors
    return run_file


def training_arguments(run_file: RunFile) -> TrainingArguments:
    """Build the arguments of the Trainer: the defaults above, then the file's `training`.

    bfloat16 is used where the device has it, unless `training.bf16` or `training.fp16` is given.
    """
    given = dict(run_file.training)
    known = {item.name for item in fields(TrainingArguments) if item.init} - TRAINING_TAKEN
    hints = typing.get_type_hints(TrainingArguments)
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"training.{name}: unknown key{suggestion(name, known)}")
        given[name] = _convert_loosely(hints[name], value, f"training.{name}")
    if run_file.data.streaming and given.get("max_steps", -1) <= 0:
        raise ValueError("training.max_steps: must be given when data.streaming is true, a stream has no length")
    if run_file.data.streaming and given.get("dataloader_num_workers", 0):
        raise ValueError("training.dataloader_num_workers: must be 0 when data.streaming is true")
    settings = TRAINING_DEFAULTS | given
    cuda = torch.cuda.is_available()
    if "bf16" not in given and not given.get("fp16"):
        settings["bf16"] = cuda and torch.cuda.is_bf16_supported()
    settings.setdefault("dataloader_pin_memory", cuda)
    if "lr_scheduler_type" in given and "lr_scheduler_kwargs" not in given:
        del settings["lr_scheduler_kwargs"]
    try:
        return TrainingArguments(output_dir=run_file.output_dir, remove_unused_columns=False, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from error


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r}: expected path=value, such as training.max_steps=5")
    *parents, last = path.split(".")
    for depth, parent in enumerate(parents):
        inner, place = content.get(parent) or {}, ".".join(parents[: depth + 1])
        if not isinstance(inner, dict):
            raise ValueError(f"{path}: {place} is {inner!r}, which has no settings inside{_instead(place, inner)}")
        content[parent] = dict(inner)
        content = content[parent]
    content[last] = yaml.safe_load(value)


def _instead(place: str, value: Any) -> str:
    """What can be done where a preset is named and one of its fields was to be replaced."""
    if place != "model.config" or not isinstance(value, str):
        return ""
    return (
        "; its fields cannot be replaced one by one: copy the preset's config.json, change it there and give "
        "model.config=PATH, or write the config out in the run file"
    )


def _convert_loosely(hint: Any, value: Any, path: str) -> Any:
    """Check the plain types only; `TrainingArguments` turns the others (names into enums, and so on) itself."""
    options = set(typing.get_args(hint) or [hint])
    if float in options and isinstance(value, str):
        try:
            return float(value)  # YAML reads 3e-4, without a dot, as text
        except ValueError:
            raise ValueError(f"{path}: expected float, got {value!r}") from None
    if options <= {int, float, bool, str, types.NoneType}:
        ordered = [option for option in (bool, int, float, str, types.NoneType) if option in options]
        for option in ordered:
            try:
                return convert(option, value, path)
            except ValueError:
                continue
        raise ValueError(f"{path}: expected {type_names(ordered)}, got {value!r}")
    return value
