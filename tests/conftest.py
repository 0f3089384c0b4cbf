"""What every test relies on: no network, one thread, a fresh code cache, and a seed."""

import os
import tempfile

# Before transformers is imported: it reads these once. A fresh HF_HOME keeps remote code of an earlier run out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "HF_HOME" not in os.environ:
    _HF_HOME = tempfile.TemporaryDirectory(prefix="hybridlm-tests-")
    os.environ["HF_HOME"] = _HF_HOME.name

import pytest
import torch
from hypothesis import settings

settings.register_profile("repository", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("repository")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert enabled, "the test left gradients disabled"


def pytest_collection_modifyitems(items):
    """Tests that need a GPU are skipped, not failed, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
