"""The loop with a judge behind a server: templates in the plan, budgets, rounds, jurors, calibrations, restarts."""

from __future__ import annotations

import _thread
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.audit.replay import replay
from rlaif.audit.replay_settings import settings_of
from rlaif.config import Job
from rlaif.errors import BudgetSpent, JudgeUnavailable, UserError
from rlaif.judging.calibration import panels_of
from rlaif.judging.spending import Spent, spent_on
from rlaif.judging.verdicts import by_pair
from rlaif.loop import Loop
from rlaif.loop.launch import calibration_of, execute
from rlaif.records import Completion, Decision, JudgedStats, OldPair, Pair, Plan, Vote
from rlaif.rundir.store import RunDir, read_json, write_json
from rlaif.workers.inline import InlineWorker
from tests.judging.fault_server import FaultServer
from tests.judging.test_calibration import ACCEPTED, REFUSED, calibration
from tests.stubs import StubSampler, stub_job, stub_loop, write_texts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def greater_number(body: dict[str, Any]) -> str:
    """The slot whose answer holds the greater number: the stub policy's answers are all of one length."""
    text = body["messages"][-1]["content"]
    slots = re.split(r"BEGIN ANSWER B ", text)
    numbers = [re.findall(r"answer (0\.\d+)", part)[-1] for part in slots]
    return "A" if numbers[0] > numbers[1] else "B"


def chat_job(server: FaultServer, judge: dict[str, Any] | None = None, **changes: Any) -> Job:
    settings = {"kind": "chat", "model": "m", "base_url": server.url, "api_key_env": None, "cache": None,
                "max_retries": 0, **(judge or {})}  # fmt: skip
    filters = {"min_kept_pairs": 2, **changes.pop("filters", {})}
    return stub_job(**{"iterations": 3, "judge": settings, "filters": filters, **changes})


def chat_loop(root: Path, job: Job, spent: Spent | None = None) -> Loop:
    if not (root / "prompts").exists():
        shutil.copytree(ROOT / "prompts" / "judge", root / "prompts" / "judge")
    loop = stub_loop(root, job)
    loop.judge = InlineWorker("judge", "rlaif.judging.chat:make", {"settings": job.judge, "spent": spent})
    return loop


def all_votes(loop: Loop) -> list[Vote]:
    stages = [*map(loop.dir.iteration, loop.dir.iterations()), *map(loop.dir.evaluation, loop.dir.evaluations())]
    return [v for stage in stages for name in ("votes", "change_votes") for v in stage.durable(name, Vote)]


