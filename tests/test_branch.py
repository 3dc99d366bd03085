"""Branches: what they share with their parent, what they go on with, and that the log of both holds."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif.audit.runs import runs_in
from rlaif.audit.summary import status_of
from rlaif.audit.verify import verify
from rlaif.cli import app
from rlaif.config import parse_job
from rlaif.errors import RlaifError, UserError
from rlaif.loop.branch import MAY_BRANCH, branch
from rlaif.loop.launch import prompts_of, write_header
from rlaif.records import SCHEMA_VERSION, HumanLabel, UpdateStep, digest
from rlaif.rundir.checkpoints import checkpoints
from rlaif.rundir.heads import read_heads
from rlaif.rundir.store import RunDir, write_json
from tests.conftest import project_job
from tests.data import make_run
from tests.stubs import BASE_DIGEST, Quiet, stub_job, stub_loop
from tests.test_resume import outcome

pytestmark = pytest.mark.slow


def go_on(root: Path, name: str = "run", **changes: Any) -> RunDir:
    """The stub run of this name, to the end of its own job or of another one; with a run.json, as `execute` has it."""
    run = RunDir(root / name)
    if (run.path / "run.json").exists():
        job = parse_job(run.header["job"] | changes, "test")
    else:
        job = stub_job(**changes)
        run.path.mkdir(parents=True)
    header = {"schema_version": SCHEMA_VERSION, "models": {"policy": BASE_DIGEST}}
    header |= run.header if (run.path / "run.json").exists() else {}
    dumped = job.model_dump(mode="json")
    if header.get("job") != dumped:
        if "job" in header:
            run.event("job_changed", "iterations")
        write_json(run.path / "run.json", header | {"job": dumped, "job_digest": digest(dumped)})
    stub_loop(root, job, name=name).run()
    return run


def keep(run: RunDir, iteration: int) -> None:
    """The checkpoint that an iteration made, as if it had been kept."""
    here = run.iteration(iteration)
    steps = [step for k in range(iteration + 1) for step in run.iteration(k).read("updates", UpdateStep)]
    weights = here.policy_made()
    assert weights is not None
    for folder, name, content in (
        (here.path / "policy", "weights.txt", weights),
        (run.path / "learner" / f"{iteration:04d}", "state.json", json.dumps([weights, steps[-1].step])),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def made(run: RunDir) -> list[str | None]:
    """The digest of every policy, iteration for iteration."""
    return [run.iteration(k).policy_made() for k in run.iterations()]


@pytest.mark.parametrize("lora", [False, True])
def test_a_branch_makes_the_policies_that_its_parent_makes(tiny_model: Path, tmp_path: Path, lora: bool) -> None:
    """A real learner and sampler: weights, Adam's moments, schedule, random numbers, step and seeds all go on."""
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    learner = {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}} if lora else {}
    job = project_job(tmp_path, tiny_model, iterations=2, learner=learner)
    parent = execute(job, tmp_path / "runs" / "parent", tmp_path, Quiet())
    child = branch(parent, 2, "child", ["iterations=4"])
    assert made(child) == made(parent)
    longer = parse_job(parent.header["job"] | {"iterations": 4}, "test")
    execute(longer, parent.path, tmp_path, Quiet(), allow_change=True)
    execute(child.job(), child.path, tmp_path, Quiet())
    assert len(set(made(parent))) == 4
    assert made(child) == made(parent)
    steps = [
        [s.model_dump(exclude={"seconds"}) for k in range(4) for s in run.iteration(k).read("updates", UpdateStep)]
        for run in (parent, child)
    ]
    assert steps[0] == steps[1]
    assert verify(child).findings == ()
    parents = [head.head for head in read_heads(parent.path) if head]
    assert [head.head for head in read_heads(child.path) if head][:2] == parents[:2]


def test_a_branch_goes_the_way_of_its_parent(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=3)
    child = branch(parent, 3, "child", ["iterations=4"])
    assert "goes on from run after 3 iterations" in CliRunner().invoke(app, ["audit", str(child.path)]).stdout
    go_on(tmp_path, iterations=4)
    go_on(tmp_path, "child")
    assert made(child) == made(parent)
    assert outcome(child.path)["rows"] == outcome(parent.path)["rows"]
    assert verify(child).findings == ()


