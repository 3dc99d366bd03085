"""The index's tables: which file each comes from, and how a JSON row becomes columns. Pure.

Column types follow from the records, so that a key that older rows lack is NULL and every row has the same columns.
Token ids stay in the files: a row has the line that it came from.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel

from rlaif.evaluation.probes import Probe
from rlaif.records import (
    BaseLogprob,
    Completion,
    Decision,
    Event,
    HumanLabel,
    OldPair,
    Pair,
    PolicyDistance,
    Preference,
    ProbeResult,
    Prompt,
    Quality,
    Record,
    Score,
    UpdateStep,
    Vote,
)
from rlaif.rundir.stages import EVALUATION, ITERATION


class Column(NamedTuple):
    """A column: its name, its type, how it follows from the row's JSON, and what it says."""

    name: str
    type: str
    source: str
    """An SQL expression over the record's fields."""
    about: str = ""


LINE = Column("line", "INTEGER", "", "line of the file, from 1")
WHERE = (
    Column("iteration", "INTEGER", "", "folder iterations/NNNN, from 0; NULL in an evaluation"),
    Column("evaluation", "INTEGER", "", "folder evaluations/NNNN; NULL in an iteration"),
    LINE,
)


class Older(NamedTuple):
    """How rows of an older schema become rows of today's, as their record lifts them."""

    fields: dict[str, str]
    """Field that only they have → its DuckDB type."""
    lifted: dict[str, str]
    """Field of today's → SQL over the fields of both."""


class Table(NamedTuple):
    """A table of the index."""

    name: str
    about: str
    columns: tuple[Column, ...]
    record: type[Record] | None = None
    """The record of the JSONL rows that it is read from; None for tables that are made from small JSON files."""
    key: str = ""
    """A field that every sound row has: where it is NULL the line was damaged."""
    as_json: tuple[str, ...] = ()
    """Fields that are kept as JSON text while they are read."""
    where: tuple[Column, ...] = WHERE
    """Columns that say where a row stands."""
    select: str = ""
    """For a view: what it shows of the other tables."""
    older: Older | None = None
    """Where rows of an older schema have other fields."""

    @property
    def types(self) -> dict[str, str]:
        """Name → DuckDB type of every column."""
        return {c.name: c.type for c in self.columns}

    def required(self) -> list[str]:
        """Fields among `json_columns` that every sound row has."""
        assert self.record is not None
        fields = self.record.model_fields
        own = (n for n in self.json_columns() if n in fields)
        return [n for n in own if fields[n].is_required() and not _optional(fields[n].annotation)]

    def rows_of(self, read: str) -> str:
        """SQL for rows in today's fields, whatever schema they were written with; `read` is what reads their file."""
        lifted = self.older.lifted if self.older else {}
        if not lifted:
            return read
        return f"(SELECT * REPLACE ({', '.join(f'{sql} AS {name}' for name, sql in lifted.items())}) FROM {read})"

    def json_columns(self) -> dict[str, str]:
        """Field → DuckDB type of what has to be read of a row: the fields that some column is made from, and those that
        older rows have in their place."""
        assert self.record is not None
        sources = " ".join(c.source for c in self.columns)
        own = {
            name: "JSON" if name in self.as_json else duckdb_type(field.annotation)
            for name, field in self.record.model_fields.items()
            if f"r.{name}" in sources
        }
        return own | (self.older.fields if self.older else {})


