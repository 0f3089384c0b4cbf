"""A saved model loads, with the same bits, where hybridlm is not installed."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from child_without_package import outputs_of
from runtime_part import FadingPosition, LeakyMixer
from stacks import build, config_of, prompt
from transformers.utils import hub

import hybridlm
from hybridlm import CHANNEL_MIXERS, MIXERS, HybridLMConfig, HybridLMForCausalLM
from hybridlm.modeling.registry import POSITIONS
from hybridlm.modeling.remote_code import AUTO_CLASSES
from hybridlm.presets import load_config

HERE = Path(__file__).parent
HEADS = {auto: getattr(hybridlm, name) for auto, name in AUTO_CLASSES.items()}
CODE = {path.name for path in Path(hybridlm.__file__).parent.glob("modeling/*.py")} - {"__init__.py"}


@pytest.fixture(scope="module")
def leaky():
    """Parts registered at run time, from a file."""
    MIXERS["leaky"], POSITIONS["fading"] = LeakyMixer, FadingPosition
    yield
    del MIXERS["leaky"], POSITIONS["fading"]


def leaky_config():
    specs = {
        "a": {"mixer": {"name": "leaky", "start": 0.25}, "channel_mixer": {"name": "swiglu"}},
        "b": {"mixer": {"name": "attention", "num_heads": 4, "position": {"name": "fading"}}, "channel_mixer": None},
    }
    sizes = {"vocab_size": 48, "hidden_size": 32, "initializer_range": 0.3}
    return HybridLMConfig(layer_specs=specs, layer_layout=["a", "b"], num_hidden_layers=2, **sizes)


def everything_config():
    """The preset with experts, streams and nested spans, with convolutions in its attention, drawn wide."""
    config = load_config("tiny_everything")
    config.initializer_range, config.embedding_std = 0.3, 0.6
    for recipe in config.layer_specs.values():
        if recipe["mixer"]["name"] == "attention":
            recipe["mixer"]["conv_kernel"] = 3
    return config


def child(*arguments, home):
    """Run a script with nothing of ours on the path and an empty code cache."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "COV"))},
        **{"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=home, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, leaky):
    """Folders that were saved here and loaded in a child process; what both computed."""
    root = tmp_path_factory.mktemp("remote")
    ids = prompt(2)
    torch.save(ids, root / "ids.pt")
    models = {auto: build("hybrid", torch.float32, head) for auto, head in HEADS.items()}
    models["AutoModelForCausalLM-leaky"] = HybridLMForCausalLM(leaky_config()).eval()
    models["AutoModelForCausalLM-bf16"] = build("hybrid", torch.bfloat16)
    streams = {"name": "manifold_hyper_connections", "num_streams": 2}
    models["AutoModelForCausalLM-streams"] = build("hybrid", torch.bfloat16, residual=streams)
    models["AutoModelForCausalLM-tied"] = build("mamba", torch.float32, tie_word_embeddings=True)
    models["AutoModelForCausalLM-everything"] = HybridLMForCausalLM(everything_config()).eval()
    here = {}
    for name, model in models.items():
        model.save_pretrained(root / name)
        here[name] = outputs_of(model, ids)
    script = root / "script"  # away from the checkout, so that the folder of the script does not help
    script.mkdir()
    shutil.copy(HERE / "child_without_package.py", script)
    child(script / "child_without_package.py", root, home=script)
    return SimpleNamespace(root=root, here=here)


NAMES = [*HEADS, *(f"AutoModelForCausalLM-{kind}" for kind in ("leaky", "bf16", "streams", "tied", "everything"))]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_without_the_package_have_the_same_bits(loaded, name):
    there = torch.load(loaded.root / name / "outputs.pt")
    assert there.keys() == loaded.here[name].keys()
    for key, tensor in loaded.here[name].items():
        assert torch.equal(there[key], tensor), key
    facts = json.loads((loaded.root / name / "facts.json").read_text())
    assert facts["module"].startswith("transformers_modules.")
    assert facts["config"].startswith("transformers_modules.")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_saved_by_remote_code_is_whole(loaded, name):
    first, again = loaded.root / name, loaded.root / "again" / name
    assert {path.name for path in again.iterdir()} >= CODE
    for path in again.glob("*.py"):
        assert path.read_text() == (first / path.name).read_text(), path.name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, again)]
    assert configs[0] == configs[1]
    model = getattr(transformers, name.split("-")[0]).from_pretrained(again)  # by the package
    assert type(model).__module__ == "hybridlm.modeling.modeling_hybridlm" or name == "AutoModel"
    for key, tensor in outputs_of(model, prompt(2)).items():
        assert torch.equal(tensor, loaded.here[name][key])


def test_the_installed_package_is_preferred_to_remote_code(loaded):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        loaded.root / "AutoModelForCausalLM", trust_remote_code=True
    )
    assert type(model) is HybridLMForCausalLM


def test_saving_marks_no_class_and_lists_all_heads(tmp_path):
    build("mamba", torch.float32).save_pretrained(tmp_path)
    assert all(head._auto_class is None for head in HEADS.values())
    assert HybridLMConfig._auto_class is None
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", *HEADS}


def test_saving_twice_into_one_folder_ships_a_part_once(tmp_path, leaky):
    model = HybridLMForCausalLM(leaky_config())
    for _ in range(2):
        model.save_pretrained(tmp_path)
    registry = (tmp_path / "registry.py").read_text()
    assert registry.count('MIXERS["leaky"] = LeakyMixer') == 1
    assert registry.count('POSITIONS["fading"] = FadingPosition') == 1
    assert (tmp_path / "runtime_part.py").read_text() == (HERE / "runtime_part.py").read_text()


