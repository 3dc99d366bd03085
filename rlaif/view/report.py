"""`rlaif report`: a run in one self-contained HTML file, for people who were not there and won't have the run.

In: a run directory through its index. Out: a `Report`, and the file that shows it, with the page's own pictures and
tables. A number that carries little is said to carry little: `caveats` come first.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from rlaif.audit.answers import Answers, answers_to, held_out_prompts
from rlaif.audit.index import Index
from rlaif.audit.overview import Overview, mixed_line
from rlaif.audit.summary import SHOWN_PROMPTS
from rlaif.audit.text_log import TextLog, text_log
from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.copies import constitution_copy
from rlaif.errors import RlaifError, UserError
from rlaif.judging.calibration import Calibration, read_calibration
from rlaif.judging.kinds import kind_of
from rlaif.records import LENGTH_UNKNOWN, EvaluationMetrics, Parent, Record
from rlaif.rundir.heads import read_heads
from rlaif.rundir.store import RunDir, file_digest, read_source, replacing
from rlaif.trust.agreement import Agreement, agreement, labelled_pairs
from rlaif.view.answering import answers_table
from rlaif.view.facts import Facts, read_facts
from rlaif.view.pictures import percent, pictures

EXAMPLES = 10
MOST_CHARS = 1500
"""Of a text in an example; more is cut, and said."""
FEW_PAIRS = 200
FEW_LABELS = 30
LENGTH_MOVED = 0.3
BIASED = 0.1

REASONS = {
    "identical": "the two answers are equal but for surrounding space",
    "too_few_votes": "too few valid votes",
    "abstained": "too many votes that named nothing",
    "tie": "the votes are even",
    "guard": "a guard voted for the loser",
    "order_flip": "a voice gave another answer when the order changed",
    "low_agreement": "the voices don’t agree enough",
    "low_margin": "p(first) is too near to one half",
    "uncalibrated": "under the calibrated threshold",
    "cut_off": "the winner was cut off by the length limit, the loser was not",
    "review": "waits for, or went to, a person",
}


class Text(Record):
    """A text of the rules that was in force."""

    name: str
    hash: str
    since: int
    """First iteration under it, from 0."""
    source: str
    constitution: Constitution | None


class PromptFile(Record):
    """Prompts as the run copied them."""

    use: str
    source: str
    """As the job names it."""
    prompts: int
    sha256: str | None


class Example(Record):
    """A pair in full."""

    pair_id: str
    iteration: int
    """From 0."""
    constitution: str | None
    prompt: str
    winner: str | None
    outcome: str | None
    reasons: tuple[str, ...]
    agreement: float | None
    first: str
    second: str


class Report(Record):
    """What the file says."""

    run: str
    made: str
    """UTC, ISO 8601."""
    done: int
    planned: int
    caveats: tuple[str, ...]
    overview: Overview
    evaluations: tuple[EvaluationMetrics, ...]
    texts: tuple[Text, ...]
    log: TextLog | None
    """What each change of text did, and whether answers followed; None where the run's texts are damaged."""
    parent: Parent | None
    """The run whose first iterations are its past."""
    prompts: tuple[PromptFile, ...]
    prompts_used: int
    """Different training prompts that were sampled from."""
    calibration: Calibration | None
    human: tuple[Agreement, ...]
    """Judge against people, all labels first; empty without a label."""
    dropped: dict[str, int]
    """Every pair that didn't train, by first reason."""
    kept_examples: tuple[Example, ...]
    dropped_examples: tuple[Example, ...]
    answers: tuple[Answers, ...]
    """The first held-out prompts with their answers in every evaluation; long ones are cut."""
    seconds: dict[str, float]
    """Wall time by stage, of finished iterations; `evaluations` too."""
    shows_slots: bool
    """The judge sees two answers, one before the other."""
    header: dict[str, Any]
    """run.json: resolved job, digests, versions, code revision."""
    head: str | None
    """Digest over the whole log, if the run noted one."""
    facts: Facts = Field(exclude=True)
    """What the file's pictures show: the state of the run that everything else here says."""


def make_report(index: Index, run: RunDir) -> Report:
    """Everything that the report says.

    Raises:
        UserError: no iteration is finished yet.
    """
    with index.session():
        return _make(index, run)


