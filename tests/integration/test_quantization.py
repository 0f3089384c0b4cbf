"""nf4 and int8 loading on a CPU, with what makes step sizes, decays and scores left in full precision."""

import importlib.util
import json

import pytest
import torch
from stacks import greedy, prompt
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMForSequenceClassification, quantization_skip_modules

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


def config():
    """Sizes that the CPU kernels of bitsandbytes need, and all experts chosen, so that an error flips none."""
    moe = {"name": "moe", "num_experts": 4, "top_k": 4, "intermediate_size": 64, "selection_bias": True}
    moe |= {"num_shared_experts": 1, "shared_gate": True}
    specs = {
        "a": {"mixer": {"name": "mamba", "inner_norms": True}, "channel_mixer": moe},
        "b": {"mixer": {"name": "attention", "num_heads": 4}, "channel_mixer": {"name": "swiglu"}},
        "c": {"mixer": {"name": "mamba2", "state_size": 16, "head_dim": 16}, "channel_mixer": {"name": "mlp"}},
    }
    every_token = {"boundary": "learned", "threshold": 2.0}
    spans = [{"name": "mixture_of_depths", "start": 1, "rule": "predictor", "capacity": 1.0}]
    spans += [{"name": "token_merging", "start": 2, **every_token}]
    shape = {"num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 64, "initializer_range": 0.1}
    return HybridLMConfig(layer_specs=specs, spans=spans, **shape)


LEFT_OUT = {
    "model.layers.0.mixer.x_proj",
    "model.layers.0.mixer.dt_proj",
    "model.layers.0.channel_mixer.shared_expert_gate",
    "model.layers.2.mixer.in_proj",
    *(f"model.spans.0.{name}" for name in ("router", "predictor.0", "predictor.2")),
    *(f"model.spans.1.{name}" for name in ("query_proj", "key_proj")),
    "lm_head",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("quantized")
    HybridLMForCausalLM(config()).save_pretrained(path)
    return path


def test_the_list_names_what_the_config_builds():
    names = quantization_skip_modules(config())
    modules = dict(HybridLMForCausalLM(config()).named_modules())
    left = {name for name in modules if any(name.endswith(wanted) for wanted in names)}
    assert left == LEFT_OUT | {"model.layers.0.channel_mixer.router"}


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_loading_leaves_recurrences_routers_and_the_head_alone(folder, kind):
    wanted = BitsAndBytesConfig(**KINDS[kind])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=torch.float32)
    assert wanted.llm_int8_skip_modules is None  # the caller's object is not changed
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            quantized = type(model.get_submodule(name)) is not type(module)
            assert quantized is (name not in LEFT_OUT), name
    for name, tensor in plain.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if not isinstance(plain.get_submodule(module), nn.Linear) or module in LEFT_OUT:
            assert torch.equal(model.get_submodule(module).state_dict()[leaf], tensor), name
    assert model.model.layers[0].mixer.A_log.dtype == torch.float32
    with torch.no_grad():
        expected = plain(prompt(2)).logits
        error = (model(prompt(2)).logits - expected).norm() / expected.norm()
    assert 0 < error < (0.5 if kind == "nf4" else 0.05)
    assert greedy(model, prompt(2), 4).shape == (2, 13)
    assert model.get_memory_footprint() < plain.get_memory_footprint()


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_is_saved_and_loaded(folder, kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**KINDS[kind]), dtype=torch.float32
    )
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert set(stored) == set(quantization_skip_modules(config()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(prompt(2)).logits, model(prompt(2)).logits)


@needs_bitsandbytes
def test_a_list_of_the_users_and_a_dictionary_are_obeyed(folder):
    own = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "model.layers.1"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=own)
    assert type(model.model.layers[1].mixer.q_proj) is nn.Linear
    assert type(model.model.layers[2].channel_mixer.up_proj) is not nn.Linear
    given = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    model = HybridLMForSequenceClassification.from_pretrained(folder, quantization_config=given, num_labels=2)
    assert type(model.score) is nn.Linear
    assert type(model.model.layers[0].mixer.x_proj) is nn.Linear
    assert type(model.model.layers[0].mixer.in_proj) is not nn.Linear
