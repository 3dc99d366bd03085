"""One pair: all that the log knows about it, and the questions that its judges were asked. Nothing here prints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from rlaif.audit.explain import RuleLine, rule_lines
from rlaif.audit.index import Index
from rlaif.audit.pairs import COLUMNS, PairRow, as_rows
from rlaif.config import Filters, Job
from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.copies import constitution_copy, template_sources
from rlaif.constitutions.derived import FILE as DERIVED_FILE
from rlaif.constitutions.derived import Wordings
from rlaif.constitutions.templates import parse_template, render
from rlaif.errors import RlaifError, UserError
from rlaif.judging.ballots import GUARD_MEASURES
from rlaif.judging.calibration import Calibration
from rlaif.judging.kinds import kind_of
from rlaif.records import (
    Completion,
    ConstitutionRef,
    Decision,
    HumanLabel,
    Message,
    Pair,
    Record,
    RowSource,
    Side,
    Standing,
    Vote,
    digest,
    stored,
)
from rlaif.rundir.store import RunDir, read_record, read_source


class Training(Record):
    """An iteration whose update a pair's preference was meant for."""

    iteration: int
    """From 0."""
    source: RowSource
    chosen: Side | None
    steps: tuple[int, ...]
    """Global optimizer steps, from 1."""
    policy_after: str | None
    """Digest of the policy after that iteration; None when the update was skipped or isn't done."""
    skipped: bool | None
    """The update was skipped, so nothing was trained on it; None until that is known."""
    unknown: str | None = None
    """Why that isn't known of an update that is done: its meta file is gone or damaged."""


class LaterText(Record):
    """What a text made of a pair that was judged under an earlier one."""

    iteration: int
    """From 0."""
    constitution: str
    """name@version, or the hash where that isn't known."""
    standing: Standing
    carried: int
    lost: int
    asked: int


class PairDetail(Record):
    """All that the log knows about a pair."""

    row: PairRow
    prompt_messages: tuple[Message, ...]
    pair: Pair
    first: Completion | None
    second: Completion | None
    votes: tuple[Vote, ...]
    vote_lines: tuple[str, ...]
    """file:line of each vote."""
    decision: Decision | None
    rules: tuple[RuleLine, ...]
    constitution: ConstitutionRef | None
    constitution_text: str | None
    """The run's copy of source.yaml."""
    preferences: tuple[Training, ...]
    labels: tuple[HumanLabel, ...]
    """Human labels, oldest first."""
    later: tuple[LaterText, ...] = ()
    """What later texts made of it; its new votes are in the table `rejudged_votes`."""
    problems: tuple[str, ...] = ()
    """Lines of the log about it that can't be read, and are left out."""


def find_pair(index: Index, pair_id: str) -> str:
    """The one pair whose id is, or begins with, the given text.

    Raises:
        UserError: there is none, or more than one.
    """
    found = [
        r["pair_id"]
        for r in index.rows(
            "SELECT pair_id FROM pairs WHERE starts_with(pair_id, ?) ORDER BY pair_id <> ?, pair_id LIMIT 6",
            [pair_id, pair_id],
        )
    ]
    if not found:
        raise UserError(f"no pair `{pair_id}` in {index.run.path}; `rlaif audit {index.run.path} list` shows their ids")
    if found[0] != pair_id and len(found) > 1:
        more = " …" if len(found) > 5 else ""
        raise UserError(f"`{pair_id}` begins the ids of several pairs: {', '.join(found[:5])}{more}; give more of it")
    return str(found[0])


def show(index: Index, run: RunDir, pair_id: str) -> PairDetail:
    """All that the log knows about a pair; the beginning of an id is enough when it is unique.

    Raises:
        UserError: no such pair, or several.
    """
    with index.session():
        return _show(index, run, find_pair(index, pair_id))