def test_a_branch_holds_what_its_parent_had_written_by_then(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=3)
    before = {str(p.relative_to(parent.path)): p.read_bytes() for p in parent.path.rglob("*") if p.is_file()}
    go_on(tmp_path, iterations=4)
    keep(parent, 2)
    (parent.path / "judge_wasted.jsonl").write_text("{}\n")
    child = branch(parent, 3, "child")
    (child.path / "judge_wasted.jsonl").open("a").write("{}\n")
    assert (parent.path / "judge_wasted.jsonl").read_text() == "{}\n"
    (child.path / "judge_wasted.jsonl").unlink()
    assert child.iterations() == [0, 1, 2]
    assert child.evaluations() == [0, 2, 3]
    own = {"run.json", "heads.jsonl", "events.jsonl"}
    shared = [p for p in child.path.rglob("*") if p.is_file() and str(p.relative_to(child.path)) not in own]
    for path in shared:
        name = str(path.relative_to(child.path))
        if not name.startswith("learner/") and name != "constitutions/pins.json":
            assert path.read_bytes() == before[name]
            assert path.stat().st_ino == (parent.path / name).stat().st_ino, name
    told = child.events()
    assert [e.kind for e in told] == [e.kind for e in told if e.iteration in (None, 0, 1, 2)]
    assert told[-1].kind == "branched"
    assert told[-1].message == "goes on from run after 3 iterations"
    assert child.parent is not None
    assert (child.parent.run, child.parent.iterations) == ("run", 3)
    heads = [head for head in read_heads(child.path) if head]
    assert [head.iteration for head in heads] == [0, 1, 2, 2]
    assert heads[2].name == child.parent.head
    assert {head.head for head in heads[:3]} < {head.head for head in read_heads(parent.path) if head}
    assert verify(child).findings == ()
    assert verify(parent).findings == ()
    assert not any("can't be told" in note for note in verify(child).notes)


def test_a_branch_goes_on_where_its_parent_went_another_way(tmp_path: Path) -> None:
    """Two branches of one state, a changed setting in the second: they share the past, and differ from there on."""
    parent = go_on(tmp_path, filters={"min_kept_pairs": 1})
    keep(parent, 1)
    same, other = branch(parent, 2, "same"), branch(parent, 2, "other", ["replay.share=0.8"])
    for name in ("same", "other"):
        go_on(tmp_path, name)
    assert made(same) == made(parent)
    assert made(other)[:3] == made(parent)[:3]  # the text changed before the third: there is nothing to replay
    assert made(other)[3] != made(parent)[3]
    assert [e.data["changed"] for e in other.events() if e.kind == "branched"] == ["replay.share (0.4 -> 0.8)"]
    assert [run.header["job"]["replay"]["share"] for run in (same, other)] == [0.4, 0.8]
    assert all(verify(run).holds for run in (parent, same, other))


def test_an_evaluation_of_the_next_iteration_is_made_again(tmp_path: Path) -> None:
    """The policy after 2 is evaluated since the text changed, which a branch may not do."""
    parent = go_on(tmp_path, filters={"min_kept_pairs": 1}, eval={"every": 9, "prompts": 3})
    assert parent.evaluations() == [0, 2, 4]
    keep(parent, 1)
    branch(parent, 2, "same")
    other = branch(parent, 2, "other", ["schedule={0: rules@1}"])
    assert other.evaluations() == [0]
    assert go_on(tmp_path, "same").evaluations() == [0, 2, 4]
    assert go_on(tmp_path, "other").evaluations() == [0, 4]
    assert outcome(tmp_path / "same")["rows"] == outcome(parent.path)["rows"]


