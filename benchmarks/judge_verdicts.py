"""How fast are recorded votes turned into decisions? `python -m benchmarks.judge_verdicts [VOTES]`.

In: a number of votes (100,000 by default). Out: seconds to read them from a run's votes.jsonl, to parse their raw
replies again, to aggregate them, and to decide, beside the aim of the whole. The votes are made: 20 a pair (ten voices
in both orders), replies of some hundred characters, three jurors; nothing is timed twice or thrown away.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rlaif.config import Filters
from rlaif.data.recorded import read_votes_log
from rlaif.judging.calibration import Panel
from rlaif.judging.filters import decide
from rlaif.judging.parsing import Reply, parse
from rlaif.judging.parsing import outcome as heard
from rlaif.judging.verdicts import aggregate, by_pair
from rlaif.records import Ballot, Outcome, Pair, Usage, Vote, digest

AIM_S = 5.0
AIM_VOTES = 100_000
VOICES = 10
OUTCOMES: tuple[Outcome, ...] = ("first", "first", "first", "second", "tie", "abstain")
SAID = {"first": ("A", "B"), "second": ("B", "A"), "tie": ("tie", "tie"), "abstain": ("hard to say",) * 2}
"""The last line of a reply that means an outcome, in each order."""


def make_votes(count: int, seed: int = 0) -> list[Vote]:
    """`count` votes, 20 a pair."""
    rng = random.Random(seed)
    reply = "Both answers are polite. The first one names the cause and stops; the second one wanders off. " * 3
    out: list[Vote] = []
    while len(out) < count:
        n = len(out)
        pair, rest = divmod(n, 2 * VOICES)
        voice, order = divmod(rest, 2)
        outcome = rng.choice(OUTCOMES)
        ballot = Ballot(
            id=digest([n]),
            pair_id=f"pair{pair}",
            judge=f"chat:juror{voice % 3}",
            voice=f"template{voice}",
            principles=("brief", "plain"),
            order="reversed" if order else "forward",
            constitution="c" * 16,
            template=f"{voice:016d}",
            parameters="p" * 16,
        )
        out.append(
            Vote(
                ballot=ballot,
                model="juror",
                outcome=outcome,
                abstain_reason="unparsed" if outcome == "abstain" else None,
                p_first={"first": 0.9, "second": 0.2, "tie": 0.5}.get(outcome),
                raw_reply=f"{reply}\nVerdict: {SAID[outcome][order]}",
                finish_reason="stop",
                prompt_hash=digest(["prompt", n]),
                usage=Usage(prompt_tokens=700, completion_tokens=90),
                latency_s=0.8,
            )
        )
    return out


def measure(path: Path) -> dict[str, float]:
    """Seconds of each part, from a votes.jsonl."""
    seconds: dict[str, float] = {}

    def lap(name: str, since: float) -> float:
        now = time.perf_counter()
        seconds[name] = now - since
        return now

    at = time.perf_counter()
    votes = read_votes_log(path)
    at = lap("read", at)
    for v in votes:
        reply = Reply(content=v.raw_reply, finish_reason=v.finish_reason, usage=v.usage, model=v.model)
        shown = parse(reply, "last_line").shown
        if (shown and heard(shown, v.ballot.order)) != (None if v.outcome == "abstain" else v.outcome):
            raise SystemExit(f"{v.ballot.id}: parsed again, the reply means something else")
    at = lap("parse", at)
    pairs = by_pair(votes)
    verdicts = {i: aggregate(mine, {"brief": 1.0, "plain": 2.0}) for i, mine in pairs.items()}
    at = lap("verdicts", at)
    for mine in pairs.values():
        Panel.of([v.ballot for v in mine])
    at = lap("panels", at)
    for i, verdict in verdicts.items():
        pair = Pair(id=i, prompt_id=i, first="a", second="b", method="all")
        decide(verdict, pair, Filters(), {"a": "one", "b": "two"})
    lap("decisions", at)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when the aim was missed."""
    parser = argparse.ArgumentParser(description="Seconds from recorded votes to decisions.")
    parser.add_argument("votes", nargs="?", type=int, default=AIM_VOTES)
    count = parser.parse_args(arguments).votes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.jsonl"
        path.write_text("".join(v.model_dump_json() + "\n" for v in make_votes(count)))
        seconds = measure(path)
    total = sum(seconds.values())
    aim = AIM_S * count / AIM_VOTES
    for name, took in seconds.items():
        print(f"{name:10} {took:7.2f} s")
    print(f"{'all':10} {total:7.2f} s for {count:,} votes; aim {aim:.2f} s{'' if total <= aim else ': missed'}")
    return 0 if total <= aim else 1


if __name__ == "__main__":
    sys.exit(main())
