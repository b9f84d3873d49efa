"""The floor plan holds: imports only go down, pure rooms stay pure, and the help stays light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import batchstream

ROOT = Path(batchstream.__file__).parent

FLOORS = {
    "errors": 0, "records": 0,
    "wire": 1, "policy": 1, "figures": 1, "job": 1,
    "files": 2, "net": 2, "endpoints": 2,
    "engine": 3,
    "connect": 4, "intake": 4, "shard": 4,
    "launch": 5, "report": 5, "api": 6, "bench": 6,
    "cli": 7, "__main__": 8, "__init__": 8,
}  # fmt: skip

PURE = ("wire", "policy", "figures")
IMPURE_MODULES = {
    "asyncio",
    "aiohttp",
    "time",
    "random",
    "os",
    "socket",
    "threading",
    "uvloop",
    "secrets",
    "subprocess",
}

HEAVY = {"aiohttp", "pyarrow", "rich", "uvloop", "tenacity", "yarl"}
LIGHT = ("errors", "records", "job", "cli", "__main__", "__init__")


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, top_level_only: bool = False) -> set[str]:
    nodes = tree.body if top_level_only and isinstance(tree, ast.Module) else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    here = FLOORS[room(path)]
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "batchstream" or len(parts) < 2 or parts[1] not in FLOORS or parts[1] == room(path):
            continue
        assert FLOORS[parts[1]] <= here, (
            f"{path.relative_to(ROOT)} (floor {here}) imports {name} (floor {FLOORS[parts[1]]})"
        )


@pytest.mark.parametrize("path", [p for p in modules() if room(p) in PURE], ids=lambda p: str(p.relative_to(ROOT)))
def test_pure_rooms_import_no_clock_no_chance_and_no_io(path: Path) -> None:
    used = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    assert not used & IMPURE_MODULES


@pytest.mark.parametrize("path", [p for p in modules() if room(p) in LIGHT], ids=lambda p: str(p.relative_to(ROOT)))
def test_what_the_help_needs_imports_nothing_heavy_at_the_top(path: Path) -> None:
    tree = ast.parse(path.read_text())
    used = {name.split(".")[0] for name in imports(tree, top_level_only=True)}
    assert not used & HEAVY


def test_every_module_opens_with_its_strategy() -> None:
    silent = [
        str(p.relative_to(ROOT))
        for p in modules()
        if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent
