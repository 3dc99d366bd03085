"""docs/extend.md: its judge and its rule are run as they stand there, and what reads the run never imports them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rlaif import own_code
from rlaif.audit.replay import replay
from rlaif.audit.replay_settings import settings_of
from rlaif.config import Job, load_job
from rlaif.errors import UserError
from rlaif.loop.cost import estimate
from rlaif.loop.launch import execute
from rlaif.records import Completion, Decision, UpdateStep, Vote
from rlaif.rundir.store import RunDir
from tests.conftest import make_project
from tests.stubs import Quiet

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extend.md").read_text()
RAISES = 'raise SystemExit("imported")\n'


def shown() -> tuple[dict[str, str], dict[str, dict[str, object]]]:
    """The page's files by name, and the job that its YAML blocks make together."""
    blocks = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.S | re.M)
    tree: dict[str, dict[str, object]] = {}
    for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.S | re.M):
        tree |= yaml.safe_load(block)
    return dict(blocks), tree


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A tiny project with the page's files in it, in whose folder the test works."""
    pytest.importorskip("trl")
    files, tree = shown()
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    path = make_project(tmp_path, tiny_model, iterations=1, schedule={0: "rules@1"}, eval={"every": 1, "prompts": 2})
    job = yaml.safe_load(path.read_text())
    job["filters"] |= tree["filters"]
    path.write_text(yaml.safe_dump(job | {"judge": tree["judge"]}))
    yield load_job(path)
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_shows_a_judge_and_a_rule_of_under_twenty_lines() -> None:
    files, tree = shown()
    assert set(files) == {"shorter.py", "rules.py"}
    assert all(len([line for line in text.splitlines() if line.strip()]) < 20 for text in files.values())
    assert tree == {"judge": {"kind": "shorter:Shorter", "slack": 0}, "filters": {"rules": ["rules:sure"]}}


@pytest.mark.slow
def test_an_iteration_with_the_pages_judge_and_rule(project: Job, tmp_path: Path) -> None:
    told = Quiet()
    run = execute(project, tmp_path / "runs" / "mine", tmp_path, told)
    digests = {n: own_code.load("test", n).sha256 for n in ("shorter:Shorter", "rules:sure")}
    here = run.iteration(0)

    # votes
    length = {c.id: len(c.text) for c in here.read("completions", Completion)}
    pairs = {p["id"]: p for p in map(json.loads, (here.path / "pairs.jsonl").read_text().splitlines())}
    votes = here.read("votes", Vote)
    assert len(votes) == len(pairs) > 0
    for vote in votes:
        a, b = (length[pairs[vote.ballot.pair_id][side]] for side in ("first", "second"))
        assert vote.outcome == ("tie" if a == b else "first" if a < b else "second")
        assert vote.ballot.judge == f"shorter:Shorter:{digests['shorter:Shorter'][:16]}"

    # reasons
    decisions = here.read("decisions", Decision)
    spoken = [d for d in decisions if "rules:sure" in d.reasons]
    assert {d.pair_id for d in spoken} == {d.pair_id for d in decisions if 0.49 < d.verdict.p_first < 0.51} != set()
    assert all(d.status == "dropped" and d.winner is None for d in spoken)
    assert all(d.said == {"rules:sure": f"p(first) is {d.verdict.p_first:.3f}"} for d in spoken)
    assert any(d.status == "kept" for d in decisions)

    # plan and digest
    assert run.plan(0).code == digests
    assert run.header["own_code"] == digests
    assert run.header["job"]["judge"]["slack"] == 0
    assert [note for note in told.notes if note.startswith("code of yours: shorter:Shorter") and "sha256" in note]
    costs = estimate(project, tmp_path)
    assert {name: c["sha256"] for name, c in costs["own_code"].items()} == digests

    # replayed, with the rule's words as they are in the log
    settings, changed = settings_of(run, tmp_path)
    again = replay(run, settings, changed)
    assert not any(again.total(n) for n in ("newly_kept", "newly_dropped", "reversed", "other_reasons"))
    assert any("imports no code" in note for note in again.notes)
    without, changed = settings_of(run, tmp_path, overrides=["filters.rules=[]"])
    left_out = replay(run, without, changed)
    assert left_out.total("newly_kept") + left_out.total("other_reasons") == len(spoken)
    with pytest.raises(UserError, match="a replay imports no code"):
        settings_of(run, tmp_path, overrides=["filters.rules=[rules:sure, rules:other]"])

    readers_never_import(tmp_path, run)
    another_source_is_refused(project, tmp_path, run)


