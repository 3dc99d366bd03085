"""How many of each role there are, and how fast one is: a file for `rlaif run JOB --dry-run --cluster FILE`.

In: YAML with `cluster` (as a job has it), `rates`, perhaps `pipeline`; or a run's directory. Out: a `Setup`. What
`rates` doesn't say is measured from the run that `rates.from` names.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from rlaif.config import Job, Section, refuse_duplicate_keys, sections_in
from rlaif.errors import UserError, cant_read
from rlaif.rundir.store import RunDir
from rlaif.simulation.measured import measure, servers
from rlaif.simulation.work import Work


class Spread(Section):
    """A number that isn't always the same. One alone, in its place, always is."""

    median: float | None = Field(None, ge=0)
    """Half of them are below it."""
    spread: float = Field(1.0, ge=1)
    """Of a log-normal distribution: two thirds lie between `median / spread` and `median * spread`."""
    samples: tuple[float, ...] = ()
    """Measured ones to draw from, in place of `median` and `spread`."""

    @model_validator(mode="before")
    @classmethod
    def _number(cls, tree: Any) -> Any:
        return {"median": tree} if isinstance(tree, int | float) else tree

    @model_validator(mode="after")
    def _one_way(self) -> Spread:
        if (self.median is None) == (not self.samples):
            raise ValueError("give a number, or median (and spread), or samples")
        if min(self.samples, default=0) < 0:
            raise ValueError(f"samples: {min(self.samples)} is below 0")
        return self

    def draw(self, random: np.random.Generator, n: int) -> np.ndarray:
        """`n` of them."""
        if self.samples:
            return random.choice(np.asarray(self.samples), n)
        return np.exp(random.normal(0, np.log(self.spread), n)) * self.median

    @property
    def mean(self) -> float:
        """Their mean."""
        if self.samples:
            return float(np.mean(self.samples))
        return float(cast("float", self.median) * np.exp(np.log(self.spread) ** 2 / 2))


class Workers(Section):
    """How many of a role share its work; `Share` of a job, with as many GPUs as it says."""

    replicas: int = Field(1, ge=1)
    """Each takes the next answer, or ballot, when it has room; in a run each sampler has its share of the prompts."""
    gpus: float = Field(0, ge=0)
    """Of each replica."""


class Processes(Section):
    """How many processes make an update together."""

    processes: int = Field(1, ge=1)
    """Each takes an equal part of every step."""
    gpus: float = Field(0, ge=0)
    """Of each process."""


class Roles(Section):
    """How many of each role there are."""

    address: str | None = None
    """As in a job, like the next; a simulation reaches nothing, and restarts as often as it must."""
    max_restarts: int | None = None
    sampler: Workers = Workers()
    judge: Workers = Workers()
    learner: Processes = Processes()


class Overlap(Section):
    """What of an iteration happens at the same time."""

    stream: bool = False
    """A prompt's answers are judged as soon as they are there; else all are sampled first."""
    staleness: int = Field(0, ge=0)
    """An iteration may be sampled from a policy that is so many updates old, while the one before it trains."""


class Failures(Section):
    """Replicas die, and come back. What they had under way is asked of another, or done again."""

    hours_between: float = Field(gt=0)
    """Of one replica (or process), on average."""
    restart_s: float = Field(60.0, ge=0)
    """Until it works again."""


class SamplerRates(Section):
    """How fast one sampler is."""

    tokens_per_s: float = Field(gt=0)
    """Of a replica with `at_once` answers under way."""
    at_once: int = Field(64, ge=1)
    """Answers that a replica decodes at once; each advances at `tokens_per_s / at_once`, also when it is the last."""
    at_most: int | None = Field(None, ge=1)
    """Where an iteration has more answers for a replica than `at_once`, it decodes as many of them at once as this, at
    the same `tokens_per_s` in all. `at_once` when absent."""
    failures: Failures | None = None
    """How often a replica dies; never when absent, as for the other roles."""


