"""Which GPUs each role sees: a table, since there is no machine here to try it on."""

from __future__ import annotations

from typing import Any

import pytest

from rlaif.config import Job, parse_job
from rlaif.errors import UserError
from rlaif.workers.placement import place, usable_gpus


def job(**changes: Any) -> Job:
    return parse_job({"constitution": "rules", **changes}, "test")


def roles(placed: dict[str, str]) -> tuple[str, ...]:
    return placed["sampler"], placed["learner"], placed["judge"]


@pytest.mark.parametrize(
    ("gpus", "span", "wanted"),
    [
        (2, 1, ("0", "1", "0")),
        (3, 1, ("0", "1", "2")),
        (8, 1, ("0", "1", "2")),
        (2, 2, ("0,1", "1", "0")),
        (3, 2, ("0,1", "2", "0")),
        (4, 2, ("0,1", "2", "3")),
    ],
)
def test_roles_are_spread(gpus: int, span: int, wanted: tuple[str, ...]) -> None:
    placed = place(job(sampling={"tensor_parallel_size": span}), [str(i) for i in range(gpus)])
    assert roles(placed) == wanted
    assert placed["measurer"] == placed["judge"]
    assert "," not in placed["learner"], "TRL's trainers refuse where they see several"


@pytest.mark.parametrize("gpus", [[], ["0"], ["GPU-3f"]])
def test_one_gpu_or_none_is_shared(gpus: list[str]) -> None:
    assert place(job(), gpus) == {}


def test_a_job_may_say_where() -> None:
    devices = {"sampler": [2, 3], "learner": [0], "judge": [1]}
    placed = place(job(devices=devices, sampling={"tensor_parallel_size": 2}), ["4", "5", "6", "7"])
    assert roles(placed) == ("6,7", "4", "5")
    assert roles(place(job(devices={"learner": [0]}), ["0", "1"])) == ("1", "0", "1")
    assert roles(place(job(devices={"learner": [0]}), ["0", "1", "2"])) == ("1", "0", "2")
    assert roles(place(job(devices={"judge": [0]}), ["0", "1", "2"])) == ("1", "2", "0")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling": {"tensor_parallel_size": 4}}, "tensor_parallel_size: 4, but this process can use 2 GPUs"),
        ({"devices": {"judge": [2]}}, r"devices\.judge: no GPU 2"),
        ({"devices": {"sampler": [0, 1]}}, r"devices\.sampler: 2 GPUs for sampling\.tensor_parallel_size: 1"),
    ],
)
def test_what_is_not_there_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        place(job(**changes), ["0", "1"])


@pytest.mark.parametrize("devices", [{"learner": [0, 1]}, {"judge": []}, {"sampler": [0, 0]}, {"learner": [-1]}])
def test_what_makes_no_sense_is_refused(devices: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"devices\."):
        job(devices=devices)


@pytest.mark.parametrize(
    ("given", "usable"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        ("", []),
        ("-1", []),
        ("1,7,0", ["1"]),
        ("GPU-8f,GPU-9a", ["GPU-8f", "GPU-9a"]),
    ],
)
def test_what_the_process_may_use(given: str | None, usable: list[str]) -> None:
    assert usable_gpus(2, {} if given is None else {"CUDA_VISIBLE_DEVICES": given}) == usable
