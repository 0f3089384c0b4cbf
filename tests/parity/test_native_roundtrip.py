"""Import, then export: the same tensors to the byte, and an equal config."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from twins import FAMILIES, TWINS

from hybridlm import HybridLMForCausalLM
from hybridlm.hub import export_native, import_native


def tensors(folder):
    """All tensors of a folder by name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def config_of(folder):
    """The config with defaults filled in, without what names the folder and the writer."""
    config = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


def assert_same_checkpoint(found, expected):
    """Same names, shapes, types, bytes; equal configs."""
    left, right = tensors(found), tensors(expected)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert left[name].shape == tensor.shape, name
        assert torch.equal(left[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert config_of(found) == config_of(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_export_undoes_import(twin, dtype, tmp_path):
    twin.build(dtype).save_pretrained(tmp_path / "native")
    import_native(tmp_path / "native", tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", tmp_path / "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_undoes_import_after_loading_and_saving(family, dtype, tmp_path):
    TWINS[family].build(dtype).save_pretrained(tmp_path / "native")
    import_native(tmp_path / "native", tmp_path / "ours")
    HybridLMForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").save_pretrained(tmp_path / "saved")
    export_native(tmp_path / "saved", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", tmp_path / "native")


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_may_be_cut_anywhere(family, tmp_path):
    TWINS[family].build().save_pretrained(tmp_path / "native", max_shard_size="9KB")
    assert len(list((tmp_path / "native").glob("*.safetensors"))) > 3
    import_native(tmp_path / "native", tmp_path / "ours", max_shard_bytes=25_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    HybridLMForCausalLM.from_pretrained(tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "back", max_shard_bytes=17_000)
    assert_same_checkpoint(tmp_path / "back", tmp_path / "native")
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_single_tensors_keep_their_own_type(tmp_path):
    model = TWINS["mamba2"].build(torch.bfloat16)
    model.backbone.layers[1].mixer.A_log.data = model.backbone.layers[1].mixer.A_log.data.float()
    model.save_pretrained(tmp_path / "native")
    import_native(tmp_path / "native", tmp_path / "ours")
    HybridLMForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").save_pretrained(tmp_path / "saved")
    export_native(tmp_path / "saved", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", tmp_path / "native")


def test_what_was_widened_after_the_import_stays_wide(tmp_path):
    TWINS["mamba2"].build(torch.bfloat16).save_pretrained(tmp_path / "native")
    import_native(tmp_path / "native", tmp_path / "ours")
    HybridLMForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).save_pretrained(tmp_path / "saved")
    export_native(tmp_path / "saved", tmp_path / "back")
    assert {tensor.dtype for tensor in tensors(tmp_path / "back").values()} == {torch.float32}
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == torch.float32


def test_a_config_without_dtype_comes_back_without(tmp_path):
    folder = tmp_path / "native"
    TWINS["mamba2"].build(torch.bfloat16).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["dtype"]
    (folder / "config.json").write_text(json.dumps(raw))
    import_native(folder, tmp_path / "ours")
    HybridLMForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").save_pretrained(tmp_path / "saved")
    export_native(tmp_path / "saved", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_class_loads_an_exported_folder_completely(family, tmp_path):
    native = TWINS[family].build()
    native.save_pretrained(tmp_path / "native")
    import_native(tmp_path / "native", tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "back")
    back, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(back) is type(native)
    for (name, found), (_, expected) in zip(back.named_parameters(), native.named_parameters(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_import_needs_no_record_to_be_exported(family, tmp_path):
    TWINS[family].build().save_pretrained(tmp_path / "native")
    import_native(tmp_path / "native", tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    config = json.loads(path.read_text())
    del config["extra"]["native"]
    path.write_text(json.dumps(config))
    export_native(tmp_path / "ours", tmp_path / "back", family=family)
    assert tensors(tmp_path / "back").keys() == tensors(tmp_path / "native").keys()
    token_ids = torch.arange(9)[None]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("native", "back")]
    expected, found = (model(token_ids, use_cache=False).logits for model in models)
    assert torch.equal(found, expected)


def test_what_a_training_changed_is_exported(tmp_path):
    TWINS["llama"].build().save_pretrained(tmp_path / "native")
    import_native(tmp_path / "native", tmp_path / "ours")
    model = HybridLMForCausalLM.from_pretrained(tmp_path / "ours")
    model.config.max_position_embeddings = 128
    for recipe in model.config.layer_specs.values():
        recipe["mixer"]["position"]["theta"] = 77.0
    model.save_pretrained(tmp_path / "saved")
    export_native(tmp_path / "saved", tmp_path / "back")
    config = AutoConfig.from_pretrained(tmp_path / "back")
    assert config.max_position_embeddings == 128
    assert config.rope_parameters["rope_theta"] == 77.0
    untouched = {"transformers_version", "max_position_embeddings", "rope_parameters"}
    found, expected = config_of(tmp_path / "back"), config_of(tmp_path / "native")
    assert {k: v for k, v in found.items() if k not in untouched} == {
        k: v for k, v in expected.items() if k not in untouched
    }


def test_options_without_counterpart_and_older_spellings_come_back(tmp_path):
    folder = tmp_path / "native"
    TWINS["mamba"].build().save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"residual_in_fp32": False, "time_step_init_scheme": "constant", "rescale_prenorm_residual": True}
    raw |= {"eos_token_id": [3, 4], "some_note": {"kept": [1, None]}, "torch_dtype": raw.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(raw))
    import_native(folder, tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", folder)
    assert AutoConfig.from_pretrained(tmp_path / "back").some_note == {"kept": [1, None]}


def test_older_rope_spellings_are_read_and_come_back(tmp_path):
    folder = tmp_path / "native"
    TWINS["llama-linear"].build().save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
    (folder / "config.json").write_text(json.dumps(raw))
    import_native(folder, tmp_path / "ours")
    position = json.loads((tmp_path / "ours" / "config.json").read_text())["layer_specs"]["attention_swiglu"]["mixer"]
    assert position["position"]["theta"] == 700.0
    assert position["position"]["scaling"] == {"rope_type": "linear", "factor": 3.0}
    export_native(tmp_path / "ours", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", folder)


def test_generation_config_tokenizer_and_licence_travel(tmp_path):
    folder = tmp_path / "native"
    TWINS["mistral"].build().save_pretrained(folder)
    names = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")
    for name in names[1:]:
        (folder / name).write_text(f"{{}} {name}")
    (folder / "training_args.bin").write_text("stays")
    import_native(folder, tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "back")
    for copy in ("ours", "back"):
        assert not (tmp_path / copy / "training_args.bin").exists()
        for name in names:
            assert (tmp_path / copy / name).read_bytes() == (folder / name).read_bytes()