def test_a_branch_of_a_branch(tmp_path: Path) -> None:
    parent = go_on(tmp_path, filters={"min_kept_pairs": 1})
    keep(parent, 1)
    child = branch(parent, 2, "child", ["replay.share=0.8"])
    grandchild = branch(child, 2, "grandchild", ["iterations=3"])
    go_on(tmp_path, "child")
    keep(child, 2)
    later = branch(child, 3, "later")
    assert [run.parent.run for run in (child, grandchild, later) if run.parent] == ["run", "child", "child"]
    assert grandchild.job().replay.share == 0.8  # and its log says since when
    assert [e.data["run"] for e in grandchild.events() if e.kind == "branched"] == ["run", "child"]
    for name in ("grandchild", "later"):
        run = go_on(tmp_path, name)
        assert verify(run).findings == ()
        assert made(run) == made(child)[: len(made(run))]


def test_labels_of_later_on_pairs_of_the_past_come_along(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=3)
    labels = parent.path / "review" / "labels.jsonl"
    labels.parent.mkdir()
    given = [
        HumanLabel(pair_id=f"pair{k}", iteration=k, outcome="first", author="ann", time="2026-01-01T00:00:00Z")
        for k in (1, 2, 3, 1)
    ]
    labels.write_text("".join(label.model_dump_json() + "\n" for label in given[:2]))
    go_on(tmp_path, iterations=4)
    with labels.open("a") as f:
        f.write("".join(label.model_dump_json() + "\n" for label in given[2:]) + '{"torn')
    keep(parent, 2)
    child = branch(parent, 3, "child")
    kept = [given[0], given[1], given[3]]
    assert (child.path / "review/labels.jsonl").read_text() == "".join(x.model_dump_json() + "\n" for x in kept)
    assert verify(child).findings == ()


def test_files_are_copied_where_they_cant_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})

    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    child = branch(parent, 2, "child", ["iterations=3"])
    file = "iterations/0001/votes.jsonl"
    assert (child.path / file).read_bytes() == (parent.path / file).read_bytes()
    assert (child.path / file).stat().st_ino != (parent.path / file).stat().st_ino
    go_on(tmp_path, "child")
    assert verify(child).findings == ()


def test_a_kill_before_a_head_costs_a_branch_nothing(tmp_path: Path) -> None:
    """The run's next head covers both iterations; a branch in between has the events that were told by then."""
    parent = go_on(tmp_path, filters={"min_kept_pairs": 1})
    lines = (parent.path / "heads.jsonl").read_text().splitlines(keepends=True)
    (parent.path / "heads.jsonl").write_text("".join(lines[:2]))
    keep(parent, 2)
    child = branch(parent, 3, "child")
    assert child.parent is not None
    assert child.parent.head is None
    assert max(e.iteration for e in child.events() if e.iteration is not None) == 2
    assert [head.iteration for head in read_heads(child.path) if head] == [0, 1, 2]
    assert verify(child).findings == ()
    go_on(tmp_path, "child")
    assert made(child) == made(parent)


@pytest.mark.parametrize("schema", ["run_schema1", "run_schema2"])
def test_stored_runs_can_be_gone_on_from(tmp_path: Path, schema: str) -> None:
    parent = RunDir(tmp_path / "parent")
    shutil.copytree(Path(__file__).parent / "data" / schema, parent.path)
    at = max(run.iterations for run in checkpoints(parent) if run.policy and run.state)
    child = branch(parent, at, "child")
    assert child.schema == parent.schema
    assert len(child.iterations()) == at
    assert verify(child).findings == ()
    assert (tmp_path / "child" / "heads.jsonl").exists()
    write_header(child, child.job(), child.header["models"], {})  # as when it goes on
    write_header(child, child.job().model_copy(update={"iterations": 9}), child.header["models"], {}, "iterations")
    assert child.schema == SCHEMA_VERSION
    assert child.job().iterations == 9
    assert child.parent is not None
    assert verify(child).findings == ()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("learner.lora.r=4", "learner.lora"),
        ("filters.min_agreement=0.1", "filters.min_agreement"),
        ("eval.prompts=1", "eval.prompts"),
        ("prompts.train=other.jsonl", "prompts.train"),
        ("sampling.max_tokens=3", "sampling.max_tokens"),
        ("iterations=1", "has 2 behind it"),
        ("replay.share=many", "replay.share"),
        ("nonsense=1", "nonsense"),
    ],
)
def test_what_the_past_was_made_or_is_measured_by_stays(tmp_path: Path, key: str, message: str) -> None:
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    with pytest.raises(UserError, match=message):
        branch(parent, 2, "child", [key])
    assert not list(tmp_path.glob("child*"))


