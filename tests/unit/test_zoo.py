"""Every preset is the file that the Hub would store, builds, and has the structure that its name promises."""

import json

import pytest
import torch

from hybridlm import presets
from hybridlm.analysis import plan
from hybridlm.modeling.modeling_hybridlm import HybridLMForCausalLM

NAMES = presets.preset_names()
FULL = [name for name in NAMES if not name.startswith("tiny_")]
TINY = [name for name in NAMES if name.startswith("tiny_")]


def read(name):
    return json.loads(presets.find_config(name).read_text(encoding="utf-8"))


def parts(name, half):
    config = read(name)
    return [config["layer_specs"][recipe][half] for recipe in config["layer_layout"]]


def mixers(name):
    return [mixer["name"] for mixer in parts(name, "mixer")]


def test_the_zoo_is_complete():
    promised = {"llama", "mistral", "mixtral", "mamba", "mamba2", "jamba", "jamba_3to1", "samba", "bamba"}
    promised |= {"granite_4_like", "mode", "switch", "deepseek_moe"}
    promised |= {"transformer_xl", "memorizing_llama"}
    promised |= {"titans_lmm", "titans_mac", "titans_mag", "titans_mal", "jamba_titans"}
    promised |= {"mhc_jamba", "mod_llama", "mod_jamba", "merge_llama", "merge_jamba", "everything"}
    assert set(FULL) == promised
    assert set(TINY) == {f"tiny_{name}" for name in FULL}


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_stores_every_option_resolved(name):
    path = presets.find_config(name)
    assert path.read_text(encoding="utf-8") == presets.resolved_text(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_where_its_figures_come_from(name):
    assert read(name)["extra"]["source"]


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds_on_the_meta_device_with_the_planned_parameters(name):
    config = presets.load_config(name)
    with torch.device("meta"):
        model = HybridLMForCausalLM(config)
    assert plan(config, context=16).total.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", FULL)
def test_a_tiny_sibling_keeps_the_structure(name):
    full, tiny = read(name), read(f"tiny_{name}")
    assert tiny["hidden_size"] <= 64
    for half in ("mixer", "channel_mixer"):
        kinds = [{json.dumps(_structure(part)) for part in parts(preset, half)} for preset in (name, f"tiny_{name}")]
        assert kinds[0] == kinds[1], half
    assert [_structure(span) for span in full["spans"]] == [_structure(span) for span in tiny["spans"]]
    for key in ("norm", "tie_word_embeddings", "embedding_multiplier", "logit_multiplier", "residual"):
        assert full[key] == tiny[key], key


def _structure(part):
    """The part without its sizes: strings, switches, and whether an optional number is set."""
    if not isinstance(part, dict):
        return part
    kept = {key: _structure(value) for key, value in part.items() if isinstance(value, str | bool | dict)}
    return kept | {f"{key} is set": part.get(key) is not None for key in ("window", "scale") if key in part}


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_preset_generates(name):
    torch.manual_seed(0)
    model = HybridLMForCausalLM(presets.load_config(name)).eval()
    prompt = torch.randint(0, 256, (2, 5))
    output = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert output.shape == (2, 9)
    assert bool((output[:, :5] == prompt).all())


def test_jamba_is_the_published_one():
    names = mixers("jamba")
    assert [i for i, name in enumerate(names) if name == "attention"] == [4, 12, 20, 28]
    assert [i for i, part in enumerate(parts("jamba", "channel_mixer")) if part["name"] == "moe"] == [*range(1, 32, 2)]
    attention, mamba = parts("jamba", "mixer")[4], parts("jamba", "mixer")[0]
    assert attention["position"] == {"name": "none"}
    assert (attention["num_heads"], attention["num_kv_heads"]) == (32, 8)
    assert (mamba["inner_norms"], mamba["state_size"]) == (True, 16)
    total = plan(presets.load_config("jamba")).total
    # arXiv:2403.19887, table 1: 52B parameters, 12B active
    assert round(total.num_parameters / 1e9) == 52
    assert round(total.num_active_parameters / 1e9) == 12


def test_deepseek_moe_is_the_published_one():
    total = plan(presets.load_config("deepseek_moe")).total
    # arXiv:2401.06066, section 5.1.2: 16.4B parameters, 2.8B active
    assert round(total.num_parameters / 1e8) == 164
    assert round(total.num_active_parameters / 1e8) == 28
    first, *rest = parts("deepseek_moe", "channel_mixer")
    assert first["name"] == "swiglu"
    assert {(part["num_experts"], part["top_k"], part["num_shared_experts"]) for part in rest} == {(64, 6, 2)}


def test_mode_has_one_choice_without_weights_and_switch_one_expert_a_token():
    assert {(part["num_zero_experts"], part["top_k"]) for part in parts("mode", "channel_mixer")} == {(1, 1)}
    experts = parts("switch", "channel_mixer")[1::2]
    assert {(part["routing"], part["top_k"], part["capacity_factor"]) for part in experts} == {("switch", 1, 1.25)}
    assert {part["load_balancing_coef"] for part in experts} == {0.01}


def test_transformer_xl_is_the_published_one():
    # arXiv:1901.02860, table 1 and its code: 257M parameters, those outside the layers in adaptive embeddings
    (layer,) = {json.dumps(part) for part in parts("transformer_xl", "mixer")}
    mixer = json.loads(layer)
    assert (mixer["num_heads"], mixer["head_dim"], mixer["segment_size"], mixer["memory_size"]) == (16, 64, 384, 384)
    layers = plan(presets.load_config("transformer_xl")).layers
    assert len(layers) == 18
    assert round(sum(layer.num_parameters for layer in layers) / 1e6) == 246


@pytest.mark.parametrize(
    ("name", "mixer"),
    [("lmm", "neural_memory"), ("mac", "titans_mac"), ("mag", "titans_mag"), ("mal", "titans_mal")],
)
def test_the_titans_are_stacks_of_one_mixer_with_deep_memories_at_the_scale_of_the_paper(name, mixer):
    # arXiv:2501.00663, section 5.1 and table 1: models of 340M parameters trained on 4096 tokens, deep memories
    assert mixers(f"titans_{name}") == [mixer] * 24
    memories = [part.get("memory", part) for part in parts(f"titans_{name}", "mixer")]
    assert {(memory["memory_depth"], memory["objective"], memory["detach_memory"]) for memory in memories} == {
        (2, "l2", False)
    }
    assert 310 <= plan(presets.load_config(f"titans_{name}")).total.num_parameters / 1e6 <= 360


def test_jamba_titans_has_all_four_mechanisms():
    names, channels = mixers("jamba_titans"), [part["name"] for part in parts("jamba_titans", "channel_mixer")]
    assert [names.count(name) for name in ("mamba", "attention", "neural_memory")] == [18, 3, 3]
    assert channels.count("moe") == 12


def test_the_ninth_of_twelve_layers_memorizes():
    names = mixers("memorizing_llama")
    assert (len(names), names.index("memorizing"), names.count("memorizing")) == (12, 8, 1)
    # arXiv:2203.08913, section 4: the 32 nearest of 8192 memories
    mixer = parts("memorizing_llama", "mixer")[8]
    assert (mixer["top_k"], mixer["memory_size"], mixer["window"]) == (32, 8192, 512)


def test_jamba_needs_4_gb_of_keys_and_values_at_256k_tokens():
    layers = plan(presets.load_config("jamba"), context=2**18).layers
    # arXiv:2403.19887, table 1
    assert sum(layer.state_bytes for layer in layers if layer.mixer == "attention") == 4 * 2**30


@pytest.mark.parametrize(
    ("name", "attention", "others"),
    [("jamba_3to1", 8, 24), ("samba", 9, 9), ("bamba", 3, 29), ("granite_4_like", 4, 36), ("llama", 32, 0)],
)
def test_the_ratio_of_mixers_is_the_published_one(name, attention, others):
    names = mixers(name)
    assert (names.count("attention"), len(names) - names.count("attention")) == (attention, others)


def test_the_variant_is_labelled():
    assert "variant" in read("jamba_3to1")["extra"]["source"]
