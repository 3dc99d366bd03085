"""A preference data set as a run's `source` (`rlaif.loop.source`): two answers to a prompt, and which one is better.

In: a file or `datasets:NAME` (`rlaif.data.labelled`). Out: completions in the policy's tokens, as its chat template
writes them, and pairs with their labels. Nobody voted on them, and no vote is made up.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rlaif import thoughts
from rlaif.config import Job, Source
from rlaif.data.labelled import Labelled, read_to_train
from rlaif.data.prompts import prompts_for, with_system
from rlaif.errors import UserError
from rlaif.loop.running import Iteration, Taken, may_train
from rlaif.records import (
    Completion,
    FinishReason,
    Message,
    Pair,
    Plan,
    PlanSource,
    PolicyVersion,
    Prompt,
    Side,
    TokenSequence,
    digest,
)
from rlaif.rundir.store import RunDir
from rlaif.sampling import GivenAnswer, PromptProblem
from rlaif.workers.worker import Worker


class _Row(NamedTuple):
    """A row of the data, with its prompt as it is asked."""

    labelled: Labelled
    prompt: Prompt

    @property
    def id(self) -> str:
        """Its own, unique in the data."""
        return self.labelled.id


class LabelledPairs:
    """The pairs of a data set.

    Raises:
        UserError: it can't be read.
    """

    def __init__(self, settings: Source, job: Job, base_dir: Path, note: Callable[[str], None]):
        """`note` is told how columns were read and which rows have no better side."""
        self.settings, self._job = settings, job
        self.path = str(settings.data)
        found = read_to_train(self.path, base_dir, settings.columns)
        self.sha256 = found.digest
        for said in found.notes:
            note(said)
        if found.excluded:
            left_out = ", ".join(f"{n} {why}" for why, n in found.excluded.items())
            note(f"{self.path}: {sum(found.excluded.values())} rows name no better side and are left out ({left_out})")
        self._all = [_Row(row, _prompt(row, job.policy.system_prompt)) for row in found.rows]
        self._rows = self._all
        self.prompts = [*{row.prompt.id: row.prompt for row in self._all}.values()]
        """What its pairs are answers to."""
        self._ids: Mapping[str, str] = {}
        self.asked_by: Job | None = None

    def pairs_in(self, position: int) -> int:
        """As many in every iteration."""
        return min(self._wanted, len(self._all))

    def check_tokenizer(self, found: Mapping[str, str | None]) -> None:
        """Its answers are text: they are put into the policy's tokens, whichever these are."""

    def settle(self, train: Sequence[Prompt]) -> None:
        """`train` are the run's own copies of `prompts`, without those that are held out: pairs of others never train.

        Raises:
            UserError: not enough are left for an iteration.
        """
        self._ids = may_train(self.prompts, train)
        self._rows = [row for row in self._all if row.prompt.id in self._ids]
        if len(self._rows) < self._wanted:
            raise UserError(
                f"prompts.per_iteration={self._wanted}: {self.path} has {len(self._rows)} pairs to train on (those of "
                f"held-out prompts left out); set prompts.per_iteration={len(self._rows)} or less, or add pairs"
            )

    def check_answers(self, sampler: Worker, note: Callable[[str], None]) -> None:
        """Every pair rendered and measured before one trains.

        Raises:
            UserError: the policy's template can't render one, or it is longer than `sampling.max_model_len` and
                `prompts.too_long` doesn't say that such are dropped.
        """
        asked = [answer for row in self._rows for answer in _answers(row)]
        problems: list[PromptProblem] = sampler.call("answer_problems", answers=asked)
        if not problems:
            return
        drop = self._job.prompts.too_long == "drop"
        if refused := [p for p in problems if not (p.too_long and drop)]:
            first = refused[0]
            more = f" ({len(refused) - 1} more like it)" if len(refused) > 1 else ""
            advice = "; raise it, shorten the answer, or set prompts.too_long=drop" if first.too_long else ""
            raise UserError(f"{self.path}: row {first.prompt_id}: {first.problem}{advice}{more}")
        rows = {p.prompt_id for p in problems}
        note(f"{self.path}: {len(rows)} pairs are too long and left out")

    def planned(self, plan: Plan, given: Sequence[PlanSource], run: RunDir) -> Plan:
        """The plan of an iteration, after what it gave earlier ones."""
        rows = self._after([len(noted.rows) or self._wanted for noted in given])
        asked = dict.fromkeys(self._ids[row.prompt.id] for row in rows)
        noted = PlanSource(
            path=self.path,
            position=len(given),
            rows=tuple(row.id for row in rows),
            sha256=self.sha256,
            rejudged=self.settings.rejudge,
        )
        return plan.model_copy(update={"prompt_ids": tuple(asked), "source": noted})

    def gave(self, noted: PlanSource) -> bool:
        """Whether a plan took its rows from it."""
        return noted.position is not None and noted.path == self.path

    def check(self, noted: PlanSource) -> None:
        """Whether it is what a plan noted.

        Raises:
            UserError: it changed since.
        """
        if self.sha256 != noted.sha256:
            raise UserError(
                f"source.data: {self.path} isn't what it was when this run's plan was written; restore it, or start a "
                "new run with --name NAME"
            )

    def labels(self, it: Iteration) -> dict[str, Side]:
        """Which side of each pair of an iteration the data call better."""
        return {_pair_id(it.k, row): _shown(row, self._job.seed, it.k)[0] for row in self._taken(it.source)}

    def take(self, it: Iteration, sampler: Worker) -> Taken:
        """What iteration `it` is given."""
        self.check(it.source)
        rows = self._taken(it.source)
        strip = self._job.policy.thinking == "strip"
        tokens: list[TokenSequence] = sampler.call("tokens_of", answers=[a for row in rows for a in _answers(row)])
        completions: list[Completion] = []
        pairs: list[Pair] = []
        of_prompt: Counter[str] = Counter()
        for row, sides in zip(rows, zip(tokens[::2], tokens[1::2], strict=True), strict=True):
            if self._too_long(sides):
                continue
            prompt, made = self._ids[row.prompt.id], []
            for answer, ids in zip(_answers(row), sides, strict=True):
                index = of_prompt[prompt]
                of_prompt[prompt] += 1
                text = answer.text
                made.append(
                    Completion(
                        id=f"{it.k:04d}-{prompt}-{index}",
                        prompt_id=prompt,
                        policy=PolicyVersion(iteration=0, digest=f"data:{self.sha256[:16]}"),
                        index=index,
                        seed=0,
                        prompt_token_ids=ids.prompt_token_ids,
                        token_ids=ids.token_ids,
                        text=thoughts.without_thoughts(text) if strip and thoughts.has_marks(text) else text,
                        finish_reason=answer.finish_reason,
                    )
                )
            completions += made
            _, swapped = _shown(row, self._job.seed, it.k)
            first, second = reversed(made) if swapped else made
            pairs.append(
                Pair(id=_pair_id(it.k, row), prompt_id=prompt, first=first.id, second=second.id, method="labelled")
            )
        if not pairs:
            raise UserError(
                f"{self.path}: all pairs of iteration {it.k + 1} are too long; raise sampling.max_model_len"
            )
        return Taken(completions, [], pairs, [])

    @property
    def _wanted(self) -> int:
        """Rows that an iteration takes."""
        return self._job.prompts.per_iteration

    def _taken(self, noted: PlanSource) -> list[_Row]:
        """The rows that a plan takes."""
        if noted.rows:
            rows = {row.id: row for row in self._rows}
            return [rows[i] for i in noted.rows]
        assert noted.position is not None, "of data"
        return self._after([self._wanted] * noted.position)  # as older plans mean it

    def _after(self, before: Sequence[int]) -> list[_Row]:
        """The next rows, where earlier iterations took so many."""
        return prompts_for(self._rows, self._job.seed, before, self._wanted)

    def _too_long(self, sides: Sequence[TokenSequence]) -> bool:
        limit = self._job.sampling.max_model_len
        return self._job.prompts.too_long == "drop" and max(len(s.all_ids) for s in sides) > limit


