"""A test asks a module through what is public in it: a private function may change without one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module defines: functions, classes, variables, attributes of `self`."""
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            out.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            out.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            out.add(node.attr)
    return {name for name in out if private(name)}


def named(tree: ast.AST) -> Iterator[str]:
    """Private names that are imported, read or set of another object, or named to a `setattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (a.name for a in node.names if private(a.name))
        elif isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
            said = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from (last for text in said if private(last := text.rpartition(".")[2]))


@pytest.mark.slow
def test_tests_name_nothing_private_of_the_package() -> None:
    ours = set().union(*(defined(ast.parse(p.read_text())) for p in (ROOT / "rlaif").rglob("*.py")))
    found = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text())
        if names := {*named(tree)} & ours - defined(tree):
            found[str(path.relative_to(ROOT / "tests"))] = sorted(names)
    assert not found, f"{found}: ask through the public function, or make it public with a docstring"


def test_the_reader_sees_what_it_should() -> None:
    code = """
from rlaif.audit.explain import _rule, show
monkeypatch.setattr(models, "_run", None)
monkeypatch.setattr("rlaif.workers.process._GRACE", 1)
judge._cache.close()
self._mine
getattr(x, "public")
"""
    assert sorted(named(ast.parse(code))) == ["_GRACE", "_cache", "_rule", "_run"]
    assert defined(ast.parse("def _f(self):\n    self._a = _b = other._c = 1\nclass D: ...")) == {"_f", "_a", "_b"}