class JudgeRates(Section):
    """How fast one judge is."""

    latency_s: Spread
    """From a ballot's request to its reply, at the load that `at_once` means."""
    at_once: int | None = Field(None, ge=1)
    """Ballots that a replica answers at once. Absent: as many as `judge.concurrency` sends, or one for a judge without
    a server."""
    score_s: Spread | None = None
    """Of one answer's score by one voice (`pairing.method: best_worst`); `latency_s` when absent."""
    start_s: float = Field(0.0, ge=0)
    """Before the first ballot of an iteration: connections are opened."""
    prompt_tokens: float = Field(0.0, ge=0)
    """Of a ballot, on average; what it costs follows by `judge.prices`, as for the next one."""
    completion_tokens: float = Field(0.0, ge=0)
    """Of a reply, on average."""
    failures: Failures | None = None
    """Of a replica."""


class LearnerRates(Section):
    """How fast one process of the learner is."""

    tokens_per_s: float = Field(gt=0)
    """Prompt and completion, of both sides of a pair; `n` processes take an n-th of the time, at best."""
    commit_s: float = Field(0.0, ge=0)
    """After the last step: state and policy are written."""
    failures: Failures | None = None
    """Of a process; the update that it takes with it starts again."""


class WeightRates(Section):
    """A policy's way to the samplers."""

    seconds: float = Field(0.0, ge=0)
    """From a policy that is committed to a sampler that holds it."""
    at_once: int | None = Field(None, ge=1)
    """So many samplers can load at the same time; all of them when absent."""


class LoopRates(Section):
    """What the loop itself takes, one thing after another."""

    iteration_s: float = Field(0.0, ge=0)
    """An iteration, for what is in no other rate: plan, decisions, metrics, heads."""
    row_s: float = Field(0.0, ge=0)
    """A row of the log: an answer, a score or a vote is made durable."""
    ballot_s: float = Field(0.0, ge=0)
    """A ballot beside that: it is rendered, sent, and its reply is read."""
    held_out_s: float = Field(0.0, ge=0)
    """An evaluation, for each held-out answer: how sane it is, KL."""


class Answers(Section):
    """What comes of the counts that a job names."""

    tokens: Spread | None = None
    """Of an answer; eight tenths of `sampling.max_tokens` when absent."""
    prompt_tokens: float = Field(40.0, ge=0)
    """Of a prompt as it trains."""
    asked: float = Field(1.0, ge=0)
    """Requests, over the ballots at most: pairs of equal answers aren't asked about, what failed is asked again."""
    kept: float = Field(1.0, ge=0)
    """Pairs that train, over the pairs at most."""


class Prices(Section):
    """What things cost, in one currency."""

    gpu_hour: float = Field(0.0, ge=0)
    """A GPU, an hour."""
    hour: float = Field(0.0, ge=0)
    """Everything else, an hour: the loop's machine, storage."""


class Rates(Section):
    """How fast one of each is."""

    sampler: SamplerRates
    judge: JudgeRates
    learner: LearnerRates
    weights: WeightRates = WeightRates()
    loop: LoopRates = LoopRates()
    answers: Answers = Answers()
    prices: Prices = Prices()


class Setup(Section):
    """What a run is simulated on."""

    cluster: Roles = Roles()
    pipeline: Overlap | None = None
    """What happens at the same time, in place of what the job says."""
    rates: Rates

    def overlap(self, work: Work) -> Overlap:
        """What happens at the same time: as this says, or the job; what both leave open, as a run makes it out."""
        if self.pipeline is not None:
            return self.pipeline
        apart = bool(self.cluster.address or (self.cluster.sampler.gpus and self.cluster.judge.gpus))
        return Overlap(stream=apart if work.stream is None else work.stream, staleness=work.staleness)

    @property
    def gpus(self) -> float:
        """Of all roles."""
        c = self.cluster
        return (
            c.sampler.replicas * c.sampler.gpus + c.judge.replicas * c.judge.gpus + c.learner.processes * c.learner.gpus
        )


