"""Fixtures of the integration tests."""

import logging
import shutil

import pytest
from publish_folder import build
from typer.testing import CliRunner

from hybridlm.cli import app
from hybridlm.evaluation.loading import load
from hybridlm.evaluation.runner import Settings, evaluate
from hybridlm.hub.folder import prepare
from hybridlm.testing.report import Report, Result, summary_json


@pytest.fixture
def log(caplog):
    """What transformers and hybridlm log; transformers does not hand its records on, so pytest misses them."""
    caplog.set_level(logging.INFO)
    logging.getLogger("transformers").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("transformers").removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with a card, results of an evaluation and of a check."""
    root = tmp_path_factory.mktemp("made")
    build("tiny_llama", root / "tiny")
    settings = Settings(suite="babi", lengths=(256,), samples=2, generated=0)
    evaluate(load(root / "tiny", device="cpu"), settings, root / "eval")
    report = Report("tiny", [Result("chunks", "any split", "logits", "ok", 1e-12, 1e-9)], dtype="fp64", device="cpu")
    (root / "eval" / "check.json").write_text(summary_json([report], "hybridlm check tiny"))
    prepare(root / "tiny", [root / "eval"])
    return root / "tiny"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "tiny")


@pytest.fixture
def cli():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])
