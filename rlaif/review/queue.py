"""The review queue: which pair a person is asked about next, and what the answer means.

In: a run directory whose filter sent pairs to review. Out: questions, one at a time, and labels. A question is blind:
it holds no verdict and doesn't say which completion the pair calls first; the order shown is drawn for each pair and
author. A pair that is being shown is claimed, so that two reviewers get different ones; a claim expires.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.copies import constitution_copy
from rlaif.errors import RlaifError, UserError, first_problem, said
from rlaif.judging.filters import certainty
from rlaif.records import (
    Completion,
    ConstitutionRef,
    Decision,
    HumanLabel,
    Message,
    Pair,
    Plan,
    Prompt,
    Record,
    digest,
    stored,
)
from rlaif.review import labels as log
from rlaif.rundir.store import RunDir, StageDir, read_rows, read_source, replacing

CLAIM_S = 600.0
"""How long a pair that is shown to one reviewer is kept from the others."""

Shown = Literal["1", "2", "t", "s"]
"""An answer: the completion shown first, the one shown second, a tie, or skip."""

R = TypeVar("R", Pair, Completion, Prompt)


class Question(Record):
    """What a reviewer sees."""

    pair_id: str
    iteration: int
    messages: tuple[Message, ...]
    """The prompt."""
    shown: tuple[str, str]
    """The two completions' texts, in the order drawn for this pair and author."""
    cut_off: tuple[bool, bool]
    """Whether the length limit cut them off."""
    constitution: Constitution
    """The text that the pair was judged under; with `replay.on_change: rejudge` the one in force."""
    constitution_source: str
    """The same as its author wrote it (YAML)."""
    again: bool = False
    """This reviewer labelled the pair under another text."""


class Counts(Record):
    """Where the queue stands, in pairs."""

    sent: int
    """Sent to review so far."""
    waiting: int
    """Without a label."""
    claimed: int
    """Of those, being shown to somebody."""
    labelled: int
    stale: int = 0
    """Of those, labels that were given under another text than the one in force, and that their authors are asked for
    again (`replay.on_change: rejudge`)."""
    joined: int
    """Labels that an update has trained on."""
    outcomes: dict[str, int]
    """Of the labels in force: first, second, tie."""
    authors: dict[str, int]
    """The same, by author."""


class Claim(Record):
    """A pair that somebody is looking at."""

    author: str
    session: str
    until: float
    """Seconds since the epoch."""


