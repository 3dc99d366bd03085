"""A rule is enough: derived contrasts, who asks for them, what a run keeps of them, and a run from six lines."""

from __future__ import annotations

import json
import pickle
import typing
from pathlib import Path
from typing import Any

import pytest

from benchmarks import derived as bench
from rlaif.audit.index import Index
from rlaif.audit.pair import question
from rlaif.audit.verify import verify
from rlaif.config import ChatSettings, Judge, LikelihoodSettings
from rlaif.constitutions import derived
from rlaif.constitutions.constitution import Constitution, diff, list_constitutions, parse_constitution
from rlaif.constitutions.derived import NEWEST, WORDINGS, Sides, Use, Wordings
from rlaif.errors import UserError
from rlaif.judging import kinds
from rlaif.judging.ballots import evaluating_voices, make_ballots, selecting_voices
from rlaif.judging.candidates import Candidate
from rlaif.judging.kinds import kind_of
from rlaif.judging.opened import open_with_ballots
from rlaif.loop import Loop
from rlaif.loop.in_force import InForce
from rlaif.records import Decision, Message, Pair, Vote
from rlaif.rundir.store import RunDir, write_json
from tests.conftest import ROOT, project_job
from tests.judging.fault_server import FaultServer
from tests.stubs import BASE_DIGEST, Quiet, stub_job, stub_loop, write_texts
from tests.test_loop_chat import chat_job, chat_loop, greater_number

SIX_LINES = """\
summary: Support answers for our shop.
principles:
  - id: polite
    rule: Prefer the answer that is polite and never blames the customer.
  - id: no_promises
    rule: Prefer the answer that makes no promise about delivery dates.
"""
PAIR = Pair(id="p", prompt_id="x", first="a", second="b", method="all")
OTHERS = Wordings(
    id="derived.99",
    **{use: (Sides(prefer=f"{use}: {{rule}}", avoid=f"not {use}: {{rule}}"),) for use in typing.get_args(Use)},
)


def parse(text: str = SIX_LINES) -> Constitution:
    return parse_constitution(text, "support", 1, "v1.yaml")


ASKED = NEWEST.of_rules(p.rule for p in parse().principles)
"""The set as a run of the six lines keeps it."""


def write(root: Path, text: str = SIX_LINES) -> Path:
    folder = root / "constitutions" / "support"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "v1.yaml").write_text(text)
    return folder


def sides(rule: str, wordings: Wordings = NEWEST, opposite: str | None = None) -> list[str]:
    """Wanted, opposite, wanted, …"""
    return [
        " | ".join(side)
        for use in typing.get_args(Use)
        for _, *both in wordings.contrasts(rule, use, opposite)
        for side in both
    ]


def test_id_and_rule_are_a_principle() -> None:
    text = parse()
    assert text.voices() == ()
    assert [p.lacks for p in text.principles] == [("select", "decide", "evaluate")] * 2


def test_derivation_is_no_content() -> None:
    text = parse()
    asked = text.derived_by(NEWEST)
    assert (asked.hash, diff(text, asked)) == (text.hash, [])
    assert asked.model_dump() == text.model_dump()
    assert asked.model_copy().voices() == pickle.loads(pickle.dumps(asked)).voices() == asked.voices() != ()
    assert asked.derived_by(None).voices() == text.voices() == ()  # `derived_by` makes another text


def test_a_text_cannot_bring_its_own_wordings() -> None:
    for key in ("wordings", "_wordings", "derived"):
        with pytest.raises(UserError, match=f"unknown key `{key}`"):
            parse(SIX_LINES + f"{key}: derived.2\n")


@pytest.mark.parametrize("wordings", bench.CANDIDATES, ids=lambda w: w.id)
def test_uses_and_sides_never_share_a_wording(wordings: Wordings) -> None:
    found = sides("Be polite.", wordings)
    preferred = found[::2]
    assert len(set(preferred)) == len(preferred)
    assert all(a != b for a, b in zip(preferred, found[1::2], strict=True))
    assert all("{" not in s for s in found)
    assert len(wordings.decide) >= 3  # else nothing can disagree with two that err alike


