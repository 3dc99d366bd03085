"""The dry run's counts are those of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaif.config import Job, load_job
from rlaif.errors import UserError
from rlaif.evaluation.probes import shipped
from rlaif.loop import cost as plan_cost
from rlaif.loop.cost import GIB, estimate
from rlaif.loop.launch import asked_about_the_past
from rlaif.records import JudgedStats
from rlaif.rundir.store import RunDir
from tests.conftest import project_job
from tests.judging.test_calibration import calibration
from tests.stubs import stub_loop, write_texts
from tests.test_launched import FSDP2, ON_CPUS
from tests.test_launched import write as write_accelerate
from tests.test_old_pairs import Wishes, written

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = str(ROOT / "prompts" / "judge")
CHAT: dict[str, Any] = {"kind": "chat", "model": "m", "api_key_env": None, "templates_dir": TEMPLATES}


def test_a_calibration_that_is_not_there_is_found() -> None:
    job = load_job(ROOT / "jobs" / "quickstart.yaml", ["filters.calibration=nosuch.json"])
    with pytest.raises(UserError, match=r"nosuch\.json"):
        estimate(job, ROOT)


def test_cut_off_pairs_that_no_label_covers_are_told_before_the_run(tmp_path: Path) -> None:
    job = project_job(tmp_path, "no-such/model", filters={"calibration": "c.json", "uncalibrated": "drop"})
    ended = JudgedStats(pairs=9, kept=9, mean_agreement=1.0, agreement_sd=0.0, mean_words=3, answers=18, cut_off=0,
                        one_cut_off=0)  # fmt: skip

    def said(stats: JudgedStats) -> list[str]:
        (tmp_path / "c.json").write_text(calibration(judged=stats).model_dump_json())
        return [
            w for w in estimate(job, tmp_path)["warnings"] if w.startswith("filters.calibration c.json: pairs with")
        ]

    (warning,) = said(ended)
    assert "one answer that is cut off will be dropped (uncalibrated): an answer that the length limit" in warning
    assert not said(ended.model_copy(update={"cut_off": 4, "one_cut_off": 4}))


def test_a_judge_behind_a_server_is_asked_by_order_template_sample_and_juror() -> None:
    job = ROOT / "jobs" / "quickstart.yaml"
    chat = ["judge.kind=chat", "judge.model=m", "pairing.method=random"]
    more = [*chat, "judge.templates=[pairwise, pairwise_json]", "judge.jury=[{model: n}]"]
    embedded, one, many = (estimate(load_job(job, changes), ROOT) for changes in ([], chat, more))
    assert one["ballots_at_most"] == 2 * one["pairs_at_most"]
    assert many["ballots_at_most"] == 2 * 2 * 2 * many["pairs_at_most"]
    assert one["tokens"]["judged"] < embedded["tokens"]["judged"]


def test_what_is_forgotten_is_asked_at_every_evaluation(tmp_path: Path) -> None:
    """Three texts in turn; the last evaluation also asks about the two before it."""
    schedule = {"iterations": 3, "schedule": {0: "rules@1", 1: "rules@2", 2: "rules@3"}}
    jobs = [project_job(tmp_path, "m", **schedule, eval={"retention": on, "every": 3}) for on in (False, True)]
    write_texts(tmp_path, 3)
    without, found = (estimate(job, tmp_path) for job in jobs)
    assert without["evaluations"] == found["evaluations"] == 4
    one = without["evaluation_ballots_at_most"] / (3 + 2)  # two of them at a change, under the new text, too
    assert found["evaluation_ballots_at_most"] == one * (3 + 2 + 0 + 1 + 2)
    answer = jobs[0].sampling.max_tokens * 0.8
    assert found["tokens"]["sampled"] - without["tokens"]["sampled"] == round(4 * len(shipped()) * answer)
    own = project_job(tmp_path, "m", **schedule, eval={"retention": True, "probes": "none.jsonl"})
    with pytest.raises(UserError, match=r"eval\.probes: .*none\.jsonl: no such file"):
        estimate(own, tmp_path)


def test_what_is_asked_twice_and_of_whom_else_is_in_the_plan() -> None:
    job = ROOT / "jobs" / "quickstart.yaml"
    chat = ["judge.kind=chat", "judge.model=m", "pairing.method=random", "iterations=4", "eval.every=4"]
    second = "eval.reference_judge={kind: likelihood}"
    embedded, one, both = (estimate(load_job(job, changes), ROOT) for changes in ([], chat, [*chat, second]))
    assert (embedded["anchor_ballots_at_most"], embedded["reference_ballots_at_most"]) == (0, 0)
    assert one["anchor_ballots_at_most"] == 2 * min(32, one["pairs_at_most"] * 3 // 4)
    assert both["reference_ballots_at_most"] > 0


def test_judging_old_pairs_again_is_in_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a new text asks anew of the pairs within `max_age`, as far as a limit goes; one that is back has its own."""

    def plan(*texts: Wishes, **replay: Any) -> dict[str, Any]:
        schedule = {2 * n: f"rules@{n + 1}" for n in range(len(texts))}
        tree = {"share": 0.5, "on_change": "rejudge", **replay}
        job = project_job(tmp_path, "m", iterations=6, schedule=schedule, replay=tree)
        for version, wishes in enumerate(texts, 1):
            written(tmp_path, version, wishes)
        return estimate(job, tmp_path)

    one: Wishes = {"wish": 1, "tone": 2}
    other: Wishes = {"wish": 1, "tone": 3}
    more: Wishes = {"wish": 1, "tone": 3, "more": 4}
    each = plan(one, other, more)["pairs_at_most"] // 6

    def owed(*texts: Wishes, **replay: Any) -> int:
        found = plan(*texts, **replay)["rejudged_ballots_at_most"]
        assert isinstance(found, int)
        return found

    assert owed(one, other, more) == each * (2 * 1 + 2 * 2 + 2 * 1), "of the first text's pairs two questions are new"
    assert owed(one, other, more, max_age=1) == each * (1 + 1)
    assert owed(one, other, one) == each * (2 * 1 + 2 * 1)
    assert owed(one, other, more, rejudge={"calls": 1}) == 2 + 2
    assert owed(one) == 0, "the text stays"
    assert owed(one, other, more, on_change="expire") == owed(one, other, more, share=0) == 0
    plan_cost.table(plan(one, other, one), tmp_path / "job.yaml")
    assert f"and {4 * each} about old pairs (replay.on_change)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_of_a_begun_run_what_is_left_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"schedule": {0: "rules@1", 2: "rules@2"}, "eval": {"retention": True, "every": 2}}
    job = project_job(tmp_path, "m", iterations=4, **changes)
    run = RunDir(tmp_path / "run")
    asked_about_the_past(run, job, tmp_path)  # makes the run's copies
    stub_loop(tmp_path, job).run()
    longer = job.model_copy(update={"iterations": 6})
    whole, left = estimate(longer, tmp_path), estimate(longer, tmp_path, run)
    assert (whole["iterations_done"], left["iterations_done"]) == (None, 4)
    for counted in ("samples", "pairs_at_most", "scores", "ballots_at_most"):
        assert left[counted] * 3 == whole[counted] > 0, counted
    assert (whole["evaluations"], left["evaluations"]) == (4, 1)
    assert left["held_out_answers"] * 4 == whole["held_out_answers"]
    # After 2 under one text, and as what is there at the change under the second; after 4 and 6 under the second and,
    # since it came before, the first.
    assert left["evaluation_ballots_at_most"] * (1 + 1 + 2 + 2) == whole["evaluation_ballots_at_most"] * 2
    assert left["tokens"]["trained"] == pytest.approx(whole["tokens"]["trained"] / 3, abs=1)
    plan_cost.table(left, tmp_path / "job.yaml")
    said = " ".join(capsys.readouterr().out.split())
    assert "4 of these are done, 2 are left; what follows counts what is left" in said
    assert f"{len(shipped())} probes and 20 fixed texts' perplexity at each evaluation" in said
    nothing = estimate(job, tmp_path, run)
    assert all(nothing[counted] == 0 for counted in ("samples", "ballots_at_most", "evaluations", "held_out_answers"))
    (run.path / "prompts" / "probes.jsonl").unlink()  # as of a run that began without them
    assert estimate(longer, tmp_path, run)["probes"] == 0


