"""A cluster's file, and the command that simulates a job on it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.config import load_job
from rlaif.errors import UserError
from rlaif.loop.cost import estimate
from rlaif.simulation import read_cluster, work_of
from tests.conftest import make_project, rlaif_here

ROOT = Path(__file__).resolve().parent.parent.parent
STORED = ROOT / "tests" / "data" / "run_schema2"
RATES: dict[str, Any] = {
    "sampler": {"tokens_per_s": 100, "at_once": 4},
    "judge": {"latency_s": {"median": 0.5, "spread": 1.4}},
    "learner": {"tokens_per_s": 50},
}


def written(path: Path, **tree: Any) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_file_says_how_many_and_how_fast(tmp_path: Path) -> None:
    roles = {"address": "auto", "sampler": {"replicas": 2, "gpus": 1}, "judge": {"replicas": 3, "gpus": 2}}
    found = read_cluster(written(tmp_path / "c.yaml", cluster=roles, rates=RATES))
    assert (found.gpus, found.cluster.learner.processes) == (8, 1)
    assert found.rates.judge.latency_s.spread == 1.4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rates:\n  sampler: {tokens_per_s: 1}\n  judge: {latency_s: 1}\n", "c.yaml:1: rates.learner: Field required"),
        ("cluster:\n  sampler: {replicas: 0}\n", r"c.yaml:2: cluster.sampler.replicas: .*greater than or equal to 1"),
        ("cluster:\n  sampler: {replica: 2}\n", r"c.yaml:2: cluster.sampler.replica: unknown key; did you mean `repl"),
        ("rates:\n  judge:\n    latency_s: {spread: 2}\n", "c.yaml:3: rates.judge.latency_s: give a number, or median"),
        ("iterations: 3\n", "c.yaml:1: iterations: this is a job's; a cluster's file has `rates`"),
        ("rates: {}\nrates: {}\n", "c.yaml:2: `rates` is given twice"),
        ("- 1\n", "c.yaml: a cluster's file is a mapping"),
        ("a: [\n", "c.yaml: not valid YAML"),
        ("rates: {from: nowhere}\n", "nowhere: no such run"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    Path("c.yaml").write_text(text)
    with pytest.raises(UserError, match=f"^{said}"):
        read_cluster(Path("c.yaml"))


def test_what_a_file_says_takes_the_place_of_what_was_measured(tmp_path: Path) -> None:
    alone = read_cluster(STORED).rates
    given = {"from": str(STORED), "learner": {"commit_s": 9}, "answers": {"tokens": 7}}
    found = read_cluster(written(tmp_path / "c.yaml", rates=given)).rates
    assert (found.learner.commit_s, found.answers.tokens and found.answers.tokens.median) == (9, 7)
    assert found.learner.tokens_per_s == alone.learner.tokens_per_s
    assert found.sampler == alone.sampler
    slots = read_cluster(written(tmp_path / "c.yaml", rates={"from": str(STORED), "sampler": {"at_once": 5}})).rates
    assert (slots.sampler.at_once, slots.sampler.at_most) == (5, None), "a file's word on the one is its word on both"


def test_a_jobs_counts_are_those_of_its_plan(tmp_path: Path) -> None:
    path = make_project(tmp_path, "m", iterations=4, schedule={0: "rules@1"})
    counts = work_of(load_job(path), tmp_path)
    assert (counts.prompts, counts.answers, counts.pairs) == (6, 4, 6)
    assert (counts.held_out, counts.evaluated, counts.judges_at_once) == (3, (2, 4), None)
    plan = json.loads(rlaif_here("run", str(path), "--dry-run", "--json").stdout)
    assert counts.ballots * 4 == plan["ballots_at_most"]
    assert counts.scores * 4 == plan["scores"]
    assert counts.held_out_ballots * 2 == plan["evaluation_ballots_at_most"]


def test_a_dry_run_on_a_cluster(tmp_path: Path) -> None:
    path = str(make_project(tmp_path, "m", schedule={0: "rules@1"}))
    cluster = str(written(tmp_path / "c.yaml", rates={**RATES, "prices": {"hour": 2}}))
    plan = json.loads(rlaif_here("run", path, "--dry-run", "--json", "--cluster", cluster).stdout)
    simulated = plan["simulated"]
    assert simulated["hours"] * 3600 > 3 * simulated["iteration_s"] > 0
    assert simulated["cost"] == pytest.approx(simulated["hours"] * 2)
    shown = rlaif_here("run", path, "--dry-run", "--cluster", cluster)
    assert shown.returncode == 0, shown.stderr
    for words in (
        "simulated on",
        "bottleneck",
        "one more sampler",
        "2 learner processes",
        "pipeline.staleness: 1",
    ):
        assert words in shown.stdout
    assert "simulated" not in json.loads(rlaif_here("run", path, "--dry-run", "--json").stdout)
    assert not Path("runs").exists()


def test_a_jobs_own_workers_are_simulated_where_the_file_names_none(tmp_path: Path) -> None:
    roles = {"judge": {"replicas": 3}, "learner": {"processes": 2, "gpus": 1}}
    jobs = [make_project(tmp_path / name, "m", **more) for name, more in (("one", {}), ("many", {"cluster": roles}))]
    file = written(tmp_path / "c.yaml", rates=RATES)
    found = read_cluster(file, load_job(jobs[1]), 2)
    assert (found.cluster.judge.replicas, found.cluster.learner.processes, found.gpus) == (3, 2, 2)
    samplers = written(tmp_path / "s.yaml", cluster={"sampler": {"replicas": 8}, "learner": {"gpus": 4}}, rates=RATES)
    some = read_cluster(samplers, load_job(jobs[1]), 2).cluster
    assert (some.sampler.replicas, some.judge.replicas, some.learner.processes, some.learner.gpus) == (8, 3, 2, 4)
    work_s = []
    for path in jobs:
        with contextlib.chdir(path.parent):
            done = rlaif_here("run", str(path), "--dry-run", "--json", "--cluster", str(file.resolve()))
        work_s.append(json.loads(done.stdout)["simulated"]["work_s"]["learner"])
    commit_s = read_cluster(file).rates.learner.commit_s
    assert work_s[1] - commit_s == pytest.approx((work_s[0] - commit_s) / 2)


TEMPLATES = str(ROOT / "prompts" / "judge")
CHAT = {"kind": "chat", "model": "m", "api_key_env": None, "templates_dir": TEMPLATES}
SERVERS = ["http://127.0.0.1:8000/v1", "http://127.0.0.1:8001/v1"]
POLICY_SERVERS = {
    "engine": "server",
    "base_url": ["http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://10.0.0.3:8000"],
}


@pytest.mark.parametrize(
    ("changes", "samplers", "judges", "streamed"),
    [
        ({}, 1, 1, False),
        ({"pipeline": {"stream": True}}, 1, 1, True),
        ({"cluster": {"sampler": {"replicas": 4}}}, 4, 1, True),
        ({"cluster": {"learner": {"processes": 1}}}, 1, 1, False),
        ({"cluster": {"sampler": {"replicas": 4}}, "pipeline": {"stream": False}}, 4, 1, False),
        ({"judge": {**CHAT, "base_url": SERVERS}}, 1, 2, True),
        ({"judge": {"kind": "chat", "templates_dir": TEMPLATES, "serve": {"model": "m", "replicas": 3}}}, 1, 3, False),
        ({"judge": {**CHAT, "base_url": SERVERS}, "device": "shared"}, 1, 2, True),
        ({"device": "shared"}, 1, 1, False),
        ({"sampling": {"engine": "server", "replicas": 2}}, 2, 1, False),
        ({"sampling": POLICY_SERVERS}, 3, 1, True),
    ],
)
def test_a_job_is_simulated_as_its_plan_says(
    tmp_path: Path, changes: dict[str, Any], samplers: int, judges: int, streamed: bool
) -> None:
    path = make_project(tmp_path / "job", "m", **changes)
    job = load_job(path)
    setup = read_cluster(written(tmp_path / "c.yaml", rates=RATES), job)
    assert (setup.cluster.sampler.replicas, setup.cluster.judge.replicas) == (samplers, judges)
    assert setup.overlap(work_of(job, path.parent)).stream == streamed
    assert estimate(job, path.parent)["pipeline"]["stream"] == streamed


def test_workers_that_only_a_file_names_are_a_clusters(tmp_path: Path) -> None:
    path = make_project(tmp_path / "job", "m")
    for roles, streamed in (({"judge": {"replicas": 2}}, True), ({"learner": {"processes": 2}}, False)):
        setup = read_cluster(written(tmp_path / "c.yaml", cluster=roles, rates=RATES), load_job(path))
        assert setup.overlap(work_of(load_job(path), path.parent)).stream == streamed


def test_a_simulation_runs_nothing(tmp_path: Path) -> None:
    path = str(make_project(tmp_path, "m", schedule={0: "rules@1"}))
    cluster = str(written(tmp_path / "c.yaml", rates=RATES))
    done = rlaif_here("run", path, "--cluster", cluster)
    assert (done.returncode, "--cluster: simulates, and runs nothing; give --dry-run with it" in done.stderr) == (
        2,
        True,
    )
    source = rlaif_here("run", path, "--dry-run", "--cluster", cluster, "--set", f"source.run={STORED}")
    assert source.returncode == 2
