"""A run of stub workers: everything is a hash, so that any wrong weight, text or order shows in the decisions.

The stub policy is a number; its answers depend on it. The stub learner's number depends on every pair that it ever
trained on, in order. So two runs have the same preferences only if they took the same steps throughout.
"""

from __future__ import annotations

import hashlib
import json
import queue
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlaif.config import Job, parse_job
from rlaif.constitutions.checks import Check
from rlaif.constitutions.constitution import Constitution
from rlaif.evaluation.probes import Probe
from rlaif.evaluation.texts import FixedText
from rlaif.judging.candidates import MoreBallots
from rlaif.judging.kinds import kind_of
from rlaif.loop import Loop
from rlaif.loop.in_force import InForce
from rlaif.loop.running import Referee
from rlaif.records import (
    Ballot,
    Completion,
    Divergence,
    IterationMetrics,
    Message,
    Pair,
    PolicyVersion,
    Preference,
    Prompt,
    Quality,
    Score,
    TokenSequence,
    UpdateStep,
    Vote,
)
from rlaif.rundir.store import RunDir
from rlaif.workers.feed import Feed
from rlaif.workers.inline import InlineWorker
from rlaif.workers.weights import WeightsRef

BASE_DIGEST = "base-weights"

TEXT = """
summary: {summary}
principles:
  - id: answers
    rule: Answer the question.
    guard: true
  - id: wish
    rule: "{rule}"
    prefer: "{prefer}"
    avoid: "{avoid}"
    paraphrases:
      - {{use: decide, prefer: "{prefer} w8", avoid: "{avoid} w8"}}
      - {{use: select, prefer: "{prefer} w9", avoid: "{avoid} w9"}}
      - {{use: evaluate, prefer: "{prefer} w11", avoid: "{avoid} w11"}}
    check: {{max_words: 5}}
"""


def text(number: int = 1) -> str:
    """A constitution whose sides are words of the tiny tokenizers."""
    return TEXT.format(
        summary=f"Text {number}.", rule=f"Rule {number}.", prefer=f"w{20 + number}", avoid=f"w{40 + number}"
    )


def write_texts(root: Path, *numbers: int, name: str = "rules") -> Path:
    """`constitutions/<name>/v<number>.yaml` for each number."""
    folder = root / "constitutions" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"v{number}.yaml").write_text(text(number))
    return folder


def write_base(root: Path) -> None:
    """The untrained policy."""
    if not (root / "base").exists():
        (root / "base").mkdir()
        (root / "base" / "weights.txt").write_text(BASE_DIGEST)