@pytest.mark.slow
def test_an_evaluation_that_a_change_of_text_owes_is_counted(tmp_path: Path) -> None:
    """A branch lacks the parent's, which only its next iteration made."""
    job = project_job(tmp_path, "m", iterations=3, schedule={0: "rules@1", 3: "rules@2"}, eval={"every": 9})
    stub_loop(tmp_path, job).run()
    run, longer = RunDir(tmp_path / "run"), job.model_copy(update={"iterations": 4})
    assert estimate(longer, tmp_path, run)["evaluations"] == 1
    shutil.rmtree(run.evaluation(3).path)
    assert estimate(longer, tmp_path, run)["evaluations"] == 2


def test_the_plan_says_what_is_replayed_and_where_no_rollback_leads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"monitors": {"kl": {"action": "rollback"}}, "replay": {"share": 0.5, "max_age": 3}}
    found = estimate(project_job(tmp_path, "m", **changes), tmp_path)
    warning = "monitors.kl.action=rollback: only the newest checkpoint is kept, so there is none to go back to"
    assert any(warning in said for said in found["warnings"])
    plan_cost.table(found, tmp_path / "job.yaml")
    said = " ".join(capsys.readouterr().out.split())
    assert "at most 50% of an update, pairs of the last 3 iterations; on a change of text: expire" in said
    assert "probes" not in said
    fresh = estimate(project_job(tmp_path, "m", **changes | {"replay": {"share": 0}}, keep_checkpoints="all"), tmp_path)
    assert fresh["tokens"]["trained"] * 2 == pytest.approx(found["tokens"]["trained"], abs=1)
    assert not any("rollback" in said for said in fresh["warnings"])


