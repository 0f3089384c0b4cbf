"""Low-rank adapters through peft on every kind of mixer."""

import importlib.util
import math

import pytest
import torch
from stacks import STACKS, build, config_of, greedy, prompt
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hybridlm import lora_targets

peft = pytest.importorskip("peft", reason="peft is not installed")

EXPECTED = {
    "mamba": {"in_proj", "out_proj", "x_proj", "dt_proj", "gate_proj", "up_proj", "down_proj"},
    "mamba2": {"in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}
EXPECTED["window"] = EXPECTED["attention"]
EXPECTED["hybrid"] = EXPECTED["mamba"] | EXPECTED["attention"]


def adapted(stack, **options):
    torch.manual_seed(0)
    model = build(stack, torch.float32)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **lora_targets(model.config), **options))


@pytest.mark.parametrize("stack", STACKS)
def test_targets_cover_every_projection_and_nothing_else(stack):
    config = config_of(stack)
    stored = config.to_dict()
    targets = lora_targets(config)
    assert config.to_dict() == stored
    assert set(targets["target_modules"]) == EXPECTED[stack]
    assert ("target_parameters" in targets) is (stack == "hybrid")
    assert "target_parameters" not in lora_targets(config, experts=False)
    model = adapted(stack)
    plain = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and "lora" not in name and "base_layer" not in name
    ]
    assert {name.rpartition(".")[2] for name in plain} == {"lm_head"}


@pytest.mark.parametrize("stack", STACKS)
def test_adapters_start_as_nothing_train_save_load_and_merge(stack, tmp_path):
    ids = prompt(4, 12)
    base = build(stack, torch.float32)
    model = adapted(stack)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.eval()
    with torch.no_grad():
        trained = model(ids).logits
    text = greedy(model, ids[:1, :4], 6)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(stack, torch.float32), tmp_path).eval()
    merged = again.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(greedy(merged, ids[:1, :4], 6), text)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)


def test_adapters_work_with_gradient_checkpointing():
    ids = prompt(2, 12)
    model = adapted("hybrid").train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_adapters_inside_a_model_are_saved_without_the_code(tmp_path):
    model, ids = build("hybrid", torch.float32), prompt()
    model.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, **lora_targets(model.config, experts=False)))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not list(tmp_path.glob("*.py"))
    again = build("hybrid", torch.float32)
    again.load_adapter(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)


def test_dropout_goes_together_with_modules_only():
    ids = prompt()
    model = build("hybrid", torch.float32)
    config = peft.LoraConfig(r=4, lora_dropout=0.1, **lora_targets(model.config, experts=False))
    assert math.isfinite(peft.get_peft_model(model, config)(input_ids=ids, labels=ids).loss.item())


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_adapters_train_on_a_quantized_model(tmp_path):
    from test_quantization import config

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **lora_targets(model.config, experts=False)))
    ids = prompt(2, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