def _show(index: Index, run: RunDir, pair_id: str) -> PairDetail:
    found = index.rows(
        f"SELECT {COLUMNS}, d.line AS decision_line "
        "FROM pairs p LEFT JOIN decisions d USING (pair_id) WHERE p.pair_id = ?",
        [pair_id],
    )
    base = found[0]
    problems: list[str] = []
    (row,) = as_rows(index, found[:1], [])

    def readable(record: type[Any], line: bytes | None, table: str, where: dict[str, Any], number: int) -> Any:
        try:
            return _parsed(record, line, index, table, where, number)
        except RlaifError as e:
            problems.append(str(e))
            return None

    vote_lines = [r["line"] for r in index.rows("SELECT line FROM votes WHERE pair_id = ? ORDER BY line", [pair_id])]
    read = index.source_lines("votes", base, vote_lines)
    read_votes = {n: vote for n in vote_lines if (vote := readable(Vote, read.get(n), "votes", base, n))}
    votes = [*read_votes.values()]
    decision = None
    if base["decision_line"]:
        line = index.source_lines("decisions", base, [base["decision_line"]]).get(base["decision_line"])
        decision = readable(Decision, line, "decisions", base, base["decision_line"])
    pair_line = index.source_lines("pairs", base, [base["line"]]).get(base["line"])
    pair = _parsed(Pair, pair_line, index, "pairs", base, base["line"])

    def completion(completion_id: str) -> Completion | None:
        found = index.rows(
            "SELECT iteration, evaluation, line FROM completions WHERE completion_id = ?", [completion_id]
        )
        if not found:
            return None
        line = index.source_lines("completions", found[0], [found[0]["line"]]).get(found[0]["line"])
        return readable(Completion, line, "completions", found[0], found[0]["line"])

    first, second = completion(pair.first), completion(pair.second)
    asked = index.rows("SELECT messages, category FROM prompts WHERE prompt_id = ?", [pair.prompt_id])
    category = asked[0]["category"] if asked else None
    rules: tuple[RuleLine, ...] = ()
    if decision is not None:
        settings = settings_of(run)
        try:
            calibration = _calibration(run, pair) if settings.calibration else None
            rules = rule_lines(decision, votes, settings, calibration, first, second, category, _job(run))
        except RlaifError as e:
            problems.append(f"{e}; the rules are left out")
    reference, constitution = _constitution_of(index, run, base)
    labels = index.rows(
        "SELECT pair_id, iteration, outcome, author, time, reason, constitution FROM labels WHERE pair_id = ? "
        "ORDER BY line",
        [pair_id],
    )
    return PairDetail(
        row=row,
        prompt_messages=tuple(Message.model_validate(m) for m in (asked[0]["messages"] if asked else ())),
        pair=pair,
        first=first,
        second=second,
        votes=tuple(votes),
        vote_lines=tuple(f"{index.file_of('votes', base)}:{n}" for n in read_votes),
        decision=decision,
        rules=rules,
        constitution=reference,
        constitution_text=constitution,
        preferences=_trained(index, pair),
        labels=tuple(HumanLabel.model_validate(r) for r in labels),
        later=tuple(LaterText(**r) for r in index.rows(_LATER, [pair_id])),
        problems=tuple(problems),
    )


_LATER = """
SELECT o.iteration, coalesce(i.text_name, o.constitution) AS constitution, o.standing, o.carried, o.lost, o.asked
FROM old_pairs o LEFT JOIN iterations i USING (iteration) WHERE o.pair_id = ? ORDER BY o.iteration
"""


def _parsed(record: type[Any], line: bytes | None, index: Index, table: str, row: dict[str, Any], number: int) -> Any:
    where = f"{index.file_of(table, row)}:{number}"
    if line is None:
        raise RlaifError(f"{where}: gone since the index was made; try again")
    try:
        return stored(record, line)
    except ValidationError as e:
        raise RlaifError(f"{where}: not a {record.__name__} ({e.errors()[0]['msg']}); it was changed") from e


def _constitution_of(index: Index, run: RunDir, row: dict[str, Any]) -> tuple[ConstitutionRef | None, str | None]:
    table, number = (
        ("iterations", row["iteration"]) if row["evaluation"] is None else ("evaluations", row["evaluation"])
    )
    found = index.rows(f"SELECT constitution, text_name FROM {table} WHERE {table[:-1]} = ?", [number])
    if not found or not found[0]["text_name"]:
        return None, None
    name, _, version = found[0]["text_name"].rpartition("@")
    reference = ConstitutionRef(name=name, version=int(version), hash=found[0]["constitution"])
    source = run.path / "constitutions" / reference.hash / "source.yaml"
    return reference, read_source(source) if source.exists() else None


def _trained(index: Index, pair: Pair) -> tuple[Training, ...]:
    found = index.rows(
        """SELECT f.iteration, f.source, f.chosen_id, i.policy_after, i.skipped,
            (SELECT list(u.step ORDER BY u.step) FROM updates u
             WHERE u.iteration = f.iteration AND list_contains(u.row_ids, f.pair_id)) AS steps
        FROM preferences f LEFT JOIN iterations i USING (iteration) WHERE f.pair_id = ? ORDER BY f.iteration""",
        [pair.id],
    )
    sides: dict[str, Side] = {pair.first: "first", pair.second: "second"}
    lost = index.unknown_updates()
    return tuple(
        Training(
            iteration=r["iteration"],
            source=r["source"],
            chosen=sides.get(r["chosen_id"]),
            steps=tuple(r["steps"] or ()),
            policy_after=r["policy_after"],
            skipped=r["skipped"],
            unknown=lost.get(r["iteration"]),
        )
        for r in found
    )


def settings_of(run: RunDir) -> Filters:
    """The filter settings of a run's job; keys that this version doesn't know are left out.

    Raises:
        RlaifError: they can't be read.
    """
    found = {k: v for k, v in run.header.get("job", {}).get("filters", {}).items() if k in Filters.model_fields}
    try:
        return Filters.model_validate(found)
    except ValidationError as e:
        raise RlaifError(f"{run.path}/run.json: job.filters: {e.errors()[0]['msg']}") from e