def test_the_plan_says_what_it_cant_count_of_old_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody knows before a ballot is cast how many tokens it takes: a limit in them is said, not counted."""
    changes = [
        "judge.kind=chat", "judge.model=m", "judge.prices={m: {prompt: 1, completion: 1}}", "pairing.method=random",
        "iterations=4", "constitution=null", "schedule={0: assistant@1, 2: assistant@2}",
        "replay={share: 0.5, on_change: rejudge}",
    ]  # fmt: skip
    job = ROOT / "jobs" / "quickstart.yaml"
    limits = ["replay.rejudge.tokens=2500", "replay.rejudge.money=0.5"]
    free, limited = (estimate(load_job(job, [*changes, *more]), ROOT) for more in ([], limits))
    assert free["rejudged_ballots_at_most"] == limited["rejudged_ballots_at_most"] > 0
    for costs, told in ((free, False), (limited, True)):
        plan_cost.table(costs, job)
        said = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"and {costs['rejudged_ballots_at_most']} about old pairs (replay.on_change)" in said
        more = "; fewer where an iteration's 2500 tokens or 0.5 money (replay.rejudge) are spent before"
        assert (more in said) == told


WEIGHTS = 2 * plan_cost.REFERENCE_PARAMETERS


def test_two_states_of_the_learner_lie_side_by_side_from_the_second_update_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_cost, "parameters_of", lambda model: None)
    monkeypatch.setattr(plan_cost, "cpu_has_bf16", lambda: True)
    schedule = {"schedule": {0: "rules@1"}}
    one, two = (estimate(project_job(tmp_path, "m", iterations=n, **schedule), tmp_path) for n in (1, 2))
    assert one["evaluations"] == two["evaluations"] == 2
    assert one["disk_gib"] == pytest.approx(WEIGHTS * (3 + 6) / GIB, abs=0.06)
    assert two["disk_gib"] == pytest.approx(WEIGHTS * (3 + 12) / GIB, abs=0.06)
    small = estimate(project_job(tmp_path, "m", iterations=2, learner={"lora": {"r": 8}}, **schedule), tmp_path)
    assert small["disk_gib"] < two["disk_gib"] / 2
    assert small["memory_gib"] < two["memory_gib"] - 1


@pytest.mark.slow
def test_precision_is_what_the_plan_reckons_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cost, "gpu_names", list)

    def plan(precision: str, fast: bool) -> tuple[float, float]:
        monkeypatch.setattr(plan_cost, "cpu_has_bf16", lambda: fast)
        changes = [f"{part}.precision={precision}" for part in ("sampling", "judge", "learner")]
        found = estimate(load_job(ROOT / "jobs" / "quickstart.yaml", changes), ROOT)
        return found["minutes_on_reference_machine"], found["memory_gib"]

    assert plan("auto", True) == plan("bf16", True) < plan("fp32", True)
    assert plan("auto", False) == plan("fp32", False) == plan("fp32", True)
    assert plan("bf16", False) > plan("fp32", False)
    assert plan("bf16", False)[1] == plan("bf16", True)[1] < plan("fp32", True)[1]


def test_a_plan_that_doesnt_fit_or_isnt_reached_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = SimpleNamespace(total=64 * GIB, available=64 * GIB)
    monkeypatch.setattr(plan_cost.psutil, "virtual_memory", lambda: room)
    job = project_job(tmp_path, "m", iterations=2)
    unreached, unknown = estimate(job, tmp_path)["warnings"]
    assert unknown.startswith("m: of unknown size")
    assert unreached == "schedule: rules@2 after 2 iterations is never reached, the run ends at 2"
    monkeypatch.setattr(plan_cost, "parameters_of", lambda model: 70e9)
    memory, disk, _ = estimate(job, tmp_path)["warnings"]
    assert memory.startswith("memory: about ")
    assert disk.startswith("disk: about ")


def test_the_plan_says_where_each_role_runs_and_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cost, "gpu_names", lambda: ["one", "two"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    job = ROOT / "jobs" / "quickstart.yaml"
    found = estimate(load_job(job, ["placement.judge.worker=inline"]), ROOT)
    assert found["placement"] == {"sampler": "process on GPU 0", "learner": "process on GPU 1", "judge": "inline"}
    with pytest.raises(UserError, match=r"placement\.judge\.devices: no GPU 2"):
        estimate(load_job(job, ["placement.judge.devices=[2]"]), ROOT)


def bf16_plan(monkeypatch: pytest.MonkeyPatch, job: Job, root: Path) -> dict[str, Any]:
    """Of a policy of the reference's size, on a machine without GPUs."""
    monkeypatch.setattr(plan_cost, "parameters_of", lambda model: None)
    monkeypatch.setattr(plan_cost, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(plan_cost, "gpu_names", list)
    return estimate(job, root)


LEARNER = WEIGHTS * (2 + 7.5) / GIB  # fp32


def test_workers_on_a_cluster_are_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(**cluster: Any) -> dict[str, Any]:
        job = project_job(tmp_path, "m", workers="process", **({"cluster": cluster} if cluster else {}))
        return bf16_plan(monkeypatch, job, tmp_path)

    alone, two = plan(), plan(learner={"processes": 2}, judge={"replicas": 3})
    assert (alone["learner_processes"], two["learner_processes"]) == (1, 2)
    assert alone["placement"] == {"sampler": "process", "judge": "process", "learner": "process"}
    on_ray = {"judge": "3 processes on the cluster (local)", "learner": "2 processes on the cluster (local)"}
    assert two["placement"] == {"sampler": "process", **on_ray}
    more = LEARNER + 2 * WEIGHTS / GIB + 3 * 1.2  # a learner, and two judges, which are the base policy
    assert two["memory_gib"] - alone["memory_gib"] == pytest.approx(more, abs=0.11)
    plan_cost.table(two, tmp_path)
    assert "2 processes on the cluster" in " ".join(capsys.readouterr().out.split())

    away = plan(address="auto", learner={"processes": 2})
    assert away["placement"]["learner"] == "2 processes on the cluster (auto)"
    assert alone["memory_gib"] - away["memory_gib"] == pytest.approx(LEARNER + 1.2, abs=0.11)
    with pytest.raises(UserError, match=r"learner.batch_size: 2 pairs .* the learner's 3 processes; 3 could"):
        plan(learner={"processes": 3})


@pytest.mark.slow
def test_a_learner_that_accelerate_starts_is_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")

    def plan(**said: Any) -> dict[str, Any]:
        learner = {"batch_size": 16, **({"accelerate": "said.yaml"} if said else {})}
        write_accelerate(tmp_path, **said).rename(tmp_path / "said.yaml")
        return bf16_plan(monkeypatch, project_job(tmp_path, "m", workers="process", learner=learner), tmp_path)

    alone, two, four, many = plan(), plan(**ON_CPUS), plan(**FSDP2), plan(**FSDP2 | {"num_processes": 16})
    assert [p["placement"]["learner"] for p in (alone, two, four, many)] == [
        "process", "process, 2 processes", "process, 4 processes", "process, 16 processes",
    ]  # fmt: skip
    assert two["memory_gib"] - alone["memory_gib"] == pytest.approx(LEARNER + 1.2, abs=0.11)
    beside = [p["memory_gib"] - alone["memory_gib"] + LEARNER for p in (four, many)]
    saving, reading = LEARNER + 4 * WEIGHTS / GIB, 16 * 2 * WEIGHTS / GIB
    assert beside == pytest.approx([saving + 3 * 1.2, reading + 15 * 1.2], abs=0.11), "each holds a part"
    monkeypatch.setattr(plan_cost, "gpu_names", lambda: ["one", "two", "three"])
    with pytest.raises(UserError, match=r"learner.accelerate: 16 processes take a GPU each"):
        estimate(load_job(tmp_path / "tiny.yaml"), tmp_path)
    (tmp_path / "said.yaml").rename(tmp_path / "accelerate.yaml")  # no run's copy
    with pytest.raises(UserError, match=r"learner.accelerate: no file .*said.yaml"):
        estimate(load_job(tmp_path / "tiny.yaml"), tmp_path)


def test_of_a_source_nothing_is_sampled_and_stored_labels_cost_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i} w5", "chosen": "w6 w7", "rejected": "w8"} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"iterations": 2, "schedule": {0: "rules@1"}}
    stored = estimate(project_job(tmp_path, "m", source="pairs.jsonl", **given), tmp_path)
    again = estimate(project_job(tmp_path, "m", source={"data": "pairs.jsonl", "rejudge": True}, **given), tmp_path)
    online = estimate(project_job(tmp_path, "m", **given), tmp_path)
    assert stored["source"] == "pairs of pairs.jsonl, labels as stored"
    assert (stored["samples"], stored["scores"], stored["ballots_at_most"]) == (0, 0, 0)
    assert (stored["pairs_at_most"], stored["train_prompts"]) == (12, 9)
    assert again["ballots_at_most"] == online["ballots_at_most"] > 0
    assert stored["tokens"]["sampled"] < online["tokens"]["sampled"]
    assert online["source"] is None


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"sampling": {"engine": "server", "base_url": "10.0.0.1:8000"}}, r"sampling\.base_url: .* is no address"),
        (
            {"sampling": {"engine": "server", "base_url": ["http://a:1", "http://a b"]}},
            r"sampling\.base_url: .* is no a",
        ),
        ({"judge": CHAT | {"base_url": "10.0.0.1:8000/v1"}}, r"judge\.base_url: .* is no address"),
        ({"eval": {"reference_judge": CHAT | {"base_url": "h/v1"}}}, r"judge\.base_url: .* is no address"),
    ],
)
def test_an_address_that_is_none_is_told_before_anything_is_run(
    changes: dict[str, Any], wrong: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=wrong):
        estimate(project_job(tmp_path, "m", **changes), tmp_path)


