"""What `rlaif constitution check` says of a text: which judges it serves, what they derive, what is missing for what,
and what in it was probably not meant.

In: a parsed constitution, and names of judge templates. Out: records and sentences; a warning refuses nothing. Pure.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal

from pydantic import Field

from rlaif.constitutions.checks import count_words, words_of
from rlaif.constitutions.constitution import Constitution, Principle
from rlaif.constitutions.derived import NEWEST, Use
from rlaif.constitutions.opposites import turned
from rlaif.constitutions.templates import evaluating_name
from rlaif.constitutions.verbs import could_have_verb
from rlaif.judging.ballots import evaluating_voices, selecting_voices
from rlaif.judging.kinds import ChatKind, JudgeKind, LikelihoodKind
from rlaif.records import Record

Kind = Literal["likelihood", "chat"]
_FEWEST_WORDS = 3


class Service(Record):
    """How a text serves one kind of judge."""

    judge: Kind
    unasked: dict[str, str] = Field(default_factory=dict)
    """Principle → why this judge can't ask about it; then it serves no job with this judge."""
    derived: dict[str, tuple[Use, ...]] = Field(default_factory=dict)
    """Principle → uses whose contrasts are derived from its rule."""
    negated: tuple[str, ...] = ()
    """Of these, principles whose opposite differs by a "not" alone, which a small model hardly reads."""
    missing: dict[str, str] = Field(default_factory=dict)
    """What for → what is missing for it."""

    def line(self) -> str:
        """For people."""
        said = f"{self.judge} judge: "
        if self.unasked:
            return f"{said}no; " + "; ".join(
                f"principle `{principle}`: {why}" for principle, why in self.unasked.items()
            )
        if self.derived:
            each = (f"{principle} ({', '.join(uses)})" for principle, uses in self.derived.items())
            said += f"yes; {NEWEST.id} derives from the rule: {', '.join(each)}"
            if self.negated:
                said += f"; weak, since only negated: {', '.join(self.negated)} (write `opposite:` beside the rule)"
        else:
            said += "yes, as it is"
        return "; ".join([said, *(f"missing for {what}: {why}" for what, why in self.missing.items())])


def services(constitution: Constitution, templates: Container[str] | None = None) -> list[Service]:
    """How a text serves each kind of judge; `templates` are the names in the folder of judge templates, if known."""
    return [_likelihood(constitution), _chat(constitution, templates)]


def _likelihood(constitution: Constitution) -> Service:
    asked = constitution.derived_by(NEWEST)
    missing = {}
    for what, use, voices in (
        ("best_worst", "select", selecting_voices(asked)),
        ("a held-out win rate", "evaluate", evaluating_voices(asked)),
    ):
        if not voices:
            missing[what] = f"a contrast with `use: {use}`, or a rule with words to derive it from"
    if not any(p.guard for p in constitution.principles):
        missing["a veto on nonsense"] = "a principle with `guard: true`"
    derived = {p.id: p.lacks for p in constitution.principles if p.lacks and p.has_words}
    negated = tuple(
        p.id for p in constitution.principles if p.id in derived and p.opposite is None and not turned(p.rule).known
    )
    unasked = _unasked(LikelihoodKind, constitution)
    return Service(judge="likelihood", unasked=unasked, derived=derived, negated=negated, missing=missing)


def _chat(constitution: Constitution, templates: Container[str] | None) -> Service:
    missing = {
        "best_worst": "scores of single answers, which this judge doesn't give; set pairing.method to random or all"
    }
    other = evaluating_name(constitution.template)
    if templates is not None and other not in templates:
        missing["a held-out win rate by a question of its own"] = (
            f"the template `{other}`, or judge.evaluate_templates in the job"
        )
    return Service(judge="chat", unasked=_unasked(ChatKind, constitution), missing=missing)


def _unasked(kind: type[JudgeKind[Any]], constitution: Constitution) -> dict[str, str]:
    return {p.id: why for p in constitution.principles if (why := kind.unserved(p)) is not None}


def warnings(constitution: Constitution) -> list[str]:
    """What in a text was probably not meant, a sentence each."""
    out: list[str] = []
    for p in constitution.principles:
        out += _of_rule(p)
        out += _of_examples(p)
    alike: dict[tuple[str, ...], list[str]] = {}
    for p in constitution.principles:
        alike.setdefault(words_of(p.rule.casefold()), []).append(f"`{p.id}`")
    out += [
        f"principles {', '.join(ids[:-1])} and {ids[-1]} have the same rule, which so counts {len(ids)} times; drop "
        "one, or give one of them a larger `weight`"
        for words, ids in alike.items()
        if words and len(ids) > 1
    ]
    return out


def _of_rule(principle: Principle) -> list[str]:
    rule, here = principle.rule, f"principle `{principle.id}`"
    out = []
    words = count_words(rule)
    # Chinese, Japanese and Thai put no spaces between words: there a long rule is one of ours.
    if words < _FEWEST_WORDS and (rule.isascii() or len(rule.strip()) < 2 * _FEWEST_WORDS):
        counted = f"{words} word{'' if words == 1 else 's'}"
        out.append(f"{here}: its rule has {counted} ({rule.strip()!r}); a whole sentence leaves less to guess")
    if principle.has_words and not could_have_verb(rule):
        out.append(
            f"{here}: no word of its rule could be an English verb ({rule.strip()!r}); say what an answer should be or "
            'do ("Be polite.", "The answer should name its source.")'
        )
    return out


def _of_examples(principle: Principle) -> list[str]:
    """Only where a mechanical check can tell."""
    out = []
    for n, example in enumerate(principle.examples if principle.check else (), start=1):
        assert principle.check is not None
        better, worse = (principle.check.results(side) for side in (example.better, example.worse))
        here = f"principle `{principle.id}`, example {n} ({' '.join(example.prompt.split())[:40]!r})"
        broken = ", ".join(condition for condition, met in better.items() if not met)
        if broken and all(worse.values()):
            out.append(f"{here}: its better side breaks the check ({broken}), and its worse side meets it")
        elif broken:
            out.append(f"{here}: both of its sides break the principle's own check ({broken})")
    return out