def read_cluster(path: Path, of: Job | None = None, learners: int = 1) -> Setup:
    """A cluster's file, or the one machine that a run's log tells of. Where it doesn't say how many of a role there
    are, a job does (`of`): its own section and its servers, and the processes of its learner.

    Raises:
        UserError: it can't be read, doesn't say what it must, or says what nobody knows.
    """
    own = _as_here(of, learners)
    if path.is_dir():
        return _parsed({**own, "rates": measure(RunDir.open(path))}, str(path), None)
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        refuse_duplicate_keys(root, str(path))
        tree = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as e:
        raise cant_read(path, "the cluster", e) from e
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(e).split())})") from e
    if not isinstance(tree, dict) or not isinstance(tree.get("rates", {}), dict):
        raise UserError(f"{path}: a cluster's file is a mapping with `cluster` and `rates`; see docs/scale-plan.md")
    rates = dict(tree.get("rates", {}))
    if (run := rates.pop("from", None)) is not None:
        if isinstance(sampler := rates.get("sampler"), dict) and "at_once" in sampler:
            rates["sampler"] = {"at_most": None, **sampler}  # a file's word on the one is its word on both
        rates = _over(measure(RunDir.open(Path(str(run)))), rates)
    if isinstance(roles := tree.get("cluster"), dict) and {"sampler", "judge"} & {*roles}:
        tree = {**tree, "cluster": {"address": "auto", **roles}}
    return _parsed({**_over(own, tree), "rates": rates}, str(path), root)


def _as_here(job: Job | None, learners: int) -> dict[str, Any]:
    """A job's cluster as a file has it, with its servers as replicas."""
    cluster = job.cluster if job else None
    shares = {role: share for role in ("sampler", "judge") if cluster and (share := cluster.of(role))}
    roles: dict[str, Any] = {role: {"replicas": n} for role, n in (servers(job) if job else {}).items() if n > 1}
    roles |= {role: {"replicas": s.replicas, "gpus": s.gpus or 0} for role, s in shares.items()}
    if cluster and shares:
        roles["address"] = cluster.address
    gpus = cluster.learner.gpus if cluster and cluster.learner else None
    return {"cluster": {**roles, "learner": {"processes": learners, "gpus": gpus or 0}}}


def _over(measured: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What was measured, or a job says, and what a file says in its place."""
    out = dict(measured)
    for key, value in given.items():
        mine = out.get(key)
        # A distribution is said in one way: what was measured of it goes.
        merge = isinstance(mine, dict) and isinstance(value, dict) and "samples" not in mine
        out[key] = _over(cast("dict[str, Any]", mine), value) if merge else value
    return out


def _parsed(tree: dict[str, Any], source: str, root: yaml.Node | None) -> Setup:
    try:
        return Setup.model_validate(tree)
    except ValidationError as e:
        # What is there and wrong comes before what is missing.
        problem = min(e.errors(), key=lambda problem: problem["type"] == "missing")
        line = f":{_line(root, problem['loc'])}" if root is not None else ""
        where, what = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = _unknown(problem["loc"])
        step = "give it, or name a run that has it: `rates: {from: RUN}`; " if problem["type"] == "missing" else ""
        raise UserError(f"{source}{line}: {where}: {what}; {step}docs/scale-plan.md has all keys") from e


def _unknown(loc: tuple[Any, ...]) -> str:
    """Which key may have been meant."""
    if loc[0] in Job.model_fields and len(loc) == 1:
        return "this is a job's; a cluster's file has `rates`, and perhaps `cluster` and `pipeline`"
    section: type[BaseModel] = Setup
    for part in loc[:-1]:
        section = sections_in(section.model_fields[part].annotation)[0]
    near = difflib.get_close_matches(str(loc[-1]), [*section.model_fields], n=1, cutoff=0.5)
    return "unknown key; " + (f"did you mean `{near[0]}`?" if near else f"known: {', '.join(section.model_fields)}")


def _line(root: yaml.Node, loc: tuple[Any, ...]) -> int:
    """Line, from 1, of the deepest key on the way to `loc`."""
    node, line = root, root.start_mark.line + 1
    for part in loc:
        found = (
            next(((k, v) for k, v in node.value if k.value == part), None)
            if isinstance(node, yaml.MappingNode)
            else None
        )
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line
