"""Native folders of seeded twins, and a reader of their tensors."""

from pathlib import Path

import pytest
from twins import TWINS


@pytest.fixture(params=list(TWINS))
def twin(request):
    return TWINS[request.param]


@pytest.fixture
def native_folder(twin, tmp_path) -> Path:
    twin.build().save_pretrained(tmp_path / "native")
    return tmp_path / "native"
