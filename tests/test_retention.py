"""An evaluation's part on forgetting, in the loop: its stages, earlier texts, kills, and runs that began without it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif.audit.curves import curve_of
from rlaif.audit.index import Index
from rlaif.audit.over_time import over_time
from rlaif.audit.overview import overview
from rlaif.audit.picture import draw
from rlaif.audit.runs import runs_in
from rlaif.audit.summary import retention_lines
from rlaif.audit.verify import verify
from rlaif.cli import app
from rlaif.config import Job
from rlaif.evaluation.texts import FixedText
from rlaif.learning import too_far
from rlaif.loop.launch import asked_about_the_past
from rlaif.monitors.tracking import of_evaluation
from rlaif.records import Completion, EvaluationMetrics, IterationMetrics, Pair, ProbeResult, TextScore, Vote
from rlaif.rundir import store
from rlaif.rundir.stages import VOTES
from rlaif.rundir.store import RunDir, read_record
from rlaif.view.pictures import side_by_side
from tests.conftest import ROOT, project_job
from tests.stubs import Quiet, StubLearner, stub_job, stub_loop, stub_probes, write_texts

pytestmark = pytest.mark.slow

STAGES = ("probe_completions", "probe_results", "texts", "earlier_pairs", "earlier_votes", "earlier_decisions")
AT_CHANGE = ("change_pairs", "change_votes", "change_decisions")
"""Of an iteration."""


def job(**changes: Any) -> Job:
    """Three texts in turn, the second of which comes back."""
    return stub_job(
        **{"schedule": {0: "rules@1", 1: "rules@2", 2: "rules@3", 3: "rules@2"}, "filters": {"min_kept_pairs": 1}}
        | {"eval": {"every": 2, "prompts": 3, "retention": True}}
        | changes
    )


def run_of(root: Path, **changes: Any) -> RunDir:
    write_texts(root, 1, 2, 3)
    stub_loop(root, job(**changes)).run()
    return RunDir(root / "run")


def metrics_of(run: RunDir, updates: int) -> EvaluationMetrics:
    return read_record(run.evaluation(updates).path / "metrics.json", EvaluationMetrics)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_of(tmp_path_factory.mktemp("whole"))


def test_every_evaluation_has_it(finished: RunDir) -> None:
    base = metrics_of(finished, 0).retention
    assert base is not None
    assert base.probes.kept == base.probes.base_passed > 0
    assert (base.kept_share, base.perplexity_ratio, base.earlier) == (1.0, 1.0, {})
    passed = {r.probe_id for r in finished.evaluation(0).read("probe_results", ProbeResult) if r.passed}
    for updates in finished.evaluations()[1:]:
        found = metrics_of(finished, updates).retention
        assert found is not None
        now = {r.probe_id for r in finished.evaluation(updates).read("probe_results", ProbeResult) if r.passed}
        assert found.probes.base_passed == len(passed)
        assert found.probes.kept == len(passed & now)
        assert found.probes.gained == len(now - passed)
        assert {k: n.probes for k, n in found.by_kind.items()} == {"fact": 3, "format": 3}
        assert found.perplexity_ratio != 1, "another policy reads the texts otherwise"


def test_answers_are_held_against_every_earlier_text(finished: RunDir) -> None:
    hashes = {k: finished.plan(k).constitution.hash for k in range(4)}
    for updates, earlier in ((1, []), (2, [0]), (3, [0, 1]), (4, [0, 2])):
        found = metrics_of(finished, updates)
        assert found.constitution.hash == hashes[updates - 1]
        assert found.retention is not None
        assert [*found.retention.earlier] == [hashes[k] for k in earlier], updates
        here = finished.evaluation(updates)
        assert here.is_complete("earlier_votes") == bool(earlier)
        if not earlier:
            continue
        pairs = {p.id: p for p in here.read("earlier_pairs", Pair)}
        for vote in here.read("earlier_votes", Vote):
            assert vote.ballot.constitution in vote.ballot.pair_id
            assert vote.ballot.constitution != found.constitution.hash
            assert pairs[vote.ballot.pair_id].second.startswith("eval0000-")
        for text_hash, under in found.retention.earlier.items():
            assert under.constitution.hash == text_hash
            assert under.wins + under.losses + under.undecided + under.abstained == found.answers
    said: dict[str, list[float | None]] = {}
    for vote in finished.evaluation(4).read("earlier_votes", Vote):
        said.setdefault(vote.ballot.constitution, []).append(vote.p_first)
    first, second = said.values()
    assert first != second, "each text has its own word"


def test_a_change_is_measured_where_following_begins(finished: RunDir) -> None:
    """The answers that the new text finds, by its own word: wins counted here from its votes."""
    for k, metrics in enumerate(finished.iterations_measured(range(4))):
        here, found = finished.iteration(k), metrics.at_change
        assert here.is_complete("change_votes") == (found is not None) == (k > 0)
        if found is None:
            continue
        assert found.constitution.hash == finished.plan(k).constitution.hash
        assert found.constitution.hash != metrics_of(finished, k).constitution.hash
        policy, base = ({c.id: c.text for c in finished.evaluation(n).read("completions", Completion)} for n in (k, 0))
        said: dict[str, list[float]] = {}
        for vote in here.read("change_votes", Vote):
            assert vote.ballot.constitution == found.constitution.hash
            assert vote.p_first is not None
            said.setdefault(vote.ballot.pair_id, []).append(vote.p_first)
        pairs = here.read("change_pairs", Pair)
        assert all(policy[p.first] != base[p.second] for p in pairs)
        shares = [sum(said[p.id]) / len(said[p.id]) for p in pairs]
        assert found.wins == sum(p > 0.5 for p in shares)
        assert found.losses == sum(p < 0.5 for p in shares)
        assert found.asked == len(pairs)


def test_no_change_measures_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path, schedule={0: "rules@1"}, iterations=2)
    assert [m.at_change for m in run.iterations_measured(range(2))] == [None, None]
    assert not list(run.path.rglob("change_*"))


@pytest.mark.parametrize("stage", [*STAGES, *AT_CHANGE])
def test_a_kill_in_any_stage_of_it_loses_nothing(
    stage: str, finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the stage is complete, all rows on disk; at the first evaluation that has it."""
    write_texts(tmp_path, 1, 2, 3)
    whole = store.write_json

    def killed(path: Path, value: Any) -> None:
        if path.name == f"{stage}.meta.json":
            raise KeyboardInterrupt
        whole(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "write_json", killed)
        stub_loop(tmp_path, job()).run()
    stub_loop(tmp_path, job()).run()
    run = RunDir(tmp_path / "run")
    casts = (tmp_path / "casts.log").read_text().split()
    assert len(casts) == len(set(casts)), "no ballot with a durable vote is cast again"
    for updates in finished.evaluations():
        for name in STAGES:
            file = f"{name}.jsonl"
            mine, theirs = (r.evaluation(updates).path / file for r in (run, finished))
            assert mine.exists() == theirs.exists()
            assert not mine.exists() or mine.read_text() == theirs.read_text()
        if 0 < updates < 4:
            for name in AT_CHANGE:
                texts = [(r.iteration(updates).path / f"{name}.jsonl").read_text() for r in (run, finished)]
                assert texts[0] == texts[1]
        same = [metrics_of(r, updates).model_copy(update={"seconds": 0.0}) for r in (run, finished)]
        assert same[0] == same[1]
    assert not list(run.path.rglob("*.partial"))
    assert not list(run.path.rglob("*.asked"))