def test_a_part_of_the_users_works_as_any_other(leaky):
    from stacks import greedy, greedy_by_hand, left_padded

    model = HybridLMForCausalLM(leaky_config()).double().eval()
    rows = [prompt(length=n)[0] for n in (7, 4)]
    batch = left_padded(rows)
    text = greedy(model, batch["input_ids"], 8, attention_mask=batch["attention_mask"])
    expected = torch.stack([greedy_by_hand(model, row[None], 8)[0, len(row) :] for row in rows])
    torch.testing.assert_close(text[:, 7:], expected)
    ids = prompt(length=4).repeat(1, 3)
    torch.testing.assert_close(greedy(model, ids, 8, prompt_lookup_num_tokens=3), greedy_by_hand(model, ids, 8))


def module_from(path, text):
    """Import a file by its path."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


PART = """
from torch import nn

class Mine(nn.Module):
    def __init__(self, hidden_size: int, *, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def init_weights(self, std):
        pass

    def forward(self, hidden_states, state=None, sequence=None):
        return hidden_states * self.factor, None
"""


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("mine_a.py", "from hybridlm.modeling.norms import RMSNorm\n" + PART, "imports the package 'hybridlm'"),
        ("mine_b.py", "def load():\n    import hybridlm\n" + PART, "imports the package 'hybridlm'"),
        ("mine_c.py", "try:\n    from .mine_other import helper\nexcept ImportError:\n    pass\n" + PART, "mine_other"),
        ("scan.py", PART, "its file is called scan.py, as one of the modeling files"),
        ("mine_d.py", PART.replace("class Mine", "def make():\n  class Mine").replace("\n    ", "\n      ")
         + "\n  return Mine\nOther = make()\n", "not at the top of its file"),
    ],
    ids=["imports-package", "imports-package-inside", "imports-neighbour", "name-clash", "local-class"],
)  # fmt: skip
def test_a_part_that_cannot_travel_is_named_with_the_reason(tmp_path, log, file, text, reason):
    folder = tmp_path / "parts"
    folder.mkdir()
    known = sys.modules.get(Path(file).stem)
    module = module_from(folder / file, text)
    CHANNEL_MIXERS["mine"] = getattr(module, "Mine", None) or module.Other
    try:
        specs = {"a": {"mixer": {"name": "mamba"}, "channel_mixer": {"name": "mine"}}}
        config = HybridLMConfig(layer_specs=specs, num_hidden_layers=1, hidden_size=32)
        model = HybridLMForCausalLM(config)
        model.save_pretrained(tmp_path / "model")
    finally:
        del CHANNEL_MIXERS["mine"], sys.modules[Path(file).stem]
        if known is not None:
            sys.modules[Path(file).stem] = known
    assert "CHANNEL_MIXERS['mine']" in log.text
    assert reason in log.text
    assert {path.name for path in (tmp_path / "model").glob("*.py")} == CODE  # and nothing half shipped
    assert "import Mine" not in (tmp_path / "model" / "registry.py").read_text()


def test_a_part_defined_in_a_notebook_is_named_with_the_reason(tmp_path):
    root = str(Path(hybridlm.__file__).parents[1])
    script = f"""
import sys
sys.path.insert(0, {root!r})
import hybridlm
{PART}
hybridlm.MIXERS["mine"] = Mine
config = hybridlm.HybridLMConfig(
    layer_specs={{"a": {{"mixer": {{"name": "mine"}}, "channel_mixer": None}}}}, num_hidden_layers=1, hidden_size=32
)
hybridlm.HybridLMForCausalLM(config).save_pretrained({str(tmp_path / "model")!r})
"""
    done = child("-c", script, home=tmp_path)
    assert "MIXERS['mine']: it is defined in __main__, move it into a file" in done.stdout + done.stderr


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A Hub that keeps what is uploaded to it."""
    uploaded = {}

    class FakeApi:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_commit(self, repo_id, operations, **kwargs):
            for operation in operations:
                uploaded[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()
            return "url"

    monkeypatch.setattr(hub, "hf_api", FakeApi, raising=False)
    monkeypatch.setattr(transformers.modeling_utils, "hf_api", FakeApi, raising=False)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    for module in (hub, transformers.modeling_utils):  # 5.17 calls the functions of huggingface_hub
        for name in ("create_repo", "create_commit"):
            function = getattr(FakeApi(), name)
            monkeypatch.setattr(module, name, function, raising=False)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: card)
    return uploaded


def test_push_to_hub_uploads_the_code(fake_hub):
    build("hybrid", torch.float32).push_to_hub("tiny")
    assert fake_hub.keys() >= CODE | {"config.json", "model.safetensors", "generation_config.json"}
    assert "auto_map" in json.loads(fake_hub["config.json"])


def test_save_pretrained_that_also_pushes_uploads_the_code(fake_hub, tmp_path):
    model = build("hybrid", torch.float32)
    for _ in range(2):  # into a fresh folder, and over an earlier save
        fake_hub.clear()
        model.save_pretrained(tmp_path / "tiny", push_to_hub=True)
        assert fake_hub.keys() >= CODE | {"config.json", "model.safetensors"}


def test_importing_the_package_registers_the_classes():
    config = config_of("mamba")
    for auto, head in HEADS.items():
        assert type(getattr(transformers, auto).from_config(config)) is head
    assert transformers.AutoConfig.for_model("hybridlm").__class__ is HybridLMConfig
