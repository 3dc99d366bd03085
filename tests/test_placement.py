"""Which GPUs each role sees: a table, since there is no machine here to try it on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.config import Job, parse_job
from rlaif.errors import UserError
from rlaif.loop.streaming import streams
from rlaif.workers.placement import Placed, left_over, place, served, spread, usable_gpus

ROOT = Path(__file__).resolve().parent.parent


def job(**changes: Any) -> Job:
    return parse_job({"constitution": "rules", **changes}, "test")


def roles(placed: dict[str, Placed]) -> tuple[str, ...]:
    return tuple(",".join(placed[role].gpus) for role in ("sampler", "learner", "judge"))


def on(**devices: list[int]) -> dict[str, Any]:
    """A job's placement by GPUs alone."""
    return {"placement": {role: {"devices": numbers} for role, numbers in devices.items()}}


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
    assert len(placed["learner"].gpus) == 1, "TRL's trainers refuse where they see several"


@pytest.mark.parametrize(
    ("gpus", "span", "learners", "wanted"),
    [
        (8, 1, 4, ("0", "1,2,3,4", "5")),
        (8, 2, 6, ("0,1", "2,3,4,5,6,7", "0")),
        (4, 1, 4, ("0", "0,1,2,3", "0")),
        (2, 1, 2, ("0", "0,1", "0")),
    ],
)
def test_a_learner_of_several_processes_gets_as_many_gpus(
    gpus: int, span: int, learners: int, wanted: tuple[str, ...]
) -> None:
    settings = job(sampling={"tensor_parallel_size": span})
    assert roles(place(settings, [str(i) for i in range(gpus)], learners)) == wanted
    assert place(settings, [], learners)["learner"] == Placed("process"), "on CPUs there is nothing to share out"
    named = job(**on(learner=[3, 1]), learner={"accelerate": "two.yaml"})
    assert roles(place(named, ["0", "1", "2", "3"], 2)) == ("0", "3,1", "2")


