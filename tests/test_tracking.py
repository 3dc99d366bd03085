"""What trackers get of the pipeline: the mapping by itself, and what of a run the loop gives them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from rlaif.config import Judge, LikelihoodSettings, parse_job
from rlaif.monitors import tracking
from rlaif.records import (
    Ballot,
    ConstitutionRef,
    DropReason,
    EvaluationMetrics,
    Event,
    IterationMetrics,
    UpdateStep,
    Usage,
    Vote,
)
from rlaif.rundir.store import RunDir, read_record
from tests.stubs import Quiet, StubLearner, stub_job, stub_loop

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
Tracked = list[tuple[int, dict[str, Any]]]


def iterations_of(tracked: Tracked) -> Tracked:
    return [(step, values) for step, values in tracked if "pipeline/kept" in values]


def evaluations_of(tracked: Tracked) -> Tracked:
    return [(step, values) for step, values in tracked if "pipeline/held_out/relevance" in values]


def run(root: Path, tracked: Tracked, **changes: Any) -> RunDir:
    """A stub run to its end; adds what its learner was given to `tracked`."""
    loop = stub_loop(root, stub_job(**changes))
    loop.learner.ready()
    learner: StubLearner = loop.learner.target
    learner.tracked = tracked
    loop.run()
    return loop.dir


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Tracked]:
    """A run of four iterations: the second has too few pairs to train on, the text changes before the third."""
    tracked: Tracked = []
    return run(tmp_path_factory.mktemp("told"), tracked), tracked


def test_every_iteration_is_told_once_also_without_an_update(told: tuple[RunDir, Tracked]) -> None:
    dir, tracked = told
    steps = [dir.iteration(k).read("updates", UpdateStep) for k in range(4)]
    assert [] in steps, "one update was skipped"
    ends, newest = [], 0
    for made in steps:
        newest = made[-1].step if made else newest
        ends.append(newest)
    mine = iterations_of(tracked)
    assert [values["pipeline/iteration"] for _, values in mine] == [1, 2, 3, 4]
    assert [step for step, _ in mine] == ends
    assert [values["pipeline/steps"] for _, values in mine] == [len(s) for s in steps]


def test_every_evaluation_is_told_once_at_the_steps_behind_it(told: tuple[RunDir, Tracked]) -> None:
    dir, tracked = told
    at = {0: 0} | {int(v["pipeline/iteration"]): step for step, v in iterations_of(tracked)}
    mine = evaluations_of(tracked)
    assert [values["pipeline/iteration"] for _, values in mine] == dir.evaluations() == [0, 2, 4]
    assert [step for step, _ in mine] == [at[updates] for updates in dir.evaluations()]


def test_the_numbers_are_those_of_metrics_json(told: tuple[RunDir, Tracked]) -> None:
    dir, tracked = told
    for k, (_, values) in enumerate(iterations_of(tracked)):
        metrics = read_record(dir.iteration(k).path / "metrics.json", IterationMetrics)
        for field in ("kept_share", "mean_agreement", "order_flips", "votes", "review", "judge_tokens", "judge_calls"):
            assert values[f"pipeline/{field}"] == getattr(metrics, field), field
        assert values["pipeline/sampled/mean_words"] == metrics.sampled.mean_words
        for stage, seconds in metrics.seconds.items():
            assert values[f"pipeline/seconds/{stage}"] == seconds
        dropped = {r: values[f"pipeline/dropped_by_first_reason/{r}"] for r in get_args(DropReason)}
        assert {r: n for r, n in dropped.items() if n} == metrics.dropped_by_first_reason
        assert "pipeline/position_bias" not in values, "None is no number"
        assert metrics.weights_gap is not None
        assert values["weights_gap/typical"] == metrics.weights_gap.typical
    for updates, (_, values) in zip(dir.evaluations(), evaluations_of(tracked), strict=True):
        metrics = read_record(dir.evaluation(updates).path / "metrics.json", EvaluationMetrics)
        for field in ("win_rate", "wins", "kl_per_token", "relevance", "mean_words", "seconds"):
            assert values.get(f"pipeline/held_out/{field}") == getattr(metrics, field), field
        if metrics.win_interval:
            low, high = values["pipeline/held_out/win_interval/low"], values["pipeline/held_out/win_interval/high"]
            assert (low, high) == metrics.win_interval
        assert values["pipeline/held_out/checks/wish"] == metrics.checks["wish"]


def test_the_text_in_force_is_a_mark_and_a_number(told: tuple[RunDir, Tracked]) -> None:
    dir, tracked = told
    mine = [v for _, v in iterations_of(tracked)]
    assert [v["pipeline/constitution_number"] for v in mine] == [1, 1, 2, 2]
    refs = [dir.plan(k).constitution for k in range(4)]
    assert [v["pipeline/constitution"] for v in mine] == [f"{ref} ({ref.hash})" for ref in refs]


def test_two_texts_of_one_version_number_differ_and_one_that_comes_back_is_itself(tmp_path: Path) -> None:
    from tests.stubs import text, write_texts

    write_texts(tmp_path, 1)
    (tmp_path / "constitutions/others").mkdir()
    (tmp_path / "constitutions/others/v1.yaml").write_text(text(2))
    tracked: Tracked = []
    run(tmp_path, tracked, iterations=3, schedule={0: "rules@1", 1: "others@1", 2: "rules@1"})
    assert [v["pipeline/constitution_number"] for _, v in iterations_of(tracked)] == [1, 2, 1]


@pytest.mark.parametrize("cut", ["iterations/0001/metrics.json", "iterations/0001/updates", "evaluations/0002/metrics"])
def test_a_resumed_run_tells_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    """Stopped at a write, as by a kill; a new process, whose learner has no state yet, goes on."""
    whole: Tracked = []
    run(tmp_path / "whole", whole)
    from rlaif.loop import evaluation, loop
    from rlaif.rundir import store

    def dies(write: Any) -> Any:
        def writing(path: Path, value: Any) -> None:
            if cut in str(path):
                raise KeyboardInterrupt
            write(path, value)

        return writing

    parts: Tracked = []
    with monkeypatch.context() as patched:
        for module in (loop, evaluation, store):
            patched.setattr(module, "write_json", dies(store.write_json))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", parts)
    before = len(parts)
    run(tmp_path / "parts", parts)
    assert 0 < before < len(parts)

    def points(tracked: Tracked) -> list[Any]:
        kept = ("pipeline/iteration", "pipeline/kept", "pipeline/held_out/relevance", "pipeline/constitution")
        return [(step, *(values.get(name) for name in kept)) for step, values in tracked]

    assert points(parts) == points(whole)
    run(tmp_path / "parts", parts)
    assert len(parts) == len(whole), "a finished run has nothing to tell"


def test_alarms_are_counted_and_told(tmp_path: Path) -> None:
    tracked: Tracked = []
    run(tmp_path, tracked, iterations=2, monitors={"short_answers": {"limit": 99}})
    first, second = (v for _, v in iterations_of(tracked))
    assert (first["pipeline/alarms"], first["pipeline/alarms_so_far"]) == (1, 1)
    assert (second["pipeline/alarms"], second["pipeline/alarms_so_far"]) == (1, 2)
    assert "under 99" in first["pipeline/alarm"]


def test_a_tracker_that_fails_is_an_event_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([["tracker wandb can't be opened (CommError: no route); the run goes on without it"]])
    monkeypatch.setattr(StubLearner, "track", lambda self, values, step: next(said, []))
    progress = Quiet()
    loop = stub_loop(tmp_path, stub_job(iterations=1), progress=progress)
    loop.run()
    (event,) = [e for e in loop.dir.events() if e.kind == "tracker_failed"]
    assert (event.iteration, "no route" in event.message) == (0, True)
    assert sum("no route" in note for note in progress.notes) == 1


# The mapping by itself.

METRICS: dict[str, Any] = {
    "iteration": 2,
    "constitution": ConstitutionRef(name="rules", version=1, hash="abc"),
    "policy": {"iteration": 2, "digest": "d"},
    "sampled": {
        "answers": 8, "mean_words": 4.5, "mean_tokens": 6.0, "list_share": 0.0, "ended_share": 1.0,
        "distinct_share": 1.0,
    },
    "pairs": 4, "votes": 16, "abstentions": {"refused": 2}, "kept": 3, "kept_share": 0.75,
    "dropped_by_first_reason": {"tie": 1}, "mean_agreement": 0.9, "trained_pairs": 3, "replayed_pairs": 0, "steps": 2,
    "loss": 0.5, "grad_norm": 1.0, "learner_metrics": {"margin": 0.1, "accuracy": 0.9},
    "position_bias": 0.6, "judge_calls": 16, "judge_tokens": 160,
    "seconds": {"votes": 3.5}, "juror_weights": {"chat:org/big-1.5@host:8000": 0.8},
    "juror_agreement": {"chat:org/big-1.5@host:8000": 0.9},
    "judged": {
        "pairs": 4, "kept": 3, "mean_agreement": 0.9, "agreement_sd": 0.1, "mean_words": 4.5, "answers": 8,
        "cut_off": 0, "one_cut_off": 0,
    },
    "judge_tokens_per_kept_pair": 53.3,
    "weights_gap": {
        "tokens": 9, "mean": 0.001, "typical": 0.03, "worst": 0.2, "sampler": "vllm bf16", "exported": "bf16"
    },
    "decoding_gap": {"answers": 2, "tokens": 9, "mean": 0.001, "error": 0.001, "typical": 0.01, "worst": 0.1},
}  # fmt: skip
EVALUATION: dict[str, Any] = METRICS["sampled"] | {
    "updates": 3, "constitution": METRICS["constitution"], "win_rate": 0.6, "win_interval": (0.4, 0.8), "wins": 6,
    "length_controlled_win_rate": 0.55, "length_controlled_interval": (0.3, 0.7), "length_controlled_unknown": None,
    "losses": 4, "undecided": 0, "kl_per_token": 0.02, "kl_interval": (0.01, 0.03), "kl_per_completion": 0.4,
    "kl_per_completion_interval": (0.2, 0.6), "kl_answers": 10, "relevance": 1.1, "base_logprob_per_token": -1.5,
    "checks": {"wish": 0.5}, "seconds": 2.0, "weights_gap": METRICS["weights_gap"],
}  # fmt: skip


def chat_judge(**changes: Any) -> Judge:
    tree = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:1/v1", "cache": None, **changes}
    return parse_job({"constitution": "rules@1", "judge": tree}, "test").judge


def vote(**changes: Any) -> Vote:
    fields = {
        "id": "b", "pair_id": "p", "judge": "chat:m@127.0.0.1:1", "voice": "v", "template": "t", "order": "ab",
        "sample": 0, "constitution": "h", "guard": False, "seed": 0, "role": "decide",
    }  # fmt: skip
    ballot = Ballot.model_construct(**fields)
    usage = Usage(prompt_tokens=900, completion_tokens=100)
    return Vote.model_construct(**{"ballot": ballot, "outcome": "first", "usage": usage, "attempts": 2, **changes})


COUNTS = {"probes": 4, "base_passed": 3, "kept": 2, "gained": 1}
RETENTION = {
    "probes": COUNTS,
    "kept_share": 0.67,
    "kept_interval": (0.2, 0.9),
    "by_kind": {"fact": COUNTS},
    "perplexity": 21.0,
    "base_perplexity": 20.0,
    "perplexity_ratio": 1.05,
    "perplexity_ratio_interval": (1.0, 1.1),
    "earlier": {
        "d4c239e08ff69c8d": {
            "constitution": {"name": "rules", "version": 1, "hash": "d4c239e08ff69c8d"},
            "win_rate": 0.5,
            "win_interval": (0.2, 0.8),
            "wins": 1,
            "losses": 1,
            "undecided": 0,
            "abstained": 0,
        }
    },
}

NEWER: dict[str, Any] = {
    "old_pairs": {"expired": 2},
    "stopped_at_kl": 0.3,
    "pair_counts": {"pairs": 6, "abstained": 0, "unanimous": 2, "flipped": 0, "kept": 5},
    "answer_counts": {
        "mean_words_error": 0.9,
        "nats_per_token": 1.7,
        "vocabulary": 126.4,
        "self_praise": 0,
        "to_judge": 0,
    },
    "anchors": {"pairs": 32, "moved": 1},
    "leanings": {"length": {"more": 3, "pairs": 5}},
}
BY_OTHERS: dict[str, Any] = {
    "win_rate": 0.5, "win_interval": (0.2, 0.8), "wins": 1, "losses": 1, "undecided": 0, "abstained": 0
}  # fmt: skip
NEWER_OF_EVALUATION: dict[str, Any] = {
    "retention": RETENTION,
    "distinct_1_in_100": 0.8,
    "distinct_2_in_100": 0.9,
    "repeated_line_share": 0.1,
    "base_checks": {"wish": 0.2},
    "deciding": BY_OTHERS,
    "referred": {"judge": "r", **BY_OTHERS},
}
"""What is there with some settings alone."""


def all_values() -> dict[str, float | str]:
    judge = chat_judge(prices={"m": {"prompt": 1.0, "completion": 10.0}})
    events = [Event(time="", kind="alarm", iteration=2, message="look"), Event(time="", kind="started", message="")]
    iteration = IterationMetrics.model_validate(METRICS | NEWER)
    evaluation = EvaluationMetrics.model_validate(EVALUATION | NEWER_OF_EVALUATION)
    return {
        **tracking.of_evaluation(evaluation, [vote()], judge, 2),
        **tracking.of_iteration(iteration, [vote(), vote(cached=True, attempts=0)], judge, 2, events),
    }


def test_calls_tokens_and_money() -> None:
    values = all_values()
    counted = METRICS["judge_calls"], METRICS["judge_tokens"]
    assert (values["pipeline/judge_calls"], values["pipeline/judge_tokens"]) == counted
    assert (values["pipeline/held_out/judge_calls"], values["pipeline/held_out/judge_tokens"]) == (2, 1000)
    assert values["pipeline/judge_money"] == pytest.approx((900 * 1 + 100 * 10) / 1e6)
    assert values["pipeline/held_out/judge_money"] == pytest.approx((900 * 1 + 100 * 10) / 1e6)


@pytest.mark.parametrize(
    "judge",
    [
        LikelihoodSettings(),
        chat_judge(),
        chat_judge(prices={"other": {"prompt": 1, "completion": 1}}),
        chat_judge(
            prices={"m": {"prompt": 1, "completion": 1}}, jury=[{"model": "n", "base_url": "http://127.0.0.1:2/v1"}]
        ),
    ],
)
def test_money_is_not_guessed_where_a_price_is_missing(judge: Judge) -> None:
    values = tracking.of_iteration(IterationMetrics.model_validate(METRICS), [vote()], judge, 1, [])
    assert "pipeline/judge_tokens" in values
    assert not [name for name in values if "money" in name]


def test_names_are_such_as_every_store_takes() -> None:
    values = all_values()
    assert values["pipeline/juror_weights/chat_org_big-1_5_host_8000"] == 0.8
    assert not [name for name in values if not re.fullmatch(r"[\w-]+(/[\w-]+)+", name)]
    assert all(isinstance(value, int | float | str) and not isinstance(value, bool) for value in values.values())
    assert {name for name, value in values.items() if isinstance(value, str)} == {
        "pipeline/constitution", "pipeline/alarm"
    }  # fmt: skip


def test_numbers_of_the_learner_have_the_names_that_they_always_had() -> None:
    values = all_values()
    assert (values["pipeline/margin"], values["pipeline/accuracy"], values["pipeline/loss"]) == (0.1, 0.9, 0.5)
    assert not [name for name in values if "learner_metrics" in name]
    clash = METRICS | {"learner_metrics": {"kept": -1.0, "of its own": 2.0}}
    found = tracking.of_iteration(IterationMetrics.model_validate(clash), [], chat_judge(), 1, [])
    assert found["pipeline/kept"] == 3, "a learner's name never hides one of the pipeline's"
    assert found["pipeline/of_its_own"] == 2.0


def test_reasons_that_nothing_had_are_zero() -> None:
    values = all_values()
    reasons = {n: v for n, v in values.items() if n.startswith("pipeline/dropped_by_first_reason/")}
    assert len(reasons) == len(get_args(DropReason))
    assert {n.rpartition("/")[2] for n, v in reasons.items() if v} == {"tie"}
    assert values["pipeline/abstentions/refused"] == 2
    assert values["pipeline/abstentions/unparsed"] == 0


def test_the_page_names_every_number() -> None:
    page = (ROOT / "docs/view.md").read_text()
    named = set(re.findall(r"`((?:pipeline|weights_gap|decoding_gap)/[^`]+)`", page))
    patterns = [re.compile(re.sub(r"<\w+>", r"[\\w-]+", name)) for name in named]
    missing = [n for n in all_values() if not any(p.fullmatch(n) for p in patterns)]
    assert not missing
    for pattern, name in zip(patterns, named, strict=True):
        assert any(pattern.fullmatch(n) for n in all_values()), f"{name} is never sent"
