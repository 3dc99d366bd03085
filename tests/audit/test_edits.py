"""What an edit of the text does to a run's verdicts: counted, taken apart, stored votes used where they still hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif.audit.edits import Edit, Effect, Options, effect_of
from rlaif.cli import app
from rlaif.config import Job, LikelihoodSettings, apply_override, parse_job
from rlaif.constitutions.constitution import Constitution, load_constitution, parse_constitution
from rlaif.errors import UserError
from rlaif.intervals import wilson
from rlaif.judging.ballots import likelihood_parameters, make_ballots
from rlaif.judging.candidates import Candidate
from rlaif.judging.opened import Opened, open_with_ballots
from rlaif.judging.verdicts import aggregate, by_pair
from rlaif.records import Ballot, Completion, Pair, Vote
from rlaif.rundir.store import RunDir, write_json
from rlaif.workers.inline import InlineWorker
from tests.judging.fault_server import FaultServer
from tests.stubs import BASE_DIGEST, StubJudge, fraction, stub_job, stub_loop, stub_prompts, write_texts
from tests.test_loop_chat import chat_job, chat_loop, greater_number


class VoiceJudge(StubJudge):
    """Each voice has a mind of its own, which follows from the words that it is asked with."""

    def vote(self, ballot: Ballot, first: str, second: str) -> Vote:
        if ballot.guard:
            return Vote(ballot=ballot, model="stub", outcome="tie", raw_reply="")
        ahead = fraction(ballot.template, first) > fraction(ballot.template, second)
        outcome, p = ("first", 0.9) if ahead else ("second", 0.1)
        return Vote(ballot=ballot, model="stub", outcome=outcome, p_first=p, raw_reply="")


def principle(id: str, words: str, weight: float = 1.0) -> str:
    return f"  - {{id: {id}, rule: Rule {words}., weight: {weight}, prefer: {words}, avoid: not {words}}}\n"


BEFORE = "summary: Before.\nprinciples:\n" + principle("a", "wa") + principle("b", "wb") + principle("c", "wc")
AFTER = "summary: After.\nprinciples:\n" + principle("a", "wa") + principle("b", "wx") + principle("d", "wd", 3.0)


def texts(root: Path) -> tuple[Constitution, Constitution]:
    folder = root / "constitutions" / "rules"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "v1.yaml").write_text(BEFORE)
    (folder / "v2.yaml").write_text(AFTER)
    return load_constitution(root / "constitutions", "rules@1"), load_constitution(root / "constitutions", "rules@2")


def header(run: Path, job: Job) -> None:
    (run / "prompts").mkdir(parents=True)
    (run / "prompts/train.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in stub_prompts(20, "train")))
    write_json(
        run / "run.json", {"schema_version": 1, "job": job.model_dump(mode="json"), "models": {"policy": BASE_DIGEST}}
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 pairs under rules@1, by votes a principle."""
    root = tmp_path_factory.mktemp("edits")
    texts(root)
    changes: dict[str, Any] = {"constitution": "rules@1", "iterations": 5, "pairing": {"method": "random"}}
    job = stub_job(**changes, filters={"min_agreement": 0.6, "min_kept_pairs": 1})
    header(root / "run", job)
    loop = stub_loop(root, job)
    loop.judge = InlineWorker("judge", "tests.audit.test_edits:VoiceJudge", {})
    loop.run()
    return root


def voices(settings: LikelihoodSettings | None = None) -> Opened:
    def ballots(pairs: Any, constitution: Constitution) -> list[Ballot]:
        return make_ballots(
            pairs, constitution, "stub", "decide", 7, likelihood_parameters(settings or LikelihoodSettings())
        )

    def ask(pairs: Any, candidates: Any, constitution: Constitution) -> Iterator[list[Vote]]:
        yield from VoiceJudge().cast(ballots(pairs, constitution), pairs, candidates, constitution)

    return Opened(ask, ballots)


