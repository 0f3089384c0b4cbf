"""Presets travel as package data from one source: in the wheel, the wheel from the sdist, and `pip install -e`."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hybridlm import presets

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("hybridlm", "configs", "hub_cards", "eval")
FILES = ("pyproject.toml", "pytest_hybridlm.py", "README.md", "LICENSE", ".gitignore", "constraints.txt")


def run(*command, cwd, pythonpath=None):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    result = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the packages are built from, away from this repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "_data"))
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


def install(package, target):
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target))
    run(*pip, *package, cwd=target.parent)
    return target


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    dist = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", str(dist), str(checkout), cwd=dist)
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_from_sdist(checkout, tmp_path_factory):
    dist = tmp_path_factory.mktemp("sdist")
    run("-m", "build", "--no-isolation", "--outdir", str(dist), str(checkout), cwd=dist)  # the wheel from the sdist
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module", params=["wheel", "wheel from sdist", "editable"])
def installed(request, checkout, tmp_path_factory):
    """The folder that an installation puts on the path."""
    target = tmp_path_factory.mktemp("installed") / "site"
    if request.param == "editable":
        install(["--editable", str(checkout)], target)
        assert not (target / "hybridlm").exists(), "an editable install must not copy data that would go stale"
        return Path(next(target.glob("*.pth")).read_text().strip())
    fixture = "wheel" if request.param == "wheel" else "wheel_from_sdist"
    return install([str(request.getfixturevalue(fixture))], target)


# one process for all questions: importing torch is what takes the time
SCRIPT = """
import json
import hybridlm.cli, hybridlm.presets as presets
from typer.testing import CliRunner

def cli(*arguments):
    result = CliRunner().invoke(hybridlm.cli.app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout

print(json.dumps({
    "module": presets.__file__,
    "data": str(presets.data_path("configs")),
    "names": presets.preset_names(),
    "jamba": presets.find_config("jamba").read_text(),
    "list": cli("list"),
    "describe": json.loads(cli("describe", "jamba", "--json")),
}))
"""


def test_an_installation_lists_and_describes_its_own_presets_away_from_the_checkout(installed, tmp_path):
    found = json.loads(run("-c", SCRIPT, cwd=tmp_path, pythonpath=installed))
    assert Path(found["module"]).is_relative_to(installed)
    assert Path(found["data"]).is_relative_to(installed)
    assert found["names"] == presets.preset_names()
    assert found["jamba"] == (ROOT / "configs" / "models" / "jamba.json").read_text()
    assert "tiny_jamba" in found["list"]
    assert len(found["describe"]["layers"]) == 32


def test_the_wheel_trains_away_from_the_checkout(wheel, tmp_path):
    site = install([str(wheel)], tmp_path / "site")
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"def function_{number}(self):\n    return {number}\n" * 20)
    run_file = {
        "output_dir": str(tmp_path / "out"),
        "model": {"config": "tiny_jamba"},
        "data": {"path": str(tmp_path / "texts"), "length": 64, "heldout_modulus": 3},
        "training": {"max_steps": 5, "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run_file))  # JSON is YAML
    output = run("-m", "hybridlm.cli", "train", "run.yaml", "training.seed=1", cwd=tmp_path, pythonpath=site)
    assert "5 steps" in output
    assert (tmp_path / "out" / "model" / "README.md").is_file(), "the card template must travel too"


def test_the_wheel_and_the_wheel_from_the_sdist_hold_the_same_files(wheel, wheel_from_sdist):
    names = [sorted(zipfile.ZipFile(path).namelist()) for path in (wheel, wheel_from_sdist)]
    assert names[0] == names[1]
    assert any(name == "hybridlm/_data/configs/models/jamba.json" for name in names[0])
    assert not any(name.startswith(("configs/", "tests/")) for name in names[0])


def test_the_sdist_holds_presets_once(checkout, wheel_from_sdist):
    with tarfile.open(next(wheel_from_sdist.parent.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    assert [name.split("/", 1)[1] for name in names if name.endswith("/jamba.json")] == ["configs/models/jamba.json"]


def test_the_repository_keeps_no_copy_of_the_presets():
    assert not (ROOT / "hybridlm" / "_data").exists()


def test_a_missing_preset_names_its_neighbours():
    with pytest.raises(FileNotFoundError, match=r"jambo: no such model config.*'jamba'"):
        presets.find_config("jambo")


def test_a_preset_name_may_use_hyphens():
    assert presets.find_config("granite-4-like") == presets.find_config("granite_4_like")


def test_a_native_config_is_refused_with_the_way_to_import_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type is 'llama', expected 'hybridlm'; `hybridlm import`"):
        presets.load_config(tmp_path)


def test_a_corrupt_config_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "hybridlm", ')
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        presets.load_config(path)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder has no config.json"):
        presets.load_config(tmp_path)
