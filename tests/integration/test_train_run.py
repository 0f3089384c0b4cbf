"""Whole runs: from a run file to a published folder, interrupted and not."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch.utils.data import DataLoader, default_collate
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from hybridlm.data import build_byte_tokenizer, load_documents, pack_documents
from hybridlm.hub.figures import CardError
from hybridlm.hub.publish import check_publishable
from hybridlm.modeling.losses import update_selection_bias
from hybridlm.training import EpochSampler, build_model, parameter_groups, run, summarize, train
from hybridlm.training.publish import save_hub_folder
from hybridlm.training.run_file import ModelOptions, load_run_file

ROOT = Path(__file__).parents[2]
EXPERTS = {"num_experts": 4, "top_k": 2, "intermediate_size": 16, "selection_bias": True, "load_balancing_coef": 0.01}
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "embedding_dropout": 0.1,
    "layer_specs": {
        "ssm": {"mixer": {"name": "mamba", "state_size": 4}, "channel_mixer": {"name": "moe", **EXPERTS}},
        "ssd": {"mixer": {"name": "mamba2", "state_size": 8, "head_dim": 16}, "channel_mixer": {"name": "swiglu"}},
        "attn": {"mixer": {"name": "attention", "num_heads": 2, "dropout": 0.1}, "channel_mixer": None},
    },
    "layer_layout": ["ssm", "attn", "ssd"],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(0)
    words = ["import", "return", "self", "None", "def", "\n    ", "(x)", " = "]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 14))) for _ in range(8)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run_content(corpus, output_dir, **changes):
    training = {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    training |= {"save_steps": 4, "save_total_limit": 5, "logging_steps": 1, "disable_tqdm": True, "seed": 3}
    content = {
        "output_dir": str(output_dir),
        "model": {"config": MODEL},
        "data": {"path": str(corpus), "length": 32, "heldout_modulus": 5},
        "training": training | changes.pop("training", {}),
        "evaluation": {"lengths": []},
    }
    for section, values in changes.items():
        content[section] = content.get(section, {}) | values
    return content


def records(output_dir):
    """The metrics file without what depends on the clock."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    keep = ("step", "loss", "bits_per_byte", "learning_rate", "grad_norm", "epoch")
    return [{name: line[name] for name in keep} for line in lines if "loss" in line]


def weights(output_dir):
    return load_file(output_dir / "model" / "model.safetensors")


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.mark.parametrize("data", [{}, {"streaming": True}, {"streaming": True, "shuffle_buffer": 7}])
def test_four_steps_and_four_resumed_equal_eight_bit_for_bit(corpus, tmp_path, data):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(run_content(corpus, straight, data=data))
    content = run_content(corpus, resumed, data=data)
    run(content)
    shutil.rmtree(resumed / "checkpoint-8")
    shutil.rmtree(resumed / "model")
    results = run(content, resume=True)
    assert results["training"]["steps"] == 8
    assert_same_bits(weights(straight), weights(resumed))
    assert records(straight) == records(resumed)
    assert [record["step"] for record in records(resumed)] == list(range(1, 9))
    if not data:
        assert records(resumed)[3]["epoch"] > 1  # the interruption lies inside the second pass over the rows


def test_routers_bias_and_counts_are_those_of_an_uninterrupted_run(corpus, tmp_path):
    run(run_content(corpus, tmp_path / "run"))
    biases = [load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (4, 8)]
    bias = [state["model.layers.0.channel_mixer.router.selection_bias"] for state in biases]
    assert bias[0].abs().max() > 0
    assert not torch.equal(*bias)


def test_custom_accelerator_loop_trains_the_same_model(corpus, tmp_path):
    content = run_content(corpus, tmp_path / "run", training={"lr_scheduler_type": "cosine", "warmup_steps": 2})
    run(content)
    tokenizer = build_byte_tokenizer()
    rows = pack_documents(load_documents(str(corpus), heldout_modulus=5).train, tokenizer, 32)
    set_seed(3)
    model = build_model(ModelOptions(config=MODEL), tokenizer)
    set_seed(3)  # as Trainer does: dropout draws from here on

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 8)
    sampler = EpochSampler(len(rows), seed=3)
    batches = DataLoader(rows, batch_size=2, sampler=sampler, collate_fn=default_collate)
    model, optimizer, batches = accelerator.prepare(model.train(), optimizer, batches)
    step = 0
    while step < 8:
        sampler.set_epoch(step // -(-len(batches) // 2))
        group, remaining = [], len(batches)
        for batch in batches:
            group.append(batch)
            remaining -= 1
            if len(group) < 2 and remaining:
                continue
            num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in group)
            for batch in group:
                accelerator.backward(2 * model(**batch, num_items_in_batch=num_items).loss)  # it divides by 2
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            update_selection_bias(model)
            schedule.step()
            optimizer.zero_grad()
            group, step = [], step + 1
            if step == 8:
                break
    assert_same_bits(weights(tmp_path / "run"), model.state_dict())


