"""DESIGN's layers: imports go down only, heavy libraries stay where they belong, and the rest works without them."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stubs import stub_job, stub_loop

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlaif"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PACKAGE.rglob("*.py")
}

LAYERS: tuple[tuple[str, ...], ...] = (
    ("rlaif", "rlaif.records", "rlaif.config", "rlaif.errors"),
    (
        "rlaif.console",
        "rlaif.device_memory",
        "rlaif.hardware",
        "rlaif.intervals",
        "rlaif.models",
        "rlaif.own_code",
        "rlaif.plotting",
        "rlaif.reached",
        "rlaif.rendering",
        "rlaif.thoughts",
        "rlaif.transformers_compat",
    ),
    ("rlaif.rundir.*", "rlaif.data.*", "rlaif.workers.*", "rlaif.constitutions.*"),
    ("rlaif.serving.*",),
    ("rlaif.sampling.*",),
    ("rlaif.judging.*",),
    ("rlaif.review.*",),
    ("rlaif.learning.*", "rlaif.trust.*", "rlaif.monitors.*", "rlaif.evaluation.*"),
    ("rlaif.loop.*",),
    ("rlaif.simulation.*",),
    ("rlaif.audit.*",),
    ("rlaif.view.*",),
    (
        "rlaif.__main__",
        "rlaif.api",
        "rlaif.chat",
        "rlaif.cli.*",
        "rlaif.docs",
        "rlaif.doctor",
        "rlaif.export",
        "rlaif.project",
    ),
)
"""From the bottom up, by folder. A new folder needs a place here; a new module has its folder's."""

HEAVY = ("torch", "vllm", "trl", "transformers", "peft", "datasets", "accelerate", "ray")
AT_TOP = {
    "torch": "rlaif.learning.* rlaif.sampling.transformers rlaif.sampling.nucleus",
    "transformers": "rlaif.learning.* rlaif.sampling.transformers",
    "trl": "rlaif.learning.*",
    "datasets": "rlaif.learning.*",
    "accelerate": "rlaif.learning.*",
}
"""Who may import a heavy library when it is imported itself; these modules are loaded by their worker only."""
ANYWHERE = {
    **AT_TOP,
    "torch": f"{AT_TOP['torch']} rlaif.sampling.vllm_compat rlaif.judging.kv_scoring rlaif.models rlaif.hardware "
    "rlaif.transformers_compat rlaif.device_memory rlaif.workers.ranks",
    "transformers": f"{AT_TOP['transformers']} rlaif.judging.kv_scoring rlaif.models rlaif.transformers_compat",
    "vllm": "rlaif.sampling.vllm rlaif.sampling.vllm_compat",
    "peft": "rlaif.learning.base rlaif.models",
    "ray": "rlaif.workers.ray",
    "datasets": "rlaif.learning.* rlaif.data.prompts rlaif.audit.export rlaif.api",
}


def matches(module: str, patterns: str | tuple[str, ...]) -> bool:
    known = patterns.split() if isinstance(patterns, str) else patterns
    return any(module == p or (p.endswith(".*") and (module + ".").startswith(p[:-1])) for p in known)


def layer_of(module: str) -> int:
    found = [i for i, patterns in enumerate(LAYERS) if matches(module, patterns)]
    assert len(found) == 1, f"{module} is in {len(found)} layers; give it one place in LAYERS"
    return found[0]


@functools.cache
def parsed(module: str) -> ast.Module:
    """Each module is read once, however many rules it is held to."""
    return ast.parse(MODULES[module].read_text())


