"""The loop itself: plan, sample, score, pair, judge, decide, mix, update, evaluate; each a durable stage.

It holds no model: it talks to its workers (sampler, judge, learner, measurer) in records and paths.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterable
from itertools import chain

from rlaif import monitors
from rlaif.config import Job
from rlaif.data.prompts import prompts_for
from rlaif.errors import RunPaused, WorkerDied
from rlaif.judging.calibration import judged_stats
from rlaif.judging.kinds import kind_of
from rlaif.judging.verdicts import JurorFit
from rlaif.loop.ahead import Ahead, Aside, Later
from rlaif.loop.anchors import ask_again
from rlaif.loop.evaluation import evaluate
from rlaif.loop.hand_over import decoding_of, gap_of
from rlaif.loop.judging import base_logprobs, check_calibration, decide, judge, pair, score
from rlaif.loop.old_pairs import judge_old_pairs
from rlaif.loop.retention import BASE_POLICY, at_change
from rlaif.loop.running import Iteration, Running
from rlaif.loop.sampling import sample
from rlaif.loop.source import take_over
from rlaif.loop.streaming import sample_and_judge
from rlaif.loop.training import mix, stopped_at_kl, update
from rlaif.monitors import tracking
from rlaif.records import Alarm, EvaluationMetrics, IterationMetrics, Plan, Vote
from rlaif.rundir.checkpoints import checkpoints
from rlaif.rundir.heads import Head, write_head
from rlaif.rundir.stages import ITERATION_NAMES, MORE_VOTES
from rlaif.rundir.store import RunDir, read_record, write_json


def sampled_and_judged(run: Running, it: Iteration) -> Iteration:
    """The first half of an iteration, all of it before anything is decided: completions, scores, pairs and votes."""
    if run.stream:
        sample_and_judge(run, it)
    it.completions = sample(run, it)
    it.scores = score(run, it)
    it.pairs = pair(run, it)
    it.votes = judge(run, it)
    return it


def alarms_owed(run: RunDir, job: Job) -> list[Alarm]:
    """Alarms of the last iteration that is done which have not stopped the run. A kill may have come between an alarm
    and its pause, or between that and the way back: a rollback takes its alarm out of the log, so one that is there
    still wasn't done. Meanwhile the job may say otherwise what is to be done about it."""
    told: list[Alarm] = []
    back_to: int | None = None
    done = run.done()
    for e in run.events():
        if e.kind == "paused":
            back_to = e.data.get("back_to")
        if e.kind in ("branched", "rolled_back"):  # whoever did that goes on from what was alarming all the same
            told, back_to = [], None
        if e.kind == "alarm" and done and e.iteration == done[-1]:
            alarm = Alarm(message=e.message, iteration=done[-1], **e.data)
            now = getattr(job.monitors, alarm.kind, alarm).action  # not every kind is a monitor's
            if {alarm.action, now} <= {"pause", "rollback"}:
                told.append(alarm.model_copy(update={"action": now}))
        elif back_to is None and f"{e.kind} {e.message}".startswith(("paused ", "stopped RunPaused: paused at")):
            told = []  # the second is how older versions say it
    return told


