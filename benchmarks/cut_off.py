"""What each way to treat cut-off answers does to the pairs that train: `python -m benchmarks.cut_off`.

Answers of the embedded model (the quickstart's prompts and system prompt) at some length limits, in all pairs.
No judge that reads is asked: three rules stand in for one, by what it likes (the longer answer, the shorter one, one at
random), and each may heed the line that says that an answer was cut off (of two of which one was, it takes the other)
or not. What is counted is whom the labels would teach to stop.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from rlaif import models
from rlaif.config import Filters, load_job
from rlaif.data.prompts import load_prompts, with_system
from rlaif.judging.filters import cut_off_won, decide
from rlaif.loop.pairing import make_pairs
from rlaif.records import Completion, Pair, PolicyVersion, Verdict
from rlaif.sampling import role

LIKES = ("longer", "shorter", "either")


def verdict(pair: Pair, answers: dict[str, Completion], likes: str, heeds: bool) -> Verdict:
    """What a judge of this kind says."""
    first, second = answers[pair.first], answers[pair.second]
    if heeds and first.cut_off != second.cut_off:
        won = not first.cut_off
    elif likes == "either":
        won = random.Random(pair.id).random() < 0.5
    else:
        won = (len(first.token_ids) >= len(second.token_ids)) == (likes == "longer")
    outcome = "first" if won else "second"
    return Verdict(pair_id=pair.id, outcome=outcome, p_first=float(won), agreement=1.0, valid_votes=2)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=Path("jobs/quickstart.yaml"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--limits", type=int, nargs="+", default=[64])
    options = parser.parse_args()
    job = load_job(options.job)
    prompts = with_system(load_prompts(job.prompts.train, Path()), job.policy.system_prompt)[: options.prompts]
    model = str(models.resolve(job.policy.model))
    columns = ("limit", "cut off", "pairs", "one cut", "judge likes", "told", "cut_off", "kept", "winner cut off")
    print("  ".join(f"{c:<12}" for c in columns))
    for limit in options.limits:
        sampler = role.make(model, job.sampling.model_copy(update={"max_tokens": limit}))
        version = PolicyVersion(iteration=0, digest="")
        sampled = [
            c
            for chunk in sampler.sample(prompts, 4, version, seed=0, iteration=0, prefix=str(limit))
            for c in chunk
        ]  # fmt: skip
        answers = {c.id: c for c in sampled}
        cut = {c.id for c in sampled if c.cut_off}
        pairs = make_pairs(sorted(sampled, key=lambda c: c.id), "all", 6, 0, [])
        texts = {c.id: c.text for c in sampled}
        for likes in LIKES:
            for heeds in (False, True):
                for rule in ("keep", "drop"):
                    filters = Filters(cut_off=rule)
                    made = [(p, decide(verdict(p, answers, likes, heeds), p, filters, texts, cut=cut)) for p in pairs]
                    mixed = [w for p, d in made if (w := cut_off_won(d.verdict, p, cut)) is not None]
                    kept = [(p, d) for p, d in made if d.status == "kept"]
                    won = sum(cut_off_won(d.verdict, p, cut) is True for p, d in kept)
                    told = "and heeds" if heeds else "or not told"
                    share = f"{len(cut) / len(sampled):.0%}"
                    row = (limit, share, len(pairs), len(mixed), likes, told, rule, len(kept), won)
                    print("  ".join(f"{value!s:<12}" for value in row), flush=True)


if __name__ == "__main__":
    main()
