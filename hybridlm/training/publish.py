"""Make a folder that can be pushed to the Hub, and prove that it loads on its own."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridlm.hub.cards import RUN_FILE, TRAINING, check_name, dump
from hybridlm.hub.facts import GENERIC, load_facts
from hybridlm.hub.folder import prepare

from . import reload_check
from .run_file import RunFile

NOT_ON_CARDS = ("folder", "heldout_by_rule")  # a place on this machine; a leak beside the causal figure


def check_publish(run_file: RunFile) -> None:
    """Refuse, before anything is trained, what a card cannot be written with.

    Raises:
        ValueError: The name is none of a model on the Hub, or there are no such facts.
    """
    check_name(run_file.publish.name, "publish.name")
    if run_file.publish.facts is not None:
        try:
            load_facts(run_file.publish.facts)
        except (OSError, ValueError) as error:
            raise ValueError(f"publish.facts: {error}") from error


def save_hub_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, code, tokenizer and generation settings.

    The generation settings sample mildly, because a small model that always takes the likeliest token repeats itself.
    """
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config.update(**settings, **{name: value for name, value in tokens.items() if value is not None})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_reload(
    folder: Path, model: PreTrainedModel, input_ids: torch.Tensor, prompt: str | None, max_new_tokens: int
) -> dict[str, Any]:
    """Load `folder` in a new process without `hybridlm` and without a network, and compare logits with `model`'s.

    Args:
        folder: The saved model.
        model: The model that was saved; moved to the CPU and put in evaluation mode.
        input_ids: `[B, T]`, what the logits are compared on.
        prompt: Text to continue, or `None`.
        max_new_tokens: Length of the continuation.

    Returns:
        `logits_equal` (bit for bit), `max_difference`, `class`, and `continuation` when there is a prompt.

    Raises:
        RuntimeError: The new process failed; with the end of what it said.
    """
    model = model.to("cpu").eval()
    with torch.inference_mode():
        logits = model(input_ids=input_ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as work:
        probe = {"input_ids": input_ids.tolist(), "prompt": prompt, "max_new_tokens": max_new_tokens}
        probe["num_threads"] = torch.get_num_threads()  # another number sums in another order
        Path(work, "probe.json").write_text(json.dumps(probe))
        save_file({"logits": logits.contiguous()}, Path(work, "expected.safetensors"))
        environment = os.environ | {"HF_HOME": work, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", reload_check.__file__, str(folder.resolve()), work]
        child = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        if child.returncode:
            raise RuntimeError(f"{folder} does not load in a process without hybridlm:\n{child.stderr[-2000:]}")
        return json.loads(Path(work, "result.json").read_text())


def finish_folder(run_file: RunFile, model: PreTrainedModel, results: dict[str, Any]) -> None:
    """Put the training record and the run file into the published folder, and its card and golden logits if wanted.

    Args:
        run_file: Of the run.
        model: The model that was saved; moved to the CPU and put in evaluation mode.
        results: All that was measured.
    """
    folder = Path(results["folder"])
    record = {key: value for key, value in results.items() if key not in NOT_ON_CARDS}
    for path, data in ((TRAINING, dump(record)), (RUN_FILE, yaml.safe_dump(portable(run_file)).encode())):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    if run_file.publish.card:
        model = model.to("cpu").eval()
        wide = all(parameter.dtype == torch.float32 for parameter in model.parameters())
        prepare(folder, facts=_facts_of(run_file), name=run_file.publish.name, model=model if wide else None)


def _facts_of(run_file: RunFile) -> str | None:
    """Name of the facts; `None` for those of the preset that the config equals."""
    if run_file.publish.facts is not None:
        return run_file.publish.facts
    return GENERIC if run_file.model.pretrained is not None else None


def portable(run_file: RunFile) -> dict[str, Any]:
    """A run file without the places of this machine: files and folders are named, and not where they lie."""
    content = asdict(run_file)
    content["output_dir"] = f"outputs/{run_file.publish.name}"
    for section, key in (("data", "path"), ("model", "config"), ("model", "pretrained"), (None, "tokenizer")):
        place = content if section is None else content[section]
        place[key] = nameable(place[key]) if isinstance(place[key], str) else place[key]
    return content


def nameable(source: str) -> str:
    """The name of a local file or folder; anything else as it is."""
    return Path(source).name if Path(source).exists() else source