def test_checkpoints_and_published_folder_load_as_remote_code(corpus, tmp_path):
    publish = {"check_reload": True, "prompt": "import ", "max_new_tokens": 8, "name": "tiny"}
    evaluation = {"lengths": [32, 128], "ngram_orders": [0, 1]}
    results = run(run_content(corpus, tmp_path / "run", publish=publish, evaluation=evaluation))
    assert results["failures"] == []
    assert results["reload"]["logits_equal"]
    assert results["reload"]["class"].startswith("transformers_modules.")
    assert results["reload"]["continuation"].startswith("import ")
    assert [score["length"] for score in results["heldout"]] == [32, 128]
    assert len({score["num_bytes"] for score in results["heldout"]}) == 1
    folder, checkpoint = tmp_path / "run" / "model", tmp_path / "run" / "checkpoint-8"
    for place in (folder, checkpoint):
        assert (place / "modeling_hybridlm.py").exists()
        assert "auto_map" in json.loads((place / "config.json").read_text())
        assert AutoTokenizer.from_pretrained(place)("é")["input_ids"] == list("é".encode())
    assert_same_bits(load_file(checkpoint / "model.safetensors"), weights(tmp_path / "run"))
    card = (folder / "README.md").read_text()
    assert f"{results['heldout'][0]['bits_per_byte']:.4f}" in card
    assert str(tmp_path) not in card
    assert json.loads((tmp_path / "run" / "results.json").read_text())["parameters"] == results["parameters"]
    assert "mixer_titans_mac.py" not in {path.name for path in folder.iterdir()}
    assert check_publishable(folder) == []
    stored = folder / "results"
    assert str(tmp_path) not in "".join(path.read_text() for path in stored.iterdir())
    assert load_run_file(stored / "run.yaml").training == run_content(corpus, tmp_path / "run")["training"]
    record = json.loads((stored / "training.json").read_text())
    record["heldout"][0]["bits_per_byte"] -= 0.5
    (stored / "training.json").write_text(json.dumps(record))
    assert "results/training.json: its hash" in check_publishable(folder)[0]


def test_the_leak_of_top_k_stands_beside_the_causal_rule_and_not_on_the_card(corpus, tmp_path):
    config = MODEL | {"spans": [{"name": "mixture_of_depths", "start": 0, "capacity": 0.25}]}
    evaluation = {"lengths": [32], "leaky_top_k": True}
    content = run_content(corpus, tmp_path / "run", model={"config": config}, evaluation=evaluation)
    results = run(content | {"training": content["training"] | {"max_steps": 2}})
    rules = results["heldout_by_rule"]
    assert list(rules) == ["causal", "top_k (leak)"]
    assert rules["causal"] == results["heldout"][0]
    assert rules["causal"]["bits_per_byte"] != rules["top_k (leak)"]["bits_per_byte"]
    assert f"rule top_k (leak): {rules['top_k (leak)']['bits_per_byte']:.4f}" in summarize(results)
    assert all("leak" not in path.read_text() for path in (tmp_path / "run" / "model").rglob("*.[jm][sd]*"))


def test_reload_check_notices_other_weights(corpus, tmp_path, monkeypatch):
    def save_other(model, tokenizer, folder):
        save_hub_folder(model, tokenizer, folder)
        with torch.no_grad():
            model.lm_head.weight += 1e-3

    monkeypatch.setattr("hybridlm.training.job.save_hub_folder", save_other)
    results = run(run_content(corpus, tmp_path / "run", publish={"check_reload": True}, training={"max_steps": 1}))
    assert "logits differ" in results["failures"][0]


