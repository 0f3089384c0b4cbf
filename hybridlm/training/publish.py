"""Make a folder that can be pushed to the Hub, and prove that it loads on its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import reload_check


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
