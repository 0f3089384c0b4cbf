"""pytest plugin: one line in `conftest.py` turns the checks of `hybridlm check` into tests of a model.

    hybridlm_models = {"mine": make_model}

The values are functions that return a causal language model, its config, a folder or a hub id. This file lies outside
of the package so that pytest, which loads it at every start, does not import torch for those who do not use it.
"""

from pathlib import Path
from typing import Any

import pytest

_ATTRIBUTE = "hybridlm_models"
_PREPARED = pytest.StashKey[dict[str, Any]]()


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test for every check of every model that a collected `conftest.py` names."""
    for conftest in config.pluginmanager.get_plugins():
        models = getattr(conftest, _ATTRIBUTE, None)
        if not isinstance(models, dict) or not _is_asked_for(config, Path(conftest.__file__).parent):
            continue
        from hybridlm.testing.suite import ROWS

        known = getattr(conftest, "hybridlm_known_failures", {})
        for name, make in models.items():
            for check in ROWS:
                items.append(CheckItem.create(session, name, make, check, known.get(name, {})))


def _is_asked_for(config: pytest.Config, folder: Path) -> bool:
    """Whether pytest was started on the folder of the conftest or on one above it, not on single files."""
    for argument in config.args:
        path = (config.invocation_params.dir / argument).resolve()
        if path.is_dir() and folder.resolve().is_relative_to(path):
            return True
    return False


class CheckItem(pytest.Item):
    """One check of one model."""

    @classmethod
    def create(cls, session: pytest.Session, model: str, make: Any, check: str, known: Any) -> "CheckItem":
        """Make the item under the session."""
        item = cls.from_parent(session, name=f"hybridlm[{model}-{check}]")
        item.model, item.make, item.check, item.known = model, make, check, known
        return item

    def runtest(self) -> None:
        """Run the check; the model is made once."""
        from hybridlm.testing.plugin import prepare_for_tests, run_check

        found = self.config.stash.setdefault(_PREPARED, {})
        if self.model not in found:
            found[self.model] = prepare_for_tests(self.make)
        run_check(found[self.model], self.check, self.known)

    def reportinfo(self) -> tuple[Path, None, str]:
        """What pytest calls the test."""
        return self.path, None, self.name
