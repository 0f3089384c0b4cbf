"""The machine that figures of time were taken on."""

import platform

import pytest

from hybridlm.analysis.machine import processor_name


@pytest.fixture(autouse=True)
def pythons_name(monkeypatch):
    monkeypatch.setattr(platform, "processor", lambda: "what Python says")


def test_the_processor_is_named_as_its_first_core_is(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz \nprocessor\t: 1\nmodel name\t: Another\n")
    assert processor_name(cpuinfo) == "Some CPU: 3 GHz"


@pytest.mark.parametrize("text", [None, "processor\t: 0\nBogoMIPS\t: 50.00\n"], ids=["no-file", "no-name"])
def test_a_processor_that_the_system_does_not_name_has_the_name_that_python_gives(tmp_path, text):
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    assert processor_name(cpuinfo) == "what Python says"
