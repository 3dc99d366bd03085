"""Held-out answers: a prompt's, over all evaluations of a run, with their verdicts and what the checks say.

In: an index, and the run for its own copies of the constitutions. Out: `HeldOutPrompts` for a list, `Answers` for one
prompt. An answer is judged, and checked, under the constitution that was in force at its evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any, Literal

from rlaif.audit.index import Index
from rlaif.constitutions.checks import count_words
from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.copies import constitution_copy
from rlaif.errors import RlaifError, UserError
from rlaif.records import Message, Record
from rlaif.rundir.store import RunDir

AgainstBase = Literal["won", "lost", "undecided", "equal", "abstained"]
"""The verdict on an answer and the base policy's: which is better, neither, word for word the same (nobody is asked),
or no valid vote."""

_OUTCOMES: dict[str, AgainstBase] = {"first": "won", "second": "lost", "tie": "undecided", "abstain": "abstained"}
"""A held-out pair shows the policy's answer first, the base policy's second."""
_SHARE: dict[AgainstBase, float] = {"won": 1.0, "undecided": 0.5, "equal": 0.5, "lost": 0.0}


class Evaluation(Record):
    """A held-out evaluation."""

    updates: int
    """After so many iterations; 0 is the base policy."""
    constitution: str | None
    """name@version of what its answers were judged under; None while it isn't done."""
    hash: str | None
    is_new: bool
    """Another one than at the evaluation before."""


class PromptLine(Record):
    """A held-out prompt in one line."""

    prompt_id: str
    prompt: str
    against_base: tuple[AgainstBase | None, ...]
    """Evaluation by evaluation; of several answers, what most of them say. None of the base policy's own, and where
    nothing was judged."""


class HeldOutPrompts(Record):
    """The prompts that have answers, in the order of the run's file, and the evaluations."""

    evaluations: tuple[Evaluation, ...]
    prompts: tuple[PromptLine, ...]


class Checked(Record):
    """What a principle's check says of an answer."""

    principle: str
    failed: tuple[str, ...]
    """Conditions that it doesn't meet; none when it passes."""


class Answer(Record):
    """An answer to a held-out prompt."""

    text: str
    words: int
    tokens: int | None
    cut_off: bool
    pair_id: str | None
    """Its comparison with the base policy's answer; None of the base policy's own, and of one equal to it."""
    against_base: AgainstBase | None
    p_better: float | None
    """The verdict's probability that it is better than the base policy's."""
    checks: tuple[Checked, ...]


class Evaluated(Record):
    """A prompt's answers in one evaluation."""

    evaluation: Evaluation
    answers: tuple[Answer, ...]


class Answers(Record):
    """A held-out prompt and all its answers, the base policy's first."""

    prompt_id: str
    messages: tuple[Message, ...]
    """Empty where the run's copy of the prompts is gone."""
    evaluated: tuple[Evaluated, ...]
    problems: tuple[str, ...] = ()
    """Copies of constitutions that can't be read; their checks are left out."""


_ANSWERS = """FROM completions c
LEFT JOIN completions b ON b.evaluation = 0 AND b.prompt_id = c.prompt_id AND b.sample = c.sample
LEFT JOIN pairs p ON p.evaluation = c.evaluation AND p.first = c.completion_id
LEFT JOIN decisions d ON d.evaluation = c.evaluation AND d.pair_id = p.pair_id
WHERE c.evaluation IS NOT NULL"""


def evaluations_of(index: Index) -> tuple[Evaluation, ...]:
    """The evaluations that have answers, in order."""
    rows = index.rows(
        "SELECT e.evaluation, e.constitution, e.text_name FROM evaluations e "
        "WHERE e.evaluation IN (SELECT evaluation FROM completions WHERE evaluation IS NOT NULL) ORDER BY e.evaluation"
    )
    out: list[Evaluation] = []
    in_force: str | None = None
    for r in rows:
        digest = r["constitution"]
        is_new = None not in (digest, in_force) and digest != in_force
        in_force = digest or in_force
        out.append(Evaluation(updates=r["evaluation"], constitution=r["text_name"], hash=digest, is_new=is_new))
    return tuple(out)


