"""The pure parts of the benchmark: ratios, the table, the judge that costs nothing, the measured job."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import loop as bench
from rlaif.records import Ballot, Pair


def report(tuned_bf16_s: float = 110.0, without: tuple[str, ...] = (), **loop: float) -> bench.Report:
    times = {
        "seconds": 20.1, "load_s": 0.5, "sample_s": 10.0, "judge_s": 0.1, "reference_s": 2.0, "steps_s": 7.0,
        "save_s": 0.3, "disk_s": 0.2, "tokens": 4000, "pairs": 32, "steps": 4,
    }  # fmt: skip
    parts = {
        "loop": times | loop,
        "vllm": {"seconds": 9.0, "tokens": 4000, "seconds_without_top_p": 8.0, "tokens_without_top_p": 4000},
        "bare": {"reference_s": 1.5, "forward_backward_s": 4.8, "adam_s": 0.5},
        "trl": trl(100.0, "bf16"),
        "trl_tuned_fp32": trl(90.0, "fp32"),
        "trl_tuned_bf16": trl(tuned_bf16_s, "bf16"),
    }  # fmt: skip
    kept = {name: part for name, part in parts.items() if name not in without}
    missing = dict.fromkeys(without, "not done within 900 s, at: step 1")
    busy = {"loop": 0.0, "vllm": 1.5}
    return bench.Report.model_validate({"prompts": 32, "cores": 2, "busy": busy, "missing": missing, **kept})


def trl(seconds: float, precision: str) -> dict[str, Any]:
    return {"seconds": seconds, "sample_s": 60.0, "tokens": 4000, "steps": 4, "precision": precision}


def test_ratios_are_what_they_say() -> None:
    r = report()
    assert r.ratio_to_trl == pytest.approx(5.0)
    assert r.ratio_to_tuned_trl == pytest.approx(4.5)
    assert r.sampling_vs_vllm == pytest.approx(0.9)
    assert r.sampling_vs_vllm_without_top_p == pytest.approx(0.8)
    assert r.update_vs_bare == pytest.approx(0.7)
    assert r.outside == pytest.approx(0.05)
    assert r.loop.rest_s == pytest.approx(0.2)


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
        "ratio to TRL tuned: 4.50x",
        "ratio to TRL stock: 5.00x",
        "sampling vs vLLM alone: 0.90",
        "update vs bare PyTorch: 0.70",
        "outside model arithmetic: 5.0 %",
    ):
        assert any(found.startswith(line) for found in lines), line


def test_a_missed_aim_is_said() -> None:
    assert "missed" not in bench.render(report(seconds=15.6, load_s=0.2, sample_s=9.9, steps_s=3.0))
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


# What doesn't come to its end.


def test_the_table_leads_with_the_ratio_that_counts() -> None:
    first, *rest = bench.render(report()).splitlines()
    assert first == "ratio to TRL tuned: 4.50x   (aim >= 1.6)"
    heading = next(line for line in rest if line.startswith("seconds"))
    assert heading.split() == ["seconds", "this", "loop", "TRL", "tuned", "TRL", "stock", "limit"]
    assert next(iter(report().ratios())) == "ratio_to_trl_tuned"


@pytest.mark.parametrize(
    ("part", "lost"),
    [
        ("trl", {"ratio_to_trl_stock"}),
        ("trl_tuned_bf16", set()),
        ("vllm", {"sampling_vs_vllm_alone", "sampling_vs_vllm_without_top_p"}),
        ("bare", {"update_vs_bare_pytorch"}),
        ("loop", set(report().ratios())),
    ],
)
def test_a_missing_part_costs_its_own_figures_only(part: str, lost: set[str]) -> None:
    found = report(without=(part,))
    assert {name for name, value in found.ratios().items() if value is None} == lost
    lines = bench.render(found).splitlines()
    assert f"not measured: {part} (not done within 900 s, at: step 1)" in lines
    assert any(line.startswith("iteration without judge") for line in lines)
    assert json.loads(json.dumps({**found.model_dump(), **found.ratios()}))[part] is None


def test_nothing_measured_is_a_report_too() -> None:
    nothing = report(without=tuple(bench.PARTS))
    assert set(nothing.ratios().values()) == {None}
    assert bench.render(nothing).count("not measured") == len(bench.PARTS)


def test_peers_compute_in_what_the_machine_multiplies() -> None:
    assert bench.peer_precision(None, "bf16") == "bf16"
    assert bench.peer_precision(None, "fp32") == "fp32"  # stock TRL would take bf16 by itself
    assert bench.peer_precision("fp32", "bf16") == "fp32"
    with pytest.raises(bench.NotHereError, match="doesn't multiply bf16"):
        bench.peer_precision("bf16", "fp32")
    without_bf16 = report(without=("trl_tuned_bf16",)).model_copy(
        update={"trl": bench.TrlTimes(**trl(100.0, "fp32")), "missing": {"trl_tuned_bf16": "no"}}
    )
    said = bench.render(without_bf16)
    assert "TRL stock: its defaults, in fp32, but for bf16, which this machine doesn't multiply" in said
    assert "TRL tuned: no gradient checkpointing, in fp32, the one measured." in said
    assert "TRL stock: its defaults, in bf16; with" in bench.render(report())


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.slow
def test_a_part_at_work_is_told_of_and_ends_at_its_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('step 1', flush=True)\ntime.sleep(99)"
    )
    started = time.monotonic()
    why = bench.run_part("trl", python(code), tmp_path / "trl.log", limit_s=2.0, beat_s=0.5)
    assert 2 <= time.monotonic() - started < 20
    assert why == "not done within 2 s, at: step 1"
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "measuring: trl, 2 s at most"
    assert "trl: 1 s, step 1" in said
    assert said[-1] == "trl: stopped at its limit of 2 s"
    child = int((tmp_path / "pid").read_text())
    gone, _ = psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=10)
    assert not psutil.pid_exists(child) or gone or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_part_that_ends_is_timed_and_one_that_fails_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run_part("bare", python("print('batch 0')"), tmp_path / "bare.log", limit_s=60) is None
    assert capsys.readouterr().err.splitlines()[-1] == "bare: done in 0 s"
    log = tmp_path / "vllm.log"
    why = bench.run_part("vllm", python("raise SystemExit('no room')"), log, limit_s=60)
    assert why == f"failed with exit code 1: no room; its log is {log}"


def test_a_report_is_made_of_the_parts_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {"loop": "not done within 900 s, at: warm-up", "trl": "failed with exit code 1: no room"}

    def run(part: str, command: list[str], log: Path, limit_s: float) -> str | None:
        said = {"missing": "this machine doesn't multiply bf16"} if part == "trl_tuned_bf16" else trl(90.0, "fp32")
        (tmp_path / f"{part}.json").write_text(json.dumps(said))
        return ends.get(part)

    monkeypatch.setattr(bench, "run_part", run)
    found = bench.measure(tmp_path, tmp_path, [])
    assert found.tuned is not None
    assert found.missing == {
        **ends,
        "vllm": "it works on what the loop sampled",
        "bare": "it works on what the loop sampled",
        "trl_tuned_bf16": "this machine doesn't multiply bf16",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "trl,fast"], "--parts fast: expected some of loop, "),
        (["--parts", "bare,trl"], "--parts: bare works on what the loop sampled; name loop too"),
        (["--limit", "0"], "--limit 0: expected seconds above 0"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_trl_is_measured_in_fp32_and_a_limit_costs_a_part(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    arguments = ["--quick", "--json", "--model", str(tiny_model), "--work", str(tmp_path / "work")]
    code = bench.main([*arguments, "--parts", "trl_tuned_fp32", "--limit", "240"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(out)
    assert found["trl_tuned_fp32"]["precision"] == "fp32"
    assert found["trl_tuned_fp32"]["steps"] == 1
    assert "trl_tuned_fp32: done in" in err
