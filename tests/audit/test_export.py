"""The exported dataset: what `datasets` reads back and TRL's trainers take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.audit.export import export_preferences, preference_rows
from rlaif.audit.index import Index
from rlaif.errors import UserError
from rlaif.records import Preference
from rlaif.rundir.store import RunDir

datasets = pytest.importorskip("datasets")


def preferences(run: RunDir) -> list[Preference]:
    updated = [k for k in run.iterations() if not run.iteration(k).meta("updates")["skipped"]]
    found = [p for k in updated for p in run.iteration(k).read("preferences", Preference)]
    return [p for p in found if p.source != "replay"]


def change_preferences(run: RunDir, k: int, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = run.iteration(k).path / "preferences.jsonl"
    rows = [changed(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_what_is_written_is_what_training_saw(stored: RunDir, tmp_path: Path, suffix: str) -> None:
    to = tmp_path / f"out.{suffix}"
    with Index.open(stored) as index:
        assert export_preferences(index, to) == 7
    kind = {"parquet": "parquet", "jsonl": "json"}[suffix]
    read = datasets.load_dataset(kind, data_files=str(to), split="train", cache_dir=str(tmp_path / "hf"))
    expected = preferences(stored)
    assert len(read) == len(expected)
    for row, p in zip(read, expected, strict=True):
        assert row["prompt"] == [{"role": "user", "content": p.prompt}]
        assert row["chosen"] == [{"role": "assistant", "content": p.chosen}]
        assert row["rejected"] == [{"role": "assistant", "content": p.rejected}]
        assert (row["pair_id"], row["iteration"], row["source"]) == (p.pair_id, p.iteration, p.source)
        assert row["constitution_hash"] == p.constitution
        assert (row["p_chosen"], row["agreement"]) == (pytest.approx(p.p_chosen), pytest.approx(p.agreement))
        assert row["judge_models"] == ["m-1"]
        assert len(row["judges"]) == 2
        assert row["policy_iteration"] <= p.iteration
        assert row["policy_digest"]
    assert {r["constitution"] for r in read} == {"rules@1", "rules@2"}


def exported(run: RunDir) -> dict[tuple[str, str], dict[str, Any]]:
    with Index.open(run) as index:
        rows = list(preference_rows(index))
    found = {(r["pair_id"], r["source"]): r for r in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.slow
def test_a_pair_of_a_skipped_update_comes_when_a_later_one_replays_it(copy: RunDir) -> None:
    skipped = {p.pair_id: p for p in copy.iteration(3).read("preferences", Preference) if p.source == "judge"}
    assert not skipped.keys() & {pair for pair, _ in exported(copy)}
    meta = copy.iteration(1).path / "updates.meta.json"  # now iteration 2 made no update, iteration 3 replays one pair
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"skipped": True, "policy_digest": None}))
    mixed = copy.iteration(1).read("preferences", Preference)
    again, lost = [p for p in mixed if p.source == "judge"][:2]
    path = copy.iteration(2).path / "preferences.jsonl"
    path.write_text(path.read_text() + again.model_copy(update={"source": "replay"}).model_dump_json() + "\n")
    found = {pair for pair, _ in exported(copy)}
    assert again.pair_id in found
    assert lost.pair_id not in found


@pytest.mark.slow
def test_a_pair_that_people_labelled_has_its_votes(copy: RunDir) -> None:
    change_preferences(copy, 1, lambda row: row | {"source": "human"} if row["source"] == "replay" else row)
    human = [row for (_, source), row in exported(copy).items() if source == "human"]
    assert len(human) == 2
    assert {row["valid_votes"] for row in human} == {8}
    assert {len(row["judges"]) for row in human} == {2}


@pytest.mark.slow
def test_trl_takes_it(stored: RunDir, tmp_path: Path) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    to = tmp_path / "out.parquet"
    with Index.open(stored) as index:
        export_preferences(index, to)
    row = datasets.load_dataset("parquet", data_files=str(to), split="train", cache_dir=str(tmp_path / "hf"))[0]
    example = {name: row[name] for name in ("prompt", "chosen", "rejected")}
    assert data_utils.is_conversational(example)
    assert data_utils.maybe_extract_prompt(example) == example  # complete as it is


@pytest.mark.slow
def test_parts_of_it(stored: RunDir, tmp_path: Path) -> None:
    with Index.open(stored) as index:
        assert export_preferences(index, tmp_path / "a.jsonl", iteration=1) == 3
        assert export_preferences(index, tmp_path / "b.jsonl", constitution="rules@2") == 2
        with pytest.raises(UserError, match="no such preferences"):
            export_preferences(index, tmp_path / "c.jsonl", constitution="rules@9")
        with pytest.raises(UserError, match="exists already"):
            export_preferences(index, tmp_path / "a.jsonl")


@pytest.mark.slow
def test_a_lost_file_costs_no_row(copy: RunDir) -> None:
    before = exported(copy)
    copy.iteration(1).path.joinpath("completions.jsonl").unlink()
    copy.path.joinpath("prompts/train.jsonl").unlink()
    after = exported(copy)
    assert after.keys() == before.keys()
    for key, row in after.items():
        assert [row[n] for n in ("prompt", "chosen", "rejected")] == [
            before[key][n] for n in ("prompt", "chosen", "rejected")
        ]


def test_a_corrected_label_supersedes_the_row_that_trained_before(copy: RunDir) -> None:
    pair = next(p for p in copy.iteration(0).read("preferences", Preference) if p.source == "judge")
    side = {"pair_id": pair.pair_id, "iteration": 0, "outcome": "first", "reason": None}
    folder = copy.path / "review"
    folder.mkdir()
    given = [side | {"author": "ann", "time": "2026-01-01"}, side | {"author": "bob", "time": "2026-02-02"}]
    rows = [json.dumps(label) + "\n" for label in given]
    (folder / "labels.jsonl").write_text("".join(rows))
    meta = copy.iteration(1).path / "preferences.meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"labels": {"size": len(rows[0]), "joined": {}}}))
    other = pair.model_copy(
        update={
            "source": "human", "chosen_id": pair.rejected_id, "rejected_id": pair.chosen_id,
            "chosen": pair.rejected, "rejected": pair.chosen,
        }
    )  # fmt: skip
    path = copy.iteration(1).path / "preferences.jsonl"
    path.write_text(path.read_text() + other.model_dump_json() + "\n")
    found = exported(copy)
    assert found[pair.pair_id, "judge"]["superseded"]
    corrected = found[pair.pair_id, "human"]
    assert not corrected["superseded"]
    assert (corrected["label_author"], corrected["label_time"]) == ("ann", "2026-01-01")  # bob's came after the update
    assert sum(row["superseded"] for row in found.values()) == 1
