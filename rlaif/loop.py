"""The loop: plan, sample, score, pair, judge, decide, mix, update, evaluate; each a durable stage.

In: a resolved job and a run directory. Out: the run directory, further on. The loop holds no model: it
talks to its workers (sampler, judge, learner, measurer) in records and paths. Online DPO follows OAIF
(arXiv 2402.04792) with an update per batch of fresh pairs (arXiv 2506.21495).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlaif import monitors, tracking
from rlaif.config import Job
from rlaif.constitution import Constitution
from rlaif.errors import RlaifError
from rlaif.heads import Head, write_head
from rlaif.judging.ballots import (
    Role,
    ballots_for,
    evaluating_voices,
    rounds,
    selecting_voices,
    settled,
)
from rlaif.judging.calibration import CUT_OFF, EVERYTHING, Asked, Calibration, ends_of, judged_stats
from rlaif.judging.candidates import Candidate
from rlaif.judging.filters import check_calibrated, decide_votes, to_review
from rlaif.judging.templates import Template, template_names
from rlaif.judging.verdicts import JurorFit, by_pair, jurors_for
from rlaif.mixing import labelled, preferences_of, read_now, replayed
from rlaif.pairing import make_pairs
from rlaif.prompts import prompts_for
from rlaif.records import (
    Ballot,
    Completion,
    Decision,
    Divergence,
    EvaluationMetrics,
    IterationMetrics,
    Pair,
    Plan,
    PolicyVersion,
    Preference,
    Prompt,
    Quality,
    Score,
    TokenSequence,
    UpdateStep,
    Vote,
    WeightsGap,
)
from rlaif.review.labels import labels_noted
from rlaif.store import STAGES, RunDir, StageDir, read_record, replace_dir, write_json
from rlaif.texts import Texts
from rlaif.weights import WRONG, weights_gap
from rlaif.workers import WorkerLike

BASE_POLICY = 0
EVAL_SEED_ITERATION = -1
"""Held-out answers are drawn with the same seeds at every evaluation, so that two differ by the policy only."""


class Progress(Protocol):
    """Where the loop says what it is doing."""

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None: ...
    def advance(self, n: int) -> None: ...
    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None: ...
    def note(self, message: str) -> None: ...


@dataclass
class Loop:
    """One run on its way. `run()` continues at the first incomplete stage."""

    job: Job
    dir: RunDir
    texts: Texts
    train: list[Prompt]
    held_out: list[Prompt]
    base_model: Path
    base_digest: str
    judge_name: str
    """Kind and weights' digest: votes of other weights are other votes."""
    sampler: WorkerLike
    judge: WorkerLike
    learner: WorkerLike
    measurer: WorkerLike
    """Who says how sane an answer is: a likelihood judge on the base policy, often the judge itself."""
    progress: Progress
    calibration: Calibration | None = None
    """In force for the whole run (`filters.calibration`)."""
    _sampler_has: str | None = field(default=None, init=False)
    _fixed: list[TokenSequence] = field(default_factory=list, init=False)
    """Texts that weights are compared by; made once."""
    _gap: tuple[str, WeightsGap] | None = field(default=None, init=False)
    """Of the policy with that digest, measured when the sampler took it."""
    _learner_at: int | None = field(default=None, init=False)
    """Iterations that the learner process has behind it; None until its state is known."""

    def run(self) -> Head:
        """All iterations that are still owed; returns the head of the whole."""
        for k in range(self.job.iterations):
            if not (self.dir.iteration(k).path / "metrics.json").exists():
                self.iterate(k)
        self._evaluate_after(self.job.iterations - 1)  # planned already, unless a resumed run has fewer iterations
        return write_head(self.dir)  # a new one where a kill came between an iteration's metrics and its head

    def iterate(self, k: int) -> None:
        """One iteration, from its first incomplete stage on."""
        here = self.dir.iteration(k)
        plan = self._plan(k, here)
        self._announce(plan)
        text = self.texts.load(plan.constitution)
        self._check_calibration(plan, text)
        if k == 0:
            self._evaluate(BASE_POLICY, plan, text)
        elif self._plan_of(k - 1).constitution.hash != text.hash:
            self._evaluate_after(k - 1)

        prompts = {p.id: p for p in self.train}
        completions = self._sample(plan, here, [prompts[i] for i in plan.prompt_ids])
        scores = self._score(plan, here, prompts, completions, text)
        pairs = self._pair(plan, here, completions, scores)
        votes = self._judge(here, "decide", plan, pairs, completions, prompts, text)
        decisions = self._decide(here, "decide", pairs, votes, completions, prompts, text)
        preferences = self._mix(k, here, prompts, completions, pairs, decisions, text)
        steps = self._update(k, here, preferences, text)

        evaluation = self._evaluate(k + 1, plan, text) if plan.evaluate else None
        metrics = monitors.iteration_metrics(
            plan, completions, pairs, votes, decisions, preferences, steps,
            ballots=here.meta("votes").get("ballots", len(votes)),
            seconds={stage: here.meta(stage)["seconds"] for stage in STAGES},
            jurors=self._tell_jurors(k, here, votes, decisions),
            judged=judged_stats(list(zip(pairs, decisions, strict=True)), {c.id: c.text for c in completions},
                                {c.id: c.finish_reason for c in completions}),
            gap=self._gap_of(here),
        )  # fmt: skip
        # With metrics.json the iteration is done and never looked at again: what it has to tell is told before.
        alarms = self._alarms(k, metrics, evaluation)
        write_json(here.path / "metrics.json", metrics.model_dump(mode="json"))
        number, events = self._text_number(k), self.dir.events()
        self._track(k, k + 1, tracking.of_iteration(metrics, votes, self.job.judge, number, events))
        self._prune_policies(k)
        head = write_head(self.dir)
        self.progress.iteration_done(k, metrics)
        self.progress.note(f"head {head.name}")
        self._stop_at(k, alarms)

    # One method a stage, in the order of the data flow.

    def _plan(self, k: int, here: StageDir) -> Plan:
        path = here.path / "plan.json"
        if path.exists():
            return self.dir.plan(k)
        text, templates = self.texts.in_force(k)
        last = k + 1 == self.job.iterations
        plan = Plan(
            iteration=k,
            seed=self.job.seed,
            constitution=text.ref,
            templates=templates,
            policy=self._policy_before(k)[0],
            prompt_ids=tuple(p.id for p in prompts_for(self.train, self.job.seed, k, self.job.prompts.per_iteration)),
            evaluate=last or (k + 1) % self.job.eval.every == 0,
        )
        here.path.mkdir(parents=True, exist_ok=True)
        write_json(path, plan.model_dump(mode="json"))
        return plan

    def _announce(self, plan: Plan) -> None:
        """Tells a change of text. Not when the plan is written: a run killed in between would never tell it."""
        k, text = plan.iteration, plan.constitution
        if k > 0 and self._plan_of(k - 1).constitution.hash != text.hash:
            message = f"after {k} iterations, {text} ({text.hash}) is in force"
            if self._event_once("constitution_changed", message, k, **text.model_dump()):
                self.progress.note(f"constitution changed: {message}")

    def _event_once(self, kind: str, message: str, k: int, **data: Any) -> bool:
        """Notes an event unless an earlier, interrupted attempt at this iteration did; whether it was new."""
        if any((e.kind, e.iteration, e.message) == (kind, k, message) for e in self.dir.events()):
            return False
        self.dir.event(kind, message, k, **data)
        return True

    def _sample(self, plan: Plan, here: StageDir, prompts: list[Prompt]) -> list[Completion]:
        settings = self.job.sampling

        def produce(_: list[Completion]) -> Iterator[list[Completion]]:
            self._load_sampler(plan.iteration)
            total = len(prompts) * settings.completions_per_prompt
            self.progress.stage(plan.iteration, "sample", total, "answers", str(plan.constitution))
            yield from self._advancing(
                self.sampler.stream(
                    "sample",
                    prompts=prompts,
                    completions_per_prompt=settings.completions_per_prompt,
                    policy=plan.policy,
                    seed=self.job.seed,
                    iteration=plan.iteration,
                    prefix=f"{plan.iteration:04d}",
                )
            )

        rows = here.rows("completions", Completion, produce, resumable=False, before_commit=self._gap_noted)
        return _in_order(rows, [p.id for p in prompts])

    def _score(
        self, plan: Plan, here: StageDir, prompts: dict[str, Prompt], completions: list[Completion], text: Constitution
    ) -> list[Score]:
        voices = selecting_voices(text) if self.job.pairing.method == "best_worst" else []

        def produce(done: list[Score]) -> Iterator[list[Score]]:
            have = {(s.completion_id, s.voice) for s in done}
            owed = [c for c in completions if any((c.id, v) not in have for v in voices)]
            if not owed:
                return
            self.progress.stage(plan.iteration, "score", len(owed) * len(voices), "scores", str(text.ref))
            candidates = _candidates(owed, prompts)
            for chunk in self._advancing(
                self.judge.stream("score", candidates=candidates, constitution=text, voices=voices)
            ):
                yield [s for s in chunk if (s.completion_id, s.voice) not in have]

        return here.rows("scores", Score, produce, inputs=["completions"])

    def _pair(self, plan: Plan, here: StageDir, completions: list[Completion], scores: list[Score]) -> list[Pair]:
        pairing = self.job.pairing

        def produce(_: list[Pair]) -> Iterator[list[Pair]]:
            seed = self.job.seed * 1_000_003 + plan.iteration
            yield make_pairs(completions, pairing.method, pairing.max_pairs_per_prompt, seed, scores)

        return here.rows("pairs", Pair, produce, inputs=["completions", "scores"], resumable=False)

    def _judge(
        self,
        here: StageDir,
        role: Role,
        plan: Plan,
        pairs: list[Pair],
        completions: list[Completion],
        prompts: dict[str, Prompt],
        text: Constitution,
    ) -> list[Vote]:
        asked: dict[str, Any] = {"constitution": text}
        journal = here.path / "votes.asked"
        if self.job.judge.kind == "chat":
            asked |= {"templates": self._templates(plan, role, text), "journal": journal}
        ballots = self._ballots(plan, role, pairs, text)
        # Held-out pairs count by their verdict, kept or not, so every vote on them counts.
        early_stop = self.job.judge.early_stop and role == "decide"
        in_rounds = rounds(ballots) if early_stop else [ballots]

        def produce(done: list[Vote]) -> Iterator[list[Vote]]:
            self._tell_interrupted(plan.iteration, done, ballots, journal)
            votes = list(done)
            wanted = {c for p in pairs for c in (p.first, p.second)}
            asked["candidates"] = _candidates([c for c in completions if c.id in wanted], prompts)
            for number, this_round in enumerate(in_rounds):
                have = {v.ballot.id for v in votes}
                decided = self._settled(votes, in_rounds, number, text) if number else set()
                owed = [b for b in this_round if b.id not in have and b.pair_id not in decided]
                if not owed:
                    continue
                name = "judge" if role == "decide" else "evaluate"
                self.progress.stage(plan.iteration, name, len(owed), "votes", str(text.ref))
                for chunk in self._advancing(self.judge.stream("cast", ballots=owed, pairs=pairs, **asked)):
                    votes += chunk
                    yield chunk

        votes = here.rows("votes", Vote, produce, inputs=["pairs"], before_commit=lambda: {"ballots": len(ballots)})
        journal.unlink(missing_ok=True)
        return _as_cast(votes, ballots, complete=not early_stop)

    def _tell_interrupted(self, k: int, done: list[Vote], ballots: list[Ballot], journal: Path) -> None:
        """Notes an earlier attempt at this judging, and which ballots it may have had asked for nothing."""
        asked = set(journal.read_text().split()) if journal.exists() else set()
        asked -= {v.ballot.id for v in done}
        again = [b.id for b in ballots if b.id in asked]
        if done or again:
            under_way = self.job.judge.concurrency if self.job.judge.kind == "chat" else 1
            message = f"judging was interrupted with {len(done)} of {len(ballots)} votes durable; "
            if self.job.judge.kind == "chat":
                message += f"{len(again)} ballots that had been sent off have no vote, and may be asked twice"
            else:
                message += "the call that was in flight is made again"
            data = {"durable": len(done), "ballots": len(ballots), "in_flight_at_most": under_way, "asked_again": again}
            self.dir.event("judging_interrupted", message, k, **data)
        journal.unlink(missing_ok=True)

    def _templates(self, plan: Plan, role: Role, text: Constitution) -> list[Template]:
        names = template_names(self.job.judge, text, role, plan.templates)
        return [self.texts.load_template(name, plan.templates[name]) for name in names]

    def _ballots(self, plan: Plan, role: Role, pairs: list[Pair], text: Constitution) -> list[Ballot]:
        templates = self._templates(plan, role, text) if self.job.judge.kind == "chat" else []
        return ballots_for(self.job.judge, pairs, text, role, self.job.seed, self.judge_name, templates)

    def _check_calibration(self, plan: Plan, text: Constitution) -> None:
        """Before anything is sampled: what any pair would be asked must be what was calibrated."""
        if self.calibration:
            any_pair = Pair(id="any", prompt_id="any", first="first", second="second", method="check")
            ballots, asked = self._ballots(plan, "decide", [any_pair], text), Asked.by(self.job)
            check_calibrated(ballots, self.calibration, self.job.filters, asked=asked)
            if why := self.calibration.cut_off_mismatch(asked.cut_off_counts):
                # Whether an answer is cut off is known once it is sampled; an hour later is too late to say so.
                if self.job.filters.uncalibrated == "stop":
                    check_calibrated(ballots, self.calibration, self.job.filters, asked=asked._replace(ends=CUT_OFF))
                elif self._event_once("cut_off_uncalibrated", f"such pairs are dropped (uncalibrated): {why}", 0):
                    self.progress.note(f"such pairs are dropped (uncalibrated): {why}")

    def _settled(self, votes: list[Vote], in_rounds: list[list[Ballot]], number: int, text: Constitution) -> set[str]:
        """Pairs that round `number` can leave out, by the votes of the rounds before it."""
        earlier = {b.id for ballots in in_rounds[:number] for b in ballots}
        of_pair = by_pair([v for v in votes if v.ballot.id in earlier])
        left: dict[str, list[Ballot]] = {}
        for ballot in (b for ballots in in_rounds[number:] for b in ballots):
            left.setdefault(ballot.pair_id, []).append(ballot)
        return {p for p, mine in of_pair.items() if settled(mine, left.get(p, []), self.job.filters, text.weights)}

    def _decide(
        self,
        here: StageDir,
        role: Role,
        pairs: list[Pair],
        votes: list[Vote],
        completions: list[Completion],
        prompts: dict[str, Prompt],
        text: Constitution,
    ) -> list[Decision]:
        texts = {c.id: c.text for c in completions}
        cut = {c.id for c in completions if c.cut_off}
        filters, of_pair = self.job.filters, by_pair(votes)
        # A calibration is a promise about pairs that train; held-out pairs only measure.
        calibration = self.calibration if role == "decide" else None
        how = Asked.by(self.job) if calibration else None

        def produce(_: list[Decision]) -> Iterator[list[Decision]]:
            jurors = self._jurors(here, votes)
            made = []
            for pair in pairs:
                slice = prompts[pair.prompt_id].category or EVERYTHING
                mine = of_pair[pair.id]
                asked = how and how._replace(ends=ends_of(pair, cut))
                made.append(
                    decide_votes(pair, mine, filters, texts, text.weights, jurors, calibration, slice, cut, asked)
                )
            # Held-out pairs are never labelled: they only measure.
            yield to_review(made, filters) if role == "decide" else made

        return here.rows("decisions", Decision, produce, inputs=["votes"], resumable=False)

    def _jurors(self, here: StageDir, votes: list[Vote]) -> JurorFit | None:
        """What each juror's votes weigh; written beside the decisions that follow from it."""
        calibrated = self.calibration.jurors if self.calibration else None
        fit = jurors_for(self.job.filters.aggregate, votes, calibrated)
        if fit is not None:
            write_json(here.path / "jurors.json", fit.model_dump(mode="json"))
        return fit

    def _tell_jurors(self, k: int, here: StageDir, votes: list[Vote], decisions: list[Decision]) -> JurorFit | None:
        """Notes what a jury's weights are and how its jurors agree; the weights, where it has such."""
        path = here.path / "jurors.json"
        fit = read_record(path, JurorFit) if path.exists() else None
        agreement = monitors.juror_agreement(votes, decisions)
        if fit is None and not agreement:
            return None
        said = []
        for juror in sorted({*agreement, *(fit.weights if fit else ())}):
            weight = f"weight {fit.weights.get(juror, 1.0):.2f}, " if fit else ""
            share = agreement.get(juror)
            said.append(f"{juror} ({weight}agrees on {'no pair' if share is None else f'{share:.0%}'})")
        message = "jurors and how often they name the verdict's side: " + ", ".join(said)
        if fit is not None and not fit.fitted:
            message += f"; no weights were fitted on {fit.pairs} pairs"
        data = {"weights": fit.weights if fit else {}, "fitted": bool(fit and fit.fitted), "agreement": agreement}
        if self._event_once("jurors", message, k, **data):
            self.progress.note(f"iteration {k + 1}: {message}")
        return fit

    def _mix(
        self,
        k: int,
        here: StageDir,
        prompts: dict[str, Prompt],
        completions: list[Completion],
        pairs: list[Pair],
        decisions: list[Decision],
        text: Constitution,
    ) -> list[Preference]:
        labels: dict[str, Any] = {}

        def produce(_: list[Preference]) -> Iterator[list[Preference]]:
            now = read_now(self.dir)
            human, joined = labelled(self.dir, now, k, prompts, text)
            fresh = human + preferences_of(k, prompts, completions, pairs, decisions, text)
            labels.update(joined)
            yield fresh + replayed(self.dir, now, k, fresh, self.job.replay, self.job.seed, text)

        rows = here.rows(
            "preferences",
            Preference,
            produce,
            inputs=["decisions"],
            resumable=False,
            before_commit=lambda: {"labels": labels} if labels else {},
        )
        self._tell_labels(k)
        return rows

    def _tell_labels(self, k: int) -> None:
        """Notes which labels joined an update, how many can't yet, and what couldn't be read of them."""
        found = labels_noted(self.dir.iteration(k))
        before = labels_noted(self.dir.iteration(k - 1)) if k else {}
        events: list[tuple[str, str, dict[str, Any]]] = [("alarm", p, {}) for p in found.get("problems", [])]
        if joined := found.get("joined"):
            message = f"{len(joined)} pairs join the update as people labelled them"
            events.append(("labels_joined", message, {"pairs": joined}))
        if (stale := found.get("stale")) and stale != before.get("stale"):
            message = f"{stale} human labels wait: their pairs were judged under another text than the one in force"
            events.append(("labels_stale", message, {"labels": stale}))
        for kind, message, data in events:
            if self._event_once(kind, message, k, **data):
                self.progress.note(f"iteration {k + 1}: {message}")

    def _update(self, k: int, here: StageDir, preferences: list[Preference], text: Constitution) -> list[UpdateStep]:
        fresh = sum(p.source != "replay" for p in preferences)
        skip = fresh < self.job.filters.min_kept_pairs
        policy_digest = ""

        def produce(_: list[UpdateStep]) -> Iterator[list[UpdateStep]]:
            if skip:
                return
            self._load_learner(k)
            self._learner_at = None  # until this update is committed, the learner's weights belong to no version
            total = -(-len(preferences) // self.job.learner.batch_size) * self.job.learner.epochs
            self.progress.stage(k, "update", total, "steps", str(text.ref))
            for step in self.learner.stream("update", preferences=preferences, iteration=k):
                self.progress.advance(1)
                yield [step]

        def commit() -> dict[str, Any]:
            nonlocal policy_digest
            if skip:
                return {"skipped": True}
            state, policy = self._state(k), here.path / "policy"
            for folder in (state, policy):
                shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
            policy_digest = self.learner.call("save", state_dir=f"{state}.partial", policy_dir=f"{policy}.partial")
            replace_dir(Path(f"{policy}.partial"), policy)
            replace_dir(Path(f"{state}.partial"), state)
            self._learner_at = k + 1
            exported = self.learner.call("exports_in")
            return {"skipped": False, "policy_digest": policy_digest, "exported": exported}

        steps = here.rows("updates", UpdateStep, produce, inputs=["preferences"], resumable=False, before_commit=commit)
        if skip:
            least = self.job.filters.min_kept_pairs
            kept = "kept or labelled" if any(p.source == "human" for p in preferences) else "kept"
            message = f"{fresh} {kept} pairs, fewer than filters.min_kept_pairs={least}: no update"
            if self._event_once("skipped_update", message, k, kept=fresh):
                self.progress.note(f"iteration {k + 1}: {message}")
        else:
            for old in (self.dir.path / "learner").glob("*"):
                if old.name != f"{k:04d}":
                    shutil.rmtree(old, ignore_errors=True)
        return steps

    def _evaluate(self, updates: int, plan: Plan, text: Constitution) -> EvaluationMetrics:
        """Held-out answers of the policy after `updates` iterations, against the base policy's, under a plan's text."""
        here = self.dir.evaluation(updates)
        if (here.path / "metrics.json").exists():
            return read_record(here.path / "metrics.json", EvaluationMetrics)
        started = time.monotonic()
        prompts = self.held_out[: self.job.eval.prompts]
        by_id = {p.id: p for p in prompts}
        policy, _ = self._policy_before(updates)
        shown = max(updates - 1, 0)
        judged = updates != BASE_POLICY and (self.job.judge.kind == "chat" or bool(evaluating_voices(text)))

        def sample(_: list[Completion]) -> Iterator[list[Completion]]:
            self._load_sampler(updates)
            self.progress.stage(shown, "held-out", len(prompts) * self.job.eval.samples, "answers", str(text.ref))
            yield from self._advancing(
                self.sampler.stream(
                    "sample",
                    prompts=prompts,
                    completions_per_prompt=self.job.eval.samples,
                    policy=policy,
                    seed=self.job.seed,
                    iteration=EVAL_SEED_ITERATION,
                    prefix=f"eval{updates:04d}",
                    temperature=self.job.eval.temperature,
                    top_p=self.job.eval.top_p,
                )
            )

        sampled = here.rows("completions", Completion, sample, resumable=False, before_commit=self._gap_noted)
        completions = _in_order(sampled, list(by_id))

        def measure(_: list[Quality]) -> Iterator[list[Quality]]:
            self.progress.stage(shown, "sanity", len(completions), "answers", str(text.ref))
            candidates = _candidates(completions, by_id)
            yield from self._advancing(self.measurer.stream("quality", candidates=candidates, seed=self.job.seed))

        quality = here.rows("quality", Quality, measure, inputs=["completions"], resumable=False)
        drift = self._drift(here, updates, policy, prompts[: self.job.eval.kl_prompts], text)
        pairs: list[Pair] = []
        votes: list[Vote] = []
        decisions: list[Decision] | None = None
        if updates != BASE_POLICY:
            base = _in_order(self.dir.evaluation(BASE_POLICY).read("completions", Completion), list(by_id))
            pairs = [
                Pair(id=f"eval{updates:04d}-{c.prompt_id}-{c.index}", prompt_id=c.prompt_id, first=c.id, second=b.id,
                     method="against_base")
                for c, b in zip(completions, base, strict=True)
                if c.text != b.text and judged
            ]  # fmt: skip
            here.rows("pairs", Pair, lambda _: [pairs], inputs=["completions"], resumable=False)
            votes = self._judge(here, "evaluate", plan, pairs, completions + base, by_id, text)
            made = self._decide(here, "evaluate", pairs, votes, completions + base, by_id, text)
            decisions = made if judged else None
        seconds = round(time.monotonic() - started, 1)
        metrics = monitors.evaluation_metrics(
            updates, text, completions, quality, pairs, decisions, seconds, drift, gap=self._gap_of(here)
        )
        write_json(here.path / "metrics.json", metrics.model_dump(mode="json"))
        number = self._text_number(plan.iteration)
        self._track(shown, updates, tracking.of_evaluation(metrics, votes, self.job.judge, number))
        return metrics

    def _drift(
        self, here: StageDir, updates: int, policy: PolicyVersion, prompts: list[Prompt], text: Constitution
    ) -> list[Divergence] | None:
        """KL from the base policy, on answers as the policy itself gives them: at temperature 1 and top-p 1. None when
        the job doesn't want it; empty for the base policy itself, which needs no measuring."""
        if not prompts:
            return None
        if policy.digest == self.base_digest:
            return []
        shown = max(updates - 1, 0)

        def sample(_: list[Completion]) -> Iterator[list[Completion]]:
            self._load_sampler(updates)
            self.progress.stage(shown, "untempered", len(prompts), "answers", str(text.ref))
            yield from self._advancing(
                self.sampler.stream(
                    "sample",
                    prompts=prompts,
                    completions_per_prompt=1,
                    policy=policy,
                    seed=self.job.seed,
                    iteration=EVAL_SEED_ITERATION,
                    prefix=f"kl{updates:04d}",
                    temperature=1.0,
                    top_p=1.0,
                )
            )

        sampled = here.rows("kl_completions", Completion, sample, resumable=False)

        def measure(_: list[Divergence]) -> Iterator[list[Divergence]]:
            self._load_learner(updates)
            self.progress.stage(shown, "KL", len(sampled), "answers", str(text.ref))
            completions = _in_order(sampled, [p.id for p in prompts])
            yield from self._advancing(self.learner.stream("divergences", completions=completions))

        return here.rows("divergences", Divergence, measure, inputs=["kl_completions"], resumable=False)

    def _evaluate_after(self, k: int) -> None:
        """Evaluates what iteration k made under its text, unless its plan had that done, and tells the alarms."""
        plan = self._plan_of(k)
        evaluation = self._evaluate(k + 1, plan, self.texts.load(plan.constitution))
        ended = read_record(self.dir.iteration(k).path / "metrics.json", IterationMetrics)
        self._stop_at(k, self._alarms(k, ended, evaluation))  # its own alarms were told when it ended

    # What the stages share.

    def _advancing(self, chunks: Iterator[list[Any]]) -> Iterator[list[Any]]:
        for chunk in chunks:
            yield chunk
            self.progress.advance(len(chunk))

    def _track(self, k: int, updates: int, values: dict[str, float | str]) -> None:
        """Gives trackers what is in a metrics.json that was just written, at the optimizer step after so many
        iterations. After, not before: a run that goes on never gives them twice. Tells which trackers failed."""
        made = (self.dir.iteration(i).read("updates", UpdateStep) for i in range(updates - 1, -1, -1))
        step = next((steps[-1].step for steps in made if steps), 0)
        for failed in self.learner.call("track", values=values, step=step):
            self.dir.event("tracker_failed", failed, k)
            self.progress.note(failed)

    def _text_number(self, k: int) -> int:
        """The text of iteration k, counted through the run's different texts from 1."""
        hashes = [self._plan_of(i).constitution.hash for i in range(k + 1)]
        return list(dict.fromkeys(hashes)).index(hashes[-1]) + 1

    def _plan_of(self, k: int) -> Plan:
        return self.dir.plan(k)

    def _policy_before(self, k: int) -> tuple[PolicyVersion, Path]:
        """The policy that iteration k samples from: version and folder."""
        for i in range(k - 1, -1, -1):
            if (made := self.dir.iteration(i).policy_made()) is not None:
                version = PolicyVersion(iteration=i + 1, digest=made)
                return version, self.dir.iteration(i).path / "policy"
        return PolicyVersion(iteration=0, digest=self.base_digest), self.base_model

    def _load_sampler(self, k: int) -> None:
        version, path = self._policy_before(k)
        has = self._sampler_has or self.base_digest
        if has != version.digest:
            if not path.exists():
                raise RlaifError(f"{path}: the policy's weights are gone; restore them, or start a new run")
            self.sampler.call("load", policy_path=str(path))
        self._sampler_has = version.digest
        self._compare_weights(k, version)

    def _compare_weights(self, k: int, version: PolicyVersion) -> None:
        """After every load, and before the first sample: do sampler and learner hold the same policy?

        Raises:
            RlaifError: they plainly don't; whatever was sampled would be another model's.
        """
        if self._gap is not None and self._gap[0] == version.digest:
            return
        self._load_learner(k)
        if not self._fixed:
            self._fixed = self.sampler.call("sequences_of", prompts=self.held_out)
        if not self._fixed:  # a tokenizer that knows no word of the prompts
            return
        ours = self.sampler.call("logprobs", sequences=self._fixed)
        theirs = self.learner.call("logprobs", sequences=self._fixed)
        exported = "as given"
        if version.iteration:  # what it was written in then: this process may compute in something else
            exported = self.dir.iteration(version.iteration - 1).meta("updates").get("exported", "bf16")
        gap = weights_gap(ours, theirs, self.sampler.call("computes_in"), exported)
        if gap.typical > WRONG:
            raise RlaifError(
                f"the sampler ({gap.sampler}) doesn't hold the policy that is trained: log-probabilities of fixed "
                f"texts differ by {gap.typical:.2f} nats a token. `rlaif doctor --deep {self.job.policy.model}` says "
                "where it happens; sampling.engine: transformers may be safe"
            )
        if exported == "fp32" and not gap.sampler.endswith("fp32"):
            message = (
                f"the newest policy was exported in fp32 and {gap.sampler} rounds it to the nearest, so some of its "
                "last updates are missing in what is sampled until the next one"
            )
            if self._event_once("alarm", message, k):
                self.progress.note(f"alarm in iteration {k + 1}: {message}")
        self._gap = (version.digest, gap)

    def _gap_noted(self) -> dict[str, Any]:
        """For the meta file of what was just sampled."""
        return {"weights_gap": self._gap[1].model_dump(mode="json")} if self._gap else {}

    @staticmethod
    def _gap_of(here: StageDir) -> WeightsGap | None:
        found = here.meta("completions").get("weights_gap")
        return WeightsGap.model_validate(found) if found else None

    def _state(self, k: int) -> Path:
        return self.dir.path / "learner" / f"{k:04d}"

    def _load_learner(self, k: int) -> None:
        """Brings the learner to the state before iteration k, unless it is there already."""
        updated = [i for i in range(k) if self.dir.iteration(i).policy_made() is not None]
        behind = updated[-1] + 1 if updated else 0
        if self._learner_at == behind:
            return
        if behind:
            self.learner.call("load", state_dir=str(self._state(behind - 1)))
        self._learner_at = behind

    def _prune_policies(self, k: int) -> None:
        """Keeps the weights of evaluated policies and of the newest; each costs the size of the model."""
        newest = self._policy_before(k + 1)[1]
        for i in range(k):
            policy = self.dir.iteration(i).path / "policy"
            evaluated = self.dir.evaluation(i + 1).path.exists()
            if policy.exists() and policy != newest and not evaluated:
                shutil.rmtree(policy)

    def _alarms(self, k: int, metrics: IterationMetrics, evaluation: EvaluationMetrics | None) -> list[str]:
        """Tells the alarms of an iteration, and returns those that weren't told before."""
        calibrated = self.calibration.judged if self.calibration else None
        learned = bool(self.calibration and self.calibration.jurors and self.calibration.jurors.source == "labels")
        alarms = monitors.alarms(self.job.monitors, metrics, evaluation, calibrated, learned)
        new = [alarm for alarm in alarms if self._event_once("alarm", alarm, k)]
        for alarm in new:
            self.progress.note(f"alarm in iteration {k + 1}: {alarm}")
        return new

    def _stop_at(self, k: int, alarms: list[str]) -> None:
        if alarms and self.job.monitors.stop_on_alarm:
            raise RlaifError(f"stopped at an alarm in iteration {k + 1}: {alarms[0]} (monitors.stop_on_alarm)")


def _candidates(completions: list[Completion], prompts: dict[str, Prompt]) -> list[Candidate]:
    return [Candidate.of(c, prompts[c.prompt_id]) for c in completions]


def _in_order(completions: list[Completion], prompt_ids: list[str]) -> list[Completion]:
    """By prompt, then by sample: the order in which they finished must not decide anything."""
    rank = {p: i for i, p in enumerate(prompt_ids)}
    return sorted(completions, key=lambda c: (rank[c.prompt_id], c.index))


def _as_cast(votes: list[Vote], ballots: list[Ballot], complete: bool) -> list[Vote]:
    """Votes in the order of their ballots, whatever order they arrived in; `complete` when none may be left out."""
    by_ballot = {v.ballot.id: v for v in votes}
    if complete and (missing := [b for b in ballots if b.id not in by_ballot]):
        raise RlaifError(f"the judge left {len(missing)} of {len(ballots)} ballots unanswered, first {missing[0].id}")
    return [by_ballot[b.id] for b in ballots if b.id in by_ballot]
