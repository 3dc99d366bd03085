"""Questions to a run's log, and their answers as records. Nothing here prints; `rlaif audit` and `rlaif view` do.

Iterations count from 0 here, as in the files; people's tables count from 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ValidationError

from rlaif.audit.index import Index
from rlaif.config import Filters
from rlaif.constitution import Constitution
from rlaif.errors import RlaifError, UserError
from rlaif.judging import filters as rules
from rlaif.judging.ballots import GUARD_MEASURES
from rlaif.judging.calibration import EVERYTHING, Calibration, score_of
from rlaif.judging.templates import parse_template, render
from rlaif.records import (
    Completion,
    ConstitutionRef,
    Decision,
    DropReason,
    HumanLabel,
    Message,
    Outcome,
    Pair,
    Record,
    Side,
    Verdict,
    Vote,
    digest,
)
from rlaif.store import RunDir, read_record
from rlaif.texts import template_sources

PREVIEW_CHARS = 160

Status = Literal["kept", "dropped", "review"]
Sort = Literal["log", "agreement", "margin", "length"]

_KEYS: dict[Sort, str] = {
    "log": "NULL",
    "agreement": "d.agreement",
    "margin": "abs(d.p_first - 0.5)",
    "length": "a.chars + b.chars",
}
"""What a list is sorted by; `log` by where pairs stand in the log."""


class PairFilter(Record):
    """Which pairs; a field that is None asks for nothing."""

    iteration: int | None = None
    """From 0; with `evaluation`, the number of updates before it."""
    constitution: str | None = None
    """Hash (or its beginning), or name@version."""
    status: Status | None = None
    reason: DropReason | None = None
    principle: str | None = None
    """Some vote was asked about it."""
    judge: str | None = None
    """Some vote's judge has this in its name."""
    min_agreement: float | None = None
    max_agreement: float | None = None
    flipped: bool | None = None
    """A voice named another side when the order changed."""
    disagreeing: bool | None = None
    """Voices or judges name different sides."""
    text: str | None = None
    """In the prompt or in either completion, whatever the case."""
    evaluation: bool = False
    """Held-out pairs of evaluations instead of those of iterations."""


class PairRow(Record):
    """A pair in one line."""

    pair_id: str
    iteration: int
    """From 0; of an evaluation, the number of updates before it."""
    evaluation: bool = False
    constitution: str | None
    """name@version"""
    prompt: str
    status: Status | None
    """None while it is not decided."""
    reasons: tuple[DropReason, ...]
    winner: Side | None
    """The side that trains; None unless the pair is kept."""
    outcome: Outcome | None
    """The verdict, kept or not."""
    agreement: float | None
    p_first: float | None
    order_flip: bool
    valid_votes: int
    abstentions: int
    first_preview: str
    second_preview: str


class Page(Record):
    """A part of a list."""

    total: int
    """Pairs that the filter lets through."""
    offset: int
    rows: tuple[PairRow, ...]


class RuleLine(Record):
    """One rule's word on a pair."""

    name: DropReason
    value: str
    threshold: str
    passed: bool
    sentence: str


class Training(Record):
    """An iteration whose update a pair's preference was meant for."""

    iteration: int
    """From 0."""
    source: Literal["judge", "replay", "human"]
    chosen: Side | None
    steps: tuple[int, ...]
    """Global optimizer steps, from 1."""
    policy_after: str | None
    """Digest of the policy after that iteration; None when the update was skipped or isn't done."""
    skipped: bool | None
    """The update was skipped, so nothing was trained on it; None until that is known."""


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


