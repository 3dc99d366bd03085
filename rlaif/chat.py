"""Talk to a run's policy beside the base policy, with the transformers sampler: no server, no vLLM."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from rlaif import models
from rlaif.console import inert
from rlaif.data.prompts import with_system
from rlaif.export import policy_path
from rlaif.records import Message, PolicyVersion, Prompt
from rlaif.rundir.store import RunDir


def conversation(run: RunDir, question: str | None, max_tokens: int, temperature: float, seed: int) -> None:
    """Answers one question, or questions from the terminal until an empty line or Ctrl-D."""
    from rlaif.sampling.role import SamplerRole

    job = run.job()
    updates, trained = policy_path(run)
    settings = job.sampling.model_copy(
        update={"engine": "transformers", "max_tokens": max_tokens, "temperature": temperature}
    )
    errors = Console(stderr=True)
    with Progress(SpinnerColumn(), TextColumn("loading two policies"), console=errors, transient=True):
        folders = {"base": models.resolve_policy(job.policy.model, job.policy.adapter), f"after {updates}": trained}
        policies = {name: SamplerRole(str(path), settings, job.policy) for name, path in folders.items()}
    console = Console(highlight=False)
    turn = 0
    while True:
        text = question if question is not None else _ask(errors)
        if not text:
            return
        prompt = Prompt(id=f"chat-{turn}", messages=(Message(role="user", content=text),))
        (prompt,) = with_system([prompt], job.policy.system_prompt)
        for name, policy in policies.items():
            version = PolicyVersion(iteration=0, digest=name)
            chunks = policy.sample([prompt], 1, version, seed, turn, "chat")
            (answer,) = [c for chunk in chunks for c in chunk]
            console.print(f"[dim]{name}:[/] {inert(answer.text.strip())}")
        if question is not None:
            return
        turn += 1


def _ask(console: Console) -> str:
    if sys.stdin.isatty():
        console.print("[bold]you:[/] ", end="")
    return sys.stdin.readline().strip()
