"""A folder is published only if it does what it says: every lie that was tried is refused with its reason."""

import json
import pickle
import re
import shutil

import pytest
import torch
from publish_folder import TOKEN, build, change_weight, edit, rehash, rewrite
from runtime_part import FadingPosition, LeakyMixer
from safetensors.torch import save_file

from hybridlm import MIXERS, HybridLMConfig, HybridLMForCausalLM, presets
from hybridlm.evaluation.loading import file_hash, folder_hash
from hybridlm.hub import folder as preparing
from hybridlm.hub.cards import LEDGER
from hybridlm.hub.folder import prepare
from hybridlm.hub.golden import GOLDEN, read_golden, write_golden
from hybridlm.hub.prune import prune_code, reachable, used_names
from hybridlm.hub.publish import check_publishable
from hybridlm.hub.verify import load_problems, verify
from hybridlm.modeling.registry import POSITIONS
from hybridlm.testing.report import Report, summary_json

TINY = [name for name in presets.preset_names() if name.startswith("tiny_")]


def test_a_folder_that_was_prepared_is_published(folder, cli):
    assert check_publishable(folder) == []
    said = cli("publish", folder, "--repo", "me/tiny", "--dry-run")
    assert said.exit_code == 0, said.output
    assert "dry run: all checks passed, nothing was uploaded" in said.output
    for path in ("README.md", "config.json", "model.safetensors", GOLDEN, LEDGER, "results/babi.json"):
        assert f"{file_hash(folder / path)[:16]}  {(folder / path).stat().st_size:>15,}  {path}" in said.output
    assert cli("verify", folder).exit_code == 0


def test_the_card_tells_the_results_and_their_files(folder):
    card = (folder / "README.md").read_text()
    assert "### Evaluation, suite babi" in card
    assert "| `chunks` | any split | ok |" in card
    assert f"| `results/babi.json` | `{file_hash(folder / 'results/babi.json')}` |" in card