@pytest.mark.parametrize("key", MAY_BRANCH)
def test_what_a_branch_may_change_is_a_setting(key: str) -> None:
    section, _, name = key.rpartition(".")
    tree = stub_job().model_dump()
    assert name in (tree[section] if section else tree)


def test_a_state_that_is_not_kept_is_named_with_the_nearest(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=4, filters={"min_kept_pairs": 1})
    for at, message in (
        (2, "the nearest that is kept whole is after 4, --new-optimizer goes on .* alone, after 2"),
        (1, "no longer has the policy of then"),
        (0, "after 0: .*run has done 4 iterations; give one of 1 to 4"),
        (5, "after 5: .*run has done 4"),
    ):
        with pytest.raises(UserError, match=message):
            branch(parent, at, "child")
    with pytest.raises(UserError, match="is there already; take another name"):
        branch(parent, 4, "run")
    with pytest.raises(UserError, match="one folder's"):
        branch(parent, 4, "../elsewhere")


def test_a_new_optimizer_goes_on_from_the_policy_alone(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=4, filters={"min_kept_pairs": 1})
    child = branch(parent, 2, "child", new_optimizer=True)
    go_on(tmp_path, "child")
    assert made(child) == made(parent)  # the stub's optimizer is its weights
    steps = [step.step for k in range(4) for step in child.iteration(k).read("updates", UpdateStep)]
    assert steps == list(range(1, len(steps) + 1))
    (told,) = [e.message for e in child.events() if e.kind == "branched"]
    assert told.endswith("; a new optimizer goes on from the policy")


def test_a_run_says_that_a_branch_may_change_what_it_may_not(tmp_path: Path) -> None:
    from rlaif.loop.launch import check_resume

    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    (parent.evaluation(0).path / "completions.jsonl").stat()  # something was sampled
    for changes, said in (({"replay": {"share": 0.1}}, True), ({"replay": {"share": 0.1}, "seed": 1}, False)):
        job = parse_job(parent.header["job"] | changes, "test")
        with pytest.raises(UserError) as e:
            check_resume(parent, job, allow_change=True)
        assert str(e.value).endswith("--at 2 --name NAME --set ...") == said


def test_a_job_with_a_name_gets_the_branchs(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    assert branch(parent, 2, "child").job().name is None
    header = parent.header
    header["job"]["name"] = "run"
    write_json(parent.path / "run.json", header)
    assert branch(parent, 2, "other").job().name == "other"


def test_more_prompts_than_the_parent_had_are_refused(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    header = parent.header
    make_run.write_header(parent.path, parent.job())  # with prompts
    write_json(parent.path / "run.json", header)
    child = branch(parent, 2, "child", ["prompts.per_iteration=21"])
    with pytest.raises(UserError, match=r"prompts.per_iteration=21: .* has 20 prompts to train on"):
        prompts_of(child, child.job(), tmp_path)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_pass_stays_whole_where_a_branch_takes_another_number_of_prompts(tmp_path: Path, staleness: int) -> None:
    """20 prompts: twice six of the parent's, twice four."""
    go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1}, pipeline={"staleness": staleness})
    child = branch(RunDir(tmp_path / "run"), 2, "child", ["prompts.per_iteration=4", "iterations=4"])
    go_on(tmp_path, "child")
    asked = [prompt for k in range(4) for prompt in child.plan(k).prompt_ids]
    assert (len(asked), len({*asked})) == (20, 20)


