"""The proof: does it pay to go on online when the rules change?

    python -m benchmarks.change [--seeds 0 1 2] [--runs DIR] [--change 4] [--iterations 12] [--set KEY=VALUE ...]

For each seed, jobs/change_guidelines.yaml (brief answers, then thorough ones) runs up to the change of text, with half
of its prompts an iteration, room for longer answers and twice its rate. Five ways to go on are tried, each up to the
same number of iterations after the change:

    online          the run goes on under the new text, with fresh pairs
    online-rejudge  the same, and old pairs judged again under the new text are replayed
    offline-old     no fresh pairs: the pairs from before the change, labelled as they were under the old text
    offline-new     the same pairs, judged again under the new text
    restart         a run from the base policy under the new text alone

Held-out answers and what the policy still knows are measured every two iterations. What is done is not done again: the
same command goes on after a kill, and with more seeds. The tables at the end are those of `rlaif compare`; the picture
lies beside the runs. Some three hours a seed on two cores without bf16. Arms may run beside each other, once the run
that they begin with is at the change, and a restart at any time: the same command with other `--arms` in a second
terminal.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlaif.audit.answers import answers_to, held_out_prompts
from rlaif.audit.index import Index
from rlaif.rundir.store import RunDir

JOB = Path("jobs/change_guidelines.yaml")
BEFORE, AFTER = "assistant@1", "assistant@2"
MEASURES = ("check:thorough", "win_rate", "words", "kl", "retained")
"""The first is the new text's own: answers of at least 60 words."""
SETTINGS = (
    "prompts.per_iteration=6",
    "sampling.max_tokens=128",  # a policy that is asked for more must be able to end: at 64 it can't (docs/change.md)
    "learner.learning_rate=3e-5",
    "filters.min_kept_pairs=2",
    "eval.every=2",
    "eval.prompts=16",
    "eval.kl_prompts=4",
)
"""Of all runs, beside the job's own; `--set` comes after them."""
ARMS = ("online", "online-rejudge", "offline-old", "offline-new", "restart")

ANSWERS = 10
"""Prompts whose answers are printed."""


class Plan(NamedTuple):
    """What is run, and where."""

    runs: Path
    change: int
    """The new text is in force after so many iterations."""
    iterations: int
    """Of all that begin before the change; a restart does those after it alone."""
    settings: tuple[str, ...]
    """Overrides of the job, for all runs, beside `SETTINGS`."""

    def run(self, arm: str, seed: int) -> Path:
        """The directory of a run."""
        return self.runs / f"{arm}-{seed}"


def rlaif(*arguments: object) -> None:
    """Runs a command of rlaif as a user would, and stops with it.

    Raises:
        SystemExit: it failed; what it says stands on stderr.
    """
    done = subprocess.run([sys.executable, "-m", "rlaif", *map(str, arguments)], stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def overrides(*settings: str) -> list[str]:
    """Settings as options."""
    return [part for setting in settings for part in ("--set", setting)]


def finished(run: Path, iterations: int) -> bool:
    """Whether so many iterations are done, evaluation included."""
    metrics = (run / "iterations" / f"{iterations - 1:04d}", run / "evaluations" / f"{iterations:04d}")
    return all((folder / "metrics.json").exists() for folder in metrics)


def up_to_the_change(plan: Plan, seed: int) -> None:
    """The run that all but the restart begin with."""
    run = plan.run("online", seed)
    if finished(run, plan.change):
        return
    settings = (f"seed={seed}", f"iterations={plan.change}", f"schedule={{0: {BEFORE}, {plan.change}: {AFTER}}}")
    start(plan, run, *settings)


def start(plan: Plan, run: Path, *settings: str) -> None:
    """A run of the job, or the rest of it."""
    every = overrides(*SETTINGS, *plan.settings, *settings)
    rlaif("run", JOB, "--runs", run.parent, "--name", run.name, *every)


def go_on(plan: Plan, arm: str, seed: int) -> None:
    """One way to go on from the change."""
    run, parent = plan.run(arm, seed), plan.run("online", seed)
    if arm == "restart":
        left = plan.iterations - plan.change
        if not finished(run, left):
            start(plan, run, f"seed={seed}", f"iterations={left}", f"schedule={{0: {AFTER}}}")
        return
    if finished(run, plan.iterations):
        return
    if arm != "online" and not (run / "run.json").exists():
        stored = (
            f"source={{run: {parent}, iterations: 0-{plan.change - 1}, rejudge: {str(arm == 'offline-new').lower()}}}"
        )
        replay = "replay={share: 0.33, max_age: 8, on_change: rejudge}"
        changed = replay if arm == "online-rejudge" else stored
        rlaif("branch", parent, "--at", plan.change, "--name", run.name, *overrides(changed))
    rlaif("run", run, *overrides(f"iterations={plan.iterations}"), "--allow-change")


def tell(plan: Plan, seeds: Sequence[int]) -> None:
    """The tables, and the picture."""
    groups = [f"{arm}={plan.runs}/{arm}-[0-9]*" for arm in ARMS]
    shown = [part for name in MEASURES for part in ("--measure", name)]
    picture = plan.runs / "change.svg"
    command = ["compare", *groups, "--from", "change", "--reach", "restart", *shown, "--picture", str(picture)]
    print(f"{len(seeds)} seeds; python -m rlaif {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "rlaif", *command], check=True)


def show_answers(plan: Plan, seed: int) -> None:
    """Some held-out answers of the run that goes on: of the base policy, at the change, and at the end."""
    shown = (0, plan.change, plan.iterations)
    run = RunDir.open(plan.run("online", seed))
    with Index.open(run) as index:
        for line in held_out_prompts(index).prompts[:ANSWERS]:
            print(f"\n{line.prompt}")
            for found in answers_to(index, run, line.prompt_id).evaluated:
                if found.evaluation.updates in shown:
                    said = " ".join(found.answers[0].text.split())
                    print(f"  after {found.evaluation.updates:2}: {said}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/change"), help="folder of the runs")
    parser.add_argument("--change", type=int, default=4, help="iterations before the new text")
    parser.add_argument("--iterations", type=int, default=12, help="iterations in all")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="what to try")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    args = parser.parse_args()
    plan = Plan(args.runs, args.change, args.iterations, tuple(args.set))
    for seed in args.seeds:
        began = time.monotonic()
        if {*args.arms} - {"restart"}:
            up_to_the_change(plan, seed)
        # The others first: they begin where the run stands now.
        for arm in sorted(args.arms, key=lambda arm: arm == "online"):
            go_on(plan, arm, seed)
        print(f"seed {seed}: {(time.monotonic() - began) / 60:.0f} min", file=sys.stderr, flush=True)
    tell(plan, args.seeds)
    show_answers(plan, args.seeds[0])


if __name__ == "__main__":
    main()