def test_preparing_again_changes_nothing(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    prepare(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def card_line(folder, start):
    return next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith(start))


def edit_task_score(folder):
    line = card_line(folder, "| babi_qa1")
    edit(folder / "README.md", line, re.sub(r"\d\.\d\d\d ±", "0.975 ±", line, count=1))


def add_metric(folder):
    line = card_line(folder, "| babi_qa1")
    edit(folder / "README.md", line, f"{line}\n| mine | 256 | 2 | 0.990 ± 0.001 | – | 0.17 | 100 % |")


def index_metric(folder):
    edit(folder / "README.md", "  results:\n", INDEXED)


INDEXED = """  results:
  - task:
      type: text-generation
    dataset:
      type: mine
      name: mine
    metrics:
    - type: accuracy
      value: 0.99
"""


def forge(folder):
    """Point a figure of the card elsewhere, and print what stands there."""
    new = f"{json.loads((folder / 'results/plan.json').read_text())['layers'][0]['state_bytes']:,}"
    figures = json.loads((folder / LEDGER).read_text())["figures"]
    number, old = next((n, f[0]) for n, f in enumerate(figures) if f[3] == "/total/num_parameters")
    figures[number] = [new, "integer", "results/plan.json", "/layers/0/state_bytes"]
    rewrite(folder / LEDGER, lambda ledger: ledger.update(figures=figures))
    edit(folder / "README.md", old, new)


def forge_behind_another_template(folder):
    forge(folder)
    rewrite(folder / LEDGER, lambda ledger: ledger.update(template="0" * 64))


def cheaper_plan(folder):
    rewrite(folder / "results/plan.json", lambda plan: plan["total"].update(state_bytes=1))
    rehash(folder, "results/plan.json")


def other_model(folder):
    rewrite(folder / "results/babi.json", lambda found: found["model"].update(hash="0" * 64))
    rehash(folder, "results/babi.json")


def boasting_facts(folder):
    rewrite(folder / "results/facts.json", lambda facts: facts.update(limits="It fails in 1 % of all cases."))
    rehash(folder, "results/facts.json")


def empty_results(folder):
    (folder / "results/babi.json").write_text('{"kind": "eval"}')
    rehash(folder, "results/babi.json")


def cut_golden(folder):
    golden = read_golden(folder)
    tensors = {"input_ids": golden.input_ids, "positions": golden.positions[:0], "logits": golden.logits[:0]}
    said = json.dumps({"tolerance": golden.tolerance, "weights": golden.weights})
    save_file(tensors, folder / GOLDEN, metadata={"golden": said})
    rehash(folder, GOLDEN)


def drop_label(folder):
    edit(folder / "README.md", "at chance (", "(", -1)


REFUSED = {
    "number": (
        edit_task_score,
        r"README.md: line \d+: '\(0.975' stands where '\(0.\d+' of results/babi.json#/cells/0 is",
    ),
    "metric by hand": (add_metric, r"README.md: line \d+: '256' stands where"),
    "metric in the index": (index_metric, r"README.md: metadata /model-index/0/results/0/metrics/0/value: 0.99 stands"),
    "label": (drop_label, r"README.md: .*at chance|line \d+: .* stands where"),
    "sentence": (
        lambda f: edit(f / "README.md", "## Limits\n", "## Limits\n\nIt has 99 % of what matters.\n"),
        r"README.md: line \d+: '99' stands where|'99' has no source",
    ),
    "deleted results": (
        lambda f: (f / "results/babi.json").unlink(),
        r"results/babi.json: missing, and the card's numbers come from it",
    ),
    "list of nothing": (lambda f: (f / LEDGER).write_text("{}"), r"results/card.json, .* not as .*KeyError: 'name'"),
    "list that is none": (lambda f: (f / LEDGER).write_text("[]"), "results/card.json, .* not as .*TypeError"),
    "torn list": (lambda f: (f / LEDGER).write_text("{"), "results/card.json: not JSON"),
    "results of nothing": (
        lambda f: empty_results(f),
        r"results/babi.json#: form 'eval_command' does not take it: 'settings' is missing",
    ),
    "deleted list": (lambda f: (f / LEDGER).unlink(), r"results/card.json: missing, so no number of README.md has"),
    "no card": (lambda f: (f / "README.md").unlink(), "README.md: missing"),
    "results that the card lacks": (
        lambda f: shutil.copy(f / "results/babi.json", f / "results/more.json"),
        "results/more.json: no file that the card names",
    ),
    "wrong hash": (
        lambda f: rewrite(f / "results/babi.json", lambda found: found.update(seconds=1)),
        r"results/babi.json: its hash [0-9a-f]{12} is not [0-9a-f]{12}, which the card names",
    ),
    "figure that points elsewhere": (forge, "its figures are not those that a card of these files has"),
    "figure behind another template": (forge_behind_another_template, "was rendered from another template"),
    "metadata twice": (
        lambda f: edit(f / "README.md", "---\n", "---\nmodel-index: [{name: x, results: []}]\n"),
        "README.md: the metadata are no YAML: 'model-index' stands twice",
    ),
    "plan of another config": (cheaper_plan, "results/plan.json: is not what the planner says of config.json"),
    "number among the facts": (boasting_facts, "results/facts.json: limits: '1' holds a number; facts are words"),
    "results of another model": (other_model, r"results/babi.json: of a model with the hash 000000000000"),
    "changed weight": (change_weight, r"model.safetensors: its hash .* is not .*, stored with the golden logits"),
    "no golden logits": (lambda f: (f / GOLDEN).unlink(), f"{GOLDEN}: missing"),
    "pickle": (
        lambda f: torch.save({"lr": 1.0}, f / "training_args.bin"),
        r"training_args.bin: a pickle by its name \(.bin\); weights are published as safetensors only",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "there is no"),
    "metadata": (
        lambda f: edit(f / "README.md", "pipeline_tag: text-generation\n", ""),
        "README.md: metadata lack pipeline_tag",
    ),
    "secret": (
        lambda f: (f / "notes.txt").write_text(f"login: {TOKEN}\n"),
        "notes.txt, line 1: holds a Hugging Face token; remove it and revoke it",
    ),
    "hidden file": (lambda f: (f / ".env.txt").write_text("a"), r".env.txt: a hidden file"),
    "unknown kind": (lambda f: (f / "model.gguf").write_bytes(b"GGUF"), "model.gguf: not a kind of file"),
    "no text": (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe\x00a"), "merges.txt: not text"),
    "text of another encoding": (
        lambda f: (f / "merges.txt").write_bytes(f"login: {TOKEN}".encode("utf-16-le")),
        "merges.txt: not text",
    ),
    "torn archive": (
        lambda f: (f / "merges.txt").write_bytes(b"a" * 50 + b"PK\x05\x06" + b"\xff" * 16 + b"\0\0"),
        "merges.txt: an archive",
    ),
    "empty golden logits": (lambda f: cut_golden(f), f"{GOLDEN}: not readable: "),
    "torn weights": (lambda f: (f / "x.safetensors").write_bytes(b"1234567890"), "x.safetensors: no safetensors file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_is_refused_with_the_reason(folder, what):
    change, reason = REFUSED[what]
    change(folder)
    problems = check_publishable(folder, run=False)
    assert any(re.search(reason, problem) for problem in problems), problems


def test_a_refused_folder_ends_the_command_with_the_reason_and_exit_code_1(folder, cli):
    add_metric(folder)
    for command in (("publish", folder, "--repo", "me/tiny", "--dry-run"), ("verify", folder)):
        said = cli(*command)
        assert said.exit_code == 1
        assert "refused: README.md: line" in said.output


def test_words_may_be_edited(folder):
    edit(folder / "README.md", "## Intended use\n", "## Intended use\n\nFor everyone who asks.\n")
    assert check_publishable(folder, run=False) == []


def test_a_changed_weight_is_seen_by_its_logits_where_every_hash_was_made_to_fit(folder):
    golden = read_golden(folder)
    change_weight(folder)
    weights = {"model.safetensors": file_hash(folder / "model.safetensors")}
    tensors = {"input_ids": golden.input_ids, "positions": golden.positions, "logits": golden.logits}
    said = json.dumps({"tolerance": golden.tolerance, "weights": weights})
    save_file(tensors, folder / GOLDEN, metadata={"golden": said})
    rehash(folder, GOLDEN)
    problems = verify(folder)
    assert any(problem.startswith(f"{GOLDEN}: the logits differ by") for problem in problems), problems
    assert any("of a model with the hash" in problem for problem in problems)


def test_golden_logits_hold_in_bfloat16_within_its_own_tolerance(folder):
    assert verify(folder, dtype="bfloat16") == []
    with pytest.raises(ValueError, match="dtype: 'int8' has no tolerance"):
        verify(folder, dtype="int8")


def test_code_of_a_folder_with_a_pickle_is_never_run(folder):
    (folder / "registry.py").write_text("raise SystemExit\n")
    (folder / "a.pkl").write_bytes(pickle.dumps({}))
    assert verify(folder) == ["a.pkl: a pickle by its name (.pkl); weights are published as safetensors only"]


def test_a_card_of_results_that_do_not_belong_is_refused(folder, tmp_path, cli):
    found = json.loads((folder / "results/babi.json").read_text())
    found["model"]["hash"] = "1" * 64
    (tmp_path / "other.json").write_text(json.dumps(found))
    report = summary_json([Report("llama", [], dtype="fp64")], "hybridlm check llama")
    (tmp_path / "check.json").write_text(report)
    before = (folder / "README.md").read_text()
    for arguments, reason in (
        (("--results", tmp_path / "other.json"), "other.json: of a model with the hash 111111111111"),
        (("--results", tmp_path / "check.json"), "check.json: a check of 'llama', expected one of ['tiny']"),
        (("--results", tmp_path / "nowhere"), "nowhere does not exist"),
        (("--results", folder), "holds no results of eval, check, race, training"),
        (("--facts", "jambo"), "facts: no 'jambo'"),
        (("--name", "my model"), "--name: 'my model': expected NAME or ORG/NAME"),
    ):
        said = cli("card", folder, *arguments)
        assert said.exit_code == 2, said.output
        assert reason in said.output
        assert (folder / "README.md").read_text() == before


def test_the_weights_are_hashed_once_for_all_results(folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(preparing, "folder_hash", lambda *given: hashed.append(given) or folder_hash(*given))
    shutil.copy(folder / "results/babi.json", folder / "results/more.json")
    prepare(folder)
    assert (len(hashed), hashed[0][0]) == (1, folder)


def test_the_card_of_a_preset_is_printed(cli, tmp_path):
    said = cli("card", "jamba")
    assert said.exit_code == 0, said.output
    assert "# jamba" in said.output
    assert "Nothing has been measured." in said.output
    assert cli("card", "tiny_jamba", "--out", tmp_path / "card.md").exit_code == 0
    assert "tiny sibling" in (tmp_path / "card.md").read_text()


def test_pruned_code_is_what_the_config_uses_and_a_part_of_the_users_stays(tmp_path):
    MIXERS["leaky"], POSITIONS["fading"] = LeakyMixer, FadingPosition
    try:
        specs = {"a": {"mixer": {"name": "leaky"}, "channel_mixer": {"name": "mlp"}}}
        config = HybridLMConfig(layer_specs=specs, num_hidden_layers=1, hidden_size=32, vocab_size=48)
        model = HybridLMForCausalLM(config).eval()
        model.save_pretrained(tmp_path / "leaky")
        prune_code(tmp_path / "leaky", json.loads((tmp_path / "leaky/config.json").read_text()))
        write_golden(tmp_path / "leaky", model)
        assert load_problems(tmp_path / "leaky", read_golden(tmp_path / "leaky")) == []
    finally:
        del MIXERS["leaky"], POSITIONS["fading"]
    names = {path.stem for path in (tmp_path / "leaky").glob("*.py")}
    assert names == reachable(tmp_path / "leaky")
    assert {"runtime_part", "channel_mlp"} <= names
    assert not names & {"mixer_mamba", "mixer_titans_mac", "neural_memory", "channel_swiglu", "span_token_merging"}


def dry_run(name, root):
    """Build a preset with random weights, and publish it without a Hub."""
    folder = root / name
    build(name, folder)
    before = {path.stem for path in folder.glob("*.py")}
    prepare(folder)
    assert check_publishable(folder) == [], name
    after = {path.stem for path in folder.glob("*.py")}
    used = used_names(json.loads((folder / "config.json").read_text()))
    kinds = ("mixer", "channel", "span", "residual", "position")
    kept = {stem.split("_", 1)[1] for stem in after if stem.split("_", 1)[0] in kinds and "_" in stem}
    assert kept - {"attention", "moe"} <= used, name  # the backbone itself looks for these two
    assert after < before


@pytest.mark.parametrize("name", ["tiny_titans_mac", "tiny_everything"])
def test_a_dry_run_of_a_zoo_model_passes(name, tmp_path):
    dry_run(name, tmp_path)


@pytest.mark.slow
def test_a_dry_run_of_every_zoo_model_passes(tmp_path):
    for name in TINY:
        dry_run(name, tmp_path)
        shutil.rmtree(tmp_path / name)


def test_the_code_of_one_folder_is_not_taken_for_that_of_another_of_its_name(folder):
    golden = read_golden(folder)
    assert load_problems(folder, golden) == []
    edit(folder / "modeling_hybridlm.py", "import torch\n", "import torch\n\nraise RuntimeError('other code')\n")
    problems = load_problems(folder, golden)  # last in this file: it ends the process that the tests share
    assert problems[0].startswith("it does not load where hybridlm is not installed: in another process: ")
    assert "other code" in problems[0]
