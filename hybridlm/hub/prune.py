"""Remote code without the parts that a config does not use.

`save_pretrained` ships the whole modeling folder. Here the tables of names in the shipped files lose the entries that
the config does not name, then their imports, and then the files that nothing imports any more.
"""

import ast
from pathlib import Path
from typing import Any

import hybridlm.modeling

ENTRIES = ("configuration_hybridlm", "modeling_hybridlm")
# file and table to what a config calls the parts in it
TABLES = {
    "registry": ("MIXERS", "CHANNEL_MIXERS", "RESIDUALS", "SPANS"),
    "positions": ("POSITIONS",),
    "memories": ("MEMORIES",),
}


def used_names(config: Any) -> set[str]:
    """Every `name` of a part in a config, nested ones too."""
    if isinstance(config, dict):
        own = {config["name"]} if isinstance(config.get("name"), str) else set()
        return own.union(*(used_names(value) for value in config.values()))
    if isinstance(config, list):
        return set().union(*(used_names(value) for value in config))
    return set()


def prune_code(folder: Path, config: dict[str, Any]) -> list[str]:
    """Remove from a model folder the code that its config does not use.

    Only files of the modeling folder are removed. A part registered at run time, which has a line of its own in the
    shipped registry, stays.

    Args:
        folder: What `save_pretrained` wrote; a folder without our code is left alone.
        config: Content of its `config.json`, with every option written out.

    Returns:
        Names of the files that were removed.
    """
    if not (folder / f"{ENTRIES[1]}.py").is_file():
        return []
    names = used_names({key: config[key] for key in ("layer_specs", "spans", "norm", "residual") if key in config})
    for stem, tables in TABLES.items():
        path = folder / f"{stem}.py"
        if path.is_file():
            before = path.read_text(encoding="utf-8")
            after = _without_entries(before, tables, names)
            if after != before:
                path.write_text(after, encoding="utf-8")
    reached = reachable(folder)
    ours = {path.stem for path in Path(hybridlm.modeling.__file__).parent.glob("*.py")}
    removed = [path for path in sorted(folder.glob("*.py")) if path.stem in ours - reached]
    for path in removed:
        path.unlink()
    return [path.name for path in removed]


def reachable(folder: Path) -> set[str]:
    """Stems of the files that the model's code imports, its own included."""
    reached, left = set(), list(ENTRIES)
    while left:
        stem = left.pop()
        path = folder / f"{stem}.py"
        if stem in reached or not path.is_file():
            continue
        reached.add(stem)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        left += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module]
    return reached


def _without_entries(text: str, tables: tuple[str, ...], names: set[str]) -> str:
    """A file whose tables name only parts in use, without the imports that only the others needed."""
    tree, edits, dropped = ast.parse(text), {}, set()
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)):
            continue
        if not (isinstance(node.targets[0], ast.Name) and node.targets[0].id in tables):
            continue
        pairs = list(zip(node.value.keys, node.value.values, strict=True))
        kept = [(key, value) for key, value in pairs if key.value in names]
        dropped |= {value.id for key, value in pairs if key.value not in names}
        if len(kept) < len(pairs):
            inner = ", ".join(f'"{key.value}": {value.id}' for key, value in kept)
            edits[node.lineno, node.end_lineno] = [f"{node.targets[0].id} = {{{inner}}}"]
    elsewhere = {
        node.id
        for statement in tree.body
        if (statement.lineno, statement.end_lineno) not in edits
        for node in ast.walk(statement)
        if isinstance(node, ast.Name)
    }
    elsewhere |= {part for new in edits.values() for part in _names_in(new[0])}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            imported = {alias.asname or alias.name for alias in node.names}
            if imported <= dropped - elsewhere:
                edits[node.lineno, node.end_lineno] = []
    lines = text.splitlines()
    for (start, stop), new in sorted(edits.items(), reverse=True):
        lines[start - 1 : stop] = new
    return "\n".join(lines) + "\n"


def _names_in(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