def readers_never_import(root: Path, run: RunDir) -> None:
    """Everything that opens a run works where its code can't even be imported."""
    before = {name: (root / name).read_text() for name in ("shorter.py", "rules.py")}
    for name in before:
        (root / name).write_text(RAISES)
    code = f"""
import sys
sys.path.insert(0, {str(root)!r})
from pathlib import Path
from rlaif.cli import main
for words in (["status", "RUN"], ["audit", "RUN"], ["audit", "RUN", "verify"], ["audit", "RUN", "list"],
              ["audit", "RUN", "list", "--reason", "rules:sure"], ["audit", "RUN", "replay"],
              ["audit", "RUN", "replay", "--parser"], ["report", "RUN"]):
    sys.argv = ["rlaif", *({str(run.path)!r} if w == "RUN" else w for w in words)]
    try:
        main()
    except SystemExit as e:
        assert e.code in (None, 0), (words, e.code)
from rlaif.view.app import make_app
from starlette.testclient import TestClient
from rlaif.audit.index import Index
from rlaif.rundir.store import RunDir
run = RunDir.open(Path({str(run.path)!r}))
client = TestClient(make_app(run, Index.open(run)), base_url="http://127.0.0.1")
for address in ("/", "/pairs", "/pairs?reason=rules:sure"):
    assert client.get(address).status_code == 200, address
assert '<option value="rules:sure"' in client.get("/pairs").text
assert "shorter" not in sys.modules and "rules" not in sys.modules
"""
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for name, text in before.items():
        (root / name).write_text(text)


def another_source_is_refused(project: Job, root: Path, run: RunDir) -> None:
    """A run goes on with the source that it was begun with."""
    more = project.model_copy(update={"iterations": 2})
    source = (root / "shorter.py").read_text()
    (root / "shorter.py").write_text(source + "# another version\n")
    with pytest.raises(UserError, match=r"the source of shorter:Shorter changed since the run was started \(sha256 "):
        execute(more, run.path, root, Quiet(), allow_change=True)
    (root / "shorter.py").write_text(source)
    assert len(execute(more, run.path, root, Quiet(), allow_change=True).iterations()) == 2


LEARNER = """
from rlaif.config import OwnLearner
from rlaif.learning.dpo import DpoLearner

class Timid(DpoLearner):
    class Settings(OwnLearner):
        factor: float = 1.0

    def __init__(self, model_path, settings, seed, output_dir, export_precision):
        slower = settings.model_copy(update={"learning_rate": settings.learning_rate * settings.factor})
        super().__init__(model_path, slower, seed, output_dir, export_precision)
"""
SAMPLER = """
from rlaif.config import OwnSampling
from rlaif.sampling.transformers import Sampler

class Short(Sampler):
    class Settings(OwnSampling):
        at_most: int = 3

    def __init__(self, model_path, settings):
        super().__init__(model_path, settings)
        self.at_most = settings.at_most

    def sample(self, requests):
        yield from super().sample([r.model_copy(update={"max_tokens": self.at_most}) for r in requests])
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["inline", "process"])
def test_an_iteration_with_a_learner_and_a_sampler_of_ones_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timid.py").write_text(LEARNER)
    (tmp_path / "short.py").write_text(SAMPLER)
    path = make_project(tmp_path, tiny_model, iterations=1, schedule={0: "rules@1"}, eval={"every": 1, "prompts": 2})
    job = yaml.safe_load(path.read_text())
    job["workers"] = workers
    job["filters"] = {"min_agreement": 0.0, "min_kept_pairs": 1, "guards": False}
    job["learner"] |= {"kind": "timid:Timid", "factor": 0.5, "learning_rate": 1e-3, "warmup_steps": 0}
    job["sampling"] |= {"engine": "short:Short", "at_most": 5}
    path.write_text(yaml.safe_dump(job))
    run = execute(load_job(path), tmp_path / "runs" / "mine", tmp_path, Quiet())
    for name in ("timid", "short"):
        sys.modules.pop(name, None)

    here = run.iteration(0)
    assert {len(c.token_ids) for c in here.read("completions", Completion)} <= set(range(1, 6))
    steps = here.read("updates", UpdateStep)
    assert {s.learning_rate for s in steps} == {0.5e-3}
    assert set(run.plan(0).code) == {"timid:Timid", "short:Short"}
    gaps = [e for e in run.events() if e.kind == "alarm" and "weights_gap" in e.message]
    assert not gaps  # the sampler holds what the learner trained
