"""The shipped prompt sets: they load, are large and varied enough, and keep what must be apart apart."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from rlaif.data.prompts import exclude_held_out, load_prompts
from rlaif.errors import UserError
from rlaif.records import Prompt

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
PRINCIPLES = {
    "brevity": "assistant@1",
    "thorough": "assistant@2",
    "lists": "lists@1",
    "plain_words": "plain_language@1",
    "refusing": "harmless@1",
}


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return load_prompts("everyday.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def held_out() -> list[Prompt]:
    return load_prompts("everyday_held_out.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def bench() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PROMPTS / "judge_bench.jsonl").read_text().splitlines()]


def plain(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


@pytest.mark.parametrize("path", sorted(PROMPTS.glob("everyday*.jsonl")), ids=lambda p: p.name)
def test_every_prompt_set_loads(path: Path) -> None:
    prompts = load_prompts(path.name, PROMPTS)
    texts = [plain(p.text) for p in prompts]
    assert len(set(texts)) == len(texts)
    assert all(3 < len(p.text.split()) < 19 for p in prompts)
    assert all(p.category for p in prompts)


def test_everyday_sets_are_large_and_varied(train: list[Prompt], held_out: list[Prompt]) -> None:
    for prompts, at_least in ((train, 320), (held_out, 64)):
        categories = Counter(p.category for p in prompts)
        assert len(prompts) >= at_least
        assert len(categories) >= 8
        assert max(categories.values()) <= 2 * min(categories.values())
    assert {p.category for p in held_out[:15]} == {p.category for p in train}, "a prefix covers all categories"


def test_held_out_prompts_are_not_in_training(train: list[Prompt], held_out: list[Prompt]) -> None:
    assert exclude_held_out(train, held_out) == train
    assert not {plain(p.text) for p in train} & {plain(p.text) for p in held_out}


def test_bench_rows_are_complete(bench: list[dict[str, Any]]) -> None:
    keys = {"id", "principle", "constitution", "prompt", "first", "second", "label", "split", "source"}
    for row in bench:
        assert set(row) == keys
        assert row["constitution"] == PRINCIPLES[row["principle"]]
        assert row["label"] in ("first", "second")
        assert row["split"] in ("dev", "test")
        assert row["source"] in ("policy_sample", "written")
        assert row["first"].strip()
        assert row["second"].strip()
        assert row["first"] != row["second"]
    assert len({row["id"] for row in bench}) == len(bench)


def test_bench_is_large_and_balanced(bench: list[dict[str, Any]]) -> None:
    assert len(bench) >= 360
    cells = Counter((row["principle"], row["split"]) for row in bench)
    firsts = Counter((row["principle"], row["split"]) for row in bench if row["label"] == "first")
    assert set(cells) == {(p, s) for p in PRINCIPLES for s in ("dev", "test")}
    for cell, count in cells.items():
        assert count >= 36, cell
        assert abs(firsts[cell] / count - 0.5) <= 0.05, cell


def test_no_bench_prompt_is_in_both_splits(bench: list[dict[str, Any]]) -> None:
    splits = defaultdict(set)
    for row in bench:
        splits[plain(row["prompt"])].add(row["split"])
    assert all(len(where) == 1 for where in splits.values())


def test_no_bench_prompt_is_held_out(bench: list[dict[str, Any]], held_out: list[Prompt]) -> None:
    assert not {plain(row["prompt"]) for row in bench} & {plain(p.text) for p in held_out}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a\\ud800"}', r"p\.jsonl:1: holds '\\ud800', half of a character"),
        ('{"id": "\\ud800", "prompt": "a"}', r"p\.jsonl:1: holds '\\ud800', half of a character"),
        ('{"prompt": ' + "[" * 100_000, r"p\.jsonl:1: nested too deeply"),
    ],
)
def test_json_that_python_chokes_on_is_the_users_mistake(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        load_prompts("p.jsonl", tmp_path)