def _make(index: Index, run: RunDir) -> Report:
    facts = read_facts(index, run)
    done = sum(r.done for r in facts.overview.iterations)
    if not done:
        raise UserError(f"{run.path}: no iteration is finished yet; `rlaif status {run.path}` says where it stands")
    header = run.header
    job = header["job"]
    damaged: list[str] = []
    calibration = _calibration(run, job, damaged)
    calibrated = calibration is not None or bool(damaged)
    texts = tuple(_text(run, c.constitution, c.hash, c.iteration, damaged) for c in facts.overview.changes)
    log: TextLog | None = None
    try:
        log = text_log(run)
    except RlaifError as e:
        damaged.append(str(e))
    pairs, problems = labelled_pairs(run)
    human = tuple(agreement(pairs)) if pairs else ()
    dropped: dict[str, int] = {}
    for parts in facts.parts.values():
        for part, n in parts.items():
            if part != "kept":
                dropped[part] = dropped.get(part, 0) + n
    used = index.rows(
        "SELECT count(DISTINCT prompt_id) AS n FROM completions WHERE iteration IS NOT NULL"
    )[0]["n"]  # fmt: skip
    return Report(
        run=run.path.resolve().name,
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        done=done,
        planned=job["iterations"],
        caveats=tuple(
            dict.fromkeys(
                (*_caveats(facts, job, done, calibrated, human), *facts.overview.problems, *damaged, *problems)
            )
        ),
        overview=facts.overview,
        evaluations=tuple(facts.evaluations),
        texts=texts,
        log=log,
        parent=run.parent,
        prompts=tuple(_prompts(run, job)),
        prompts_used=used,
        calibration=calibration,
        human=human,
        dropped=dict(sorted(dropped.items(), key=lambda item: -item[1])),
        kept_examples=tuple(_examples(index, job["seed"], "kept")),
        dropped_examples=tuple(_examples(index, job["seed"], "dropped")),
        answers=tuple(_answers(index, run)),
        seconds=facts.seconds,
        header=header,
        shows_slots=_shows_slots(run),
        head=_head(run),
        facts=facts,
    )


def write_report(report: Report, to: Path) -> Path:
    """Writes the HTML file, whole or not at all."""
    from rlaif.view.html import render, style

    html = render(
        "report.html",
        report=report,
        facts=report.facts,
        pictures=pictures(report.facts),
        style=style(),
        answers=[(one, answers_table({report.run: one})) for one in report.answers],
        reasons=REASONS,
        job_yaml=yaml.safe_dump(report.header["job"], sort_keys=False, allow_unicode=True),
    )
    if to.is_dir():
        raise UserError(f"--to {to}: that is a folder; name a file, for example {to / 'report.html'}")
    if not to.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {to.parent}; make it first")
    with replacing(to) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))
    return to


def _shows_slots(run: RunDir) -> bool:
    """Whether the judge sees two answers in an order; taken for granted where this version can't read the job."""
    try:
        return kind_of(run.job().judge).shows_slots
    except RlaifError:
        return True


def _caveats(facts: Facts, job: dict[str, Any], done: int, calibrated: bool, human: tuple[Agreement, ...]) -> list[str]:
    """What to know before the numbers are relied on, one sentence each, the gravest first."""
    totals, last = facts.overview.totals, facts.last_judged
    stored = bool(job.get("source")) and not job["source"]["rejudge"]
    judge = "the job's judge" if stored else "the judge that also made the training labels"
    out = []
    if done < job["iterations"]:
        out.append(f"The run is not finished: {done} of {job['iterations']} iterations.")
    out += [f"Alarm: {alarm}." for alarm in facts.overview.alarms]
    if facts.overview.source:
        out.append(f"Nothing was sampled to train on: {facts.overview.source}.")
    out += [f"An update mixed texts, {mixed_line(mixed)}." for mixed in facts.overview.mixed]
    if last is None:
        out.append("Nothing was judged against the base policy: whether the training helped is not measured here.")
    else:
        low, high = last.win_interval or (0, 1)
        if low <= 0.5 <= high:
            out.append(
                f"No clear difference to the base policy: the win rate's 95 % interval, {percent(low)} to "
                f"{percent(high)}, holds one half."
            )
        out.append(
            f"The win rate is over {last.answers - last.abstained} held-out answers, by {judge}: it says how far the "
            "policy follows this judge, not how good it is."
        )
        if (at_length := last.length_controlled_interval) and at_length[0] <= 0.5 <= at_length[1] and low > 0.5:
            out.append(
                f"At the base policy's length the judge's preference isn't clear: the win rate's 95 % interval there, "
                f"{percent(at_length[0])} to {percent(at_length[1])}, holds one half. Unless the text asks for another "
                "length, the win may be a matter of length."
            )
        if last.length_controlled_unknown and low > 0.5:
            out.append(
                "What the win rate would be at the base policy's length isn't known: "
                f"{LENGTH_UNKNOWN[last.length_controlled_unknown]}. Unless the text asks for another length, the win "
                "may be a matter of length."
            )
    newest = facts.evaluations[-1] if facts.evaluations else None
    if newest and newest.abstained:
        out.append(
            f"In the last evaluation the judge abstained on {newest.abstained} of {newest.answers} held-out answers; "
            "the win rate leaves them out."
        )
    if not calibrated:
        out.append(
            "The filter was not calibrated: the labels were never compared with labelled pairs. Agreement of the "
            "judge's voices is consistency, not correctness."
        )
    if not human:
        out.append("No person labelled any pair of this run.")
    elif human[0].decided < FEW_LABELS:
        out.append(
            f"Only {human[0].decided} pairs have both a person's and the judge's word: too few to conclude from."
        )
    if totals.position_bias is not None and abs(totals.position_bias - 0.5) > BIASED:
        bias = percent(totals.position_bias)
        out.append(f"The judge names the slot shown first in {bias} of its votes; 50 % is no bias.")
    if facts.trained < FEW_PAIRS:
        out.append(f"Only {facts.trained} preferences were trained on.")
    base = next((e for e in facts.evaluations if e.updates == 0), None)
    if base and newest and base.mean_words:
        change = newest.mean_words / base.mean_words - 1
        if abs(change) > LENGTH_MOVED:
            out.append(
                f"Held-out answers became {percent(abs(change))} {'longer' if change > 0 else 'shorter'}; unless the "
                "text asks for that, a win may be a matter of length."
            )
    return out


