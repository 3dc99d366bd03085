"""`rlaif compare RUN...`: groups of runs over their iterations, against numbers worked out by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rlaif.audit.over_time import MEASURES, Axis, grouped, over_time
from rlaif.audit.picture import draw_over_time
from rlaif.audit.reach import Reach, reach, when_there
from rlaif.cli import app
from rlaif.errors import UserError
from rlaif.intervals import wilson
from rlaif.loop.branch import branch
from rlaif.records import ConstitutionRef, EvaluationMetrics, Plan, PlanSource, PlanTexts, PolicyVersion, UnderText
from rlaif.rundir.store import RunDir, read_record, write_json
from tests.stubs import stub_job, stub_loop
from tests.test_branch import go_on
from tests.test_monitors import measured

pytestmark = pytest.mark.slow

OLD, NEW = (
    ConstitutionRef(name="rules", version=1, hash="a" * 16),
    ConstitutionRef(name="rules", version=2, hash="b" * 16),
)


def made(
    root: Path, name: str, words: dict[int, float], texts: dict[int, ConstitutionRef], seed: int = 0, **job: Any
) -> RunDir:
    """A run with so many words after so many iterations, and a win rate of a hundredth of them over 40 prompts. At
    equal length it is the same, and can't be told above 90."""
    run = RunDir(root / name)
    tree = stub_job(seed=seed, **job).model_dump(mode="json") | {"name": name}
    run.path.mkdir(parents=True)
    write_json(run.path / "run.json", {"schema_version": 2, "job": tree})

    def text(k: int) -> ConstitutionRef:
        return texts[max(i for i in texts if i <= k)]

    for k in range(max(words)):
        run.iteration(k).path.mkdir(parents=True)
        plan = Plan(
            iteration=k,
            seed=seed,
            constitution=text(k),
            policy=PolicyVersion(iteration=k, digest="0"),
            prompt_ids=(),
            evaluate=False,
        )
        write_json(run.iteration(k).path / "plan.json", plan.model_dump(mode="json"))
    for updates, count in words.items():
        run.evaluation(updates).path.mkdir(parents=True)
        metrics = EvaluationMetrics(
            answers=4,
            mean_words=count,
            mean_tokens=count,
            list_share=0,
            ended_share=1,
            distinct_share=1,
            updates=updates,
            constitution=text(max(updates - 1, 0)),
            win_rate=count / 100 if updates else None,
            win_interval=wilson(count / 100 * 40, 40) if updates else None,
            length_controlled_win_rate=count / 100 if updates and count <= 90 else None,
            length_controlled_interval=(0.1, 0.9) if updates and count <= 90 else None,
            length_controlled_unknown="no_overlap" if updates and count > 90 else None,
            wins=0,
            losses=0,
            undecided=0,
            kl_per_token=0.0,
            relevance=1,
            base_logprob_per_token=-1,
            checks={"long": count / 100},
            seconds=1,
        )
        write_json(run.evaluation(updates).path / "metrics.json", metrics.model_dump(mode="json"))
    return RunDir.open(run.path)


def test_seeds_are_one_group_and_other_jobs_are_not(tmp_path: Path) -> None:
    a, b = (made(tmp_path, f"a{s}", {0: 50, 2: 60 + s}, {0: OLD}, seed=s) for s in (1, 2))
    c = made(tmp_path, "c", {0: 50, 2: 70}, {0: OLD}, iterations=9)
    assert grouped([a, c, b]) == {"a1": [a, b], "c": [c]}
    found = over_time(grouped([a, c, b]), "start", ["words"])
    ours, theirs = found.groups
    spread = ours.points[1].values["words"]
    assert (spread.runs, spread.mean, spread.sd, spread.low, spread.high) == (2, 61.5, stdev([61, 62]), 61, 62)
    assert theirs.points[1].values["words"].sd is None