def test_a_set_that_changes_gets_a_new_id() -> None:
    # A run records id and hash; another content under an old id would make its log say what isn't so.
    assert {w.id: w.hash for w in WORDINGS} == {"derived.2": "3d095c7d7f3dc4ee"}
    assert len({w.id for w in bench.CANDIDATES}) == len(bench.CANDIDATES)


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ("Prefer the answer that is polite.", "an answer that is polite"),
        ("prefer the answer with short words", "an answer with short words"),
        ("Please choose the reply which\n  names its source.", "an answer which names its source"),
        (
            "Prefer the answer that gives e.g. a number",
            'an answer that keeps to the rule "Prefer the answer that gives',
        ),
        ("Prefer the answer that is short. It must be kind.", 'an answer that keeps to the rule "Prefer the answer'),
        ("Prefer answers that are short.", 'an answer that keeps to the rule "Prefer answers that are short"'),
        ("The answer should name its source.", 'an answer that keeps to the rule "The answer should name its source"'),
        ("Never blame the customer.", 'an answer that keeps to the rule "Never blame the customer"'),
        ("Be polite", 'an answer that keeps to the rule "Be polite"'),
        ("Is it kind?", 'an answer that keeps to the rule "Is it kind?"'),
        ("Sei höflich.", 'an answer that keeps to the rule "Sei höflich"'),
    ],
)
def test_any_phrasing_of_a_rule_is_said_or_quoted_whole(rule: str, answer: str) -> None:
    found = sides(rule)
    assert found[0].startswith(f"I want {answer}")
    plain = " ".join(rule.split())
    plain += "" if plain[-1] in ".?" else "."
    assert f"You are a helpful assistant. {plain}" in found
    assert not any(".." in s or "  " in s for s in found)


def test_a_rule_is_data() -> None:
    rule = "Write {answer}, {opposite_one} and {rule}."
    assert f"You are a helpful assistant. {rule}" in sides(rule)
    assert f"You are a helpful assistant. {rule}" in sides("Be polite.", opposite=rule)


def test_the_opposite_is_the_principles_own_or_the_rule_turned_around() -> None:
    assert sides("Be polite.")[2:4] == [
        "You are a helpful assistant. Be polite.",
        "You are a helpful assistant. Be rude.",
    ]
    own = parse(SIX_LINES + "  - {id: own, rule: Be polite., opposite: Insult everybody.}\n")
    (voice, *_) = (v for v in own.derived_by(NEWEST).voices("decide") if v.principle == "own")
    assert [m.content for m in voice.avoid] == ["You are a helpful assistant. Insult everybody."]
    plain = parse(SIX_LINES + "  - {id: own, rule: Be polite.}\n")
    assert own.hash != plain.hash
    with pytest.raises(UserError, match=r"v1\.yaml:7: .*opposite: it says the same as the rule"):
        parse(SIX_LINES + "  - {id: own, rule: Be polite., opposite: 'Be  polite.'}\n")


def test_what_was_turned_once_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = parse().derived_by(NEWEST)
    copy = Wordings.model_validate_json(asked.wordings.model_dump_json())  # type: ignore[union-attr]
    monkeypatch.setattr(derived, "turned", lambda rule: pytest.fail("turned again"))
    again = parse().derived_by(copy)
    assert again.voices() == asked.voices()
    assert again.wordings == copy


def test_sets_that_say_no_opposite_keep_none() -> None:
    assert parse().derived_by(OTHERS).wordings == OTHERS


def test_a_contrast_of_its_own_goes_before_derived_ones_for_its_use() -> None:
    text = parse(
        SIX_LINES + "  - {id: own, rule: Be brief., prefer: Be brief., avoid: Be long., paraphrases: "
        "[{prefer: a, avoid: b, use: select}]}\n  - {id: guard, rule: Make sense., guard: true}\n"
    )
    asked = kind_of(LikelihoodSettings()).as_read(text)
    ids = [v.id for v in asked.voices() if v.principle == "own"]
    assert ids == ["own/main", "own/paraphrase1", "own/derived.2-evaluate1", "own/derived.2-evaluate2"]
    assert not [v for v in asked.voices() if v.guard]  # measured, not derived
    assert selecting_voices(asked) == ["polite/derived.2-select1", "no_promises/derived.2-select1", "own/paraphrase1"]
    assert len(evaluating_voices(asked)) == 6


