"""What cannot be read or written is refused by name, and leaves nothing behind."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JambaConfig, LlamaConfig, LlamaForSequenceClassification
from twins import TRANSFORMER, TWINS, Twin

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.hub import export_native, import_native, native_tensors


@pytest.fixture
def folder(tmp_path):
    """A sharded native Llama."""
    TWINS["llama"].build().save_pretrained(tmp_path / "native", max_shard_size="20KB")
    return tmp_path / "native"


def shard(folder, number=1):
    return sorted(folder.glob("*.safetensors"))[number]


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_refused(folder, tmp_path, error, match):
    with pytest.raises(error, match=match):
        import_native(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_native(tmp_path / "nowhere", tmp_path / "out")


def test_no_config(folder, tmp_path):
    (folder / "config.json").unlink()
    assert_refused(folder, tmp_path, FileNotFoundError, "config.json")


def test_corrupt_config(folder, tmp_path):
    (folder / "config.json").write_text('{"model_type": "llama", ')
    assert_refused(folder, tmp_path, ValueError, "config.json: not JSON")


def test_config_that_is_no_object(folder, tmp_path):
    (folder / "config.json").write_text("[1]")
    assert_refused(folder, tmp_path, ValueError, "config.json: holds list")


def test_config_with_a_value_of_the_wrong_type(folder, tmp_path):
    edit(folder, hidden_size="wide")
    assert_refused(folder, tmp_path, ValueError, r"config.json: not a llama config .*hidden_size")


def test_unknown_family(folder, tmp_path):
    edit(folder, model_type="gpt2")
    assert_refused(folder, tmp_path, ValueError, r"config.json: model_type is 'gpt2', expected one of \['bamba'")


def test_another_head(tmp_path):
    LlamaForSequenceClassification(LlamaConfig(**TRANSFORMER)).save_pretrained(tmp_path / "native")
    assert_refused(tmp_path / "native", tmp_path, ValueError, "LlamaForSequenceClassification.*LlamaForCausalLM")


def test_quantized_weights(folder, tmp_path):
    edit(folder, quantization_config={"quant_method": "fp8"})
    assert_refused(folder, tmp_path, ValueError, "quantization_config")


def test_no_weights(folder, tmp_path):
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    assert_refused(folder, tmp_path, FileNotFoundError, "no weights, expected model.safetensors")


def test_missing_shard(folder, tmp_path):
    name = shard(folder).name
    shard(folder).unlink()
    assert_refused(folder, tmp_path, FileNotFoundError, name)


@pytest.mark.parametrize("kept", [0, 5, 200, -3])
def test_truncated_shard(folder, tmp_path, kept):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(folder, tmp_path, ValueError, f"{path.name}: truncated or corrupt")


def test_corrupt_index(folder, tmp_path):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert_refused(folder, tmp_path, ValueError, "index.json: no weight_map")


def test_index_that_points_out_of_the_folder(folder, tmp_path):
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(shard(folder).name, "../secret.safetensors"))
    assert_refused(folder, tmp_path, ValueError, "index.json.*not a file name")


def test_index_that_contradicts_a_shard(folder, tmp_path):
    path = shard(folder)
    held = load_file(path)
    name = sorted(held)[0]
    del held[name]
    save_file(held, path)
    assert_refused(folder, tmp_path, ValueError, f"{path.name}: does not hold {name}")


def rewrite(folder, change):
    """Rewrite the weights of a folder as one file."""
    held = {}
    for path in folder.glob("*.safetensors"):
        held |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(held)
    save_file(held, folder / "model.safetensors")


def test_missing_tensor(folder, tmp_path):
    rewrite(folder, lambda held: held.pop("model.layers.1.mlp.up_proj.weight"))
    assert_refused(folder, tmp_path, ValueError, "tensor model.layers.1.mlp.up_proj.weight is missing")


def test_surplus_tensor(folder, tmp_path):
    rewrite(folder, lambda held: held.update({"model.layers.0.surprise": torch.ones(1)}))
    assert_refused(folder, tmp_path, ValueError, "model.safetensors: tensor model.layers.0.surprise is unknown")


def test_misshapen_tensor(folder, tmp_path):
    rewrite(folder, lambda held: held.update({"model.norm.weight": torch.ones(7)}))
    assert_refused(folder, tmp_path, ValueError, r"model.norm.weight has shape \[7\], config.json asks for \[32\]")


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path):
    folder = tmp_path / "native"
    TWINS["llama-bias-tied"].build().save_pretrained(folder, max_shard_size="20KB")
    rewrite(folder, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    import_native(folder, tmp_path / "equal")
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"][0, 0] += 1
    save_file(held, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        import_native(folder, tmp_path / "different")


@pytest.mark.parametrize(
    ("twin", "changes", "match"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 has no counterpart"),
        ("bamba", {"z_loss_coefficient": 0.1}, "z_loss_coefficient=0.1 has no counterpart"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic'.*'yarn'",
        ),
    ],
)
def test_native_options_without_counterpart(twin, changes, match, tmp_path):
    Twin(TWINS[twin].family, TWINS[twin].options | changes).build().save_pretrained(tmp_path / "native")
    assert_refused(tmp_path / "native", tmp_path, ValueError, match)


def test_a_full_folder_is_not_overwritten(folder, tmp_path):
    (tmp_path / "out").mkdir()
    import_native(folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    with pytest.raises(FileExistsError, match="out: exists"):
        import_native(folder, tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}


def test_a_disk_that_runs_full_leaves_nothing(folder, tmp_path, monkeypatch):
    calls = []

    def full(*arguments):
        if calls:
            raise OSError(28, "No space left on device")
        calls.append(native_tensors_save(*arguments))

    native_tensors_save = native_tensors.save_file
    monkeypatch.setattr(native_tensors, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        import_native(folder, tmp_path / "out", max_shard_bytes=20_000)
    assert calls
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_no_more_than_one_shard_is_in_memory(tmp_path, monkeypatch):
    TWINS["mixtral"].build().save_pretrained(tmp_path / "native")
    alive: dict[int, int] = {}
    peak = []
    read = native_tensors.Checkpoint.read

    def watched(self, *arguments):
        tensor = read(self, *arguments)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        peak.append(sum(alive.values()))
        return tensor

    monkeypatch.setattr(native_tensors.Checkpoint, "read", watched)
    total = (tmp_path / "native" / "model.safetensors").stat().st_size
    import_native(tmp_path / "native", tmp_path / "ours", max_shard_bytes=30_000)
    assert max(peak) < 50_000 < total / 3
    peak.clear()
    export_native(tmp_path / "ours", tmp_path / "back", max_shard_bytes=30_000)
    assert max(peak) < 50_000


# --- export -----------------------------------------------------------------------------------------------------------


def hybrid(tmp_path, twin="llama", **changes):
    """An imported twin with other options in its attention, or on top."""
    TWINS[twin].build().save_pretrained(tmp_path / "native")
    import_native(tmp_path / "native", tmp_path / "ours")
    config = HybridLMConfig.from_pretrained(tmp_path / "ours")
    for key, value in changes.items():
        part, _, option = key.rpartition("__")
        if not part:
            setattr(config, key, value)
        for recipe in config.layer_specs.values():
            if part in recipe:
                recipe[part] = {**recipe[part], option: value}
    HybridLMForCausalLM(config).save_pretrained(tmp_path / "changed")
    return tmp_path / "changed"


@pytest.mark.parametrize(
    ("changes", "paths"),
    [
        ({"mixer__conv_kernel": 4}, ["layer_specs.attention_swiglu.mixer.conv_kernel is 4, llama has None"]),
        ({"mixer__qk_norm": True}, ["layer_specs.attention_swiglu.mixer.qk_norm is True, llama has False"]),
        ({"embedding_multiplier": 2.0}, ["embedding_multiplier is 2.0, llama has 1.0"]),
        (
            {"mixer__output_gate": True, "norm": {"name": "rms", "placement": "sandwich"}},
            ["layer_specs.attention_swiglu.mixer.output_gate is True", "norm.placement is 'sandwich', llama has 'pre'"],
        ),
        ({"residual": {"name": "add", "multiplier": 0.5}}, ["residual.multiplier is 0.5, llama has 1.0"]),
        ({"mixer__qkv_bias": True}, ["layer_specs.attention_swiglu.mixer.out_bias is False, llama has True"]),
    ],
)
def test_export_names_every_option_that_no_family_has(changes, paths, tmp_path):
    source = hybrid(tmp_path, **changes)
    with pytest.raises(ValueError, match="config does not equal llama: ") as error:
        export_native(source, tmp_path / "back", family="llama")
    for path in paths:
        assert path in str(error.value)
    assert str(error.value).count(" has ") == len(paths)
    assert not (tmp_path / "back").exists()


def test_export_names_the_layers_that_break_a_period(tmp_path):
    layers = ["m", "m", "a", "a", "m", "m"]
    specs = {
        "m": {"mixer": {"name": "mamba", "inner_norms": True}, "channel_mixer": {"name": "swiglu"}},
        "a": {"mixer": {"name": "attention", "num_heads": 4}, "channel_mixer": {"name": "swiglu"}},
    }
    config = HybridLMConfig(hidden_size=32, num_hidden_layers=6, layer_specs=specs, layer_layout=layers)
    HybridLMForCausalLM(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"the nearest is jamba: layer_layout\.3 \('a'\).mixer is 'attention'"):
        export_native(tmp_path / "ours", tmp_path / "back")


def test_a_hybrid_of_our_own_becomes_jamba(tmp_path):
    layers = ["m", "m", "a", "e", "m", "m", "a", "e"]
    mamba = {"name": "mamba", "inner_norms": True, "state_size": 4}
    experts = {"name": "moe", "num_experts": 3, "top_k": 1, "renormalize": False, "intermediate_size": 40}
    swiglu = {"name": "swiglu", "intermediate_size": 40}
    specs = {
        "m": {"mixer": mamba, "channel_mixer": swiglu},
        "a": {"mixer": {"name": "attention", "num_heads": 4}, "channel_mixer": swiglu},
        "e": {"mixer": mamba, "channel_mixer": experts},
    }
    config = HybridLMConfig(hidden_size=32, num_hidden_layers=8, layer_specs=specs, layer_layout=layers)
    HybridLMForCausalLM(config).save_pretrained(tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "back")
    back = JambaConfig.from_pretrained(tmp_path / "back")
    assert (back.attn_layer_period, back.attn_layer_offset) == (4, 2)
    assert (back.expert_layer_period, back.expert_layer_offset) == (4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "switch"}, "channel_mixer.routing is 'switch', mixtral has 'top_k'"),
        ({"routing": "gshard"}, "channel_mixer.routing is 'gshard', mixtral has 'top_k'"),
        ({"routing": "hash"}, "channel_mixer.routing is 'hash', mixtral has 'top_k'"),
        ({"num_zero_experts": 1}, "channel_mixer.num_zero_experts is 1, mixtral has 0"),
        ({"num_copy_experts": 2}, "channel_mixer.num_copy_experts is 2, mixtral has 0"),
    ],
)
def test_export_refuses_experts_that_mixtral_has_not(tmp_path, options, message):
    experts = {"name": "moe", "num_experts": 4, "intermediate_size": 40, "loss_scope": "batch"} | options
    attention = {"name": "attention", "num_heads": 4, "position": {"name": "rope"}}
    specs = {"a": {"mixer": attention, "channel_mixer": experts}}
    config = HybridLMConfig(hidden_size=32, num_hidden_layers=2, layer_specs=specs)
    HybridLMForCausalLM(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export_native(tmp_path / "ours", tmp_path / "back", family="mixtral")


def test_what_matters_in_training_alone_is_left_out_of_an_export(tmp_path):
    experts = {"name": "moe", "num_experts": 4, "intermediate_size": 40, "jitter": 0.1, "hash_seed": 3}
    attention = {"name": "attention", "num_heads": 4, "position": {"name": "rope"}}
    specs = {"a": {"mixer": attention, "channel_mixer": experts | {"second_expert": "always"}}}
    config = HybridLMConfig(hidden_size=32, num_hidden_layers=2, layer_specs=specs)
    HybridLMForCausalLM(config).save_pretrained(tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "back", family="mixtral")


def test_export_refuses_what_is_not_ours(folder, tmp_path):
    with pytest.raises(ValueError, match="model_type is 'llama', expected 'hybridlm'"):
        export_native(folder, tmp_path / "back")


def test_export_refuses_an_unknown_family(folder, tmp_path):
    import_native(folder, tmp_path / "ours")
    with pytest.raises(ValueError, match="family: unknown 'gpt2'"):
        export_native(tmp_path / "ours", tmp_path / "back", family="gpt2")


def test_export_names_a_missing_tensor(tmp_path):
    source = hybrid(tmp_path)
    held = load_file(source / "model.safetensors")
    del held["model.norm.weight"]
    save_file(held, source / "model.safetensors")
    with pytest.raises(ValueError, match="tensor model.norm.weight is missing"):
        export_native(source, tmp_path / "back")