def test_a_change_is_laid_at_zero_and_texts_are_not_mixed(tmp_path: Path) -> None:
    goes_on = made(tmp_path, "on", {0: 50, 2: 20, 4: 60, 6: 80}, {0: OLD, 2: NEW})
    anew = made(tmp_path, "anew", {0: 50, 2: 70, 4: 90}, {0: NEW})
    found = over_time({"on": [goes_on], "anew": [anew]}, "change", ["words", "win_rate", "check:long"])
    on, other = found.groups
    assert [p.after for p in on.points] == [-2, 0, 2, 4]
    assert [p.after for p in other.points] == [0, 2, 4]
    assert [c.after for c in on.changes] == [0]
    assert other.changes == ()
    # What was held against the old text doesn't stand beside what was held against the new one; words do.
    assert [p.values["win_rate"].mean for p in on.points if "win_rate" in p.values] == [0.6, 0.8]
    assert [p.values["words"].mean for p in on.points] == [50, 20, 60, 80]
    from_start = over_time({"on": [goes_on]}, "start", ["win_rate"]).groups[0]
    assert [(p.after, p.values["win_rate"].mean) for p in from_start.points if p.values] == [
        (2, 0.2),
        (4, 0.6),
        (6, 0.8),
    ]
    assert [c.after for c in from_start.changes] == [2]


def test_a_win_rate_at_the_change_is_where_the_new_text_found_the_policy(tmp_path: Path) -> None:
    """The evaluation of then was under the text before; the same answers were judged under the new one, too."""
    run = made(tmp_path, "on", {0: 50, 2: 20, 4: 60}, {0: OLD, 2: NEW})
    won = UnderText(
        constitution=NEW, win_rate=0.15, win_interval=(0.05, 0.35), wins=6, losses=34, undecided=0, abstained=0
    )
    metrics = measured().model_copy(update={"iteration": 2, "at_change": won})
    write_json(run.iteration(2).path / "metrics.json", metrics.model_dump(mode="json"))
    [group] = over_time({"on": [run]}, "change", ["win_rate", "words"]).groups
    at = {p.after: p.values for p in group.points}
    assert {after: values["win_rate"].mean for after, values in at.items() if "win_rate" in values} == {0: 0.15, 2: 0.6}
    assert at[0]["win_rate"].error == pytest.approx(0.3 / (2 * 1.960))
    assert at[0]["words"].mean == 20
    assert group.texts_at(0) == ["rules@1", "rules@2"]
    [from_start] = over_time({"on": [run]}, "start", ["win_rate"]).groups
    assert [p.values["win_rate"].mean for p in from_start.points if p.values] == [0.2, 0.6]


def test_a_check_begins_at_none(tmp_path: Path) -> None:
    anew = made(tmp_path, "anew", {0: 50, 2: 70, 4: 90}, {0: NEW})
    found = reach(over_time({"anew": [anew]}, "start", ["check:long"]), "anew", "check:long", 0.5)
    assert (found.start, found.end, found.aim) == (0, 0.8, 0.4)
    assert found.reached[0].after == 0


def those(r: Reach) -> list[tuple[Any, ...]]:
    return [(x.group, x.after, x.not_after, [run.after for run in x.runs]) for x in r.reached]


def test_how_soon_each_group_is_there(tmp_path: Path) -> None:
    on = [
        made(tmp_path, f"on{s}", {0: 50, 2: 20, 4: 60 + s, 6: 85, 8: 88}, {0: OLD, 2: NEW}, seed=s) for s in (0, 1, 40)
    ]
    anew = [made(tmp_path, f"anew{s}", {0: 50, 2: 70, 4: 88 + s, 6: 90}, {0: NEW}, seed=s) for s in (0, 2)]
    stays = made(tmp_path, "stays", {0: 50, 6: 51}, {0: NEW})
    found = over_time({"on": on, "anew": anew, "stays": [stays]}, "change", ["words", "win_rate"])
    words = reach(found, "anew", "words", 0.8)
    # From where `on` stands at the change; `stays` had none.
    assert (words.start, words.end, words.ends, words.aim) == (20, 89.5, (4, 6), pytest.approx(75.6))
    # The mean of `on` after 2 is (60 + 61 + 100) / 3 = 73.7; one of its runs alone is there by then.
    assert those(words) == [("on", 4, 2, [4, 4, 2]), ("anew", 4, 2, [4, 4]), ("stays", None, 6, [None])]
    won = reach(found, "anew", "win_rate", 0.5)
    assert (won.start, won.end, won.aim) == (0.5, pytest.approx(0.895), pytest.approx(0.6975))
    with pytest.raises(UserError, match="no group `x`"):
        reach(found, "x", "words", 0.8)
    with pytest.raises(UserError, match="its ended didn't move"):
        reach(over_time({"on": on}, "start", ["ended"]), "on", "ended", 0.8)
    with pytest.raises(UserError, match="kl is no aim"):
        reach(over_time({"on": on}, "start", ["kl"]), "on", "kl", 0.8)