def measured(root: Path, *override: str, sample: int = 200, seed: int = 0, judge: Opened | None = None) -> Effect:
    run = RunDir.open(root / "run")
    own = parse_job(run.header["job"], "run.json")
    tree = own.model_dump(mode="json")
    for key in override:
        apply_override(tree, key)
    before, after = texts(root)
    job = parse_job(tree, "test")
    return effect_of(run, Edit(before, after), judge or voices(job.judge), job, Options(sample, seed))


def outcomes(root: Path, constitution: Constitution | None) -> dict[str, str]:
    """The verdicts of every pair of the run under a text, asked in one go: what the effect must follow from."""
    assert constitution is not None
    run = RunDir.open(root / "run")
    pairs = [p for k in run.iterations() for p in run.iteration(k).read("pairs", Pair)]
    prompts = {p.id: p for p in stub_prompts(20, "train")}
    completions = [c for k in run.iterations() for c in run.iteration(k).read("completions", Completion)]
    candidates = [Candidate.of(c, prompts[c.prompt_id]) for c in completions]
    votes = [v for chunk in voices().ask(pairs, candidates, constitution) for v in chunk]
    return {id: aggregate(mine, constitution.weights).outcome for id, mine in by_pair(votes).items()}


def test_turned_verdicts_and_their_parts_are_those_that_asking_afresh_gives(root: Path) -> None:
    effect = measured(root)
    before, after = texts(root)
    old, new = outcomes(root, before), outcomes(root, after)
    turned = {id for id in old if old[id] != new[id]}
    assert 3 < len(turned) < len(old) == 30
    assert (effect.pairs, effect.stored, effect.compared, effect.turned) == (30, 30, 30, len(turned))
    assert effect.interval == wilson(len(turned), 30)
    assert effect.share == len(turned) / 30
    assert {p.part: p.kind for p in effect.parts} == {
        "b": "changed", "c": "removed", "d": "added", "(the text's own fields)": "changed"
    }  # fmt: skip
    names = {p.part for p in effect.parts}
    for part in effect.parts:
        by_it, without = (
            {
                id
                for id, outcome in outcomes(root, Edit(before, after).applied(s)).items()
                if outcome not in ("tie", old[id])
            }
            for s in ({part.part}, names - {part.part})
        )
        assert (part.alone, part.needed) == (len(turned & by_it), len(turned - without)), part
    counts = {p.part: (p.alone, p.needed) for p in effect.parts}
    assert counts["(the text's own fields)"] == (0, 0)
    assert counts["d"] > counts["c"]
    assert effect.parts[0].part == "d"
    assert len(effect.examples) == min(10, len(turned))
    for example in effect.examples:
        assert example.before.outcome != example.after.outcome
        assert example.prompt.startswith("question ")
        assert example.first.startswith("answer 0.")
    assert effect.notes == (
        f"of {30} votes on questions that are the same in both texts, 0 came out otherwise this time",
    )


def test_stored_votes_are_taken_only_for_the_very_same_questions(root: Path) -> None:
    assert measured(root).asked == 30 * 3  # under the new text only
    colder = measured(root, "judge.score_temperature=2.0")
    assert (colder.stored, colder.asked) == (0, 30 * 6)
    other = voices()
    renamed = Opened(other.ask, lambda pairs, text: make_ballots(pairs, text, "another judge", "decide", 7))
    assert measured(root, judge=renamed).stored == 0
    # the verdicts are the same, wherever they come from
    assert (colder.turned, colder.parts) == (measured(root).turned, measured(root).parts)


def test_verdicts_that_the_run_has_under_the_new_text_are_taken_too(root: Path) -> None:
    run = RunDir.open(root / "run")
    own = parse_job(run.header["job"], "run.json")
    before, after = texts(root)
    back = effect_of(run, Edit(after, before), voices(), own)
    assert (back.stored, back.stored_after, back.asked) == (0, 30, 30 * 3)
    assert back.turned == measured(root).turned
    third = after.model_copy(update={"version": 3, "summary": "Another."})
    neither = effect_of(run, Edit(after, third), voices(), own)
    assert (neither.stored, neither.stored_after, neither.asked) == (0, 0, 30 * 6)
    assert (neither.turned, [p.needed for p in neither.parts]) == (0, [None])


