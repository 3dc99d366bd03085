"""The generator of large runs and the benchmark, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.audit import FILTERS, run_benchmark, table
from benchmarks.audit_run import VOTES_PER_PAIR, write_run
from rlaif.audit.verify import verify
from rlaif.config import parse_job
from rlaif.judging.filters import decide
from rlaif.judging.verdicts import aggregate, by_pair
from rlaif.records import Completion, Decision, Pair, Plan, Preference, Score, UpdateStep, Vote
from rlaif.rundir.store import RunDir, file_digest, read_json, row_digests

RECORDS = {
    "completions": Completion, "scores": Score, "pairs": Pair, "votes": Vote, "decisions": Decision,
    "preferences": Preference, "updates": UpdateStep,
}  # fmt: skip


def test_a_generated_run_is_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", pairs=60, iterations=3)
    run = RunDir.open(tmp_path / "run")
    job = parse_job(run.header["job"], "run.json")
    assert run.iterations() == [0, 1, 2]
    kept = 0
    for k in run.iterations():
        here = run.iteration(k)
        Plan.model_validate(read_json(here.path / "plan.json"))
        rows = {stage: here.read(stage, record) for stage, record in RECORDS.items()}
        for stage in RECORDS:
            meta = here.meta(stage)
            assert meta["sha256"] == file_digest(here.path / f"{stage}.jsonl")
            assert meta["rows"] == len(rows[stage])
            with (here.path / f"{stage}.jsonl").open("rb") as f:
                assert meta["row_digests"] == row_digests(f)
            assert all(here.meta(name)["sha256"] == sha for name, sha in meta["inputs"].items())
        assert len(rows["votes"]) == VOTES_PER_PAIR * len(rows["pairs"])
        texts = {c.id: c.text for c in rows["completions"]}
        votes = by_pair(rows["votes"])
        made = [decide(aggregate(votes[p.id]), p, job.filters, texts) for p in rows["pairs"]]
        assert made == rows["decisions"]
        assert [p.pair_id for p in rows["preferences"]] == [d.pair_id for d in made if d.status == "kept"]
        assert [i for s in rows["updates"] for i in s.row_ids] == [p.pair_id for p in rows["preferences"]]
        kept += len(rows["preferences"])
    assert 0 < kept < 60
    assert verify(run).findings == ()
    for v in rows["votes"]:
        assert v.attempts == (0 if v.cached else 1)
    vote = (run.iteration(0).path / "votes.jsonl").stat().st_size / (VOTES_PER_PAIR * 20)
    assert 600 < vote < 1200  # bytes, as in real runs


@pytest.mark.slow
def test_the_benchmark_measures_everything(tmp_path: Path, index_folder: Path) -> None:
    write_run(tmp_path / "run", pairs=60, iterations=3)
    report = run_benchmark(tmp_path / "run")
    assert (report.votes, report.pairs) == (800, 160)  # the evaluation's included
    found = {m.name: m.found for m in report.measured}
    assert found["list: no filter"] == 60
    assert found["list: iteration"] == 20
    assert {f"list: {name}" for name in FILTERS} <= set(found)
    assert {"GET the overview page", "GET a page of decisions", "GET a pair's page"} <= set(found)
    shown = table(report)
    assert "peak memory, GiB" in shown
    assert all(m.name in shown for m in report.measured)
