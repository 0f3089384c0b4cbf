"""A dense checkpoint becomes one with experts that computes the same."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMForSequenceClassification, presets
from hybridlm.cli import app
from hybridlm.hub import export_native, upcycle, upcycle_model
from hybridlm.modeling.channel_moe import MoE


def dense_folder(path, preset="tiny_llama", model=HybridLMForCausalLM, dtype=torch.float64, **fields):
    config = HybridLMConfig.from_dict(presets.load_config(preset).to_dict() | {"initializer_range": 0.3} | fields)
    model(config).to(dtype).save_pretrained(path / "dense")
    return path / "dense"


def logits(folder, dtype="auto", **arguments):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model(torch.arange(2, 26).view(2, 12), **arguments).logits


def experts(folder):
    config = json.loads((folder / "config.json").read_text())
    return [config["layer_specs"][name]["channel_mixer"]["name"] for name in config["layer_layout"]]


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"norm": {"name": "rms", "placement": "post"}}])
@pytest.mark.parametrize("options", [{}, {"num_experts": 5, "top_k": 5, "layers": "all"}, {"top_k": 1, "layers": [0]}])
def test_the_logits_are_those_of_the_dense_model(tmp_path, options, fields):
    src = dense_folder(tmp_path, **fields)
    out = upcycle(src, tmp_path / "experts", **options)
    expected = logits(src)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(logits(out), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_every_other_layer_with_a_swiglu_is_the_default(tmp_path):
    src = dense_folder(tmp_path, "tiny_jamba")
    assert experts(src)[:4] == ["swiglu", "moe", "swiglu", "moe"]
    out = upcycle(src, tmp_path / "experts")
    assert experts(out) == ["swiglu", "moe", "moe", "moe", "swiglu", "moe", "moe", "moe"]
    torch.testing.assert_close(logits(out), logits(src), rtol=0, atol=1e-9 * float(logits(src).abs().max()))
    written = json.loads((out / "config.json").read_text())["extra"]["upcycled"]
    assert written == {"num_experts": 8, "top_k": 2, "load_balancing_coef": 0.01, "layers": [2, 6]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_keeps_its_type_its_head_and_its_companions(tmp_path, dtype):
    src = dense_folder(tmp_path, model=HybridLMForSequenceClassification, dtype=dtype, num_labels=3)
    (src / "tokenizer.json").write_text("{}")
    out = upcycle(src, tmp_path / "experts")
    model = HybridLMForSequenceClassification.from_pretrained(out, dtype="auto")
    assert (model.dtype, model.num_labels) == (dtype, 3)
    assert (out / "tokenizer.json").is_file()
    ids, before = torch.arange(2, 14)[None], HybridLMForSequenceClassification.from_pretrained(src, dtype="auto")
    close = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(model(ids).logits, before(ids).logits, **close)


def test_training_moves_the_copies_apart(tmp_path):
    out = upcycle(dense_folder(tmp_path, dtype=torch.float32), tmp_path / "experts")
    model = HybridLMForCausalLM.from_pretrained(out).train()
    optimizer, ids = torch.optim.SGD(model.parameters(), lr=0.5), torch.randint(0, 256, (4, 12))
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    (moe,) = (module for module in model.modules() if isinstance(module, MoE))
    assert len({float(weight.detach().sum()) for weight in moe.experts.down_proj}) > 1


def test_noise_parts_the_copies_and_the_seed_repeats_it(tmp_path):
    src = dense_folder(tmp_path)
    outs = [upcycle(src, tmp_path / f"out{i}", noise=0.1, seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(logits(outs[0]), logits(outs[1]))
    assert not torch.equal(logits(outs[0]), logits(outs[2]))
    model = HybridLMForCausalLM.from_pretrained(outs[0])
    before = HybridLMForCausalLM.from_pretrained(src).model.layers[1].channel_mixer.down_proj.weight
    added = model.model.layers[1].channel_mixer.experts.down_proj - before
    assert len({float(noise.detach().sum()) for noise in added}) == 8
    assert float(added.detach().std() / before.detach().std()) == pytest.approx(0.1, rel=0.1)


def test_a_native_folder_is_imported_first_and_no_longer_exported(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).double().save_pretrained(tmp_path / "native")
    out = upcycle(tmp_path / "native", tmp_path / "experts")
    torch.testing.assert_close(logits(out), logits(tmp_path / "native"), rtol=0, atol=1e-6)  # its own float32
    with pytest.raises(ValueError, match=r"layer_layout\.\d.*channel_mixer is 'moe'|is 'swiglu'"):
        export_native(out, tmp_path / "back")


def test_the_model_given_stays_as_it_is(tmp_path):
    model = HybridLMForCausalLM(presets.load_config("tiny_llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, text = torch.random.get_rng_state(), model.config.to_json_string()
    sparse = upcycle_model(model, "all", {"num_experts": 3, "top_k": 1})
    assert sparse.num_parameters() > model.num_parameters()
    assert model.config.to_json_string() == text
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({"layers": "none"}, {}, "layers: unknown 'none', expected 'every_other', 'all' or depths"),
        ({"layers": [5]}, {}, "layers: 5 is not a layer, expected 0 to 1"),
        ({"layers": [-1]}, {}, "layers: -1 is not a layer"),
        ({"layers": []}, {}, "layers: expected at least one"),
        ({"top_k": 9}, {}, r"channel_mixer.top_k=9 must be between 1 and num_experts=8"),
        ({"num_experts": 0}, {}, r"channel_mixer.num_experts=0 must be at least 1"),
        ({"noise": -1.0}, {}, "noise=-1.0 must not be negative"),
        ({"layers": [1]}, {"preset": "tiny_mixtral"}, r"layer 1 has layer_specs.attention.channel_mixer.name='moe'"),
        ({}, {"preset": "tiny_mamba"}, "layers: 0 of 3 layers have a 'swiglu', 'every_other' chooses none"),
    ],
)  # fmt: skip
def test_what_cannot_become_experts_is_refused_and_nothing_is_written(tmp_path, options, fields, message):
    src = dense_folder(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        upcycle(src, tmp_path / "experts", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_biases_a_full_folder_and_other_families_are_refused(tmp_path):
    specs = {"a": {"mixer": None, "channel_mixer": {"name": "swiglu", "bias": True}}}
    HybridLMForCausalLM(HybridLMConfig(layer_specs=specs, num_hidden_layers=2, hidden_size=16)).save_pretrained(
        tmp_path / "biased"
    )
    with pytest.raises(
        ValueError, match=r"layer 1 has layer_specs.a.channel_mixer.bias=True, and experts have no bias"
    ):
        upcycle(tmp_path / "biased", tmp_path / "experts")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"model_type is 'gpt2', expected one of \['hybridlm', 'bamba'"):
        upcycle(tmp_path / "gpt2", tmp_path / "experts")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        upcycle(tmp_path / "nowhere", tmp_path / "experts")
    src = dense_folder(tmp_path)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        upcycle(src, tmp_path / "gpt2")


def test_the_command_writes_what_the_function_does(tmp_path):
    src, run = dense_folder(tmp_path), CliRunner().invoke
    result = run(app, ["upcycle", str(src), str(tmp_path / "out"), "--experts", "4", "--top-k", "1", "--layers", "0,1"])
    assert result.exit_code == 0
    assert experts(tmp_path / "out") == ["moe", "moe"]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(src), rtol=0, atol=1e-9)
    result = run(app, ["upcycle", str(src), str(tmp_path / "again"), "--layers", "0,x"])
    assert result.exit_code == 2
    assert "hybridlm: layers: unknown '0,x', expected 'every_other', 'all' or depths" in result.stderr