def test_shipped_texts_are_asked_as_before() -> None:
    for text in list_constitutions(ROOT / "constitutions"):
        assert not text.derives
        assert kind_of(LikelihoodSettings()).as_read(text).voices() == text.voices()
        assert make_ballots([PAIR], kind_of(LikelihoodSettings()).as_read(text), "j") == make_ballots([PAIR], text, "j")


def test_other_wordings_are_other_questions() -> None:
    a, b = (make_ballots([PAIR], parse().derived_by(w), "j") for w in (NEWEST, OTHERS))
    assert not {x.id for x in a} & {x.id for x in b}
    assert {x.constitution for x in [*a, *b]} == {parse().hash}


@pytest.mark.parametrize("rule", ["...", " ", "42!"])
@pytest.mark.parametrize("judge", [LikelihoodSettings(), ChatSettings(model="m", base_url="http://127.0.0.1:1/v1")])
def test_a_rule_without_a_word_is_refused_where_it_is_used(rule: str, judge: Judge) -> None:
    text = parse(SIX_LINES + f'  - {{id: dots, rule: "{rule}"}}\n')
    with pytest.raises(UserError, match=r"constitution support@1, principle `dots`: .* without a word.*; write what"):
        kind_of(judge).as_read(text)
    own = parse(SIX_LINES + f'  - {{id: dots, rule: "{rule}", prefer: Be kind., avoid: Be rude.}}\n')
    if judge.kind == "likelihood":  # it doesn't read the rule
        assert kind_of(judge).as_read(own).voices("decide")
    else:
        with pytest.raises(UserError, match="has nothing else to go by"):
            kind_of(judge).as_read(own)


def test_a_judge_outside_of_a_run_derives_and_refuses_alike(tiny_model: Path) -> None:
    pytest.importorskip("torch")
    dots = parse(SIX_LINES + '  - {id: dots, rule: "..."}\n')
    nowhere = rules_job(judge={"model": "no/such/model", "cache": None})
    with pytest.raises(UserError, match=r"constitution support@1, principle `dots`"):  # before a model is loaded
        open_with_ballots(nowhere, [parse(), dots], Path.cwd(), print)
    opened = open_with_ballots(rules_job(judge={"model": str(tiny_model), "cache": None}), [parse()], Path.cwd(), print)
    candidates = [
        Candidate(
            completion_id=side, prompt_id="x", messages=(Message(role="user", content="w5"),), finish_reason="stop",
            text=text,
        )
        for side, text in (("a", "w3 w4"), ("b", "w7 w8 w9"))
    ]  # fmt: skip
    votes = [v for chunk in opened.ask([PAIR], candidates, parse()) for v in chunk]
    assert [v.ballot.id for v in votes] == [b.id for b in opened.ballots([PAIR], parse())]
    assert {v.ballot.voice for v in votes} == {
        f"{p}/derived.2-decide{n}" for p in ("polite", "no_promises") for n in (1, 2, 3)
    }


# In a run.


def rules_job(reference: str = "support", **changes: Any) -> Any:
    return stub_job(constitution=reference, iterations=2, filters={"min_kept_pairs": 1}, **changes)


def finished(root: Path, reference: str = "support") -> Loop:
    write(root)
    # The stub's votes are hashes: six are of one mind about one pair in eight.
    job = rules_job(reference, prompts={"per_iteration": 20})
    (root / "run").mkdir()
    header = {"schema_version": 1, "job": job.model_dump(mode="json"), "models": {"policy": BASE_DIGEST}}
    write_json(root / "run" / "run.json", header)
    loop = stub_loop(root, job)
    loop.run()
    return loop


