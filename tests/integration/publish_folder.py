"""A small model folder as it is before it is published, and what changes it."""

import json

import torch
from safetensors.torch import load_file, save_file

from hybridlm import HybridLMForCausalLM, presets
from hybridlm.data import build_byte_tokenizer
from hybridlm.evaluation.loading import file_hash
from hybridlm.hub.cards import LEDGER, dump

TOKEN = "hf_" + "Ab1" * 11


def build(name, folder):
    torch.manual_seed(0)
    HybridLMForCausalLM(presets.load_config(name)).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)


def edit(path, old, new, count=1):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def rewrite(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_bytes(dump(data))


def rehash(folder, name):
    """Make the list of figures believe a file that was changed."""
    digest = file_hash(folder / name)
    rewrite(folder / LEDGER, lambda ledger: [f.update(sha=digest) for f in ledger["files"] if f["path"] == name])


def change_weight(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][3] += 0.05
    save_file(weights, path, metadata={"format": "pt"})
