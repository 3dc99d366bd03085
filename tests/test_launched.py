"""How many processes a learner is started in: accelerate's own file, and a run with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.config import Job, parse_job
from rlaif.errors import RunPaused, UserError, WorkerDied
from rlaif.learning import launched as launching
from rlaif.learning.launched import Launched, launched
from rlaif.records import UpdateStep
from rlaif.rundir.store import RunDir
from rlaif.workers.feed import Feed
from rlaif.workers.inline import InlineWorker
from rlaif.workers.worker import Worker
from tests.conftest import project_job
from tests.stubs import Quiet

ON_CPUS = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}
FSDP2 = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {"fsdp_version": 2}}


def write(folder: Path, **said: Any) -> Path:
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **said}))
    return path


def job(**changes: Any) -> Job:
    return parse_job({"constitution": "rules", **changes}, "test")


def test_without_a_file_it_is_what_the_cluster_says() -> None:
    assert launched(job(), None) == Launched()
    assert launched(job(cluster={"learner": {"processes": 2}}), None) == Launched(2)


def test_pairs_of_a_step_have_to_be_shared_out_evenly() -> None:
    with pytest.raises(UserError, match=r"learner.batch_size: 4 pairs .* the learner's 3 processes; 6 could"):
        launched(job(cluster={"learner": {"processes": 3}}), None)


def test_without_accelerate_its_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run needs no more of the extra than this."""
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"learner.accelerate: .*accelerate.yaml is accelerate's to read: `"):
        launched(job(), write(tmp_path, **ON_CPUS))


@pytest.mark.slow
def test_accelerate_reads_its_own_file(tmp_path: Path) -> None:
    found = launched(job(learner={"batch_size": 8}), write(tmp_path, **FSDP2, mixed_precision="bf16"))
    assert found.processes == 4
    assert found.sharded
    wanted = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}
    assert found.environment.items() >= wanted.items()
    assert found.environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false", "each process reads the weights"
    assert not {"MASTER_PORT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"} & found.environment.keys()
    with pytest.raises(
        UserError, match=r"learner.accelerate: .*accelerate.yaml: accelerate can't use it .*unknown keys"
    ):
        launched(job(), write(tmp_path, **ON_CPUS, nonsense=1))


@pytest.mark.slow
def test_a_file_that_is_no_yaml_is_the_users_mistake(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text("distributed_type: MULTI_CPU\nfoo: [1\n")
    with pytest.raises(UserError, match=r"accelerate.yaml: accelerate can't use it \(.*expected ',' or '\]'"):
        launched(job(), file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 1}}, "to-fsdp2"),
        ({"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": 2}}, "take FSDP2"),
        ({"distributed_type": "MEGATRON_LM", "num_processes": 2}, "Megatron-LM"),
        ({**FSDP2, "parallelism_config": {"parallelism_config_tp_size": 2}}, "parallelism_config"),
        ({"distributed_type": "MULTI_GPU"}, "num_processes"),
        ({"distributed_type": "NONSENSE", "num_processes": 2}, "NONSENSE"),
        ({"num_processes": 2}, "distributed_type"),
        ({"distributed_type": "MULTI_CPU", "num_processes": 0, "use_cpu": True}, "num_processes: 0; set 1 or more"),
        (ON_CPUS, "cluster.learner.processes: 4"),
    ],
)
def test_what_the_learner_cannot_do_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    from rlaif.learning import accelerate_compat

    with pytest.raises(UserError, match=message):
        accelerate_compat.launched(str(write(tmp_path, **said)), 4 if said is ON_CPUS else None)


