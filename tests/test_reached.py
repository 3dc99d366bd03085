"""What is private to another library is there, and is touched in one module for each."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaif import reached
from rlaif.reached import BY_LIBRARY, Reached, listed, missing

ROOT = Path(__file__).resolve().parent.parent
COMPAT = {*BY_LIBRARY.values()}

PUBLIC = {
    "accelerate": {"accelerate"},
    "peft": {"peft"},
    "transformers": {"transformers", "transformers.utils", "transformers.utils.logging"},
    "trl": {"trl"},
    "vllm": {"vllm"},
}
"""Modules of these libraries that their documentation imports from."""
STANDARD = {"_replace", "_asdict", "_fields", "_make", "_exit"}
"""Of named tuples and of `os`: documented, whatever their names look like."""
TOO_PLAIN = {"layers", "keys", "values", "stats", "backward", "base_layer"}
"""Undocumented names that any object may have."""


@pytest.mark.nightly
@pytest.mark.parametrize("library", list(BY_LIBRARY))
def test_every_name_is_there(library: str, tmp_path: Path) -> None:
    """Prints those that the installed version lacks, and what breaks; in a process of its own, since vLLM sets signals
    and threads when it is imported."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: whether it still has the names that we reach was not looked at")
    command = [sys.executable, "-m", "rlaif.reached", library]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "names are there" in done.stdout


def test_a_name_that_is_gone_is_said_with_what_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = (
        Reached("json", "", "x"),
        Reached("json", "JSONDecoder.decode", "x"),
        Reached("json", "JSONDecoder.memo", "x"),  # an instance has it
        Reached("json", "JSONEncoder.sort_keys", "x"),
        Reached("json", "dumps", "x", says="skipkeys"),
        Reached("fractions", "Fraction._numerator", "x"),  # a slot
        Reached("http.client", "HTTPConnection.host", "x"),
    )
    gone = (
        Reached("json.nothing", "", "no module"),
        Reached("json", "Nothing.decode", "no class"),
        Reached("json", "JSONDecoder.nothing", "no attribute"),
        Reached("json", "JSONDecoder.mem", "not that attribute"),
        Reached("json", "dumps.nothing", "not a class"),
        Reached("json", "dumps", "no parameter", says="nothing_of_it"),
    )
    assert missing(there) == []
    assert missing((*there, *gone)) == [*gone]

    module = tmp_path / "a_compat_module.py"
    module.write_text(
        f"from json import nothing\nfrom rlaif.reached import Reached\nalias = nothing\nREACHED = {(*there, *gone)!r}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(reached, "BY_LIBRARY", {"json": module.stem, "no_such_library": "not.looked.at"})
    assert reached.main() == 1
    said = capsys.readouterr().out
    assert "json: 7 of 13 names are there" in said
    assert "  json:JSONDecoder.nothing: no attribute\n  json:JSONDecoder.mem: not that" in said
    assert "  json:dumps (nothing_of_it): no parameter\n" in said
    assert "no_such_library: not installed" in said


# ---- one module for each


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """Names that a module gives to something itself: functions, classes, variables, attributes of `self`."""
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            out.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            out.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            out.add(node.attr)
    return out


def is_own(value: ast.AST) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def attributes(tree: ast.AST) -> Iterator[tuple[int, bool, str]]:
    """Line, whether of `self`, and name of each attribute that is read, set, or named to `getattr` and its like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, is_own(node.value), node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if node.func.id.endswith("attr") and isinstance(name, ast.Constant):
                yield node.lineno, is_own(node.args[0]), str(name.value)


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Every module outside the tests, read once, and not by a process that only collects this file."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for folder in ("rlaif", "benchmarks", "examples", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


@functools.cache
def ours() -> set[str]:
    """Names that any of them gives to something."""
    return set().union(*(defined(tree) for tree in sources().values()))


NAMES = {r.name.rpartition(".")[2] for module in COMPAT for r in listed(module)}
OF_CLASSES = {r.name.rpartition(".")[2] for module in COMPAT for r in listed(module) if "." in r.name}


@pytest.mark.slow
def test_the_lists_are_read() -> None:
    assert {"_tr_loss", "_generate", "_is_stateful", "dispatch_cpu_unquantized_gemm", "get_delta_factors"} <= NAMES
    assert {"_tr_loss", "callback_handler", "parameter_name"} <= OF_CLASSES
    assert "_BaseConfig" not in OF_CLASSES
    for module in COMPAT:
        functions = [n for n in sources()[module].body if isinstance(n, ast.FunctionDef)]
        text = "\n".join(ast.get_docstring(n) or "" for n in functions)
        assert len(text) > 500, f"{module}: each function says which name it reaches, and why"


def wrong(tree: ast.Module) -> list[str]:
    """What a module touches that belongs to another library alone, by line."""
    found = defaultdict[int, list[str]](list)
    mine = defined(tree)
    for line, own, name in attributes(tree):
        if private(name):
            if name not in STANDARD | mine and not (own and name in ours()):
                found[line].append(f"private `{name}`")
        elif not own and name in OF_CLASSES - TOO_PLAIN - mine:
            found[line].append(f"undocumented `{name}`")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            root = str(node.module).partition(".")[0]
            if root in PUBLIC and (node.module not in PUBLIC[root] or any(private(a.name) for a in node.names)):
                found[node.lineno].append(f"import from {node.module}")
        elif isinstance(node, ast.Import):
            inner = [a.name for a in node.names if a.name.partition(".")[0] in PUBLIC]
            found[node.lineno] += [f"import {n}" for n in inner if n not in PUBLIC[n.partition(".")[0]]]
        elif isinstance(node, ast.ClassDef) and not {ast.unparse(b) for b in node.bases} <= ours():
            hidden = (NAMES - TOO_PLAIN) & {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            found[node.lineno] += [f"`{node.name}` hides `{name}`" for name in sorted(hidden)]
    return [f"line {line}: {what}" for line in sorted(found) for what in found[line]]


@pytest.mark.slow
def test_what_is_private_to_a_library_stays_in_its_module() -> None:
    found = [f"{module}: {line}" for module in sorted({*sources()} - COMPAT) for line in wrong(sources()[module])]
    assert not found, "\n".join([*found, f"Give it a function in {', '.join(sorted(COMPAT))}"])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("trainer._tr_loss += 1", "private `_tr_loss`"),
        ("x = getattr(callback, '_wandb', None)", "private `_wandb`"),
        ("setattr(args, '_n_gpu', 1)", "private `_n_gpu`"),
        ("self._not_anybodys", "private `_not_anybodys`"),
        ("trainer.callback_handler.on_log()", "undocumented `callback_handler`"),
        ("from trl.trainer.base_trainer import _BaseTrainer", "import from trl.trainer.base_trainer"),
        ("from vllm.v1.sample import x", "import from vllm.v1.sample"),
        ("from trl import _lazy_module", "import from trl"),
        ("import transformers.trainer", "import transformers.trainer"),
        ("class A(DPOTrainer):\n    def _prepare_dataset(self): ...", "`A` hides `_prepare_dataset`"),
        ("from transformers import Trainer\nself._tokenizer\nrow._replace()\nos._exit(0)", ""),
        ("def f(self):\n    self._mine = 1\ndef g(other): return other._mine", ""),
    ],
)
def test_the_reader_sees_what_it_should(code: str, said: str) -> None:
    assert [line.partition(": ")[2] for line in wrong(ast.parse(code))] == ([said] if said else [])


def test_nothing_is_mocked_in_the_package() -> None:
    for module, tree in sources().items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.partition(".")[0] in ("unittest", "mock") for n in names), f"{module} imports a mock"
