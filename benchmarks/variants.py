"""What a setting costs or brings in learning: variants of a job, each with several seeds, side by side.

    python -m benchmarks.variants forgetting|staleness [--seeds 0 1 2] [--runs DIR] [--set KEY=VALUE ...]

    forgetting  jobs/forgetting.yaml with less pull to the base policy, as it is, with replay, and with a brake on each
                update
    staleness   jobs/quickstart.yaml, longer: each iteration samples from the newest policy, from one that is an
                iteration old, and from one that is two (`pipeline.staleness`)

What is done is not done again: the same command goes on after a kill, and with more seeds. The table at the end is that
of `rlaif compare`; the picture lies beside the runs. `--set` is a setting of all runs, and comes last.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.change import finished, overrides, rlaif
from rlaif.config import load_job


class Study(NamedTuple):
    """A job, and what is tried with it."""

    job: Path
    settings: tuple[str, ...]
    """Of all runs."""
    variants: dict[str, tuple[str, ...]]
    measures: tuple[str, ...]
    """What is shown of them, as `rlaif compare --measure` names it."""


# Half the prompts of the job, and evaluations that are few: what is compared is nine to twelve runs.
_SMALLER = ("prompts.per_iteration=6", "filters.min_kept_pairs=2", "eval.prompts=16", "eval.kl_prompts=4")
STUDIES = {
    "forgetting": Study(
        Path("jobs/forgetting.yaml"),
        (*_SMALLER, "eval.every=4"),
        {
            "free": ("learner.beta=0.02",),
            "kl": (),
            "replay": ("replay.share=0.5",),
            "brake": ("learner.max_kl=0.02",),
        },
        ("win_rate", "words", "retained", "perplexity", "kl"),
    ),
    "staleness": Study(
        Path("jobs/quickstart.yaml"),
        (*_SMALLER, "iterations=8", "eval.every=2", "learner.learning_rate=3e-5"),
        {f"staleness-{n}": (f"pipeline.staleness={n}",) for n in range(3)},
        ("win_rate", "words", "kl", "retained"),
    ),
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="folder of the runs; runs/STUDY when absent")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these, for instance beside another process")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    args = parser.parse_args()
    study, runs = STUDIES[args.study], args.runs or Path("runs") / args.study
    names = args.variants or list(study.variants)
    if unknown := [name for name in names if name not in study.variants]:
        parser.error(f"--variants: no {', '.join(unknown)}; there are {', '.join(study.variants)}")
    for seed in args.seeds:
        for name in names:
            settings = [*study.settings, *study.variants[name], f"seed={seed}", *args.set]
            run = runs / f"{name}-{seed}"
            if not finished(run, load_job(study.job, settings).iterations):
                rlaif("run", study.job, "--runs", runs, "--name", run.name, *overrides(*settings))
    groups = [f"{name}={runs}/{name}-[0-9]*" for name in study.variants if [*runs.glob(f"{name}-[0-9]*")]]
    shown = [part for name in study.measures for part in ("--measure", name)]
    command = ["compare", *groups, *shown, "--picture", str(runs / f"{args.study}.svg")]
    print(f"python -m rlaif {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "rlaif", *command], check=True)


if __name__ == "__main__":
    main()
