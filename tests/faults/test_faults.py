"""Every planted fault is caught by its check, and the same model without it passes.

The matrix of all faults and all checks: `pytest tests/faults -m slow -s`.
"""

from functools import lru_cache

import pytest
import torch
from faulty import FAULTS, Correct, small_config

from hybridlm.testing.loading import prepare
from hybridlm.testing.report import FAILURES, OK
from hybridlm.testing.runner import check_model, judge
from hybridlm.testing.suite import EVERY, ROWS

CASES = [(fault, check) for fault, (_, _, checks) in FAULTS.items() for check in checks]
SLOW = {"compiled_decode", "snapshot_elsewhere", "remote_code", "data_parallel"}  # seconds, or another process


@lru_cache(maxsize=2)
def prepared(fault):
    kind, options, _ = FAULTS.get(fault, (Correct, {}, ()))
    torch.manual_seed(0)
    return prepare(kind(small_config(**options)), is_twin=True)


@pytest.mark.parametrize(("fault", "check"), CASES)
def test_a_planted_fault_is_caught(fault, check):
    result = judge(ROWS[check], prepared(fault))
    assert result.verdict in FAILURES, f"{check} says {result.verdict} (error {result.error}, {result.reason})"


@pytest.mark.parametrize("check", [row.name for row in EVERY])
def test_the_correct_model_passes(check):
    result = judge(ROWS[check], prepared(None))
    assert result.verdict == OK, f"{result.reason} (error {result.error})"


def test_every_check_for_any_model_is_proven_by_a_fault():
    assert {check for _, check in CASES} == {row.name for row in EVERY}


@pytest.mark.slow
def test_print_the_matrix_of_faults_and_checks():
    names = [row.name for row in EVERY]
    print("\n" + "\n".join(f"{number:>3} {name}" for number, name in enumerate(names)))
    width = max(map(len, FAULTS))
    print(f"\n{'':<{width}} " + " ".join(f"{number:>2}" for number in range(len(names))))
    marks = {"ok": ".", "not applicable": " ", "refused": "r", "differs": "x", "raises": "!"}
    for fault, (kind, options, checks) in {"(none)": (Correct, {}, ()), **FAULTS}.items():
        torch.manual_seed(0)
        model = kind(small_config(**options))
        report = check_model(model, scale_weights=True, select=names)
        verdicts = {result.check: result.verdict for result in report.results}
        print(f"{fault:<{width}} " + " ".join(f"{marks[verdicts[name]]:>2}" for name in names), flush=True)
        assert all(verdicts[check] in FAILURES for check in checks)
        assert fault != "(none)" or report.ok
