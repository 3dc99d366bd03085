"""What went into a checkpoint: every preference, back to its votes and to the text that it was judged under."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlaif.audit.index import Index
from rlaif.errors import RlaifError, UserError
from rlaif.records import Record, RowSource
from rlaif.rundir.store import RunDir


class TracedText(Record):
    """A constitution that preferences were judged under."""

    name: str | None
    """name@version"""
    hash: str
    preferences: int
    file: str
    """The run's copy, as its author wrote it; empty for pairs with a data set's label, which follows from no text."""


class TracedIteration(Record):
    """What one iteration added, under one text."""

    iteration: int
    """From 0."""
    constitution: str | None
    """name@version of the text that the pairs were judged under."""
    preferences: int
    judged: int
    replayed: int
    human: int
    data: int = 0
    """With a data set's label."""
    votes: int
    """Votes on these pairs, those that were cast when a later text had them judged again included."""
    agreement: float | None
    steps: int
    policy_after: str | None


class TracedVotes(Record):
    """Votes on an old pair that a later text had judged again."""

    iteration: int
    """The one that asked for them, from 0."""
    votes_file: str
    vote_lines: tuple[int, ...]


class TracedPreference(Record):
    """One preference that was trained on."""

    iteration: int
    """The one that trained on it, from 0."""
    judged_in: int
    """The one that sampled and judged the pair, from 0."""
    pair_id: str
    source: RowSource
    constitution: str | None
    constitution_hash: str
    prompt: str
    chosen_id: str
    rejected_id: str
    p_chosen: float | None
    agreement: float | None
    steps: tuple[int, ...]
    """Global optimizer steps, from 1."""
    votes_file: str
    """Of `judged_in`, as the next."""
    vote_lines: tuple[int, ...]
    rejudged: tuple[TracedVotes, ...] = ()
    """Of a replayed pair whose label is that of a later text: what was asked anew up to the verdict under that text. Of
    these and the votes before them, those count that answer what that text asks (change.md)."""


class Trace(Record):
    """A checkpoint's lineage."""

    after: int
    """The checkpoint is the policy after so many iterations."""
    digest: str
    base_digest: str | None
    """Of the policy before any update."""
    preferences: int
    pairs: int
    """Different pairs: a replayed one counts once."""
    steps: int
    skipped: tuple[int, ...]
    """Iterations without an update, from 0."""
    unknown: tuple[str, ...] = ()
    """Why it isn't known of some iterations before it whether they trained; their preferences aren't counted."""
    texts: tuple[TracedText, ...]
    iterations: tuple[TracedIteration, ...]
    rows: tuple[TracedPreference, ...]


def find_checkpoint(index: Index, run: RunDir, checkpoint: str) -> tuple[int, str]:
    """The policy after how many iterations, and its digest.

    `checkpoint` is that number, a digest (its beginning), or the path of a policy's or a learner's folder.

    Raises:
        UserError: this run has no such policy, or the digest begins several.
        RlaifError: the file that would say which policy it is, is gone or damaged.
    """
    unknown = index.unknown_updates()
    made = {
        r["iteration"] + 1: str(r["policy_after"])
        for r in index.rows(
            "SELECT iteration, policy_after FROM iterations WHERE policy_after IS NOT NULL ORDER BY ALL"
        )
    }
    known = ", ".join(f"{n} ({d})" for n, d in list(made.items())[-5:]) or ("none" if unknown else "none yet")
    hint = f"the newest policies, after so many iterations (digest): {known}"
    hint += "".join(f"; after {k + 1} not known: {why}" for k, why in unknown.items())
    path = Path(checkpoint)
    if path.is_dir() and not checkpoint.isdigit():
        folders = {run.iteration(n - 1).path.resolve() / "policy": n for n in made}
        folders |= {(run.path / "learner" / f"{n - 1:04d}").resolve(): n for n in made}
        folders |= {run.iteration(n - 1).path.resolve(): n for n in made}
        for k, why in unknown.items():
            if path.resolve() in (run.iteration(k).path.resolve(), run.iteration(k).path.resolve() / "policy"):
                raise RlaifError(f"{checkpoint}: which policy that is isn't known: {why}")
        if path.resolve() not in folders:
            raise UserError(f"{checkpoint}: not a policy of {run.path}; {hint}")
        after = folders[path.resolve()]
        return after, made[after]
    if checkpoint.isdigit() and int(checkpoint) <= len(run.iterations()):
        # After an iteration without an update, the policy is still the one before.
        after = max((n for n in made if n <= int(checkpoint)), default=0)
        if lost := [why for k, why in unknown.items() if after <= k < int(checkpoint)]:
            raise RlaifError(f"{checkpoint}: which policy that is isn't known: {lost[-1]}")
        if not after:
            raise UserError(f"{checkpoint}: that is the base policy of {run.path}, nothing was trained; {hint}")
        return after, made[after]
    found = [n for n, d in made.items() if d.startswith(checkpoint)]
    if len(found) == 1:
        return found[0], made[found[0]]
    if found:
        raise UserError(f"`{checkpoint}` begins the digests of several policies; {hint}")
    raise UserError(f"no checkpoint `{checkpoint}` in {run.path}; {hint}")


