"""Code of the user's own: how it is found, what is refused, and in one line."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif import learning, own_code
from rlaif.config import Filters, Job, parse_job
from rlaif.constitutions.constitution import parse_constitution
from rlaif.errors import RlaifError, UserError
from rlaif.judging import own
from rlaif.judging.candidates import Candidate
from rlaif.judging.filters import decide
from rlaif.judging.kinds import kind_of
from rlaif.judging.opened import open_with_ballots
from rlaif.records import Message, Pair, Verdict
from rlaif.sampling.role import make as make_sampler
from rlaif.workers.process import ProcessWorker
from tests.stubs import text

JUDGE = """
from rlaif.config import OwnJudge
from rlaif.records import Score, Vote

class Mine:
    class Settings(OwnJudge):
        slack: int = 2
    {flags}
    def __init__(self, settings):
        self.settings = settings
    def cast(self, ballots, pairs, candidates, constitution):
        yield [Vote(ballot=b, model=f"slack {{self.settings.slack}}", outcome="first", raw_reply="") for b in ballots]
"""
SAYS = "yield [Vote(ballot=b, model='', raw_reply='', {}) for b in ballots]"
PAIR = Pair(id="p", prompt_id="q", first="a", second="b", method="random")
CANDIDATES = [
    Candidate(
        completion_id=name,
        prompt_id="q",
        messages=(Message(role="user", content="?"),),
        finish_reason="stop",
        text=name,
    )
    for name in ("a", "b")
]
TEXT = parse_constitution(text(), "rules", 1, "test")


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(Path.cwd()) in str(sys.modules[name].__file__):
            del sys.modules[name]


def job(judge: dict[str, Any] | None = None, **more: Any) -> Job:
    return parse_job({"constitution": "rules", "judge": judge or {}, **more}, "job")


def written(flags: str = "", name: str = "mine") -> str:
    Path(f"{name}.py").write_text(JUDGE.format(flags=flags))
    return f"{name}:Mine"


def test_a_job_without_code_of_its_own_imports_nothing() -> None:
    path = list(sys.path)
    assert own_code.resolved(job()) == (job(), ())
    assert sys.path == path


def test_defaults_of_its_settings_are_the_jobs() -> None:
    found, (code,) = own_code.resolved(job({"kind": written()}))
    assert found.judge.model_dump()["slack"] == 2
    assert found.judge.model == "Mine"
    assert code.sha256 == hashlib.sha256(Path("mine.py").read_bytes()).hexdigest()
    assert str(Path.cwd()) in sys.path
    assert own_code.resolved(found)[0] == found


@pytest.mark.parametrize(
    ("content", "judge", "message"),
    [
        (None, {}, r"judge\.kind mine:Mine: no module `mine` in .* or among the installed packages"),
        ("x = 1\n", {}, r"judge\.kind mine:Mine: .*mine\.py has no `Mine`"),
        ("import os\nMine = 1 / 0\n", {}, r"mine\.py:2: importing it failed \(ZeroDivisionError: division by zero\)"),
        ("def Mine(): ...\n", {}, r"judge\.kind mine:Mine: expected a class"),
        ("class Mine: ...\n", {}, r"the class has no method `cast`"),
        (JUDGE.format(flags=""), {"slak": 1}, r"unknown key `judge\.slak`; mine:Mine knows .*`slack`"),
        (JUDGE.format(flags=""), {"slack": "a"}, r"judge\.slack: .*valid integer.* \(found 'a'\)"),
        ("class Mine:\n    Settings = dict\n    def cast(self): ...\n", {}, r"expected a subclass of .*OwnJudge"),
    ],
)  # fmt: skip
def test_what_cant_be_used_is_told_at_the_start_in_a_line(content: str | None, judge: Any, message: str) -> None:
    if content is not None:
        Path("mine.py").write_text(content)
    with pytest.raises(UserError, match=message) as e:
        own_code.resolved(job({"kind": "mine:Mine", **judge}))
    assert "\n" not in str(e.value)


def test_what_is_missing_is_told_without_the_rest_of_the_section() -> None:
    Path("mine.py").write_text(JUDGE.format(flags="").replace("slack: int = 2", "slack: int\n        token: str = ''"))
    with pytest.raises(UserError, match=r"judge\.slack: Field required") as failed:
        own_code.resolved(job({"kind": "mine:Mine", "token": "sk-SECRET"}))
    assert "SECRET" not in str(failed.value)


def test_the_class_may_have_a_model_of_its_own() -> None:
    Path("mine.py").write_text(
        JUDGE.format(flags="").replace("slack: int = 2", "slack: int = 2\n        model: str = 'org/m'")
    )
    assert own_code.resolved(job({"kind": "mine:Mine"}))[0].judge.model == "org/m"
    assert own_code.resolved(job({"kind": "mine:Mine", "model": "other"}))[0].judge.model == "other"


def test_its_module_has_none_of_our_future() -> None:
    Path("mine.py").write_text(JUDGE.format(flags="") + "\n\ndef f(x: int) -> int: ...\n")
    own_code.resolved(job({"kind": "mine:Mine"}))
    assert sys.modules["mine"].f.__annotations__["x"] is int


def test_best_worst_needs_scores() -> None:
    judge = {"kind": written()}
    with pytest.raises(UserError, match=r"mine:Mine has no method `score`; set random or all"):
        own_code.resolved(job(judge, pairing={"method": "best_worst"}))
    written("def score(self, candidates, constitution, voices): yield []")
    own_code.resolved(job(judge, pairing={"method": "best_worst"}))
    assert kind_of(job(judge).judge).selecting(TEXT) == ["Mine/score"]


def test_another_source_or_setting_is_another_judge() -> None:
    def ballot(**settings: Any) -> Any:
        settings_ = job({"kind": "mine:Mine", **settings}).judge
        kind = kind_of(settings_)
        own_code.of_judge(settings_, anew=True)  # type: ignore[arg-type]
        (found,) = kind.ballots([PAIR], TEXT, name=kind.name(None))
        return found

    written()
    first, same, other = ballot(), ballot(slack=2), ballot(slack=3)
    assert first == same
    assert first.id != other.id
    written("# another version")
    changed = ballot()
    assert {first.judge, changed.judge} == {f"mine:Mine:{b.template}" for b in (first, changed)}
    assert first.judge != changed.judge
    assert first.id != changed.id


def test_voices_and_orders_as_the_class_says() -> None:
    kind = kind_of(job({"kind": written("per_principle = True; both_orders = True")}).judge)
    ballots = kind.ballots([PAIR], TEXT, name="j")
    assert [(b.voice, b.guard, b.order) for b in ballots] == [
        ("Mine/answers", True, "forward"), ("Mine/answers", True, "reversed"),
        ("Mine/wish", False, "forward"), ("Mine/wish", False, "reversed"),
    ]  # fmt: skip
    assert {b.voice for b in kind.ballots([PAIR], TEXT, "evaluate", name="j")} == {"Mine/wish"}
    places = kind.places(PAIR, TEXT, "j", (), ballots[::-1])
    assert sorted(places, key=lambda place: places[place]) == [(b.voice_key, b.order) for b in ballots]


@pytest.mark.slow
def test_in_a_worker_of_its_own(tmp_path: Path) -> None:
    settings = own_code.resolved(job({"kind": written(), "slack": 5}))[0].judge
    kind = kind_of(settings)
    factory, arguments = kind.worker(None, (), tmp_path / "none")
    ballots = kind.ballots([PAIR], TEXT, name=kind.name(None))
    with ProcessWorker("judge", factory, arguments, tmp_path / "judge.log") as worker:
        asked = {"ballots": ballots, "pairs": [PAIR], "candidates": CANDIDATES, "constitution": TEXT}
        (votes,) = worker.stream("cast", **asked)
    assert [v.model for v in votes] == ["slack 5"]
    written("# edited meanwhile")
    with (
        ProcessWorker("judge", factory, arguments, tmp_path / "judge.log") as worker,
        pytest.raises(UserError, match="changed"),
    ):
        worker.ready()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("yield ballots", r"mine:Mine\.cast: expected lists of rlaif\.records\.Vote"),
        ("yield [Vote(ballot=b, model='', outcome='tie', raw_reply='') for b in [*ballots, *ballots]]", "isn't owed"),
        ("yield []", r"left 1 of 1 ballots without a vote"),
        (
            "yield [Vote(ballot=b, model='', outcome='first', p_first=float('nan'), raw_reply='') for b in ballots]",
            "p_first is nan",
        ),
        (
            "yield [Vote(ballot=b, model='', outcome='first', p_first=7.0, raw_reply='') for b in ballots]",
            r"p_first is 7\.0",
        ),
        ("yield [Vote(ballot=b, model='', outcome='abstain', raw_reply='') for b in ballots]", "an abstain_reason"),
    ],
)
def test_what_is_no_vote_is_refused(body: str, message: str) -> None:
    written()
    Path("mine.py").write_text(Path("mine.py").read_text().rpartition("        yield")[0] + f"        {body}\n")
    settings = job({"kind": "mine:Mine"}).judge
    ballots = kind_of(settings).ballots([PAIR], TEXT, name="j")
    with pytest.raises(RlaifError, match=message):
        list(own.make(settings).cast(ballots, [PAIR], CANDIDATES, TEXT))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return None", None),
        ("return f'{settings.min_votes} is too few'", "1 is too few"),
        ("return True", RlaifError),
        ("return 1 / 0", RlaifError),
    ],
)
def test_a_rule_of_ones_own_can_only_drop(body: str, reason: Any) -> None:
    Path("strict.py").write_text(f"def rule(verdict, settings):\n    {body}\n")
    verdict = Verdict(pair_id="p", outcome="first", p_first=0.9, agreement=1.0, valid_votes=3)
    settings = Filters(rules=["strict:rule"])
    own_code.of_rule("strict:rule", anew=True)
    if reason is RlaifError:
        with pytest.raises(RlaifError, match=r"filters\.rules strict:rule: pair p: "):
            decide(verdict, PAIR, settings, {"a": "x", "b": "y"})
        return
    made = decide(verdict, PAIR, settings, {"a": "x", "b": "y"})
    assert (made.status, made.reasons) == (("kept", ()) if reason is None else ("dropped", ("strict:rule",)))
    assert made.said == ({} if reason is None else {"strict:rule": reason})


def test_a_rule_is_a_function() -> None:
    written()
    with pytest.raises(UserError, match=r"filters\.rules mine:Mine: expected a function"):
        own_code.resolved(job(filters={"rules": ["mine:Mine"]}))
    with pytest.raises(UserError, match=r"filters\.rules\.0: .*pattern"):
        job(filters={"rules": ["mine"]})


def test_a_learner_of_ones_own() -> None:
    methods = "update save load export exports_in logprobs divergences"
    body = "".join(f"    def {name}(self): ...\n" for name in methods.split())
    Path("teach.py").write_text(
        "from rlaif.config import OwnLearner\nclass Mine:\n    class Settings(OwnLearner):\n        groups: int = 4\n"
        f"    def __init__(self, *given): self.given = given\n{body}"
    )
    found, (code,) = own_code.resolved(job(learner={"kind": "teach:Mine", "groups": 2, "beta": 0.3}))
    made: Any = learning.make("folder", found.learner, 7, "out", "fp32", code.sha256)
    path, settings, *rest = made.given
    assert (path, settings.groups, settings.beta, settings.batch_size, rest) == (
        "folder",
        2,
        0.3,
        4,
        [7, "out", "fp32"],
    )
    with pytest.raises(UserError, match=r"no method `refer_to`; docs/extend.md"):
        own_code.resolved(job(learner={"kind": "teach:Mine", "reference": "at_change"}))
    with pytest.raises(UserError, match=r"unknown key `learner\.grups`"):
        own_code.resolved(job(learner={"kind": "teach:Mine", "grups": 2}))
    with pytest.raises(UserError, match=r"learner\.kind: .*'dpo' or 'online_dpo'"):
        job(learner={"kind": "dpoo"})


def test_a_sampler_of_ones_own(tiny_model: Path) -> None:
    Path("draw.py").write_text(
        "class Mine:\n    def __init__(self, path, settings): self.settings = settings\n"
        "    def sample(self, requests): ...\n    def load(self, path): ...\n"
        "    def logprobs(self, sequences): return [self.settings.max_tokens]\n"
    )
    found, (code,) = own_code.resolved(job(sampling={"engine": "draw:Mine", "max_tokens": 9, "precision": "fp32"}))
    role = make_sampler(str(tiny_model), found.sampling, None, code.sha256)
    assert role.logprobs([]) == [9]
    assert role.computes_in() == "draw:Mine fp32"
    with pytest.raises(UserError, match=r"unknown key `sampling\.more`"):
        own_code.resolved(job(sampling={"engine": "draw:Mine", "more": 9}))


def test_a_rule_that_is_not_there_is_told_before_a_judge_is_asked() -> None:
    asked = job({"kind": written()}, filters={"rules": ["nowhere:rule"]})
    with pytest.raises(UserError, match=r"filters\.rules nowhere:rule: no module `nowhere`"):
        open_with_ballots(asked, [], Path.cwd(), print)