@functools.cache
def imports(module: str, *, top_only: bool = False) -> frozenset[str]:
    """Modules that a module imports; with `top_only`, those it imports when it is imported (no TYPE_CHECKING)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: import by the full name"
            for a in node.names:  # `from rlaif import models` imports rlaif.models
                whole = f"{node.module}.{a.name}"
                found.add(whole if whole in MODULES else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parsed(module))
    return frozenset(found)


@pytest.mark.slow
def test_imports_go_down_only() -> None:
    wrong = []
    for module in sorted(MODULES):
        mine = layer_of(module)
        up = {i for i in imports(module) if i in MODULES and layer_of(i) > mine}
        wrong += [f"{module} (layer {mine}) imports {i} from above" for i in sorted(up)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_heavy_libraries_stay_in_their_modules() -> None:
    wrong = []
    for allowed, top_only in ((AT_TOP, True), (ANYWHERE, False)):
        for module in sorted(MODULES):
            heavy = {i.partition(".")[0] for i in imports(module, top_only=top_only)} & set(HEAVY)
            where = " at its top" if top_only else ""
            wrong += [
                f"{module} imports {library}{where}"
                for library in sorted(heavy)
                if not matches(module, allowed.get(library, ()))
            ]
    assert not wrong, "\n".join(wrong)


def test_a_rich_console_gets_inert_text_only() -> None:
    # rich's own `escape` lets through what steers a terminal; `rlaif.console.inert` doesn't.
    assert {m for m in MODULES if "rich.markup" in imports(m)} <= {"rlaif.console"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_one_module_draws_with_matplotlib(module: str) -> None:
    drawing = {i.partition(".")[0] for i in imports(module)} & {"matplotlib"}
    assert not drawing or module == "rlaif.plotting"
    assert "matplotlib" not in {i.partition(".")[0] for i in imports(module, top_only=True)}


def test_the_import_reader_sees_what_it_should() -> None:
    assert "torch" in imports("rlaif.learning.base", top_only=True)
    assert "rlaif.models" in imports("rlaif.sampling.role")
    assert "torch" in imports("rlaif.judging.kv_scoring")
    assert "torch" not in imports("rlaif.judging.kv_scoring", top_only=True)
    assert "rich.markup" in imports("rlaif.console")


BLOCKED = f"""
import sys
class Block:  # not None in sys.modules: scipy looks there to see what is loaded
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Block())
"""


def without_heavy(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-c", BLOCKED + code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_block_blocks() -> None:
    assert "ModuleNotFoundError" in without_heavy("import torch").stderr


@pytest.mark.slow
def test_everything_but_the_workers_imports_without_heavy_libraries() -> None:
    workers_only = "rlaif.learning.* rlaif.sampling.transformers rlaif.sampling.nucleus"
    names = [m for m in MODULES if not matches(m, workers_only) and m != "rlaif.__main__"]
    assert {"rlaif.rundir.store", "rlaif.audit.summary", "rlaif.loop", "rlaif.cli"} < set(names)
    done = without_heavy(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def main(*arguments: str) -> str:
    return f"sys.argv = {['rlaif', *arguments]!r}\nfrom rlaif.cli import main\nmain()"


@pytest.mark.slow
def test_what_needs_torch_says_what_to_install(tmp_path: Path, checkout: Path) -> None:
    pairs = [{"id": n, "prompt": "q", "first": "a", "second": "b", "label": 1 + n % 2} for n in range(4)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    model = f"judge.model={tmp_path}"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "tokenizer.json").write_text("{}")
    done = without_heavy(main("judge", "bench", str(tmp_path / "pairs.json"), "--set", model), checkout)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("rlaif: this needs torch, not in the bare package: ")


STORED = ROOT / "tests/data/run_schema2"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("constitution", "list"),
        ("constitution", "list", "--json"),
        pytest.param(("constitution", "log", str(STORED)), id="constitution log"),
    ],
)
def test_commands_without_heavy_libraries(checkout: Path, arguments: tuple[str, ...]) -> None:
    done = without_heavy(main(*arguments), checkout)
    assert done.returncode == 0, done.stderr
    assert "constitution" in done.stdout or "assistant" in done.stdout


@pytest.mark.slow
def test_status_and_report_without_heavy_libraries(tmp_path: Path) -> None:
    from rlaif.rundir.store import write_json
    from tests.stubs import stub_prompts

    job = stub_job()
    stub_loop(tmp_path, job).run()
    run = tmp_path / "run"
    write_json(run / "run.json", {"schema_version": 1, "job": job.model_dump(mode="json")})
    (run / "prompts").mkdir()
    (run / "prompts/held_out.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in stub_prompts(4, "held")))
    done = without_heavy(main("status", "run"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 iterations done" in done.stdout
    assert json.loads(without_heavy(main("status", "run", "--json"), tmp_path).stdout)["iterations_done"] == 4
    code = "from rlaif.audit.summary import *\nfrom rlaif.rundir.store import RunDir\nfrom pathlib import Path\n"
    done = without_heavy(code + "r = RunDir.open(Path('run')); final_tables(r, write_summary(r))", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rules@2" in done.stdout
    assert (run / "summary.png").stat().st_size > 10_000


def test_no_test_works_in_the_clone(tmp_path: Path) -> None:
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())
    for path in (ROOT / "tests").rglob("*.py"):
        found = re.findall(r"cwd=ROOT\b|chdir\(ROOT\b|ROOT / \"runs", path.read_text())
        assert not found or path.name == "test_layers.py", f"{path}: {found}; work in `checkout` (tests/conftest.py)"