def trace(index: Index, run: RunDir, checkpoint: str, limit: int | None = None, offset: int = 0) -> Trace:
    """The lineage of a checkpoint. `rows` holds every preference, or `limit` of them in the order of training.

    Raises:
        UserError: no such checkpoint.
    """
    with index.session():
        return _trace(index, run, checkpoint, limit, offset)


def _trace(index: Index, run: RunDir, checkpoint: str, limit: int | None, offset: int) -> Trace:
    after, digest = find_checkpoint(index, run, checkpoint)
    (counted,) = index.rows(
        "SELECT count(*) AS n, count(DISTINCT pair_id) AS pairs FROM trained WHERE iteration < ?", [after]
    )
    steps = {
        r["iteration"]: r["n"]
        for r in index.rows("SELECT iteration, count(*) AS n FROM updates WHERE iteration < ? GROUP BY ALL", [after])
    }
    base = index.rows("SELECT policy_digest FROM iterations WHERE policy_iteration = 0 LIMIT 1")
    skipped = index.rows("SELECT iteration FROM iterations WHERE skipped AND iteration < ? ORDER BY ALL", [after])
    return Trace(
        after=after,
        digest=digest,
        base_digest=base[0]["policy_digest"] if base else None,
        preferences=counted["n"],
        pairs=counted["pairs"],
        steps=sum(steps.values()),
        skipped=tuple(r["iteration"] for r in skipped),
        unknown=tuple(why for k, why in index.unknown_updates().items() if k < after),
        texts=tuple(_texts(index, run, after)),
        iterations=tuple(_iterations(index, after, steps)),
        rows=tuple(_rows(index, after, limit, offset)),
    )


def _texts(index: Index, run: RunDir, after: int) -> list[TracedText]:
    found = index.rows(
        """SELECT t.hash, c.text_name, t.n FROM (
            SELECT constitution AS hash, count(*) AS n, min(iteration) AS since FROM trained
            WHERE iteration < ? GROUP BY ALL
        ) t LEFT JOIN constitutions c ON c.constitution = t.hash ORDER BY t.since""",
        [after],
    )
    folder = run.path / "constitutions"
    return [
        TracedText(
            name=r["text_name"],
            hash=r["hash"],
            preferences=r["n"],
            file=str(folder / r["hash"] / "source.yaml") if r["hash"] else "",
        )
        for r in found
    ]


# A replayed pair that a later text decided: what was asked anew about it, up to that decision.
_REJUDGED = """
decided AS (
    SELECT t.iteration, t.pair_id, max(o.iteration) AS decided_in
    FROM trained t JOIN old_pairs o ON o.pair_id = t.pair_id AND o.constitution = t.constitution
        AND o.iteration <= t.iteration AND o.source = 'judge' AND o.standing IN ('kept', 'turned')
    WHERE t.source = 'replay' GROUP BY ALL),
rejudged AS (
    SELECT d.iteration, d.pair_id, r.iteration AS asked_in, list(r.line ORDER BY r.line) AS lines
    FROM decided d JOIN rejudged_votes r ON r.pair_id = d.pair_id AND r.iteration <= d.decided_in GROUP BY ALL)
"""


