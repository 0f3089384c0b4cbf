"""What `save_pretrained` wrote comes back: bits, types, shards, and proper values for what is missing."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from stacks import MIXERS, MOE, STACKS, build, config_of, prompt
from transformers import AutoConfig, AutoModelForCausalLM

from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMForSequenceClassification, HybridLMModel

ISLANDS = ("A_log", "D", "dt_bias", "selection_bias")


def logits_of(model):
    ids = prompt(2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def everything():
    """A config in which every kind of tensor occurs."""
    rope = {"name": "rope", "partial_rotary_factor": 0.5}
    attention = {"name": "attention", "num_heads": 4, "num_kv_heads": 2, "position": rope, "qk_norm": True}
    attention |= {"learned_sinks": True, "output_gate": True, "qkv_bias": True, "out_bias": True}
    moe = MOE | {"shared_gate": True, "num_experts": 16, "intermediate_size": 32}
    specs = {
        "a": {"mixer": {"name": "mamba", "state_size": 8, "inner_norms": True, "bias": True}, "channel_mixer": moe},
        "b": {"mixer": attention, "channel_mixer": {"name": "mlp", "bias": True}, "norm": {"name": "layer"}},
        "c": {"mixer": {"name": "mamba2", "state_size": 8, "head_dim": 2}, "channel_mixer": {"name": "swiglu"}},
    }
    return HybridLMConfig(
        vocab_size=300, hidden_size=64, layer_specs=specs, layer_layout=list(specs), num_hidden_layers=3,
        norm={"name": "rms", "offset": True, "placement": "sandwich"}, residual={"name": "add", "layer_scale": 0.5},
        initializer_range=0.05,
    )  # fmt: skip


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_loaded_model_has_the_same_bits(stack, tied, tmp_path):
    model = build(stack, torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    with torch.no_grad():
        for length in (1, 2, 5, 40, 120):  # experts have a path for few tokens and one for many
            ids = prompt(2, length)
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.config.to_diff_dict() | {"_name_or_path": ""} == model.config.to_diff_dict() | {"_name_or_path": ""}


def test_shards_hold_the_same_model(tmp_path):
    model = build("hybrid", torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_the_stack_alone_and_another_head_load_from_a_language_model(tmp_path):
    model = build("hybrid", torch.float32)
    model.save_pretrained(tmp_path)
    stack, info = HybridLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        expected = model.model(prompt()).last_hidden_state
        assert torch.equal(stack(prompt()).last_hidden_state, expected)
    head, info = HybridLMForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}
    assert head.score.weight.shape == (3, 32)
    assert 0.1 < head.score.weight.std() < 0.6  # initializer_range=0.3
    stack.save_pretrained(tmp_path / "stack")
    again, info = HybridLMForCausalLM.from_pretrained(tmp_path / "stack", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert torch.equal(again.model.layers[0].mixer.A_log, model.model.layers[0].mixer.A_log)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_smaller_type_keeps_the_islands_in_float32(dtype, tmp_path):
    model = build("hybrid", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in loaded.state_dict().items():
        island = name.rpartition(".")[2] in ISLANDS
        assert tensor.dtype == (torch.float32 if island else dtype), name
        if island:
            assert torch.equal(tensor, model.state_dict()[name])
    rope = {name: buffer for name, buffer in loaded.named_buffers() if name.endswith("inv_freq")}
    assert len(rope) == 2
    for name, buffer in rope.items():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert torch.equal(logits_of(loaded), logits_of(model.to(dtype)))
    assert logits_of(loaded).dtype == dtype


def test_float64_and_auto_are_obeyed(tmp_path):
    model = build("hybrid", torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert {loaded.dtype, AutoModelForCausalLM.from_pretrained(tmp_path).dtype} == {torch.bfloat16}
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float64}
    torch.testing.assert_close(logits_of(wide), logits_of(model.double()))


def test_every_missing_tensor_gets_its_initial_value(tmp_path):
    torch.manual_seed(0)
    config = everything()
    model = HybridLMForCausalLM(config)
    model.save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.full((64,), 3.0)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        for parameter in model.parameters():  # memory that is freed and reused should not look initialised
            parameter.fill_(1e20)
    fresh = HybridLMForCausalLM(config).state_dict()
    del model
    loaded, info = HybridLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] >= {name for name in fresh if name != "model.norm.weight"}
    for name, tensor in loaded.state_dict().items():
        if name == "model.norm.weight":
            assert (tensor == 3.0).all()
        else:
            assert_same_distribution(name, tensor, fresh[name])
    exponent = torch.arange(0, 8, 2) / 8
    torch.testing.assert_close(loaded.model.layers[1].mixer.position.inv_freq, 10000.0**-exponent)
    mamba, mamba2 = loaded.model.layers[0].mixer, loaded.model.layers[2].mixer
    torch.testing.assert_close(mamba.A_log, torch.arange(1, 9).log().expand(128, 8))
    assert mamba2.A_log.exp().min() >= 1
    assert mamba2.A_log.exp().max() <= 16
    for mixer in (mamba, mamba2):
        steps = torch.nn.functional.softplus(mixer.dt_bias)
        assert 1e-3 - 1e-6 <= steps.min() < 3e-3
        assert 0.03 < steps.max() <= 0.1 + 1e-6
    assert torch.isfinite(logits_of(loaded)).all()


def assert_same_distribution(name, tensor, fresh):
    """Constants are equal, random values have the same mean and spread."""
    assert tensor.dtype == fresh.dtype, name
    if fresh.std() == 0 or fresh.numel() == 1:
        assert torch.equal(tensor, fresh) or fresh.numel() == 1, name
        return
    assert not torch.equal(tensor, fresh) or "A_log" in name, name
    error = 6 / math.sqrt(tensor.numel())
    assert abs(tensor.std() / fresh.std() - 1) < max(error, 0.02), name
    assert abs(tensor.mean() - fresh.mean()) < error * fresh.std() + 1e-6, name


@pytest.mark.parametrize("leaf", ["dt_bias", "A_log", "D", "selection_bias", "conv1d.bias", "router.weight"])
def test_one_missing_tensor_leaves_its_neighbours_alone(leaf, tmp_path):
    model = build("hybrid", torch.float32)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("selection_bias"):
                buffer.normal_()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    missing = next(name for name in tensors if name.endswith(leaf))
    gone = tensors.pop(missing)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {missing}
    for name, tensor in loaded.state_dict().items():
        if name == missing:
            assert tensor.shape == gone.shape
            assert tensor.abs().max() < 20
        else:
            assert torch.equal(tensor, tensors[name]), name


def test_unexpected_keys_and_wrong_shapes_are_reported(tmp_path, log):
    model = build("mamba", torch.float32)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mixer.surplus"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"model.layers.0.mixer.surplus"}
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "model.norm.weight" in log.text


@pytest.fixture
def sharded(tmp_path):
    build("hybrid", torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def shard_in(folder):
    return sorted(folder.glob("model-*.safetensors"))[2]


def test_a_missing_shard_is_named(sharded):
    shard = shard_in(sharded)
    shard.unlink()
    with pytest.raises(OSError, match=rf"{shard.name}.*missing"):
        AutoModelForCausalLM.from_pretrained(sharded)


@pytest.mark.parametrize("size", [0, 5, 100, -1], ids=["empty", "no-header", "half-header", "short-data"])
def test_a_truncated_shard_is_named(sharded, size):
    shard = shard_in(sharded)
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(OSError, match=rf"{shard.name}.*truncated"):
        AutoModelForCausalLM.from_pretrained(sharded)


def test_a_truncated_single_file_is_named(tmp_path):
    build("mamba", torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"model\.safetensors.*truncated"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_shard_that_is_no_safetensors_file_is_named(sharded):
    shard = shard_in(sharded)
    shard.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(OSError, match=rf"{shard.name}.*not a safetensors file"):
        AutoModelForCausalLM.from_pretrained(sharded)


def test_a_corrupt_index_is_named(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(OSError, match=r"model\.safetensors\.index\.json"):
        AutoModelForCausalLM.from_pretrained(sharded)
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(OSError, match=r"model\.safetensors\.index\.json.*weight_map"):
        AutoModelForCausalLM.from_pretrained(sharded)


def test_a_folder_without_weights_is_named(tmp_path):
    config_of("mamba").save_pretrained(tmp_path)
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json"),
        ('{"model_type": "hybridlm", "hidden_sise": 3}', "hidden_sise: unknown key"),
        ('{"model_type": "hybridlm", "hidden_size": "64"}', "hidden_size"),
        ('{"model_type": "hybridlm", "schema_version": 99}', "schema_version: 99 is newer"),
        ('{"model_type": "hybridlm", "num_hidden_layers": 3, "layer_layout": ["ssm"]}', "layer_layout"),
    ],
    ids=["no-json", "unknown-key", "wrong-type", "newer-schema", "wrong-layout"],
)
def test_a_corrupt_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Exception, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_a_wrong_part_in_a_loaded_config_is_named(tmp_path):
    model = build("mamba", torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_specs"]["layer_0"]["mixer"]["state_siz"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layer_specs\.layer_0\.mixer: unknown option 'state_siz'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_written_by_the_model_stores_every_option(tmp_path):
    specs = {"a": {"mixer": {"name": "mamba"}, "channel_mixer": {"name": "moe"}}}
    HybridLMForCausalLM(HybridLMConfig(layer_specs=specs, hidden_size=32, num_hidden_layers=1)).save_pretrained(
        tmp_path
    )
    stored = json.loads((tmp_path / "config.json").read_text())["layer_specs"]["a"]
    assert stored["mixer"]["dt_rank"] == 2
    assert stored["mixer"]["conv_kernel"] == 4
    assert stored["channel_mixer"]["renormalize"] is True
    assert MIXERS["mamba"].keys() <= stored["mixer"].keys()


def test_a_parameter_that_changes_on_loading_is_no_part_of_the_class(tmp_path):
    model = build("hybrid", torch.float32, HybridLMForCausalLM)
    model.save_pretrained(tmp_path)
    for _ in range(2):
        loaded = HybridLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert HybridLMForCausalLM(config_of("mamba")).dtype == torch.float32


@pytest.mark.parametrize("stack", STACKS)
def test_a_loaded_model_decodes_with_the_same_bits(stack, tmp_path):
    model = build(stack, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    caches = model.new_cache(), loaded.new_cache()
    with torch.no_grad():
        for part in prompt(1, 12).split([5, 1, 1, 4, 1], dim=1):
            here, there = (
                m(part, past_key_values=cache).logits for m, cache in zip((model, loaded), caches, strict=True)
            )
            assert torch.equal(here, there)
