"""Does what is trained reach what samples? One model through the whole hand-over, for `rlaif doctor --deep`.

In: a model's folder and a job's sampling and learner settings. Out: a row for each of three loads. The learner takes
two real steps at a large rate, so that every weight moves, and exports; the sampler loads the export, then the model as
it was. After each load both score the same texts. Nothing is kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rlaif.config import Job
from rlaif.hardware import gpu_names
from rlaif.placement import place, usable_gpus
from rlaif.records import Message, Preference, Prompt, Record, TokenSequence, WeightsGap
from rlaif.weights import weights_gap
from rlaif.workers import InlineWorker, Worker, start_worker

_RATE = {False: 1e-3, True: 1e-2}
"""Learning rate without and with adapters: large, so that a weight which stays behind shows."""

_QUESTIONS = (
    "What is a good way to keep bread fresh for a few days?",
    "Write two sentences about the sea in winter.",
    "How do I tell a friend that I can't come to the party?",
    "Name three things that one can do with an old newspaper.",
    "Why do leaves change their colour in autumn?",
    "Explain to a child what a bank is for.",
)


class HandOver(Record):
    """One load, and how far sampler and learner were apart after it."""

    weights: Literal["as given", "after an update", "as given again"]
    gap: WeightsGap
    moved: float
    """Mean of |log p now - log p as given| of the learner, in nats a token: what would show if the load did nothing."""
    holds: bool
    """Whether the gap is within `monitors.max_weights_gap`."""


def check_hand_over(
    model: Path,
    job: Job,
    note: Callable[[str], None] = lambda message: None,
    mode: Literal["process", "inline"] = "process",
) -> Iterator[HandOver]:
    """Loads, moves, exports, reloads and compares; yields each row as it is known.

    Raises:
        UserError: sampler or learner refuse the model or the settings; this is what they would say to a job.
        WorkerError: one of them fails on the way.
    """
    settings = job.learner.model_copy(
        update={
            "learning_rate": _RATE[job.learner.lora is not None],
            "reference": "previous",
            "batch_size": 3,
            "epochs": 1,
            "args": {},
        }
    )
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlaif-hand-over-")))
        devices = place(job, usable_gpus(len(gpu_names()))) if mode == "process" else {}

        def start(name: str, factory: str, **kwargs: Any) -> Worker | InlineWorker:
            note(f"loading the {name}")
            env = {"CUDA_VISIBLE_DEVICES": devices[name]} if name in devices else None
            worker = start_worker(mode, name, factory, kwargs, scratch / f"{name}.log", env)
            stack.enter_context(closing(worker)).ready()
            return worker

        sampler = start("sampler", "rlaif.sampling.role:make", model_path=str(model), settings=job.sampling)
        learner = start(
            "learner", "rlaif.learning:make", model_path=str(model), settings=settings, seed=job.seed,
            export_precision=job.sampling.precision,
        )  # fmt: skip
        prompts = [Prompt(id=str(i), messages=(Message(role="user", content=q),)) for i, q in enumerate(_QUESTIONS)]
        texts: list[TokenSequence] = sampler.call("sequences_of", prompts=prompts)
        computes_in, exported = sampler.call("computes_in"), learner.call("exports_in")
        given = learner.call("logprobs", sequences=texts)

        def row(weights: Any, of_learner: list[tuple[float, ...]], precision: str) -> HandOver:
            gap = weights_gap(sampler.call("logprobs", sequences=texts), of_learner, computes_in, precision)
            moved = fmean(abs(a - b) for x, y in zip(of_learner, given, strict=True) for a, b in zip(x, y, strict=True))
            return HandOver(weights=weights, gap=gap, moved=moved, holds=gap.within(job.monitors.max_weights_gap))

        note("comparing the model as it is")
        yield row("as given", given, "as given")
        note("two training steps")
        list(learner.stream("update", preferences=_preferences(texts), iteration=0))
        note("exporting and loading")
        learner.call("save", state_dir=str(scratch / "state"), policy_dir=str(scratch / "policy"))
        sampler.call("load", policy_path=str(scratch / "policy"))
        yield row("after an update", learner.call("logprobs", sequences=texts), exported)
        sampler.call("load", policy_path=str(model))
        yield row("as given again", given, "as given")


def _preferences(texts: list[TokenSequence]) -> list[Preference]:
    """Each text's own continuation is preferred to the next one's."""
    return [
        Preference(
            pair_id=str(i), iteration=0, source="judge", constitution="0" * 16, prompt_id=str(i), chosen_id=f"{i}+",
            rejected_id=f"{i}-", prompt_token_ids=text.prompt_token_ids, chosen_token_ids=text.token_ids,
            rejected_token_ids=other.token_ids, prompt="", chosen="", rejected="", p_chosen=None, agreement=None,
        )
        for i, (text, other) in enumerate(zip(texts, [*texts[1:], *texts[:1]], strict=True))
    ]  # fmt: skip