def _iterations(index: Index, after: int, steps: dict[int, int]) -> list[TracedIteration]:
    found = index.rows(
        f"""WITH cast_votes AS (SELECT pair_id, count(*) AS n FROM votes WHERE iteration IS NOT NULL GROUP BY ALL),
            {_REJUDGED},
            anew AS (SELECT iteration, pair_id, sum(len(lines)) AS n FROM rejudged GROUP BY ALL)
        SELECT t.iteration, c.text_name, any_value(t.policy_after) AS policy_after, count(*) AS preferences,
            count(*) FILTER (source = 'judge') AS judged, count(*) FILTER (source = 'replay') AS replayed,
            count(*) FILTER (source = 'human') AS human, count(*) FILTER (source = 'data') AS data,
            sum(coalesce(v.n, 0) + coalesce(a.n, 0)) AS votes, avg(t.agreement) AS agreement
        FROM trained t LEFT JOIN cast_votes v USING (pair_id) LEFT JOIN anew a USING (iteration, pair_id)
        LEFT JOIN constitutions c USING (constitution)
        WHERE t.iteration < ? GROUP BY t.iteration, t.constitution, c.text_name ORDER BY t.iteration, c.text_name""",
        [after],
    )
    return [
        TracedIteration(
            iteration=r["iteration"],
            constitution=r["text_name"],
            preferences=r["preferences"],
            judged=r["judged"],
            replayed=r["replayed"],
            human=r["human"],
            data=r["data"],
            votes=int(r["votes"] or 0),
            agreement=r["agreement"],
            steps=steps.get(r["iteration"], 0),
            policy_after=r["policy_after"],
        )
        for r in found
    ]


def _rows(index: Index, after: int, limit: int | None, offset: int) -> list[TracedPreference]:
    if limit == 0:
        return []
    found = index.rows(
        """WITH asked AS (SELECT * FROM trained WHERE iteration < ? ORDER BY iteration, line LIMIT ? OFFSET ?),
            steps AS (
                SELECT iteration, pair_id, list(step ORDER BY step) AS steps
                FROM (SELECT iteration, step, unnest(row_ids) AS pair_id FROM updates) GROUP BY ALL),
            cast_votes AS (
                SELECT pair_id, list(line ORDER BY line) AS lines FROM votes
                WHERE pair_id IN (SELECT pair_id FROM asked) GROUP BY ALL)
        SELECT t.*, c.text_name, coalesce(p.text, t.prompt_id) AS prompt, s.steps, v.lines
        FROM asked t LEFT JOIN steps s USING (iteration, pair_id) LEFT JOIN cast_votes v USING (pair_id)
        LEFT JOIN constitutions c USING (constitution)
        LEFT JOIN (SELECT prompt_id, any_value(text) AS text FROM prompts GROUP BY ALL) p USING (prompt_id)
        ORDER BY t.iteration, t.line""",
        [after, limit, offset],
    )
    files: dict[tuple[str, int], str] = {}

    def file_of(table: str, iteration: int) -> str:
        if (table, iteration) not in files:
            where: dict[str, Any] = {"iteration": iteration, "evaluation": None}
            files[table, iteration] = str(index.file_of(table, where))
        return files[table, iteration]

    anew: dict[tuple[int, str], list[TracedVotes]] = {}
    for r in index.rows(
        f"WITH {_REJUDGED} SELECT * FROM rejudged WHERE iteration < ? ORDER BY iteration, pair_id, asked_in", [after]
    ):
        file = file_of("rejudged_votes", r["asked_in"])
        asked = TracedVotes(iteration=r["asked_in"], votes_file=file, vote_lines=tuple(r["lines"]))
        anew.setdefault((r["iteration"], r["pair_id"]), []).append(asked)
    rows = []
    for r in found:
        rows.append(
            TracedPreference(
                iteration=r["iteration"],
                judged_in=r["judged_in"],
                pair_id=r["pair_id"],
                source=r["source"],
                constitution=r["text_name"],
                constitution_hash=r["constitution"],
                prompt=r["prompt"],
                chosen_id=r["chosen_id"],
                rejected_id=r["rejected_id"],
                p_chosen=r["p_chosen"],
                agreement=r["agreement"],
                steps=tuple(r["steps"] or ()),
                votes_file=file_of("votes", r["judged_in"]),
                vote_lines=tuple(r["lines"] or ()),
                rejudged=tuple(anew.get((r["iteration"], r["pair_id"]), ())),
            )
        )
    return rows
