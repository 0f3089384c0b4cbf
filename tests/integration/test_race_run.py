"""`hybridlm race` from its command line: what it writes, that it goes on after a kill, and what it refuses."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hybridlm.cli import app
from hybridlm.race import race_names

ROOT = Path(__file__).resolve().parents[2]
VOLATILE = {"seconds", "process_seconds", "date"}
RACE = {
    "title": "a race that is over in seconds",
    "task": {
        "name": "mqar",
        "length": 12,
        "options": {"num_pairs": 3, "num_keys": 6, "num_values": 6, "gap_power": 1.0, "show_answers": True},
    },
    "model": {
        "vocab_size": 13,
        "hidden_size": 32,
        "channel_mixer": {"name": "swiglu", "intermediate_size": 32},
        "fields": {"embedding_std": 0.4},
    },
    "parts": {
        "C": {"name": "attention", "num_heads": 2, "conv_kernel": 3},
        "E": {"name": "ema_memory"},
    },
    "arms": {"attention": {"layers": "CC", "about": "with a convolution"}, "sum": {"layers": "EE"}},
    "match": {"what": "parameters", "tolerance": 0.02},
    "training": {"steps": 75, "learning_rate": 0.01, "warmup_steps": 10, "batch_size": 32},
    "reading": {"steps": [50], "lengths": [24], "every": 25, "rows": 64},
    "seeds": 2,
    "ordering": {
        "claim": "Attention finds keys, a sum does not.",
        "demands": [{"arm": "attention", "least": 0.95}, {"arm": "attention", "above": "sum", "by": 0.3}],
    },
}


def run(*arguments):
    return CliRunner().invoke(app, ["race", *map(str, arguments)])


def written(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(RACE | changes))
    return path


def lasting(value):
    """Without times and dates."""
    if isinstance(value, dict):
        return {name: lasting(item) for name, item in value.items() if name not in VOLATILE}
    return [lasting(item) for item in value] if isinstance(value, list) else value


def run_here(finish, arms, seeds, jobs, logger):
    """In place of `run_all`: without a process, which would take its time to start."""
    return [finish(arm, seed) for arm in arms for seed in range(seeds)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed race, and what it printed."""
    folder = tmp_path_factory.mktemp("a race")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybridlm.race.race.run_all", run_here)
        result = run(written(folder), "--out", folder / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    return folder / "out", result.stdout


def test_a_race_writes_what_every_arm_reached_and_says_whether_the_ordering_shows(whole):
    out, printed = whole
    found = json.loads((out / "race.json").read_text())
    assert (found["kind"], found["name"], found["matched"]) == ("race", "small", "parameters")
    assert found["task"] == {"task": "mqar", "length": 12, "options": RACE["task"]["options"]}
    assert found["chance"] == pytest.approx(1 / 3 + 2 / 3 / 6, abs=1e-5)
    assert found["recipe"]["training"]["learning_rate"] == 0.01
    assert found["recipe"]["arms"]["sum"]["config"]["layer_layout"] == ["E", "E"]
    assert {"processor", "torch", "transformers", "hybridlm", "python"} <= set(found["machine"])
    assert set(found["arms"]) == {"attention", "sum"}
    for arm in found["arms"].values():
        assert arm["seeds"] == [0, 1]
        assert list(arm["at"]) == ["50", "75"]
        assert list(arm["lengths"]) == ["12", "24"]
        assert [step for step, _, _ in arm["curve"]] == [25, 50, 75]
        assert arm["at"]["75"] == {key: arm["lengths"]["12"][key] for key in arm["at"]["75"]}
        assert min(arm[name] for name in ("parameters", "state_bytes", "flops_per_token")) > 0
    assert found["ordering"]["shows"], found["ordering"]["why"]
    assert found["arms"]["attention"]["steps_to"]["seeds"] != [None, None]
    for said in (
        "cosine down to 0.1", "U(+-1/sqrt(fan_in))", "seeds: 0, 1", "speed of learning", "step 50", "step 75",
        "The known ordering shows", "attention: ", *found["summary"],
    ):  # fmt: skip
        assert said in printed
    assert len(found["runs"]) == 4


def test_the_plots_are_pictures_or_said_to_be_missing(whole):
    pytest.importorskip("matplotlib")
    for name in ("accuracy_by_state.png", "accuracy_by_length.png", "curves.png"):
        assert (whole[0] / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_line_says_so_and_no_old_plot_stays(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "curves.png").write_bytes(b"old")
    for path in (whole[0] / "runs").iterdir():
        (out / "runs" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr("hybridlm.race.race.run_all", run_here)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(written(tmp_path), "--out", out, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert "the plot needs matplotlib" in result.stdout
    assert not list(out.glob("*.png"))
    before, after = (json.loads((folder / "race.json").read_text()) for folder in (whole[0], out))
    assert lasting(after) == lasting(before)


def test_the_winner_is_scored_on_its_own_task_by_the_command_that_is_printed(whole):
    out = whole[0]
    best = json.loads((out / "race.json").read_text())["winner"]
    task = json.loads((out / "winner" / "task.json").read_text())
    assert (best["arm"], task["task"], task["length"]) == ("attention", "mqar", 12)
    command = shlex.split(whole[1].split("`")[-2])  # the printed one, as it is
    assert command[0] == "hybridlm"
    assert str(out) in command[2]
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    cells = json.loads((out / "winner_eval" / "recall.json").read_text())["cells"]
    assert [cell["length"] for cell in cells] == [12]
    assert cells[0]["likelihood"]["score"] >= 0.95


# -- being stopped -------------------------------------------------------------------------------------------------


def ended(group):
    """Whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_killed_race_that_is_started_again_gives_the_same_results(whole, tmp_path, monkeypatch):
    path, out = written(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "hybridlm.cli", "race", str(path), "--out", str(out), "--jobs", "1"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and not list(out.glob("runs/*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.read_bytes() for path in out.glob("runs/*.json")}
    assert 1 <= len(kept) < 4
    deadline = time.monotonic() + 60
    while not ended(process.pid):  # the child has nobody left to work for
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setattr("hybridlm.race.race.run_all", run_here)
    assert run(path, "--out", out, "--jobs", 1).exit_code == 0
    before, after = (json.loads((folder / "race.json").read_text()) for folder in (whole[0], out))
    assert lasting(after) == lasting(before)
    assert all(path.read_bytes() == text for path, text in kept.items()), "a finished run was run again"
    weights = [(folder / "winner" / "model.safetensors").read_bytes() for folder in (whole[0], out)]
    assert weights[0] == weights[1]


# -- mistakes of the user ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("defualt",), "defualt: no such race, file or folder; did you mean one of ['default']?"),
        ((), "FILE: missing, expected a path or one of ['default', "),
        (("default", "--jobs", "0"), "--jobs: 0, expected at least 1"),
        (("default", "--seeds", "0"), "--seeds: 0, expected at least 1"),
    ],
)
def test_a_wrong_command_is_one_line_that_says_what_is_allowed(tmp_path, arguments, message):
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not (tmp_path / "out" / "race.json").exists()


def test_an_arm_that_cannot_be_matched_is_named_with_its_file(tmp_path):
    match = {"what": "state_bytes", "of": "attention"}
    result = run(written(tmp_path, match=match), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{tmp_path / 'small.yaml'}: arms.sum: cannot be matched to" in result.stderr


def test_results_of_another_race_are_not_written_over_and_a_file_is_no_folder(whole, tmp_path):
    out = whole[0]
    kept = (out / "race.json").read_bytes()
    result = run(written(tmp_path, seeds=1), "--out", out)
    assert result.exit_code == 2
    assert "holds the results of another race or recipe; choose another folder" in result.stderr
    assert (out / "race.json").read_bytes() == kept
    (tmp_path / "file").write_text("kept")
    result = run(written(tmp_path), "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "is no folder that can be written to" in result.stderr
    assert result.stdout == ""


def test_a_quick_run_and_a_full_one_do_not_share_a_folder(whole, tmp_path, monkeypatch):
    out = whole[0]
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = run(written(tmp_path), "--quick", "--out", out)
    assert result.exit_code == 2
    assert f"--out: {out} holds the results of a full race, and this is a quick run; choose another" in result.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
    monkeypatch.setattr("hybridlm.race.race.run_all", run_here)
    short = RACE["training"] | {"steps": 4, "warmup_steps": 1, "batch_size": 2}
    path = written(tmp_path, training=short, reading=RACE["reading"] | {"steps": [2], "lengths": []})
    result = run(path, "--quick", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "no verdict, a quick run" in result.stdout
    found = json.loads((tmp_path / "out" / "race.json").read_text())
    assert (found["title"], found["ordering"]["shows"]) == (f"{RACE['title']} (quick)", None)
    result = run(path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    said = f"--out: {tmp_path / 'out'} holds the results of a quick run, and this is a full race; choose another folder"
    assert said in result.stderr
    assert json.loads((tmp_path / "out" / "race.json").read_text()) == found


def test_the_races_of_the_package_are_listed():
    result = run("--list")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == race_names()
    assert {"default", "mixers", "attention_ratio", "positions", "routing", "memory"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", race_names())
def test_every_race_of_the_package_runs_quickly(name, tmp_path):
    result = run(name, "--quick", "--out", tmp_path, "--jobs", 2)
    assert result.exit_code == 0, result.output
    assert "A quick run" in result.stdout
    assert json.loads((tmp_path / "race.json").read_text())["recipe"]["quick"] is True