def test_a_card_that_cannot_be_written_loses_nothing_that_was_measured(corpus, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise CardError("no card")

    monkeypatch.setattr("hybridlm.training.publish.prepare", refuse)
    content = run_content(corpus, tmp_path / "run", evaluation={"lengths": [32]}, training={"max_steps": 1})
    with pytest.raises(CardError, match="no card"):
        run(content)
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    monkeypatch.undo()
    results = run(content | {"overwrite": True})
    assert results.keys() - stored.keys() == {"seconds"}
    assert (stored["heldout"], stored["failures"]) == (results["heldout"], [])


def test_run_that_misses_its_demand_ends_with_status_one_and_says_why(corpus, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    evaluation = {"lengths": [32], "ngram_orders": [1], "below_ngram_order": 1}
    path.write_text(yaml.safe_dump(run_content(corpus, tmp_path / "run", evaluation=evaluation)))
    with pytest.raises(SystemExit) as stop:
        train(path, ["training.max_steps=1"])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "FAILED: held-out bits per byte" in said
    assert "order-1 byte model" in said


def test_finished_run_is_not_overwritten_unless_told(corpus, tmp_path):
    content = run_content(corpus, tmp_path / "run", training={"max_steps": 1})
    run(content)
    with pytest.raises(ValueError, match=r"output_dir: .*checkpoint-1"):
        run(content)
    with pytest.raises(ValueError, match="leaky_top_k"):  # refused for another reason: nothing is lost
        run(content | {"overwrite": True, "evaluation": {"lengths": [32], "leaky_top_k": True}})
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    run(content | {"overwrite": True})


def test_run_is_not_resumed_on_other_data_or_from_nothing(corpus, tmp_path):
    content = run_content(corpus, tmp_path / "run", training={"max_steps": 1})
    with pytest.raises(ValueError, match="holds no checkpoint"):
        run(content, resume=True)
    run(content)
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"data\.path: the documents are not those"):
        run(content, resume=True)


def test_pretrained_folder_is_fine_tuned_with_its_own_tokenizer(corpus, tmp_path):
    run(run_content(corpus, tmp_path / "first", training={"max_steps": 1}))
    folder = str(tmp_path / "first" / "model")
    content = run_content(corpus, tmp_path / "second", training={"max_steps": 2, "learning_rate": 0.0})
    run(content | {"model": {"pretrained": folder}, "tokenizer": folder})
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    bias = [name for name in first if name.endswith("selection_bias")]  # moves without a learning rate
    assert_same_bits(
        {n: t for n, t in first.items() if n not in bias}, {n: t for n, t in second.items() if n not in bias}
    )


def test_evaluation_during_training_is_recorded_in_bits_per_byte(corpus, tmp_path):
    training = {"eval_strategy": "steps", "eval_steps": 4}
    run(run_content(corpus, tmp_path / "run", training=training, evaluation={"lengths": [32]}))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_bits_per_byte" in line] == [4, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": "no/such/folder"}}, r"data\.path: 'no/such/folder' does not exist"),
        ({"data": {"length": 10_000_000}}, r"data\.length: 10000000 tokens are more than"),
        ({"publish": {"name": "my model"}}, r"publish\.name: 'my model': expected NAME or ORG/NAME"),
        ({"publish": {"facts": "jambo"}}, r"publish\.facts: facts: no 'jambo'"),
        ({"evaluation": {"below_ngram_order": 2}}, r"evaluation\.below_ngram_order: 2 is not among"),
        (
            {"evaluation": {"leaky_top_k": True, "lengths": [8]}},
            r"evaluation\.leaky_top_k: the model has no mixture_of_depths span",
        ),
        ({"data": {"streaming": True}, "evaluation": {"lengths": [8]}}, r"evaluation\.max_bytes: must be given"),
    ],
)
def test_run_that_cannot_start_says_which_field_is_wrong(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(run_content(corpus, tmp_path / "run", **changes))


@pytest.mark.parametrize(
    ("evaluation", "training", "message"),
    [
        ({"lengths": [32]}, {}, r"evaluation\.lengths: .*no document is held out: data\.heldout_modulus=5"),
        ({"lengths": None, "leaky_top_k": True}, {}, r"evaluation\.leaky_top_k: .*no document is held out"),
        (
            {"lengths": None, "ngram_orders": [1], "below_ngram_order": 1},
            {},
            r"evaluation\.ngram_orders: .* leave out evaluation\.ngram_orders and evaluation\.below_ngram_order",
        ),
        ({"lengths": [], "ngram_orders": [1]}, {}, r"evaluation\.ngram_orders: .*evaluation\.lengths is empty"),
        ({"lengths": []}, {"eval_strategy": "steps", "eval_steps": 1}, r"training\.eval_strategy: "),
    ],
)
def test_an_evaluation_that_has_no_text_is_refused_before_training(tmp_path, evaluation, training, message):
    path = tmp_path / "one.txt"
    path.write_text("one document " * 50)
    with pytest.raises(ValueError, match=message):
        run(run_content(path, tmp_path / "run", evaluation=evaluation, training=training))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_default_evaluation_without_text_is_left_out_and_said_so(tmp_path, caplog):
    path = tmp_path / "one.txt"
    path.write_text("one document " * 50)
    results = run(run_content(path, tmp_path / "run", evaluation={"lengths": None}, training={"max_steps": 1}))
    assert "heldout" not in results
    said = [record.message for record in caplog.records if "no document is held out" in record.message]
    assert len(said) == 1


def start(command, corpus, tmp_path, **environment):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_content(corpus, tmp_path / "run")))
    command = [sys.executable, *command, str(path), "training.max_steps=2"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "HF_DATASETS_CACHE": str(tmp_path / "cache")} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


def test_train_script_runs_as_plain_python(corpus, tmp_path):
    assert "2 steps" in start([str(ROOT / "train.py")], corpus, tmp_path)
    assert len(records(tmp_path / "run")) == 2


@pytest.mark.slow
def test_train_script_runs_under_accelerate_launch(corpus, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "train.py")]
    assert "2 steps" in start(launch, corpus, tmp_path)


@pytest.mark.slow
def test_train_script_runs_on_two_processes(corpus, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py")]
    said = start(launch, corpus, tmp_path)
    assert said.count("2 steps") == 1  # one process reports
    assert json.loads((tmp_path / "run" / "results.json").read_text())["training"]["rows_per_step"] == 8
