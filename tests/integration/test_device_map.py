"""Models spread over devices: everything on one, layers on the disk, and, with a GPU, a layer on the CPU."""

import pytest
import torch
from stacks import build, greedy, greedy_by_hand, left_padded, prompt
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved hybrid, and the model."""
    model = build("hybrid", torch.float32)
    folder = tmp_path_factory.mktemp("spread")
    model.save_pretrained(folder)
    return folder, model


def device_map(**places):
    layers = {f"model.layers.{i}": places.get(f"layer_{i}", places["rest"]) for i in range(4)}
    rest = places["rest"]
    return {"model.embed_tokens": rest, "model.norm": rest, "lm_head": rest} | layers


def uses_of(model, device="cpu"):
    """Logits of a padded batch and of packed documents, cached ones, and greedy text."""
    batch = {k: v.to(device) for k, v in left_padded([prompt(length=n, seed=n)[0] for n in (9, 4)]).items()}
    ids = prompt().to(device)
    with torch.no_grad():
        cache = model.new_cache()
        chunks = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 3], dim=1)]
        packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]], device=device)).logits
        found = [model(**batch).logits, torch.cat(chunks, dim=1), packed]
    found.append(greedy(model, batch["input_ids"], 6, attention_mask=batch["attention_mask"]))
    found.append(greedy(model, ids, 6, prompt_lookup_num_tokens=3))
    found.append(greedy(model, ids, 6, num_beams=2))
    return [tensor.cpu() for tensor in found]


@pytest.mark.parametrize("places", ["auto", {"": "cpu"}, device_map(rest="cpu")], ids=["auto", "one", "by-layer"])
def test_a_device_map_changes_nothing(saved, places):
    folder, model = saved
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=places)
    if torch.cuda.is_available():
        spread = spread.cpu()
    for mine, expected in zip(uses_of(spread), uses_of(model), strict=True):
        assert torch.equal(mine, expected)


def test_layers_on_the_disk_change_nothing(saved, tmp_path):
    folder, model = saved
    places = device_map(rest="cpu", layer_0="disk", layer_1="disk", layer_2="disk", layer_3="disk")
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert spread.model.layers[0].mixer.A_log.device.type == "meta"
    for mine, expected in zip(uses_of(spread), uses_of(model), strict=True):
        torch.testing.assert_close(mine, expected)


RESIDUALS = {
    "add": {"name": "add", "layer_scale": 0.5},
    "hyper_connections": {"name": "hyper_connections", "num_streams": 2},
    "manifold_hyper_connections": {"name": "manifold_hyper_connections", "num_streams": 2, "layer_scale": 0.5},
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_parts_on_the_disk_change_nothing(name, tmp_path):
    model = build("hybrid", torch.float32, residual=RESIDUALS[name])
    model.save_pretrained(tmp_path / "model")
    places = device_map(rest="cpu", **{f"layer_{i}": "disk" for i in range(4)})
    if model.model.residual_head is not None:
        places["model.residual_head"] = "disk"
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    away = {str(p.device) for leaf, p in spread.named_parameters() if "residual" in leaf}
    assert away == {"meta"}
    with torch.no_grad():
        torch.testing.assert_close(spread(prompt()).logits, model(prompt()).logits)


def test_a_layer_may_not_be_split(saved):
    from accelerate import infer_auto_device_map

    _, model = saved
    sizes = {0: 60_000, "cpu": 10_000_000}
    places = infer_auto_device_map(model, max_memory=sizes, no_split_module_classes=model._no_split_modules)
    assert all(name.count(".") <= 2 for name in places)


def test_from_pretrained_on_the_meta_device_builds_without_memory(saved):
    from accelerate import init_empty_weights

    with init_empty_weights():
        empty = type(saved[1])(saved[1].config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_a_layer_on_another_device_gets_its_part_of_the_state_there(saved, tmp_path):
    _, model = saved
    cache = model.new_cache()
    cache.activate_past_recording()
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
    cache.save(tmp_path)
    other = model.new_cache()
    other.layers[2].device = torch.device("meta")  # stands for a GPU
    other.load(tmp_path)
    places = [{tensor.device.type for tensor in layer.named_tensors().values()} for layer in other.layers]
    assert places == [{"cpu"}, {"cpu"}, {"meta"}, {"cpu"}]
    entry = cache.layers[2].mixer
    entry.inputs = [(x.to("meta"), call.to("meta")) for x, call in entry.inputs]
    cache.crop(-3)

    def replayed(hidden_states, state, call):
        assert hidden_states.device.type == call.index.device.type == "meta"
        return hidden_states, state

    entry._replay(replayed)


@pytest.mark.gpu
@pytest.mark.parametrize("where", [{"layer_1": "cpu"}, {"layer_0": "cpu", "layer_3": "cpu"}], ids=["middle", "ends"])
def test_layers_on_the_cpu_beside_a_gpu(saved, where):
    folder, model = saved
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map(rest=0, **where))
    for mine, expected in zip(uses_of(spread, "cuda"), uses_of(model), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_auto_with_little_memory_on_the_gpu(saved):
    folder, model = saved
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory={0: "60KB", "cpu": "1GB"})
    assert {str(place) for place in spread.hf_device_map.values()} == {"0", "cpu"}
    text = greedy(spread, prompt().cuda(), 6).cpu()
    torch.testing.assert_close(text, greedy_by_hand(model, prompt(), 6))
