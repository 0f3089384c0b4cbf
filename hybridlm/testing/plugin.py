"""The checks as pytest tests of somebody's model.

As a class, in any test file:

    class TestMyModel(CausalLMChecks):
        def make_model(self):
            return MyForCausalLM(MyConfig(num_hidden_layers=2))

or as one line in `conftest.py`, which `pytest_hybridlm.py` reads:

    hybridlm_models = {"mine": lambda: MyForCausalLM(MyConfig(num_hidden_layers=2))}
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import pytest
import torch

from .base import quiet
from .loading import Prepared, prepare
from .report import FAILURES, OK, Result
from .runner import few_threads, judge_widely
from .suite import ROWS, rows_for


def prepare_for_tests(make_model: Callable[[], Any], options: Mapping[str, Any] = ()) -> Prepared:
    """Make a model, or take a config, folder or hub id, and get it ready; see `loading.prepare` for the options."""
    torch.manual_seed(0)
    source = make_model() if callable(make_model) and not isinstance(make_model, torch.nn.Module) else make_model
    with quiet():
        return prepare(source, **dict(options))


def run_check(prepared: Prepared, check: str, known_failures: Mapping[str, str] | Iterable[str] = ()) -> None:
    """Run one check as the body of a test: it passes, fails, or is skipped.

    Args:
        prepared: The model.
        check: Name of the check.
        known_failures: Checks that are expected to fail, by name, with a reason or without.
    """
    if check not in {row.name for row in rows_for(prepared.subject)}:
        pytest.skip("only for models with new_cache()")
    with quiet(), few_threads(prepared):
        result = judge_widely(ROWS[check], prepared, may_narrow=True)
    if check in known_failures:
        if result.verdict in FAILURES:
            reason = known_failures[check] if isinstance(known_failures, Mapping) else ""
            pytest.xfail(reason or describe(result))
        if result.verdict == OK:
            pytest.fail(f"{check} is listed among the known failures, and is ok")
    if result.verdict in FAILURES:
        pytest.fail(describe(result), pytrace=False)
    if result.verdict != OK:
        pytest.skip(f"{result.verdict}: {result.reason}")


def describe(result: Result) -> str:
    """What a failed check says in a test report."""
    figures = "" if result.error is None else f"; error {result.error:.1e}, tolerance {result.tolerance:.1e}"
    reason = f": {result.reason}" if result.reason else ""
    return f"{result.check} {result.verdict}{reason}{figures}. Promised: {result.promise}. Compared: {result.compared}."


class CausalLMChecks:
    """Mixin for a test class: every check becomes a test of the model that `make_model` makes.

    Attributes:
        options: Of `hybridlm.testing.prepare`: `dtype`, `device`, `seed`, `tokenizer`, `is_twin` (random weights are
            scaled so that state matters).
        known_failures: Checks that are expected to fail, with reasons.
    """

    options: ClassVar[Mapping[str, Any]] = {}
    known_failures: ClassVar[Mapping[str, str]] = {}

    def make_model(self) -> Any:
        """The model under test, or its config, folder or hub id."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def prepared(self, request: pytest.FixtureRequest) -> Prepared:
        """The model, ready for all checks of the class."""
        return prepare_for_tests(request.cls().make_model, request.cls.options)

    @pytest.mark.parametrize("check", list(ROWS))
    def test_promise(self, prepared: Prepared, check: str) -> None:
        """The model keeps what the check promises."""
        run_check(prepared, check, self.known_failures)
