"""A whole job on a tiny random model (real sampler, judge and learner, in this process), and the loop's choices."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import Job, Monitors
from rlaif.errors import RlaifError, RunPaused, UserError, WorkerDied
from rlaif.monitors import History, alarms
from rlaif.records import (
    Completion,
    Decision,
    Divergence,
    EvaluationMetrics,
    IterationMetrics,
    Pair,
    Plan,
    PolicyVersion,
    Preference,
    Prompt,
    Quality,
    Score,
    UpdateStep,
    Vote,
    WeightsGap,
)
from rlaif.rundir.heads import read_heads
from rlaif.rundir.store import RunDir, read_record, read_rows
from rlaif.workers.inline import InlineWorker
from rlaif.workers.weights import WeightsRef
from tests.conftest import make_project, project_job
from tests.stubs import Quiet, stub_job, stub_loop, text, write_texts

STAGES: dict[str, type[Any]] = {
    "completions": Completion,
    "scores": Score,
    "pairs": Pair,
    "votes": Vote,
    "decisions": Decision,
    "preferences": Preference,
    "updates": UpdateStep,
}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Three iterations with a change of text before the last, on the tiny model."""
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    root = tmp_path_factory.mktemp("loop")
    return execute(project_job(root, tiny_model), root / "runs" / "tiny", root, Quiet())


def test_the_run_directory_is_complete(finished: RunDir) -> None:
    assert finished.iterations() == [0, 1, 2]
    assert finished.evaluations() == [0, 2, 3]
    for name in ("run.json", "events.jsonl", "prompts/train.jsonl", "prompts/held_out.jsonl"):
        assert (finished.path / name).exists(), name
    for k in finished.iterations():
        here = finished.iteration(k)
        assert (here.path / "plan.json").exists()
        assert (here.path / "metrics.json").exists()
        for stage, record in STAGES.items():
            assert here.read(stage, record), f"{stage} of iteration {k} has no rows"
    assert (finished.iteration(2).path / "policy" / "model.safetensors").exists()
    assert [p.name for p in (finished.path / "learner").iterdir()] == ["0002"]
    assert not list(finished.path.rglob("*.partial"))


def test_the_weights_that_sample_are_those_that_are_trained(finished: RunDir) -> None:
    """At a rate that moves every weight, in the precision that this machine computes in."""
    gaps = [read_record(finished.iteration(k).path / "metrics.json", IterationMetrics).weights_gap for k in range(3)]
    gaps += [read_record(finished.evaluation(k).path / "metrics.json", EvaluationMetrics).weights_gap for k in (2, 3)]
    for gap in gaps:
        assert gap is not None
        assert gap.tokens > 30
        assert gap.typical < (1e-4 if "fp32" in gap.sampler else 0.1)
        assert gap.mean < 0.02
    assert gaps[0].exported == "as given"
    assert gaps[1].exported in gaps[1].sampler


def test_a_sampler_that_keeps_old_weights_is_found_out(tmp_path: Path) -> None:
    loop = stub_loop(tmp_path, forgetful=True)
    with pytest.raises(RlaifError, match=r"doesn't hold the policy that is trained.*doctor --deep"):
        loop.run()
    assert loop.dir.iterations() == [0, 1]
    assert not (loop.dir.iteration(1).path / "completions.jsonl").exists(), "nothing was sampled from it"


