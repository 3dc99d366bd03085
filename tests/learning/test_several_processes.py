"""A learner of two processes is one of one: the same steps to rounding, states that go on in the other, whole policies.

Two gloo processes on the CPU stay for all tests of a kind, since starting them takes most of the time: `ddp` as
accelerate runs them here, `fsdp` as it would on GPUs. `alone` is this process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlaif import config
from rlaif.errors import UserError, WorkerError
from rlaif.learning import make_learner
from rlaif.records import Completion, PolicyVersion, TokenSequence
from rlaif.workers.inline import InlineWorker
from rlaif.workers.ranks import Ranks, start_ranks
from rlaif.workers.weights import WeightsRef
from rlaif.workers.worker import Worker
from tests.architectures import ARCHITECTURES, make_model
from tests.learning.conftest import make_preferences

pytestmark = pytest.mark.slow

FACTORY = "tests.learning.together:Learners"
LORA = config.Lora(r=4, alpha=8)
UNEVEN = make_preferences(11)
"""Three steps of four, four and three."""


def ranks(folder: Path, **kwargs: Any) -> Iterator[Ranks]:
    found = start_ranks("learner", FACTORY, kwargs, 2, folder)
    try:
        found.ready()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    yield from ranks(tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    yield from ranks(tmp_path_factory.mktemp("fsdp"), fsdp=True)


@pytest.fixture(params=["ddp", "fsdp"])
def together(request: pytest.FixtureRequest) -> Ranks:
    found: Ranks = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def alone() -> InlineWorker:
    return InlineWorker("learner", FACTORY, {})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama-tied", "gpt2", "mixtral"):
        make_model(name, folder / name)
    return folder


@pytest.fixture
def settings() -> config.Learner:
    """A larger epsilon: where a gradient is rounding alone (a key's bias), Adam would take a step by its sign."""
    args = {"adam_epsilon": 1e-5}
    return config.Learner(
        precision="fp32", learning_rate=1e-3, warmup_steps=2, batch_size=4, max_grad_norm=1e6, args=args
    )


def build(worker: Worker, path: Path | str, settings: config.Learner, disturbed: bool = True, **changes: Any) -> None:
    changed = settings.model_copy(update=changes)
    worker.call("build", path=str(path), settings=changed, export_precision=changes.pop("export_precision", "fp32"))
    if disturbed:
        worker.call("disturb")


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        numpy.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=name)


def numbers(steps: list[Any]) -> list[Any]:
    return [{"loss": s.loss, "norm": s.grad_norm, "rate": s.learning_rate, **s.metrics} for s in steps]


