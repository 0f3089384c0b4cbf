"""The modeling folder must survive being copied to the Hub, and imports run one way."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

import hybridlm

PACKAGE = Path(hybridlm.__file__).parent
MODELING = PACKAGE / "modeling"
FILES = sorted(MODELING.glob("*.py"))
ALLOWED = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
KERNEL_PACKAGES = {"mamba_ssm", "causal_conv1d", "fla", "triton", "kernels"}
CLIENTS = {"analysis", "builders", "cli", "data", "evaluation", "hub", "presets", "testing", "training"}


def imports(path):
    """Yield `(level, module, names, guarded)` for every import statement; guarded means inside `try` or a function."""

    def walk(node, guarded):
        for child in ast.iter_child_nodes(node):
            inside = guarded or isinstance(child, ast.Try | ast.FunctionDef)
            if isinstance(child, ast.Import):
                yield from ((0, alias.name, (), inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.level, child.module, tuple(alias.name for alias in child.names), inside
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def siblings(path):
    return {module for level, module, _, _ in imports(path) if level == 1}


def test_the_modeling_folder_is_flat():
    assert not [path for path in MODELING.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_import_can_be_followed_by_the_hub_copier(path):
    for level, module, _, guarded in imports(path):
        if level == 0:
            root = module.split(".")[0]
            assert root != "hybridlm", f"{path.name}: an absolute import does not travel, use `from .file import Name`"
            assert root in ALLOWED or (guarded and root in KERNEL_PACKAGES), f"{path.name} needs {module}"
            assert root not in KERNEL_PACKAGES or path.name == "kernels.py", f"{path.name}: kernels go in kernels.py"
        else:
            assert level == 1, f"{path.name}: imports from outside hybridlm.modeling"
            assert module, f"{path.name}: use `from .file import Name`, not `from . import file`"
            assert "." not in module, f"{path.name}: the folder is flat"
    check_imports(path)


def test_every_file_travels_with_the_model():
    entry = MODELING / "modeling_hybridlm.py"
    travels = {Path(name).name for name in get_relative_import_files(entry)} | {entry.name}
    assert {path.name for path in FILES} - travels <= {"__init__.py"}


def test_modeling_imports_have_no_cycles():
    graph = {path.stem: siblings(path) for path in FILES if path.name != "__init__.py"}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(graph)


def test_the_config_imports_no_sibling():
    assert not siblings(MODELING / "configuration_hybridlm.py")


@pytest.mark.parametrize("kind", ["mixer", "channel", "span", "residual"])
def test_parts_of_a_kind_never_import_one_another_or_what_is_above_them(kind):
    above = {"registry", "layer", "modeling_hybridlm"}
    for path in MODELING.glob(f"{kind}_*.py"):
        wrong = {name for name in siblings(path) if name.startswith(f"{kind}_")} | (siblings(path) & above)
        assert not wrong, f"{path.name} imports {sorted(wrong)}"


def test_the_library_above_never_reaches_into_the_cli_and_modeling_never_looks_up():
    for path in PACKAGE.rglob("*.py"):
        if "_data" in path.parts or path.name == "cli.py":
            continue
        targets = {(module or "").split(".")[0] for level, module, _, _ in imports(path) if level}
        assert "cli" not in targets, f"{path} imports the command line"
        if path.parent == MODELING:
            assert not targets & CLIENTS, f"{path.name} imports {sorted(targets & CLIENTS)}"


def test_the_library_never_prints():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.name}:{node.lineno}"


def test_the_registry_key_is_the_file_suffix():
    from hybridlm.modeling import registry

    source = (MODELING / "registry.py").read_text(encoding="utf-8")
    for prefix, table in (("mixer", registry.MIXERS), ("channel", registry.CHANNEL_MIXERS)):
        suffixes = set(re.findall(rf"^from \.{prefix}_(\w+) import", source, re.MULTILINE))
        assert suffixes == set(table)
