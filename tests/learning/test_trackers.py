"""Trackers on files: what a learner and a run give TensorBoard and MLflow, read back; and trackers that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers.integrations.integration_utils as integrations
from transformers import TrainerCallback

from rlaif import config
from rlaif.config import load_job
from rlaif.errors import UserError
from rlaif.learning import make_learner
from rlaif.learning.trackers import Tracker
from rlaif.loop import launch
from rlaif.records import UpdateStep
from tests.conftest import make_project
from tests.learning.conftest import make_preferences
from tests.stubs import Quiet

pytestmark = pytest.mark.slow

Use = Callable[..., type[TrainerCallback]]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value), of the one TensorBoard run under a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(file.parent), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(file.parent), size_guidance={"tensors": 0})
    read.Reload()
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in read.Tensors(f"{tag}/text_summary")]


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a file store, to which transformers' callback writes."""
    store = tmp_path / "mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.as_uri())
    yield mlflow.MlflowClient(store.as_uri())
    mlflow.set_tracking_uri(before)


def test_a_run_reports_to_tensorboard_and_mlflow(tmp_path: Path, tiny_model: Path, mlflow_store: Any) -> None:
    """Three iterations, of which the text changes before the last; both trackers get the same points beside TRL's."""
    job = load_job(make_project(tmp_path, tiny_model, learner={"args": {"report_to": ["tensorboard", "mlflow"]}}))
    run = launch.execute(job, tmp_path / "run", tmp_path, Quiet())
    assert not [e for e in run.events() if e.kind == "tracker_failed"]
    made = [run.iteration(k).read("updates", UpdateStep) for k in range(3)]
    steps = [step for update in made for step in update]
    ends = [max((s.step for update in made[: k + 1] for s in update), default=0) for k in range(3)]

    found = scalars(run.path / "logs" / "learner")
    assert [step for step, _ in found["train/loss"]] == [s.step for s in steps], "TRL's own, in the same tracker run"
    assert [step for step, _ in found["train/pipeline/kept_share"]] == ends
    assert [value for _, value in found["train/pipeline/constitution_number"]].count(2) >= 1
    evaluated = [0, *(ends[updates - 1] for updates in run.evaluations()[1:])]
    assert [step for step, _ in found["train/pipeline/held_out/relevance"]] == evaluated
    said = texts(run.path / "logs" / "learner", "train/pipeline/constitution")
    assert [text.split()[0] for _, text in said][-1] == "rules@2"

    (tracked,) = mlflow_store.search_runs([e.experiment_id for e in mlflow_store.search_experiments()])
    assert tracked.info.status == "FINISHED"

    def history(name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in mlflow_store.get_metric_history(tracked.info.run_id, name)]

    assert [step for step, _ in history("loss")] == [s.step for s in steps]
    names = [tag.removeprefix("train/") for tag in found if "/pipeline/" in tag or "/weights_gap/" in tag]
    assert len(names) > 40
    for name in names:
        theirs, ours = sorted(history(name)), sorted(found[f"train/{name}"])
        assert [step for step, _ in theirs] == [step for step, _ in ours], name
        assert [value for _, value in theirs] == pytest.approx([value for _, value in ours], rel=1e-5), name
    assert sorted(value for _, value in history("pipeline/iteration")) == sorted([*run.evaluations(), 1, 2, 3])


def test_a_worker_that_ends_has_sent_everything(tmp_path: Path, model_path: str, mlflow_store: Any) -> None:
    """A worker's process ends without exit handlers, and MLflow's callback hands numbers to a thread."""
    from rlaif.workers.process import ProcessWorker

    settings = config.Learner(precision="fp32", args={"report_to": ["tensorboard", "mlflow"]})
    kwargs = {"model_path": model_path, "settings": settings, "seed": 1, "output_dir": str(tmp_path / "out")}
    with ProcessWorker("learner", "rlaif.learning:make", kwargs, tmp_path / "learner.log") as worker:
        for n in range(20):
            assert worker.call("track", values={"pipeline/iteration": n}, step=n) == []
    (tracked,) = mlflow_store.search_runs([e.experiment_id for e in mlflow_store.search_experiments()])
    assert tracked.info.status == "FINISHED"
    assert len(mlflow_store.get_metric_history(tracked.info.run_id, "pipeline/iteration")) == 20
    assert len(scalars(tmp_path / "out")["train/pipeline/iteration"]) == 20


# Trackers that fail.