class Queue:
    """The pairs of a run that wait for people. One object may serve many reviewers; it keeps up with a growing run."""

    def __init__(self, run: RunDir):
        self._run = run
        self._sent: dict[int, list[Decision]] = {}  # of iterations whose decisions are complete: they never change
        self._plans: dict[int, Plan] = {}
        self._folder: int | None = None  # which folder has the run's name: after a rollback another one
        self._reading = threading.Lock()  # a server asks from many threads
        self._of_labels: tuple[str, ...] = ()
        self._damaged: dict[int, list[str]] = {}  # decisions of an iteration that can't be read
        self._left_out: tuple[str, ...] = ()  # pairs that couldn't be shown when somebody asked last
        self._uncounted: tuple[str, ...] = ()  # iterations of which nobody knows what joined

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each damaged line or file, as last read; what it is about is left out."""
        decisions = (problem for _, mine in sorted(self._damaged.copy().items()) for problem in mine)
        return tuple(dict.fromkeys((*self._of_labels, *decisions, *self._uncounted, *self._left_out)))

    def next(self, author: str, session: str = "") -> Question | None:
        """The pair to ask this author about now, claimed for them; None when none waits that isn't another's.

        A pair that can't be shown, because a file of the run is damaged, is left out and told in `problems`. An author
        who asks again without answering gets the same pair. `session` tells apart two terminals of one author, which
        then get different pairs where there are enough.

        Raises:
            RlaifError: the disk is full.
        """
        self._all_sent()  # may read much, so not while others wait
        left_out: dict[str, str] = {}
        try:
            while (pair_id := self._claim(author, session, left_out)) is not None:
                try:
                    return self.question(pair_id, author)
                except (RlaifError, OSError) as e:
                    left_out[pair_id] = f"{said(e)}; its pair is left out"
            return None
        finally:
            self._left_out = tuple(left_out.values())

    def _claim(self, author: str, session: str, left_out: Collection[str]) -> str | None:
        """The pair that is this author's now, of those that aren't `left_out`."""
        with log.review_lock(self._run):
            claims = self._claims()
            labels = self._read_labels()
            skipped = {x.pair_id for x in labels if x.author == author and x.outcome == "skip"}
            waiting = [*self._waiting(labels), *self._stale(labels, author)]
            others = {p for p, c in claims.items() if c.author != author}
            mine = {p for p, c in claims.items() if c.author == author and c.session == session}
            elsewhere = set(claims) - others - mine
            free = [d for d in waiting if d.pair_id not in others and d.pair_id not in left_out]
            if not free and not mine:
                return None
            claims = {p: c for p, c in claims.items() if p not in mine}
            chosen = None
            if free:
                # Stable: among equals the order of the queue stays.
                first = min(free, key=lambda d: (d.pair_id in elsewhere, d.pair_id not in mine, d.pair_id in skipped))
                chosen = first.pair_id
                claims[chosen] = Claim(author=author, session=session, until=time.time() + CLAIM_S)
            self._write_claims(claims)
        return chosen

    def question(self, pair_id: str, author: str) -> Question:
        """The question about one pair, whatever its state; to look at it again, and to correct a label.

        Raises:
            UserError: no such pair was sent to review.
            RlaifError: a file that it is made from is damaged.
            OSError: one is gone.
        """
        k = self._iteration_of(pair_id)
        here = self._run.iteration(k)
        ref = self._shown_text(k)
        constitution = constitution_copy(self._run, ref.hash)
        asked = self._run.path / "prompts" / "train.jsonl"
        asked.stat()  # what is gone as a whole is noticed before much is read
        pair = _by_id(here.path / "pairs.jsonl", Pair, pair_id)[pair_id]
        if shown_swapped(pair_id, author):
            pair = pair.swap()
        completions = _by_id(here.path / "completions.jsonl", Completion, pair.first, pair.second)
        first, second = completions[pair.first], completions[pair.second]
        prompt = _by_id(asked, Prompt, pair.prompt_id)[pair.prompt_id]
        return Question(
            pair_id=pair_id,
            iteration=k,
            messages=prompt.messages,
            shown=(first.text, second.text),
            cut_off=(first.finish_reason == "length", second.finish_reason == "length"),
            constitution=constitution.model_copy(update={"name": ref.name, "version": ref.version}),
            constitution_source=read_source(self._run.path / "constitutions" / ref.hash / "source.yaml"),
            again=any(d.pair_id == pair_id for d in self._stale(self._read_labels(), author)),
        )

    def answer(
        self,
        pair_id: str,
        shown: Shown,
        author: str,
        reason: str | None = None,
        session: str = "",
        constitution: str | None = None,
    ) -> HumanLabel:
        """Stores an author's answer as a label, durable when this returns, and lets go of the pair. `constitution` is
        the hash of the text that they had before them (`Question.constitution`), by default the pair's own.

        Raises:
            UserError: no such pair was sent to review, or the answer, the author or the text isn't one.
            RlaifError: the disk is full; no label is lost, and this one isn't stored.
        """
        if shown not in ("1", "2", "t", "s"):
            raise UserError(f"answer {shown!r}: expected 1, 2, t (tie) or s (skip)")
        if not author.strip():
            raise UserError("author: a label needs the name of who gave it")
        first, second = ("second", "first") if shown_swapped(pair_id, author) else ("first", "second")
        with log.review_lock(self._run):  # a rollback holds it, and afterwards the pair may be none of the run's
            k = self._iteration_of(pair_id)
            if constitution == self._plan(k).constitution.hash:
                constitution = None
            elif constitution not in (None, *(plan.constitution.hash for plan in self._every_plan())):
                raise UserError(f"pair {pair_id}: no text {constitution} was in force in this run; show the pair again")
            label = HumanLabel.model_validate(
                {
                    "pair_id": pair_id,
                    "iteration": k,
                    "constitution": constitution,
                    "outcome": {"1": first, "2": second, "t": "tie", "s": "skip"}[shown],
                    "author": author,
                    "time": log.now(),
                    "reason": (reason or "").strip() or None,
                }
            )
            log.append(self._run, label)
            claims = self._claims()
            if (claim := claims.get(pair_id)) and claim.author == author:
                del claims[pair_id]
                with suppress(RlaifError, OSError):  # the label is stored; the claim expires
                    self._write_claims(claims)
        return label

    def release(self, author: str, session: str = "") -> None:
        """Gives back what this author's session was shown and didn't answer."""
        with log.review_lock(self._run):
            claims = self._claims()
            left = {p: c for p, c in claims.items() if (c.author, c.session) != (author, session)}
            if left != claims:
                self._write_claims(left)

    def waiting(self) -> int:
        """Pairs without a label. Writes nothing; of an iteration that it has seen it reads nothing again."""
        sent = self._all_sent()
        labelled = log.in_force(self._read_labels())
        return sum(d.pair_id not in labelled for d in sent)

    def counts(self) -> Counts:
        """Where the queue stands. Writes nothing."""
        self._all_sent()  # first, so that `problems` tells of it
        labels = self._read_labels()
        sent = {d.pair_id for d in self._all_sent()}
        standing = [label for pair, label in log.in_force(labels).items() if pair in sent]
        waiting = sent - {label.pair_id for label in standing}
        uncounted: list[str] = []
        joined = log.joined_last(self._run, self._run.iterations(), uncounted.append)
        self._uncounted = tuple(uncounted)
        return Counts(
            sent=len(sent),
            waiting=len(waiting),
            claimed=len(waiting & set(self._claims())),
            labelled=len(standing),
            stale=sum(len(self._stale(labels, author)) for author in {label.author for label in standing}),
            joined=len(joined),
            outcomes=dict(Counter(label.outcome for label in standing)),
            authors=dict(Counter(label.author for label in standing)),
        )

    # What these share.

    def _all_sent(self) -> list[Decision]:
        """Decisions with status review, of all iterations that have decided."""
        return [d for _, decisions in sorted(self._by_iteration().items()) for d in decisions]

    def _by_iteration(self) -> dict[int, list[Decision]]:
        """The same by iteration; the caller's own copy, which no other thread adds to."""
        with self._reading:
            if (folder := self._run.path.stat().st_ino) != self._folder:
                self._folder, self._sent, self._plans, self._damaged = folder, {}, {}, {}
            for k in self._run.iterations():
                here = self._run.iteration(k)
                if k not in self._sent and here.is_complete("decisions"):
                    self._sent[k], plan, self._damaged[k] = readable(self._run, k)
                    if plan is not None:
                        self._plans[k] = plan
            return dict(self._sent)

    def _waiting(self, labels: Iterable[HumanLabel]) -> list[Decision]:
        """Pairs without a label, the most useful first: judged under the newest text, then of the newest iteration,
        then the least certain."""
        labelled = log.in_force(labels)
        sent = {k: decisions for k, decisions in self._by_iteration().items() if k in self._plans}
        if not sent:
            return []
        newest = self._plan(max(sent)).constitution.hash
        order = sorted(sent, key=lambda k: (self._plan(k).constitution.hash != newest, -k))
        return [d for k in order for d in sorted(sent[k], key=certainty) if d.pair_id not in labelled]

    def _stale(self, labels: Iterable[HumanLabel], author: str) -> list[Decision]:
        """Pairs that this author labelled under another text than the one in force, where that is to be asked again."""
        if not self._asks_again:
            return []
        sent = {d.pair_id: d for d in self._all_sent()}
        texts = {k: plan.constitution.hash for k, plan in self._plans.items()}
        now = self._every_plan()[-1].constitution.hash
        mine = [x for i, x in log.in_force(labels).items() if x.author == author and i in sent and x.iteration in texts]
        return [sent[x.pair_id] for x in mine if log.given_under(x, texts) != now]

    @property
    def _asks_again(self) -> bool:
        """`replay.on_change: rejudge`. Read each time: a run may go on with another."""
        replay = self._run.header.get("job", {}).get("replay", {})
        return isinstance(replay, dict) and replay.get("on_change") == "rejudge"

    def _every_plan(self) -> list[Plan]:
        """The plans that can be read, the newest last."""
        for k in self._run.iterations():
            with suppress(RlaifError, OSError):
                self._plan(k)
        return [plan for _, plan in sorted(self._plans.items())]

    def _shown_text(self, k: int) -> ConstitutionRef:
        """The text that a reviewer has before them with a pair of iteration k."""
        own = self._plan(k)
        return (self._every_plan()[-1] if self._asks_again else own).constitution

    def _iteration_of(self, pair_id: str) -> int:
        for k, decisions in self._by_iteration().items():
            if any(d.pair_id == pair_id for d in decisions):
                return k
        raise UserError(f"{self._run.path}: no pair {pair_id} was sent to review")

    def _plan(self, k: int) -> Plan:
        if k not in self._plans:
            self._plans[k] = self._run.plan(k)
        return self._plans[k]

    def _read_labels(self) -> tuple[HumanLabel, ...]:
        found = log.read_labels(self._run)
        self._of_labels = found.problems
        return found.labels

    @property
    def _claims_path(self) -> Path:
        return self._run.path / "review" / "claims.json"

    def _claims(self) -> dict[str, Claim]:
        """Claims that haven't expired. They only spare work: a damaged file counts as none."""
        try:
            found = {p: Claim.model_validate(c) for p, c in json.loads(self._claims_path.read_text()).items()}
        except (FileNotFoundError, ValueError, AttributeError):
            return {}
        return {p: c for p, c in found.items() if c.until > time.time()}

    def _write_claims(self, claims: dict[str, Claim]) -> None:
        # Whole or not at all, but not made durable: with the machine, whoever looked at a pair is gone too.
        with replacing(self._claims_path) as temporary:
            temporary.write_text(json.dumps({p: c.model_dump() for p, c in claims.items()}))


