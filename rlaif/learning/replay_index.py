"""The replay set's index, `replay/index.jsonl` in a run: a line for every pair that an iteration had fresh in its mix.

In: a run's log. Out: `IndexRow`s. The index only spares reading all of the log: it is appended to after each mix, and
made anew from the log where it is lost, torn, or behind. No head covers it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from rlaif.errors import RlaifError
from rlaif.records import Decision, PolicyVersion, Preference, Record, RowSource
from rlaif.rundir.store import RunDir, disk_errors, make_folder, read_json, read_rows, write_json

FOLDER = "replay"
FILE = "index.jsonl"
STATE = "index.json"
"""Up to which iteration the index goes, and how long it is then."""


class IndexRow(Record):
    """A pair of the replay set, as one iteration had it."""

    pair_id: str
    iteration: int
    """That sampled the pair."""
    mixed_in: int
    """That had it fresh in its mix; a pair that was labelled anew is in several."""
    source: RowSource
    constitution: str
    """Hash of the text that it was judged under."""
    policy: PolicyVersion
    """That sampled it."""
    votes: int
    """Valid ones behind the judge's verdict."""
    prompt_id: str
    chosen_id: str
    rejected_id: str


def index_rows(run: RunDir) -> list[IndexRow]:
    """The index up to the newest mix: as it lies in the run where it is whole, else from the log. Writes nothing."""
    last = _newest_mix(run)
    if last < 0:
        return []
    if _covers(run) == last:
        try:
            return read_rows(run.path / FOLDER / FILE, IndexRow)
        except RlaifError:
            pass  # damaged: the log has it all
    return [row for k in range(last + 1) for row in _rows_of(run, k)]


def update_index(run: RunDir, k: int) -> None:
    """Brings the index up to iteration k, whose mix is complete; not where the log of an earlier one is damaged: what
    can be made again must end no run."""
    covers = _covers(run)
    if covers == k:
        return
    anew = covers < 0 or covers != k - 1
    try:
        rows = (row for i in range(0 if anew else k, k + 1) for row in _rows_of(run, i))
        lines = [row.model_dump_json().encode() + b"\n" for row in rows]
    except (RlaifError, FileNotFoundError):
        return
    make_folder(run.path / FOLDER)
    path = run.path / FOLDER / FILE
    with disk_errors(path), path.open("wb" if anew else "ab") as f:
        f.writelines(lines)
        f.flush()
        os.fsync(f.fileno())
    write_json(path.with_name(STATE), {"through": k, "size": path.stat().st_size})


def _covers(run: RunDir) -> int:
    """The newest iteration in an index that is as it was written; -1: there is none such."""
    path = run.path / FOLDER / FILE
    try:
        state = read_json(path.with_name(STATE))
        sound = path.stat().st_size == state["size"]
        return int(state["through"]) if sound else -1
    except (OSError, RlaifError, TypeError, KeyError, ValueError):
        return -1


def _newest_mix(run: RunDir) -> int:
    return max((k for k in run.iterations() if run.iteration(k).is_complete("preferences")), default=-1)


def _rows_of(run: RunDir, k: int) -> Iterator[IndexRow]:
    """What iteration k had fresh in its mix."""
    policies: dict[int, PolicyVersion] = {}
    votes: dict[str, int] = {}
    for row in run.iteration(k).each("preferences", Preference):
        if row.source == "replay":
            continue
        if (i := row.iteration) not in policies:
            policies[i] = run.plan(i).policy
            votes |= {d.pair_id: d.verdict.valid_votes for d in run.iteration(i).each("decisions", Decision)}
        yield IndexRow(
            pair_id=row.pair_id,
            iteration=i,
            mixed_in=k,
            source=row.source,
            constitution=row.constitution,
            policy=policies[i],
            votes=votes[row.pair_id],
            prompt_id=row.prompt_id,
            chosen_id=row.chosen_id,
            rejected_id=row.rejected_id,
        )