def same_steps(found: list[Any], expected: list[Any]) -> None:
    assert [(s.step, s.row_ids) for s in found] == [(s.step, s.row_ids) for s in expected]
    for a, b in zip(numbers(found), numbers(expected), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_three_steps_are_those_of_one_process(
    name: str, lora: config.Lora | None, together: Ranks, alone: InlineWorker, models: Path, settings: config.Learner
) -> None:
    for worker in (together, alone):
        build(worker, models / name, settings, lora=lora)
    before = alone.call("weights")
    steps, gradients, logs = together.call("train", pairs=UNEVEN)
    expected, expected_gradients, expected_logs = alone.call("train", pairs=UNEVEN)
    assert [len(s.row_ids) for s in expected] == [4, 4, 3]
    same_steps(steps, expected)
    for a, b in zip(gradients, expected_gradients, strict=True):
        close(a, b)
    found, wanted = together.call("weights"), alone.call("weights")
    close(found, wanted)
    moved = max(float(abs(wanted[n] - before[n]).max()) for n in wanted)
    assert moved > 1e-3, "or else nothing is compared"
    for a, b in zip(logs, expected_logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_processes_that_rest_between_updates_take_the_same_steps(
    lora: config.Lora | None, together: Ranks, alone: InlineWorker, models: Path, settings: config.Learner
) -> None:
    for worker in (together, alone):
        build(worker, models / "llama-tied", settings, lora=lora)
    for iteration in range(3):
        pairs = UNEVEN[4 * iteration : 4 * iteration + 4]
        found, _, _ = together.call("train", pairs=pairs, iteration=iteration)
        expected, _, _ = alone.call("train", pairs=pairs, iteration=iteration)
        same_steps(found, expected)
        assert together.call("rest") == 0
        together.call("wake")
    close(together.call("weights"), alone.call("weights"))


def test_what_runs_is_what_is_meant(
    ddp: Ranks, fsdp: Ranks, alone: InlineWorker, models: Path, settings: config.Learner
) -> None:
    how = []
    for worker in (ddp, fsdp, alone):
        build(worker, models / "llama-tied", settings)
        how.append(worker.call("how"))
    assert how == [
        (2, "DistributedType.MULTI_CPU", "DistributedDataParallel"),
        (2, "DistributedType.FSDP", "FSDPLlamaForCausalLM"),
        (1, "DistributedType.NO", "LlamaForCausalLM"),
    ]


def test_policy_and_reference_are_read_once(
    ddp: Ranks, fsdp: Ranks, alone: InlineWorker, models: Path, settings: config.Learner
) -> None:
    asked = {"path": str(models / "llama-tied"), "settings": settings}
    assert [worker.call("loads", **asked) for worker in (ddp, fsdp, alone)] == [2, 2, 2]


@pytest.mark.parametrize("pairs", [1, 5])
def test_parts_of_a_step_and_a_process_without_a_pair(
    pairs: int, together: Ranks, alone: InlineWorker, models: Path, settings: config.Learner
) -> None:
    for worker, size in ((together, 1), (alone, 2)):
        args = settings.args | {"per_device_train_batch_size": size}
        build(worker, models / "llama-tied", settings, batch_size=6, args=args)
    given = make_preferences(pairs)
    steps, gradients, _ = together.call("train", pairs=given)
    expected, expected_gradients, _ = alone.call("train", pairs=given)
    same_steps(steps, expected)
    close(gradients[0], expected_gradients[0])


def test_no_gradient_is_whole_between_the_parts_of_a_step(fsdp: Ranks, models: Path, settings: config.Learner) -> None:
    args = settings.args | {"per_device_train_batch_size": 1}
    build(fsdp, models / "llama-tied", settings, batch_size=6, args=args)
    assert fsdp.call("without_a_share", pairs=make_preferences(6)) == [0, 0, 0]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_state_goes_on_in_the_other(
    lora: config.Lora | None,
    together: Ranks,
    alone: InlineWorker,
    models: Path,
    settings: config.Learner,
    tmp_path: Path,
) -> None:
    first, then = make_preferences(6, seed=1), make_preferences(6, seed=2)
    for one, other, folder in ((together, alone, tmp_path / "a"), (alone, together, tmp_path / "b")):
        build(one, models / "llama-tied", settings, lora=lora)
        one.call("train", pairs=first)
        made = one.call("save", to=folder)
        weights, moments = one.call("weights"), one.call("moments")
        expected, _, _ = one.call("train", pairs=then, iteration=1)

        build(other, models / "llama-tied", settings, lora=lora, disturbed=False)
        other.call("load", state=WeightsRef(digest=made.digest, path=folder / "state"))
        for a, b in zip(other.call("moments"), moments, strict=True):
            numpy.testing.assert_array_equal(a, b)
        assert other.call("rest") == 0, "nothing hangs on the files"
        other.call("wake")
        again = other.call("weights")
        assert all(numpy.array_equal(again[name], weights[name]) for name in weights)
        assert other.call("save", to=tmp_path / f"{folder.name}-again").digest == made.digest, "the policy is whole"
        found, _, _ = other.call("train", pairs=then, iteration=1)
        same_steps(found, expected)
        close(other.call("weights"), one.call("weights"))


@pytest.mark.parametrize(("lora", "at_once"), [(None, 1), (LORA, 2)], ids=["full", "lora"])
def test_one_process_holds_a_whole_state_and_never_all_of_it(
    lora: config.Lora | None, at_once: int, fsdp: Ranks, models: Path, settings: config.Learner, tmp_path: Path
) -> None:
    """The first one the moments, then the policy; the other a weight, and what its LoRA adds."""
    build(fsdp, models / "llama-tied", settings, lora=lora)
    fsdp.call("train", pairs=make_preferences(4))
    first, second = fsdp.call("whole_while_saving", to=tmp_path)
    trained = {name: value.nbytes for name, value in fsdp.call("weights").items()}
    policy = load_file(tmp_path / "policy" / "model.safetensors")
    sizes = [value.nbytes for value in policy.values()]
    assert first <= max(2 * sum(trained.values()), sum(sizes) + max(sizes))
    assert 0 < second <= at_once * max(sizes)


def test_a_weight_with_fewer_rows_than_there_are_processes_is_saved(
    fsdp: Ranks, alone: InlineWorker, settings: config.Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part of one process is empty then, of several weights."""
    monkeypatch.setitem(ARCHITECTURES, "narrow", ("LlamaConfig", {"intermediate_size": 1}))
    made = []
    for worker in (fsdp, alone):
        build(worker, make_model("narrow", tmp_path / "base"), settings)
        made.append(worker.call("save", to=tmp_path / str(len(made))).digest)
    assert made[0] == made[1]


def test_the_exported_policy_is_what_was_trained(
    together: Ranks, alone: InlineWorker, models: Path, settings: config.Learner, tmp_path: Path
) -> None:
    build(together, models / "llama-tied", settings, lora=LORA)
    together.call("train", pairs=UNEVEN)
    made = together.call("save", to=tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32).eval()
    sequence = TokenSequence(prompt_token_ids=(1, 7, 9), token_ids=(11, 4, 30))
    with torch.no_grad():
        log_p = policy(torch.tensor([sequence.all_ids])).logits[0].log_softmax(-1)
    expected = [float(log_p[2 + i, token]) for i, token in enumerate(sequence.token_ids)]
    assert list(together.call("logprobs", sequences=[sequence])[0]) == pytest.approx(expected, abs=1e-5)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["state.pt", "weights.safetensors"]


def some_completions() -> list[Completion]:
    return [
        Completion(
            id=p.pair_id, prompt_id=p.prompt_id, policy=PolicyVersion(iteration=1, digest=""), index=0, seed=0,
            prompt_token_ids=p.prompt_token_ids, token_ids=p.chosen_token_ids, text="", finish_reason="length",
        )
        for p in UNEVEN
    ]  # fmt: skip


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_log_probabilities_and_divergences_are_shared_out(
    lora: config.Lora | None, together: Ranks, alone: InlineWorker, models: Path, settings: config.Learner
) -> None:
    asked = [s for p in make_preferences(3) for s in p.sequences][:5]
    found = []
    for worker in (together, alone):
        build(worker, models / "llama-tied", settings, lora=lora)
        chunks = worker.stream("divergences", completions=some_completions())
        far = {d.completion_id: d.kl for chunk in chunks for d in chunk}
        found.append((far, worker.call("logprobs", sequences=asked)))
    (far, logps), (expected_far, expected_logps) = found
    assert far == pytest.approx(expected_far, rel=1e-4, abs=1e-5)
    assert min(far.values()) > 0.01, "the policy must differ from the base"
    for a, b in zip(logps, expected_logps, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert together.call("logprobs", sequences=[]) == []


def test_all_stop_at_the_same_step(
    together: Ranks, alone: InlineWorker, models: Path, settings: config.Learner
) -> None:
    for worker in (together, alone):
        build(worker, models / "llama-tied", settings, max_kl=1e9)
    free = [s.metrics["kl"] for s in alone.call("train", pairs=UNEVEN)[0]]
    assert sorted(free) == free
    for worker in (together, alone):
        build(worker, models / "llama-tied", settings, max_kl=(free[0] + free[1]) / 2)
    steps, expected = (worker.call("train", pairs=UNEVEN)[0] for worker in (together, alone))
    same_steps(steps, expected)
    assert len(steps) == 2
    together.call("stop_training")
    assert together.call("train", pairs=UNEVEN, iteration=1)[0] == []


def test_no_number_in_one_process_is_refused_by_all(together: Ranks, models: Path, settings: config.Learner) -> None:
    build(together, models / "llama-tied", settings)
    before = together.call("weights")
    together.call("spoil")
    with pytest.raises(WorkerError, match=r"update step 1: the loss is nan .* not taken"):
        list(together.stream("update", rows=UNEVEN, iteration=0))
    together.call("unspoil")
    close(together.call("weights"), before)
    steps = list(together.stream("update", rows=UNEVEN, iteration=0))
    assert [s.step for s in steps] == [1, 2, 3]
    assert all(math.isfinite(s.loss) for s in steps)


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_a_reference_that_others_computed_is_taken_if_it_is_right(
    off: float, together: Ranks, alone: InlineWorker, models: Path, settings: config.Learner
) -> None:
    build(alone, models / "llama-tied", settings, disturbed=False)
    sides = [s for p in UNEVEN for s in p.sequences]
    ids = [i for p in UNEVEN for i in (p.chosen_id, p.rejected_id)]
    scored = alone.call("logprobs", sequences=sides)
    known = {i: sum(logps) + off for i, logps in zip(ids, scored, strict=True)}
    for worker in (together, alone):
        build(worker, models / "llama-tied", settings)
    together.call("use_reference", logprobs=known)
    steps, expected = (worker.call("train", pairs=UNEVEN)[0] for worker in (together, alone))
    same_steps(steps, expected)
    assert [len(s.notes) for s in steps] == [int(off > 0), 0, 0]


def test_the_reference_may_be_another_policy(
    together: Ranks, alone: InlineWorker, models: Path, settings: config.Learner, tmp_path: Path
) -> None:
    build(alone, models / "llama-tied", settings)
    changed = alone.call("save", to=tmp_path)
    for reference in ("at_change", "previous"):
        found = []
        for worker in (together, alone):
            build(worker, models / "llama-tied", settings, reference=reference)
            if reference == "at_change":
                worker.call("refer_to", policy=changed)
            found.append(worker.call("train", pairs=UNEVEN)[0])
        same_steps(*found)
        assert found[0][0].loss == pytest.approx(math.log(2), abs=1e-5)


def test_online_dpo_of_two_processes(ddp: Ranks, alone: InlineWorker, models: Path, settings: config.Learner) -> None:
    for worker in (ddp, alone):
        build(worker, models / "llama-tied", settings, kind="online_dpo")
    steps, gradients, _ = ddp.call("train", pairs=UNEVEN)
    expected, expected_gradients, _ = alone.call("train", pairs=UNEVEN)
    same_steps(steps, expected)
    for a, b in zip(gradients, expected_gradients, strict=True):
        close(a, b)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_bf16_of_two_processes(
    lora: config.Lora | None, ddp: Ranks, alone: InlineWorker, models: Path, settings: config.Learner, tmp_path: Path
) -> None:
    """Both round the masters alike; what is added up in another order is bf16's noise."""
    found = []
    for worker in (ddp, alone):
        build(worker, models / "llama-tied", settings, disturbed=False, lora=lora, precision="bf16")
        steps, _, _ = worker.call("train", pairs=make_preferences(4))
        assert steps[0].loss == pytest.approx(math.log(2), abs=1e-6)
        found.append(worker.call("train", pairs=UNEVEN, iteration=1)[0])
    for a, b in zip(*found, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=2e-2)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision: bf16, and this learner computes in fp32"),
        (
            "ACCELERATE_USE_FSDP",
            "true",
            "accelerate has FSDP for GPUs alone; on a CPU take distributed_type: MULTI_CPU",
        ),
    ],
)
def test_what_accelerate_is_told_and_does_not_do_is_refused(
    variable: str, value: str, said: str, models: Path, settings: config.Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"learner.accelerate: {said}"):
        make_learner("dpo", str(models / "llama-tied"), settings, seed=7)


def test_shards_compute_in_fp32(fsdp: Ranks, models: Path, settings: config.Learner) -> None:
    with pytest.raises(UserError, match=r"learner\.precision: bf16 with FSDP"):
        build(fsdp, models / "llama-tied", settings, precision="bf16")