def list_pairs(
    index: Index,
    filter: PairFilter | None = None,
    sort: Sort = "log",
    descending: bool = False,
    limit: int = 50,
    offset: int = 0,
) -> Page:
    """A page of the pairs that a filter lets through."""
    where, parameters = _where(filter or PairFilter())
    direction = "DESC" if descending else "ASC"
    order = f"iteration {direction}, evaluation {direction}, line {direction}"
    if sort != "log":
        order = f"key {direction} NULLS LAST, iteration, evaluation, line"
    joins = "".join(join for name, join in _JOINS.items() if f"{name}." in where + _KEYS[sort])
    base = f"FROM pairs p {joins} WHERE {where}"
    with index.session():
        # Narrow rows first; what a page shows is then looked up for its few pairs.
        found = index.rows(
            "WITH found AS MATERIALIZED "
            f"(SELECT p.pair_id, p.iteration, p.evaluation, p.line, {_KEYS[sort]} AS key {base}) "
            f"SELECT pair_id, (SELECT count(*) FROM found) AS total FROM found ORDER BY {order} LIMIT ? OFFSET ?",
            [*parameters, limit, offset],
        )
        if found or not offset:
            total = found[0]["total"] if found else 0
        else:
            total = index.rows(f"SELECT count(*) AS n {base}", parameters)[0]["n"]
        rows = pair_rows(index, [r["pair_id"] for r in found])
    return Page(total=total, offset=offset, rows=rows)


_JOINS = {
    "d": " LEFT JOIN decisions d ON d.pair_id = p.pair_id",
    "v": " LEFT JOIN panels v ON v.pair_id = p.pair_id",
    "a": " LEFT JOIN completions a ON a.completion_id = p.first",
    "b": " LEFT JOIN completions b ON b.completion_id = p.second",
}
_COLUMNS = """p.pair_id, p.iteration, p.evaluation, p.line, p.prompt_id, p.first, p.second, d.status, d.reasons,
d.winner, d.outcome, d.agreement, d.p_first, d.order_flip, d.valid_votes, d.abstentions"""


def pair_rows(index: Index, pair_ids: Sequence[str]) -> tuple[PairRow, ...]:
    """The given pairs, in the given order; ids that aren't in the log are left out."""
    found = index.rows(
        f"SELECT {_COLUMNS} FROM (SELECT * FROM pairs WHERE pair_id IN (SELECT unnest(?::VARCHAR[]))) p "
        "LEFT JOIN (SELECT * FROM decisions WHERE pair_id IN (SELECT unnest(?::VARCHAR[]))) d USING (pair_id)",
        [list(pair_ids), list(pair_ids)],
    )
    by_id = {r["pair_id"]: r for r in found}
    return _as_rows(index, [by_id[i] for i in pair_ids if i in by_id])


def _where(filter: PairFilter) -> tuple[str, list[Any]]:
    """An SQL condition on pairs `p` and what `_JOINS` joins to them, and its parameters."""
    number = "evaluation" if filter.evaluation else "iteration"
    conditions, parameters = [f"p.{number} IS NOT NULL"], list[Any]()

    def add(condition: str, *values: Any) -> None:
        conditions.append(condition)
        parameters.extend(values)

    if filter.iteration is not None:
        add(f"p.{number} = ?", filter.iteration)
    if filter.constitution is not None:
        add(
            f"p.{number} IN (SELECT {number} FROM {number}s WHERE text_name = ? OR starts_with(constitution, ?))",
            filter.constitution,
            filter.constitution,
        )
    if filter.status is not None:
        add("d.status = ?", filter.status)
    if filter.reason is not None:
        add("list_contains(d.reasons, ?)", filter.reason)
    if filter.principle is not None:
        add("list_contains(v.principles, ?)", filter.principle)
    if filter.judge is not None:
        add("contains(array_to_string(v.judges, chr(10)), ?)", filter.judge)
    if filter.min_agreement is not None:
        add("d.agreement >= ?", filter.min_agreement)
    if filter.max_agreement is not None:
        add("d.agreement <= ?", filter.max_agreement)
    if filter.flipped is not None:
        add("coalesce(d.order_flip, false) = ?", filter.flipped)
    if filter.disagreeing is not None:
        add("coalesce(v.disagreeing, false) = ?", filter.disagreeing)
    if filter.text is not None:
        # One look at the answers for both sides.
        add(
            "(p.prompt_id IN (SELECT prompt_id FROM prompts WHERE contains(lower(text), ?)) OR p.pair_id IN ("
            "SELECT s.pair_id FROM (SELECT pair_id, unnest([first, second]) AS id FROM pairs) s "
            "JOIN completions c ON c.completion_id = s.id WHERE contains(lower(c.text), ?)))",
            filter.text.lower(),
            filter.text.lower(),
        )
    return " AND ".join(conditions), parameters


