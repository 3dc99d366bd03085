"""Pictures as geometry: everything lies in its frame, changes of text are marked, nothing invents a value."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rlaif.audit.index import Index
from rlaif.audit.summary import status_of
from rlaif.rundir.store import RunDir
from rlaif.view.facts import Facts, read_facts
from rlaif.view.html import render
from rlaif.view.pictures import MOST_POINTS, Picture, nice, pictures
from rlaif.view.report import make_report


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.003), (-3.2, 5), (0, 12345), (2, 2), (0, 0)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    ticks = nice(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 7
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


@pytest.fixture(scope="module")
def facts(stub_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLAIF_CACHE", str(tmp_path_factory.mktemp("cache")))
        run = RunDir.open(stub_run)
        return read_facts(Index.open(run), run)


@pytest.fixture(scope="module")
def drawn(facts: Facts) -> dict[str, Picture]:
    return {p.key: p for p in pictures(facts)}


def test_everything_lies_in_its_frame(drawn: dict[str, Picture]) -> None:
    found = drawn
    assert not any(found[key].empty for key in ("kept", "win-rate", "agreement", "length", "kl", "loss"))
    for p in found.values():
        for point in [q for line in p.lines for q in line.points]:
            assert p.left - 1 <= point.x <= p.right + 1
            assert p.top - 1 <= point.y <= p.bottom + 1
        for bar in p.bars:
            assert p.left <= bar.x < bar.x + bar.width <= p.right
            assert p.top - 1 <= bar.y <= bar.y + bar.height <= p.bottom + 1


def test_a_change_of_text_is_marked_on_every_axis(drawn: dict[str, Picture]) -> None:
    for p in drawn.values():
        assert p.empty or [m.label for m in p.marks] == ["rules@2"], p.key


def test_a_stack_holds_every_pair_once(facts: Facts, drawn: dict[str, Picture]) -> None:
    kept = drawn["kept"]
    heights: dict[float, float] = {}
    for bar in kept.bars:
        heights[bar.x] = heights.get(bar.x, 0) + bar.height
    assert len(heights) == len(facts.overview.iterations)
    assert all(h == pytest.approx(kept.bottom - kept.top) for h in heights.values())


def test_what_was_not_measured_is_said(facts: Facts, drawn: dict[str, Picture]) -> None:
    assert "both orders" in drawn["position-bias"].empty
    nothing = facts.overview.model_copy(update={"iterations": (), "changes": ()})
    assert all(p.empty for p in pictures(Facts(nothing, [], {}, [])))


def test_many_steps_become_means_that_keep_the_level(facts: Facts) -> None:
    loss = next(p for p in pictures(replace(facts, losses=[(0, 1.0), (0, 3.0)] * 5000)) if p.key == "loss")
    assert len(loss.lines[0].points) <= MOST_POINTS
    assert {round(p.y, 3) for p in loss.lines[0].points} == {round(loss.lines[0].points[0].y, 3)}
    assert "mean of" in loss.lines[0].name


def test_a_win_rate_is_not_joined_across_texts(drawn: dict[str, Picture]) -> None:
    found = drawn
    assert found["win-rate"].lines[0].path.count("M") == 2
    assert found["length"].lines[0].path.count("M") == 1


def test_an_evaluation_may_lack_numbers(stub_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    shutil.copytree(stub_run, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    for k in run.evaluations():
        path = run.evaluation(k).path / "metrics.json"
        metrics = json.loads(path.read_text())
        path.write_text(json.dumps({name: metrics[name] for name in ("updates", "constitution", "mean_words")}))
    index = Index.open(run)
    facts = read_facts(index, run)
    assert {p.key for p in pictures(facts) if p.empty} >= {"win-rate", "kl", "sanity", "checks"}
    around = {"run_name": "run", "page": "", "version": "", "every_ms": 0, "waiting": 0, "job": run.header["job"]}
    around |= {"base": "", "folder": "", "tabs": (), "before_after": None}
    assert any("evaluations/0002/metrics.json: not EvaluationMetrics" in p for p in facts.overview.problems)
    html = render("overview.html", status=status_of(run), facts=facts, pictures=pictures(facts), **around)
    assert "not judged yet" in html
    assert "Nothing was judged" in " ".join(make_report(index, run).caveats)