def _job(run: RunDir) -> Job | None:
    """The run's job, to say how its judge was asked; None where this version can't read it."""
    try:
        return run.job()
    except RlaifError:
        return None


def _calibration(run: RunDir, pair: Pair) -> Calibration | None:
    path = run.path / "calibration.json"
    if pair.method == "against_base" or not path.exists():  # held-out pairs only measure
        return None
    return read_record(path, Calibration)


# A ballot's question.


def question(index: Index, run: RunDir, pair_id: str, ballot_id: str) -> str:
    """The question of a ballot as the judge got it.

    For a chat judge the messages, rendered again from the run's own copies and checked against the vote's
    `prompt_hash`; for the likelihood judge its contexts, in words.

    Raises:
        UserError: no such pair or ballot.
        RlaifError: the run's copy of a text or template is gone.
    """
    return question_of(run, show(index, run, pair_id), ballot_id)


def question_of(run: RunDir, detail: PairDetail, ballot_id: str) -> str:
    """`question`, for a pair that was read already."""
    found = [v for v in detail.votes if v.ballot.id.startswith(ballot_id)]
    if len(found) != 1:
        known = ", ".join(v.ballot.id for v in detail.votes) or "none"
        raise UserError(f"{len(found) or 'no'} ballots `{ballot_id}` on pair {detail.row.pair_id}; known: {known}")
    vote = found[0]
    try:
        constitution = constitution_copy(run, vote.ballot.constitution)
    except FileNotFoundError as e:
        raise RlaifError(f"{e.filename}: missing; a question is rendered from the text") from e
    job = _job(run)
    if job is not None and (why := kind_of(job.judge).unshown):
        return f"{why}\n\n{_shown(detail.prompt_messages)}"
    if vote.ballot.order == "none" and vote.prompt_hash is None:
        return _likelihood_question(run, detail, vote, constitution)
    return _chat_question(run, detail, vote, constitution)


def _shown(messages: Iterable[Message]) -> str:
    return "\n\n".join(f"[{m.role}]\n{m.content}" for m in messages)


def _chat_question(run: RunDir, detail: PairDetail, vote: Vote, constitution: Constitution) -> str:
    if detail.first is None or detail.second is None:
        raise RlaifError(f"pair {detail.row.pair_id}: an answer is not in the log; the question can't be rendered")
    ballot = vote.ballot
    folder = run.path / "constitutions" / ballot.template
    name, _, asked = ballot.voice.partition("/")
    sources = template_sources(folder)
    if f"{name}.jinja" not in sources:
        raise RlaifError(f"{folder / name}.jinja: missing; the question can't be rendered")
    template = parse_template(name, sources, str(folder))
    a, b = (detail.second, detail.first) if ballot.order == "reversed" else (detail.first, detail.second)
    principle = constitution.principle(asked) if asked else None
    messages = render(template, constitution, principle, detail.prompt_messages, a.text, b.text, (a.cut_off, b.cut_off))
    shown = _shown(messages)
    made = digest([m.model_dump() for m in messages])
    if vote.prompt_hash is not None and made != vote.prompt_hash:
        return f"Not what was sent: the vote notes prompt {vote.prompt_hash}, this is {made}.\n\n{shown}"
    return shown


def _likelihood_question(run: RunDir, detail: PairDetail, vote: Vote, constitution: Constitution) -> str:
    prompt = _shown(detail.prompt_messages)
    measure = vote.ballot.voice.rpartition("/")[2]
    if measure in GUARD_MEASURES:
        what = {
            "relevance": "Mean of log p(token | prompt) - log p(token | another prompt)",
            "fluency": "Mean of log p(token | prompt) under the frozen base model",
        }[measure]
        return f"{what}, in nats, of each answer.\n\nThe prompt:\n\n{prompt}"
    voices = {v.id: v for v in constitution.voices()}
    if vote.ballot.voice not in voices:  # derived, by wordings of which the run has a copy
        copies = [read_record(path, Wordings) for path in sorted(run.path.glob(f"constitutions/*/{DERIVED_FILE}"))]
        voices = {
            v.id: v for c in copies for v in constitution.derived_by(c).voices() if v.hash == vote.ballot.template
        }
    if vote.ballot.voice not in voices:
        gone = f"The voice `{vote.ballot.voice}` is not in the run's copy of {constitution.ref}."
        return f"{gone}\n\nThe prompt:\n\n{prompt}"
    voice = voices[vote.ballot.voice]
    sides = [f"{side}:\n\n{_shown(messages)}" for side, messages in (("Prefer", voice.prefer), ("Avoid", voice.avoid))]
    return "\n\n".join(
        [
            "Score of each answer: log p(answer | prefer, prompt) - log p(answer | avoid, prompt), in nats. The side "
            "stands before the prompt.",
            *sides,
            f"The prompt:\n\n{prompt}",
        ]
    )
