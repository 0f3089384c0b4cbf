"""The runner that comparisons share: processes, files, and what it says when a process is killed."""

import json
import logging
import os
import signal
from argparse import ArgumentParser
from functools import partial

import pytest

from hybridlm.evaluation import runs

LOGGER = logging.getLogger("test_runs")


def killed(arm, seed):
    if (arm, seed) == ("b", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"arm": arm, "seed": seed, "threads": os.environ["OMP_NUM_THREADS"]}


def fine(arm, seed):
    return {"arm": arm, "seed": seed, "threads": os.environ["OMP_NUM_THREADS"]}


def test_arms_come_in_order_from_processes_of_one_thread_and_a_killed_one_ends_all_with_the_reason(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = runs.run_all(fine, ["b", "a"], 2, 1, LOGGER)
    assert [(run["arm"], run["seed"]) for run in found] == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]
    assert {run["threads"] for run in found} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    with pytest.raises(ChildProcessError, match=r"a process was killed, with [01] of 4 runs finished"):
        runs.run_all(killed, ["a", "b"], 2, 1, LOGGER)


def test_a_file_of_another_hash_is_run_again_and_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "a-0.json"
    first = runs.finish_run(lambda: {"hash": "1", "value": 1}, path, "1", "a", LOGGER)
    assert json.loads(path.read_text()) == first
    assert runs.finish_run(partial(pytest.fail, "ran again"), path, "1", "a", LOGGER) == first
    assert runs.finish_run(lambda: {"hash": "2", "value": 2}, path, "2", "a", LOGGER)["value"] == 2

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        runs.finish_run(lambda: {"hash": "3"}, path, "3", "a", LOGGER)
    assert json.loads(path.read_text())["hash"] == "2"


def test_results_are_json_with_a_line_a_run(tmp_path):
    path = tmp_path / "out" / "results.json"
    runs.write_results(path, {"kind": "race"}, [{"arm": "a"}, {"arm": "b"}])
    assert json.loads(path.read_text()) == {"kind": "race", "runs": [{"arm": "a"}, {"arm": "b"}]}
    assert sum('"arm"' in line for line in path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--arms", "a,c"], "--arms: unknown 'c', expected some of ['a', 'b']"),
        (["--seeds", "0"], "--seeds: 0, expected at least 1"),
        (["--jobs", "0"], "--jobs: 0, expected at least 1"),
        (["--quick"], "--quick: give --out"),
    ],
)
def test_a_wrong_command_line_is_refused(given, message, capsys):
    parser = ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    for name in ("--arms", "--out"):
        parser.add_argument(name)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int)
    with pytest.raises(SystemExit):
        runs.check_arguments(parser, parser.parse_args(given), ["a", "b"], ["a"], ["a", "b"])
    assert message in capsys.readouterr().err
