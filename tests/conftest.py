"""What several test modules share: the tiny model, and a project (job, texts, prompts) that trains it in seconds."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.config import Job, load_job
from rlaif.hardware import gpu_names
from rlaif.records import Completion, PolicyVersion
from rlaif.workers.ray import PRIVATE
from tests.stubs import write_texts

ROOT = Path(__file__).resolve().parent.parent
# A run's steps are too small to share between threads, and the tests run on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A process that a test starts imports this very checkout, whichever folder it works in.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# vLLM imports Ray, in whichever test comes first; what a cluster of our own starts with is looked at only then.
os.environ.update(PRIVATE)


@pytest.fixture(scope="session", autouse=True)
def _no_clone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fixtures that outlive a test don't work in the clone either."""
    os.chdir(tmp_path_factory.mktemp("session"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a folder of its own: what lies in the clone, such as `runs/quickstart`, changes nothing."""
    monkeypatch.chdir(tmp_path)
    if commands := sys.modules.get("rlaif.cli.judge_common"):
        commands.loader.cache_clear()  # texts by their relative path


@pytest.fixture
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, as far as commands see it: what is shipped to be read or edited, and no `runs/`."""
    return make_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: `make test` hands out files, and the last one must not be a long one."""
    for item in items:
        if item.get_closest_marker("nightly"):  # left out by `-m "not slow"` as well
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With a GPU, one process takes all files that start a vLLM engine, one after another: each wants it to itself."""
    from xdist.scheduler import LoadFileScheduling

    found = Path(__file__).parent.rglob("test_*.py") if gpu_names() else ()
    engines = {p.name for p in found if "pytest.mark.vllm" in p.read_text()}

    class OneEngine(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "vllm" if Path(file).name in engines else file

    return OneEngine(config, log)


@functools.cache
def shipped() -> tuple[Path, ...]:
    """Files to be read or edited that the repository ships, from its root; what you added beside them is none."""
    folders = ("constitutions", "jobs", "prompts")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *folders]
    try:
        known = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\0")
    except OSError:  # no git on this machine
        known = []
    files = [Path(name) for name in known if name and (ROOT / name).is_file()]
    if not files:  # unpacked from an archive
        files = [p.relative_to(ROOT) for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    return tuple(sorted(files))


def make_checkout(folder: Path) -> Path:
    """Copies what is shipped into a folder."""
    for file in shipped():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a tokenizer and a chat template."""
    from tests.sampling.conftest import make_model

    return make_model(tmp_path_factory.mktemp("model"), seed=0)


def until(true: Callable[[], object], seconds: float = 20) -> None:
    """Waits until something comes true, and fails when it doesn't in so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def killed_at(file: str) -> str:
    """The command (`python -c`) as it dies, and its workers with it, when the first rows of a run's file are durable;
    `file` is the end of its path."""
    return f"""
import os, signal
from rlaif.cli import main
real = os.fsync
def fsync(fd):
    real(fd)
    if os.readlink(f"/proc/self/fd/{{fd}}").endswith({file!r}):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
main()
"""


def answered(name: str, token_ids: Sequence[int], logprob: float | None) -> Completion:
    """A completion of which nothing but its tokens and their log p matters."""
    return Completion(
        id=name,
        prompt_id="p",
        policy=PolicyVersion(iteration=0, digest="d"),
        index=0,
        seed=0,
        prompt_token_ids=(1,),
        token_ids=tuple(token_ids),
        text="",
        finish_reason="stop",
        logprob=logprob,
    )


def rlaif_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, as a pipe would get it: a start of Python takes longer than most commands."""
    from rlaif import cli

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["rlaif", *arguments])
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def make_project(root: Path, model: Path | str, **changes: Any) -> Path:
    """Writes texts, prompts and a job under `root`; returns the job file. Everything in it is words of the model."""
    write_texts(root, 1, 2)
    for name, count, first in (("train", 12, 3), ("held_out", 4, 40)):
        rows = [{"id": f"{name}{i}", "prompt": f"w{first + i} w{7 * i % 50 + 3} w4"} for i in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tree: dict[str, Any] = {
        "iterations": 3,
        "schedule": {0: "rules@1", 2: "rules@2"},
        "policy": {"model": str(model)},
        "prompts": {"train": "train.jsonl", "held_out": "held_out.jsonl", "per_iteration": 6},
        "sampling": {"engine": "transformers", "completions_per_prompt": 4, "max_tokens": 12, "max_model_len": 64},
        "judge": {"model": str(model), "cache": None},  # not the one in your home
        "filters": {"min_kept_pairs": 1, "min_agreement": 0.5, "guards": False},
        "learner": {"precision": "fp32", "learning_rate": 1e-3, "warmup_steps": 0, "batch_size": 2},
        "replay": {"share": 0.3},
        "eval": {"every": 2, "prompts": 3, "cache": False},  # what a test makes is its own
        "monitors": {"cut_off": {"action": "off"}},  # random weights rarely end an answer
        "workers": "inline",
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree and key != "schedule" else value
    if "constitution" in changes:
        del tree["schedule"]
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def project_job(root: Path, model: Path | str, **changes: Any) -> Job:
    """`make_project`, loaded."""
    return load_job(make_project(root, model, **changes))