@pytest.mark.parametrize("stop", ["preferences", "updates", "evaluations", "metrics", None])
def test_weights_are_compared_again_when_a_run_goes_on(
    stop: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stopped: the new process's sampler is compared before it samples anything."""
    whole = stub_loop(tmp_path, stub_job(iterations=2))
    if stop:
        monkeypatch.setattr(f"rlaif.loop.{_STOPS[stop]}", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            whole.run()
        monkeypatch.undo()
    else:
        stub_loop(tmp_path, stub_job(iterations=1)).run()
    with pytest.raises(RlaifError, match="doesn't hold the policy that is trained"):
        stub_loop(tmp_path, stub_job(iterations=2), forgetful=True).run()
    assert not (tmp_path / "run" / "iterations" / "0001" / "completions.jsonl").exists()
    stub_loop(tmp_path, stub_job(iterations=2)).run()
    for k in (0, 1):
        metrics = read_record(tmp_path / "run" / "iterations" / f"{k:04d}" / "metrics.json", IterationMetrics)
        assert metrics.weights_gap is not None
        assert metrics.weights_gap.typical == 0


_STOPS = {
    "preferences": "loop.mix",
    "updates": "loop.update",
    "evaluations": "evaluation.gap_of",
    "metrics": "loop.gap_of",
}


def _interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_real_weights_are_compared_again_when_a_run_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that goes on with the weights that it started from."""
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute
    from rlaif.sampling.role import SamplerRole

    def job(iterations: int) -> Job:
        learner = {"precision": "fp32", "learning_rate": 0.05, "warmup_steps": 0, "batch_size": 2}
        return project_job(tmp_path, tiny_model, iterations=iterations, schedule={0: "rules@1"}, learner=learner)

    run = execute(job(1), tmp_path / "run", tmp_path, Quiet())
    monkeypatch.setattr(SamplerRole, "load", lambda self, weights: None)
    with pytest.raises(RlaifError, match="doesn't hold the policy that is trained"):
        execute(job(2), tmp_path / "run", tmp_path, Quiet(), allow_change=True)
    assert not any(p.stat().st_size for p in run.iteration(1).path.glob("completions*"))


@pytest.mark.slow
def test_a_run_that_goes_on_with_a_shorter_window_is_told_at_once(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    def job(iterations: int, room: int) -> Job:
        changes = {"iterations": iterations, "schedule": {0: "rules@1"}}
        return project_job(tmp_path, tiny_model, **changes, sampling={"max_model_len": room, "max_tokens": 29})

    run = execute(job(1, 64), tmp_path / "run", tmp_path, Quiet())
    before = {p: p.read_bytes() for p in run.path.glob("*/*.jsonl")}
    with pytest.raises(UserError, match=r"prompt .*sampling.max_model_len is 32.*keeps its prompts"):
        execute(job(2, 32), tmp_path / "run", tmp_path, Quiet(), allow_change=True)
    assert run.iterations() == [0]
    assert {p: p.read_bytes() for p in run.path.glob("*/*.jsonl")} == before
    execute(job(2, 60), tmp_path / "run", tmp_path, Quiet(), allow_change=True)


def test_a_run_that_goes_on_in_another_precision_has_its_policy_rounded_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_loop(tmp_path, stub_job(iterations=1)).run()
    monkeypatch.setattr("tests.stubs.StubSampler.computes_in", lambda self: "stub bf16")
    monkeypatch.setattr("tests.stubs.StubLearner.exports_in", lambda self: "bf16")
    stub_loop(tmp_path, stub_job(iterations=2)).run()
    run = RunDir(tmp_path / "run")
    [said] = [e for e in run.events() if e.kind == "policy_rounded"]
    assert (said.iteration, said.data["policy"]) == (1, run.iteration(0).policy_made())
    assert "was written in fp32, and stub bf16 samples from a copy" in said.message
    gap = read_record(run.iteration(1).path / "metrics.json", IterationMetrics).weights_gap
    assert gap is not None
    assert (gap.exported, gap.sampler) == ("bf16", "stub bf16")
    assert not list(run.path.glob("learner/*.partial"))


def test_machines_to_which_auto_is_another_precision_are_refused_before_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler on a cluster may have what the learner's machine lacks, and would round what it is given."""
    monkeypatch.setattr("tests.stubs.StubSampler.computes_in", lambda self: "stub bf16")
    with pytest.raises(UserError, match="auto is fp32 where the learner is and bf16 where a sampler is"):
        stub_loop(tmp_path, stub_job(iterations=1, cluster={"sampler": {"replicas": 1}})).run()
    assert not any(path.read_bytes() for path in (tmp_path / "run").glob("**/completions.jsonl*"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "rounded"), [("fp32", "bf16", 1), ("bf16", "fp32", 0)])
def test_the_copy_is_the_learners_export(
    before: str, after: str, rounded: int, tiny_model: Path, tmp_path: Path
) -> None:
    """In bf16, at a rate of which rounding to the nearest would leave little."""
    pytest.importorskip("trl")
    from rlaif.config import Learner
    from rlaif.learning import make
    from rlaif.loop.launch import execute
    from rlaif.models import digest_of

    def job(precision: str, iterations: int) -> Job:
        learner = {"precision": "fp32", "learning_rate": 1e-6, "warmup_steps": 0, "batch_size": 2}
        changes = {"iterations": iterations, "schedule": {0: "rules@1"}, "learner": learner}
        return project_job(tmp_path, tiny_model, **changes, sampling={"precision": precision})

    run = execute(job(before, 1), tmp_path / "run", tmp_path, Quiet())
    policy = run.iteration(0).path / "policy"
    digest = digest_of(policy)
    state = shutil.copytree(run.path / "learner" / "0000", tmp_path / "state")
    execute(job(after, 2), tmp_path / "run", tmp_path, Quiet(), allow_change=True)
    said = [e for e in run.events() if e.kind == "policy_rounded"]
    assert len(said) == rounded
    assert digest_of(policy) == digest == run.iteration(0).policy_made(), "the log's own policy stays"
    gap = read_record(run.iteration(1).path / "metrics.json", IterationMetrics).weights_gap
    assert gap is not None
    assert gap.exported == "bf16"
    assert run.iteration(1).meta("updates")["exported"] == after
    if rounded:
        learner = make(str(tiny_model), Learner(precision="fp32"), seed=0, export_precision="bf16")
        learner.load(WeightsRef(digest=digest, path=state))
        assert learner.export(tmp_path / "copy").digest == said[0].data["copy"] == digest_of(tmp_path / "copy")
        learner.close()


def test_a_gap_beyond_the_limit_is_an_alarm(tmp_path: Path) -> None:
    job = stub_job(monitors={"weights_gap": {"limit": 1e-9}, "decoding_gap": {"limit": 1e-9}})
    stub_loop(tmp_path / "exact", job).run()
    assert not [e for e in RunDir(tmp_path / "exact" / "run").events() if "nats a token from" in e.message]
    metrics = read_record(RunDir(tmp_path / "exact" / "run").iteration(0).path / "metrics.json", IterationMetrics)
    gap = WeightsGap(tokens=10, mean=0.06, typical=0.1, worst=0.3, sampler="vllm bf16", exported="bf16")
    said = alarms(Monitors(), History([metrics.model_copy(update={"weights_gap": gap})]))
    assert [(a.kind, a.measured, a.limit) for a in said if a.kind == "weights_gap"] == [("weights_gap", 0.06, 0.02)]
    assert any("0.060 nats a token" in alarm.message for alarm in said)
    noise = gap.model_copy(update={"mean": 0.0, "typical": 0.3})  # errors that cancel are errors
    assert alarms(Monitors(), History([metrics.model_copy(update={"weights_gap": noise})]))


def test_answers_that_were_sampled_are_scored_again(finished: RunDir) -> None:
    """Tempered and truncated as they are (the defaults: 0.8 and 0.95), what is recorded is the raw log p."""
    for k in finished.iterations():
        metrics = read_record(finished.iteration(k).path / "metrics.json", IterationMetrics)
        gap, weights = metrics.decoding_gap, metrics.weights_gap
        assert gap is not None
        assert weights is not None
        assert finished.iteration(k).meta("completions")["decoding_gap"] == gap.model_dump(mode="json")
        assert gap.answers == 8
        assert gap.tokens > 30
        assert gap.typical < (1e-4 if "fp32" in weights.sampler else 0.1)
        assert gap.within(0.02)
    assert not [e for e in finished.events() if "as they were sampled" in e.message]


def test_a_sampler_that_decodes_with_other_weights_is_an_alarm(tmp_path: Path) -> None:
    """It reads the fixed texts rightly: `weights_gap` can't see it."""
    job = stub_job(iterations=1)
    stub_loop(tmp_path, job, decodes_with="other weights").run()
    run = RunDir(tmp_path / "run")
    metrics = read_record(run.iteration(0).path / "metrics.json", IterationMetrics)
    assert metrics.weights_gap is not None
    assert metrics.weights_gap.typical == 0
    assert metrics.decoding_gap is not None
    assert metrics.decoding_gap.typical > 0.2
    assert [e.iteration for e in run.events() if "answers as they were sampled are" in e.message] == [0]
    job = stub_job(iterations=1, monitors={"decoding_gap": {"limit": 100}})
    stub_loop(tmp_path / "lenient", job, decodes_with="other weights").run()
    assert not [e for e in RunDir(tmp_path / "lenient" / "run").events() if "as they were sampled" in e.message]


def test_the_digests_in_the_meta_files_hold(finished: RunDir) -> None:
    metas = list(finished.path.glob("*/*/*.meta.json"))
    assert len(metas) > 25
    for path in metas:
        meta = json.loads(path.read_text())
        rows = path.with_name(path.name.replace(".meta.json", ".jsonl"))
        assert meta["sha256"] == hashlib.sha256(rows.read_bytes()).hexdigest(), path
        assert meta["rows"] == len(rows.read_text().splitlines())
        assert meta["schema_version"] == 2
        for name, sha256 in meta["inputs"].items():
            assert sha256 == hashlib.sha256((path.parent / f"{name}.jsonl").read_bytes()).hexdigest()
    inputs = {k for p in metas for k in json.loads(p.read_text())["inputs"]}
    ours = {
        "completions",
        "scores",
        "pairs",
        "votes",
        "decisions",
        "old_pairs",
        "preferences",
        "kl_completions",
        "base_logprobs",
        "change_pairs",
        "change_votes",
    }
    assert ours == inputs


def test_each_row_follows_from_the_rows_before_it(finished: RunDir) -> None:
    for k in finished.iterations():
        here = finished.iteration(k)
        plan = Plan.model_validate_json((here.path / "plan.json").read_text())
        completions = {c.id: c for c in here.read("completions", Completion)}
        pairs = {p.id: p for p in here.read("pairs", Pair)}
        votes, decisions = here.read("votes", Vote), here.read("decisions", Decision)
        preferences = here.read("preferences", Preference)
        assert {c.policy for c in completions.values()} == {plan.policy}
        assert {c.prompt_id for c in completions.values()} == set(plan.prompt_ids)
        assert {v.ballot.constitution for v in votes} == {plan.constitution.hash}
        assert {v.ballot.pair_id for v in votes} == set(pairs) == {d.pair_id for d in decisions}
        assert not any(v.ballot.voice in pairs[v.ballot.pair_id].selected_by for v in votes)
        kept = {d.pair_id: d for d in decisions if d.status == "kept"}
        fresh = [p for p in preferences if p.source == "judge"]
        assert [p.pair_id for p in fresh] == list(kept)
        for p in fresh:
            pair, winner = pairs[p.pair_id], kept[p.pair_id].winner
            assert (p.chosen_id, p.rejected_id) == (
                (pair.first, pair.second) if winner == "first" else (pair.second, pair.first)
            )
            assert p.chosen_token_ids == completions[p.chosen_id].token_ids
            assert p.rejected == completions[p.rejected_id].text
        steps = here.read("updates", UpdateStep)
        assert sorted(i for s in steps for i in s.row_ids) == sorted(p.pair_id for p in preferences)


def test_steps_are_counted_over_the_whole_run(finished: RunDir) -> None:
    steps = [s.step for k in finished.iterations() for s in finished.iteration(k).read("updates", UpdateStep)]
    assert steps == list(range(1, len(steps) + 1))


def test_each_iteration_samples_from_the_policy_that_the_one_before_it_made(finished: RunDir) -> None:
    versions = [
        Plan.model_validate_json((finished.iteration(k).path / "plan.json").read_text()).policy
        for k in finished.iterations()
    ]
    assert versions[0] == PolicyVersion(iteration=0, digest=finished.header["models"]["policy"])
    for k in (1, 2):
        digest = finished.iteration(k - 1).meta("updates")["policy_digest"]
        assert versions[k] == PolicyVersion(iteration=k, digest=digest)
    assert len({v.digest for v in versions}) == 3


def test_the_scheduled_text_takes_over_and_is_kept_in_the_run(finished: RunDir) -> None:
    refs = [
        Plan.model_validate_json((finished.iteration(k).path / "plan.json").read_text()).constitution for k in range(3)
    ]
    assert [str(r) for r in refs] == ["rules@1", "rules@1", "rules@2"]
    assert [(e.kind, e.iteration) for e in finished.events()] == [
        ("started", None),
        ("pruned", 1),
        ("constitution_changed", 2),
        ("old_pairs", 2),
        ("pruned", 2),
        ("finished", None),
    ]
    for ref in refs:
        assert (finished.path / "constitutions" / ref.hash / "source.yaml").read_text() == text(ref.version)


def test_only_pairs_of_the_text_in_force_are_replayed(finished: RunDir) -> None:
    rows = [finished.iteration(k).read("preferences", Preference) for k in range(3)]
    assert [sum(p.source == "replay" for p in r) for r in rows][::2] == [0, 0]
    fresh = sum(p.source == "judge" for p in rows[1])
    old = sum(p.source == "judge" for p in rows[0])
    assert sum(p.source == "replay" for p in rows[1]) == min(int(fresh * 0.3 / 0.7 + 1e-9), old) > 0


def test_held_out_prompts_never_train(finished: RunDir) -> None:
    held_out = {p.id for p in read_rows(finished.path / "prompts/held_out.jsonl", Prompt)}
    sampled = {c.prompt_id for k in range(3) for c in finished.iteration(k).read("completions", Completion)}
    evaluated = {c.prompt_id for k in (0, 2, 3) for c in finished.evaluation(k).read("completions", Completion)}
    assert evaluated <= held_out
    assert not sampled & held_out


def test_evaluations_say_what_they_measured(finished: RunDir) -> None:
    for updates, name in ((0, "rules@1"), (2, "rules@1"), (3, "rules@2")):
        here = finished.evaluation(updates)
        metrics = json.loads((here.path / "metrics.json").read_text())
        assert f"{metrics['constitution']['name']}@{metrics['constitution']['version']}" == name
        assert metrics["answers"] == len(here.read("quality", Quality)) == 3
        assert (metrics["win_rate"] is None) == (updates == 0)
        assert metrics["length_controlled_unknown"] == ("few_prompts" if updates else None)
        if updates:
            assert {v.ballot.voice for v in here.read("votes", Vote)} == {"wish/paraphrase3"}
            assert metrics["wins"] + metrics["losses"] + metrics["undecided"] == 3
    base = json.loads((finished.evaluation(0).path / "metrics.json").read_text())
    assert (base["kl_per_token"], base["kl_interval"]) == (0.0, [0.0, 0.0])


def test_kl_is_measured_on_answers_at_temperature_1(finished: RunDir) -> None:
    assert not finished.evaluation(0).is_complete("divergences")
    for updates in (2, 3):
        here = finished.evaluation(updates)
        sampled, held_out = here.read("kl_completions", Completion), here.read("completions", Completion)
        assert {c.prompt_id for c in sampled} == {c.prompt_id for c in held_out}
        assert {c.policy for c in sampled} == {c.policy for c in held_out}
        rows = {d.completion_id: d for d in here.read("divergences", Divergence)}
        assert {c.id: len(c.token_ids) for c in sampled} == {i: d.tokens for i, d in rows.items()}
        metrics = json.loads((here.path / "metrics.json").read_text())
        assert metrics["kl_answers"] == 3
        assert 0 < metrics["kl_per_token"] == sum(d.kl for d in rows.values()) / sum(d.tokens for d in rows.values())
        assert metrics["kl_interval"][0] < metrics["kl_per_token"] < metrics["kl_interval"][1]


def test_kl_is_not_measured_where_nobody_wants_it(tmp_path: Path) -> None:
    stub_loop(tmp_path, stub_job(iterations=2, eval={"every": 1, "prompts": 3, "kl_prompts": 0})).run()
    run = RunDir(tmp_path / "run")
    for updates in run.evaluations():
        assert not run.evaluation(updates).is_complete("kl_completions")
        assert json.loads((run.evaluation(updates).path / "metrics.json").read_text())["kl_per_token"] is None


@pytest.mark.slow
def test_held_out_answers_have_a_temperature_of_their_own(tmp_path: Path, tiny_model: Path) -> None:
    from rlaif.loop.launch import execute

    def answers(seed: int, **decoding: float) -> list[list[str]]:
        where = tmp_path / f"{seed}{decoding}"
        where.mkdir()
        fp32 = {"precision": "fp32"}  # in bf16 two tokens can be the likeliest
        job = project_job(
            where, tiny_model, seed=seed, iterations=1, constitution="rules@1", eval=decoding, sampling=fp32
        )
        run = execute(job, where / "run", where, Quiet())
        stages = run.evaluation(0), run.iteration(0)
        return [[c.text for c in here.read("completions", Completion)] for here in stages]

    greedy, sampled = answers(0, temperature=0.0)
    assert greedy == answers(1, temperature=0.0)[0]
    assert len(set(sampled)) > len({c.split()[0] for c in sampled})  # training explores as before
    assert answers(0, top_p=1e-6)[0] == greedy
    assert answers(0)[0] != greedy


def test_running_it_again_says_that_it_is_done(finished: RunDir) -> None:
    from rlaif.config import parse_job
    from rlaif.loop.launch import execute

    progress = Quiet()
    execute(parse_job(finished.header["job"], "run.json"), finished.path, finished.path.parent.parent, progress)
    assert any("all 3 iterations are done" in note for note in progress.notes)
    assert finished.events()[-1].kind == "finished"


def copied(finished: RunDir, tmp_path: Path) -> tuple[Path, RunDir]:
    """A copy of the finished run's project, and the run in it."""
    root = tmp_path / "copy"
    shutil.copytree(finished.path.parent.parent, root)
    return root, RunDir(root / "runs" / "tiny")


def test_a_run_that_goes_on_says_by_which_code(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlaif.config import parse_job
    from rlaif.loop import launch
    from rlaif.loop.launch import execute

    root, run = copied(finished, tmp_path)
    before = {k: finished.header[k] for k in ("rlaif", "packages", "python", "revision", "hardware", "model_files")}
    monkeypatch.setattr(launch, "revision", lambda: "another")
    execute(parse_job(run.header["job"] | {"iterations": 4}, "run.json"), run.path, root, Quiet(), allow_change=True)
    begun, gone_on = [e for e in run.events() if e.kind in ("started", "resumed")]
    assert begun.data == {"seed": finished.header["job"]["seed"], **before}
    assert gone_on.data == {**begun.data, "revision": "another"}
    assert run.header["revision"] == before["revision"]  # what it was begun with


def test_a_run_that_goes_on_elsewhere_says_so_and_keeps_what_is_done(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlaif.config import parse_job
    from rlaif.loop import launch

    root, run = copied(finished, tmp_path)
    monkeypatch.setattr(launch, "hardware_facts", lambda: run.header["hardware"] | {"cpu": "another"})
    progress = Quiet()
    job = run.header["job"]
    launch.execute(parse_job(job | {"iterations": 4}, "run.json"), run.path, root, progress, allow_change=True)
    (note,) = [n for n in progress.notes if n.startswith("other hardware")]
    assert "-> 'another')" in note
    with pytest.raises(UserError, match=r"iterations: 2, but .* has done 4"):
        launch.execute(parse_job(job | {"iterations": 2}, "run.json"), run.path, root, Quiet(), allow_change=True)


def test_other_files_beside_the_same_weights_are_told(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlaif import models
    from rlaif.config import parse_job
    from rlaif.loop import launch

    root, run = copied(finished, tmp_path)
    policy = run.header["job"]["policy"]
    changed = tmp_path / "changed"
    shutil.copytree(models.resolve_policy(policy["model"], policy["adapter"]), changed)
    monkeypatch.setattr(models, "resolve_policy", lambda *args, **kwargs: changed)

    def told(iterations: int) -> list[str]:
        progress = Quiet()
        job = parse_job(run.header["job"] | {"iterations": iterations}, "run.json")
        launch.execute(job, run.path, root, progress, allow_change=True)
        return [n for n in progress.notes if "beside its weights changed" in n]

    assert not told(4)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"transformers_version": "another"}))
    (note,) = told(5)
    assert note.startswith("the policy model's files beside its weights changed since this run was begun")
    (changed / "generation_config.json").write_text('{"top_k": 3}')
    (another,) = told(6)
    assert another != note
    assert [e.data["model_files"] for e in run.events() if e.kind == "resumed"][-1] != run.header["model_files"]


def test_other_weights_under_the_same_name_are_refused(finished: RunDir, tmp_path: Path) -> None:
    from rlaif.config import parse_job
    from rlaif.loop.launch import write_header

    job = parse_job(finished.header["job"], "run.json")
    with pytest.raises(UserError, match="the judge model changed since the run was started"):
        write_header(finished, job, finished.header["models"] | {"judge": "other"}, {})


# The loop's choices, on stubs.


def events(root: Path, kind: str) -> list[tuple[int | None, str]]:
    return [(e.iteration, e.message) for e in RunDir(root / "run").events() if e.kind == kind]


def test_too_few_kept_pairs_is_a_recorded_skip(tmp_path: Path) -> None:
    stub_loop(tmp_path, stub_job(iterations=1, filters={"min_kept_pairs": 7})).run()
    here = RunDir(tmp_path / "run").iteration(0)
    assert here.read("updates", UpdateStep) == []
    assert here.meta("updates")["skipped"] is True
    assert not (here.path / "policy").exists()
    ((k, message),) = events(tmp_path, "skipped_update")
    assert k == 0
    assert "fewer than filters.min_kept_pairs=7" in message
    metrics = json.loads((here.path / "metrics.json").read_text())
    assert here.read("preferences", Preference)
    assert (metrics["loss"], metrics["trained_pairs"], metrics["replayed_pairs"]) == (None, 0, 0)


def test_progress_tells_the_text_in_force_in_every_stage(tmp_path: Path) -> None:
    told: dict[str, str] = {}

    class Telling(Quiet):
        def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
            told[name] = text

    stub_loop(tmp_path, stub_job(iterations=1, filters={"min_kept_pairs": 1}), progress=Telling()).run()
    assert "update" in told
    assert set(told.values()) == {"rules@1"}


def following_job(**changes: Any) -> Job:
    return stub_job(constitution="rules", **changes)


def run_some(root: Path, iterations: int, **changes: Any) -> Quiet:
    progress = Quiet()
    stub_loop(root, following_job(iterations=iterations, **changes), progress=progress).run()
    return progress


class Editing(Quiet):
    """Somebody who edits the text while an iteration is at work."""

    def __init__(self, path: Path, content: str) -> None:
        super().__init__()
        self._path, self._content = path, content

    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None:
        if iteration == 0:
            self._path.write_text(self._content)


@pytest.mark.parametrize("file", ["v1.yaml", "v2.yaml"])
def test_an_edited_text_or_a_new_version_is_in_force_from_the_next_iteration(tmp_path: Path, file: str) -> None:
    folder = write_texts(tmp_path, 1)
    edited = text(3)
    stub_loop(tmp_path, following_job(iterations=3), progress=Editing(folder / file, edited)).run()
    run = RunDir(tmp_path / "run")
    plans = [Plan.model_validate_json((run.iteration(k).path / "plan.json").read_text()) for k in range(3)]
    hashes = [p.constitution.hash for p in plans]
    assert hashes[0] != hashes[1] == hashes[2]
    ((k, message),) = events(tmp_path, "constitution_changed")
    assert k == 1
    assert hashes[1] in message
    assert (run.path / "constitutions" / hashes[1] / "source.yaml").read_text() == edited
    assert run.evaluations() == [0, 1, 2, 3]  # at the change as well
    votes = run.iteration(1).read("votes", Vote)
    assert {v.ballot.constitution for v in votes} == {hashes[1]}


def test_a_text_that_breaks_in_the_middle_leaves_the_last_good_one(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1)
    progress = Editing(folder / "v1.yaml", "summary: [")
    stub_loop(tmp_path, following_job(iterations=3), progress=progress).run()
    run = RunDir(tmp_path / "run")
    plans = [Plan.model_validate_json((run.iteration(k).path / "plan.json").read_text()) for k in range(3)]
    assert len({p.constitution.hash for p in plans}) == 1
    ((k, message),) = events(tmp_path, "alarm")  # one, not one an iteration
    assert k == 1
    assert "v1.yaml:" in message
    assert "stays in force" in message
    assert any("stays in force" in note for note in progress.notes)
    assert events(tmp_path, "constitution_changed") == []


def test_a_broken_text_at_the_start_is_the_users_error(tmp_path: Path, tiny_model: Path) -> None:
    from rlaif.loop.launch import execute

    make_project(tmp_path, tiny_model, constitution="rules")
    (tmp_path / "constitutions/rules/v2.yaml").write_text("summary: [")
    with pytest.raises(UserError, match=r"v2\.yaml:\d+: not valid YAML") as e:
        execute(following_job(), tmp_path / "run", tmp_path, Quiet())
    assert e.value.exit_code == 2


def test_an_alarm_pauses_once_and_the_same_command_goes_on(tmp_path: Path) -> None:
    job = stub_job(iterations=2, monitors={"short_answers": {"limit": 99, "action": "pause"}})
    with pytest.raises(
        RunPaused, match=r"paused at an alarm in iteration 1: .*\(monitors.short_answers.action=pause\)"
    ):
        stub_loop(tmp_path, job).run()
    with pytest.raises(RunPaused, match="paused at an alarm in iteration 2"):
        stub_loop(tmp_path, job).run()
    stub_loop(tmp_path, job).run()
    assert [k for k, _ in events(tmp_path, "alarm")] == [0, 1]


def test_a_learner_that_dies_as_trackers_are_told_keeps_no_alarm_from_pausing(tmp_path: Path) -> None:
    """The iteration is done then, and a run that goes on never looks at it again."""

    class Dies(InlineWorker):
        def call(self, method: str, **kwargs: Any) -> Any:
            if method == "track" and kwargs["step"]:
                raise WorkerDied("learner worker died (unplugged)")
            return super().call(method, **kwargs)

    for action, stops in (("pause", RunPaused), ("warn", WorkerDied)):
        job = stub_job(iterations=2, monitors={"short_answers": {"limit": 99, "action": action}})
        loop = stub_loop(tmp_path / action, job)
        loop.learner = Dies("learner", "tests.stubs:StubLearner", {})
        with pytest.raises(stops):
            loop.run()
        assert loop.dir.done() == [0]
        assert read_heads(loop.dir.path)
        assert [k for k, _ in events(tmp_path / action, "alarm")] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["all", None])
def test_an_alarm_takes_the_run_back(
    keep: str | None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To before it was raised, where the state of then was kept; by the next attempt, where this one can't."""
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    def job(iterations: int, action: str) -> Job:
        limits = {"cut_off": {"action": "off"}, "short_answers": {"limit": 99, "action": action}}
        more: dict[str, Any] = {"schedule": {0: "rules@1"}, "monitors": limits, "keep_checkpoints": keep}
        return project_job(tmp_path, tiny_model, iterations=iterations, **more)

    execute(job(1, "off"), tmp_path / "run", tmp_path, Quiet())
    first = tmp_path / "run/iterations/0000/metrics.json"
    metrics = json.loads(first.read_text())
    metrics["sampled"]["mean_words"] = 100.0  # enough: it was silent, had it been on
    first.write_text(json.dumps(metrics))
    progress = Quiet()

    def full(*_: Any) -> Any:
        raise UserError("no space left on the disk")

    with monkeypatch.context() as patch:
        patch.setattr("rlaif.loop.launch.rollback", full)
        said = ", and could not be taken back .no space left on the disk.; .* tries again" if keep else ", but nothing"
        with pytest.raises(RunPaused, match=rf"iteration 2: .*silent after iteration 1{said}"):
            execute(job(2, "rollback"), tmp_path / "run", tmp_path, progress, allow_change=True)
    assert any("none to go back to; set keep_checkpoints" in note for note in progress.notes) == (keep is None)
    assert RunDir(tmp_path / "run").iterations() == [0, 1]
    if keep is None:
        return
    said = ", and is as it was then; what came after is kept in .*change a setting"
    with pytest.raises(RunPaused, match=rf"iteration 2: .*silent after iteration 1{said}"):
        execute(job(2, "rollback"), tmp_path / "run", tmp_path, progress, allow_change=True)
    assert RunDir(tmp_path / "run").iterations() == [0]


def test_the_evaluation_at_a_change_of_text_raises_the_kl_alarm(tmp_path: Path) -> None:
    # Any KL is over the limit; iteration 3 is the first under another text, and no evaluation is due before the last.
    job = stub_job(
        schedule={0: "rules@1", 2: "rules@2"},
        iterations=3,
        eval={"every": 9, "prompts": 3},
        monitors={"kl": {"limit": -99}},
    )
    progress = Quiet()
    stub_loop(tmp_path, job, progress=progress).run()
    assert RunDir(tmp_path / "run").evaluations() == [0, 2, 3]
    assert [k for k, message in events(tmp_path, "alarm") if "KL from the base" in message] == [1, 2]
    assert sum("alarm in iteration 2: KL" in note for note in progress.notes) == 1

    pausing = Monitors.model_validate({"kl": {"limit": -99, "action": "pause"}})
    stopping = job.model_copy(update={"monitors": pausing})
    with pytest.raises(RunPaused, match="paused at an alarm in iteration 2: KL"):
        stub_loop(tmp_path / "other", stopping).run()
    with pytest.raises(RunPaused, match="paused at an alarm in iteration 3: KL"):  # resumed, it goes on
        stub_loop(tmp_path / "other", stopping).run()


def test_a_run_that_ends_earlier_than_planned_is_evaluated_at_its_end(tmp_path: Path) -> None:
    job = stub_job(filters={"min_kept_pairs": 1}, eval={"every": 4, "prompts": 3})
    loop = stub_loop(tmp_path, job)
    loop.iterate(0)
    run = RunDir(tmp_path / "run")
    assert run.evaluations() == [0]
    stub_loop(tmp_path, job.model_copy(update={"iterations": 1})).run()
    assert run.evaluations() == [0, 1]


def test_weights_of_policies_that_nobody_needs_are_removed(tmp_path: Path) -> None:
    stub_loop(tmp_path, stub_job(filters={"min_kept_pairs": 1}, eval={"every": 4, "prompts": 3})).run()
    run = RunDir(tmp_path / "run")
    kept = [k for k in run.iterations() if (run.iteration(k).path / "policy").exists()]
    assert kept == [1, 3]  # evaluated at the change of text, and at the end
    assert [p.name for p in (run.path / "learner").iterdir()] == ["0003"]


def test_without_a_held_out_contrast_nor_a_rule_to_derive_one_from_there_is_no_win_rate(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1)
    plain = "".join(line for line in text(1).splitlines(keepends=True) if "use: evaluate" not in line)
    (folder / "v1.yaml").write_text(plain.replace("Rule 1.", "1."))
    run_some(tmp_path, 1)
    metrics = json.loads((RunDir(tmp_path / "run").evaluation(1).path / "metrics.json").read_text())
    assert metrics["win_rate"] is None
    assert metrics["win_interval"] is None


def test_a_judge_that_leaves_a_ballot_is_an_error_not_a_guess(tmp_path: Path) -> None:
    from rlaif.errors import RlaifError
    from tests.stubs import StubJudge

    loop = stub_loop(tmp_path)
    judge = StubJudge()
    cast = judge.cast
    judge.cast = lambda ballots, **kwargs: cast(ballots[:-1], **kwargs)  # type: ignore[method-assign,assignment]
    loop.judge.target = judge  # type: ignore[attr-defined]
    with pytest.raises(RlaifError, match=r"left 1 of .* ballots unanswered"):
        loop.run()
