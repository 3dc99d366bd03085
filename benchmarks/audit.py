"""How fast the audit is on a large run, and how much memory it takes: `make bench-audit`.

    python -m benchmarks.audit [--pairs 200000] [--iterations 50] [--run FOLDER] [--json]

Writes a run (`benchmarks.audit_run`; or takes the one in FOLDER, which is made there when it is missing), builds its
index anew in a folder of its own, and asks everything that `rlaif audit` and `rlaif view` ask, three times each; the
slowest counts. Wall-clock seconds stand beside the limit; the seconds of processor time beside them tell a slow query
from a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks.audit_run import VOTES_PER_PAIR, write_run
from rlaif.audit.index import Index
from rlaif.audit.overview import overview
from rlaif.audit.pair import show
from rlaif.audit.pairs import PairFilter, list_pairs, splits
from rlaif.audit.trace import trace
from rlaif.records import Record
from rlaif.rundir.store import RunDir
from rlaif.view.app import make_app

BUILD_S, OVERVIEW_S, LIST_S, SHOW_S, PAGE_S, MEMORY_GIB = 90.0, 3.0, 2.0, 1.0, 1.0, 2.0
REPEATS = 3
FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "iteration": {"iteration": 1},
    "constitution": {"constitution": "rules@2"},
    "status": {"status": "dropped"},
    "reason": {"reason": "order_flip"},
    "principle": {"principle": "brief"},
    "judge": {"judge": "contrary"},
    "agreement": {"min_agreement": 0.5, "max_agreement": 0.8},
    "flips": {"flipped": True},
    "disagreeing": {"disagreeing": True},
    "evaluation": {"evaluation": True},
    "text, many hits": {"text": "BAGA"},
    "text, no hit": {"text": "no such words"},
    "all at once": {"text": "baga", "principle": "brief", "judge": "careful", "disagreeing": True, "status": "dropped"},
}


class Measured(Record):
    """One thing that was measured."""

    name: str
    seconds: float
    """Wall clock; the slowest of the repeats."""
    processor_s: float
    limit_s: float | None
    found: int | None = None


class Report(Record):
    """All of it."""

    votes: int
    pairs: int
    files_gib: float
    index_gib: float
    cores: int
    load: float
    """Processes that wanted a core, over the last minute, when it began."""
    measured: tuple[Measured, ...]
    peak_gib: float


def measure(name: str, limit_s: float | None, ask: Callable[[], Any], repeats: int = REPEATS) -> tuple[Measured, Any]:
    """Asks several times; the slowest counts."""
    slowest, answer = (0.0, 0.0), None
    for _ in range(repeats):
        started, processor = time.perf_counter(), time.process_time()
        answer = ask()
        slowest = max(slowest, (time.perf_counter() - started, time.process_time() - processor))
    found = getattr(answer, "total", None)
    return Measured(name=name, seconds=slowest[0], processor_s=slowest[1], limit_s=limit_s, found=found), answer


@contextmanager
def served(run: RunDir, index: Index) -> Iterator[str]:
    """The address of the run's pages, served by a thread."""
    server = uvicorn.Server(uvicorn.Config(make_app(run, index), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def get(url: str) -> None:
    """Reads a page to its end; an error of the server's raises."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        answer.read()


def run_benchmark(path: Path) -> Report:
    """Builds the index of a run anew and asks it everything. `RLAIF_CACHE` says where the index goes."""
    run = RunDir.open(path)
    load = os.getloadavg()[0]
    measured = []

    def ask(name: str, limit_s: float | None, question: Callable[[], Any], repeats: int = REPEATS) -> Any:
        row, answer = measure(name, limit_s, question, repeats)
        measured.append(row)
        print(f"  {name}: {row.seconds:.2f} s", flush=True)
        return answer

    index: Index = ask("build the index", BUILD_S, lambda: Index.open(run), 1)
    ask("look for news", None, index.refresh)
    ask("overview", OVERVIEW_S, lambda: overview(index, run))
    for name, fields in FILTERS.items():
        page = ask(f"list: {name}", LIST_S, partial(list_pairs, index, PairFilter(**fields)))
    for sort in ("agreement", "margin", "length"):
        ask(f"list: by {sort}", LIST_S, partial(list_pairs, index, sort=sort, descending=True))
    page = ask("page in the middle", PAGE_S, lambda: list_pairs(index, limit=50, offset=10**5))
    total = page.total
    page = ask("last page", PAGE_S, lambda: list_pairs(index, limit=50, offset=max(total - 50, 0)))
    pair = page.rows[-1].pair_id
    ask("show", SHOW_S, lambda: show(index, run, pair))
    ask("flips, with voices", LIST_S, lambda: splits(index, PairFilter(flipped=True)))
    ask("trace of the last policy, 20 rows", None, lambda: trace(index, run, str(len(run.iterations())), 20))
    with served(run, index) as url:
        ask("GET the overview page", OVERVIEW_S, lambda: get(f"{url}/"))
        ask("GET a page of decisions", PAGE_S, lambda: get(f"{url}/pairs?offset={total // 2}"))
        ask("GET a page of dropped pairs", PAGE_S, lambda: get(f"{url}/pairs?status=dropped&sort=margin"))
        ask("GET a pair's page", PAGE_S, lambda: get(f"{url}/pairs/{pair}"))
    counts = {t: index.rows(f"SELECT count(*) AS n FROM {t}")[0]["n"] for t in ("votes", "pairs")}
    return Report(
        votes=counts["votes"],
        pairs=counts["pairs"],
        files_gib=sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) / 2**30,
        index_gib=index.path.stat().st_size / 2**30,
        cores=os.cpu_count() or 1,
        load=load,
        measured=tuple(measured),
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )


def table(report: Report) -> str:
    """The report for people."""
    lines = [
        f"{report.votes:,} votes on {report.pairs:,} pairs, {report.files_gib:.2f} GiB; index "
        f"{report.index_gib:.2f} GiB; {report.cores} cores, load {report.load:.1f} at the start",
        f"{'':36}{'seconds':>9}{'limit':>8}{'ratio':>8}{'processor':>11}{'pairs':>10}",
    ]
    for m in report.measured:
        limit = "" if m.limit_s is None else f"{m.limit_s:.0f}"
        ratio = "" if m.limit_s is None else f"{m.seconds / m.limit_s:.2f}"
        found = "" if m.found is None else f"{m.found:,}"
        lines.append(f"{m.name:36}{m.seconds:9.2f}{limit:>8}{ratio:>8}{m.processor_s:11.2f}{found:>10}")
    of_limit = report.peak_gib / MEMORY_GIB
    lines.append(f"{'peak memory, GiB':36}{report.peak_gib:9.2f}{MEMORY_GIB:>8.0f}{of_limit:>8.2f}")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--run", type=Path, help="the run, kept; made when it is missing")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RLAIF_CACHE"] = folder
        path = arguments.run or Path(folder) / "run"
        if not path.exists():
            started = time.perf_counter()
            write_run(path, arguments.pairs, arguments.iterations)
            size = f"{VOTES_PER_PAIR * arguments.pairs:,} votes"
            print(f"wrote {size} in {time.perf_counter() - started:.0f} s", flush=True)
        report = run_benchmark(path)
    print(json.dumps(report.model_dump(), indent=1) if arguments.json else table(report))


if __name__ == "__main__":
    main()
