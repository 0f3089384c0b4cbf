"""Load a model folder in a process that cannot import `hybridlm`, compare its logits and continue a text.

Run as a script by `publish.check_reload`; it must not import anything of `hybridlm` itself.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class BlockHybridlm(importlib.abc.MetaPathFinder):
    """Make every import of `hybridlm` fail, installed or not."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse `hybridlm`, leave the rest to others."""
        if name.partition(".")[0] == "hybridlm":
            raise ModuleNotFoundError(f"{name} is blocked: the folder must load on its own", name=name)


def main(folder: str, work: str) -> None:
    """Read `probe.json` and `expected.safetensors` in `work`, load `folder`, write `result.json`."""
    sys.meta_path.insert(0, BlockHybridlm())
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    probe = json.loads((Path(work) / "probe.json").read_text())
    torch.set_num_threads(probe["num_threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(probe["input_ids"]), use_cache=False).logits
    expected = load_file(Path(work) / "expected.safetensors")["logits"]
    result = {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "logits_equal": torch.equal(logits, expected),
        "max_difference": (logits.double() - expected.double()).abs().max().item(),
    }
    if probe["prompt"]:
        torch.manual_seed(0)
        prompt = tokenizer(probe["prompt"], return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=probe["max_new_tokens"])
        result["continuation"] = tokenizer.decode(tokens[0], skip_special_tokens=True)
    (Path(work) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