def test_one_that_fell_back_is_not_there_yet(tmp_path: Path) -> None:
    aim = made(tmp_path, "aim", {0: 50, 2: 60, 4: 80, 6: 80}, {0: NEW})
    wavers = made(tmp_path, "wavers", {0: 50, 2: 85, 4: 70, 6: 76, 8: 75}, {0: NEW})
    falls = made(tmp_path, "falls", {0: 50, 2: 85, 4: 85, 6: 60}, {0: NEW})
    found = over_time({"aim": [aim], "wavers": [wavers], "falls": [falls]}, "start", ["win_rate"])
    assert those(reach(found, "aim", "win_rate", 0.8)) == [
        ("aim", 4, 2, [4]), ("wavers", 6, 4, [6]), ("falls", None, 6, [None]),
    ]  # fmt: skip


def test_a_flat_curve_below_the_aim_is_rarely_there() -> None:
    """Eight evaluations of 48 prompts at .70, against .74."""
    rng = np.random.default_rng(0)
    curves = rng.binomial(48, 0.7, size=(1000, 8)) / 48
    came = [when_there([*enumerate(curve)], lambda value: value >= 0.74) for curve in curves]
    first = np.mean([(curve >= 0.74).any() for curve in curves])
    assert first > 0.8, "what the first crossing would say"
    assert np.mean([c.after is not None for c in came]) < 0.35
    assert np.mean([c.there > 1 for c in came]) < 0.12


def test_the_aim_is_of_the_last_evaluations_under_the_last_text(tmp_path: Path) -> None:
    on = made(tmp_path, "on", {0: 50, 2: 90, 4: 90, 6: 70}, {0: OLD, 4: NEW})
    one = reach(over_time({"on": [on]}, "start", ["words"]), "on", "words", 1.0)
    assert (one.end, one.ends) == (70, (6,))
    further = made(tmp_path, "further", {0: 50, 2: 90, 4: 90, 6: 70, 8: 60}, {0: OLD, 4: NEW})
    two = reach(over_time({"on": [further]}, "start", ["words"]), "on", "words", 1.0)
    assert (two.end, two.ends) == (65, (6, 8))


def test_the_aim_has_an_error_and_seeds_do_not_make_it_less(tmp_path: Path) -> None:
    """Seeds are asked about the same prompts: what these are worth is no smaller an error over three of them."""
    runs = [made(tmp_path, f"r{s}", {0: 50, 2: 70, 4: 80}, {0: NEW}, seed=s) for s in (0, 1, 2)]
    low, high = wilson(0.7 * 40, 40)
    low_2, high_2 = wilson(0.8 * 40, 40)
    over_prompts = ((high - low) + (high_2 - low_2)) / 2 / (2 * 1.960)
    for some in (runs[:1], runs):
        won = reach(over_time({"g": some}, "start", ["win_rate"]), "g", "win_rate", 0.8)
        assert won.aim_error == pytest.approx(0.8 * over_prompts)
    apart = [made(tmp_path, f"a{n}", {0: 50, 2: w, 4: w}, {0: NEW}, seed=9 + n) for n, w in enumerate((55, 95))]
    won = reach(over_time({"g": apart}, "start", ["win_rate"]), "g", "win_rate", 1.0)
    assert won.aim_error == pytest.approx(stdev([0.55, 0.95]) / 2**0.5), "between the runs it is larger"
    assert reach(over_time({"g": runs[:1]}, "start", ["words"]), "g", "words", 0.8).aim_error is None
    said = cli(*(run.path for run in runs), "--reach", "r0", "--measure", "win_rate")
    assert "80% of the way of `r0`, from 0.50 to 0.75 (its mean after 2 and 4 under rules@2), is 0.70 " in said
    assert f"(standard error {0.8 * over_prompts:.2f})" in said
    assert "from this evaluation on to the last" in said
    assert "note:" not in said