def _optional(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def duckdb_type(annotation: Any) -> str:
    """The DuckDB type that holds a record's field."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return duckdb_type(next(a for a in arguments if a is not type(None)))
    if origin is Annotated:
        return duckdb_type(arguments[0])
    if origin is Literal:
        return "VARCHAR"
    if origin is tuple:
        return f"{duckdb_type(arguments[0])}[]"
    if origin is dict:
        return "JSON" if arguments[1] is Any else f"MAP({duckdb_type(arguments[0])}, {duckdb_type(arguments[1])})"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = (f'"{name}" {duckdb_type(f.annotation)}' for name, f in annotation.model_fields.items())
        return f"STRUCT({', '.join(fields)})"
    return {str: "VARCHAR", int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN"}[annotation]


STAGE_TABLES: dict[str, Table] = {
    "completions": Table(
        "completions",
        "sampled answers",
        (
            Column("completion_id", "VARCHAR", "r.id"),
            Column("prompt_id", "VARCHAR", "r.prompt_id"),
            Column("sample", "INTEGER", "r.index", "number of the answer among those to its prompt, from 0"),
            Column("policy_iteration", "INTEGER", "r.policy.iteration", "updates behind the policy that sampled"),
            Column("policy_digest", "VARCHAR", "r.policy.digest"),
            Column("text", "VARCHAR", "r.text"),
            Column("finish_reason", "VARCHAR", "r.finish_reason", "stop, or length: cut off"),
            Column("tokens", "INTEGER", "json_array_length(r.token_ids)"),
            Column("chars", "INTEGER", "length(r.text)"),
            Column("logprob", "DOUBLE", "r.logprob", "nats, summed over the tokens"),
        ),
        Completion,
        "id",
        ("token_ids",),
    ),
    "scores": Table(
        "scores",
        "scores by which best_worst chose pairs",
        (
            Column("completion_id", "VARCHAR", "r.completion_id"),
            Column("voice", "VARCHAR", "r.voice"),
            Column("value", "DOUBLE", "r.value", "nats; more is better"),
        ),
        Score,
        "completion_id",
    ),
    "pairs": Table(
        "pairs",
        "what was compared",
        (
            Column("pair_id", "VARCHAR", "r.id"),
            Column("prompt_id", "VARCHAR", "r.prompt_id"),
            Column("first", "VARCHAR", "r.first", "completion_id"),
            Column("second", "VARCHAR", "r.second", "completion_id"),
            Column("method", "VARCHAR", "r.method"),
        ),
        Pair,
        "id",
    ),
    "votes": Table(
        "votes",
        "one row a vote",
        (
            Column("ballot_id", "VARCHAR", "r.ballot.id"),
            Column("pair_id", "VARCHAR", "r.ballot.pair_id"),
            Column("judge", "VARCHAR", "r.ballot.judge"),
            Column("voice", "VARCHAR", "r.ballot.voice"),
            Column("principles", "VARCHAR[]", "r.ballot.principles"),
            Column("guard", "BOOLEAN", "r.ballot.guard", "vetoes, doesn't elect"),
            Column("shown", "VARCHAR", "r.ballot.order", "forward, reversed; none: no slots"),
            Column("sample_index", "INTEGER", "r.ballot.sample_index"),
            Column("constitution", "VARCHAR", "r.ballot.constitution", "hash"),
            Column("template", "VARCHAR", "r.ballot.template", "hash"),
            Column("model", "VARCHAR", "r.model"),
            Column("outcome", "VARCHAR", "r.outcome", "first, second, tie, abstain"),
            Column("abstain_reason", "VARCHAR", "r.abstain_reason"),
            Column("p_first", "DOUBLE", "r.p_first"),
            Column("raw_reply", "VARCHAR", "r.raw_reply", "what the judge said"),
            Column("error", "VARCHAR", "r.error"),
            Column("attempts", "INTEGER", "coalesce(r.attempts, 1)", "requests; 0 from the cache"),
            Column("prompt_tokens", "BIGINT", "coalesce(r.usage.prompt_tokens, 0)"),
            Column("completion_tokens", "BIGINT", "coalesce(r.usage.completion_tokens, 0)", "thoughts included"),
            Column("cached_tokens", "BIGINT", "coalesce(r.usage.cached_tokens, 0)", "of the prompt's, at the server"),
            Column("reasoning_tokens", "BIGINT", "coalesce(r.usage.reasoning_tokens, 0)", "of the completion's"),
            Column("reasked", "INTEGER", "coalesce(r.reasked, 0)", "asked again: a reply was empty or unreadable"),
            Column("fingerprint", "VARCHAR", "r.fingerprint", "what the server says of its model"),
            Column("server", "VARCHAR", "r.server", "which server answered; NULL from the cache, and in older runs"),
            Column("latency_s", "DOUBLE", "r.latency_s"),
            Column("cached", "BOOLEAN", "coalesce(r.cached, false)"),
        ),
        Vote,
        "ballot.id",
    ),
    "decisions": Table(
        "decisions",
        "one row a pair: the verdict, kept or not, why",
        (
            Column("pair_id", "VARCHAR", "r.pair_id"),
            Column("status", "VARCHAR", "r.status", "kept, dropped, review"),
            Column("reasons", "VARCHAR[]", "r.reasons", "every rule that spoke against it"),
            Column("review_rule", "VARCHAR", "r.review_rule", "the setting that sent it to review; NULL for none"),
            Column("winner", "VARCHAR", "r.winner", "first, second; NULL unless kept"),
            Column("outcome", "VARCHAR", "r.verdict.outcome", "the verdict's, kept or not"),
            Column("p_first", "DOUBLE", "r.verdict.p_first"),
            Column("agreement", "DOUBLE", "r.verdict.agreement"),
            Column("valid_votes", "INTEGER", "r.verdict.valid_votes"),
            Column("abstentions", "INTEGER", "coalesce(list_sum(map_values(r.verdict.abstentions)), 0)"),
            Column("order_flip", "BOOLEAN", "coalesce(r.verdict.order_flip, false)"),
            Column("slot_first", "INTEGER", "coalesce(r.verdict.slot_first, 0)", "votes for the slot shown first"),
            Column("slot_votes", "INTEGER", "coalesce(r.verdict.slot_votes, 0)", "votes for a slot"),
            Column("source", "VARCHAR", "coalesce(r.source, 'votes')", "votes, or data: a data set's label"),
            Column("guard_first", "INTEGER", "r.verdict.guard_first"),
            Column("guard_second", "INTEGER", "r.verdict.guard_second"),
        ),
        Decision,
        "pair_id",
    ),
    "old_pairs": Table(
        "old_pairs",
        "what a text made of pairs that were judged under an earlier one",
        (
            Column("pair_id", "VARCHAR", "r.pair_id"),
            Column("sampled_in", "INTEGER", "r.iteration", "the iteration that sampled the pair"),
            Column("source", "VARCHAR", "r.source", "judge, human"),
            Column("before", "VARCHAR", "r.before", "hash of the text that it was judged under"),
            Column("constitution", "VARCHAR", "r.constitution", "hash of the text that this is about"),
            Column("standing", "VARCHAR", "r.standing", "kept, turned, stale: it may train; dropped, expired, waiting"),
            Column("on_change", "VARCHAR", "r.on_change", "replay.on_change then"),
            Column("carried", "INTEGER", "coalesce(r.carried, 0)", "votes that answer what the text asks"),
            Column("lost", "INTEGER", "coalesce(r.lost, 0)", "votes that don't"),
            Column("asked", "INTEGER", "coalesce(r.asked, 0)", "ballots that were cast for it"),
            Column("winner", "VARCHAR", "r.decision.winner", "first, second; NULL unless it was decided and kept"),
        ),
        OldPair,
        "pair_id",
    ),
    "policy_distances": Table(
        "policy_distances",
        "how far the policy has moved on old pairs",
        (
            Column("pair_id", "VARCHAR", "r.pair_id"),
            Column("tokens", "INTEGER", "r.tokens", "of both completions"),
            Column("distance", "DOUBLE", "r.distance", "|log p now - log p then|, nats a token"),
        ),
        PolicyDistance,
        "pair_id",
    ),
    "preferences": Table(
        "preferences",
        "what each iteration mixed for its update, made or skipped (`trained`: only what training saw)",
        (
            Column("pair_id", "VARCHAR", "r.pair_id"),
            Column("judged_in", "INTEGER", "r.iteration", "the iteration that sampled and judged the pair"),
            Column("source", "VARCHAR", "r.source", "judge, replay, human, data"),
            Column("constitution", "VARCHAR", "r.constitution", "hash; empty for a data set's label"),
            Column("prompt_id", "VARCHAR", "r.prompt_id"),
            Column("chosen_id", "VARCHAR", "r.chosen_id", "completion_id"),
            Column("rejected_id", "VARCHAR", "r.rejected_id", "completion_id"),
            Column("p_chosen", "DOUBLE", "r.p_chosen"),
            Column("agreement", "DOUBLE", "r.agreement"),
        ),
        Preference,
        "pair_id",
    ),
    "base_logprobs": Table(
        "base_logprobs",
        "how likely completions that trained are under the untrained policy, as the judge had found",
        (
            Column("completion_id", "VARCHAR", "r.completion_id"),
            Column("tokens", "INTEGER", "r.tokens"),
            Column("logprob", "DOUBLE", "r.logprob", "of all tokens, nats"),
        ),
        BaseLogprob,
        "completion_id",
    ),
    "updates": Table(
        "updates",
        "one row an optimizer step",
        (
            Column("step", "INTEGER", "r.step", "global, from 1"),
            Column("row_ids", "VARCHAR[]", "r.row_ids", "what it trained on; of a preference: pair_id"),
            Column("pair_ids", "VARCHAR[]", "r.row_ids", "the same, by its name in schema 1"),
            Column("loss", "DOUBLE", "r.loss"),
            Column("margin", "DOUBLE", "r.metrics['margin']", "of a learner from pairs"),
            Column("accuracy", "DOUBLE", "r.metrics['accuracy']", "of a learner from pairs"),
            Column("grad_norm", "DOUBLE", "r.grad_norm"),
            Column("learning_rate", "DOUBLE", "r.learning_rate"),
            Column("seconds", "DOUBLE", "r.seconds"),
            Column("metrics", "MAP(VARCHAR, DOUBLE)", "r.metrics", "what only this kind of learner measures"),
        ),
        UpdateStep,
        "step",
        older=Older(
            {"pair_ids": "VARCHAR[]", "margin": "DOUBLE", "accuracy": "DOUBLE"},
            {
                "row_ids": "coalesce(row_ids, pair_ids)",
                "metrics": "coalesce(metrics, CASE WHEN margin IS NOT NULL AND accuracy IS NOT NULL "
                "THEN MAP {'margin': margin, 'accuracy': accuracy} END)",
            },
        ),
    ),
    "quality": Table(
        "quality",
        "how sane held-out answers are",
        (
            Column("completion_id", "VARCHAR", "r.completion_id"),
            Column("tokens", "INTEGER", "r.tokens"),
            Column("logprob_per_token", "DOUBLE", "r.logprob_per_token", "nats"),
            Column("relevance", "DOUBLE", "r.relevance", "nats a token"),
        ),
        Quality,
        "completion_id",
    ),
    "probe_results": Table(
        "probe_results",
        "probes, passed or not, by the policy of an evaluation",
        (
            Column("probe_id", "VARCHAR", "r.probe_id"),
            Column("kind", "VARCHAR", "r.kind", "what it tests"),
            Column("completion_id", "VARCHAR", "r.completion_id", "the answer, in probe_completions.jsonl"),
            Column("passed", "BOOLEAN", "r.passed"),
        ),
        ProbeResult,
        "probe_id",
    ),
    "probes": Table(
        "probes",
        "what was asked at every evaluation to see what is forgotten (eval.retention)",
        (
            Column("probe_id", "VARCHAR", "r.id"),
            Column("kind", "VARCHAR", "r.kind", "what it tests"),
            Column("prompt", "VARCHAR", "r.prompt"),
            Column("answer", "VARCHAR[]", "r.answer", "right ones; empty where a check or a refusal is wanted"),
        ),
        Probe,
        "id",
        where=(LINE,),
    ),
    "prompts": Table(
        "prompts",
        "the run's prompts",
        (
            Column("prompt_id", "VARCHAR", "r.id"),
            Column("category", "VARCHAR", "r.category"),
            Column("text", "VARCHAR", "r.messages[-1].content", "the last user message"),
            Column("messages", "STRUCT(role VARCHAR, content VARCHAR)[]", "r.messages"),
        ),
        Prompt,
        "id",
        where=(Column("held_out", "BOOLEAN", "", "never trained on"), LINE),
    ),
    "events": Table(
        "events",
        "what happened, in order",
        (
            Column("time", "VARCHAR", "r.time", "UTC, ISO 8601"),
            Column("kind", "VARCHAR", "r.kind"),
            Column("iteration", "INTEGER", "r.iteration", "from 0"),
            Column("message", "VARCHAR", "r.message"),
            Column("data", "JSON", "r.data"),
        ),
        Event,
        "kind",
        where=(LINE,),
    ),
    "labels": Table(
        "labels",
        "human labels, in the order in which they were given; the newest of a pair counts",
        (
            Column("pair_id", "VARCHAR", "r.pair_id"),
            Column("iteration", "INTEGER", "r.iteration", "of the pair, from 0"),
            Column("outcome", "VARCHAR", "r.outcome", "first, second, tie, skip"),
            Column("author", "VARCHAR", "r.author"),
            Column("time", "VARCHAR", "r.time", "UTC, ISO 8601"),
            Column("reason", "VARCHAR", "r.reason"),
            Column("constitution", "VARCHAR", "r.constitution", "hash of the text it is about; NULL: the pair's own"),
        ),
        HumanLabel,
        "outcome",
        where=(LINE,),
    ),
}  # fmt: skip
STAGE_TABLES["rejudged_votes"] = STAGE_TABLES["votes"]._replace(
    name="rejudged_votes", about="one row a vote on an old pair that a new text had judged again"
)
STAGE_TABLES["earlier_votes"] = STAGE_TABLES["votes"]._replace(
    name="earlier_votes", about="one row a vote on held-out answers under a text that was in force before"
)
STAGE_TABLES["change_votes"] = STAGE_TABLES["votes"]._replace(
    name="change_votes", about="one row a vote on held-out answers at a change of text, under the new one"
)
STAGE_TABLES["anchor_votes"] = STAGE_TABLES["votes"]._replace(
    name="anchor_votes", about="one row a vote on an earlier pair that was asked about again (monitors.anchors)"
)
STAGE_TABLES["deciding_votes"] = STAGE_TABLES["votes"]._replace(
    name="deciding_votes", about="one row a vote on held-out answers by a voice that decides (eval.deciding_voices)"
)
STAGE_TABLES["reference_votes"] = STAGE_TABLES["votes"]._replace(
    name="reference_votes", about="one row a vote of the reference judge on held-out answers (eval.reference_judge)"
)
VOTE_TABLES = tuple(name for name, table in STAGE_TABLES.items() if table.record is Vote)
"""All that judges were asked, and cost."""
ITERATION_STAGES = tuple(stage.name for stage in ITERATION if stage.name in STAGE_TABLES)
EVALUATION_STAGES = tuple(stage.name for stage in EVALUATION if stage.name in STAGE_TABLES)
"""Stages of an iteration and of an evaluation that have a table."""

SMALL_TABLES: dict[str, Table] = {
    "iterations": Table(
        "iterations",
        "one row an iteration: plan.json and metrics.json",
        (
            Column("iteration", "INTEGER", "", "from 0"),
            Column("constitution", "VARCHAR", "", "hash of the text that its pairs were judged under"),
            Column("text_name", "VARCHAR", "", "name@version"),
            Column("in_force", "VARCHAR", "", "hash of the text in force: another one where a source's labels are old"),
            Column("in_force_name", "VARCHAR", "", "name@version"),
            Column("policy_iteration", "INTEGER", "", "updates behind the policy that sampled"),
            Column("policy_digest", "VARCHAR", "", "of the policy that sampled"),
            Column("policy_after", "VARCHAR", "", "digest of the policy after it; NULL without an update"),
            Column("skipped", "BOOLEAN", "", "no update: too few kept pairs; NULL until it is known"),
            Column("metrics", "JSON", "", "metrics.json, as schema 2 has it; NULL until the iteration is done"),
        ),
        where=(),
    ),
    "evaluations": Table(
        "evaluations",
        "one row an evaluation",
        (
            Column("evaluation", "INTEGER", "", "after so many iterations; 0 is the base policy"),
            Column("constitution", "VARCHAR", "", "hash of the text that it was judged under"),
            Column("text_name", "VARCHAR", "", "name@version"),
            Column("metrics", "JSON", "", "metrics.json; NULL until it is done"),
        ),
        where=(),
    ),
    "constitutions": Table(
        "constitutions",
        "every text that was in force",
        (
            Column("constitution", "VARCHAR", "", "hash"),
            Column("text_name", "VARCHAR", "", "name@version"),
            Column("content", "JSON", "", "constitution.json"),
        ),
        where=(),
    ),
}  # fmt: skip


PANELS = Table(
    "panels",
    "one row a pair with votes: who was asked; made from votes",
    (
        Column("pair_id", "VARCHAR", ""),
        Column("judges", "VARCHAR[]", ""),
        Column("principles", "VARCHAR[]", ""),
        Column("disagreeing", "BOOLEAN", "", "voices or judges, each sure of itself, name different sides"),
    ),
    where=WHERE[:2],
)

# A voice names a side when all its votes do, in whatever order they were asked: a flip is no disagreement.
FILL_PANELS = """
INSERT INTO panels
WITH voices AS (
    SELECT iteration, evaluation, pair_id, judge, principles, any_value(guard) AS guard, min(outcome) AS side,
        min(outcome) = max(outcome) AND min(outcome) IN ('first', 'second') AS sure
    FROM votes WHERE iteration IS NOT DISTINCT FROM ? AND evaluation IS NOT DISTINCT FROM ?
    GROUP BY iteration, evaluation, pair_id, judge, principles, voice, sample_index
)
SELECT iteration, evaluation, pair_id, list_sort(list_distinct(list(judge))),
    list_sort(list_distinct(flatten(list(principles)))),
    coalesce(min(side) FILTER (sure AND NOT guard) <> max(side) FILTER (sure AND NOT guard), false)
FROM voices GROUP BY iteration, evaluation, pair_id
"""

TRAINED = Table(
    "trained",
    "exactly what training saw: preferences of iterations whose update was made; `iteration` is the one that trained",
    (*STAGE_TABLES["preferences"].columns, Column("policy_after", "VARCHAR", "", "digest of the policy after it")),
    select="SELECT f.*, i.policy_after FROM preferences f JOIN iterations i USING (iteration) "
    "WHERE i.policy_after IS NOT NULL",
)

TABLES = (*SMALL_TABLES.values(), *STAGE_TABLES.values(), PANELS, TRAINED)


def all_columns(table: Table) -> tuple[Column, ...]:
    """A table's columns, those that say where a row stands included."""
    return (*table.where, *table.columns)


def create_statements() -> list[str]:
    """SQL that makes the tables and views."""
    statements = []
    for table in TABLES:
        if table.select:
            statements.append(f"CREATE VIEW {table.name} AS {table.select}")
            continue
        columns = ", ".join(f'"{c.name}" {c.type}' for c in all_columns(table))
        statements.append(f"CREATE TABLE {table.name} ({columns})")
    return statements


def describe() -> str:
    """The tables and their columns, for people."""
    lines = []
    for table in TABLES:
        lines.append(f"{table.name}: {table.about}")
        for c in all_columns(table):
            about = f"  {c.about}" if c.about else ""
            lines.append(f"    {c.name} {c.type}{about}")
        lines.append("")
    return "\n".join(lines).rstrip()
