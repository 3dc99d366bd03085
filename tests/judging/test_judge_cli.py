"""`rlaif judge bench` and `calibrate` from the command line, on recorded votes: no model is loaded."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest

from rlaif import cli
from rlaif.cli import judge_common
from tests.judging.fault_server import FaultServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rlaif(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs `rlaif judge ...` in a folder with labelled pairs and votes: (exit code, stdout, stderr)."""
    rows = [
        {"input": f"q{n}", "output_1": "short", "output_2": "longer", "label": 1 + n % 2, "topic": "ab"[n > 39]}
        for n in range(80)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    lines = ["row,judge,strategy,winner_ab,winner_ba_mapped"]
    for n in range(80):
        right, wrong = 1 + n % 2, 2 - n % 2
        lines.append(f"{n},good,plain,{right if n % 40 else wrong},{right if n % 40 else wrong}")
        lines.append(f"{n},coin,plain,{right if n % 3 else wrong},{wrong if n % 4 else right}")
    (tmp_path / "votes.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlaif", "judge", *arguments])
        with pytest.raises(SystemExit) as e:
            cli.main()
            sys.exit(0)
        out = capsys.readouterr()
        return int(e.value.code or 0), out.out, out.err

    return run


RECORDED = ("pairs.json", "--votes", "votes.csv")


def test_bench_reports_every_judge(rlaif) -> None:
    code, out, _ = rlaif("bench", *RECORDED, "--by", "topic", "--splits", "20", "--json")
    report = json.loads(out)
    assert code == 0
    assert [(s["judge"], s["name"]) for s in report["slices"]] == [
        ("good", "a"), ("good", "b"), ("good", "all"), ("coin", "a"), ("coin", "b"), ("coin", "all")
    ]  # fmt: skip
    good = report["slices"][2]
    assert good["verdict_accuracy"]["share"] == pytest.approx(78 / 80)
    assert len(report["splits"]) == 4
    assert len(report["pairs"]) == 160