@pytest.mark.parametrize("reference", ["support", "support@1"])
def test_six_lines_get_to_kept_pairs_and_the_log_says_derived(tmp_path: Path, reference: str) -> None:
    loop = finished(tmp_path, reference)
    here = loop.dir.iteration(0)
    plan = loop.dir.plan(0)
    assert plan.derived == {NEWEST.id: ASKED.hash}
    assert any(d.status == "kept" for d in here.read("decisions", Decision))
    voices = {v.ballot.voice for v in here.read("votes", Vote)}
    assert voices == {f"{p}/derived.2-decide{n}" for p in ("polite", "no_promises") for n in (1, 2, 3)}
    measured = {v.ballot.voice for v in loop.dir.evaluation(2).read("votes", Vote)}
    assert measured == {f"{p}/derived.2-evaluate{n}" for p in ("polite", "no_promises") for n in (1, 2)}
    assert json.loads((loop.dir.evaluation(2).path / "metrics.json").read_text())["win_rate"] is not None
    report = verify(RunDir.open(loop.dir.path))
    assert (report.findings, report.notes) == ((), ())
    assert (report.texts, report.templates) == (1, 1)  # the wordings are counted with templates


def test_the_question_of_a_derived_voice_is_shown_from_the_runs_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path).dir
    monkeypatch.setattr(derived, "WORDINGS", (OTHERS,))
    vote = run.iteration(0).read("votes", Vote)[0]
    with Index.open(run) as index:
        shown = question(index, run, vote.ballot.pair_id, vote.ballot.id)
    assert "You are a helpful assistant. Prefer the answer that is polite and never blames the customer." in shown
    assert "You are a helpful assistant. Prefer the answer that is rude and always blames the customer." in shown


def test_changed_wordings_are_found(tmp_path: Path) -> None:
    run = finished(tmp_path).dir
    copy = run.path / "constitutions" / ASKED.hash / "derived.json"
    copy.write_text(copy.read_text().replace("rude", "crude"))
    assert f"constitutions/{ASKED.hash}/derived.json" in {f.file for f in verify(run).findings}


def test_a_pinned_run_keeps_its_wordings_and_one_that_follows_takes_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    runs = {ref: RunDir(tmp_path / ref) for ref in ("support", "support@1")}
    before = {ref: InForce(rules_job(ref), run, tmp_path).at(0)[0] for ref, run in runs.items()}
    monkeypatch.setattr(kinds, "NEWEST", OTHERS)
    after = {ref: InForce(rules_job(ref), run, tmp_path) for ref, run in runs.items()}
    assert after["support@1"].at(1)[0] == before["support@1"]
    follows = after["support"].at(1)[0]
    assert follows.wordings == OTHERS
    assert follows.hash == before["support"].hash
    # What was planned goes on as planned.
    for wordings in (ASKED, OTHERS):
        loaded = after["support"].load(follows.ref, {wordings.id: wordings.hash})
        assert loaded.wordings == wordings


def test_a_run_from_before_goes_on_without(tmp_path: Path) -> None:
    # Its text had contrasts to decide and to select, and none to evaluate: nothing is derived in the middle of a run.
    own = "summary: s\nprinciples:\n  - {id: a, rule: Be kind., prefer: Be kind., avoid: Be rude.,"
    write(tmp_path, own + " paraphrases: [{prefer: Kind., avoid: Rude., use: select}]}\n")
    run = RunDir(tmp_path / "run")
    InForce(rules_job("support@1"), run, tmp_path)
    pins = run.path / "constitutions" / "pins.json"
    known = json.loads(pins.read_text())
    (pin,) = (key for key in known if key.startswith("derived wordings "))
    assert known.pop(pin) == NEWEST.of_rules(["Be kind."]).hash
    pins.write_text(json.dumps(known))
    text = InForce(rules_job("support@1"), run, tmp_path).at(0)[0]
    assert [v.id for v in text.voices()] == ["a/main", "a/paraphrase1"]


def test_nothing_is_kept_of_wordings_that_nobody_asks_with(tmp_path: Path) -> None:
    write_texts(tmp_path, 1, 2)
    stub_loop(tmp_path).run()
    plan = RunDir(tmp_path / "run").plan(0)
    assert plan.derived == {}
    assert not list((tmp_path / "run").glob("constitutions/*/derived.json"))
    assert "derived wordings" not in (tmp_path / "run/constitutions/pins.json").read_text()