EVENTS = ("__init__", "on_init_end", "on_train_begin", "on_step_begin", "on_log", "on_step_end", "on_train_end")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Puts a tracker in the place of one that transformers knows; it notes what it is told, and fails where asked."""

    def using(name: str = "tensorboard", fails: tuple[str, ...] = (), times: int = 10**9) -> type[TrainerCallback]:
        class Used(TrainerCallback):
            seen: list[str] = []  # noqa: RUF012
            logs: list[dict[str, Any]] = []  # noqa: RUF012
            left = times

            def __init__(self) -> None:
                self._note("__init__")

            def _note(self, event: str) -> None:
                type(self).seen.append(event)
                if event in fails and type(self).left > 0:
                    type(self).left -= 1
                    raise ConnectionError(f"no route to https://me:secret@tracker/{event}")

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                self._note("on_log")
                type(self).logs.append(dict(logs))

        def noting(event: str) -> Callable[..., None]:
            return lambda self, *args, **kwargs: self._note(event)

        for event in EVENTS:
            if event not in ("__init__", "on_log"):
                setattr(Used, event, noting(event))
        monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, name, Used)
        return Used

    return using


def learner_with(model_path: str, settings: config.Learner, report_to: Any, kind: str = "dpo") -> Any:
    changed = settings.model_copy(update={"args": {"report_to": report_to}})
    return make_learner(kind, model_path, changed, seed=7)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", ["dpo", "online_dpo"])
def test_a_tracker_that_fails_stops_nothing_and_is_told_once(
    event: str, kind: str, use: Use, model_path: str, settings: config.Learner, capfd: pytest.CaptureFixture[str]
) -> None:
    use("tensorboard", fails=(event,))
    sound = use("mlflow")
    made = learner_with(model_path, settings, ["tensorboard", "mlflow"], kind)
    told = made.track({}, 0)
    steps = list(made.update(make_preferences(8), 0))
    told += made.track({"pipeline/iteration": 1}, 2) + made.track({"pipeline/iteration": 2}, 2) + made.close()
    assert len(steps) == 2
    (message,) = told
    assert message.startswith("tracker tensorboard ")
    assert "ConnectionError: no route to https://tracker/" in message, "no password"
    assert "Traceback" in capfd.readouterr().err, "in the worker's log"
    assert [log["pipeline/iteration"] for log in sound.logs if "pipeline/iteration" in log] == [1, 2]
    assert sound.seen[-1] == "on_train_end"
    assert made.close() == []
    assert sound.seen.count("on_train_end") == 1


def test_a_tracker_gets_numbers_again_after_a_hiccup_and_is_left_alone_when_it_stays(
    use: Use, model_path: str, settings: config.Learner
) -> None:
    hiccup = use("tensorboard", fails=("on_log",), times=2)
    broken = use("mlflow", fails=("on_log",))
    made = learner_with(model_path, settings, ["tensorboard", "mlflow"])
    told = [made.track({"n": float(n)}, n) for n in range(6)]
    assert [log["n"] for log in hiccup.logs] == [2, 3, 4, 5]
    assert broken.seen.count("on_log") == 3
    assert [len(t) for t in told] == [2, 0, 0, 0, 0, 0]


def test_a_tracker_that_is_not_installed_is_told_at_the_start(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrations, "is_clearml_available", lambda: False)
    progress = Quiet()
    changes: dict[str, Any] = {"iterations": 1, "schedule": {0: "rules@1"}}
    path = make_project(tmp_path, tiny_model, learner={"args": {"report_to": ["clearml"]}}, **changes)
    run = launch.execute(load_job(path), tmp_path / "run", tmp_path, progress)
    kinds = [e.kind for e in run.events()]
    assert kinds.count("tracker_failed") == 1
    assert kinds.index("tracker_failed") == kinds.index("started") + 1
    assert kinds[-1] == "finished"
    assert sum("clearml" in note and "installed" in note for note in progress.notes) == 1


def test_a_tracker_that_fails_at_its_end_is_told(tmp_path: Path, tiny_model: Path, use: Use) -> None:
    use("wandb", fails=("on_train_end",))
    changes: dict[str, Any] = {"iterations": 1, "schedule": {0: "rules@1"}}
    path = make_project(tmp_path, tiny_model, learner={"args": {"report_to": "wandb"}}, **changes)
    run = launch.execute(load_job(path), tmp_path / "run", tmp_path, Quiet())
    assert [e.kind for e in run.events()][-2:] == ["finished", "tracker_failed"]


def test_an_unknown_tracker_is_the_users_error(model_path: str, settings: config.Learner) -> None:
    with pytest.raises(UserError, match=r"TRL refuses.*nonsense is not supported"):
        learner_with(model_path, settings, ["tensorboard", "nonsense"])


@pytest.mark.parametrize(("name", "takes"), [("tensorboard", True), ("wandb", True), ("mlflow", False)])
def test_text_goes_to_trackers_that_show_it(
    name: str, takes: bool, use: Use, model_path: str, settings: config.Learner
) -> None:
    used = use(name)
    made = learner_with(model_path, settings, name)
    made.track({"pipeline/constitution": "rules@1 (abc)", "pipeline/constitution_number": 1}, 0)
    assert ("pipeline/constitution" in used.logs[-1]) is takes
    assert used.logs[-1]["pipeline/constitution_number"] == 1


def test_numbers_come_at_the_step_that_they_belong_to(use: Use, model_path: str, settings: config.Learner) -> None:
    """A process that goes on with a run may not have loaded the learner's state yet."""
    used = use()
    steps: list[int] = []
    used.on_log = lambda self, args, state, control, **kwargs: steps.append(state.global_step)  # type: ignore[method-assign]
    made = learner_with(model_path, settings, "tensorboard")
    made.track({"n": 1.0}, 17)
    list(made.update(make_preferences(8), 0))
    assert steps == [17, 1, 2]
    assert made.trainer.args.report_to == ["tensorboard"], "what trackers note of the settings is what the job says"


@pytest.mark.parametrize(
    ("attribute", "method"), [("_wandb", "finish"), ("_experiment", "end"), ("_swanlab", "finish")]
)
def test_trackers_that_upload_at_exit_are_ended(attribute: str, method: str) -> None:
    ended: list[str] = []
    held = type("Held", (), {method: lambda self: ended.append(method)})()
    callback = type("Callback", (TrainerCallback,), {attribute: held})
    Tracker("any", callback).end()
    assert ended == [method]


def test_a_tracker_that_exits_ends_no_process() -> None:
    def exits() -> Any:
        raise SystemExit("no API key")

    tracker = Tracker("any", exits)
    assert tracker.failed is not None
    assert "no API key" in tracker.failed
    tracker.on_log(None, None, None, logs={})
    tracker.end()