def _as_rows(index: Index, found: Sequence[dict[str, Any]]) -> tuple[PairRow, ...]:
    """Adds texts to rows of `_COLUMNS`."""
    answers = _lookup(index, "completions", "completion_id", {i for r in found for i in (r["first"], r["second"])})
    prompts = _lookup(index, "prompts", "prompt_id", {r["prompt_id"] for r in found})
    names = _text_names(index)
    return tuple(
        PairRow(
            pair_id=r["pair_id"],
            iteration=r["iteration"] if r["evaluation"] is None else r["evaluation"],
            evaluation=r["evaluation"] is not None,
            constitution=names.get((r["iteration"], r["evaluation"])),
            prompt=prompts.get(r["prompt_id"], r["prompt_id"]),
            status=r["status"],
            reasons=tuple(r["reasons"] or ()),
            winner=r["winner"],
            outcome=r["outcome"],
            agreement=r["agreement"],
            p_first=r["p_first"],
            order_flip=bool(r["order_flip"]),
            valid_votes=r["valid_votes"] or 0,
            abstentions=r["abstentions"] or 0,
            first_preview=_preview(answers.get(r["first"], "")),
            second_preview=_preview(answers.get(r["second"], "")),
        )
        for r in found
    )


def _lookup(index: Index, table: str, key: str, ids: set[str]) -> dict[str, str]:
    if not ids:
        return {}
    rows = index.rows(f"SELECT {key} AS id, text FROM {table} WHERE {key} IN (SELECT unnest(?))", [sorted(ids)])
    return {r["id"]: r["text"] for r in rows}


def _text_names(index: Index) -> dict[tuple[int | None, int | None], str | None]:
    rows = index.rows(
        "SELECT iteration, NULL AS evaluation, text_name FROM iterations "
        "UNION ALL SELECT NULL, evaluation, text_name FROM evaluations"
    )
    return {(r["iteration"], r["evaluation"]): r["text_name"] for r in rows}


def _preview(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text[: 2 * PREVIEW_CHARS].split())
    return line if len(line) <= PREVIEW_CHARS and len(text) <= 2 * PREVIEW_CHARS else line[: PREVIEW_CHARS - 1] + "…"


class VoiceSides(Record):
    """What one voice said about a pair, order by order."""

    judge: str
    voice: str
    principles: tuple[str, ...]
    guard: bool
    sample_index: int
    forward: tuple[Outcome, ...]
    """With the first completion shown first."""
    reversed: tuple[Outcome, ...]
    unordered: tuple[Outcome, ...]
    """Of a judge without slots."""


class Split(Record):
    """A pair on which votes point to different sides."""

    row: PairRow
    voices: tuple[VoiceSides, ...]


class SplitPage(Record):
    """A part of a list of splits."""

    total: int
    offset: int
    rows: tuple[Split, ...]


def splits(index: Index, filter: PairFilter, limit: int = 50, offset: int = 0) -> SplitPage:
    """A page of pairs with every voice's word on them; `filter` says `flipped` or `disagreeing`."""
    page = list_pairs(index, filter, limit=limit, offset=offset)
    voices = voice_sides(index, [r.pair_id for r in page.rows])
    rows = tuple(Split(row=r, voices=tuple(voices.get(r.pair_id, ()))) for r in page.rows)
    return SplitPage(total=page.total, offset=offset, rows=rows)


def voice_sides(index: Index, pair_ids: Sequence[str]) -> dict[str, list[VoiceSides]]:
    """Pair id → what each voice said, in the order in which they were asked."""
    found = index.rows(
        """SELECT pair_id, judge, voice, principles, guard, sample_index,
            list(outcome ORDER BY line) FILTER (shown = 'forward') AS forward,
            list(outcome ORDER BY line) FILTER (shown = 'reversed') AS reversed,
            list(outcome ORDER BY line) FILTER (shown = 'none') AS unordered
        FROM votes WHERE pair_id IN (SELECT unnest(?::VARCHAR[])) GROUP BY ALL ORDER BY min(line)""",
        [list(pair_ids)],
    )
    out: dict[str, list[VoiceSides]] = {}
    for r in found:
        lists = {k: tuple(r[k] or ()) for k in ("principles", "forward", "reversed", "unordered")}
        out.setdefault(r.pop("pair_id"), []).append(VoiceSides.model_validate(r | lists))
    return out