def fraction(*key: Any) -> float:
    """A number in [0, 1) that follows from the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "big") / 2**48


def stub_logprobs(weights: str, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
    return [tuple(-5 * fraction(weights, s.prompt_token_ids, token) for token in s.token_ids) for s in sequences]


class StubSampler:
    """Answers that depend on the weights it holds; refuses to answer for others. `forgetful`: a load changes nothing
    of what it computes with, as an engine that multiplies with an old copy. `decodes_with`: weights that it
    decodes with, whatever it reads texts with."""

    def __init__(self, forgetful: bool = False, decodes_with: str | None = None) -> None:
        self._digest = self._computes_with = BASE_DIGEST
        self._forgetful, self._decodes_with = forgetful, decodes_with

    def load(self, weights: WeightsRef) -> None:
        self._digest = (weights.folder() / "weights.txt").read_text()
        if not self._forgetful:
            self._computes_with = self._digest

    def sequences_of(self, prompts: list[Prompt]) -> list[TokenSequence]:
        return [TokenSequence(prompt_token_ids=(1, i), token_ids=tuple(range(3, 40))) for i in range(len(prompts))]

    def sequences_in(self, texts: list[str]) -> list[TokenSequence]:
        return [TokenSequence(prompt_token_ids=(1,), token_ids=tuple(map(len, text.split()))) for text in texts]

    def logprobs(self, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
        return stub_logprobs(self._computes_with, sequences)

    def computes_in(self) -> str:
        return "stub fp32"

    def sample(
        self,
        prompts: list[Prompt],
        completions_per_prompt: int,
        policy: PolicyVersion,
        seed: int,
        iteration: int,
        prefix: str,
        temperature: float | None = None,
        top_p: float | None = None,
        have: Collection[str] = (),
    ) -> Iterator[list[Completion]]:
        if policy.digest != self._digest:
            raise RuntimeError(f"asked for answers of {policy.digest}, holding {self._digest}")
        for prompt in reversed(prompts):  # engines finish in an order of their own
            yield [
                self._recorded(
                    id=f"{prefix}-{prompt.id}-{i}",
                    prompt_id=prompt.id,
                    policy=policy,
                    index=i,
                    seed=i,
                    prompt_token_ids=(1, 2),
                    token_ids=tuple(range(3, 4 + int(9 * fraction(seed, iteration, prompt.id, i, self._digest)))),
                    text=f"answer {fraction(seed, iteration, prompt.id, i, self._digest):.9f}, and a few more words",
                    finish_reason="stop",
                )
                for i in range(completions_per_prompt)
                if f"{prefix}-{prompt.id}-{i}" not in have
            ]

    def _recorded(self, **fields: Any) -> Completion:
        """An answer with its log p as it was decoded."""
        answer = Completion(**fields)
        text = TokenSequence(prompt_token_ids=answer.prompt_token_ids, token_ids=answer.token_ids)
        [logps] = stub_logprobs(self._decodes_with or self._computes_with, [text])
        return answer.model_copy(update={"logprob": sum(logps)})


class StubJudge:
    """Votes by hash; notes every ballot that it casts, before the loop hears of it. A `contrary` one names the
    other side."""

    def __init__(self, casts: str | None = None) -> None:
        self._casts = Path(casts) if casts else None
        self.contrary = False

    def score(self, candidates: list[Any], constitution: Constitution, voices: list[str]) -> Iterator[list[Score]]:
        for voice in voices:
            for c in candidates:
                value = fraction(voice, c.text)
                yield [Score(completion_id=c.completion_id, prompt_id=c.prompt_id, voice=voice, value=value)]

    def cast(
        self,
        ballots: list[Ballot],
        pairs: list[Pair],
        candidates: list[Any],
        constitution: Constitution,
        prompts: Sequence[Prompt] = (),
    ) -> Iterator[list[Vote]]:
        answers = {c.completion_id: c.text for c in candidates}
        sides = {p.id: (answers[p.first], answers[p.second]) for p in pairs}
        for n in range(0, len(ballots), 3):
            chunk = ballots[n : n + 3]
            if self._casts:
                with self._casts.open("a") as f:
                    f.writelines(f"{b.id}\n" for b in chunk)
            yield [self.vote(b, *sides[b.pair_id]) for b in chunk]

    def vote(self, ballot: Ballot, first: str, second: str) -> Vote:
        if ballot.guard:
            return Vote(ballot=ballot, model="stub", outcome="tie", raw_reply="")
        # The voices agree on most pairs, and on some they don't.
        shared = fraction(ballot.constitution, first, second)
        own = fraction(ballot.voice, ballot.template, first, second)
        p = shared if (own < 0.7) != self.contrary else 1 - shared
        outcome = "first" if p > 0.5 else "second"
        return Vote(ballot=ballot, model="stub", outcome=outcome, p_first=p, raw_reply=f"{p:.3f}")

    def quality(self, candidates: list[Any], seed: int) -> Iterator[list[Quality]]:
        yield [
            Quality(completion_id=c.completion_id, tokens=5, logprob_per_token=-1.0, relevance=0.5) for c in candidates
        ]


class StubFedJudge(StubJudge):
    """Takes more ballots while it answers, as one behind a server does."""

    def cast(  # type: ignore[override]
        self,
        ballots: Sequence[Ballot],
        pairs: Sequence[Pair],
        candidates: Sequence[Any],
        constitution: Constitution,
        templates: Sequence[Any] = (),
        journal: Path | None = None,
        fresh: bool = False,
        feed: Feed | None = None,
    ) -> Iterator[list[Vote]]:
        fed: queue.SimpleQueue[MoreBallots | None] = queue.SimpleQueue()
        fed.put(MoreBallots(ballots, pairs, candidates))
        if feed is None:
            fed.put(None)
        else:
            feed.pour(fed.put)
        known: dict[str, Pair] = {}
        answers: dict[str, Any] = {}
        while (more := fed.get()) is not None:
            known |= {p.id: p for p in more.pairs}
            answers |= {c.completion_id: c for c in more.candidates}
            mine = [known[i] for i in dict.fromkeys(b.pair_id for b in more.ballots)]
            yield from super().cast(list(more.ballots), mine, list(answers.values()), constitution)


class StubLearner:
    """Weights are a digest of everything that it trained on, in order. `nan_at`: the step whose loss is no number."""

    def __init__(self, nan_at: int | None = None) -> None:
        self._weights, self._step, self._nan_at = BASE_DIGEST, 0, nan_at
        self._refers_to: str | None = None
        self.tracked: list[tuple[int, dict[str, float | str]]] = []

    row_type = Preference

    def refer_to(self, policy: WeightsRef) -> None:
        assert (policy.folder() / "weights.txt").read_text() == policy.digest
        self._refers_to = policy.digest

    def update(self, rows: Sequence[Preference], iteration: int) -> Iterator[UpdateStep]:
        from rlaif.errors import RlaifError

        for n in range(0, len(rows), 2):
            batch = rows[n : n + 2]
            self._step += 1
            if self._step == self._nan_at:
                raise RlaifError(f"update step {self._step}: the loss is nan; the step was not taken")
            content = [self._weights, [(p.pair_id, p.chosen_id, p.source) for p in batch]]
            content += [self._refers_to] if self._refers_to else []
            self._weights = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
            yield UpdateStep(
                step=self._step,
                iteration=iteration,
                row_ids=tuple(p.row_id for p in batch),
                loss=0.5,
                grad_norm=1.0,
                learning_rate=1e-5,
                seconds=0.0,
                metrics={"margin": 0.1, "accuracy": 1.0},
            )

    def divergences(self, completions: list[Completion]) -> Iterator[list[Divergence]]:
        if any(c.policy.digest != self._weights for c in completions):
            raise RuntimeError(f"asked about another policy than {self._weights}, which the learner holds")
        for c in reversed(completions):
            kl = fraction("kl", c.text)
            yield [Divergence(completion_id=c.id, prompt_id=c.prompt_id, tokens=len(c.token_ids), kl=kl)]

    def save(self, state_dir: Path, policy_dir: Path) -> WeightsRef:
        state_dir.mkdir(parents=True)
        policy_dir.mkdir(parents=True)
        (state_dir / "state.json").write_text(json.dumps([self._weights, self._step]))
        (policy_dir / "weights.txt").write_text(self._weights)
        return WeightsRef(digest=self._weights, path=policy_dir)

    def logprobs(self, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
        return stub_logprobs(self._weights, sequences)

    def track(self, values: dict[str, float | str], step: int) -> list[str]:
        self.tracked.append((step, values))
        return []

    def export(self, policy_dir: Path) -> WeightsRef:
        policy_dir.mkdir(parents=True)
        (policy_dir / "weights.txt").write_text(self._weights)
        return WeightsRef(digest=f"rounded {self._weights}", path=policy_dir)

    def exports_in(self) -> str:
        return "fp32"

    def load(self, state: WeightsRef) -> None:
        self._weights, self._step = json.loads((state.path / "state.json").read_text())

    def start(self, policy: WeightsRef, global_step: int) -> None:
        self._weights, self._step = (policy.folder() / "weights.txt").read_text(), global_step


class Quiet:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None: ...
    def advance(self, n: int) -> None: ...
    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None: ...
    def note(self, message: str) -> None:
        self.notes.append(message)


def stub_job(**changes: Any) -> Job:
    """Four iterations; the second has too few pairs, the text changes before the third, the fourth replays."""
    tree: dict[str, Any] = {
        "iterations": 4,
        "seed": 7,
        "schedule": {0: "rules@1", 2: "rules@2"},
        "prompts": {"per_iteration": 6},
        "sampling": {"completions_per_prompt": 3},
        "filters": {"min_kept_pairs": 3},
        "replay": {"share": 0.4},
        "eval": {"every": 2, "prompts": 3},
        **changes,
    }
    if "constitution" in changes:
        del tree["schedule"]
    return parse_job(tree, "test")


def stub_prompts(count: int, prefix: str) -> list[Prompt]:
    return [
        Prompt(id=f"{prefix}{i}", messages=(Message(role="user", content=f"question {i} of {prefix}"),))
        for i in range(count)
    ]


def stub_probes() -> list[Probe]:
    """About half of them passed by any policy, which ones follows from it."""
    return [
        Probe(id=f"probe{i}", kind=kind, prompt=f"probe {i}?", check=Check(matches=r"answer 0\.[0-4]"))
        for i, kind in enumerate(("fact", "fact", "fact", "format", "format", "format"))
    ]


def stub_loop(
    root: Path,
    job: Job | None = None,
    nan_at: int | None = None,
    progress: Quiet | None = None,
    forgetful: bool = False,
    decodes_with: str | None = None,
    name: str = "run",
) -> Loop:
    """A loop over `root/run` with fresh stub workers, as a new process would have them."""
    job = job or stub_job()
    if not (root / "constitutions").exists():
        write_texts(root, 1, 2)
    write_base(root)
    run = RunDir(root / name)
    progress = progress or Quiet()

    def worker(name: str, factory: str, **kwargs: Any) -> InlineWorker:
        return InlineWorker(name, f"tests.stubs:{factory}", kwargs)

    referee = None
    if job.eval.reference_judge:
        asked = worker("reference", "StubJudge", casts=str(root / "reference_casts.log"))
        referee = Referee(kind_of(job.eval.reference_judge), "reference", asked)
    return Loop(
        job,
        run,
        InForce(job, run, root, progress.note),
        stub_prompts(20, "train"),
        stub_prompts(4, "held"),
        WeightsRef(digest=BASE_DIGEST, path=root / "base"),
        judge_name="stub",
        sampler=worker("sampler", "StubSampler", forgetful=forgetful, decodes_with=decodes_with),
        judge=(judge := worker("judge", "StubJudge", casts=str(root / "casts.log"))),
        measurer=judge,
        learner=worker("learner", "StubLearner", nan_at=nan_at),
        progress=progress,
        probes=stub_probes() if job.eval.retention else (),
        fixed_texts=[FixedText(id=f"text{i}", kind="any", text=f"a text with {'many ' * i}words") for i in range(3)],
        referee=referee,
        stream=bool(job.pipeline.stream) if job.pipeline.stream is not None else kind_of(job.judge).fed,
    )
