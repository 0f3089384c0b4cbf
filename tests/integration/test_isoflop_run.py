"""The isoFLOP comparison runs from its command line, and goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "eval" / "isoflop.py"


@pytest.mark.slow
def test_a_quick_comparison_writes_its_results_and_keeps_finished_runs(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--jobs", "1", "--out", str(tmp_path)]
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "beats" in first.stdout
    results = json.loads((tmp_path / "isoflop.json").read_text())
    assert set(results["arms"]) == {"plain", "mod", "moe"}
    assert results["arms"]["mod"]["flops_per_token"] < results["arms"]["plain"]["flops_per_token"]
    assert [run["curve"][-1]["step"] for run in results["runs"] if run["arm"] == "plain"] == [20]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "isoflop_runs").iterdir()}
    assert len(written) == 3
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert again.stderr.count("finished before") == 3
    assert {path: path.stat().st_mtime_ns for path in written} == written
