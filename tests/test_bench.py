"""The pure parts of the benchmark: ratios, the table, the judge that costs nothing, the measured job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import loop as bench
from rlaif.records import Ballot, Pair


def report(tuned_bf16_s: float = 110.0, **loop: float) -> bench.Report:
    times = {
        "seconds": 20.0, "load_s": 0.5, "sample_s": 10.0, "judge_s": 0.1, "reference_s": 2.0, "steps_s": 7.0,
        "save_s": 0.3, "disk_s": 0.2, "tokens": 4000, "pairs": 32, "steps": 4,
    }  # fmt: skip
    return bench.Report.model_validate({
        "prompts": 32,
        "cores": 2,
        "busy": {"loop": 0.0, "vllm": 1.5},
        "loop": times | loop,
        "vllm": {"seconds": 9.0, "tokens": 4000, "seconds_without_top_p": 8.0, "tokens_without_top_p": 4000},
        "bare": {"reference_s": 1.5, "forward_backward_s": 4.8, "adam_s": 0.5},
        "trl": {"seconds": 100.0, "sample_s": 60.0, "tokens": 4000, "steps": 4},
        "trl_tuned_fp32": {"seconds": 90.0, "sample_s": 60.0, "tokens": 4000, "steps": 4},
        "trl_tuned_bf16": {"seconds": tuned_bf16_s, "sample_s": 60.0, "tokens": 4000, "steps": 4},
    })  # fmt: skip


def test_ratios_are_what_they_say() -> None:
    r = report()
    assert r.ratio_to_trl == pytest.approx(5.0)
    assert r.sampling_vs_vllm == pytest.approx(0.9)
    assert r.sampling_vs_vllm_without_top_p == pytest.approx(0.8)
    assert r.update_vs_bare == pytest.approx(0.7)
    assert r.outside == pytest.approx(0.05)
    assert r.loop.rest_s == pytest.approx(0.1)


def test_tuned_trl_is_that_at_its_faster_precision() -> None:
    assert report().ratio_to_tuned_trl == pytest.approx(4.5)
    assert report(tuned_bf16_s=80.0).ratio_to_tuned_trl == pytest.approx(4.0)
    assert "no gradient checkpointing, in fp32" in bench.render(report())
    assert "no gradient checkpointing, in bf16" in bench.render(report(tuned_bf16_s=80.0))


def test_shorter_answers_do_not_count_as_speed() -> None:
    half = report(tokens=2000)
    assert half.ratio_to_trl == pytest.approx(2.5)
    assert half.sampling_vs_vllm == pytest.approx(0.45)


def test_the_stages_add_up_to_the_iteration() -> None:
    t = report().loop
    assert t.load_s + t.sample_s + t.judge_s + t.reference_s + t.steps_s + t.save_s + t.rest_s == pytest.approx(
        t.seconds
    )


def test_the_table_has_the_lines_that_the_issue_names() -> None:
    lines = bench.render(report()).splitlines()
    for line in (
        "ratio to TRL stock: 5.00x",
        "ratio to TRL tuned: 4.50x",
        "sampling vs vLLM alone: 0.90",
        "update vs bare PyTorch: 0.70",
        "outside model arithmetic: 5.0 %",
    ):
        assert any(found.startswith(line) for found in lines), line


def test_a_missed_aim_is_said() -> None:
    assert "missed" not in bench.render(report(seconds=19.5, sample_s=9.9, steps_s=6.9))
    slow = bench.render(report(seconds=40.0, sample_s=20.0, steps_s=14.0)).splitlines()
    assert sum("missed" in line for line in slow) == 4


@dataclass(frozen=True)
class Answer:
    completion_id: str
    text: str


def ballot(pair: Pair, guard: bool) -> Ballot:
    return Ballot(
        id=f"{pair.id}{guard}", pair_id=pair.id, judge="hash", voice="v", principles=("p",), guard=guard,
        constitution="0", template="0",
    )  # fmt: skip


def test_the_free_judge_prefers_a_text_whichever_side_it_is_on() -> None:
    pairs = [Pair(id=str(i), prompt_id="q", first=f"a{i}", second=f"b{i}", method="random") for i in range(20)]
    answers = [Answer(f"{side}{i}", f"{side} says {i}") for i in range(20) for side in "ab"]

    def winners(shown: list[Pair]) -> list[str]:
        ballots = [ballot(p, guard) for p in shown for guard in (False, True)]
        (votes,) = bench.FreeJudge().cast(ballots, shown, answers, constitution=None)
        by_id = {p.id: p for p in shown}
        return [getattr(by_id[v.ballot.pair_id], v.outcome) for v in votes]

    found = winners(pairs)
    assert found == winners([p.swap() for p in pairs])
    assert found[::2] == found[1::2]  # guards agree with the rest
    assert {w[0] for w in found} == {"a", "b"}


def test_the_measured_job_is_the_work_that_the_issue_describes() -> None:
    job = bench.job_for(32)
    assert (job.prompts.per_iteration, job.sampling.completions_per_prompt, job.sampling.max_tokens) == (32, 2, 64)
    assert (job.learner.kind, job.learner.batch_size, job.learner.epochs) == ("dpo", 8, 1)
    assert job.sampling.engine == "vllm"


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.json").write_text("{}")
    assert bench.main(["--work", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