def test_a_run_that_began_without_it_says_so_once(tmp_path: Path) -> None:
    write_texts(tmp_path, 1, 2, 3)
    stub_loop(tmp_path, job(iterations=2, eval={"every": 1, "prompts": 3})).run()
    stub_loop(tmp_path, job(eval={"every": 1, "prompts": 3, "retention": True})).run()
    run = RunDir(tmp_path / "run")
    assert [metrics_of(run, updates).retention for updates in run.evaluations()] == [None] * 5
    assert [e.message[:14] for e in run.events() if e.kind == "retention_unknown"] == ["eval.retention"]
    assert not list(run.path.rglob("probe*"))


def test_off_leaves_no_trace(tmp_path: Path) -> None:
    run = run_of(tmp_path, eval={"every": 2, "prompts": 3})
    assert {p.name for stage in STAGES for p in run.path.rglob(f"{stage}*")} == set()
    assert json.loads((run.evaluation(2).path / "metrics.json").read_text())["retention"] is None


def test_its_stages_are_verified(finished: RunDir) -> None:
    store.write_json(finished.path / "run.json", {"schema_version": 2, "job": job().model_dump(mode="json")})
    path = finished.evaluation(4).path / "probe_results.jsonl"
    before = path.read_text()
    path.write_text(before.replace("true", "false", 1))
    found = [f.file for f in verify(finished).findings]
    path.write_text(before)
    assert "evaluations/0004/probe_results.jsonl" in found


