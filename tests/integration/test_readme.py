"""The README's Python runs as it stands."""

import re
from pathlib import Path

import torch

from hybridlm import HybridLMForCausalLM, presets
from hybridlm.data import build_byte_tokenizer

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr(HybridLMForCausalLM, "push_to_hub", lambda model, name: pushed.append(name))
    folder = re.search(r'from_pretrained\("(\S+)"', BLOCKS[0]).group(1)
    HybridLMForCausalLM(presets.load_config("tiny_jamba")).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    tokens = torch.arange(16)
    names = {"dataset": [{"input_ids": tokens, "labels": tokens}] * 2}
    for block in BLOCKS:
        exec(block, names)
    assert capsys.readouterr().out.startswith("def main")
    assert pushed == ["me/my-hybrid"]
