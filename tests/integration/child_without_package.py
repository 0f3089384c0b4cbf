"""Run by test_remote_code.py: load every model folder in a process where hybridlm cannot be imported.

Usage: python child_without_package.py FOLDER. For each `FOLDER/<auto class>[-suffix]` the outputs are written to
`outputs.pt` inside it, and the model is saved again as `FOLDER/again/<same name>` and loaded from there.
"""

import importlib.abc
import json
import sys
from pathlib import Path

import torch
import transformers


class Blocker(importlib.abc.MetaPathFinder):
    """Refuse one package."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hybridlm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def outputs_of(model, ids):
    """Every tensor of a forward that a user may read, and greedy text."""
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
    found = {name: out[name] for name in ("last_hidden_state", "logits", "start_logits", "end_logits") if name in out}
    if model.can_generate():
        found["text"] = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        found["drafted"] = model.generate(ids[:1], max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3)
    return found


def load(folder):
    """Load by the auto class that the folder is named after."""
    auto = getattr(transformers, folder.name.split("-")[0])
    return auto.from_pretrained(folder, trust_remote_code=True)


def main(root):
    """Do all folders."""
    sys.meta_path.insert(0, Blocker())
    ids = torch.load(root / "ids.pt")
    for folder in sorted(path for path in root.iterdir() if path.name.startswith("AutoModel")):
        model = load(folder)
        found = outputs_of(model, ids)
        again = root / "again" / folder.name
        model.save_pretrained(again)
        second = load(again)
        for name, tensor in outputs_of(second, ids).items():
            assert torch.equal(tensor, found[name]), f"{folder.name}: {name} changed when saved again"
        facts = {"module": type(model).__module__, "dtype": str(model.dtype), "config": type(model.config).__module__}
        (folder / "facts.json").write_text(json.dumps(facts))
        torch.save(found, folder / "outputs.pt")
    assert not [name for name in sys.modules if name.split(".")[0] == "hybridlm"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
