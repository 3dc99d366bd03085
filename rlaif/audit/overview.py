"""A run on one screen: iterations, evaluations, totals, what the judges cost. Nothing here prints."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import ValidationError

from rlaif.audit.curves import TextChange
from rlaif.audit.index import Index
from rlaif.audit.tables import VOTE_TABLES
from rlaif.config import Price, Source
from rlaif.errors import RlaifError
from rlaif.judging.spending import cost
from rlaif.judging.verdicts import position_bias
from rlaif.records import AgainstBase, LengthUnknown, Parent, Record, Referred, Retention, Usage, stored
from rlaif.rundir.store import RunDir

R = TypeVar("R", bound=Record)


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
    weights_gap: float | None = None
    """Sampler against learner, nats a token; None where it wasn't measured."""
    decoding_gap: float | None = None
    """Answers as they were decoded against the learner, nats a token; None where it wasn't measured."""
    staleness: int | None = None
    """Iterations between the policy that sampled and the one that began the update; None until it is done."""


class EvaluationRow(Record):
    """A held-out evaluation in one line."""

    updates: int
    """After so many iterations; 0 is the base policy."""
    constitution: str | None
    win_rate: float | None
    """Against the base policy, undecided pairs as half."""
    win_interval: tuple[float, float] | None
    length_controlled_win_rate: float | None
    """As it would be at the base policy's length."""
    length_controlled_interval: tuple[float, float] | None
    length_controlled_unknown: LengthUnknown | None
    """Why it can't be told; None too in runs that began before it was measured."""
    mean_words: float | None
    kl_per_token: float | None
    """From the base policy, nats."""
    kl_interval: tuple[float, float] | None
    kl_per_completion: float | None
    kl_by_older_version: bool
    """`kl_per_token` is the estimate of an older version, off by temperature and top-p, even in its sign."""
    relevance: float | None
    checks: dict[str, float]
    deciding: AgainstBase | None = None
    """What the voices that decide which pairs train say of the same answers; None where they weren't asked."""
    referred: Referred | None = None
    """What a judge that never trains says of the same answers; None without one."""
    retention: Retention | None = None
    """What of the base policy's abilities is left; None where it isn't measured."""


class MixedUpdate(Record):
    """An update that trained on preferences of another text than the one in force."""

    iteration: int
    """From 0."""
    preferences: int
    """That it trained on."""
    of_others: int
    """Of them, those that another text judged (`replay.on_change: keep`)."""
    texts: tuple[str, ...]
    """These texts, as name@version, or by their hash where no iteration was under one."""


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
    source: str | None = None
    """Where pairs are from, in words; None: from the policy."""
    parent: Parent | None = None
    """The run that it went on from, as a branch."""
    iterations_planned: int | None
    iterations: tuple[IterationRow, ...]
    changes: tuple[TextChange, ...]
    mixed: tuple[MixedUpdate, ...] = ()
    """Updates that mixed texts."""
    totals: Totals
    evaluations: tuple[EvaluationRow, ...]
    alarms: tuple[str, ...]
    events_missing: bool = False
    """events.jsonl isn't there, so nobody knows of alarms."""
    cost: tuple[JudgeCost, ...]
    problems: tuple[str, ...]


def mixed_line(m: MixedUpdate) -> str:
    """An update that mixed texts, in words."""
    return (
        f"iteration {m.iteration + 1}: {m.of_others} of the {m.preferences} preferences that it trained on were judged "
        f"under another text than the one in force ({', '.join(m.texts)})"
    )


def overview(index: Index, run: RunDir) -> Overview:
    """The run on one screen."""
    with index.session():
        return _overview(index, run)


