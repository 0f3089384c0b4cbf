"""Titans in bfloat16 autocast at 2048 tokens: a quarter of an hour."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
def test_memory_as_context_trains_in_bfloat16_without_a_nan_or_a_skipped_step(tmp_path):
    command = [sys.executable, SCRIPT, "--pairs", "1", "--train", "--out", tmp_path / "memory.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    training = json.loads((tmp_path / "memory.json").read_text())["training"]
    assert [run["steps"] for run in training] == [300, 50]
    for run in training:
        assert run["skipped_steps"] == run["not_finite"] == 0
        assert run["memory_types"] == ["torch.float32"]
        assert run["last_loss"] < run["first_loss"]