# One pair.


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
        f"SELECT {_COLUMNS}, d.line AS decision_line "
        "FROM pairs p LEFT JOIN decisions d USING (pair_id) WHERE p.pair_id = ?",
        [pair_id],
    )
    base = found[0]
    (row,) = _as_rows(index, found[:1])
    vote_lines = [r["line"] for r in index.rows("SELECT line FROM votes WHERE pair_id = ? ORDER BY line", [pair_id])]
    read = index.source_lines("votes", base, vote_lines)
    votes = [_parsed(Vote, read.get(n), index, "votes", base, n) for n in vote_lines]
    decision = None
    if base["decision_line"]:
        line = index.source_lines("decisions", base, [base["decision_line"]]).get(base["decision_line"])
        decision = _parsed(Decision, line, index, "decisions", base, base["decision_line"])
    pair_line = index.source_lines("pairs", base, [base["line"]]).get(base["line"])
    pair = _parsed(Pair, pair_line, index, "pairs", base, base["line"])
    first, second = (_completion(index, i) for i in (pair.first, pair.second))
    reference, text = _constitution_of(index, run, base)
    asked = index.rows("SELECT messages, category FROM prompts WHERE prompt_id = ?", [pair.prompt_id])
    category = asked[0]["category"] if asked else None
    labels = index.rows(
        "SELECT pair_id, iteration, outcome, author, time, reason FROM labels WHERE pair_id = ? ORDER BY line",
        [pair_id],
    )
    return PairDetail(
        row=row,
        prompt_messages=tuple(Message.model_validate(m) for m in (asked[0]["messages"] if asked else ())),
        pair=pair,
        first=first,
        second=second,
        votes=tuple(votes),
        vote_lines=tuple(f"{index.file_of('votes', base)}:{n}" for n in vote_lines),
        decision=decision,
        rules=rule_lines(run, pair, decision, votes, first, second, category) if decision else (),
        constitution=reference,
        constitution_text=text,
        preferences=_trained(index, pair),
        labels=tuple(HumanLabel.model_validate(r) for r in labels),
    )


def _parsed(record: type[Any], line: bytes | None, index: Index, table: str, row: dict[str, Any], number: int) -> Any:
    where = f"{index.file_of(table, row)}:{number}"
    if line is None:
        raise RlaifError(f"{where}: gone since the index was made; try again")
    try:
        return record.model_validate_json(line)
    except ValidationError as e:
        raise RlaifError(f"{where}: not a {record.__name__} ({e.errors()[0]['msg']}); it was changed") from e


def _completion(index: Index, completion_id: str) -> Completion | None:
    found = index.rows("SELECT iteration, evaluation, line FROM completions WHERE completion_id = ?", [completion_id])
    if not found:
        return None
    where = found[0]
    line = index.source_lines("completions", where, [where["line"]]).get(where["line"])
    completion: Completion = _parsed(Completion, line, index, "completions", where, where["line"])
    return completion


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
    return reference, source.read_text() if source.exists() else None