def _calibration(run: RunDir, job: dict[str, Any], damaged: list[str]) -> Calibration | None:
    """The run's calibration, if it has one; `damaged` gets a line when that can't be read."""
    path = run.path / "calibration.json"
    if not path.exists() and not job.get("filters", {}).get("calibration"):
        return None
    try:
        return read_calibration(path)
    except RlaifError as e:
        damaged.append(f"{e}; the filter was calibrated, and what that promised isn't known")
        return None


def _text(run: RunDir, name: str, digest: str, since: int, damaged: list[str]) -> Text:
    """A text as the run has it; `damaged` gets a line when it can't be read."""
    try:
        constitution = constitution_copy(run, digest)
    except FileNotFoundError:  # the index says so
        constitution = None
    except RlaifError as e:
        damaged.append(str(e))
        constitution = None
    source = read_source(run.path / "constitutions" / digest / "source.yaml")
    return Text(name=name, hash=digest, since=since, source=source, constitution=constitution)


def _prompts(run: RunDir, job: dict[str, Any]) -> list[PromptFile]:
    out = []
    for use, key in (("training", "train"), ("held out", "held_out")):
        path = run.path / "prompts" / f"{key}.jsonl"
        there = path.exists()
        count = sum(1 for line in path.open("rb") if line.strip()) if there else 0
        sha256 = file_digest(path) if there else None
        out.append(PromptFile(use=use, source=job["prompts"][key], prompts=count, sha256=sha256))
    return out


def _examples(index: Index, seed: int, status: str) -> list[Example]:
    """Pairs drawn by the run's seed: the same ones whenever the report is made."""
    rows = index.rows(
        """SELECT p.pair_id, p.iteration, i.text_name AS constitution, q.messages, d.winner, d.outcome, d.reasons,
            d.agreement, a.text AS first_text, b.text AS second_text
        FROM decisions d JOIN pairs p ON p.pair_id = d.pair_id AND p.iteration = d.iteration
        LEFT JOIN iterations i ON i.iteration = p.iteration
        LEFT JOIN prompts q ON q.prompt_id = p.prompt_id
        LEFT JOIN completions a ON a.completion_id = p.first
        LEFT JOIN completions b ON b.completion_id = p.second
        WHERE d.status = ? ORDER BY md5(p.pair_id || '-' || ?::VARCHAR), p.pair_id LIMIT ?""",
        [status, str(seed), EXAMPLES],
    )
    return [
        Example(
            pair_id=row["pair_id"],
            iteration=row["iteration"],
            constitution=row["constitution"],
            prompt=_cut(_conversation(row["messages"])),
            winner=row["winner"],
            outcome=row["outcome"],
            reasons=tuple(row["reasons"] or ()),
            agreement=row["agreement"],
            first=_cut(row["first_text"]),
            second=_cut(row["second_text"]),
        )
        for row in rows
    ]


def _conversation(messages: list[dict[str, str]] | None) -> str | None:
    """The turns without the system message, which all prompts of a run share."""
    turns = [m for m in messages or () if m["role"] != "system"]
    return "\n\n".join(m["content"] if len(turns) == 1 else f"{m['role']}: {m['content']}" for m in turns) or None


def _cut(text: str | None) -> str:
    if text is None:
        return "(not in the log)"
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]} … ({len(text) - MOST_CHARS} more characters)"


def _answers(index: Index, run: RunDir) -> Iterator[Answers]:
    for line in held_out_prompts(index).prompts[:SHOWN_PROMPTS]:
        found = answers_to(index, run, line.prompt_id)
        yield found.model_copy(
            update={
                "evaluated": tuple(
                    e.model_copy(
                        update={"answers": tuple(a.model_copy(update={"text": _cut(a.text)}) for a in e.answers)}
                    )
                    for e in found.evaluated
                )
            }
        )


def _head(run: RunDir) -> str | None:
    """The newest head, as `rlaif audit RUN verify --head` takes it; None for a damaged one."""
    heads = read_heads(run.path)
    return heads[-1].name if heads and heads[-1] else None
