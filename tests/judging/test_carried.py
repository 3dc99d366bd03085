"""Which votes answer a new text's ballots: a question is the same when the judge is shown the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import parse_job
from rlaif.constitutions.constitution import Constitution, parse_constitution
from rlaif.constitutions.templates import Template, load_template, parse_template
from rlaif.judging.carried import Carried, carry
from rlaif.judging.kinds import kind_of
from rlaif.records import Ballot, Pair, Vote

ROOT = Path(__file__).resolve().parents[2]
PAIR = Pair(id="p", prompt_id="x", first="a", second="b", method="all")
TEXT = """
summary: {summary}
principles:
  - {{id: brief, rule: "{brief}", weight: {weight}, prefer: Be brief., avoid: Be long.}}
  - {{id: kind, rule: "{kind}", prefer: "{prefer}", avoid: Be harsh.}}
"""
SAID = {"summary": "Test.", "brief": "Be brief.", "weight": 1.0, "kind": "Be kind.", "prefer": "Be kind."}
ONE_RULE = """{# verdict: letter; max_tokens: 8 #}
{% block system %}Which answer follows the rules better?
{% for p in ([principle] if principle else constitution.principles) %}- {{ p.rule }}
{% endfor %}{% endblock %}
{% block user %}
{{ messages[-1].content }}

A {{ code }}
{{ first }}
A {{ code }}

B {{ code }}
{{ second }}
B {{ code }}
{% endblock %}
"""


def text(more: str = "", **changes: Any) -> Constitution:
    return parse_constitution(TEXT.format(**SAID | changes) + more, "rules", 1, "rules.yaml")


def vote(ballot: Ballot) -> Vote:
    return Vote(ballot=ballot, model="m", outcome="first", p_first=0.9, raw_reply=ballot.id)


def carried(judge: dict[str, Any], templates: list[Template], before: Constitution, after: Constitution) -> Carried:
    job = parse_job({"constitution": "rules", "judge": judge}, "job")
    kind, texts = kind_of(job.judge), {c.hash: c for c in (before, after)}
    old, new = (kind.ballots([PAIR], c, "decide", 0, "judge", templates) for c in (before, after))
    found = carry(new, [vote(b) for b in old], lambda b: kind.shows(b, texts[b.constitution], templates))
    assert len(found.votes) + len(found.lost) == len(old)
    assert len(found.votes) + len(found.owed) == len(new)
    assert {v.ballot.constitution for v in found.votes} <= {after.hash}
    assert [v.ballot for v in found.votes] == [b for b in new if b in {v.ballot for v in found.votes}]
    return found


def principles(found: Carried) -> tuple[list[str], list[str], list[str]]:
    """Of the carried, lost and owed ballots."""
    sides = ([v.ballot for v in found.votes], [v.ballot for v in found.lost], found.owed)
    kept, lost, owed = (sorted({p for b in side for p in b.principles}) for side in sides)
    return kept, lost, owed


CHAT = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:1/v1"}
MORE = "  - {id: more, rule: Give more., prefer: Give more., avoid: Give less.}\n"
BOTH = ["brief", "kind"]
OF_ONE: list[tuple[Constitution, tuple[list[str], list[str], list[str]]]] = [
    (text(weight=3.0), (BOTH, [], [])),
    (text(summary="Another."), (BOTH, [], [])),
    (text(MORE), (BOTH, [], ["more"])),
    (text(kind="Be gentle.", prefer="Be gentle."), (["brief"], ["kind"], ["kind"])),
]


@pytest.mark.parametrize(("after", "expected"), OF_ONE)
def test_a_likelihood_ballot_shows_its_contrast(after: Constitution, expected: Any) -> None:
    assert principles(carried({}, [], text(), after)) == expected


def test_a_rule_that_a_likelihood_judge_is_not_shown_changes_no_question() -> None:
    assert principles(carried({}, [], text(), text(kind="Be gentle."))) == (BOTH, [], [])


@pytest.mark.parametrize(("after", "expected"), OF_ONE)
def test_a_template_that_shows_one_rule_carries_the_others(after: Constitution, expected: Any) -> None:
    template = parse_template("one", {"one.jinja": ONE_RULE})
    judge = {**CHAT, "votes_per_principle": True}
    assert principles(carried(judge, [template], text(), after)) == expected


@pytest.mark.parametrize("role", ["", "_evaluate"])
@pytest.mark.parametrize(("after", "expected"), OF_ONE)
def test_so_does_the_shipped_one_for_principles(after: Constitution, expected: Any, role: str) -> None:
    template = load_template(ROOT / "prompts" / "judge", f"pairwise_principle{role}")
    judge = {**CHAT, "votes_per_principle": True}
    assert principles(carried(judge, [template], text(), after)) == expected
    found = carried(judge, [template], text(), text().model_copy(update={"summary": "Another one."}))
    assert (found.lost, found.owed) == ((), ())
    whole = carried(CHAT, [template], text(), after)  # asked about all rules at once, it shows them
    assert bool(whole.lost) == (after.hash != text(weight=3.0).hash)


@pytest.mark.parametrize("judge", [CHAT, {**CHAT, "votes_per_principle": True}])
def test_the_other_shipped_templates_show_the_whole_text(judge: dict[str, Any]) -> None:
    template = load_template(ROOT / "prompts" / "judge", "pairwise")
    for after, _ in OF_ONE[1:]:
        found = carried(judge, [template], text(), after)
        assert (found.votes, len(found.lost)) == ((), 4 if judge.get("votes_per_principle") else 2)
    assert carried(judge, [template], text(), text(weight=3.0)).lost == (), "what a vote weighs isn't asked"


def test_another_template_judge_or_parameter_is_another_question() -> None:
    judge = parse_job({"constitution": "rules", "judge": {}}, "job").judge
    kind = kind_of(judge)
    [first, *_] = kind.ballots([PAIR], text(), "decide", 0, "judge")

    def found(**changes: Any) -> Carried:
        return carry([first], [vote(first.model_copy(update=changes))], lambda b: "")

    assert found(constitution="another", id="other").votes == (vote(first).model_copy(update={"raw_reply": "other"}),)
    for name in ("judge", "voice", "order", "template", "parameters", "pair_id"):
        assert found(**{name: "forward" if name == "order" else "other"}).owed == (first,), name
    for changes in ({"guard": True}, {"sample_index": 1}, {"seed": 1}, {"principles": ("kind",)}):
        assert found(**changes).owed == (first,), changes


def test_of_two_answers_to_one_question_the_newer_counts() -> None:
    kind = kind_of(parse_job({"constitution": "rules", "judge": {}}, "job").judge)
    [ballot, *_] = kind.ballots([PAIR], text(), "decide", 0, "judge")
    older, newer = vote(ballot), vote(ballot).model_copy(update={"outcome": "second", "p_first": 0.1})
    assert carry([ballot], [older, newer], lambda b: "").votes == (newer,)


@pytest.mark.parametrize("by_principle", [False, True])
def test_a_judge_of_the_users_own_is_taken_at_its_word(
    by_principle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Callable[[str], None]
) -> None:
    own(
        f"class Judge:\n    per_principle = {by_principle}\n"
        "    def __init__(self, settings): ...\n    def cast(self, ballots, pairs, candidates, constitution): ...\n"
    )
    for after, expected in OF_ONE[1:]:
        found = carried({"kind": "carried_own:Judge"}, [], text(), after)
        assert principles(found)[:2] == (expected[:2] if by_principle else ([], BOTH))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes a module `carried_own` that can be imported."""
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "carried_own", raising=False)

    def write(source: str) -> None:
        (tmp_path / "carried_own.py").write_text(source)

    return write
