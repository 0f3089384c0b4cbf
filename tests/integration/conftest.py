"""Fixtures of the integration tests."""

import logging

import pytest


@pytest.fixture
def log(caplog):
    """What transformers and hybridlm log; transformers does not hand its records on, so pytest misses them."""
    caplog.set_level(logging.INFO)
    logging.getLogger("transformers").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("transformers").removeHandler(caplog.handler)
