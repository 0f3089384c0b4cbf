"""Fixtures of the unit tests; they import what they need, so that the other tests do not wait for it."""

import pytest


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    from report_files import write_all

    from hybridlm.report import make_report

    return make_report([write_all(tmp_path_factory.mktemp("results"))])


@pytest.fixture(scope="module")
def page(everything):
    from report_cases import Page

    from hybridlm.report import render

    return Page(render(everything))
