"""The exported dataset: what `datasets` reads back and TRL's trainers take."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlaif.audit.export import export_preferences
from rlaif.audit.index import Index
from rlaif.errors import UserError
from rlaif.records import Preference
from rlaif.store import RunDir

datasets = pytest.importorskip("datasets")


def preferences(run: RunDir) -> list[Preference]:
    found = [p for k in run.iterations() for p in run.iteration(k).read("preferences", Preference)]
    return [p for p in found if p.source != "replay"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_what_is_written_is_what_training_saw(stored: RunDir, tmp_path: Path, suffix: str) -> None:
    to = tmp_path / f"out.{suffix}"
    with Index.open(stored) as index:
        assert export_preferences(index, to) == 8
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


def test_trl_takes_it(stored: RunDir, tmp_path: Path) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    to = tmp_path / "out.parquet"
    with Index.open(stored) as index:
        export_preferences(index, to)
    row = datasets.load_dataset("parquet", data_files=str(to), split="train", cache_dir=str(tmp_path / "hf"))[0]
    example = {name: row[name] for name in ("prompt", "chosen", "rejected")}
    assert data_utils.is_conversational(example)
    assert data_utils.maybe_extract_prompt(example) == example  # complete as it is


def test_parts_of_it(stored: RunDir, tmp_path: Path) -> None:
    with Index.open(stored) as index:
        assert export_preferences(index, tmp_path / "a.jsonl", iteration=1) == 3
        assert export_preferences(index, tmp_path / "b.jsonl", constitution="rules@2") == 3
        with pytest.raises(UserError, match="no such preferences"):
            export_preferences(index, tmp_path / "c.jsonl", constitution="rules@9")
        with pytest.raises(UserError, match="exists already"):
            export_preferences(index, tmp_path / "a.jsonl")