def test_the_sample_is_seeded(root: Path) -> None:
    one, same, other = measured(root, sample=12), measured(root, sample=12), measured(root, sample=12, seed=1)
    assert one == same
    assert one.pairs == other.pairs == 12
    assert [e.pair_id for e in one.examples] != [e.pair_id for e in other.examples]


def test_what_cannot_be_asked_is_said(root: Path, tmp_path: Path) -> None:
    run = RunDir.open(root / "run")
    own = parse_job(run.header["job"], "run.json")
    before, _ = texts(root)
    with pytest.raises(UserError, match=r"rules@1 and rules@1 say the same"):
        effect_of(run, Edit(before, before), voices(), own)
    shutil.copytree(root, tmp_path / "x")
    (tmp_path / "x/run/prompts/train.jsonl").unlink()
    with pytest.raises(UserError, match="copy of its prompts is gone"):
        measured(tmp_path / "x")


def test_a_text_with_some_parts_of_an_edit() -> None:
    before, after = (parse_constitution(text, "x", 1, "x") for text in (BEFORE, AFTER))
    edit = Edit(before, after)
    assert edit.applied(set()) == before
    whole = edit.applied({"b", "c", "d", "(the text's own fields)"})
    assert whole is not None
    assert whole.hash == after.hash
    some = edit.applied({"c", "d"})
    assert some is not None
    assert [(p.id, p.prefer) for p in some.principles] == [("a", "wa"), ("b", "wb"), ("d", "wd")]
    assert Edit(before, after.model_copy(update={"principles": after.principles[2:]})).applied({"a", "b", "c"}) is None


def by_the_rule(body: dict[str, Any]) -> str:
    """The greater number under rule 1, the smaller under rule 2; whatever the summary says."""
    told = greater_number(body)
    asked = "".join(m["content"] for m in body["messages"])
    return told if "Rule 1." in asked else "B" if told == "A" else "A"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, FaultServer]]:
    root = tmp_path_factory.mktemp("edits_chat")
    write_texts(root, 1, 2)
    with FaultServer(say=by_the_rule) as server:
        job = chat_job(server, constitution="rules@1")
        header(root / "run", job)
        chat_loop(root, job).run()
        yield root, server


@pytest.mark.slow
def test_a_reading_judge_is_asked_about_each_part(chat: tuple[Path, FaultServer]) -> None:
    root, _ = chat
    run = RunDir.open(root / "run")
    own = parse_job(run.header["job"], "run.json")
    before, after = (load_constitution(root / "constitutions", f"rules@{n}") for n in (1, 2))
    judge = open_with_ballots(own, [before, after], root, lambda message: None)
    effect = effect_of(run, Edit(before, after), judge, own, Options(8))
    assert (effect.stored, effect.turned, effect.taken_apart) == (8, 8, 8)
    assert [(p.part, p.alone, p.needed) for p in effect.parts] == [
        ("wish", 8, 8),
        ("(the text's own fields)", 0, 0),
    ]
    assert effect.asked == 8 * 2 * 3  # the new text and either part, in both orders
    whole = effect_of(run, Edit(before, after), judge, own, Options(8, take_apart=False))
    assert (whole.taken_apart, whole.asked) == (0, 8 * 2)
    assert whole.notes[-1].startswith("the edit has 2 parts")


@pytest.mark.slow
def test_the_command(chat: tuple[Path, FaultServer], monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = chat
    monkeypatch.chdir(root)
    before = {p: p.read_bytes() for p in sorted((root / "run").rglob("*")) if p.is_file()}
    arguments = ["constitution", "diff", "rules@1", "rules@2", "--run", "run", "--sample", "6"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert "this edit turns 100% of the verdicts (6 of 6; 95 % interval 61% to 100%)" in told.output
    assert "rules@2: " in told.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["effect"]["parts"][0] == {"part": "wish", "kind": "changed", "alone": 6, "needed": 6}
    assert {c["principle"] for c in found["changes"]} == {None, "wish"}
    assert {p: p.read_bytes() for p in sorted((root / "run").rglob("*")) if p.is_file()} == before
    with_job = CliRunner().invoke(app, [*arguments, "--set", "judge.kind=nobody"])
    assert with_job.exit_code != 0
