"""What a simulated run says to who plans one: time, use, what holds it up, cost, and what would change that."""

from __future__ import annotations

from rlaif.records import Record
from rlaif.simulation.cluster import Setup
from rlaif.simulation.simulate import PACE, Simulated, simulate
from rlaif.simulation.work import Work


class Change(Record):
    """The same run with one thing changed."""

    change: str
    iteration_s: float
    faster: float
    """How many times."""
    gpus: float
    cost: float


class Outlook(Record):
    """A run as it would be."""

    iteration_s: float
    """On average, evaluations among them."""
    hours: float
    """All iterations, after the models are loaded."""
    use: dict[str, float]
    """Role → share of its slots' time that it works."""
    work_s: dict[str, float]
    """Role → seconds an iteration that its work takes at full use. The largest is what an iteration can come down to
    when all else happens meanwhile."""
    spent_s: dict[str, float]
    """Stage → seconds an iteration that the loop spends on it or waits for it."""
    bottleneck: str
    """The stage that most of an iteration is spent on; with the limit, where one holds it up."""
    gpus: float
    cost: float
    """Of the whole run: machines, and ballots by `judge.prices`."""
    judge_cost: float
    """Of that, the ballots."""
    changes: tuple[Change, ...]
    hints: tuple[str, ...]


def outlook(work: Work, setup: Setup) -> Outlook:
    """Simulates a run, and what one more of each role would bring.

    Raises:
        UserError: it would never end.
    """
    run = simulate(work, setup)
    use = {role: round(share, 4) for role, share in run.use.items()}
    return Outlook(
        iteration_s=run.iteration_s,
        hours=run.ends_s[-1] / 3600,
        use=use,
        work_s={role: share * run.ends_s[-1] / work.iterations for role, share in run.use.items()},
        spent_s={stage: seconds / work.iterations for stage, seconds in run.spent_s.items()},
        bottleneck=_bottleneck(run),
        gpus=setup.gpus,
        cost=_cost(work, setup, run),
        judge_cost=_judge_cost(work, setup),
        changes=tuple(_change(name, work, changed, run.iteration_s) for name, changed in _changes(work, setup)),
        hints=tuple(_hints(work, setup)),
    )


def _bottleneck(run: Simulated) -> str:
    stage = max(run.spent_s, key=lambda stage: run.spent_s[stage])
    role = {"judging": "judge", "sampling": "sampler"}.get(stage)
    if role is None:
        return stage
    limits = [limit for limit in (PACE, "loop") if run.use.get(limit, 0.0) > run.use[role]]
    return f"{stage} ({limits[0]})" if limits else stage


def _change(name: str, work: Work, setup: Setup, before_s: float) -> Change:
    run = simulate(work, setup)
    cost, faster = _cost(work, setup, run), before_s / run.iteration_s
    return Change(change=name, iteration_s=run.iteration_s, faster=faster, gpus=setup.gpus, cost=cost)


def _changes(work: Work, setup: Setup) -> list[tuple[str, Setup]]:
    """What is tried: one more of each role, and what the pipeline doesn't do yet."""
    roles, pipeline = setup.cluster, setup.overlap(work)

    def more(role: str, count: str, so_many: int) -> Setup:
        section = getattr(roles, role).model_copy(update={count: so_many})
        return setup.model_copy(update={"cluster": roles.model_copy(update={role: section})})

    def piped(**how: bool | int) -> Setup:
        return setup.model_copy(update={"pipeline": pipeline.model_copy(update=how)})

    found = [
        ("one more sampler", more("sampler", "replicas", roles.sampler.replicas + 1)),
        ("one more judge", more("judge", "replicas", roles.judge.replicas + 1)),
    ]
    learners = next((n for n in range(roles.learner.processes + 1, work.batch + 1) if work.batch % n == 0), None)
    if learners is not None:  # a step's pairs are shared out evenly
        found.append((f"{learners} learner processes", more("learner", "processes", learners)))
    if work.in_turns:
        return found
    stale = pipeline.staleness + 1
    if not pipeline.stream:
        found.append(("pipeline.stream: true", piped(stream=True)))
    found.append((f"pipeline.staleness: {stale}", piped(staleness=stale)))
    if not pipeline.stream:
        found.append((f"pipeline: {{stream: true, staleness: {stale}}}", piped(stream=True, staleness=stale)))
    return found


def _cost(work: Work, setup: Setup, run: Simulated) -> float:
    prices, hours = setup.rates.prices, run.ends_s[-1] / 3600
    return hours * (setup.gpus * prices.gpu_hour + prices.hour) + _judge_cost(work, setup)


def _judge_cost(work: Work, setup: Setup) -> float:
    judge = setup.rates.judge
    ballots = setup.rates.answers.asked * (work.iterations * work.ballots + len(work.evaluated) * work.held_out_ballots)
    ballots += sum(work.anchors)
    return ballots * (judge.prompt_tokens * work.prompt_price + judge.completion_tokens * work.completion_price) / 1e6


def _hints(work: Work, setup: Setup) -> list[str]:
    hints = []
    roles, rates, most = setup.cluster, setup.rates, work.judges_at_once
    room = (rates.judge.at_once or 0) * roles.judge.replicas
    if most is not None and most < room:
        hints.append(
            f"judge.concurrency={most} sends fewer ballots at once than the judges could take ({room}); raise it"
        )
    if rates.prices.gpu_hour and not setup.gpus:
        hints.append(
            "rates.prices.gpu_hour is given, and no role has GPUs, so they cost nothing; give cluster.sampler.gpus, "
            "cluster.judge.gpus and cluster.learner.gpus"
        )
    if work.batch % roles.learner.processes:
        hints.append(
            f"learner.batch_size={work.batch} can't be shared out evenly to {roles.learner.processes} processes: a run "
            "refuses that"
        )
    loading = rates.weights.at_once
    if loading and loading < roles.sampler.replicas:
        hints.append(f"rates.weights.at_once={loading} of {roles.sampler.replicas} samplers load at once; others wait")
    return hints
