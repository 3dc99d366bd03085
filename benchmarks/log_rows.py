"""How many rows a second one writer makes durable: what the log allows, whatever there is to sample and to judge.

    python -m benchmarks.log_rows [--rows 20000] [--folder DIR] [--json]

Votes and completions of everyday size are written as a stage writes them: rendered, appended, synced, a chunk at a
time. Beside the wall time stands the processor's, which another process on the same cores doesn't lengthen; what is
left of the wall time on a machine at rest is the disk's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlaif.records import Ballot, Completion, PolicyVersion, Record, Usage, Vote
from rlaif.rundir.store import StageDir

CHUNKS = (1, 16, 256)


def votes(n: int) -> list[Record]:
    """As a chat judge casts them, some 750 bytes each."""
    return [
        Vote(
            ballot=Ballot(
                id=f"{i:032x}", pair_id=f"{i // 2:024x}", judge="judge-32b", voice="pairwise/assistant",
                principles=("helpful", "honest", "brief"), order="forward" if i % 2 else "reversed", seed=i,
                constitution="0123456789abcdef", template="fedcba9876543210", parameters="00112233445566",
            ),
            model="judge-32b", outcome="first", p_first=0.93, raw_reply="A", finish_reason="stop",
            prompt_hash=f"{i:016x}", mass_neither=0.001, fingerprint="fp_0123456789", latency_s=0.412,
            usage=Usage(prompt_tokens=1400, completion_tokens=1),
        )
        for i in range(n)
    ]  # fmt: skip


def completions(n: int) -> list[Record]:
    """Answers of 400 tokens."""
    policy, ids = PolicyVersion(iteration=3, digest="0123456789abcdef"), tuple(range(20_000, 20_400))
    return [
        Completion(
            id=f"0003-p{i // 8}-{i % 8}", prompt_id=f"p{i // 8}", policy=policy, index=i % 8, seed=i,
            prompt_token_ids=ids[:150], token_ids=ids, text="It is a word of it. " * 85, finish_reason="stop",
            logprob=-412.5,
        )
        for i in range(n)
    ]  # fmt: skip


def written(rows: Sequence[Record], chunk: int, folder: Path) -> dict[str, float]:
    """Seconds a row, by the wall and by the processor, in chunks of a size; the end of the stage among them."""

    def produce(_: list[Any]) -> Iterator[list[Any]]:
        for n in range(0, len(rows), chunk):
            yield list(rows[n : n + chunk])

    wall, cpu = time.perf_counter(), time.process_time()
    StageDir(folder).rows("rows", type(rows[0]), produce)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    size = (folder / "rows.jsonl").stat().st_size / len(rows)
    return {"bytes": size, "rows_per_s": len(rows) / wall, "row_s": wall / len(rows), "cpu_row_s": cpu / len(rows)}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000, help="of each kind and chunk; a tenth in chunks of one")
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder when absent")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    out: list[dict[str, Any]] = []
    for kind, make in (("votes", votes), ("completions", completions)):
        for chunk in CHUNKS:
            rows = make(given.rows // (10 if chunk == 1 else 1))
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                out.append({"rows": kind, "chunk": chunk, **written(rows, chunk, Path(folder) / "stage")})
    if given.json:
        print(json.dumps(out, indent=1))
        return
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    print(f"{'rows':<14}{'chunk':>6}{'bytes':>8}{'rows/s':>10}{'ms a row':>10}{'of it CPU':>11}")
    for r in out:
        print(
            f"{r['rows']:<14}{r['chunk']:>6}{r['bytes']:>8.0f}{r['rows_per_s']:>10.0f}"
            f"{1e3 * r['row_s']:>10.3f}{1e3 * r['cpu_row_s']:>11.3f}"
        )


if __name__ == "__main__":
    main()
