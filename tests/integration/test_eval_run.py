"""`hybridlm eval` on saved folders: what it writes, that it goes on after a kill, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lookup_model import LookupConfig, LookupForCausalLM
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hybridlm import HybridLMForCausalLM, presets
from hybridlm.cli import app
from hybridlm.data import build_byte_tokenizer
from hybridlm.evaluation import Evaluated, Settings, evaluate
from hybridlm.evaluation.suites import LENGTHS, text_tasks
from hybridlm.evaluation.tables import markdown, rows

ROOT = Path(__file__).resolve().parents[2]

SIZES = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = ("--samples", 2, "--generated", 1)
VOLATILE = {"seconds", "date"}


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def saved(model, folder, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        build_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=64, max_position_embeddings=256, **SIZES))
    return saved(model, tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    torch.manual_seed(0)
    model = HybridLMForCausalLM(presets.load_config("tiny_llama"))
    return saved(model, tmp_path_factory.mktemp("ours") / "model")


def lasting(value):
    """Without times and dates."""
    if isinstance(value, dict):
        return {name: lasting(item) for name, item in value.items() if name not in VOLATILE}
    return [lasting(item) for item in value] if isinstance(value, list) else value


def test_every_suite_runs_on_a_folder_of_ours_and_says_all_about_itself(ours, tmp_path):
    result = run(ours, "--suite", "all", "--out", tmp_path, *SMALL, "--lengths", "256", "--text", ROOT / "README.md")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "all.json").read_text())
    names = {cell["task"] for cell in found["cells"]}
    assert names == {*text_tasks("all"), "bits_per_byte"}
    for name in ("hash", "parameters", "trained_length", "tokenizer_hash", "dtype", "device"):
        assert found["model"][name] is not None
    assert {"torch", "transformers", "hybridlm", "python"} <= set(found["versions"])
    scored = [cell for cell in found["cells"] if cell["status"] == "scored"]
    assert len(scored) > 20
    for cell in scored:
        assert set(cell["gold"].values()) <= {0, 1}
        assert cell["num_documents"] >= 1
        if "likelihood" in cell:
            assert cell["gold"] == {"likelihood": 1, "generated": 1}
            assert cell["tokens"]["most"] <= cell["length"]
            assert {"score", "error", "chance", "num", "above_chance"} <= set(cell["likelihood"])
    for cell in found["cells"]:
        assert cell["status"] == "scored" or "tokens with its answer, length=256 is too short" in cell["reason"]
    lengths = [cell["length"] for cell in found["cells"] if cell["task"] == "bits_per_byte"]
    assert lengths == [256, 512, 1024, 2048, 4096, 8192]
    assert any("questions: no local data" in reason for reason in found["skipped"])
    assert "at chance" in result.stdout
    assert (tmp_path / "all.md").read_text() == markdown(found)


def test_a_folder_of_transformers_runs_at_the_lengths_that_it_was_trained_for(llama, tmp_path):
    result = run(llama, "--suite", "babi", "--out", tmp_path, *SMALL)
    assert result.exit_code == 0, result.stderr
    cells = json.loads((tmp_path / "babi.json").read_text())["cells"]
    assert {cell["length"] for cell in cells} == {length for length in LENGTHS if length <= 256}
    assert run(llama, "--suite", "babi", "--out", tmp_path / "far", *SMALL, "--beyond", 2).exit_code == 0
    cells = json.loads((tmp_path / "far" / "babi.json").read_text())["cells"]
    assert {cell["length"] for cell in cells if cell.get("beyond_training")} == {512}


def test_haystack_and_questions_are_named_in_the_results(llama, tmp_path):
    qa = tmp_path / "qa.jsonl"
    qa.write_text(json.dumps({"question": "Who?", "answers": ["Ida"], "paragraphs": ["It was Ida."]}))
    options = ("--haystack", "stdlib", "--questions", qa, "--lengths", 256, "--no-generate")
    assert run(llama, "--suite", "ruler", "--out", tmp_path / "out", *SMALL, *options).exit_code == 0
    cells = json.loads((tmp_path / "out" / "ruler.json").read_text())["cells"]
    by_name = {cell["task"]: cell for cell in cells if cell["status"] == "scored"}
    assert by_name["niah_single_2"]["haystack"] == "stdlib"
    assert len(by_name["niah_single_2"]["haystack_hash"]) == 64
    assert by_name["niah_single_1"]["haystack"] == "noise"
    assert by_name["questions"]["num_documents"] == 2
    assert "generated" not in by_name["niah_single_2"]


# -- being stopped -------------------------------------------------------------------------------------------------


def command(model, out):
    return [sys.executable, str(ROOT / "eval" / "run.py"), str(model), "--suite", "babi", "--lengths", "230,256",
            "--out", str(out), *map(str, SMALL)]  # fmt: skip


@pytest.mark.parametrize("num_cells", [1, 4])
def test_a_killed_run_that_is_started_again_gives_the_same_results(llama, tmp_path, num_cells):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(*command(llama, whole)[2:]).exit_code == 0
    process = subprocess.Popen(command(llama, stopped), cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and len(list(stopped.glob("cells/*.json"))) < num_cells:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.read_bytes() for path in stopped.glob("cells/*.json")}
    assert len(kept) >= num_cells
    assert run(*command(llama, stopped)[2:]).exit_code == 0
    before, after = (json.loads((folder / "babi.json").read_text()) for folder in (whole, stopped))
    assert lasting(after) == lasting(before)
    assert all(path.read_bytes() == text for path, text in kept.items()), "a finished cell was computed again"


def test_a_cell_that_was_half_written_is_no_cell(llama, tmp_path):
    assert run(llama, "--suite", "babi", "--out", tmp_path, *SMALL).exit_code == 0
    first = json.loads((tmp_path / "babi.json").read_text())
    path = next(tmp_path.glob("cells/babi_qa1-*.json"))
    path.rename(path.with_name(f".{path.name}.1.partial"))
    (tmp_path / "babi.json").unlink()
    assert run(llama, "--suite", "babi", "--out", tmp_path, *SMALL).exit_code == 0
    assert lasting(json.loads((tmp_path / "babi.json").read_text())) == lasting(first)


def test_cells_serve_other_suites_and_lengths_of_the_same_model(llama, tmp_path):
    assert run(llama, "--suite", "babi", "--out", tmp_path, *SMALL).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*")}
    assert run(llama, "--suite", "all", "--out", tmp_path, *SMALL, "--text", ROOT / "README.md").exit_code in (0, 2)
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items() if path.exists())


def test_results_of_another_run_are_not_written_over(llama, ours, tmp_path):
    assert run(llama, "--suite", "babi", "--out", tmp_path, *SMALL).exit_code == 0
    kept = (tmp_path / "babi.json").read_bytes()
    for model, options, differs in ((ours, (), "model"), (llama, ("--seed", 1), "settings")):
        result = run(model, "--suite", "babi", "--out", tmp_path, *SMALL, *options)
        assert result.exit_code == 2
        assert f"holds results of another run, which differs in {differs}" in result.stderr
        assert (tmp_path / "babi.json").read_bytes() == kept


# -- synthetic tasks of the model itself ---------------------------------------------------------------------------


def lookup_with_task(tmp_path, **task):
    model = saved(LookupForCausalLM(LookupConfig(vocab_size=64)).eval(), tmp_path / "model", tokenizer=False)
    (model / "task.json").write_text(json.dumps(task))
    return Evaluated(LookupForCausalLM(LookupConfig(vocab_size=64)).eval(), None, "lookup", model)


def test_a_model_without_tokenizer_is_scored_on_its_own_task(tmp_path):
    found = lookup_with_task(tmp_path, task="mad_in_context_recall", length=32, options={"vocabulary_size": 32})
    results = evaluate(found, Settings(suite="recall", samples=20, generated=0), tmp_path / "out")
    assert [cell["length"] for cell in results["cells"]] == [32, 64, 128]
    for cell in results["cells"]:
        assert cell["task"] == "own_mad_in_context_recall"
        assert cell["likelihood"]["score"] == 1
        assert cell["likelihood"]["above_chance"]
    assert results["skipped"] == ["all other tasks of suite 'recall': the folder has no tokenizer"]
    assert all(len(row) == 7 for row in rows(results))


def test_lengths_are_refused_where_they_would_change_nothing(tmp_path):
    found = lookup_with_task(tmp_path, task="mad_in_context_recall", length=32, options={"vocabulary_size": 32})
    with pytest.raises(ValueError, match="--lengths: .* has a task of its own"):
        evaluate(found, Settings(suite="recall", lengths=(4096,), samples=20, generated=0), tmp_path / "out")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"task": "mqar"}, "must hold task, length and options"),
        ({"task": "mqar", "length": "64", "options": {}}, "must hold task"),
        ({"task": "nosuch", "length": 64, "options": {}}, "task: unknown 'nosuch'"),
        ({"task": "mqar", "length": 64, "options": {}}, "has symbol 12[78], the model's vocabulary 64 tokens"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(tmp_path, task, message):
    found = lookup_with_task(tmp_path, **task)
    with pytest.raises(ValueError, match=message):
        evaluate(found, Settings(suite="recall", samples=20, generated=0), tmp_path / "out")


# -- mistakes of the user ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "rulr"), "--suite: unknown 'rulr', expected one of ['recall', 'ruler', 'babi', 'length', 'all']"),
        (("--lengths", "0"), "--lengths: 0 is not allowed, expected 1 to 256"),
        (("--lengths", "256,257"), "--lengths: 257 is not allowed, expected 1 to 256"),
        (("--suite", "length", "--lengths", "8193"), "--lengths: 8193 is not allowed, expected 1 to 8192"),
        (("--lengths", "many"), "--lengths: 'many' is no list of whole numbers"),
        (("--lengths", "40"), "--lengths: nothing fits"),
        (("--beyond", "0"), "--beyond: 0 must be at least 1"),
        (("--samples", "1"), "--samples: 1 must be at least 2"),
        (("--seed", "-1"), "--seed: -1 must be at least 0"),
        (("--haystack", "essays"), "haystack: unknown 'essays', expected one of ['sentences', 'noise', 'stdlib']"),
        (("--questions", "nowhere.jsonl"), "--questions: nowhere.jsonl does not exist"),
        (("--text", "nowhere.txt"), "--text: nowhere.txt does not exist"),
        (("--dtype", "int4"), "dtype: unknown 'int4', expected one of"),
    ],
)
def test_a_wrong_option_is_one_line_that_says_what_is_allowed(llama, tmp_path, options, message):
    given = options if "--suite" in options else ("--suite", "babi", *options)
    samples = () if "--samples" in options else SMALL
    result = run(llama, "--out", tmp_path, *samples, *given)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.json"))


def test_folders_that_hold_no_model_are_refused(tmp_path, llama):
    assert "no config.json" in run(tmp_path / "nowhere", "--out", tmp_path / "out").stderr
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text((llama / "config.json").read_text())
    assert "has no weights" in run(config, "--out", tmp_path / "out").stderr


def test_a_missing_tokenizer_is_refused_with_what_to_do(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=64, **SIZES))
    result = run(saved(model, tmp_path / "model", tokenizer=False), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "has none (tokenizer.json); save the model's tokenizer into the folder" in result.stderr


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=64, **(SIZES | {"vocab_size": 100})))
    result = run(saved(model, tmp_path / "model"), "--out", tmp_path / "out")
    assert "has token 257, but the model's vocabulary has 100 tokens" in result.stderr


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(intermediate_size=64, **SIZES)
    result = run(saved(BertForMaskedLM(config), tmp_path / "model"), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "is an encoder: its tokens see later ones" in result.stderr


def test_a_model_that_cannot_generate_is_refused_and_scored_by_likelihood_alone(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "can_generate", classmethod(lambda cls: False))
    result = run(llama, "--suite", "babi", "--out", tmp_path, *SMALL)
    assert result.exit_code == 2
    assert "(LlamaForCausalLM) cannot generate; --no-generate scores by likelihood alone" in result.stderr
    assert run(llama, "--suite", "babi", "--out", tmp_path, *SMALL, "--no-generate").exit_code == 0


def test_a_table_of_positions_ends_where_it_ends(tmp_path):
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2, n_positions=256)
    folder = saved(GPT2LMHeadModel(config), tmp_path / "model")
    result = run(folder, "--suite", "babi", "--beyond", 2, "--out", tmp_path / "out", *SMALL)
    assert "--beyond: 2 must be 1 for model: its table of positions ends at 256" in result.stderr
    assert "expected 1 to 256" in run(folder, "--lengths", 300, "--out", tmp_path / "out", *SMALL).stderr
    assert run(folder, "--suite", "babi", "--out", tmp_path / "out", *SMALL).exit_code == 0


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_runs(llama, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run(llama, "--out", out, *SMALL)
        assert result.exit_code == 2
        assert f"--out: {out} is no folder that can be written to" in result.stderr
    assert (tmp_path / "file").read_text() == "kept"