def readable(run: RunDir, k: int) -> tuple[list[Decision], Plan | None, list[str]]:
    """An iteration's decisions with status review and its plan; without a plan none of them can be used. And what
    couldn't be read, a line each."""
    problems: list[str] = []
    sent = sent_to_review(run.iteration(k), problems.append)
    try:
        return sent, run.plan(k), problems
    except (RlaifError, OSError) as e:
        return [], None, [*problems, *([f"{said(e)}; its {len(sent)} pairs in review are left out"] if sent else [])]


def sent_to_review(here: StageDir, told: Callable[[str], None] = lambda problem: None) -> list[Decision]:
    """The decisions of one iteration with status review; `told` gets a line for each damaged one, which is left out."""
    path = here.path / "decisions.jsonl"
    sent = []
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if log.REVIEW.search(line) is None:
                continue
            try:
                decision = stored(Decision, line)
            except ValidationError as e:
                told(f"{path}:{number}: not a Decision ({first_problem(e)}); its pair is left out")
                continue
            if decision.status == "review":
                sent.append(decision)
    return sent


def _by_id(path: Path, record: type[R], *ids: str) -> dict[str, R]:
    """The rows with these ids, read without parsing the others.

    Raises:
        RlaifError: one isn't there.
    """
    known = re.compile(b"|".join(re.escape(json.dumps(i, ensure_ascii=False).encode()) for i in ids))
    rows = {str(row.id): row for row in read_rows(path, record, known)}
    if missing := [i for i in ids if i not in rows]:
        raise RlaifError(f"{path}: {missing[0]} is missing; the file was changed after it was written")
    return rows


def shown_swapped(pair_id: str, author: str) -> bool:
    """Whether this author is shown the pair's second completion first."""
    return int(digest(["shown", pair_id, author]), 16) % 2 == 1