def test_texts_of_a_schedule_keep_wordings_of_their_own(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "constitutions/support/v2.yaml").write_text(SIX_LINES.replace("is polite and", "is patient and"))
    job = rules_job("support@1").model_copy(update={"constitution": None, "schedule": {0: "support@1", 1: "support@2"}})
    run = RunDir(tmp_path / "run")
    first, second = (InForce(job, run, tmp_path).at(k)[0] for k in (0, 1))
    assert first.wordings != second.wordings
    for text in (first, second):
        assert text.wordings is not None
        loaded = InForce(job, run, tmp_path).load(text.ref, {text.wordings.id: text.wordings.hash})
        assert loaded.voices() == text.voices() != ()


def test_six_lines_and_a_judge_behind_a_server(tmp_path: Path) -> None:
    write(tmp_path)
    with FaultServer(say=greater_number) as server:
        job = chat_job(server).model_copy(update={"schedule": None, "constitution": "support"})
        loop = chat_loop(tmp_path, job)
        loop.run()
    here = loop.dir.iteration(0)
    assert all(d.status == "kept" for d in here.read("decisions", Decision))
    assert loop.dir.plan(0).derived == {}
    assert {v.ballot.voice for v in here.read("votes", Vote)} == {"pairwise"}


def test_six_lines_and_a_tiny_model(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    # To the tiny model words that it doesn't know are all alike, so the sides need different lengths.
    write(tmp_path, SIX_LINES.replace("is polite and never blames", "gives one or two sentences to"))
    job = project_job(tmp_path, tiny_model, constitution="support", iterations=1, eval={"every": 1, "prompts": 2})
    # The model's weights are random: that a majority agrees is enough here.
    job = job.model_copy(update={"filters": job.filters.model_copy(update={"min_agreement": 0.0})})
    run = execute(job, tmp_path / "runs" / "six", tmp_path, Quiet())
    here = run.iteration(0)
    assert job.pairing.method == "best_worst"
    decided = here.read("decisions", Decision)
    assert any(d.status == "kept" for d in decided), [d.reasons for d in decided]
    assert {s["voice"] for s in map(json.loads, (here.path / "scores.jsonl").read_text().splitlines())} == {
        "polite/derived.2-select1",
        "no_promises/derived.2-select1",
    }


# The benchmark.


def test_rules_alone_can_be_written_and_read(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    for phrasing in bench.PHRASINGS:
        to = checkout / "rules" / phrasing
        assert len(bench.write_rules(to, phrasing)) == 5
        shipped, rules = (list_constitutions(folder) for folder in (bench.TEXTS, to))
        for text, alone in zip(shipped, rules, strict=True):
            assert alone == bench.rules_only(text, phrasing)
            assert [p.check for p in alone.principles] == [p.check for p in text.principles]
            assert all(v.guard or False for v in alone.voices())
            electing = [p.rule for p in alone.principles if not p.guard]
            assert (electing == [p.rule for p in text.principles if not p.guard]) == (phrasing == "prefer")


def test_contrasts_for_another_use_can_be_let_vote() -> None:
    text = next(t for t in list_constitutions(ROOT / "constitutions") if t.name == "lists")
    for use in typing.get_args(Use):
        asked = bench.voting(text, NEWEST, use)
        assert [v.hash for v in asked.voices("decide")] == [
            v.hash for v in bench.rules_only(text).derived_by(NEWEST).voices(use)
        ]
        own = bench.voting(text, None, use)
        assert [v.hash for v in own.voices("decide")] == [v.hash for v in text.voices(use)]


def test_the_benchmark_prints_a_row_a_set(
    checkout: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(checkout)
    arguments = ["--rows", "5", "--sets", "handwritten", "derived.2", "--phrasings", "prefer", "never", "--set"]
    monkeypatch.setattr("sys.argv", ["derived", *arguments, f"judge.model={tiny_model}", "--set", "judge.cache=null"])
    bench.main()
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1:] == [["| handwritten", "-"], ["| derived.2", "prefer"], ["| derived.2", "never"]]
    monkeypatch.setattr("sys.argv", ["derived", "--sets", "crude"])
    with pytest.raises(SystemExit, match=r"--sets crude: expected all, or some of handwritten, derived\.2"):
        bench.main()