def test_an_adapter_needs_its_state(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    header = parent.header
    header["job"]["learner"]["lora"] = {"r": 2}
    write_json(parent.path / "run.json", header)
    with pytest.raises(UserError, match=r"has merged; start a new run with policy.model=.*iterations/0001/policy"):
        branch(parent, 2, "child", new_optimizer=True)
    assert branch(parent, 2, "child").iterations() == [0, 1]


def test_a_learner_of_ones_own_needs_a_method_for_it(tmp_path: Path) -> None:
    (tmp_path / "mine_branch.py").write_text("class Mine:\n    pass\n\nclass Starts:\n    def start(self): ...\n")
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    header = parent.header
    for kind, refused in (("Mine", True), ("Starts", False)):
        header["job"]["learner"]["kind"] = f"mine_branch:{kind}"
        write_json(parent.path / "run.json", header)
        if refused:
            with pytest.raises(UserError, match="mine_branch:Mine has no method `start`"):
                branch(parent, 2, kind, new_optimizer=True)
        else:
            assert branch(parent, 2, kind, new_optimizer=True).iterations() == [0, 1]


def test_a_branch_that_was_killed_is_made_again(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    (tmp_path / "child.partial/iterations/0009").mkdir(parents=True)
    child = branch(parent, 2, "child")
    assert child.iterations() == [0, 1]
    assert not list(tmp_path.glob("*.partial"))


def test_a_damaged_parent_is_named(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    child = branch(parent, 2, "child")
    write_json(child.path / "run.json", child.header | {"parent": {"run": "run"}})
    with pytest.raises(RlaifError, match=r"run\.json: its parent is none"):
        status_of(child)
    (row,) = [row for row in runs_in(tmp_path) if row.run == "child"]
    assert "its parent is none" in str(row.problem)


def test_a_checkpoint_that_goes_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    link = os.link

    def pruned(source: Path, to: Path) -> None:
        shutil.rmtree(parent.path / "iterations/0001/policy", ignore_errors=True)
        link(source, to)

    monkeypatch.setattr(os, "link", pruned)
    with pytest.raises(UserError, match="removed the checkpoint just now"):
        branch(parent, 2, "child")
    assert not list(tmp_path.glob("child*"))


def test_verify_follows_the_head_of_the_parent(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    child = branch(parent, 2, "child")
    assert verify(child).notes == ()
    (tmp_path / "run").rename(tmp_path / "run.before-rollback-7")
    assert verify(child).notes == ()
    (tmp_path / "run.before-rollback-7").rename(tmp_path / "elsewhere")
    (note,) = verify(child).notes
    assert note.startswith("the first 2 iterations are those of run, which isn't here with head 2:")
    assert verify(child).holds
    header = child.header
    header["parent"]["head"] = "2:" + 32 * "0"
    write_json(child.path / "run.json", header)
    assert "run.json: names head 2:000" in " ".join(map(str, verify(child).findings))
    # What was changed in the past is found in the branch, too.
    (child.path / "iterations/0000/decisions.jsonl").unlink()
    assert any("iterations/0000/decisions.jsonl" in str(finding) for finding in verify(child).findings)


def test_a_branch_takes_nothing_from_the_lock_of_a_run_at_work(tmp_path: Path) -> None:
    parent = go_on(tmp_path, iterations=2, filters={"min_kept_pairs": 1})
    with parent.lock():
        child = branch(parent, 2, "child", ["iterations=3"])
        go_on(tmp_path, "child")
    assert child.iterations() == [0, 1, 2]
    assert parent.iterations() == [0, 1]
    assert verify(parent).findings == ()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("constitution=none", "constitution `none`"),
        ("source={run: none}", "none"),
        ("source={data: none.jsonl}", "none.jsonl"),
    ],
)
def test_a_text_or_a_source_that_is_not_there_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, message: str
) -> None:
    parent = go_on(tmp_path, iterations=3)
    monkeypatch.chdir(tmp_path)
    more = ["schedule=null"] if changed.startswith("constitution") else []
    with pytest.raises(UserError, match=re.escape(message)):
        branch(parent, 3, "child", [*more, changed])
    assert not (tmp_path / "child").exists()