def _trained(index: Index, pair: Pair) -> tuple[Training, ...]:
    found = index.rows(
        """SELECT f.iteration, f.source, f.chosen_id, i.policy_after, i.skipped,
            (SELECT list(u.step ORDER BY u.step) FROM updates u
             WHERE u.iteration = f.iteration AND list_contains(u.pair_ids, f.pair_id)) AS steps
        FROM preferences f LEFT JOIN iterations i USING (iteration) WHERE f.pair_id = ? ORDER BY f.iteration""",
        [pair.id],
    )
    sides: dict[str, Side] = {pair.first: "first", pair.second: "second"}
    return tuple(
        Training(
            iteration=r["iteration"],
            source=r["source"],
            chosen=sides.get(r["chosen_id"]),
            steps=tuple(r["steps"] or ()),
            policy_after=r["policy_after"],
            skipped=r["skipped"],
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


def rule_lines(
    run: RunDir,
    pair: Pair,
    decision: Decision,
    votes: Sequence[Vote],
    first: Completion | None = None,
    second: Completion | None = None,
    category: str | None = None,
) -> tuple[RuleLine, ...]:
    """Rule by rule: what was found, what was asked for, and whether the decision names it as a reason.

    `category` is the prompt's: the slice of a calibration.
    """
    settings, verdict = settings_of(run), decision.verdict
    calibration = _calibration(run, pair) if settings.calibration else None
    lines = [_line("identical", _same(first, second), "two different texts", decision)]
    names = [*rules.VALIDITY] if calibration else [*rules.RULES]
    # A rule that spoke, by a run whose calibration isn't here any more, is still shown.
    names += [r for r in decision.reasons if r not in names and r not in ("identical", "uncalibrated")]
    for name in names:
        value, threshold = _rule(name, verdict, settings)
        lines.append(_line(name, value, threshold, decision))
    if calibration or "uncalibrated" in decision.reasons:
        value, threshold = _calibrated(calibration, verdict, votes, settings, category or EVERYTHING)
        lines.append(_line("uncalibrated", value, threshold, decision))
    return tuple(lines)


def _line(name: DropReason, value: str, threshold: str, decision: Decision) -> RuleLine:
    passed = name not in decision.reasons
    sentence = f"{value}; asked for: {threshold}" if passed else f"{value}, but asked for: {threshold}"
    return RuleLine(name=name, value=value, threshold=threshold, passed=passed, sentence=sentence)


def _same(first: Completion | None, second: Completion | None) -> str:
    if first is None or second is None:
        return "the texts are not in the log"
    return "the texts are equal" if first.text.strip() == second.text.strip() else "the texts differ"


def _rule(name: str, verdict: Verdict, settings: Filters) -> tuple[str, str]:
    """A rule's value and threshold, in words."""
    lost = sum(verdict.abstentions.values())
    all_votes = lost + verdict.valid_votes
    p = verdict.p_first
    against = {"first": verdict.guard_second, "second": verdict.guard_first}.get(verdict.outcome, 0)
    texts: dict[str, tuple[str, str]] = {
        "too_few_votes": (f"{verdict.valid_votes} valid votes", f"at least {max(settings.min_votes, 1)}"),
        "abstained": (
            f"{lost} of {all_votes} votes abstained"
            + (f", {verdict.guard_missing} guards have no valid vote" if verdict.guard_missing else ""),
            f"at most {settings.max_abstention_share:.0%} of the votes",
        ),
        "tie": (f"the verdict is {verdict.outcome}", "a winner"),
        "guard": (
            f"{against} guard votes against the winner",
            "none" if settings.guards else "nothing (filters.guards is off)",
        ),
        "order_flip": (
            "a voice named another side when the order changed" if verdict.order_flip else "no voice flipped",
            "the same side in both orders",
        ),
        "low_agreement": (
            "no agreement without a vote" if verdict.agreement is None else f"agreement {verdict.agreement:.3f}",
            f"at least {settings.min_agreement:g}",
        ),
        "low_margin": (
            "no p(first) without a vote" if p is None else f"|p(first) - 0.5| = {abs(p - 0.5):.3f}",
            f"at least {settings.min_margin:g}",
        ),
    }
    return texts.get(name, ("", ""))


def _calibration(run: RunDir, pair: Pair) -> Calibration | None:
    path = run.path / "calibration.json"
    if pair.method == "against_base" or not path.exists():  # held-out pairs only measure
        return None
    return read_record(path, Calibration)


def _calibrated(
    calibration: Calibration | None, verdict: Verdict, votes: Sequence[Vote], settings: Filters, slice: str
) -> tuple[str, str]:
    if calibration is None:
        return "the run's calibration is not in the log", "a calibrated judge"
    if votes and (difference := calibration.mismatch(votes, settings)):
        return difference, "the votes that were calibrated"
    threshold = calibration.threshold_for(slice)
    if threshold is None:
        return f"the prompt is of slice {slice}", f"a calibrated slice ({', '.join(calibration.slices)})"
    value = score_of(verdict, calibration.score, threshold.map)
    least = "nothing passes" if threshold.threshold is None else f"at least {threshold.threshold:g}"
    of_slice = "" if EVERYTHING in calibration.slices else f" in slice {slice}"
    return f"{calibration.score} {value:.3f}", f"{least}{of_slice}"


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
    path = run.path / "constitutions" / vote.ballot.constitution / "constitution.json"
    if not path.exists():
        raise RlaifError(f"{path}: missing; the question can't be shown without the text")
    text = read_record(path, Constitution)
    if vote.ballot.order == "none" and vote.prompt_hash is None:
        return _likelihood_question(detail, vote, text)
    return _chat_question(run, detail, vote, text)


def _chat_question(run: RunDir, detail: PairDetail, vote: Vote, text: Constitution) -> str:
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
    principle = text.principle(asked) if asked else None
    messages = render(template, text, principle, detail.prompt_messages, a.text, b.text)
    shown = "\n\n".join(f"[{m.role}]\n{m.content}" for m in messages)
    made = digest([m.model_dump() for m in messages])
    if vote.prompt_hash is not None and made != vote.prompt_hash:
        return f"Not what was sent: the vote notes prompt {vote.prompt_hash}, this is {made}.\n\n{shown}"
    return shown


def _likelihood_question(detail: PairDetail, vote: Vote, text: Constitution) -> str:
    prompt = "\n\n".join(f"[{m.role}]\n{m.content}" for m in detail.prompt_messages)
    measure = vote.ballot.voice.rpartition("/")[2]
    if measure in GUARD_MEASURES:
        what = {
            "relevance": "Mean of log p(token | prompt) - log p(token | another prompt)",
            "fluency": "Mean of log p(token | prompt) under the frozen base model",
        }[measure]
        return f"{what}, in nats, of each answer.\n\nThe prompt:\n\n{prompt}"
    voices = {v.id: v for v in text.voices()}
    if vote.ballot.voice not in voices:
        return f"The voice `{vote.ballot.voice}` is not in the run's copy of {text.ref}.\n\nThe prompt:\n\n{prompt}"
    voice = voices[vote.ballot.voice]
    sides = [
        f"{side}:\n\n" + "\n\n".join(f"[{m.role}]\n{m.content}" for m in messages)
        for side, messages in (("Prefer", voice.prefer), ("Avoid", voice.avoid))
    ]
    return "\n\n".join(
        [
            "Score of each answer: log p(answer | prefer, prompt) - log p(answer | avoid, prompt), in nats. The side "
            "stands before the prompt.",
            *sides,
            f"The prompt:\n\n{prompt}",
        ]
    )


# The run on one screen.


class IterationRow(Record):
    """An iteration in one line."""

    iteration: int
    """From 0."""
    constitution: str | None
    done: bool
    pairs: int
    decided: int
    kept: int
    reasons: dict[str, int]
    """First reason of each dropped pair → pairs, as in the tables of `rlaif run`."""
    review: int
    agreement: float | None
    position_bias: float | None
    """Share of votes for the slot shown first; None for a judge without slots."""
    order_flips: int
    votes: int
    abstentions: int
    cached: int
    calls: int
    tokens: int
    """As in `JudgeCost`: without replies from the cache."""
    loss: float | None
    mean_words: float | None
    trained_pairs: int
    """0 when the update was skipped, or isn't done."""
    skipped: bool | None


class EvaluationRow(Record):
    """A held-out evaluation in one line."""

    updates: int
    """After so many iterations; 0 is the base policy."""
    constitution: str | None
    win_rate: float | None
    """Against the base policy, undecided pairs as half."""
    win_interval: tuple[float, float] | None
    mean_words: float | None
    kl_per_token: float | None
    relevance: float | None
    checks: dict[str, float]


class TextChange(Record):
    """A text came into force."""

    iteration: int
    """The first one under it, from 0."""
    constitution: str
    hash: str


class JudgeCost(Record):
    """What a judge cost."""

    judge: str
    votes: int
    abstentions: int
    cached: int
    calls: int
    """Requests to a server, failed ones included; a budget's calls are those that were answered."""
    prompt_tokens: int
    """Of replies that were paid for: those from the cache don't count."""
    completion_tokens: int
    money: float | None
    """By the job's prices; None without one."""


class Totals(Record):
    """The iterations together."""

    pairs: int
    votes: int
    decided: int
    kept: int
    dropped: int
    review: int
    reasons: dict[str, int]
    agreement: float | None
    position_bias: float | None
    order_flips: int
    abstentions: dict[str, int]
    preferences: int
    replayed: int
    human: int
    steps: int


class Overview(Record):
    """A run on one screen."""

    run: str
    iterations_planned: int | None
    iterations: tuple[IterationRow, ...]
    changes: tuple[TextChange, ...]
    totals: Totals
    evaluations: tuple[EvaluationRow, ...]
    alarms: tuple[str, ...]
    cost: tuple[JudgeCost, ...]
    problems: tuple[str, ...]


def overview(index: Index, run: RunDir) -> Overview:
    """The run on one screen."""
    with index.session():
        return _overview(index, run)


def _overview(index: Index, run: RunDir) -> Overview:
    changes: list[TextChange] = []
    for r in index.rows("SELECT * FROM iterations WHERE text_name IS NOT NULL ORDER BY iteration"):
        if not changes or changes[-1].hash != r["constitution"]:
            changes.append(TextChange(iteration=r["iteration"], constitution=r["text_name"], hash=r["constitution"]))
    header = run.header
    return Overview(
        run=str(run.path),
        iterations_planned=header.get("job", {}).get("iterations"),
        iterations=tuple(_iteration_rows(index)),
        changes=tuple(changes),
        totals=_totals(index),
        evaluations=tuple(_evaluation_rows(index)),
        alarms=tuple(
            f"iteration {r['iteration'] + 1}: {r['message']}" if r["iteration"] is not None else r["message"]
            for r in index.rows("SELECT iteration, message FROM events WHERE kind = 'alarm' ORDER BY line")
        ),
        cost=tuple(_costs(index, header.get("job", {}).get("judge", {}).get("prices") or {})),
        problems=tuple(index.problems),
    )


_DECIDED = """count(*) AS decided, count(*) FILTER (status = 'kept') AS kept,
count(*) FILTER (status = 'review') AS review, count(*) FILTER (status = 'dropped') AS dropped,
avg(agreement) AS agreement, sum(order_flip::INTEGER) AS order_flips, sum(slot_first) AS slot_first,
sum(slot_votes) AS slot_votes"""
# Tokens as the budget and metrics.json count them: a reply from the cache costs nothing.
_VOTED = """count(*) AS votes, count(*) FILTER (outcome = 'abstain') AS abstentions, count(*) FILTER (cached) AS cached,
sum(attempts) AS calls, coalesce(sum(prompt_tokens) FILTER (NOT cached), 0) AS prompt_tokens,
coalesce(sum(completion_tokens) FILTER (NOT cached), 0) AS completion_tokens"""


def _by(rows: list[dict[str, Any]], key: str) -> dict[Any, dict[str, Any]]:
    return {r[key]: r for r in rows}


def _iteration_rows(index: Index) -> list[IterationRow]:
    inside = "WHERE iteration IS NOT NULL GROUP BY iteration"
    pairs = _by(index.rows(f"SELECT iteration, count(*) AS n FROM pairs {inside}"), "iteration")
    decided = _by(index.rows(f"SELECT iteration, {_DECIDED} FROM decisions {inside}"), "iteration")
    voted = _by(index.rows(f"SELECT iteration, {_VOTED} FROM votes {inside}"), "iteration")
    trained = _by(index.rows(f"SELECT iteration, count(*) AS n FROM trained {inside}"), "iteration")
    steps = _by(index.rows(f"SELECT iteration, avg(loss) AS loss FROM updates {inside}"), "iteration")
    reasons: dict[int, dict[str, int]] = {}
    for r in index.rows(
        "SELECT iteration, reasons[1] AS reason, count(*) AS n FROM decisions "
        "WHERE iteration IS NOT NULL AND len(reasons) > 0 GROUP BY ALL ORDER BY n DESC, reason"
    ):
        reasons.setdefault(r["iteration"], {})[r["reason"]] = r["n"]
    out = []
    for r in index.rows("SELECT * FROM iterations ORDER BY iteration"):
        k = r["iteration"]
        d, v = decided.get(k, {}), voted.get(k, {})
        metrics = json.loads(r["metrics"]) if r["metrics"] else {}
        out.append(
            IterationRow(
                iteration=k,
                constitution=r["text_name"],
                done=r["metrics"] is not None,
                pairs=pairs.get(k, {}).get("n", 0),
                decided=d.get("decided", 0),
                kept=d.get("kept", 0),
                reasons=reasons.get(k, {}),
                review=d.get("review", 0),
                agreement=d.get("agreement"),
                position_bias=_share(d.get("slot_first"), d.get("slot_votes")),
                order_flips=d.get("order_flips") or 0,
                votes=v.get("votes", 0),
                abstentions=v.get("abstentions", 0),
                cached=v.get("cached", 0),
                calls=int(v.get("calls") or 0),
                tokens=int((v.get("prompt_tokens") or 0) + (v.get("completion_tokens") or 0)),
                loss=steps.get(k, {}).get("loss"),
                mean_words=(metrics.get("sampled") or {}).get("mean_words"),
                trained_pairs=trained.get(k, {}).get("n", 0),
                skipped=r["skipped"],
            )
        )
    return out


def _evaluation_rows(index: Index) -> list[EvaluationRow]:
    out = []
    for r in index.rows("SELECT * FROM evaluations WHERE metrics IS NOT NULL ORDER BY evaluation"):
        m = json.loads(r["metrics"])
        out.append(
            EvaluationRow(
                updates=r["evaluation"],
                constitution=r["text_name"],
                win_rate=m.get("win_rate") if r["evaluation"] else None,
                win_interval=m.get("win_interval") if r["evaluation"] else None,
                mean_words=m.get("mean_words"),
                kl_per_token=m.get("kl_per_token"),
                relevance=m.get("relevance"),
                checks=m.get("checks") or {},
            )
        )
    return out


def _totals(index: Index) -> Totals:
    (d,) = index.rows(f"SELECT {_DECIDED} FROM decisions WHERE iteration IS NOT NULL")
    (p,) = index.rows(
        "SELECT count(*) AS n, count(*) FILTER (source = 'replay') AS replayed, "
        "count(*) FILTER (source = 'human') AS human FROM trained"
    )

    def count(table: str) -> int:
        return int(index.rows(f"SELECT count(*) AS n FROM {table} WHERE iteration IS NOT NULL")[0]["n"])

    reasons = index.rows(
        "SELECT reasons[1] AS reason, count(*) AS n FROM decisions WHERE iteration IS NOT NULL AND len(reasons) > 0 "
        "GROUP BY ALL ORDER BY n DESC, reason"
    )
    abstentions = index.rows(
        "SELECT abstain_reason AS reason, count(*) AS n FROM votes WHERE iteration IS NOT NULL AND outcome = 'abstain' "
        "GROUP BY ALL ORDER BY n DESC, reason"
    )
    return Totals(
        pairs=count("pairs"),
        votes=count("votes"),
        decided=d["decided"],
        kept=d["kept"],
        dropped=d["dropped"],
        review=d["review"],
        reasons={r["reason"]: r["n"] for r in reasons},
        agreement=d["agreement"],
        position_bias=_share(d["slot_first"], d["slot_votes"]),
        order_flips=d["order_flips"] or 0,
        abstentions={r["reason"]: r["n"] for r in abstentions},
        preferences=p["n"],
        replayed=p["replayed"],
        human=p["human"],
        steps=count("updates"),
    )


def _costs(index: Index, prices: dict[str, Any]) -> list[JudgeCost]:
    """What each judge cost, evaluations included."""
    out = []
    for r in index.rows(f"SELECT judge, {_VOTED} FROM votes GROUP BY judge ORDER BY judge"):
        # A ballot's judge is `chat:MODEL@HOST`.
        price = prices.get(str(r["judge"]).removeprefix("chat:").rpartition("@")[0])
        money = None
        if price:
            money = float(r["prompt_tokens"] * price["prompt"] + r["completion_tokens"] * price["completion"]) / 1e6
        out.append(
            JudgeCost(
                judge=r["judge"],
                votes=r["votes"],
                abstentions=r["abstentions"],
                cached=r["cached"],
                calls=int(r["calls"] or 0),
                prompt_tokens=int(r["prompt_tokens"]),
                completion_tokens=int(r["completion_tokens"]),
                money=money,
            )
        )
    return out


def _share(part: float | None, whole: float | None) -> float | None:
    return float(part or 0) / float(whole) if whole else None