def test_bench_says_how_it_read_the_files_and_what_it_left_out(rlaif, tmp_path: Path) -> None:
    rows = [
        {"id": n, "prompt": "q", "first": "a", "second": "b", "label": (0, 1, 0, "tie")[n % 4], "topic": "x"}
        for n in range(40)
    ]
    (tmp_path / "zero.json").write_text(json.dumps(rows))
    votes = [{"id": n, "winner": ("A", "B", "?")[n % 3]} for n in range(20, 50)]
    (tmp_path / "some.json").write_text(json.dumps(votes))
    arguments = ("zero.json", "--map", "first_is=0,second_is=1", "--votes", "some.json")
    code, out, _ = rlaif("bench", *arguments, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["left_out"] == {"tie": 10, "without a vote": 15, "votes on unknown pairs": 10}
    assert {(c["value"], c["outcome"], c["count"]) for c in report["labels"]} == {
        ("0", "first", 20), ("1", "second", 10), ("tie", "tie", 10)
    }  # fmt: skip
    assert sum(c["count"] for c in report["cells"]) == 15
    for command in (("bench",), ("calibrate", "--to", "c.json")):
        code, out, _ = rlaif(*command, *arguments)
        assert "labels as read: 0→first 20, " in out
        assert "recorded winners that name no side, counted as abstentions: '?' 5" in out
        assert "15 labelled pairs without a vote, 10 votes on unknown pairs" in " ".join(out.split())


def test_what_was_read_otherwise_than_expected_is_said(rlaif, tmp_path: Path) -> None:
    rows = [{"id": n, "prompt": "q", "first": "a", "second": "b", "label": (1, 2, None)[n % 3], "annotator1": 2}
            for n in range(30)]  # fmt: skip
    (tmp_path / "noted.json").write_text(json.dumps(rows))
    votes = [{"id": n, "order": order, "winner": "first"} for n in range(30) for order in ("ab", "ba")]
    (tmp_path / "some.json").write_text(json.dumps(votes))
    code, out, _ = rlaif("bench", "noted.json", "--votes", "some.json")
    assert code == 0
    assert "noted.json: labels are from `label`, not from annotator1" in " ".join(out.split())
    assert "left out: 10 unlabelled" in out
    code, out, _ = rlaif("bench", "noted.json", "--votes", "some.json", "--json")
    assert json.loads(out)["notes"] == [
        "noted.json: labels are from `label`, not from annotator1 (--map label=COLUMN names another column)",
        "second order read as mapped back; --votes-map reversed_slots=winner if its cells name slots",
    ]


def test_bench_prints_tables_and_draws(rlaif, tmp_path: Path) -> None:
    code, out, _ = rlaif("bench", *RECORDED, "--splits", "5", "--picture", "risk.svg")
    assert code == 0
    for heading in (
        "right when kept",
        "rule by rule",
        "order consistency",
        "longer is better",
        "calibrated on a random",
    ):
        assert heading in out
    assert (tmp_path / "risk.svg").stat().st_size > 5_000


def test_a_jury_reports_its_weights(rlaif) -> None:
    code, out, _ = rlaif("bench", *RECORDED, "--jury", "--set", "filters.aggregate=dawid_skene")
    assert code == 0
    assert "juror weights (jury): coin 1.00, good 1.00" in out  # two can't tell who is right


def test_calibrate_then_filter(rlaif, tmp_path: Path) -> None:
    code, out, err = rlaif("calibrate", *RECORDED, "--where", "judge=good", "--to", "c.json")
    assert code == 0
    assert "all: keep agreement >= 1. 2 wrong of 80 kept" in out
    assert "wrote c.json" in err
    assert json.loads((tmp_path / "c.json").read_text())["models"] == ["good"]
    use = ("--set", "filters.calibration=c.json")
    code, out, _ = rlaif("bench", *RECORDED, "--where", "judge=good", *use, "--json")
    assert json.loads(out)["slices"][0]["coverage"]["share"] == 1.0
    code, out, err = rlaif("bench", *RECORDED, "--where", "judge=coin", *use)
    assert (code, out) == (2, "")
    assert "filters.calibration c.json: the judge is coin, calibrated was good" in err
    code, out, _ = rlaif(
        "bench", *RECORDED, "--where", "judge=coin", *use, "--set", "filters.uncalibrated=drop", "--json"
    )
    assert json.loads(out)["slices"][0]["reasons"]["uncalibrated"] == 80


def test_a_calibration_by_slice_needs_the_slices_named(rlaif, tmp_path: Path) -> None:
    calibrate = ("calibrate", *RECORDED, "--where", "judge=good", "--to", "c.json")
    assert rlaif(*calibrate, "--by", "topic")[0] == 0
    use = ("bench", *RECORDED, "--where", "judge=good", "--set", "filters.calibration=c.json")
    code, out, err = rlaif(*use)
    assert (code, out) == (2, "")
    assert "c.json has thresholds for a, b; none for pairs; name the slices' column with --by" in err
    assert rlaif(*use, "--by", "topic")[0] == 0
    assert rlaif(*calibrate, "--by", "topic", "--where", "topic=a")[0] == 0
    code, out, _ = rlaif(*use, "--by", "topic")
    assert code == 0
    assert "all pairs of b are dropped (uncalibrated): c.json has thresholds for a; none for them" in out


def test_a_judge_without_a_vote_on_some_pairs_is_named(rlaif, tmp_path: Path) -> None:
    lines = (tmp_path / "votes.csv").read_text().splitlines(keepends=True)
    (tmp_path / "votes.csv").write_text("".join(x for x in lines if not x.startswith(("3,good", "4,good", "5,coin"))))
    code, out, _ = rlaif("bench", *RECORDED)
    assert code == 0
    assert "good: no vote on 2 of 80 pairs; its figures are of the others" in out
    assert json.loads(rlaif("bench", *RECORDED, "--json")[1])["unvoted"] == {"good": 2, "coin": 1}


def test_a_judge_that_can_not_be_used_is_an_answer(rlaif, tmp_path: Path) -> None:
    code, out, err = rlaif("calibrate", *RECORDED, "--where", "judge=coin", "--by", "topic", "--to", "c.json")
    assert code == 0
    assert out.count("this judge can't be used at alpha=0.1 on this slice") == 2
    assert "a filter with it keeps nothing" in err
    assert not any(s["accepted"] for s in json.loads((tmp_path / "c.json").read_text())["slices"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "gone.json"], "gone.json: can't read the file"),
        (["bench", *RECORDED, "--where", "judg=good"], "--where judg=...: no such column; there is"),
        (["bench", *RECORDED, "--by", "colour"], "no column `colour`"),
        (["bench", *RECORDED, "--score", "luck"], "--score luck: expected agreement, margin or fitted"),
        (["bench", *RECORDED, "--alpha", "1.5"], "--alpha 1.5: expected a share between 0 and 1"),
        (["bench", *RECORDED, "--picture", "r.bmp"], "must end in .png or .svg"),
        (["bench", *RECORDED, "--split", "tst"], "--split tst: expected dev, test or all"),
        (["bench", *RECORDED, "--set", "filters.calibration=no.json"], "filters.calibration no.json: can't read it"),
        (["bench", *RECORDED, "--set", "filters.calibration=pairs.json"], "pairs.json: schema version None"),
        (["calibrate", *RECORDED, "--to", "c.json"], "votes of several judges (good, coin); choose one"),
        (["calibrate", *RECORDED, "--where", "judge=good", "--to", "no/c.json"], "there is no folder no"),
        (["calibrate", "gone.json", "--to", "."], "--to .: this is a folder"),  # before anything is read or asked
        (["calibrate", "gone.json", "--to", "/proc/c.json"], "--to /proc/c.json: can't write to the folder /proc"),
        (
            ["calibrate", *RECORDED, "--where", "judge=good", "--score", "fitted", "--to", "c.json"],
            "needs 100 labelled",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(rlaif, arguments: list[str], message: str) -> None:
    code, out, err = rlaif(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.fixture
def asked(rlaif, tmp_path: Path):
    """`rlaif judge ...` on ten pairs with a chat judge behind a server: (requests, exit code, stderr)."""
    shutil.copytree(ROOT / "prompts" / "judge", tmp_path / "prompts" / "judge")
    rows = [{"id": n, "prompt": "q", "first": "So.", "second": "Because.", "label": 2} for n in range(10)]
    (tmp_path / "ten.json").write_text(json.dumps(rows))
    settings = {"kind": "chat", "model": "m", "api_key_env": "null", "cache": "null", "concurrency": "1"}

    def run(command: str, *arguments: str, **judge: str) -> tuple[int, int, str]:
        with FaultServer() as server:
            sets = [f"--set=judge.{k}={v}" for k, v in {**settings, "base_url": server.url, **judge}.items()]
            code, _, err = rlaif(command, "ten.json", f"--dir={ROOT / 'constitutions'}", *sets, *arguments)
            return server.requests, code, err

    return run


def test_a_bench_whose_budget_ends_says_what_is_kept(asked) -> None:
    asked_, code, err = asked("bench", **{"budget.calls": "3"})
    assert (asked_, code) == (3, 2)
    assert "judge.budget.calls=3 is spent" in err
    assert "without judge.cache its replies so far are lost" in err
    assert "every vote is saved" not in err
    _, _, err = asked("bench", **{"budget.calls": "3", "cache": "replies"})
    assert "its replies are kept in judge.cache, and the same command goes on from there" in err


def test_a_calibration_of_other_questions_is_refused_before_the_first_request(asked, tmp_path: Path) -> None:
    from tests.judging.test_calibration import calibration

    (tmp_path / "c.json").write_text(calibration().model_dump_json())
    requests, code, err = asked("bench", "--set", "filters.calibration=c.json")
    assert (requests, code) == (0, 2)
    assert "filters.calibration c.json: the judge is chat:m@" in err


def judge_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """`rlaif judge ...`, which must end well."""
    judge_common.loader.cache_clear()  # a process of its own would read the texts again, too
    monkeypatch.setattr(sys, "argv", ["rlaif", "judge", *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
        sys.exit(0)
    assert not e.value.code


def labelled_project(root: Path, model: Path) -> None:
    """The tiny project, and thirty labelled pairs in words of its model."""
    from tests.conftest import make_project

    make_project(root, model)
    rows = [{"id": f"r{n}", "prompt": f"w{n} w4", "first": f"w{n + 3} w5.", "second": "w6 w7 w8.", "label": "first",
             "constitution": "rules@1"} for n in range(30)]  # fmt: skip
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_the_likelihood_judge_is_calibrated_under_the_name_that_a_run_gives_it(
    tiny_model, tmp_path, monkeypatch, capsys
):
    from rlaif import models

    labelled_project(tmp_path, tiny_model)
    for command in (["bench", "--json"], ["calibrate", "--to", "c.json"]):
        judge_command(monkeypatch, *command, "pairs.jsonl", "--job", "tiny.yaml")
    made = json.loads((tmp_path / "c.json").read_text())
    assert made["judge_kind"] == "likelihood"
    assert made["panels"][0]["judges"] == [f"likelihood:{models.digest_of(tiny_model)}"]
    report = json.loads(capsys.readouterr().out.split("\nall: ")[0])
    assert report["slices"][0]["pairs"] == 30
    assert report["slices"][0]["cost"]["prompt_tokens"] > 0
    assert report["slices"][0]["cost"]["calls"] == 0


def test_a_bench_shows_a_reply_for_each_reason_to_abstain(
    rlaif, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-x")
    monkeypatch.setenv("COLUMNS", "250")
    said = iter(["[[A]] and\n[[B]]", "I'm sorry, but I can't compare these."] * 20)
    rows = [{"prompt": f"q{n}", "first": "short", "second": "longer", "label": "second"} for n in range(3)]
    (tmp_path / "three.json").write_text(json.dumps(rows))
    with FaultServer(say=lambda body: next(said)) as server:
        sets = {"kind": "chat", "model": "m", "api_key_env": "TEST_KEY", "base_url": server.url, "cache": "null",
                "concurrency": 1, "reask": 0}  # fmt: skip
        arguments = [f"--set=judge.{k}={v}" for k, v in sets.items()]
        arguments += [f"--dir={ROOT / 'constitutions'}", "--set=constitution=assistant@1",
                      f"--set=judge.templates_dir={ROOT / 'prompts/judge'}"]  # fmt: skip
        code, out, err = rlaif("bench", "three.json", *arguments, "--json")
        assert code == 0, err
        found = json.loads(out)["slices"][0]
        assert found["abstentions"] == {"refused": 3, "unparsed": 3}
        assert found["examples"]["unparsed"]["reply"] == "[[A]] and\n[[B]]"
        assert found["examples"]["refused"]["reply"].startswith("I'm sorry")
        assert found["examples"]["unparsed"]["finish_reason"] == "stop"
        code, out, _ = rlaif("bench", "three.json", *arguments)
    assert code == 0
    assert "[[A]] and\\n[[B]]" in out
    assert "abstentions: the first of each reason" in out


TRIAL = 2
"""Opening a judge compares two ways of computing on two texts of its own."""


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many likelihoods were computed, call by call."""
    from rlaif.judging.kv_scoring import KVScorer

    computed: list[int] = []
    logps = KVScorer.logps

    def counting(self, continuations):
        computed.append(len(continuations))
        return logps(self, continuations)

    monkeypatch.setattr(KVScorer, "logps", counting)
    return computed


@pytest.fixture
def benched(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`rlaif judge bench` with the likelihood judge and a cache: its report, and how many likelihoods it computed."""
    labelled_project(tmp_path, tiny_model)
    computed = counted(monkeypatch)

    def run(*arguments: str, cache: str = "replies") -> tuple[dict, int]:
        computed.clear()
        command = ("bench", "pairs.jsonl", "--job", "tiny.yaml", "--json", "--set", f"judge.cache={cache}")
        judge_command(monkeypatch, *command, *arguments)
        return json.loads(capsys.readouterr().out), sum(computed) - TRIAL

    return run


def bare(report: dict) -> list[dict]:
    return [{k: v for k, v in pair.items() if k != "verdict"} | pair["verdict"] for pair in report["pairs"]]


def test_a_second_bench_asks_a_frozen_judge_nothing_again(benched, tmp_path: Path) -> None:
    first, computed = benched()
    assert computed > 100
    assert first["slices"][0]["cost"]["prompt_tokens"] > 0
    again, computed = benched()
    assert (computed, bare(again)) == (0, bare(first))
    assert again["slices"][0]["cost"]["prompt_tokens"] == 0
    for setting in ("filters.min_margin=0.3", "filters.guards=true", "judge.relevance_tolerance=0.9",
                    "judge.missing_eos_penalty=3", "judge.score_temperature=2"):  # fmt: skip
        stored, computed = benched("--set", setting)
        fresh, _ = benched("--set", setting, cache="null")
        assert (computed, bare(stored)) == (0, bare(fresh)), setting
    rows = (tmp_path / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join([*rows, rows[0].replace('"r0"', '"new"').replace("w8", "w9")]))
    _, computed = benched()
    assert 0 < computed < 30, "only what is new is asked"


def test_other_weights_or_words_meet_no_stored_likelihood(
    benched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.sampling.conftest import make_model

    model = make_model(tmp_path / "judge", seed=1)
    mine = ("--set", f"judge.model={model}")
    first, everything = benched(*mine)
    (tmp_path / "judge" / "model.safetensors").unlink()
    make_model(tmp_path / "judge", seed=2)  # the same place, other weights
    other, computed = benched(*mine)
    assert computed == everything
    assert bare(other) != bare(first)
    config = json.loads((model / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (model / "config.json").write_text(json.dumps(config))
    assert benched(*mine)[1] == everything
    text = tmp_path / "constitutions" / "rules" / "v1.yaml"
    text.write_text(text.read_text().replace("w21", "w9 w21"))
    reworded, computed = benched(*mine)
    assert 0 < computed <= everything
    assert bare(reworded) == bare(benched(*mine, cache="null")[0])


def test_a_cache_that_can_not_be_written_is_told_at_the_start(
    benched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError):
        benched(cache="file")
    assert "judge.cache: can't write to file" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("attack", "--limit", "2"), ("calibrate", "--to", "c.json")])
def test_attacks_and_calibrations_share_what_was_asked(benched, monkeypatch: pytest.MonkeyPatch, command) -> None:
    benched()
    arguments = (*command, "pairs.jsonl", "--job", "tiny.yaml", "--set", "judge.cache=replies")
    judge_command(monkeypatch, *arguments)
    computed = counted(monkeypatch)
    judge_command(monkeypatch, *arguments)
    assert sum(computed) == TRIAL, "asked again"


def test_a_broken_promise_is_said_and_in_json(rlaif, tmp_path: Path) -> None:
    assert rlaif("calibrate", *RECORDED, "--where", "judge=good", "--to", "c.json")[0] == 0
    lines = ["row,judge,strategy,winner_ab,winner_ba_mapped"]
    for n in range(80):
        side = 1 + n % 2 if n % 3 == 0 else 2 - n % 2
        lines.append(f"{n},good,plain,{side},{side}")
    (tmp_path / "shifted.csv").write_text("\n".join(lines))
    shifted = ("pairs.json", "--votes", "shifted.csv", "--set", "filters.calibration=c.json")
    code, out, _ = rlaif("bench", *shifted)
    said = " ".join(out.split())
    assert code == 0
    assert (
        "good, all: the calibration promised an error of at most 0.1 among kept pairs; it is 0.662 of 80 here" in said
    )
    (promise,) = json.loads(rlaif("bench", *shifted, "--json")[1])["promises"]
    assert (promise["kept"], promise["error"]["hits"], promise["broken"]) == (80, 53, True)
    # Calibrating anew says it of the calibration that the job has.
    code, out, _ = rlaif("calibrate", *shifted, "--to", "d.json")
    assert "c.json, all: the calibration promised an error of at most 0.1" in out
    assert "promised" not in rlaif("bench", *RECORDED, "--where", "judge=good", "--set",
                                   "filters.calibration=c.json")[1]  # fmt: skip


def test_splits_print_how_often_the_promise_is_broken(rlaif) -> None:
    _, out, _ = rlaif("bench", *RECORDED, "--splits", "20", "--json")
    trials = json.loads(out)["splits"]
    assert [(t["judge"], t["name"]) for t in trials] == [("good", "all"), ("coin", "all")]
    assert all(t["broken"]["of"] == t["broken_other_half"]["of"] == 20 for t in trials)


def test_how_the_answers_ended_is_said(rlaif, tmp_path: Path) -> None:
    rows = json.loads((tmp_path / "pairs.json").read_text())
    for n, row in enumerate(rows):
        row |= {"finish_reason_1": "length" if n % 4 == 0 else "stop", "finish_reason_2": "stop"}
    (tmp_path / "ended.json").write_text(json.dumps(rows))
    code, out, _ = rlaif("calibrate", "ended.json", *RECORDED[1:], "--where", "judge=good", "--to", "c.json")
    assert code == 0
    assert "160 of 160 labelled answers say how they ended: 20 were cut off, 20 of them beside one that ended" in out
    judged = json.loads((tmp_path / "c.json").read_text())["judged"]
    assert (judged["answers"], judged["cut_off"], judged["one_cut_off"]) == (160, 20, 20)


def test_a_calibration_holds_how_the_job_asks(rlaif, tmp_path: Path) -> None:
    kind = ("--set", "policy.system_prompt=Be kind.")
    assert rlaif("calibrate", *RECORDED, "--where", "judge=good", *kind, "--to", "c.json")[0] == 0
    panels = json.loads((tmp_path / "c.json").read_text())["panels"]
    assert [p["asked_as"] for p in panels] == [{"policy.system_prompt": "Be kind."}]
    use = ("bench", *RECORDED, "--where", "judge=good", "--set", "filters.calibration=c.json")
    assert rlaif(*use, *kind)[0] == 0
    code, _, err = rlaif(*use)
    assert code == 2
    assert "policy.system_prompt is at its default, calibrated was Be kind.; calibrate again" in err


def test_a_jury_is_held_against_the_labels(rlaif, tmp_path: Path) -> None:
    lines = ["row,judge,winner"]
    for n in range(80):
        right, wrong = 1 + n % 2, 2 - n % 2
        lines += [f"{n},alone,{right if n % 7 else wrong}"]
        lines += [f"{n},{name},{wrong if (n + 3 * k) % 9 else right}" for k, name in enumerate("xyz")]
    (tmp_path / "jury.csv").write_text("\n".join(lines))
    jury = ("pairs.json", "--votes", "jury.csv", "--jury", "--set", "filters.aggregate=dawid_skene")
    code, out, _ = rlaif("bench", *jury)
    said = " ".join(out.split())
    assert code == 0
    assert "from the votes on 80 pairs" in said
    assert "the labels contradict the weight 0.00 of alone, which alone is right on 0.850 of 80 pairs" in said
    checks = json.loads(rlaif("bench", *jury, "--json")[1])["juror_checks"]
    assert {c["juror"]: c["contradicted"] for c in checks} == dict.fromkeys(["alone", *"xyz"], True)
    code, out, _ = rlaif("calibrate", *jury, "--alpha", "0.25", "--to", "c.json")
    assert code == 0
    assert "x 0.00, y 0.00, z 0.00; from the labels of 80 pairs" in out
    assert "contradict" not in out
    use = (*jury, "--set", "filters.calibration=c.json")
    found = json.loads(rlaif("bench", *use, "--json")[1])["slices"][0]
    assert found["verdict_accuracy"]["share"] == pytest.approx(0.85)


def test_files_as_people_have_them(rlaif, tmp_path: Path) -> None:
    rows = [{"task": {"text": f"q{n}"}, "a": "x", "b": "y", "said": [1 + n % 2, 1 + n % 2, 1],
             "meta": {"t": "uv"[n % 2]}} for n in range(40)]  # fmt: skip
    (tmp_path / "p.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    for name, slots in (("one", (1, 2)), ("two", (2, 1))):
        votes = [{"results": [{"winner": slots[n % 2]}]} for n in range(40)]
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(votes).encode()))
    files = ("p.json.gz", "--map", "prompt=task.text,first=a,second=b,label=said", "--by", "meta.t",
             "--votes", "one.json.gz", "--votes-map", "forward=results.0.winner")  # fmt: skip
    code, out, err = rlaif("bench", *files)
    assert code == 0, err
    assert "left out: 20 on which annotators disagree" in " ".join(out.split())
    assert "--annotators majority" in " ".join(out.split())
    both = (*files, "--annotators", "majority", "--votes-reversed", "two.json.gz", "--where", "meta.t=v")
    report = json.loads(rlaif("bench", *both, "--json")[1])
    (found,) = report["slices"]
    assert (found["name"], found["pairs"], found["verdict_accuracy"]["share"]) == ("v", 20, 1.0)
    assert found["order_consistency"]["hits"] == 20
    assert any("read in row order" in n for n in report["notes"])
    assert rlaif("bench", *files, "--annotators", "some")[0] == 2
    code, _, err = rlaif("bench", "p.json.gz", "--votes-reversed", "two.json.gz")
    assert (code, "give the first order's votes as --votes" in err) == (2, True)


def test_judges_of_several_files_are_told_apart_by_name(rlaif, tmp_path: Path) -> None:
    for name in ("m1", "m2"):
        (tmp_path / f"{name}.csv").write_text("row,winner\n" + "".join(f"{n},{1 + n % 2}\n" for n in range(80)))
    two = ("pairs.json", "--votes", "m1.csv", "--votes", "m2.csv")
    code, out, _ = rlaif("bench", *two, "--json")
    assert [s["judge"] for s in json.loads(out)["slices"]] == ["m1", "m2"]
    code, _, err = rlaif("calibrate", *two, "--to", "c.json")
    assert (code, "choose one (--where judge=NAME), or add --jury" in err) == (2, True)
    assert rlaif("calibrate", *two, "--jury", "--to", "c.json")[0] == 0
    assert rlaif("calibrate", *two, "--where", "judge=m1", "--to", "c.json")[0] == 0  # as it says
    code, _, err = rlaif("bench", *two, "--where", "judge=m3")
    assert (code, "no row of any --votes file fits" in err) == (2, True)
