"""Imports point one way, and what needs no torch imports none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import autoslim

SOURCE = Path(autoslim.__file__).parent
# a module imports only from lines above its own, or from modules before it on its line
LAYERS = [
    ["_version", "errors", "progress", "files", "launch", "interruption"],
    ["space", "recipe", "published"],
    ["cost", "batching", "tables", "slim", "report"],
    ["atoms", "sizes", "slicing"],
    ["shortcuts", "recorder", "rules", "lifetimes", "tracing"],
    [
        "distributed",
        "lending",
        "losses",
        "supernet",
        "switchable",
        "calibrate",
        "replay",
        "reuse",
        "scores",
        "sorting",
        "screening",
        "chance",
        "race",
        "judge",
        "precision",
    ],
    [
        "importing",
        "memory",
        "zoo",
        "models",
        "data",
        "optimizers",
        "ema",
        "checkpointing",
        "train",
        "export",
        "pretrained",
        "runtimes",
        "latency",
    ],
    ["records", "config", "run", "path", "terminal"],
    ["inspection", "systems", "start", "pipeline", "cli"],
]
WITHOUT_TORCH = [*LAYERS[0], *LAYERS[1], *LAYERS[2], *LAYERS[7], "importing", "cli"]


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in SOURCE.rglob("*.py"):
        if path.parent == SOURCE and path.name in ("__init__.py", "__main__.py"):
            continue
        found.setdefault(path.relative_to(SOURCE).parts[0].removesuffix(".py"), []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it but for type checking."""
    names = set()
    tree = ast.parse(path.read_text())
    checking = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(child) for block in checking for child in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "autoslim":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("autoslim.")}
    return names


def test_every_module_has_its_layer() -> None:
    assert sorted(modules()) == sorted(name for layer in LAYERS for name in layer)


def test_imports_point_one_way() -> None:
    order = [name for layer in LAYERS for name in layer]
    for name, paths in modules().items():
        for path in paths:
            for other in imported(path) - {name}:
                assert order.index(other) < order.index(name), f"{path.name} imports {other}, which lies above it"


def test_imports_within_data_point_one_way() -> None:
    order = ["memory", "randomness", "pixels", "sets", "splits", "augment", "mixing", "loading", "reading"]
    order += ["arrays", "datasets", "folders", "hub", "shards", "batches", "load", "__init__"]
    assert sorted(path.stem for path in (SOURCE / "data").glob("*.py")) == sorted(order)
    for name in order:
        tree = ast.parse((SOURCE / "data" / f"{name}.py").read_text())
        nodes = [n.module.split(".") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
        for module in (parts[2] for parts in nodes if parts[:2] == ["autoslim", "data"] and len(parts) > 2):
            assert order.index(module) < order.index(name), f"data/{name}.py imports {module}, which lies above it"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_it_needs_no_torch(name: str) -> None:
    code = f"import sys, autoslim.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_all_there() -> None:
    for name in autoslim.__all__:
        assert getattr(autoslim, name) is not None
    assert callable(autoslim.trace)
    with pytest.raises(AttributeError, match="no attribute 'tracee'"):
        autoslim.tracee  # noqa: B018