@pytest.mark.parametrize(
    ("changes", "gpus", "said"),
    [
        ({}, 1, "learner.accelerate: 2 processes take a GPU each, and there are 1 GPUs to use"),
        (
            {**on(learner=[0]), "learner": {"accelerate": "two.yaml"}},
            4,
            "there are 1 GPUs in placement.learner.devices",
        ),
        ({"workers": "inline"}, 0, "an inline learner is one process, not 2; set placement.learner.worker=process"),
    ],
)
def test_processes_of_a_learner_that_have_no_place(changes: dict[str, Any], gpus: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        place(job(**changes), [str(i) for i in range(gpus)], 2)


@pytest.mark.parametrize("gpus", [[], ["0"], ["GPU-3f"]])
def test_one_gpu_or_none_is_shared(gpus: list[str]) -> None:
    assert set(place(job(), gpus).values()) == {Placed("process")}
    assert Placed("process").environment is None


def test_a_job_may_say_where() -> None:
    places = on(sampler=[2, 3], learner=[0], judge=[1])
    placed = place(job(**places, sampling={"tensor_parallel_size": 2}), ["4", "5", "6", "7"])
    assert roles(placed) == ("6,7", "4", "5")
    assert placed["sampler"].environment == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert roles(place(job(**on(learner=[0])), ["0", "1"])) == ("1", "0", "1")
    assert roles(place(job(**on(learner=[0])), ["0", "1", "2"])) == ("1", "0", "2")
    assert roles(place(job(**on(judge=[0])), ["0", "1", "2"])) == ("1", "2", "0")


def serving(replicas: int, span: int) -> dict[str, Any]:
    """A judge whose servers we start."""
    serve = {"model": "m", "replicas": replicas, "tensor_parallel_size": span}
    return {"judge": {"kind": "chat", "serve": serve}}


@pytest.mark.parametrize(
    ("gpus", "replicas", "span", "places", "theirs", "others"),
    [
        (4, 2, 1, {}, [("2",), ("3",)], ("0", "1", "0")),
        (8, 3, 2, {}, [("2", "3"), ("4", "5"), ("6", "7")], ("0", "1", "0")),
        (8, 1, 4, {}, [("2", "3", "4", "5")], ("0", "1", "6")),
        (2, 1, 1, on(judge=[0]), [("0",)], ("1", "1", "1")),
        (1, 1, 1, {}, [("0",)], ("", "", "")),
        (0, 2, 2, {}, [(), ()], ("", "", "")),
    ],
)
def test_servers_that_we_start_have_gpus_of_their_own(
    gpus: int, replicas: int, span: int, places: Any, theirs: list[tuple[str, ...]], others: tuple[str, ...]
) -> None:
    asked = job(**serving(replicas, span), **places)
    placed = place(asked, [str(i) for i in range(gpus)])
    assert spread(served(asked), placed["servers"].gpus, gpus) == theirs
    assert roles(placed) == others


@pytest.mark.parametrize(("gpus", "replicas", "span", "left"), [(1, 2, 1, 1), (2, 1, 1, 0), (4, 3, 1, 2), (4, 1, 4, 2)])
def test_servers_without_room_are_refused(gpus: int, replicas: int, span: int, left: int) -> None:
    said = f"need {replicas * span} GPUs of their own, and of {gpus} {left} "
    with pytest.raises(UserError, match=said):
        place(job(**serving(replicas, span)), [str(i) for i in range(gpus)])


def cluster(*roles: str, address: str = "local") -> dict[str, Any]:
    """These roles on a cluster."""
    shares = {role: {"processes": 1} if role == "learner" else {"replicas": 2} for role in roles}
    return {"cluster": {"address": address, **shares}}


@pytest.mark.parametrize(
    ("away", "gpus", "wanted", "measurer", "left"),
    [
        (("sampler",), 4, ("", "0", "1"), "1", "2,3"),
        (("judge",), 4, ("0", "1", ""), "1", "2,3"),
        (("sampler", "judge"), 4, ("", "0", ""), "0", "1,2,3"),
        (("sampler", "judge"), 8, ("", "0", ""), "0", "1,2,3,4,5,6,7"),
        (("learner",), 4, ("0", "", "1"), "1", "2,3"),
        (("judge", "learner"), 4, ("0", "", ""), "1", "2,3"),
        (("sampler", "judge", "learner"), 4, ("", "", ""), "0", "1,2,3"),
        (("sampler", "judge"), 1, ("", "", ""), "", "0"),
    ],
)
def test_what_is_on_a_cluster_takes_no_gpu_here(
    away: tuple[str, ...], gpus: int, wanted: tuple[str, ...], measurer: str, left: str
) -> None:
    there = [str(n) for n in range(gpus)]
    for address in ("local", "auto"):
        places = place(job(**cluster(*away, address=address)), there)
        assert roles(places) == wanted
        assert ",".join(places["measurer"].gpus) == measurer
        assert places["reference"] == places["measurer"]
        assert ",".join(left_over(places, ["sampler", "learner", "judge", "measurer"], there)) == left


def test_a_cluster_has_every_gpu_where_all_is_there_and_the_judge_measures() -> None:
    places = place(job(**cluster("sampler", "judge", "learner")), ["0", "1"])
    assert left_over(places, ["sampler", "learner", "judge"], ["0", "1"]) == ["0", "1"]
    waits = {"eval": {"reference_judge": {"kind": "chat", "model": "m", "base_url": "http://10.0.0.1:8000/v1"}}}
    places = place(job(**cluster("sampler", "judge", "learner"), **waits), ["0", "1"])
    assert left_over(places, ["sampler", "learner", "judge", "reference"], ["0", "1"]) == ["0", "1"]


def test_who_measures_beside_a_judge_on_the_cluster_may_be_placed() -> None:
    places = place(job(**cluster("sampler", "judge"), **on(judge=[3])), ["0", "1", "2", "3"])
    assert roles(places) == ("", "0", "")
    assert places["measurer"].gpus == ("3",)


def test_a_sampler_elsewhere_may_span_more_gpus_than_there_are_here() -> None:
    wide = {"sampling": {"tensor_parallel_size": 4}}
    with pytest.raises(UserError, match="tensor_parallel_size: 4, but this process can use 1 GPU"):
        place(job(**wide), ["0"])
    assert roles(place(job(**wide, **cluster("sampler")), ["0"])) == ("", "", "")
    assert roles(place(job(**wide, **cluster("sampler")), ["0", "1"])) == ("", "0", "1")
    servers = {"sampling": {"engine": "server", "base_url": "http://10.0.0.1:8000", "tensor_parallel_size": 4}}
    assert roles(place(job(**servers), ["0", "1"])) == ("", "0", "1")


@pytest.mark.parametrize("role", ["sampler", "learner"])
def test_no_gpu_here_is_named_for_what_is_elsewhere(role: str) -> None:
    with pytest.raises(UserError, match=rf"placement\.{role}\.devices: the {role} is elsewhere .*leave `devices` out"):
        place(job(**cluster(role), **on(**{role: [0]})), ["0", "1"])


@pytest.mark.parametrize(
    ("changes", "gpus", "replicas", "theirs", "others"),
    [
        ({"device": "shared"}, 2, 1, "0", ("0", "1", "0")),
        ({"device": "shared"}, 2, 2, "0,1", ("0", "1", "0")),
        ({"device": "shared"}, 4, 2, "2,3", ("0", "1", "0")),
        ({"device": "shared"}, 4, 3, "2,3,0", ("0", "1", "0")),
        ({"sampling": {"engine": "server", "base_url": "http://10.0.0.1:8000"}}, 2, 1, "1", ("", "0", "0")),
        (cluster("sampler"), 2, 1, "1", ("", "0", "0")),
        (cluster("sampler", "learner"), 2, 2, "0,1", ("", "", "0")),
    ],
)
def test_servers_find_room_where_others_take_turns_or_are_elsewhere(
    changes: dict[str, Any], gpus: int, replicas: int, theirs: str, others: tuple[str, ...]
) -> None:
    places = place(job(**serving(replicas, 1), **changes), [str(n) for n in range(gpus)])
    assert ",".join(places["servers"].gpus) == theirs
    assert roles(places) == others


def test_servers_that_take_turns_need_gpus_all_the_same() -> None:
    with pytest.raises(UserError, match="need 3 GPUs of their own, and of 2 2 are left"):
        place(job(**serving(3, 1), device="shared"), ["0", "1"])


def test_servers_may_be_placed_on_several_gpus() -> None:
    places = place(job(**serving(2, 1), **on(judge=[0, 3])), ["0", "1", "2", "3"])
    assert places["servers"].gpus == ("0", "3")
    assert roles(places) == ("1", "2", "1")


def recipe(title: str) -> tuple[list[Job], str]:
    """A recipe's jobs, in their order, and its commands."""
    text = (ROOT / "docs" / "scale-ray.md").read_text().split(f"\n**{title}**")[1].split("\n**")[0].split("\n## ")[0]
    yamls, shells = (
        re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for language in ("yaml", "sh")
    )
    return [job(**yaml.safe_load(block)) for block in yamls], "\n".join(shells)


def wanted_of_ray(asked: Job) -> float:
    """GPUs that a cluster has to have for a job."""
    assert asked.cluster is not None
    wide = {"sampler": asked.sampling.tensor_parallel_size}
    shares = {role: asked.cluster.of(role) for role in ("sampler", "judge")}
    replicas = sum(of.replicas * (of.gpus or wide.get(role, 1)) for role, of in shares.items() if of)
    return replicas + (asked.cluster.learner.processes if asked.cluster.learner else 0)


def of_loop(asked: Job, gpus: list[str], learners: int = 1) -> tuple[set[str], list[str]]:
    """The GPUs that a job's own roles take where another model than the policy's judges, and those that they leave."""
    places = place(asked, gpus, learners)
    on = {"sampler", "learner", "judge", "measurer", *(["servers"] if served(asked) else [])}
    return {gpu for role in on for gpu in places[role].gpus}, left_over(places, on, gpus)


def test_recipes_for_one_machine_use_all_of_its_gpus() -> None:
    eight = [str(n) for n in range(8)]
    jobs, _ = recipe("Eight GPUs in one machine")
    assert [bool(asked.cluster) for asked in jobs] == [True, True, True, False, True]
    for asked in (asked for asked in jobs if asked.cluster):
        assert len(of_loop(asked, eight)[1]) == wanted_of_ray(asked), asked.cluster
    [alone] = [asked for asked in jobs if not asked.cluster]
    assert roles(place(alone, eight, 4)) == ("0", "4,5,6,7", "1")
    [all_of_it] = [asked for asked in jobs if asked.cluster and asked.cluster.learner]
    without = left_over(place(all_of_it, eight), ["sampler", "learner", "judge"], eight)
    assert len(without) == wanted_of_ray(all_of_it) + 1, "where nobody measures, a second judge fits"


@pytest.mark.parametrize(("title", "here", "there"), [("Two machines", 4, 4), ("SLURM", 8, 8)])
def test_recipes_for_two_machines_keep_the_loop_off_rays_gpus(title: str, here: int, there: int) -> None:
    jobs, commands = recipe(title)
    gpus = [str(n) for n in range(here)]
    rays, loops = (
        set(re.findall(rf"CUDA_VISIBLE_DEVICES=([0-9,]+) {command}", commands)[0].split(","))
        for command in ("ray start --head", "rlaif run")
    )
    assert not rays & loops
    assert rays | loops == set(gpus)
    assert jobs
    for asked in jobs:
        assert asked.cluster
        assert asked.cluster.address == "auto"
        assert wanted_of_ray(asked) == len(rays) + there
        assert of_loop(asked, gpus)[0] <= loops, "also where the loop sees all of them"
        assert usable_gpus(here, {"CUDA_VISIBLE_DEVICES": ",".join(loops)}) == sorted(loops)


def test_one_role_may_run_elsewhere_than_the_others() -> None:
    one = place(job(placement={"judge": {"worker": "inline"}}), ["0", "1", "2"])
    assert {role: placed.worker for role, placed in one.items()} == {
        "sampler": "process", "learner": "process", "judge": "inline", "measurer": "inline", "reference": "inline",
    }  # fmt: skip
    assert roles(one) == ("0", "1", "")
    assert [str(one[role]) for role in ("sampler", "judge")] == ["process on GPU 0", "inline"]
    all_but_one = place(job(workers="inline", placement={"learner": {"worker": "process"}}), [])
    assert [all_but_one[role].worker for role in ("sampler", "learner", "judge")] == ["inline", "process", "inline"]


def test_a_job_from_before_there_was_a_placement_is_read() -> None:
    older = {"sampler": None, "learner": [1], "judge": None}
    assert job(devices=older).placement == job(**on(learner=[1])).placement
    assert job(devices={"sampler": None, "learner": None, "judge": None}) == job()
    mixed = job(devices=older, placement={"judge": {"worker": "inline"}})
    assert set(mixed.placement) == {"learner", "judge"}
    with pytest.raises(UserError, match=r"devices: placement\.learner says it too"):
        job(devices=older, **on(learner=[0]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling": {"tensor_parallel_size": 4}}, "tensor_parallel_size: 4, but this process can use 2 GPUs"),
        (on(judge=[2]), r"placement\.judge\.devices: no GPU 2"),
        (on(sampler=[0, 1]), r"placement\.sampler\.devices: 2 GPUs for sampling\.tensor_parallel_size: 1"),
        ({"workers": "inline", **on(judge=[1])}, r"placement\.judge\.devices: an inline worker sees every GPU"),
    ],
)
def test_what_is_not_there_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        place(job(**changes), ["0", "1"])


@pytest.mark.parametrize(
    "places", [on(learner=[0, 1]), on(judge=[]), on(sampler=[0, 0]), on(learner=[-1]), on(measurer=[0])]
)
def test_what_makes_no_sense_is_refused(places: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"test: placement\."):
        job(**places)


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


def test_a_run_streams_by_itself_where_its_servers_have_gpus_of_their_own() -> None:
    asked = job(**serving(1, 1))
    assert streams(asked, place(asked, ["0", "1", "2"]))
    assert not streams(asked, place(asked, [])), "sampler and servers share the processor"
    elsewhere = job(judge={"kind": "chat", "model": "m", "base_url": "http://10.0.0.1:8000/v1"})
    assert streams(elsewhere, place(elsewhere, []))
    servers = {"sampling": {"engine": "server", "base_url": "http://10.0.0.1:8000"}}
    for gpus in ([], ["0"], ["0", "1"]):
        assert streams(job(**servers), place(job(**servers), gpus))
        assert not streams(job(**servers, device="shared"), place(job(**servers, device="shared"), gpus))


@pytest.mark.parametrize(
    ("cluster", "error"),
    [
        ({"judge": {"gpus": 1.5}}, "cluster.judge.gpus: .*1.5 GPUs: give a whole number, or a part of one"),
        ({"learner": {"processes": 2, "gpus": 0.5}}, "cluster.learner.gpus: .*has one, or none"),
        ({"learner": {"processes": 2, "gpus": 2}}, "cluster.learner.gpus: .*has one, or none"),
    ],
)
def test_gpus_that_nobody_can_give_are_refused(cluster: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        parse_job({"constitution": "assistant@1", "cluster": cluster}, "job.yaml")