class Loop(Running):
    """`run()` continues at the first incomplete stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ahead = Ahead()
        self._since = time.monotonic()

    def run(self) -> Head:
        """All iterations that are still owed; returns the head of the whole."""
        self._since = time.monotonic()
        with self._ahead:
            if done := self.dir.done():
                self._pause_at(done[-1], alarms_owed(self.dir, self.job))
            if self.job.pipeline.staleness:
                self._make_room_ahead()
            for k in range(self.job.iterations):
                if not (self.dir.iteration(k).path / "metrics.json").exists():
                    self.iterate(k)
            # Planned already, unless a resumed run has fewer iterations.
            self._evaluate_after(self.job.iterations - 1)
        self.hand_over.forget_copy()
        return write_head(self.dir)  # a new one where a kill came between an iteration's metrics and its head

    def iterate(self, k: int) -> None:
        """One iteration, from its first incomplete stage on."""
        it = self._begin(k)
        if self.source:
            take_over(self, it, self.source)
        else:
            begun = it
            it = self._ahead.take(k) or sampled_and_judged(self, begun)
            it.at_change = begun.at_change
            self.go_ahead(k)
        base_logprobs(self, it)
        it.decisions = decide(self, it)
        it.old_pairs = judge_old_pairs(self, it)
        it.training = mix(self, it)
        it.steps = update(self, it)
        it.anchors = ask_again(self, it)
        if it.plan.evaluate:
            self._evaluate(k + 1, it.plan)
        self._end(it)

    def _make_room_ahead(self) -> None:
        """From now on who uses sampler or judge here waits for iterations ahead; these use them through `_view`."""
        if len(self.dir.done()) <= self.job.pipeline.staleness:
            self.hand_over.look_ahead(0)  # the learner holds the base policy still
        self._view = copy.copy(self)
        self._view.hand_over = self.hand_over.seen_by(self._view)
        same = self.measurer is self.judge
        self.sampler, self.judge = Later(self.sampler, self._ahead.wait), Later(self.judge, self._ahead.wait)
        if same:
            self.measurer = self.judge

    def go_ahead(self, k: int) -> None:
        """Begins the iterations after k whose policy is there before k's update, as far as `pipeline.staleness` goes:
        their plans first."""
        for j in range(k + 1, min(k + self.job.pipeline.staleness, self.job.iterations - 1) + 1):
            if self._ahead.has(j):
                continue
            planned = (self.dir.iteration(j).path / "plan.json").exists()
            if not planned and self.hand_over.policy_for(j, newest=k) is None:
                return
            plan = self._plan(j, newest=k)
            if j - plan.staleness > k:  # planned when the setting was another
                return
            if self.hand_over.needs_learner(j - plan.staleness):  # planned when exports were fp32: done in order
                return
            it = self._iteration(plan)
            check_calibration(self, it)
            if j - plan.staleness == k:
                self.hand_over.look_ahead(k)
            view = copy.copy(self._view)
            view.hand_over, view.progress = self.hand_over.seen_by(view), (progress := Aside(self.progress))
            self._ahead.begin(it, functools.partial(sampled_and_judged, view, it), progress)

    def _iteration(self, plan: Plan) -> Iteration:
        constitution = self.in_force.load(plan.constitution, plan.derived)
        return Iteration(plan, self.dir.iteration(plan.iteration), constitution, {p.id: p for p in self.train})

    def _begin(self, k: int) -> Iteration:
        """The plan and the text in force; what a first iteration and a change of text owe before they sample."""
        plan = self._plan(k, newest=k)
        it = self._iteration(plan)
        now = plan.in_force.constitution
        changed = k > 0 and self.dir.plan(k - 1).in_force.constitution.hash != now.hash
        if changed:  # not told when the plan is written: a run killed in between would never tell it
            message = f"after {k} iterations, {now} ({now.hash}) is in force"
            if self.event_once("constitution_changed", message, k, **now.model_dump()):
                self.progress.note(f"constitution changed: {message}")
        check_calibration(self, it)
        if not it.dir.is_complete("updates"):
            self.hand_over.check_reference(k)
        if k == 0:
            self._evaluate(BASE_POLICY, plan)
        elif changed:
            self._evaluate_after(k - 1)
            it.at_change = at_change(self, it)
        return it

    def _plan(self, k: int, newest: int) -> Plan:
        """Iteration k's, made now where there is none: from a policy that `newest` iterations are behind at most."""
        here = self.dir.iteration(k)
        path = here.path / "plan.json"
        if path.exists():
            return self.dir.plan(k)
        found = self.hand_over.policy_for(k, newest)
        assert found is not None, "who plans ahead looks first"
        policy, staleness = found
        constitution, templates = self.in_force.at(k)
        last = k + 1 == self.job.iterations
        source, earlier = self.source, [self.dir.plan(i) for i in range(k)]
        # Of what was sampled: a branch may have taken pairs from elsewhere in between, or so many prompts no longer.
        sampled = [len(before.prompt_ids) for before in earlier if before.source is None]
        asked = [] if source else prompts_for(self.train, self.job.seed, sampled, self.job.prompts.per_iteration)
        plan = Plan(
            iteration=k,
            seed=self.job.seed,
            constitution=constitution.ref,
            templates=templates,
            derived={constitution.wordings.id: constitution.wordings.hash} if constitution.wordings else {},
            code=self.code,
            policy=policy,
            staleness=staleness,
            prompt_ids=tuple(p.id for p in asked),
            evaluate=last or (k + 1) % self.job.eval.every == 0,
        )
        if source:  # counted from where it began: what was before, this run may have sampled, or taken elsewhere
            given = [before.source for before in earlier if before.source and source.gave(before.source)]
            plan = source.planned(plan, given, self.dir)
        here.path.mkdir(parents=True, exist_ok=True)
        write_json(path, plan.model_dump(mode="json"))
        return plan

    def _end(self, it: Iteration) -> None:
        """The iteration in numbers, its alarms, its head."""
        jurors_file = it.dir.path / "jurors.json"
        fit = read_record(jurors_file, JurorFit) if jurors_file.exists() else None
        ends, texts = {c.id: c.finish_reason for c in it.completions}, {c.id: c.text for c in it.completions}
        more_votes = [vote for stage in MORE_VOTES for vote in it.dir.durable(stage, Vote)]  # none in most iterations
        metrics = monitors.iteration_metrics(
            it.plan,
            it.completions,
            it.pairs,
            it.votes,
            it.decisions,
            it.training,
            it.steps,
            ballots=it.dir.meta("votes").get("ballots", len(it.votes)),
            seconds={stage: it.dir.meta(stage)["seconds"] for stage in ITERATION_NAMES if it.dir.is_complete(stage)},
            jurors=fit,
            judged=judged_stats(
                [(p, d) for p, d in zip(it.pairs, it.decisions, strict=True) if d.source == "votes"], texts, ends
            ),
            gap=gap_of(it.dir),
            decoding=decoding_of(it.dir),
            stopped_at_kl=stopped_at_kl(self, it, it.steps),
            old_pairs=it.old_pairs,
            more_votes=more_votes,
            anchors=it.anchors,
            at_change=it.at_change,
            wall_s=round(time.monotonic() - self._since, 3),
            streamed_votes=it.dir.meta("completions").get("votes"),
            servers=kind_of(self.job.judge).listed(self.servers),
        )
        self._tell_jurors(it.k, fit, metrics.juror_agreement)
        history = self._history(metrics)
        for message in monitors.back_again(self.job.monitors, history):
            self.tell_once("judge_server", message, it.k)
        # With metrics.json the iteration is done and never looked at again: what it has to tell is told before.
        alarms = monitors.alarms(self.job.monitors, history)
        for alarm in alarms:
            self.raise_alarm(alarm)
        self.hand_over.prune(it.k)
        write_json(it.dir.path / "metrics.json", metrics.model_dump(mode="json"))
        votes, number = chain(it.votes, more_votes), self.text_number(it.k)
        told = tracking.of_iteration(metrics, votes, self.job.judge, number, self.dir.events())
        died: WorkerDied | None = None
        try:
            self.track(it.k, it.k + 1, told)
        except WorkerDied as e:  # it must not keep an alarm from pausing the run, which goes on with the next iteration
            died = e
        head = write_head(self.dir)
        self.progress.iteration_done(it.k, metrics)
        self.progress.note(f"head {head.name}")
        self._since = time.monotonic()
        self._pause_at(it.k, alarms)
        if died:
            raise died

    def _evaluate(self, updates: int, plan: Plan) -> EvaluationMetrics:
        """Held-out answers of the policy after `updates` iterations, under the text that was in force in a plan's."""
        plan = plan.in_force
        return evaluate(self, updates, plan, self.in_force.load(plan.constitution, plan.derived))

    def _evaluate_after(self, k: int) -> None:
        """Evaluates what iteration k made under its text, unless its plan had that done, and tells the alarms."""
        self._evaluate(k + 1, self.dir.plan(k))
        (ended,) = self.dir.iterations_measured([k])
        # Its own alarms were told when it ended.
        alarms = monitors.alarms(self.job.monitors, self._history(ended))
        self._pause_at(k, [alarm for alarm in alarms if self.raise_alarm(alarm)])

    def _tell_jurors(self, k: int, fit: JurorFit | None, agreement: dict[str, float | None]) -> None:
        """Notes what a jury's weights are, where it has such, and how its jurors agree."""
        if fit is None and not agreement:
            return
        said = []
        for juror in sorted({*agreement, *(fit.weights if fit else ())}):
            weight = f"weight {fit.weights.get(juror, 1.0):.2f}, " if fit else ""
            share = agreement.get(juror)
            said.append(f"{juror} ({weight}agrees on {'no pair' if share is None else f'{share:.0%}'})")
        message = "jurors and how often they name the verdict's side: " + ", ".join(said)
        if fit is not None and not fit.fitted:
            message += f"; no weights were fitted on {fit.pairs} pairs"
        data = {"weights": fit.weights if fit else {}, "fitted": bool(fit and fit.fitted), "agreement": agreement}
        self.tell_once("jurors", message, k, **data)

    def _history(self, metrics: IterationMetrics) -> monitors.History:
        """The run up to an iteration, which may have no metrics.json yet."""
        k = metrics.iteration
        return monitors.History(
            [*self.dir.iterations_measured(range(k)), metrics],
            self.dir.evaluations_measured(range(k + 2)),
            calibrated=self.calibration.judged if self.calibration else None,
            asked=monitors.asked_for(self.in_force.load(metrics.constitution)),
            learned=bool(self.calibration and self.calibration.jurors and self.calibration.jurors.source == "labels"),
        )

    def _pause_at(self, k: int, alarms: list[Alarm]) -> None:
        """Stops the run where an alarm says so; it was told, and stops no later attempt. Of several, what takes it back
        furthest.

        Raises:
            RunPaused: there is one.
        """
        stopping = [
            (*(self._way_back(alarm) if alarm.action == "rollback" else (None, "the same command goes on")), alarm)
            for alarm in alarms
            if alarm.action in ("pause", "rollback")
        ]
        if not stopping:
            return
        back_to, next_step, alarm = min(stopping, key=lambda s: (s[0] is None, s[0] or 0, s[2].action == "pause"))
        self.dir.event("paused", alarm.message, k, kind=alarm.kind, action=alarm.action, back_to=back_to)
        raise RunPaused(
            f"paused at an alarm in iteration {k + 1}: {alarm.message} (monitors.{alarm.kind}.action={alarm.action}); "
            f"{next_step}",
            back_to=back_to,
        )

    def _way_back(self, alarm: Alarm) -> tuple[int | None, str]:
        """After how many iterations an alarm's kind was silent last, before that began which it tells, of those whose
        state is kept; and what comes next, in words."""
        first = alarm.iteration if alarm.since is None else alarm.since
        measured = {m.iteration: m for m in self.dir.iterations_measured(range(first))}
        newest_first = [measured[j] for j in sorted(measured, reverse=True)]

        def silent(among: Iterable[IterationMetrics]) -> int | None:
            found = (m for m in among if monitors.silent(self.job.monitors, alarm.kind, self._history(m)))
            return next((m.iteration + 1 for m in found), None)

        whole = {found.iterations for found in checkpoints(self.dir) if found.policy and found.state}
        if (back_to := silent(m for m in newest_first if m.iteration + 1 in whole)) is not None:
            return back_to, f"it was silent after iteration {back_to}"
        if (gone := silent(newest_first)) is not None:
            said = f"it was silent after iteration {gone}, but nothing is kept to go back to (keep_checkpoints)"
            return None, f"{said}; the same command goes on from here"
        return None, "no earlier iteration was silent; the same command goes on"