def test_a_way_no_longer_than_chance_and_one_that_was_there_from_the_start_are_told(tmp_path: Path) -> None:
    """Over 40 prompts a win rate of .6 is one half, for all one knows."""
    short = made(tmp_path, "short", {0: 50, 2: 55, 4: 60}, {0: NEW})
    said = cli(short.path, "--reach", "short", "--measure", "win_rate", "--measure", "kl")
    assert "note: the way is no longer than chance makes one" in said
    assert "KL" not in said.partition("80% of the way")[2], "what is no aim is in the table above alone"
    there = made(tmp_path, "there", {0: 90, 2: 85, 4: 90}, {0: NEW})
    assert "`there` is there at each of its evaluations" in cli(
        there.path, "--reach", "there", "--measure", "check:long"
    )


def test_a_single_run_says_how_sure_its_numbers_are(tmp_path: Path) -> None:
    run = made(tmp_path, "one", {0: 50, 2: 70}, {0: NEW})
    low, high = wilson(0.7 * 40, 40)
    said = cli(run.path, "--measure", "win_rate", "--measure", "words")
    assert f"0.70 (se {(high - low) / 3.92:.2f})" in said
    assert "Of a single one: its standard error (se)" in " ".join(said.split())


@pytest.mark.parametrize("axis", ["start", "change"])
def test_a_win_rate_under_another_text_is_not_held_against_the_aim(tmp_path: Path, axis: Axis) -> None:
    on = made(tmp_path, "on", {0: 50, 2: 95, 4: 95, 6: 60, 8: 88}, {0: OLD, 4: NEW})
    anew = made(tmp_path, "anew", {0: 50, 2: 70, 4: 90}, {0: NEW})
    old = made(tmp_path, "old", {0: 50, 2: 99, 4: 99}, {0: OLD})
    found = over_time({"on": [on], "anew": [anew], "old": [old]}, axis, ["win_rate", "words", "check:long"])
    for measure, share in (("win_rate", 0.5), ("check:long", 0.9)):
        won = reach(found, "anew", measure, share)
        assert won.constitution == "rules@2"
        first, _, other = won.reached
        at = 8 if axis == "start" else 4
        assert (first.after, first.evaluations) == (at, 2)
        assert (other.after, other.evaluations, other.in_words) == (None, 0, "nothing to compare")
    words = reach(found, "anew", "words", 0.5)
    assert words.constitution is None
    # From 50 up to 80; from the change, where `on` has 95, down to it.
    assert (words.start, words.reached[2].after) == ((50, 2) if axis == "start" else (95, None))
    with pytest.raises(UserError, match="end under rules@1 and rules@2"):
        reach(over_time({"both": [anew, old]}, "start", ["win_rate"]), "both", "win_rate", 0.5)


def test_a_win_rate_that_goes_down_is_no_aim(tmp_path: Path) -> None:
    falls = made(tmp_path, "falls", {0: 50, 2: 40, 4: 30}, {0: NEW})
    found = over_time({"falls": [falls]}, "start", ["win_rate", "words"])
    with pytest.raises(UserError, match=r"ends at 0\.35, below one half"):
        reach(found, "falls", "win_rate", 0.8)
    assert those(reach(found, "falls", "words", 1.0)) == [("falls", 4, 2, [4])], "words may go down"
    both = (falls.path, "--reach", "falls", "--measure", "win_rate", "--measure", "words")
    said = CliRunner().invoke(app, ["compare", *map(str, both)])
    assert "rlaif: --reach: group `falls`: its win_rate ends at 0.35, below one half" in said.stderr
    assert "words: 80% of the way of `falls`" in said.stdout
    assert "below one half" in str(cli(*both[:-2]))


