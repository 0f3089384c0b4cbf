"""The memory comparison: its models, how it trains and how its scores are read."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
import memory  # noqa: E402
import memory_arms as arms  # noqa: E402
import memory_report as report  # noqa: E402
import memory_run as runs  # noqa: E402

SETTINGS = replace(
    arms.QUICK, hidden_size=32, num_heads=2, num_parameters=40_000, stages=((32, 4, 2),), passkey=(24, 4, 1),
    test_lengths=(40, 48), test_rows=6, test_piece=20,
)  # fmt: skip


@pytest.mark.parametrize("arm", arms.ARMS)
def test_arms_have_equal_parameters(arm):
    settings = arms.Settings()
    assert arms._outline(arms.build_config(arm, settings)).num_parameters() == pytest.approx(130_000, rel=0.005)


@pytest.mark.parametrize(
    ("arm", "more"),
    [
        ("lmm-frozen", 0),
        ("mamba2", 0),
        ("mag", 7 * 2 * 64 * 4),  # its own window
        ("mal", 7 * 2 * 64 * 4),
    ],
)
def test_states_are_as_large_as_that_of_the_memory_but_for_a_window(arm, more):
    settings = arms.Settings()
    assert arms.row_state_bytes(arm, settings) == arms.row_state_bytes("lmm", settings) + more


def test_right_answers_are_predicted_by_the_token_before():
    targets = runs.targets_of(torch.tensor([[-100, 3, -100, 1]]))
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 0, 2, 1]]), 4).float()
    assert targets.tolist() == [[3, -100, 1, -100]]
    assert runs.right(logits, targets).tolist() == [True, False]


@pytest.mark.parametrize("arm", arms.ARMS)
@pytest.mark.parametrize("task", runs.TASKS)
def test_rows_read_by_pieces_have_the_scores_of_whole_rows(arm, task):
    model = arms.build_model(arm, SETTINGS, seed=0).eval()
    rows = runs.rows_of(task, 8, 60, SETTINGS, seed=0)
    with torch.no_grad():
        whole = runs.right(model(input_ids=rows.input_ids).logits, runs.targets_of(rows.labels))
    assert sum(runs.right_by_pieces(model, rows, 13).tolist()) == whole.sum()


def test_two_steps_of_an_arm_give_the_same_scores_again():
    first, again = (runs.run("lmm", SETTINGS, seed=0) for _ in range(2))
    for scores in (first["scores"], again["scores"]):
        for score in (score for of_task in scores.values() for score in of_task.values()):
            del score["process_seconds"]
    assert first["scores"] == again["scores"]
    assert [(stage["task"], stage["steps"]) for stage in first["stages"]] == [("recall", 2), ("passkey", 1)]
    assert {length: score["answers"] for length, score in first["scores"]["recall"].items()} == {"40": 48, "48": 48}
    assert {length: score["answers"] for length, score in first["scores"]["passkey"].items()} == {"40": 18, "48": 18}


def test_a_finished_run_is_used_again_and_only_with_its_settings(tmp_path, monkeypatch):
    path = tmp_path / "window-0.json"
    first = memory.finish_run("window", SETTINGS, 0, path)
    assert json.loads(path.read_text()) == first
    assert not list(tmp_path.glob("*.partial"))
    arms.build_config.cache_clear()  # as in a new process: building a model writes out its config's options
    monkeypatch.setattr(memory, "run", lambda *_: pytest.fail("ran again"))
    assert memory.finish_run("window", SETTINGS, 0, path) == first
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        memory.finish_run("window", replace(SETTINGS, learning_rate=1e-3), 0, path)


def test_a_stage_ends_when_it_is_solved(monkeypatch):
    trainee = runs.Trainee("window", replace(SETTINGS, patience=3), seed=0)
    monkeypatch.setattr(trainee, "step", lambda rows: 1.0)
    assert trainee.stage("recall", 0, 32, 2, 10)["steps"] == 3
    monkeypatch.setattr(trainee, "step", lambda rows: 0.9)
    assert trainee.stage("recall", 0, 32, 2, 10) | {"process_seconds": 0} == {
        "task": "recall", "length": 32, "rows": 2, "max_steps": 10, "steps": 10, "accuracy": 0.9, "process_seconds": 0,
    }  # fmt: skip


def score(*shares):
    return report.read_out([{"right": round(1000 * share), "answers": 1000} for share in shares], 1 / 32)


def test_scores_have_the_error_of_their_seeds_and_are_marked_at_chance():
    assert score(0.2, 0.3, 0.4)["mean"] == 0.3
    assert score(0.2, 0.3, 0.4)["standard_error"] == pytest.approx(0.1 / 3**0.5, abs=1e-4)
    assert score(0.9)["standard_error"] is None
    assert score(0.9)["above_chance"]
    assert not score(0.035, 0.03, 0.034)["above_chance"]  # less than a guess strays
    assert not score(0.01, 0.01, 0.6)["above_chance"]  # one lucky seed
    assert score(0.06, 0.061, 0.06)["above_chance"]


def arms_with(**recall):
    first = {"length": 32, "max_steps": 9, "steps": [7, 9, 8], "accuracy": [0.99, 0.5, 0.98]}
    summary = {}
    for number, (name, shares) in enumerate(recall.items()):
        scores = {"512": score(*shares), "1024": score(*shares)}
        sizes = {"parameters": 1000 + number, "state_bytes": 64 * (1 + number // 2)}
        summary[name] = {"scores": {"recall": scores, "passkey": scores}, "stages": [first], **sizes}
    return summary


@pytest.mark.parametrize(
    ("window", "lmm", "holds"),
    [(0.1, 0.9, [True, True]), (0.3, 0.9, [False, True]), (0.1, 0.7, [True, False])],
)
def test_the_bounds_are_on_the_window_and_on_the_best_memory(window, lmm, holds):
    summary = arms_with(window=[window] * 3, lmm=[lmm] * 3, mac=[0.2] * 3)
    bounds = report.check_bounds(summary, ["lmm", "mac"])
    assert [bound["holds"] for bound in bounds] == holds


def test_arms_separate_only_when_no_seed_overlaps():
    summary = arms_with(window=[0.1, 0.2, 0.3], lmm=[0.9, 0.95, 0.99], mac=[0.8, 0.92, 0.85])
    text = report.sentences(summary, {"window": "lmm"}, 1 / 32)
    line = next(line for line in text if "recall at 512" in line)
    assert "best is lmm" in line
    assert "above every seed of window;" in line
    assert "not separate from mac" in line
    assert "key-value recall: lmm lies above its control window with every seed at 512, 1024." in text
    assert "key-value recall: lmm keeps 0.8 up to 1024; at 1024 it has 0.947 ± 0.026, 0.900 to 0.990 by seed." in text


def test_sizes_and_speed_of_learning_are_said_and_one_seed_separates_nothing():
    text = report.sentences(arms_with(window=[0.1], lmm=[0.9], mac=[0.8]), {"window": "lmm"}, 1 / 32)
    assert "Parameters differ by 0.2 % at most. State of a row: 64 bytes: window, lmm; 128 bytes: mac." in text
    assert "lmm: steps until 32 tokens are solved, by seed: 7, not in 9 (0.50 right), 8." in text
    assert "key-value recall at 512: best is lmm with 0.900." in text
    assert not any("separate from" in line or "control" in line for line in text)
