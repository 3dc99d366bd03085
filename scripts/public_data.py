"""Fetches public data that the docs' figures and some tests rest on, and that isn't ours to ship: `make data-llmbar`.

In: the authors' git repositories, at the commit that the figures were made with. Out: their files under data/NAME,
which git ignores, with the licence. LLMBar keeps a file for each judge and strategy: their verdicts go into one table.

Needs git and a network. `--source` takes a copy of the repository instead.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


class Origin(NamedTuple):
    """Where a set comes from."""

    url: str
    commit: str
    files: dict[str, str]
    """Name here → path in the repository."""


LLMBAR_SETS = {"adv_neighbor": "Dataset/LLMBar/Adversarial/Neighbor", "natural": "Dataset/LLMBar/Natural"}
RAW = {  # full replies of real judges, on which parsing is tested
    f"raw_{folder.rpartition('/')[2]}_{judge}_{strategy}.json": f"{folder}/evaluators/{judge}/{strategy}/result.json"
    for folder in LLMBAR_SETS.values()
    for judge, strategy in (("Falcon", "CoT"), ("GPT-4", "CoT"), ("GPT-4", "Swap_CoT"), ("LLaMA2", "CoT"))
}
PANDALM = ("testset-v1", "gpt-3.5-turbo-testset-v1", "pandalm-7b-testset-v1")
ORIGINS = {
    "llmbar": Origin(
        "https://github.com/princeton-nlp/LLMBar",
        "900616bff90b6c6c8e1681f7d079250637c55992",
        {"LICENSE": "LICENSE"} | {f"{n}.json": f"{folder}/dataset.json" for n, folder in LLMBAR_SETS.items()} | RAW,
    ),
    "pandalm": Origin(
        "https://github.com/WeOpenML/PandaLM",
        "3871806e72b4832f815ecafd24d3503c73403f48",
        {"LICENSE": "LICENSE"} | {f"data__{name}.json": f"data/{name}.json" for name in PANDALM},
    ),
}


def fetch(name: str, to: Path, source: str | None = None) -> list[Path]:
    """Writes a set's files into `to`/`name`, and returns their paths."""
    origin = ORIGINS[name]
    with tempfile.TemporaryDirectory() as folder:

        def git(*arguments: str) -> bytes:
            return subprocess.run(["git", "-C", folder, *arguments], stdout=subprocess.PIPE, check=True).stdout

        git("init", "--quiet")
        git("fetch", "--quiet", "--depth", "1", source or origin.url, origin.commit)
        contents = {own: git("show", f"FETCH_HEAD:{path}") for own, path in origin.files.items()}
        if name == "llmbar":
            paths = git("ls-tree", "-r", "--name-only", "FETCH_HEAD").decode().splitlines()
            results = {of: git("show", f"FETCH_HEAD:{path}") for path in paths if (of := result_of(path))}
            contents["recorded_verdicts.csv"] = verdicts(results)
    (to / name).mkdir(parents=True, exist_ok=True)
    for own, content in contents.items():
        (to / name / own).write_bytes(content)
    return [to / name / own for own in contents]


def result_of(path: str) -> tuple[str, str, str] | None:
    """Set, judge and strategy of a file of verdicts on one of the two sets; None for any other file."""
    for subset, folder in LLMBAR_SETS.items():
        if path.startswith(f"{folder}/evaluators/") and path.endswith("/result.json"):
            judge, strategy = path.split("/")[-3:-1]
            return subset, judge, strategy
    return None


def verdicts(results: dict[tuple[str, str, str], bytes]) -> bytes:
    """One table of LLMBar's verdicts, by set, judge and strategy. `winner_ab` and `winner_ba_mapped` name answer 1 or 2
    as the set counts them, in both orders; empty where its authors could read none."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(("subset", "row", "judge", "strategy", "label", "winner_ab", "winner_ba_mapped"))
    for (subset, judge, strategy), content in results.items():
        for number, row in enumerate(json.loads(content)):
            last = row["results"][-1]  # before it come references and metrics that the judge wrote for itself
            winners = (last[f"swap = {swapped}"]["winner"] for swapped in (False, True))
            table.writerow((subset, number, judge, strategy, row["label"], *winners))
    return out.getvalue().encode()


def main(arguments: list[str] | None = None) -> None:
    """Fetches one set, and prints what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("name", choices=sorted(ORIGINS))
    parser.add_argument("--to", type=Path, default=Path("data"), help="folder for the set's own folder")
    parser.add_argument("--source", help="a copy of the repository, in the place of its address")
    args = parser.parse_args(arguments)
    try:
        for path in fetch(args.name, args.to, args.source):
            print(path)
    except subprocess.CalledProcessError as e:
        parser.exit(1, f"public_data: {' '.join(e.cmd)} failed (above); it needs git, and {ORIGINS[args.name].url}\n")


if __name__ == "__main__":
    main()