def test_a_mean_says_of_how_many_runs_it_is_and_why_the_others_have_none(tmp_path: Path) -> None:
    runs = [made(tmp_path, f"r{s}", {0: 50, 2: w, 4: 95}, {0: NEW}, seed=s) for s, w in enumerate((70, 80, 95))]
    html = tmp_path / "c.html"
    said = cli(*(run.path for run in runs), "--measure", "equal_length", "--html", html)
    assert [line.split("\t")[3] for line in said.splitlines()[1:4]] == ["-", "0.75 ± 0.07 (2 of 3 runs)", "unknown"]
    why = "win rate at equal length is unknown in 4 evaluations: too few answers are longer, or too few are shorter"
    assert why in said
    page = html.read_text()
    assert ">0.75 ± 0.07 (2 of 3 runs)<" in page
    assert ">unknown<" in page
    assert why in page


def test_what_was_before_the_change_is_no_way_to_it(tmp_path: Path) -> None:
    on = made(tmp_path, "on", {0: 50, 2: 95, 4: 20, 6: 60, 8: 88}, {0: OLD, 4: NEW})
    anew = made(tmp_path, "anew", {0: 50, 2: 70, 4: 90}, {0: NEW})
    found = over_time({"on": [on], "anew": [anew]}, "change", ["words"])
    [first, _] = reach(found, "anew", "words", 0.8).reached
    assert (first.after, first.not_after, first.evaluations) == (4, 2, 3)
    of_itself = reach(found, "on", "words", 0.5)
    assert (of_itself.start, of_itself.end, of_itself.reached[0].after) == (20, 74, 2)


def test_a_change_is_one_of_the_text_in_force_whatever_labelled_the_pairs(tmp_path: Path) -> None:
    """A branch that goes on offline under the new text, on pairs that were judged under the old one."""
    run = made(tmp_path, "offline", {0: 50, 2: 20, 4: 60}, {0: OLD, 2: NEW})
    for k in (2, 3):
        path = run.iteration(k).path / "plan.json"
        plan = read_record(path, Plan)
        noted = PlanSource(
            path="online", iteration=0, iterations=(0, 1), sha256="0" * 64, in_force=PlanTexts(constitution=NEW)
        )
        stored = plan.model_copy(update={"constitution": OLD, "source": noted})
        write_json(path, stored.model_dump(mode="json"))
    [group] = over_time({"offline": [run]}, "change", ["win_rate"]).groups
    assert [(c.after, c.constitution) for c in group.changes] == [(0, "rules@2")]
    assert [(p.after, p.values["win_rate"].mean) for p in group.points if p.values] == [(2, 0.6)]


def test_a_mean_over_some_of_the_seeds_is_no_aim(tmp_path: Path) -> None:
    done = made(tmp_path, "done", {0: 50, 2: 70, 4: 100}, {0: NEW})
    at_work = made(tmp_path, "at_work", {0: 50, 2: 60}, {0: NEW}, seed=1)
    found = over_time({"both": [done, at_work]}, "start", ["words"])
    words = reach(found, "both", "words", 1.0)
    assert (words.end, words.reached[0].after, [run.after for run in words.reached[0].runs]) == (65, 2, [2, None])
    apart = made(tmp_path, "apart", {1: 70, 3: 100}, {0: NEW}, seed=2)
    with pytest.raises(UserError, match="no evaluation at which all of its runs have a words"):
        reach(over_time({"both": [done, apart]}, "start", ["words"]), "both", "words", 1.0)


