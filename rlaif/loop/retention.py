"""What is measured of forgetting and following: probes, fixed texts, and held-out answers under other texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from rlaif import evaluation
from rlaif.data.prompts import with_system
from rlaif.evaluation.held_out import under_text
from rlaif.judging.kinds import kind_of
from rlaif.judging.verdicts import by_pair, jurors_for
from rlaif.loop.asking import all_answered, ballots_for, cast_owed, sides_of, templates_for
from rlaif.loop.judging import Deciding, tell_interrupted
from rlaif.loop.running import Interrupted, Iteration, Running, in_order
from rlaif.loop.sampling import answers
from rlaif.records import (
    Completion,
    Decision,
    Pair,
    Plan,
    PolicyVersion,
    ProbeResult,
    Retention,
    TextScore,
    TokenSequence,
    UnderText,
    Vote,
)

BASE_POLICY = 0
"""The evaluation of the policy before any update."""


def retained(
    run: Running,
    it: Iteration,
    updates: int,
    policy: PolicyVersion,
    completions: list[Completion],
    base: Sequence[Completion],
) -> Retention | None:
    """What the policy after `updates` iterations still can; None where the job doesn't want it measured, or the base
    policy wasn't. `completions` are its held-out answers, `base` those of the base policy."""
    if not run.job.eval.retention:
        return None
    first = run.dir.evaluation(BASE_POLICY)
    if updates != BASE_POLICY and not first.is_complete("texts"):
        message = (
            "eval.retention: what is forgotten can't be measured, since the base policy wasn't when this run began; "
            "start a new run"
        )
        run.tell_once("retention_unknown", message, 0)
        return None
    results, texts = _probes(run, it, updates, policy), _texts(run, it, updates)
    if updates == BASE_POLICY:
        return evaluation.retention(results, results, texts, texts)
    earlier = _earlier(run, it, updates, completions, base)
    # The base policy's answers as they are checked today: its results may be an older version's.
    base_results = _checked(run, first.read("probe_completions", Completion))
    base_texts = first.read("texts", TextScore)
    return evaluation.retention(base_results, results, base_texts, texts, earlier)


def against_base(prefix: str, completions: Sequence[Completion], base: Sequence[Completion]) -> list[Pair]:
    """Each answer with the base policy's to the same prompt, where they differ."""
    return [
        Pair(id=f"{prefix}-{c.prompt_id}-{c.index}", prompt_id=c.prompt_id, first=c.id, second=b.id,
             method="against_base")
        for c, b in zip(completions, base, strict=True)
        if c.text != b.text
    ]  # fmt: skip


def _probes(run: Running, it: Iteration, updates: int, policy: PolicyVersion) -> list[ProbeResult]:
    """The probes, answered at temperature 0, each passed or not."""
    asked = with_system([p.asked() for p in run.probes], run.job.policy.system_prompt)

    def sample(_: list[Completion]) -> Iterator[list[Completion]]:
        run.hand_over.load_sampler(updates)
        run.progress.stage(max(updates - 1, 0), "probes", len(asked), "answers", str(it.constitution.ref))
        make = partial(answers, run, asked, policy, f"probe{updates:04d}", temperature=0.0, top_p=1.0)
        about = {"prompts": [p.model_dump(mode="json") for p in asked]}
        yield from run.evaluated("probe_completions", Completion, updates, about, make)

    rows = it.rows("probe_completions", sample, before_commit=lambda: run.from_cache("probe_completions", updates))
    return it.rows("probe_results", lambda _: [_checked(run, rows)])


def _checked(run: Running, answers: list[Completion]) -> list[ProbeResult]:
    """Which probes an answer passes."""
    answered = {c.prompt_id: c for c in answers}
    return [
        ProbeResult(probe_id=p.id, kind=p.kind, completion_id=c.id, passed=p.passes(c.text))
        for p in run.probes
        if (c := answered.get(p.id))
    ]


def _texts(run: Running, it: Iteration, updates: int) -> list[TextScore]:
    """The fixed texts, scored by the weights that train: nothing that a sampler rounds is in their perplexity."""

    def score() -> Iterator[list[TextScore]]:
        read: list[TokenSequence] = run.sampler.call("sequences_in", texts=[t.text for t in run.fixed_texts])
        run.hand_over.load_learner(updates)
        run.progress.stage(max(updates - 1, 0), "texts", len(read), "texts", str(it.constitution.ref))
        for text, sequence in zip(run.fixed_texts, read, strict=True):
            if sequence.token_ids:
                [logps] = run.learner.call("logprobs", sequences=[sequence])
                yield [TextScore(text_id=text.id, tokens=len(logps), logprob=sum(logps))]
            run.progress.advance(1)

    def rows(_: list[TextScore]) -> Iterator[list[TextScore]]:
        about = {"texts": [t.model_dump(mode="json") for t in run.fixed_texts]}
        yield from run.evaluated("texts", TextScore, updates, about, score)

    return it.rows("texts", rows, before_commit=lambda: run.from_cache("texts", updates))