def _overview(index: Index, run: RunDir) -> Overview:
    changes: list[TextChange] = []
    for r in index.rows("SELECT * FROM iterations WHERE in_force_name IS NOT NULL ORDER BY iteration"):
        if not changes or changes[-1].hash != r["in_force"]:
            changes.append(TextChange(iteration=r["iteration"], constitution=r["in_force_name"], hash=r["in_force"]))
    header = run.header
    return Overview(
        run=str(run.path),
        source=_source(header.get("job", {}).get("source")),
        parent=_parent(run),
        iterations_planned=header.get("job", {}).get("iterations"),
        iterations=tuple(_iteration_rows(index)),
        changes=tuple(changes),
        mixed=tuple(MixedUpdate(**r) for r in index.rows(_MIXED)),
        totals=_totals(index),
        evaluations=tuple(_evaluation_rows(index)),
        alarms=tuple(
            f"iteration {r['iteration'] + 1}: {r['message']}" if r["iteration"] is not None else r["message"]
            for r in index.rows("SELECT iteration, message FROM events WHERE kind = 'alarm' ORDER BY line")
        ),
        events_missing=not (run.path / "events.jsonl").exists(),
        cost=tuple(_costs(index, _prices(header.get("job", {})))),
        problems=tuple(index.problems),
    )


def _parent(run: RunDir) -> Parent | None:
    try:
        return run.parent
    except RlaifError:  # damaged, as `verify` says
        return None


def _source(section: Any) -> str | None:
    """A job's `source` in words; as it stands where this version can't read it."""
    if section is None:
        return None
    try:
        return str(Source.model_validate(section))
    except ValidationError:
        return str(section)


_MIXED = """
SELECT t.iteration, any_value(n.preferences) AS preferences, count(*) AS of_others,
    list_sort(list_distinct(list(coalesce(c.text_name, t.constitution)))) AS texts
FROM trained t
JOIN iterations i USING (iteration)
JOIN (SELECT iteration, count(*) AS preferences FROM trained GROUP BY iteration) n USING (iteration)
LEFT JOIN (SELECT constitution, any_value(text_name) AS text_name FROM iterations GROUP BY ALL) c
    ON c.constitution = t.constitution
WHERE t.constitution <> i.in_force
GROUP BY t.iteration ORDER BY t.iteration
"""
_DECIDED = """count(*) AS decided, count(*) FILTER (status = 'kept') AS kept,
count(*) FILTER (status = 'review') AS review, count(*) FILTER (status = 'dropped') AS dropped,
avg(agreement) AS agreement, sum(order_flip::INTEGER) AS order_flips, sum(slot_first) AS slot_first,
sum(slot_votes) AS slot_votes"""
# Tokens as the budget and metrics.json count them: a reply from the cache costs nothing.
_VOTED = """count(*) AS votes, count(*) FILTER (outcome = 'abstain') AS abstentions, count(*) FILTER (cached) AS cached,
sum(attempts) AS calls, coalesce(sum(prompt_tokens) FILTER (NOT cached), 0) AS prompt_tokens,
coalesce(sum(completion_tokens) FILTER (NOT cached), 0) AS completion_tokens,
coalesce(sum(cached_tokens) FILTER (NOT cached), 0) AS cached_tokens,
coalesce(sum(reasoning_tokens) FILTER (NOT cached), 0) AS reasoning_tokens"""


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
        "WHERE iteration IS NOT NULL AND status = 'dropped' AND len(reasons) > 0 GROUP BY ALL ORDER BY n DESC, reason"
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
                staleness=metrics.get("staleness", 0) if metrics else None,
                constitution=r["text_name"],
                done=r["metrics"] is not None,
                pairs=pairs.get(k, {}).get("n", 0),
                decided=d.get("decided", 0),
                kept=d.get("kept", 0),
                reasons=reasons.get(k, {}),
                review=d.get("review", 0),
                agreement=d.get("agreement"),
                position_bias=position_bias(d.get("slot_first"), d.get("slot_votes")),
                order_flips=d.get("order_flips") or 0,
                votes=v.get("votes", 0),
                abstentions=v.get("abstentions", 0),
                cached=v.get("cached", 0),
                calls=int(v.get("calls") or 0),
                tokens=int((v.get("prompt_tokens") or 0) + (v.get("completion_tokens") or 0)),
                loss=steps.get(k, {}).get("loss"),
                # Of a source's answers the policy sampled none.
                mean_words=None if metrics.get("given") else (metrics.get("sampled") or {}).get("mean_words"),
                trained_pairs=trained.get(k, {}).get("n", 0),
                skipped=r["skipped"],
                weights_gap=(metrics.get("weights_gap") or {}).get("mean"),
                decoding_gap=(metrics.get("decoding_gap") or {}).get("mean"),
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
                length_controlled_win_rate=m.get("length_controlled_win_rate"),
                length_controlled_interval=m.get("length_controlled_interval"),
                length_controlled_unknown=m.get("length_controlled_unknown"),
                mean_words=m.get("mean_words"),
                kl_per_token=m.get("kl_per_token"),
                kl_interval=m.get("kl_interval"),
                kl_per_completion=m.get("kl_per_completion"),
                kl_by_older_version=m.get("kl_answers") is None and m.get("kl_per_token") is not None,
                relevance=m.get("relevance"),
                checks=m.get("checks") or {},
                deciding=_section(m, "deciding", AgainstBase),
                referred=_section(m, "referred", Referred),
                retention=_section(m, "retention", Retention),
            )
        )
    return out


