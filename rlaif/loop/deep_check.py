"""Does what is trained reach what samples? One model through the whole hand-over, for `rlaif doctor --deep`.

In: a model's folder and a job's sampling and learner settings. Out: a row for each of three loads. The learner takes
two real steps at a large rate, so that every weight moves, and exports; the sampler loads the export, then the model as
it was. After each load both score the same texts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rlaif import models
from rlaif.config import Job, Learner, WorkerKind
from rlaif.data.prompts import with_system
from rlaif.hardware import gpu_names
from rlaif.loop.gaps import weights_gap
from rlaif.records import Message, Preference, Prompt, Record, TokenSequence, WeightsGap
from rlaif.workers.placement import place, usable_gpus
from rlaif.workers.start import start_worker
from rlaif.workers.weights import WeightsRef
from rlaif.workers.worker import Worker

QUESTIONS = tuple(
    Prompt(id=str(i), messages=(Message(role="user", content=question),))
    for i, question in enumerate(
        (
            "What is a good way to keep bread fresh for a few days?",
            "Write two sentences about the sea in winter.",
            "How do I tell a friend that I can't come to the party?",
            "Name three things that one can do with an old newspaper.",
            "Why do leaves change their colour in autumn?",
            "Explain to a child what a bank is for.",
        )
    )
)

Logprobs = tuple[tuple[float, ...], ...]


class Trained(Record):
    """What the learner made of a model, and how it scores the texts before and after."""

    policy: WeightsRef
    """What it exported."""
    exported: str
    """Its precision."""
    texts: tuple[TokenSequence, ...]
    given: Logprobs
    after: Logprobs


class CheckedLoad(Record):
    """One load, and how far sampler and learner were apart after it."""

    weights: Literal["as given", "after an update", "as given again"]
    gap: WeightsGap
    moved: float
    """Mean of |log p now - log p as given| of the learner, in nats a token: what would show if the load did nothing."""
    holds: bool
    """Whether the gap is within `monitors.weights_gap.limit`."""


def settings_for(learner: Learner) -> Learner:
    """A job's learner, with two large steps instead of its own: a weight that stays behind must show."""
    rate = 1e-3 if learner.lora is None else 1e-2
    changes = {"learning_rate": rate, "reference": "previous", "warmup_steps": 0, "batch_size": 3}
    changes |= {"epochs": 1, "args": {}}
    return learner.model_copy(update=changes)


def train(learner: Worker, texts: list[TokenSequence], to: Path) -> Trained:
    """Two steps of a learner made with `settings_for`, exported to a folder."""
    given = learner.call("logprobs", sequences=texts)
    list(learner.stream("update", rows=_preferences(texts), iteration=0))
    return Trained(
        policy=learner.call("save", state_dir=to / "state", policy_dir=to / "policy"),
        exported=learner.call("exports_in"),
        texts=tuple(texts),
        given=given,
        after=learner.call("logprobs", sequences=texts),
    )


def compare(sampler: Worker, model: Path, trained: Trained, limit: float) -> Iterator[CheckedLoad]:
    """Three loads of a sampler that was started on `model`, each compared with the learner's own scores."""
    computes_in = sampler.call("computes_in")
    given = WeightsRef(digest=models.digest_of(model), path=model)
    loads: list[tuple[Any, WeightsRef | None, Logprobs, str]] = [
        ("as given", None, trained.given, "as given"),
        ("after an update", trained.policy, trained.after, trained.exported),
        ("as given again", given, trained.given, "as given"),
    ]
    for weights, ref, wanted, precision in loads:
        if ref is not None:
            sampler.call("load", weights=ref)
        scored = sampler.call("logprobs", sequences=list(trained.texts))
        gap = weights_gap(scored, list(wanted), computes_in, precision)
        pairs = zip(wanted, trained.given, strict=True)
        moved = fmean(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))
        yield CheckedLoad(weights=weights, gap=gap, moved=moved, holds=gap.within(limit))


def check_hand_over(
    model: Path,
    job: Job,
    note: Callable[[str], None] = lambda message: None,
    mode: WorkerKind = "process",
) -> Iterator[CheckedLoad]:
    """Loads, trains, exports, reloads and compares; yields each row as it is known. Nothing is kept.

    `mode` takes the place of the job's `workers`.

    Raises:
        UserError: sampler or learner refuse the model or the settings; this is what they would say to a job.
        WorkerError: one of them fails on the way.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlaif-hand-over-")))
        here = job.model_copy(update={"workers": mode, "cluster": None})
        places = place(here, usable_gpus(len(gpu_names())))

        def start(name: str, factory: str, **kwargs: Any) -> Worker:
            note(f"loading the {name}")
            at = places[name]
            worker = start_worker(at.worker, name, factory, kwargs, scratch / f"{name}.log", at.environment)
            stack.enter_context(closing(worker)).ready()
            return worker

        how = {"settings": job.sampling, "policy": job.policy}
        sampler = start("sampler", "rlaif.sampling.role:make", model_path=str(model), **how)
        learner = start(
            "learner",
            "rlaif.learning:make",
            model_path=str(model),
            settings=settings_for(job.learner),
            seed=job.seed,
            export_precision=job.sampling.precision,
        )
        note("two training steps")
        questions = with_system(QUESTIONS, job.policy.system_prompt)
        trained = train(learner, sampler.call("sequences_of", prompts=questions), scratch)
        note("loading and comparing")
        yield from compare(sampler, model, trained, job.monitors.weights_gap.limit)


def _preferences(texts: list[TokenSequence]) -> list[Preference]:
    """Each text's own continuation is preferred to the next one's."""
    return [
        Preference(
            pair_id=str(i),
            iteration=0,
            source="judge",
            constitution="0" * 16,
            prompt_id=str(i),
            chosen_id=f"{i}+",
            rejected_id=f"{i}-",
            prompt_token_ids=text.prompt_token_ids,
            chosen_token_ids=text.token_ids,
            rejected_token_ids=other.token_ids,
            prompt="",
            chosen="",
            rejected="",
            p_chosen=None,
            agreement=None,
        )
        for i, (text, other) in enumerate(zip(texts, [*texts[1:], *texts[:1]], strict=True))
    ]