def at_change(run: Running, it: Iteration) -> UnderText | None:
    """What the held-out answers of the policy that begins an iteration win under its text, which is a new one: their
    evaluation was under the text before. None where the new text has no question about them."""
    if not kind_of(run.job.judge).evaluates(it.constitution):
        return None
    prompts = {p.id: p for p in run.held_out[: run.job.eval.prompts]}
    completions, base = (
        in_order(run.dir.evaluation(updates).read("completions", Completion), prompts)
        for updates in (it.k, BASE_POLICY)
    )
    under = Iteration(it.plan, it.dir, it.constitution, prompts, role="evaluate", completions=completions + base,
                      pairs=against_base(f"change{it.k:04d}", completions, base))  # fmt: skip
    return _under(run, it, [under], completions, "change", "new text")[0]


def _earlier(
    run: Running, it: Iteration, updates: int, completions: list[Completion], base: Sequence[Completion]
) -> dict[str, UnderText]:
    """What the held-out answers won under each text that was in force before and isn't any more, by its hash."""
    its = [
        Iteration(plan, it.dir, constitution, it.prompts, role="evaluate", completions=it.completions,
                  pairs=against_base(f"eval{updates:04d}-{constitution.hash}", completions, base))
        for plan in earlier_plans(run, it.plan)
        if kind_of(run.job.judge).evaluates(constitution := run.in_force.load(plan.constitution, plan.derived))
    ]  # fmt: skip
    found = _under(run, it, its, completions, "earlier", "earlier text") if its else []
    return {under.constitution.hash: won for under, won in zip(its, found, strict=True)}


def _under(
    run: Running, it: Iteration, its: list[Iteration], completions: list[Completion], stages: str, label: str
) -> list[UnderText]:
    """What held-out answers win under the text of each of `its`; in the stages of `it` whose names begin so."""
    it.rows(f"{stages}_pairs", lambda _: [[pair for under in its for pair in under.pairs]])
    of_pair = by_pair(_votes(run, it, its, stages, label))
    calibrated = run.calibration.jurors if run.calibration else None

    def decide(_: list[Decision]) -> Iterator[list[Decision]]:
        for under in its:
            votes = [vote for pair in under.pairs for vote in of_pair[pair.id]]
            jurors = jurors_for(run.job.filters.aggregate, votes, calibrated)
            deciding = Deciding(run, under, under.completions, jurors)
            yield [deciding.decision(pair, of_pair[pair.id]) for pair in under.pairs]

    decisions = {d.pair_id: d for d in it.rows(f"{stages}_decisions", decide)}
    return [
        under_text(under.constitution, completions, under.pairs, [decisions[p.id] for p in under.pairs])
        for under in its
    ]


def _votes(run: Running, it: Iteration, its: list[Iteration], stages: str, label: str) -> list[Vote]:
    """The votes on each text's pairs, under that text."""
    kind, stage = kind_of(run.job.judge), f"{stages}_votes"
    journal = it.dir.path / f"{stage}.asked"
    ballots_of = [ballots_for(run, under, "evaluate", under.pairs) for under in its]
    ballots = [ballot for of_text in ballots_of for ballot in of_text]

    def cast(done: list[Vote]) -> Iterator[list[Vote]]:
        tell_interrupted(run, it.k, Interrupted.found(done, journal), ballots, journal)
        for under, of_text in zip(its, ballots_of, strict=True):
            how = {"pairs": under.pairs, "constitution": under.constitution}
            how |= kind.cast_with(templates_for(run, under, "evaluate"), journal)
            sides = sides_of(under.pairs, under.completions, under.prompts)
            yield from cast_owed(run, it, run.judge, label, of_text, done, sides, **how)

    votes = it.rows(stage, cast, before_commit=lambda: {"ballots": len(ballots)})
    journal.unlink(missing_ok=True)
    return all_answered(ballots, votes)


def earlier_plans(run: Running, plan: Plan) -> list[Plan]:
    """The newest plan under each text that was in force before and isn't under this plan, oldest text first."""
    newest: dict[str, Plan] = {}
    for k in range(plan.iteration):
        before = run.dir.plan(k).in_force
        newest[before.constitution.hash] = before
    return [before for digest, before in newest.items() if digest != plan.constitution.hash]