def held_out_prompts(index: Index, text: str | None = None) -> HeldOutPrompts:
    """Every prompt with answers; with `text`, those that have it in the prompt or in an answer, whatever the case."""
    with index.session():
        evaluations = evaluations_of(index)
        rows = index.rows(
            "SELECT c.prompt_id, c.evaluation, d.outcome, c.text = b.text AS equal, "
            f"contains(lower(c.text), ?) AS found {_ANSWERS} ORDER BY c.prompt_id, c.evaluation",
            [(text or "").lower()],
        )
        prompts = index.rows("SELECT prompt_id, messages FROM prompts WHERE held_out ORDER BY line")
    asked = {r["prompt_id"]: r["messages"] for r in prompts}
    places = {e.updates: n for n, e in enumerate(evaluations)}
    lines: dict[str, PromptLine] = {}
    for prompt_id, of_prompt in groupby(rows, lambda r: r["prompt_id"]):
        mine = list(of_prompt)
        messages = asked.get(prompt_id) or ()
        wanted = text is None or any(r["found"] for r in mine)
        if not wanted and not any((text or "").lower() in m["content"].lower() for m in messages):
            continue
        words: list[AgainstBase | None] = [None] * len(evaluations)
        for updates, of_evaluation in groupby(mine, lambda r: r["evaluation"]):
            if updates in places:
                words[places[updates]] = _most([_against_base(r) for r in of_evaluation])
        shown = messages[-1]["content"] if messages else prompt_id
        lines[prompt_id] = PromptLine(prompt_id=prompt_id, prompt=shown, against_base=tuple(words))
    order = [*(p for p in asked if p in lines), *(p for p in lines if p not in asked)]
    return HeldOutPrompts(evaluations=evaluations, prompts=tuple(lines[p] for p in order))


def answers_to(index: Index, run: RunDir, prompt_id: str) -> Answers:
    """A prompt's answers in every evaluation.

    Raises:
        UserError: no evaluation has an answer to it.
    """
    with index.session():
        evaluations = evaluations_of(index)
        rows = index.rows(
            "SELECT c.evaluation, c.text, c.tokens, c.finish_reason, p.pair_id, d.outcome, d.p_first, "
            f"c.text = b.text AS equal {_ANSWERS} AND c.prompt_id = ? ORDER BY c.evaluation, c.sample, c.line",
            [prompt_id],
        )
        asked = index.rows("SELECT messages FROM prompts WHERE held_out AND prompt_id = ?", [prompt_id])
    if not rows:
        raise UserError(f"no held-out prompt `{prompt_id}` with an answer in {run.path}")
    problems: list[str] = []
    constitutions = _copies(run, (e.hash for e in evaluations if e.hash), problems)
    by_evaluation = {k: list(of) for k, of in groupby(rows, lambda r: r["evaluation"])}
    evaluated = tuple(
        Evaluated(
            evaluation=e,
            answers=tuple(_answer(r, constitutions.get(e.hash or "")) for r in by_evaluation[e.updates]),
        )
        for e in evaluations
        if e.updates in by_evaluation
    )
    messages = tuple(Message.model_validate(m) for m in (asked[0]["messages"] if asked else ()))
    return Answers(prompt_id=prompt_id, messages=messages, evaluated=evaluated, problems=tuple(problems))


def same_prompt(index: Index, messages: Sequence[Message]) -> str | None:
    """The id of the held-out prompt that says the same, in a run whose files may name it otherwise."""
    wanted = [m.model_dump() for m in messages]
    rows = index.rows("SELECT prompt_id, messages FROM prompts WHERE held_out ORDER BY line")
    return next((str(r["prompt_id"]) for r in rows if r["messages"] == wanted), None)


def _against_base(row: dict[str, Any]) -> AgainstBase | None:
    if not row["evaluation"]:
        return None
    if row["outcome"] in _OUTCOMES:
        return _OUTCOMES[row["outcome"]]
    return "equal" if row["equal"] else None


def _most(words: Sequence[AgainstBase | None]) -> AgainstBase | None:
    """One word for a prompt's answers: that of their mean, as the win rate counts them."""
    known = [w for w in words if w is not None]
    if len(set(known)) == 1:
        return known[0]
    shares = [_SHARE[w] for w in known if w in _SHARE]
    if not shares:
        return None
    mean = fmean(shares)
    return "won" if mean > 0.5 else "lost" if mean < 0.5 else "undecided"


def _copies(run: RunDir, digests: Iterable[str], problems: list[str]) -> dict[str, Constitution]:
    out: dict[str, Constitution] = {}
    for digest in dict.fromkeys(digests):
        try:
            out[digest] = constitution_copy(run, digest)
        except FileNotFoundError as e:
            problems.append(f"{e.filename}: the run's copy of a constitution is gone; its checks are left out")
        except RlaifError as e:
            problems.append(f"{e}; its checks are left out")
    return out


def _answer(row: dict[str, Any], constitution: Constitution | None) -> Answer:
    checks = [(p.id, p.check) for p in constitution.principles if p.check] if constitution else []
    return Answer(
        text=row["text"],
        words=count_words(row["text"]),
        tokens=row["tokens"],
        cut_off=row["finish_reason"] == "length",
        pair_id=row["pair_id"],
        against_base=_against_base(row),
        p_better=row["p_first"],
        checks=tuple(
            Checked(principle=name, failed=tuple(c for c, met in check.results(row["text"]).items() if not met))
            for name, check in checks
        ),
    )
