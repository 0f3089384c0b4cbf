"""The config: what it stores, what follows from it, what it keeps for others."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from variants import ATTENTION, CHANNEL_VARIANTS, MAMBA, MIXER_VARIANTS, STRUCTURES, WINDOW, small

from hybridlm import CHANNEL_MIXERS, MIXERS, HybridLMConfig, HybridLMForCausalLM
from hybridlm.modeling.registry import NORMS, RESIDUALS, options_of, resolve_config

FIELDS = {"hidden_size": 16, "vocab_size": 31}


def config(*layers, **fields):
    recipes = {f"r{i}": {"mixer": mixer, "channel_mixer": channel} for i, (mixer, channel) in enumerate(layers)}
    return HybridLMConfig(layer_specs=recipes, num_hidden_layers=len(layers), **FIELDS | fields)


def built(*layers, **fields):
    with torch.device("meta"):
        return HybridLMForCausalLM(config(*layers, **fields)).config


def names_of(options, part):
    return {"name", *options_of(part)} == set(options)


@pytest.mark.parametrize("variant", MIXER_VARIANTS)
def test_every_option_of_a_mixer_is_stored(variant):
    stored = built((MIXER_VARIANTS[variant], None)).layer_specs["r0"]["mixer"]
    assert names_of(stored, MIXERS[stored["name"]])
    assert stored.items() >= {k: v for k, v in MIXER_VARIANTS[variant].items() if not isinstance(v, dict)}.items()
    for key, given in MIXER_VARIANTS[variant].items():
        if isinstance(given, dict):
            assert stored[key].items() >= given.items(), key


@pytest.mark.parametrize("variant", CHANNEL_VARIANTS)
def test_every_option_of_a_channel_mixer_is_stored(variant):
    stored = built((None, CHANNEL_VARIANTS[variant])).layer_specs["r0"]["channel_mixer"]
    assert names_of(stored, CHANNEL_MIXERS[stored["name"]])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_option_of_norm_and_residual_is_stored(structure):
    stored = built((MAMBA, None), **STRUCTURES[structure])
    assert set(stored.norm) == {"name", "placement", *options_of(NORMS[stored.norm["name"]])}
    assert names_of(stored.residual, RESIDUALS[stored.residual["name"]])


def test_numbers_that_follow_from_others_are_stored_as_numbers():
    stored = built((ATTENTION | {"num_kv_heads": None}, small("mlp") | {"intermediate_size": None}), (MAMBA, None))
    assert stored.layer_specs["r0"]["mixer"]["num_kv_heads"] == 4
    assert stored.layer_specs["r0"]["mixer"]["head_dim"] == 4
    assert stored.layer_specs["r0"]["channel_mixer"]["intermediate_size"] == 64
    assert stored.layer_specs["r1"]["mixer"]["intermediate_size"] == 32
    assert stored.layer_specs["r1"]["mixer"]["dt_rank"] == 1


@pytest.mark.parametrize("variant", MIXER_VARIANTS)
def test_a_resolved_config_is_resolved_to_itself_and_survives_a_file(variant, tmp_path):
    first = built((MIXER_VARIANTS[variant], CHANNEL_VARIANTS["moe-losses"]), norm={"name": "layer"}, extra={"a": [1]})
    first.save_pretrained(tmp_path)
    second = AutoConfig.from_pretrained(tmp_path)
    skip = {"_name_or_path", "architectures", "transformers_version"}
    assert {k: v for k, v in second.to_dict().items() if k not in skip} == {
        k: v for k, v in first.to_dict().items() if k not in skip
    }
    before = copy.deepcopy(second.layer_specs)
    resolve_config(second)
    assert second.layer_specs == before == first.layer_specs
    json.dumps(second.to_dict())


def test_the_callers_dictionaries_are_left_alone():
    mixer = copy.deepcopy(ATTENTION)
    specs = {"a": {"mixer": mixer}}
    before = copy.deepcopy(specs)
    with torch.device("meta"):
        HybridLMForCausalLM(HybridLMConfig(layer_specs=specs, num_hidden_layers=1, **FIELDS))
    assert specs == before


def test_a_default_config_builds():
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(HybridLMConfig())


def test_without_a_layout_the_recipes_take_turns():
    specs = {"a": {"mixer": MAMBA}, "b": {"mixer": ATTENTION}}
    assert HybridLMConfig(layer_specs=specs, num_hidden_layers=5, **FIELDS).layer_layout == ["a", "b", "a", "b", "a"]


def test_an_integer_passes_as_a_float():
    assert built((MAMBA | {"norm_eps": 1}, None)).layer_specs["r0"]["mixer"]["norm_eps"] == 1


def test_names_that_other_libraries_read_follow_from_the_recipes():
    whole = config((MAMBA, small("swiglu")), (WINDOW, None), (ATTENTION | {"num_heads": 8}, None))
    assert whole.layer_types == ["linear_attention", "sliding_attention", "full_attention"]
    assert whole.num_attention_heads == 4
    assert whole.num_key_value_heads == 2
    assert whole.head_dim == 4
    assert whole.sliding_window == 5
    assert whole.intermediate_size == 24
    recurrent = config((MAMBA, None))
    assert recurrent.layer_types == ["linear_attention"]
    assert recurrent.sliding_window is None
    assert recurrent.num_attention_heads == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"architectures": ["HybridLMForCausalLM"]},
        {"num_labels": 5},
        {"id2label": {"0": "a", "1": "b"}},
        {"auto_map": {"AutoModel": "modeling_hybridlm.HybridLMModel"}},
        {"attn_implementation": "eager"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"name_or_path": "somewhere"},
        {"transformers_version": "5.0.0"},
        {"output_hidden_states": True},
        {"problem_type": "regression"},
        {"max_length": 20},
        {"model_type": "hybridlm"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_transformers_writes_or_passes_is_accepted(fields):
    config((MAMBA, None), **fields)


def test_anything_else_has_a_place_of_its_own(tmp_path):
    config((MAMBA, None), extra={"run": {"seed": 3}}).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).extra == {"run": {"seed": 3}}


def test_a_recipe_may_have_a_norm_of_its_own():
    specs = {"a": {"mixer": MAMBA, "norm": {"name": "layer", "placement": "sandwich"}}, "b": {"mixer": MAMBA}}
    model = HybridLMForCausalLM(HybridLMConfig(layer_specs=specs, num_hidden_layers=2, **FIELDS))
    one, other = model.model.layers
    assert type(one.mixer_norm).__name__ == "LayerNorm"
    assert one.mixer_post_norm is not None
    assert type(other.mixer_norm).__name__ == "RMSNorm"
    assert other.mixer_post_norm is None
    assert model.config.layer_specs["a"]["norm"]["eps"] == 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_may_start_at_a_scale_of_its_own(tied, tmp_path):
    def start(**fields):
        torch.manual_seed(0)
        config = HybridLMConfig(vocab_size=500, hidden_size=64, tie_word_embeddings=tied, **fields)
        return HybridLMForCausalLM(config)

    plain, wide = start(), start(embedding_std=0.4)
    stds = [[m.weight.std().item() for m in (model.model.embed_tokens, model.lm_head)] for model in (plain, wide)]
    assert stds[0] == pytest.approx([0.02, 0.02], rel=0.05)
    assert stds[1] == pytest.approx([0.4, 0.4 if tied else 0.02], rel=0.05)
    for name, parameter in plain.model.layers.named_parameters():
        assert torch.equal(parameter, wide.model.layers.get_parameter(name)), name
    wide.save_pretrained(tmp_path)
    assert HybridLMConfig.from_pretrained(tmp_path).embedding_std == 0.4
    assert "embedding_std" in (tmp_path / "config.json").read_text(encoding="utf-8")