def test_what_a_run_will_need_and_this_machine_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    monkeypatch.setattr("rlaif.loop.cost.gpu_names", list)
    sampling = {"engine": "server", "replicas": 3, "tensor_parallel_size": 2}
    judge = CHAT | {"base_url": "http://127.0.0.1:1/v1", "api_key_env": "A_KEY"}
    plan = estimate(project_job(tmp_path, "m", sampling=sampling, judge=judge), tmp_path)
    said = plan["warnings"]
    assert "sampling.tensor_parallel_size: for GPUs, and this machine has none" in said
    assert "A_KEY: this environment variable isn't set; a run needs it" in said
    assert plan["sampler_servers"] == "3 servers of vLLM's, started and stopped by the run"
    monkeypatch.setenv("A_KEY", "k")
    one = estimate(
        project_job(tmp_path / "one", "m", sampling=sampling | {"replicas": 1}, judge=judge), tmp_path / "one"
    )
    assert one["memory_gib"] < plan["memory_gib"]
    assert not any("A_KEY" in warning for warning in one["warnings"])


def test_gpus_of_another_machine_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.loop.cost.gpu_names", list)
    places = {"learner": {"worker": "process", "devices": [0]}, "sampler": {"worker": "process", "devices": [2]}}
    job = project_job(tmp_path, "m", placement=places)
    with pytest.raises(
        UserError, match=r"no GPU \d; this process can use none; leave `placement` out, or run it where"
    ):
        estimate(job, tmp_path)
    plan = estimate(job, tmp_path, elsewhere=True)
    assert "placement.*.devices: for GPUs, and this machine has none" in plan["warnings"]
    assert "2" in plan["placement"]["sampler"]
    # Where there are more than the job names, those are the ones that it is planned on.
    monkeypatch.setattr("rlaif.loop.cost.gpu_names", lambda: ["GPU"] * 8)
    assert estimate(job, tmp_path, elsewhere=True)["placement"] == estimate(job, tmp_path)["placement"]