def _section(metrics: dict[str, Any], name: str, record: type[R]) -> R | None:
    try:
        return stored(record, metrics[name]) if metrics.get(name) else None
    except ValidationError:  # damaged, as `verify` says
        return None


def _totals(index: Index) -> Totals:
    (d,) = index.rows(f"SELECT {_DECIDED} FROM decisions WHERE iteration IS NOT NULL")
    (p,) = index.rows(
        "SELECT count(*) AS n, count(*) FILTER (source = 'replay') AS replayed, "
        "count(*) FILTER (source = 'human') AS human FROM trained"
    )

    def count(table: str) -> int:
        return int(index.rows(f"SELECT count(*) AS n FROM {table} WHERE iteration IS NOT NULL")[0]["n"])

    reasons = index.rows(
        "SELECT reasons[1] AS reason, count(*) AS n FROM decisions WHERE iteration IS NOT NULL AND status = 'dropped' "
        "AND len(reasons) > 0 GROUP BY ALL ORDER BY n DESC, reason"
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
        position_bias=position_bias(d["slot_first"], d["slot_votes"]),
        order_flips=d["order_flips"] or 0,
        abstentions={r["reason"]: r["n"] for r in abstentions},
        preferences=p["n"],
        replayed=p["replayed"],
        human=p["human"],
        steps=count("updates"),
    )


def _prices(job: dict[str, Any]) -> dict[str, Any]:
    """By model, those of the judge and of the reference judge."""
    judges = ((job.get("eval") or {}).get("reference_judge") or {}, job.get("judge") or {})
    return {model: price for judge in judges for model, price in (judge.get("prices") or {}).items()}


def price_of(judge: str, prices: dict[str, Any]) -> dict[str, Any] | None:
    """That of a ballot's judge, `chat:MODEL@HOST` or `chat:MODEL`; two alike are numbered (`#2`)."""
    name = judge.removeprefix("chat:")
    known = (name, name.rpartition("#")[0], name.rpartition("@")[0])
    return next((prices[model] for model in known if model in prices), None)


def _costs(index: Index, prices: dict[str, Any]) -> list[JudgeCost]:
    """What each judge cost, evaluations, earlier texts, anchors and old pairs that it judged again included."""
    out = []
    votes = " UNION ALL BY NAME ".join(f"SELECT * FROM {table}" for table in VOTE_TABLES)
    for r in index.rows(f"SELECT judge, {_VOTED} FROM ({votes}) GROUP BY judge ORDER BY judge"):
        price = price_of(str(r["judge"]), prices)
        money = None
        if price:
            money = cost(Usage(**{n: int(r[n]) for n in Usage.model_fields if n != "estimated"}), Price(**price))
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
