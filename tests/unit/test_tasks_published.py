"""Published suites are skipped with a reason where they cannot be run, and are called right where they can."""

import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "eval"))
import published


def test_without_a_network_every_suite_is_skipped_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert published.main(["model", "--suites", ",".join(published.SUITES)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(published.SUITES)
    assert all(": skipped: " in line for line in lines)
    assert "needs RMT-team/babilong" in lines[1]
    assert "princeton-nlp/HELMET" in lines[-2]
    assert "adobe-research/NoLiMa" in lines[-1]


def test_a_hub_that_cannot_be_reached_is_a_reason(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert "cannot be reached (no route)" in published.why_not("ruler")


def test_a_missing_lm_eval_is_a_reason(monkeypatch):
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: None)
    assert "lm-eval is not installed" in published.why_not("ruler")


def test_lengths_go_to_the_suites_that_take_them_and_bound_the_others():
    args = published.parse(["model", "--lengths", "4096,8192", "--limit", "5"])
    call = published.command("ruler", args)
    assert '{"max_seq_lengths": [4096, 8192]}' in call
    assert "pretrained=model,max_length=8192" in call
    assert "--metadata" not in published.command("babilong", args)
    assert call[-2:] == ["--limit", "5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--suites", "rulr"], "--suites: unknown 'rulr', expected some of"),
        (["model", "--lengths", "0"], "--lengths: 0 must be at least 1"),
        (["model", "--lengths", "long"], "--lengths: 'long' is no list of whole numbers"),
        ([], "name a model"),
    ],
)
def test_mistakes_name_the_option(arguments, message, capsys):
    with pytest.raises(SystemExit):
        published.parse(arguments)
    assert message in capsys.readouterr().err