def test_a_real_loops_runs_are_what_their_metrics_say(tmp_path: Path) -> None:
    for seed in (1, 2):
        root = tmp_path / str(seed)
        job = stub_job(seed=seed)
        loop = stub_loop(root, job)
        write_json(loop.dir.path / "run.json", {"schema_version": 2, "job": job.model_dump(mode="json")})
        loop.run()
    runs = [RunDir.open(tmp_path / str(seed) / "run") for seed in (1, 2)]
    [group] = over_time(grouped(runs), "start", list(MEASURES)).groups
    assert [c.after for c in group.changes] == [2]
    for point in group.points:
        there = [read_record(run.evaluation(point.after).path / "metrics.json", EvaluationMetrics) for run in runs]
        assert point.values["words"].mean == fmean(e.mean_words for e in there)
        assert point.values["kl"].mean == fmean(e.kl_per_token or 0.0 for e in there)


def cli(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    if isinstance(result.exception, UserError):
        return result.exception
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_the_command_by_folder_name_and_pattern(stored: RunDir, tmp_path: Path) -> None:
    for seed in (3, 4):
        shutil.copytree(stored.path, tmp_path / "runs" / f"r{seed}")
        header = stored.header
        header["job"] |= {"seed": seed}
        write_json(tmp_path / "runs" / f"r{seed}" / "run.json", header)
        (tmp_path / "runs" / f"r{seed}" / "heads.jsonl").unlink(missing_ok=True)  # else they are one run, twice
    said = cli(tmp_path / "runs")
    assert "r3 (2 runs)" in said
    assert "± 0.0" in said
    whole = json.loads(cli(f"both={tmp_path}/runs/r*", stored.path, "--json", "--measure", "words", "--from", "change"))
    assert [(g["name"], len(g["runs"])) for g in whole["groups"]] == [("both", 2), (stored.path.name, 1)]
    assert whole["axis"] == "change"
    picture = tmp_path / "c.svg"
    cli(f"both={tmp_path}/runs/r*", "--picture", picture)
    assert b"<svg" in picture.read_bytes()


def test_mistakes_are_told(stored: RunDir, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    wrong: dict[tuple[object, ...], str] = {
        (tmp_path / "none",): "no such run",
        (f"x={tmp_path}/none-*",): "no such run",
        (tmp_path / "runs",): "not a run directory",
        (stored.path, "--measure", "taste"): "no measure `taste`",
        (stored.path, "--measure", "check:foo"): "no run has a check of this name; ",
        (stored.path, "--from", "middle"): "expected start or change",
        (stored.path, "--picture", "c.gif"): "png or svg",
        (stored.path, f"{stored.path.name}={stored.path}"): "two groups",
        (stored.path, "--reach", "x"): "no group `x`",
    }
    for arguments, why in wrong.items():
        assert why in str(cli(*arguments)), arguments


def test_the_picture_has_a_line_for_each_group(tmp_path: Path) -> None:
    on = [made(tmp_path, f"on{s}", {0: 50, 2: 20 + s, 4: 60}, {0: OLD, 2: NEW}, seed=s) for s in (0, 1)]
    found = over_time({"goes on": on}, "change", ["words", "win_rate"])
    draw_over_time(found, tmp_path / "a.svg")
    draw_over_time(found, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "rules@2" in (tmp_path / "a.svg").read_text(), "the change is marked by name"


def test_the_report_is_one_file_with_every_number(tmp_path: Path) -> None:
    for s in (0, 1):
        made(tmp_path, f"on{s}", {0: 50, 2: 20 + s, 4: 60}, {0: OLD, 2: NEW}, seed=s)
    anew = made(tmp_path, "anew", {0: 50, 2: 71}, {0: NEW}, iterations=3)
    to = tmp_path / "c.html"
    cli(f"on={tmp_path}/on*", anew.path, "--from", "change", "--reach", "anew", "--measure", "words", "--html", to)
    said = to.read_text()
    assert said.count(">20.5 ± 0.71 (2)<") == 1
    for part in (
        "2 runs, seeds 0, 1",
        "rules@2 after 0",
        "80 % of the way of <strong>anew</strong>",
        "(its mean after 2)",
        "(standard error not known)",
        ">71.0<",
    ):
        assert part in said, part
    # Each row says under which text its answers were judged.
    table = said.partition("<h2>All evaluations</h2>")[2]
    assert re.findall(r'<td class="n">(-?\d)</td><td>(rules@\d)</td>', table) == [
        ("-2", "rules@1"), ("0", "rules@1"), ("2", "rules@2"), ("0", "rules@2"), ("2", "rules@2"),
    ]  # fmt: skip
    assert said.count("<figure") == 1
    assert "src=" not in said
    assert "href=" not in said
    assert "no folder" in str(cli(anew.path, "--html", tmp_path / "none" / "c.html"))


def test_runs_of_one_seed_are_no_spread(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made(tmp_path, name, {0: 50, 2: 60}, {0: OLD}, seed=seed)

    def told(*names: str) -> str:
        return CliRunner().invoke(app, ["compare", *(str(tmp_path / name) for name in names)]).stderr

    assert "several of its runs have one seed" in told("a", "b", "c")
    assert "seed" not in told("a", "c")


def test_what_branches_share_at_a_change_counts_once(tmp_path: Path) -> None:
    """Of branches from after the change; what each measured by itself would count by itself."""
    texts: dict[str, Any] = {"schedule": {0: "rules@1", 1: "rules@2"}, "filters": {"min_kept_pairs": 1}}
    parent = go_on(tmp_path, keep_checkpoints="all", **texts)
    for name in ("b", "c"):
        branch(parent, 2, name)
        go_on(tmp_path, name)
    (group,) = over_time({"g": [RunDir(tmp_path / name) for name in ("run", "b", "c")]}, "change", ["win_rate"]).groups
    at = {p.after: p.values["win_rate"] for p in group.points if p.values}
    assert (at[0].runs, at[0].evaluations, at[0].sd) == (3, 1, None)
    found = parent.iterations_measured([1])[0].at_change
    assert found is not None
    assert at[0].mean == found.win_rate


def test_what_branches_share_counts_once(tmp_path: Path) -> None:
    parent = go_on(tmp_path, filters={"min_kept_pairs": 1}, keep_checkpoints="all")
    branches = [branch(parent, 2, name).path.name for name in ("b", "c")]
    for name in branches:
        go_on(tmp_path, name)
    alone = go_on(tmp_path, "alone", seed=8)
    runs = [RunDir(tmp_path / name) for name in ("run", *branches, "alone")]
    (group,) = over_time({"g": runs}, "start", ["words"]).groups
    assert [(shared.runs, shared.iterations) for shared in group.shared] == [(("run", "b", "c"), 2)]
    spreads = {p.after: p.values["words"] for p in group.points}
    assert {after: (s.runs, s.evaluations) for after, s in spreads.items()} == {0: (4, 2), 2: (4, 2), 4: (4, 4)}
    words = {
        name: read_record(RunDir(tmp_path / name).evaluation(2).path / "metrics.json", EvaluationMetrics).mean_words
        for name in ("run", "alone")
    }
    assert spreads[2].mean == pytest.approx(fmean(words.values()))
    assert spreads[2].sd == pytest.approx(stdev(words.values()))
    to = tmp_path / "c.html"
    three = [f"g={run.path}" for run in runs[:3]]
    said = CliRunner().invoke(app, ["compare", *three, "--html", str(to)])
    assert "g: run, b, c share their first 2 iterations; an evaluation of these counts once" in said.stderr
    only = over_time({"g": [runs[0], alone]}, "start", ["words"]).groups[0]
    assert only.shared == ()
    assert "share their first 2 iterations" in to.read_text()


def test_a_check_of_no_text_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    run = made(tmp_path, "a", {0: 50, 2: 60}, {0: OLD})
    with pytest.raises(UserError, match=r"--measure check:foo: no run has a check of this name; there are check:long"):
        over_time({"a": [run]}, "start", ["check:long", "check:foo"])