def test_a_run_is_judged_over_http(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        loop = chat_loop(tmp_path, chat_job(server))
        loop.run()
    here = loop.dir.iteration(0)
    votes, decisions = here.read("votes", Vote), here.read("decisions", Decision)
    assert {v.ballot.order for v in votes} == {"forward", "reversed"}
    assert all(d.status == "kept" and d.verdict.agreement == 1 for d in decisions)
    plan = Plan.model_validate_json((here.path / "plan.json").read_text())
    copy = loop.dir.path / "constitutions" / plan.templates["pairwise"] / "pairwise.jinja"
    assert copy.read_text() == (tmp_path / "prompts/judge/pairwise.jinja").read_text()
    metrics = json.loads((here.path / "metrics.json").read_text())
    assert metrics["position_bias"] == 0.5
    assert metrics["judge_calls"] == len(votes)
    evaluation = json.loads((loop.dir.evaluation(2).path / "metrics.json").read_text())
    assert evaluation["win_rate"] is not None


def test_what_measures_is_not_the_question_that_trained(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        loop = chat_loop(tmp_path, chat_job(server))
        loop.run()
    plan = loop.dir.plan(0)
    trained = {v.ballot.template for v in loop.dir.iteration(0).read("votes", Vote)}
    measured = {v.ballot.template for v in loop.dir.evaluation(2).read("votes", Vote)}
    assert (trained, measured) == ({plan.templates["pairwise"]}, {plan.templates["pairwise_evaluate"]})
    assert trained != measured


def cutting(loop: Loop, every: Callable[[Completion], bool]) -> None:
    """Lets the stub's answers be cut off."""
    loop.sampler.ready()
    target: Any = loop.sampler.target  # type: ignore[attr-defined]
    sample = target.sample

    def cut(**kwargs: Any) -> Any:
        for chunk in sample(**kwargs):
            yield [c.model_copy(update={"finish_reason": "length"}) if every(c) else c for c in chunk]

    target.sample = cut


@pytest.mark.parametrize("cut_off", ["drop", "keep"])
def test_a_judge_that_likes_half_answers_is_told_watched_and_overruled(tmp_path: Path, cut_off: str) -> None:
    seen: list[str] = []

    def likes_them(body: dict[str, Any]) -> str:
        user = body["messages"][-1]["content"]
        seen.append(user)
        cut = [f"CUT OFF: answer {slot}" in user or f"CUT OFF (draft {slot})" in user for slot in "AB"]
        return greater_number(body) if cut[0] == cut[1] else "AB"[cut[1]]

    with FaultServer(say=likes_them) as server:
        filters = {} if cut_off == "drop" else {"cut_off": cut_off}
        loop = chat_loop(tmp_path, chat_job(server, filters=filters, prompts={"per_iteration": 20}))
        cutting(loop, lambda c: c.index == 0)
        loop.run()
    assert any("CUT OFF" in user for user in seen)
    here = loop.dir.iteration(0)
    cut = {c.id for c in here.read("completions", Completion) if c.cut_off}
    pairs = {p.id: p for p in here.read("pairs", Pair)}
    decisions = here.read("decisions", Decision)
    mixed = [d for d in decisions if (pairs[d.pair_id].first in cut) != (pairs[d.pair_id].second in cut)]
    assert 13 <= len(mixed) < len(decisions), "as many as are no chance"
    assert {d.reasons for d in mixed} == {("cut_off",) if cut_off == "drop" else ()}
    assert all(d.status == "kept" for d in decisions if d not in mixed)
    metrics = json.loads((here.path / "metrics.json").read_text())
    assert (metrics["one_cut_off"], metrics["cut_off_won"]) == (len(mixed), len(mixed))
    alarms = [e.message for e in loop.dir.events() if e.kind == "alarm" and e.iteration == 0]
    assert any("the judge prefers answers that were cut off" in m for m in alarms)


def test_stored_replies_cost_a_run_nothing(tmp_path: Path) -> None:
    found = []
    with FaultServer(say=greater_number) as server:
        for name in ("first", "again"):
            (tmp_path / name).mkdir()
            loop = chat_loop(tmp_path / name, chat_job(server, {"cache": str(tmp_path / "replies")}))
            loop.run()
            found.append(json.loads((loop.dir.iteration(0).path / "metrics.json").read_text()))
    assert found[0]["judge_tokens"] == 102 * found[0]["judge_calls"] > 0
    assert (found[1]["judge_tokens"], found[1]["judge_calls"]) == (0, 0)
    assert found[1]["judge_cached"] == found[1]["votes"]


def test_a_budget_stops_the_run_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        job = chat_job(server, {"budget": {"calls": 7}, "concurrency": 2})
        loop = chat_loop(tmp_path, job)
        with pytest.raises(BudgetSpent, match=r"judge\.budget\.calls=7 is spent"):
            loop.run()
        assert len(all_votes(loop)) == server.requests == 7
        still = chat_loop(tmp_path, job, spent_on(all_votes(loop), job.judge))
        with pytest.raises(BudgetSpent):
            still.run()
        assert server.requests == 7
        more = chat_job(server, {"budget": {"calls": 5000}})
        chat_loop(tmp_path, more, spent_on(all_votes(loop), more.judge)).run()
        cast = all_votes(loop)
        assert len({v.ballot.id for v in cast}) == len(cast) == server.requests  # none asked twice


def test_a_judge_that_is_down_leaves_nothing_behind(tmp_path: Path) -> None:
    with FaultServer(status=503) as server:
        loop = chat_loop(tmp_path, chat_job(server, {"breaker_failures": 3}))
        with pytest.raises(JudgeUnavailable, match="is down"):
            loop.run()
        assert all_votes(loop) == []
        server.status, server.say = None, greater_number
        chat_loop(tmp_path, chat_job(server, {"breaker_failures": 3})).run()
    assert all(v.outcome != "abstain" for v in all_votes(loop))


@pytest.mark.parametrize("content", ["", "A", None])
def test_an_outage_under_200_ends_no_run(tmp_path: Path, content: str | None) -> None:
    """It pauses, with nothing of it in the log or the cache, and goes on when the server is back."""
    down = {"finish_reason": "error", "error": {"code": 502, "message": "upstream idle timeout"},
            "message": {"role": "assistant", "content": content}}  # fmt: skip
    judge = {"cache": str(tmp_path / "replies")}
    with FaultServer(answer=lambda body, times: (200, {}, {"choices": [down]})) as server:
        loop = chat_loop(tmp_path, chat_job(server, judge))
        with pytest.raises(JudgeUnavailable, match="upstream idle timeout"):
            loop.run()
        assert all_votes(loop) == []
        server.answer, server.say = None, greater_number
        chat_loop(tmp_path, chat_job(server, judge)).run()
    assert all(v.outcome != "abstain" and not v.cached for v in all_votes(loop))


def test_early_stop_saves_ballots_and_changes_no_decision(tmp_path: Path) -> None:
    def undecided(body: dict[str, Any]) -> str:
        # One template always names the slot shown first: the pair's order flips, and nothing can save it.
        return "A" if "one letter" in body["messages"][0]["content"] else greater_number(body)

    judge = {"templates": ["pairwise", "pairwise_reasoned"]}
    results = []
    with FaultServer(say=undecided) as server:
        for name, early_stop in (("whole", False), ("early", True)):
            (tmp_path / name).mkdir()
            loop = chat_loop(tmp_path / name, chat_job(server, {**judge, "early_stop": early_stop}))
            loop.run()
            here = loop.dir.iteration(0)
            results.append((here.read("votes", Vote), [d.status for d in here.read("decisions", Decision)]))
            saved = read_json(here.path / "metrics.json")["ballots_saved"]
            assert saved == (len(results[-1][0]) if early_stop else 0)
    (whole, kept), (early, kept_early) = results
    assert kept == kept_early == ["dropped"] * len(kept)
    assert len(early) == len(whole) / 2


def test_early_stop_leaves_no_held_out_pair_out(tmp_path: Path) -> None:
    def undecided_when_held_out(body: dict[str, Any]) -> str:
        return "A" if "held" in body["messages"][-1]["content"] else greater_number(body)

    judge = {"templates": ["pairwise", "pairwise_reasoned"], "early_stop": True}
    with FaultServer(say=undecided_when_held_out) as server:
        loop = chat_loop(tmp_path, chat_job(server, judge))
        loop.run()
    here = loop.dir.evaluation(3)  # a win is a verdict, kept or not, so every vote counts
    assert len(here.read("votes", Vote)) == 4 * len(here.read("pairs", Pair)) > 0
    assert all(d.verdict.order_flip for d in here.read("decisions", Decision))


def test_a_slice_of_a_calibration_is_the_prompts_category(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        plain = chat_loop(tmp_path / "plain", chat_job(server))
        plain.run()
        votes = [v for k in plain.dir.iterations() for v in plain.dir.iteration(k).read("votes", Vote)]
        sliced = chat_loop(tmp_path / "sliced", chat_job(server, filters={"calibration": "c.json"}))
        sliced.train = [p.model_copy(update={"category": "ab"[n % 2]}) for n, p in enumerate(sliced.train)]
        panels = panels_of(by_pair(votes))
        models = tuple({v.model for v in votes})
        sliced.calibration = calibration({"a": ACCEPTED, "b": REFUSED}).model_copy(
            update={"panels": panels, "models": models}
        )
        sliced.run()
    here = sliced.dir.iteration(0)
    category = {p.id: p.category for p in sliced.train}
    status = {p.id: d.status for p, d in zip(here.read("pairs", Pair), here.read("decisions", Decision), strict=True)}
    assert {(category[p.prompt_id], status[p.id]) for p in here.read("pairs", Pair)} == {
        ("a", "kept"),
        ("b", "dropped"),
    }


def calibrated(root: Path, server: FaultServer, stats: JudgedStats | None = None, **changes: Any) -> tuple[Loop, Loop]:
    """A run, and one with a calibration of that run's questions and another job."""
    plain = chat_loop(root / "plain", chat_job(server))
    plain.run()
    votes = [v for k in plain.dir.iterations() for v in plain.dir.iteration(k).read("votes", Vote)]
    filters = {"calibration": "c.json", **changes.pop("filters", {})}
    again = chat_loop(root / "again", chat_job(server, filters=filters, **changes))
    again.calibration = calibration({"all": ACCEPTED}).model_copy(
        update={"panels": panels_of(by_pair(votes)), "models": tuple({v.model for v in votes}), "judged": stats}
    )
    return plain, again


def test_a_run_that_asks_otherwise_than_was_calibrated_stops_before_it_samples(tmp_path: Path) -> None:
    policy = {"system_prompt": "Be kind."}
    with FaultServer(say=greater_number) as server:
        _, loop = calibrated(tmp_path / "stop", server, policy=policy)
        with pytest.raises(UserError, match=r"c.json: policy.system_prompt is Be kind., calibrated was at its default"):
            loop.run()
        assert not (loop.dir.iteration(0).path / "completions.jsonl").exists()
        _, loop = calibrated(tmp_path / "drop", server, policy=policy, filters={"uncalibrated": "drop"})
        loop.run()
    assert {d.reasons for d in loop.dir.iteration(0).read("decisions", Decision)} == {("uncalibrated",)}


def test_a_run_whose_pairs_are_unlike_the_calibrated_ones_raises_an_alarm(tmp_path: Path) -> None:
    stats = JudgedStats(pairs=200, kept=190, mean_agreement=1.0, agreement_sd=0.0, mean_words=90, answers=0, cut_off=0,
                        one_cut_off=0)  # fmt: skip
    with FaultServer(say=greater_number) as server:
        _, loop = calibrated(tmp_path, server, stats, prompts={"per_iteration": 18})
        loop.run()
    assert any("words an answer: " in e.message for e in loop.dir.events() if e.kind == "alarm")
    judged = read_json(loop.dir.iteration(0).path / "metrics.json")["judged"]
    assert judged["kept"] == judged["pairs"] > 0


def test_a_juries_agreement_is_told(tmp_path: Path) -> None:
    jury = [{"model": n, "base_url": "http://127.0.0.1:1/v1", "api_key_env": None} for n in ("n", "o")]
    with FaultServer(say=greater_number) as server:
        jury = [j | {"base_url": server.url} for j in jury]
        loop = chat_loop(tmp_path, chat_job(server, {"jury": jury}, filters={"aggregate": "dawid_skene"}))
        loop.run()
    metrics = read_json(loop.dir.iteration(0).path / "metrics.json")
    assert set(metrics["juror_weights"].values()) == {1.0}  # a handful of pairs
    assert set(metrics["juror_agreement"].values()) == {1.0}
    told = [e for e in loop.dir.events() if e.kind == "jurors"]
    assert len(told) == 3
    assert "weight 1.00, agrees on 100%" in told[0].message
    assert "no weights were fitted on" in told[0].message


def test_judging_that_was_interrupted_is_told(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        with pytest.raises(BudgetSpent):
            chat_loop(tmp_path, chat_job(server, {"budget": {"calls": 7}, "concurrency": 2})).run()
        loop = chat_loop(tmp_path, chat_job(server, {"concurrency": 2}))
        loop.run()
    (event,) = [e for e in loop.dir.events() if e.kind == "judging_interrupted"]
    assert (event.data["durable"], event.data["in_flight_at_most"]) == (7, 2)
    assert event.data["asked_again"] == []  # what was under way at the budget's end was answered


def test_calls_that_were_in_flight_are_named(tmp_path: Path) -> None:
    """Also when no vote is durable yet."""
    with FaultServer(say=greater_number, latency_s=3) as server:
        loop = chat_loop(tmp_path, chat_job(server, {"concurrency": 4}))

        def interrupt() -> None:
            while server.requests < 3:
                time.sleep(0.01)
            _thread.interrupt_main()

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            loop.run()
        assert all_votes(loop) == []
        server.latency_s = 0
        again = chat_loop(tmp_path, chat_job(server, {"concurrency": 4}))
        again.run()
    (event,) = [e for e in again.dir.events() if e.kind == "judging_interrupted"]
    twice = sum(n > 1 for n in server.seen.values())
    assert event.data["durable"] == 0
    assert 3 <= twice <= len(event.data["asked_again"])
    assert {v.ballot.id for v in all_votes(again)} >= set(event.data["asked_again"])
    assert not list(again.dir.path.glob("*/*/votes.asked"))


def test_ballots_of_a_judge_that_is_down_are_named(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        server.status = lambda body: 503 if server.requests > 3 else None
        job = chat_job(server, {"breaker_failures": 3, "concurrency": 1})
        with pytest.raises(JudgeUnavailable):
            chat_loop(tmp_path, job).run()
        server.status = None
        loop = chat_loop(tmp_path, job)
        loop.run()
    (event,) = [e for e in loop.dir.events() if e.kind == "judging_interrupted"]
    assert event.data["durable"] == 3
    assert sum(n > 1 for n in server.seen.values()) <= len(event.data["asked_again"]) <= 4


def test_a_template_that_vanishes_mid_run_is_the_runs_own(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        job = chat_job(server, {"budget": {"calls": 7}})
        with pytest.raises(BudgetSpent):
            chat_loop(tmp_path, job).run()
        shutil.rmtree(tmp_path / "prompts" / "judge")
        chat_loop(tmp_path, chat_job(server)).run()


def test_an_unknown_template_is_found_before_anything_runs(tmp_path: Path) -> None:
    with FaultServer() as server, pytest.raises(UserError, match="did you mean `pairwise`"):
        chat_loop(tmp_path, chat_job(server, {"templates": ["pairwse"]}))


def test_a_missing_key_is_found_before_anything_runs(tmp_path: Path) -> None:
    with FaultServer() as server:
        job = chat_job(server, {"api_key_env": "RLAIF_TEST_NO_SUCH_KEY"})
    with pytest.raises(UserError, match=r"^judge.api_key_env: the environment variable RLAIF_TEST_NO_SUCH_KEY"):
        execute(job, tmp_path / "run", tmp_path, None)
    assert not (tmp_path / "run").exists()


def test_a_secret_in_the_address_never_reaches_a_run(tmp_path: Path) -> None:
    with FaultServer() as server:
        job = chat_job(server, {"base_url": "http://me:hunter2@127.0.0.1:9/v1"})
    with pytest.raises(UserError, match=r"^judge.base_url: http://127.0.0.1:9/v1 comes with a user") as e:
        execute(job, tmp_path / "run", tmp_path, None)
    assert "hunter2" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_a_sliced_calibration_must_fit_the_prompts_categories(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(calibration({"a": ACCEPTED, "b": REFUSED}).model_dump_json())
    job = stub_job(filters={"calibration": "c.json"})
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    notes: list[str] = []
    with pytest.raises(UserError, match=r"no threshold .* categories all, b .*, so nothing would be kept; .* \(a, b\)"):
        calibration_of(run, job, tmp_path, ["all", "b", "b"], notes.append)
    assert not (run.path / "calibration.json").exists()
    assert calibration_of(run, job, tmp_path, ["a", "b"], notes.append) is not None
    assert len(notes) == 1
    assert "categories b (`all`: prompts without one): all of them will be dropped" in notes[0]


def test_a_calibration_of_another_judge_is_found_before_anything_runs(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        loop = chat_loop(tmp_path, chat_job(server, filters={"calibration": "other.json"}))
        loop.calibration = calibration()
        with pytest.raises(UserError, match=r"^filters.calibration other.json: the judge is chat:m@"):
            loop.run()
    assert not loop.dir.iteration(0).is_complete("completions")
    assert server.requests == 0


def test_jurors_that_are_believed_are_written_down(tmp_path: Path) -> None:
    def jury(body: dict[str, Any]) -> str:
        told = greater_number(body)
        return {"contrary": "B" if told == "A" else "A", "first": "A"}.get(body["model"], told)

    with FaultServer(say=jury) as server:
        others = [{"model": m, "base_url": server.url, "api_key_env": None} for m in ("n", "contrary", "first")]
        filters = {"aggregate": "dawid_skene", "min_agreement": 0.6}
        job = chat_job(server, {"jury": others}, filters=filters, prompts={"per_iteration": 20})
        loop = chat_loop(tmp_path, job)
        loop.run()
    weights = json.loads((loop.dir.iteration(0).path / "jurors.json").read_text())["weights"]
    names = {name.split(":")[1].split("@")[0]: weight for name, weight in weights.items()}
    assert names["contrary"] == names["first"] == 0
    assert min(names["m"], names["n"]) > 0.5
    assert {d.status for d in loop.dir.iteration(0).read("decisions", Decision)} == {"kept"}


def test_best_worst_needs_a_judge_that_scores() -> None:
    with pytest.raises(UserError, match="best_worst"):
        stub_job(judge={"kind": "chat", "model": "m"}, pairing={"method": "best_worst"})
    assert stub_job(judge={"kind": "chat", "model": "m"}).pairing.method == "random"


@pytest.mark.parametrize("uncalibrated", ["stop", "drop"])
def test_pairs_with_a_cut_off_answer_are_dropped_where_none_was_calibrated(
    tmp_path: Path, uncalibrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A likelihood judge takes a penalty from an answer that the length limit cut off. Said at the start, whatever a
    mismatch of settings does."""
    recorded = StubSampler._recorded

    def cut(self: StubSampler, **fields: Any) -> Completion:
        return recorded(self, **fields | {"finish_reason": "length" if fields["index"] else "stop"})

    monkeypatch.setattr(StubSampler, "_recorded", cut)
    plain = stub_loop(tmp_path / "plain", stub_job())
    plain.run()
    votes = [v for k in plain.dir.iterations() for v in plain.dir.iteration(k).read("votes", Vote)]
    stats = JudgedStats(pairs=9, kept=9, mean_agreement=1.0, agreement_sd=0.0, mean_words=3, answers=0, cut_off=0,
                        one_cut_off=0)  # fmt: skip
    filters = {"min_kept_pairs": 3, "calibration": "c.json", "uncalibrated": uncalibrated}
    loop = stub_loop(tmp_path / "again", stub_job(filters=filters))
    found = {"panels": panels_of(by_pair(votes)), "models": ("stub",), "judged": stats}
    loop.calibration = calibration({"all": ACCEPTED}).model_copy(update=found)
    loop.run()
    (event,) = [e for e in loop.dir.events() if e.kind == "cut_off_uncalibrated"]
    assert event.message.startswith("pairs with one answer that is cut off will be dropped (uncalibrated): an answer")
    before = {d.pair_id: d for k in plain.dir.iterations() for d in plain.dir.iteration(k).read("decisions", Decision)}
    one = both = 0
    for k in loop.dir.iterations():
        ends = {c.id: c.finish_reason for c in loop.dir.iteration(k).read("completions", Completion)}
        pairs = {p.id: p for p in loop.dir.iteration(k).read("pairs", Pair)}
        for d in loop.dir.iteration(k).read("decisions", Decision):
            if len({ends[pairs[d.pair_id].first], ends[pairs[d.pair_id].second]}) == 2:
                assert "uncalibrated" in d.reasons
                one += 1
            elif k == 0:  # of the same policy: decided as where all answers ended
                assert d.status == before[d.pair_id].status
                both += 1
    assert min(one, both) > 0
    mixed = stats.model_copy(update={"answers": 18, "cut_off": 4, "one_cut_off": 4})
    loop = stub_loop(tmp_path / "mixed", stub_job(filters=filters))
    loop.calibration = calibration({"all": ACCEPTED}).model_copy(update=found | {"judged": mixed})
    loop.run()
    assert not [e for e in loop.dir.events() if e.kind == "cut_off_uncalibrated"]


def test_how_a_job_asks_is_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    stats = JudgedStats(pairs=9, kept=9, mean_agreement=1.0, agreement_sd=0.0, mean_words=3, answers=0, cut_off=0,
                        one_cut_off=0)  # fmt: skip
    (tmp_path / "c.json").write_text(calibration().model_copy(update={"judged": stats}).model_dump_json())

    def start(**changes: Any) -> None:
        filters = {"calibration": "c.json", **changes.pop("filters", {})}
        calibration_of(RunDir(tmp_path / "run"), stub_job(filters=filters, **changes), tmp_path, ["all"], print)

    (tmp_path / "run").mkdir()
    start()  # that no labelled answer was cut off is told when the loop begins
    (tmp_path / "run" / "calibration.json").unlink()
    chat = {"judge": {"kind": "chat", "model": "m"}}
    with pytest.raises(
        UserError, match=r"policy.chat_template_args is \{'enable_thinking': False\}, calibrated was at"
    ):
        start(policy={"chat_template_args": {"enable_thinking": False}}, **chat)
    with pytest.raises(UserError, match=r"policy.thinking is judge, calibrated was at its default"):
        start(policy={"thinking": "judge"}, **chat)
    start(**chat)
    (tmp_path / "run" / "calibration.json").unlink()
    start(filters={"uncalibrated": "drop"})


# Old pairs under a new text.


def rejudging(server: FaultServer, **rejudge: Any) -> Job:
    return chat_job(server, replay={"share": 0.5, "on_change": "rejudge", "rejudge": rejudge})


def test_old_pairs_are_judged_again_over_http_and_count_against_the_budget(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        loop = chat_loop(tmp_path, rejudging(server))
        loop.run()
    new = loop.dir.iteration(2).read("rejudged_votes", Vote)
    old = loop.dir.iteration(2).read("old_pairs", OldPair)
    kept = [d for k in (0, 1) for d in loop.dir.iteration(k).read("decisions", Decision) if d.status == "kept"]
    assert len(new) == 2 * len(old) == 2 * len(kept) > 0, (
        "the shipped template shows the whole text: all is asked again"
    )
    assert {v.ballot.order for v in new} == {"forward", "reversed"}
    assert {r.standing for r in old} == {"kept"}, "the judge looks at the answers alone"
    spent = spent_on([*all_votes(loop), *new], loop.job.judge)
    assert spent.calls == len(server.bodies) == len(all_votes(loop)) + len(new)
    metrics = json.loads((loop.dir.iteration(2).path / "metrics.json").read_text())
    assert metrics["old_pairs"] == {"kept": len(old)}
    at_change = loop.dir.iteration(2).read("change_votes", Vote)
    assert metrics["judge_calls"] == len(new) + len(loop.dir.iteration(2).read("votes", Vote)) + len(at_change)
    write_json(loop.dir.path / "run.json", {"schema_version": 2, "job": loop.job.model_dump(mode="json")})
    again = replay(loop.dir, *settings_of(loop.dir, tmp_path))
    assert [(o.pairs, o.kept_before, o.kept_after) for o in again.old_pairs] == [(len(old),) * 3]
    assert again.problems == ()


def test_tokens_of_an_iteration_are_limited(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        loop = chat_loop(tmp_path / "all", rejudging(server))
        loop.run()
        each = [v.usage.prompt_tokens + v.usage.completion_tokens for v in all_votes(loop)]
        pair = 2 * max(each)
        assert min(each) > 0
        some = chat_loop(tmp_path / "some", rejudging(server, tokens=int(3.5 * pair)))
        some.run()
    new = some.dir.iteration(2).read("rejudged_votes", Vote)
    used = sum(v.usage.prompt_tokens + v.usage.completion_tokens for v in new)
    old = some.dir.iteration(2).read("old_pairs", OldPair)
    assert 0 < used <= 3.5 * pair
    assert len(new) == 2 * sum(r.standing == "kept" for r in old) >= 6
    assert sum(r.standing == "waiting" for r in old) == len(old) - len(new) // 2 > 0


def test_votes_from_the_cache_say_nothing_of_what_the_next_ones_cost(tmp_path: Path) -> None:
    def job(server: FaultServer, text: str, **rejudge: Any) -> Job:
        replay = {"share": 0.5, "on_change": "rejudge", "rejudge": rejudge}
        cached = {"cache": str(tmp_path / "cache"), "fingerprint": False}
        return chat_job(server, cached, schedule={0: "rules@1", 2: text}, replay=replay)

    with FaultServer(say=greater_number) as server:
        write_texts(tmp_path / "first", 1, 2, 3)
        first = chat_loop(tmp_path / "first", job(server, "rules@2"))
        first.run()
        each = max(v.usage.prompt_tokens + v.usage.completion_tokens for v in all_votes(first))
        write_texts(tmp_path / "second", 1, 2, 3)
        second = chat_loop(tmp_path / "second", job(server, "rules@3", tokens=5 * each))
        second.run()
    assert all(v.cached for v in second.dir.iteration(0).read("votes", Vote))
    new = second.dir.iteration(2).read("rejudged_votes", Vote)
    used = sum(v.usage.prompt_tokens + v.usage.completion_tokens for v in new if not v.cached)
    assert 0 < used <= 5 * each
    assert any(r.standing == "waiting" for r in second.dir.iteration(2).read("old_pairs", OldPair))