def test_texts_are_scored_by_what_is_evaluated(finished: RunDir) -> None:
    rows = {u: finished.evaluation(u).read("texts", TextScore) for u in finished.evaluations()}
    assert {t.tokens for t in rows[0]} == {4, 5, 6}
    assert len({tuple(t.logprob for t in r) for r in rows.values()}) == len(rows)
    assert len(stub_probes()) == 6


def test_what_is_forgotten_is_told(finished: RunDir) -> None:
    found = [m for u in finished.evaluations() if (m := metrics_of(finished, u)).updates]
    for m in found:
        assert m.retention is not None
        lines = retention_lines(m.retention)
        assert lines[0].startswith(
            f"probes kept: {m.retention.probes.kept} of the {m.retention.probes.base_passed} that"
        )
        assert "fact " in lines[0]
        assert "times the base policy's" in lines[1]
        assert [line.split()[3] for line in lines[2:]] == [str(e.constitution) for e in m.retention.earlier.values()]
    assert retention_lines(None) == []
    draw([], [metrics_of(finished, u) for u in finished.evaluations()], finished.path / "summary.png")
    assert (finished.path / "summary.png").stat().st_size > 10_000
    (finished.path / "summary.png").unlink()


def test_the_index_has_it(finished: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store.write_json(finished.path / "run.json", {"schema_version": 2, "job": job().model_dump(mode="json")})
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    with Index.open(finished) as index:
        passed = index.rows(
            "SELECT evaluation, count(*) FILTER (passed) AS n FROM probe_results GROUP BY ALL ORDER BY 1"
        )
        votes = {
            t: index.rows(f"SELECT count(*) AS n FROM {t}")[0]["n"] for t in ("votes", "earlier_votes", "change_votes")
        }
        seen = overview(index, finished)
        assert not [p for p in index.problems if "evaluations/" in p], "what an evaluation needn't have isn't missed"
    kept = {u: metrics_of(finished, u).retention for u in finished.evaluations()}
    assert {r["evaluation"]: r["n"] for r in passed} == {
        u: m.probes.kept + m.probes.gained for u, m in kept.items() if m is not None
    }
    assert sum(c.votes for c in seen.cost) == sum(votes.values())
    assert {e.updates: e.retention for e in seen.evaluations} == kept


def test_every_query_of_the_docs_is_answered_and_lost_probes_have_their_prompts(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    run = RunDir(Path(shutil.copytree(finished.path, tmp_path / "run")))
    store.write_json(run.path / "run.json", {"schema_version": 2, "job": job().model_dump(mode="json")})
    probes = stub_probes()
    (run.path / "prompts").mkdir(exist_ok=True)
    (run.path / "prompts" / "probes.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in probes))
    prompts = {p.id: p.prompt for p in probes}
    asked = {}
    with Index.open(run) as index:
        for page in sorted((ROOT / "docs").glob("*.md")):
            for query in re.findall(r'^rlaif audit \S+ sql "([^"]+)"', page.read_text(), re.MULTILINE):
                asked.setdefault(page.name, []).append(index.ask(query, 1000))
    assert len(asked["audit.md"]) > 1
    ((columns, lost),) = asked["forgetting.md"]
    assert columns == ["evaluation", "kind", "prompt"]
    base = {r.probe_id for r in run.evaluation(0).read("probe_results", ProbeResult) if r.passed}
    assert [(u, prompt) for u, _, prompt in lost] == sorted(
        (u, prompts[r.probe_id])
        for u in run.evaluations()
        for r in run.evaluation(u).read("probe_results", ProbeResult)
        if r.probe_id in base and not r.passed
    )
    assert lost, "this run loses some"


def test_runs_are_compared_by_it(finished: RunDir) -> None:
    store.write_json(finished.path / "run.json", {"schema_version": 2, "job": job().model_dump(mode="json")})
    found = over_time({"a": [finished]}, "start", ["retained", "perplexity", "distinct_2", "repeated"])
    last = metrics_of(finished, 4)
    assert last.retention is not None
    assert found.groups[0].points[-1].values["retained"].mean == last.retention.kept_share
    assert found.groups[0].points[-1].values["perplexity"].mean == last.retention.perplexity_ratio


def test_runs_stand_side_by_side_with_it(finished: RunDir, tmp_path: Path) -> None:
    for name in ("with", "without"):
        shutil.copytree(finished.path, tmp_path / name)
        store.write_json(tmp_path / name / "run.json", {"schema_version": 2, "job": job().model_dump(mode="json")})
    for file in (tmp_path / "without").glob("evaluations/*/metrics.json"):
        store.write_json(file, json.loads(file.read_text()) | {"retention": None})
    both = [curve_of(RunDir(tmp_path / name)) for name in ("with", "without")]
    picture = next(p for p in side_by_side(both) if p.key == "retention")
    assert [(line.name, bool(line.path), bool(line.bars)) for line in picture.lines][:1] == [("with", True, True)]
    assert not [line for line in picture.lines if line.name == "without" and line.path]
    assert "retention" not in {p.key for p in side_by_side(both[1:])}
    rows = {row.run: row for row in runs_in(tmp_path)}
    found = metrics_of(finished, 4).retention
    assert found is not None
    assert (rows["with"].kept_share, rows["without"].kept_share) == (found.kept_share, None)
    head, *lines = CliRunner().invoke(app, ["runs", str(tmp_path)]).stdout.splitlines()
    at = head.split("\t").index("probes kept")
    assert [line.split("\t")[at] for line in lines] == [f"{found.kept_share or 0:.0%}", "-"]


def test_trackers_get_it(finished: RunDir) -> None:
    m = metrics_of(finished, 3).model_copy(update={"distinct_2_in_100": 0.9})  # of these few words there is none
    assert m.retention is not None
    told = of_evaluation(m, [], job().judge, 3)
    assert told["pipeline/held_out/retention/kept_share"] == m.retention.kept_share
    assert told["pipeline/held_out/retention/by_kind/fact/base_passed"] == m.retention.by_kind["fact"].base_passed
    [first, _] = m.retention.earlier
    assert told[f"pipeline/held_out/retention/earlier/{first}/win_rate"] == m.retention.earlier[first].win_rate
    assert told["pipeline/held_out/distinct_2_in_100"] == m.distinct_2_in_100
    assert not [name for name in told if "constitution/version" in name]


def test_the_judges_budget_counts_votes_under_earlier_texts() -> None:
    assert set(VOTES) >= {"votes", "earlier_votes", "change_votes"}


def test_a_run_stopped_before_the_base_policy_was_measured_may_still_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rlaif.loop.evaluation.judge", interrupted)  # after the base policy
        with pytest.raises(KeyboardInterrupt):
            run_of(tmp_path / "late", eval={"every": 2, "prompts": 3})
    run = RunDir(tmp_path / "late" / "run")
    assert asked_about_the_past(run, job(), tmp_path) == ((), ())
    with monkeypatch.context() as patch:
        patch.setattr("rlaif.loop.evaluation.candidates", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_of(tmp_path / "soon", eval={"every": 2, "prompts": 3})
    run = RunDir(tmp_path / "soon" / "run")
    assert run.evaluation(0).is_complete("completions")
    probes, texts = asked_about_the_past(run, job(), tmp_path)
    assert probes
    assert texts


@pytest.mark.parametrize("stop", [None, 2, 3])
def test_the_reference_is_the_policy_at_the_change(
    stop: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every update, in a run that is stopped in its third or fourth, too; and its weights stay on the disk."""
    asked: list[tuple[int, str | None]] = []
    stops = [stop]
    plain = StubLearner.update

    def update(self: Any, rows: Any, iteration: int) -> Any:
        if iteration in stops:
            stops.clear()
            raise KeyboardInterrupt
        asked.append((iteration, self._refers_to))
        yield from plain(self, rows, iteration)

    monkeypatch.setattr(StubLearner, "update", update)
    changing = stub_job(
        iterations=5, schedule={0: "rules@1", 2: "rules@2"}, learner={"reference": "at_change"}, eval={"every": 9},
        filters={"min_kept_pairs": 1},
    )  # fmt: skip
    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            stub_loop(tmp_path, changing).run()
    stub_loop(tmp_path, changing).run()
    run = RunDir(tmp_path / "run")
    at_change = run.iteration(1).policy_made()
    assert asked == [(0, None), (1, None), (2, at_change), (3, at_change), (4, at_change)]
    assert (run.iteration(1).path / "policy" / "weights.txt").exists()


def test_an_update_that_stops_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StubLearner.update

    def update(self: Any, rows: Any, iteration: int) -> Any:
        for n, step in enumerate(plain(self, rows, iteration)):
            yield (taken := step.model_copy(update={"metrics": {"kl": 0.3 * n}}))
            if too_far(taken, 0.2):
                return

    monkeypatch.setattr(StubLearner, "update", update)
    braked = stub_job(iterations=1, learner={"max_kl": 0.2, "batch_size": 2}, filters={"min_kept_pairs": 1},
                      pairing={"method": "all", "max_pairs_per_prompt": 3})  # fmt: skip
    stub_loop(tmp_path, braked).run()
    run = RunDir(tmp_path / "run")
    m = read_record(run.iteration(0).path / "metrics.json", IterationMetrics)
    assert (m.steps, m.stopped_at_kl) == (2, 0.3)
    [said] = [e for e in run.events() if e.kind == "update_stopped"]
    assert said.message.startswith(
        f"the update stopped after step 2 of {said.data['planned']}: KL from the policy that"
    )
    assert said.data["planned"] > 2


def test_real_models_read_texts_as_transformers_does(tiny_model: Path, tmp_path: Path) -> None:
    """The base policy's perplexity and a trained one's, against the models' own loss; probes of the user's own."""
    pytest.importorskip("trl")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlaif.loop.launch import execute

    (tmp_path / "probes.jsonl").write_text(
        '{"prompt": "w3 w4", "check": {"min_words": 0}}\n{"prompt": "w5", "answer": "w6"}'
    )
    own = project_job(
        tmp_path, tiny_model, iterations=2, schedule={0: "rules@1", 1: "rules@2"}, sampling={"precision": "fp32"},
        eval={"retention": True, "probes": "probes.jsonl"},
    )  # fmt: skip
    run = execute(own, tmp_path / "run", tmp_path, Quiet())
    texts = [
        FixedText.model_validate_json(line) for line in (run.path / "prompts/texts.jsonl").read_text().splitlines()
    ]
    for updates, folder in ((0, tiny_model), (2, run.iteration(1).path / "policy")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        scores = {t.text_id: t for t in run.evaluation(updates).read("texts", TextScore)}
        assert len(scores) == len(texts)
        for text in texts:
            ids = tokenizer(text.text, return_tensors="pt").input_ids[:, : own.sampling.max_model_len]
            with torch.no_grad():
                loss = model(input_ids=ids, labels=ids).loss
            assert scores[text.id].tokens == ids.size(1) - 1
            assert -scores[text.id].logprob / scores[text.id].tokens == pytest.approx(float(loss), rel=1e-4)
    found = metrics_of(run, 2).retention
    assert found is not None
    assert (found.probes.probes, found.probes.base_passed, found.probes.kept) == (2, 1, 1)
    assert found.perplexity_ratio != pytest.approx(1, abs=1e-6)
    assert [str(e.constitution) for e in found.earlier.values()] == ["rules@1"]