def _prompt(row: Labelled, system_prompt: str | None) -> Prompt:
    """What a row's answers answer, under an id that rows with the same prompt share."""
    messages = row.messages or (Message(role="user", content=row.prompt),)
    category = None if row.slice == row.file else row.slice
    prompt = Prompt(id=digest([m.model_dump() for m in messages]), messages=messages, category=category)
    return with_system([prompt], system_prompt)[0]


def _answers(row: _Row) -> tuple[GivenAnswer, GivenAnswer]:
    """Both, in the order of the data; one of which nothing says how it ended, ended."""
    ends: list[FinishReason] = [row.labelled.first_finish or "stop", row.labelled.second_finish or "stop"]
    texts = (row.labelled.first, row.labelled.second)
    first, second = (
        GivenAnswer(id=row.id, prompt=row.prompt, text=text, finish_reason=end)
        for text, end in zip(texts, ends, strict=True)
    )
    return first, second


def _pair_id(k: int, row: _Row) -> str:
    """It trains once in each pass over the data."""
    return f"{k:04d}-{row.id}"


def _shown(row: _Row, seed: int, k: int) -> tuple[Side, bool]:
    """Which side of the pair is better, and whether the data's first answer is its second: drawn, so that no order
    carries the label."""
    label = row.labelled.label
    if random.Random(f"{seed}:{k}:{row.id}").random() < 0.5:
        return label, False
    return "second" if label == "first" else "first", True