@pytest.mark.slow
def test_a_run_whose_learner_is_two_processes(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decisions and the steps are those of one; the run goes on when the file is gone."""
    from rlaif.loop.launch import execute

    steps, notes = {}, []
    for name in ("one", "two"):
        root = tmp_path / name
        learner = {"batch_size": 2, "precision": "fp32", **({"accelerate": "cpus.yaml"} if name == "two" else {})}
        own = {"learner": {"worker": "process"}}
        changes: dict[str, Any] = {"iterations": 1, "learner": learner, "placement": own}
        made = project_job(root, tiny_model, **changes)
        write(root, **ON_CPUS).rename(root / "cpus.yaml")
        told = Quiet()
        run = execute(made, root / "run", root, told)
        steps[name] = run.iteration(0).read("updates", UpdateStep)
        notes += told.notes
    assert [s.row_ids for s in steps["two"]] == [s.row_ids for s in steps["one"]]
    assert [s.loss for s in steps["two"]] == pytest.approx([s.loss for s in steps["one"]], abs=1e-5)
    assert any("in 2 processes" in note for note in notes)
    assert yaml.safe_load((tmp_path / "two/run/accelerate.yaml").read_text())["num_processes"] == 2
    assert json.loads((tmp_path / "two/run/run.json").read_text())["job"]["learner"]["accelerate"] == "cpus.yaml"

    (tmp_path / "two/cpus.yaml").unlink()
    longer = made.model_copy(update={"iterations": 2})
    execute(longer, tmp_path / "two/run", tmp_path / "two", Quiet(), allow_change=True)
    assert RunDir(tmp_path / "two/run").iteration(1).read("updates", UpdateStep)
    assert (tmp_path / "two/run/logs/learner-2.log").exists()


class Dies(InlineWorker):
    """A learner whose process dies at the first step of an update, as often as `left` says."""

    left: list[int]

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Iterator[Any]:
        for item in super().stream(method, feed, **kwargs):
            yield item
            if method == "update" and self.left:
                self.left.pop()
                raise WorkerDied("learner 2 worker died (unplugged)")


class Here:
    """In a Ray cluster's place: its learner is this process. tests/test_ray.py has a real one, with real deaths."""

    def __init__(self, deaths: int) -> None:
        self._left = [0] * deaths

    def has(self, role: str) -> bool:
        return False

    def gpus_each(self, wanted: int) -> float:
        return 0

    def reserve(self, role: str, count: int, gpus: float, together: bool) -> None: ...

    def start_ranks(
        self, role: str, count: int, factory: str, kwargs: dict[str, Any], gpus: float, variables: dict[str, str]
    ) -> Worker:
        learner = Dies(role, factory, kwargs)
        learner.left = self._left
        return learner

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *exc: object) -> None: ...


@pytest.mark.slow
def test_a_learner_that_dies_on_a_cluster_goes_on_from_the_log(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlaif.loop import launch

    cluster = {"learner": {"processes": 2}, "max_restarts": 2}
    changes: dict[str, Any] = {"iterations": 1, "constitution": "rules@1", "cluster": cluster}
    made = project_job(tmp_path, tiny_model, **changes)

    told = Quiet()
    here = Here(deaths=3)
    monkeypatch.setattr(launch, "RayCluster", lambda *args: here)
    with pytest.raises(RunPaused, match=r"learner 2 worker died \(unplugged\); cluster\.max_restarts=2 is used up"):
        launch.execute(made, tmp_path / "dies", tmp_path, told)
    assert [note for note in told.notes if "worker died" in note] == [
        f"learner 2 worker died (unplugged); the run goes on from its log (restart {n} of 2)" for n in (1, 2)
    ]
    assert [e.kind for e in RunDir(tmp_path / "dies").events()].count("resumed") == 2
    steps = [
        [(step.row_ids, step.loss) for step in run.iteration(0).read("updates", UpdateStep)]
        for run in (launch.execute(made, tmp_path / name, tmp_path, Quiet()) for name in ("dies", "alone"))
    ]
    assert steps[0] == steps[1]


def test_a_file_that_is_nowhere_is_named(tmp_path: Path, tiny_model: Path) -> None:
    from rlaif.loop.launch import execute

    made = project_job(tmp_path, tiny_model, learner={"accelerate": "nowhere.yaml"})
    with pytest.raises(UserError, match=r"learner.accelerate: no file .*nowhere.yaml; `accelerate config"):
        execute(made, tmp_path / "run", tmp_path, Quiet())
