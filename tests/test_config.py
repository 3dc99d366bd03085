"""Job files: sparse, typed, and a mistake is one line that names key and file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from rlaif.config import (
    Job,
    Monitors,
    apply_override,
    changed_keys,
    load_job,
    may_change,
    of_run,
    parse_job,
    sections_in,
    worth_knowing,
)
from rlaif.errors import UserError


def load(tmp_path: Path, text: str, *overrides: str) -> Job:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return load_job(path, list(overrides))


def test_a_sparse_job_gets_its_defaults(tmp_path: Path) -> None:
    job = load(tmp_path, "constitution: assistant")
    assert job.learner.kind == "dpo"
    assert parse_job(job.model_dump(mode="json"), "run.json") == job


def test_a_schedule_survives_the_run_directory(tmp_path: Path) -> None:
    job = load(tmp_path, "schedule: {0: assistant@1, 4: assistant@2}")
    again = parse_job(job.model_dump(mode="json"), "run.json")
    assert again.schedule == {0: "assistant@1", 4: "assistant@2"}
    assert changed_keys(job.model_dump(mode="json"), again.model_dump(mode="json")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("constitution: a\nlearner: {bta: 1}", r"unknown key `learner\.bta`; did you mean `beta`\?"),
        ("constitution: a\nlearner: {lora: {rank: 1}}", r"unknown key `learner\.lora\.rank`; known keys: alpha, r, "),
        ("constitution: a\njudge: {kind: chat, model: m, jury: [{model: n, api_key: k}]}",
         r"unknown key `judge\.jury\.0\.api_key`; did you mean `api_key_env`\?"),
        ("constitution: a\njudge: {kind: chat, model: m, prices: {m: {promt: 1}}}",
         r"unknown key `judge\.prices\.m\.promt`; did you mean `prompt`\?"),
        ("constitution: a\njudge: {kind: chat, model: m, templates: [pairwise, other, pairwise]}",
         "judge.templates: `pairwise` is named twice"),
        ("constitution: a\njudge: {kind: chat, model: m, evaluate_templates: [x, x]}", "judge.evaluate_templates: `x`"),
        ("constitution: a\njudge: {kind: chat, model: m, base_url: 'http://h/v1', jury: "
         "[{model: n}, {model: m, base_url: 'http://h/v1/', api_key_env: OTHER}]}",
         "judge.jury: two judges send `m` the same requests at temperature 0"),
        ("constitution: a\njudge: {kind: chat, model: m, base_url: 'http://h:abc/v1'}",
         r"judge\.base_url: no address \(Port could not be cast"),
        ("constitution: a\njudge: {kind: chat, model: m, base_url: 'http://[::1/v1'}",
         r"judge\.base_url: no address .*/v1$"),
        ("constitution: a\njudge: {kind: chat, model: m, clamp: [0.6, 0.4]}",
         r"judge\.clamp: \[0\.6, 0\.4\] are no bounds"),
        ("constitution: a\nlearning_rate: 1", r"`learning_rate`; did you mean `learner\.learning_rate`\?"),
        ("constitution: a\ntop_p: 1", r"did you mean `sampling\.top_p` or `eval\.top_p`\?"),
        ("constitution: a\nlearner: {weight_decay: 1}", r"go into learner\.args"),
        ("constitution: a\nmonitors: {collapse: {limit: 1}}",
         r"unknown key `monitors\.collapse\.limit`; known keys: action, entropy, vocabulary"),
        ("constitution: a\nmonitors: {colapse: {limit: 1}}",
         r"unknown key `monitors\.colapse`; did you mean `collapse`\?"),
        ("constitution: a\nsource: {rejudge: true}", r"job\.yaml: source: give exactly one of `run` and `data`"),
        ("constitution: a\nsource: {run: r, iterations: x}", r"job\.yaml: source\.iterations: found 'x', expected one"),
        ("constitution: a\nfilters: {review: {}}", r"job\.yaml: filters\.review: give below_agreement"),
        ("constitution: a\neval: {probes: p.jsonl}",
         r"eval\.probes: without effect; probes are asked with eval\.retention alone; set eval\.retention=true"),
        ("constitution: a\nreplay: {share: 0.5, rejudge: {calls: 9}}",
         r"replay\.rejudge: without effect; a limit of `replay\.on_change: rejudge`; set that, or leave"),
        ("constitution: a\nreplay: {share: 0.5, stale_weight: 0.5}",
         r"replay\.stale_weight: without effect; for `replay\.on_change: keep`; set that"),
        ("constitution: a\nreplay: {max_age: 8, half_life: 2}",
         r"replay\.max_age: without effect; .*replay\.share=0\.3.*; .*replay\.half_life: without effect"),
        ("constitution: a\nmonitors: {hacking: {kept: 0.9}}", r"monitors\.hacking\.kept: without effect; .*retention"),
        ("constitution: a\nmonitors: {anchors: {every: 2}}", r"monitors\.anchors: without effect; .*judge\.kind"),
        ("constitution: a\nmonitors: {kl: {limit: -1}}",
         r"monitors\.kl\.limit: -1, and KL .*; give a limit of 0 or more, or set monitors\.kl\.action=off"),
        ("constitution: a\nmonitors: {short_answers: {limit: -1}}", r"monitors\.short_answers\.limit: -1, and answers"),
        ("constitution: a\nitterations: 1", r"unknown key `itterations`; did you mean `iterations`\?"),
        ("constitution: a\niterations: 0", r"iterations: .*greater than or equal to 1 \(found 0\)"),
        ("constitution: a\nsampling: {engine: hf}",
         r"sampling\.engine: .*'vllm', 'transformers' or 'server' \(found 'hf'\)"),
        ("iterations: 1", "exactly one of `constitution` and `schedule`"),
        ("constitution: a\nschedule: {0: b}", "exactly one of `constitution` and `schedule`"),
        ("schedule: {1: b}", "needs an entry for iteration 0"),
        ("schedule: {0: a, -3: b}", "`schedule` names iteration -3; the first one is 0"),
        ("constitution: a\nseed: -1", r"seed: .*greater than or equal to 0 \(found -1\)"),
        ("constitution: a\nseed: 4294967296", r"seed: .*less than or equal to 4294967295"),
        ("constitution: a\nlearner: {learning_rate: .inf}", r"learner\.learning_rate: .*finite number \(found inf\)"),
        ("constitution: a\nmonitors: {kl: {limit: .nan}}", r"monitors\.kl\.limit: .*finite number"),
        ("constitution: a\nmonitors: {max_kl: 0.1, kl: {limit: 0.2}}",
         r"monitors\.max_kl is monitors\.kl\.limit now, which is given too; set that alone"),
        ("constitution: a\nmonitors: {stop_on_alarm: 7}", r"stop_on_alarm: expected true or false"),
        ("constitution: a\nmonitors: {max_kl: 0.1, kl: 3}", r"monitors\.kl: expected a section"),
        ("constitution: a\nmonitors: {kl: {action: stop}}", r"monitors\.kl\.action: .*'rollback' or 'off'"),
        ("constitution: a\nsampling: {max_model_len: 32, max_tokens: 80}",
         r"sampling\.max_model_len: 32 tokens leave no room for a prompt before an answer of max_tokens=80"),
        ("constitution: a\nseed: 1\nlearner: {beta: 1}\nlearner: {}", r"job\.yaml:4: `learner` is given twice"),
        ("constitution: a\nname: 2024-13-45", r"not valid YAML \(month must be"),
        ("constitution: &x [*x]", r"job\.yaml:1: an anchor that holds itself"),
        ("constitution: " + "[" * 3000, r"job\.yaml: nested too deeply"),
        ("constitution: a\x00b", r"job\.yaml: not valid YAML"),
        ("- a", "a job is a mapping of settings, found list"),
        ("a: [", r"job\.yaml:1: not valid YAML|job\.yaml:2: not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        load(tmp_path, text)
    assert "job.yaml" in str(e.value)
    assert "\n" not in str(e.value)
    assert not re.search(r"(\b\w+): \1[:.]", str(e.value))  # source: source:


@pytest.mark.parametrize(
    "text",
    [
        "eval: {probes: p.jsonl, retention: false}",  # the variant of a job in which it is off
        "replay: {share: 0, max_age: 8, half_life: 2, rejudge: {calls: 3}, on_change: expire}",
        "replay: {on_change: rejudge}",  # people's labels follow it, too
        "monitors: {anchors: {action: pause}}",
        "monitors: {stop_on_alarm: true}",
        "judge: {kind: likelihood}\nmonitors: {anchors: {every: 2}}",
    ],
)
def test_what_a_job_turns_off_itself_is_no_mistake(tmp_path: Path, text: str) -> None:
    load(tmp_path, f"constitution: a\n{text}")


def test_a_stored_run_is_read_whatever_has_no_effect_in_it(tmp_path: Path) -> None:
    job = load(tmp_path, "constitution: a")
    tree = job.model_dump(mode="json")
    assert worth_knowing(parse_job(tree, "run.json")) == []
    tree["monitors"]["kl"] |= {"limit": -1, "action": "rollback"}
    rollback, limit = worth_knowing(parse_job(tree, "run.json"))
    assert rollback.startswith("monitors.kl.action=rollback: only the newest checkpoint is kept")
    assert limit.startswith("monitors.kl.limit: -1")
    assert worth_knowing(parse_job(tree | {"keep_checkpoints": "all"}, "run.json")) == [limit]
    assert worth_knowing(parse_job(tree | {"keep_checkpoints": {"every": 2}}, "run.json")) == [limit]
    few, _ = worth_knowing(parse_job(tree | {"keep_checkpoints": {"last": 3}}, "run.json"))
    assert "only the newest 3 checkpoints are kept" in few


def test_a_job_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes("constitution: größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"job\.yaml: not UTF-8 text"):
        load_job(tmp_path / "job.yaml")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: can't read the job file"):
        load_job(tmp_path / "none.yaml")


def test_overrides(tmp_path: Path) -> None:
    job = load(tmp_path, "constitution: a", "learner.beta=0.2", "learner.lora={r: 4}", "learner.args.weight_decay=0.1")
    assert job.learner.beta == 0.2
    assert job.learner.lora is not None
    assert job.learner.lora.r == 4
    assert job.learner.args == {"weight_decay": 0.1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("beta", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("constitution.x=1", "`constitution` is a value, not a section"),
        (
            "source.rejudge=true",
            r"`source` was given as 'd\.jsonl', .*; give source\.columns, source\.data, source\.iterations, "
            r"source\.rejudge, source\.run, each by its key",
        ),
        ("seed=[", "not valid YAML"),
        ("name=2024-13-45", "not valid YAML"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_override({"constitution": "a", "source": "d.jsonl"}, override)


def test_jurors_that_differ_in_anything_are_two(tmp_path: Path) -> None:
    jury = "{model: m, max_tokens: 9}, {model: m, extra_body: {top_k: 1}}, {model: m, base_url: 'http://h/v1'}"
    warm = "{model: m, temperature: 1.0}, {model: m, temperature: 1.0}"
    job = load(tmp_path, f"constitution: a\njudge: {{kind: chat, model: m, jury: [{jury}, {warm}]}}")
    assert len(job.judge.jurors) == 6


def test_changed_keys_are_dotted() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": None, "s": {"0": "x"}}
    new = {"a": {"b": 1, "c": 3}, "d": {"e": 1}, "s": {"0": "x", "4": "y"}}
    assert changed_keys(old, new) == {"a.c": (2, 3), "d": (None, {"e": 1}), "s.4": (None, "y")}
    assert changed_keys(old, old) == {}


def test_sections_in_a_list_go_by_their_place() -> None:
    old = {"jury": [{"model": "m", "urls": ["a"]}, {"model": "n"}]}
    assert changed_keys(old, {"jury": [{"model": "m", "urls": ["b"]}, {"model": "n"}]}) == {
        "jury.0.urls": (["a"], ["b"])
    }
    shorter = {"jury": [{"model": "n"}]}
    assert changed_keys(old, shorter) == {"jury": (old["jury"], shorter["jury"])}


def test_a_list_of_servers_may_change_for_another() -> None:
    def job(base_url: Any) -> Job:
        return parse_job({"constitution": "c", "judge": {"kind": "chat", "model": "m", "base_url": base_url}}, "job")

    one, some, more = job("http://a/v1"), job(["http://a/v1"]), job(["http://b/v1", "http://a/v1"])
    assert may_change("judge.base_url", some, more)
    assert not may_change("judge.base_url", one, more)
    assert not may_change("judge.base_url", some, one)


def test_limits_of_older_jobs_are_those_of_kinds(tmp_path: Path) -> None:
    older = load(
        tmp_path, "constitution: a\nmonitors: {max_kl: 0.3, max_weights_gap: 0.1, max_length_ratio: 3}"
    ).monitors
    assert older.kl.limit == 0.3
    assert (older.weights_gap.limit, older.decoding_gap.limit) == (0.1, 0.1)
    assert older.calibration_shift.length_ratio == 3
    assert {getattr(older, kind).action for kind in Monitors.model_fields} == {"warn"}
    silent = load(tmp_path, "constitution: a\nmonitors: {max_kl: null}").monitors
    assert (silent.kl.action, silent.kl.limit) == ("off", 0.5)
    stopping = load(tmp_path, "constitution: a\nmonitors: {stop_on_alarm: true, kl: {action: warn}}").monitors
    assert (stopping.kl.action, stopping.short_answers.action) == ("warn", "pause")
    assert load(tmp_path, "constitution: a\nmonitors: {stop_on_alarm: false}").monitors == Monitors()


def test_the_monitors_of_an_older_run_take_newer_keys() -> None:
    stored = {"constitution": "a", "monitors": {"max_kl": 0.5, "min_mean_words": 3, "stop_on_alarm": False}}
    tree = of_run(stored, ["monitors.kl.limit=0.2", "monitors.kl.action=pause"])
    found = parse_job(tree, "run.json").monitors
    assert (found.kl.limit, found.kl.action, found.short_answers.limit) == (0.2, "pause", 3)
    assert stored["monitors"]["max_kl"] == 0.5


def test_every_field_has_a_docstring() -> None:
    def undocumented(section: type[BaseModel], prefix: str = "") -> list[str]:
        out = []
        for name, field in section.model_fields.items():
            for inner in (sections := sections_in(field.annotation)):
                out += undocumented(inner, f"{prefix}{name}.")
            if not field.description and (not sections or type(None) in get_args(field.annotation)):
                out.append(prefix + name)
        return out

    assert undocumented(Job) == []


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"filters": {"review": {}}}, r"filters\.review: give below_agreement, top_uncertain or both"),
        (
            {"filters": {"review": {"below_agreement": 2}}},
            r"filters\.review\.below_agreement: .*less than or equal to 1",
        ),
        ({"filters": {"review": {"below_agrement": 1}}}, "did you mean `below_agreement`"),
        (
            {"filters": {"review": {"top_uncertain": 3}}, "judge": {"kind": "chat", "model": "m", "early_stop": True}},
            r"judge\.early_stop: never with filters\.review",
        ),
    ],
)
def test_what_a_review_cant_be(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_job({"constitution": "assistant", **tree}, "job.yaml")


def test_a_setting_that_is_gone_is_read_in_older_runs_where_it_said_nothing() -> None:
    tree = parse_job({"constitution": "rules"}, "job").model_dump(mode="json")
    tree["judge"]["votes"] = None
    assert parse_job(tree, "run.json") == parse_job({"constitution": "rules"}, "job")
    tree["judge"]["votes"] = "runs/old"
    with pytest.raises(UserError, match=r"unknown key `judge\.votes`"):
        parse_job(tree, "run.json")


def test_a_judge_that_is_the_policys_model_has_its_template_arguments() -> None:
    args = {"enable_thinking": False}
    tree = {"constitution": "a", "policy": {"chat_template_args": args}}
    assert parse_job(tree, "job").judge.chat_template_args == args
    assert parse_job({**tree, "judge": {"model": "other/model"}}, "job").judge.chat_template_args == {}
    assert parse_job({**tree, "judge": {"chat_template_args": {}}}, "job").judge.chat_template_args == {}
    chat = parse_job({**tree, "judge": {"kind": "chat", "model": "m"}}, "job").judge
    assert getattr(chat, "chat_template_args", {}) == {}
    with pytest.raises(UserError, match="a server renders its own template"):
        parse_job({**tree, "judge": {"kind": "chat", "model": "m", "chat_template_args": args}}, "job")
    with pytest.raises(UserError, match="`tokenize` is no argument of a chat template that a job may set"):
        parse_job({"constitution": "a", "policy": {"chat_template_args": {"tokenize": True}}}, "job")


@pytest.mark.parametrize("stop", [[""], [-1], [True], [1.5], "###", [None], [["a"]]])
def test_stops_that_are_none(stop: Any) -> None:
    with pytest.raises(UserError, match=r"sampling\.stop"):
        parse_job({"constitution": "a", "sampling": {"stop": stop}}, "job")
    assert parse_job({"constitution": "a", "sampling": {"stop": ["\n\n", 13]}}, "job").sampling.stop == ["\n\n", 13]


@pytest.mark.parametrize(
    ("job", "cut_off"),
    [
        ("constitution: a", "keep"),
        ("constitution: a\njudge: {kind: chat, model: m}", "drop"),
        ("constitution: a\njudge: {kind: chat, model: m}\nfilters: {min_votes: 2}", "drop"),
        ("constitution: a\njudge: {kind: chat, model: m}\nfilters: {cut_off: keep}", "keep"),
        ("constitution: a\nfilters: {cut_off: drop}", "drop"),
    ],
)
def test_winners_that_were_cut_off_are_dropped_for_a_judge_that_reads(tmp_path: Path, job: str, cut_off: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(job)
    assert load_job(path).filters.cut_off == cut_off


@pytest.mark.parametrize(
    ("key", "may"),
    [
        ("iterations", True),
        ("monitors.kl.limit", True),
        ("judge.budget.calls", True),
        ("judge.headers.api-key", True),
        ("judge.prices.gpt.prompt", True),
        ("learner.args.per_device_train_batch_size", True),
        ("learner.learning_rate", True),
        ("learner.learning_rate_decay", False),  # a prefix of what may change
        ("learner.args.weight_decay", False),
        ("learner.args", False),
        ("learner", False),
        ("judge.jury", False),
        ("judge.jury.0.api_key_env", True),
        ("judge.jury.0.base_url", True),  # a list
        ("judge.jury.0.model", False),
        ("judge.jury.1.api_key_env", False),  # there is none
        ("judge.base_url", False),  # a single one
        ("judge.temperature", False),
        ("iterations_of", False),
        ("seed", False),
    ],
)
def test_what_may_change_in_a_run_is_said_on_the_setting(key: str, may: bool) -> None:
    jury = [{"model": "n", "base_url": ["http://127.0.0.1:1/v1"]}]
    chat = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:1/v1", "jury": jury}
    assert may_change(key, parse_job({"constitution": "c", "judge": chat}, "job")) == may


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "query: {api-version: 2024-10-21}",
            "judge.query.api-version: expected text, and YAML reads 2024-10-21 as a date",
        ),
        ("query: {api-version: 1.5}", "judge.query.api-version: expected text, and YAML reads 1.5 as a number"),
        ("query: {beta: yes}", "judge.query.beta: expected text, and YAML reads true as true or false"),
        ("query: {2024: a}", "judge.query.2024: expected text, and YAML reads 2024 as a number"),
        ("headers: {api-key: 7}", "judge.headers.api-key: expected text, and YAML reads 7 as a number"),
        ("model: 4", "judge.model: expected text, and YAML reads 4 as a number"),
        (
            "query: {at: 2024-10-21 10:00:00}",
            "judge.query.at: expected text, and YAML reads 2024-10-21 10:00:00 as a time",
        ),
    ],
)
def test_text_that_yaml_reads_as_something_else(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "job.yaml").write_text(f"constitution: assistant\njudge:\n  kind: chat\n  {line}\n")
    with pytest.raises(UserError, match=r"put it in quotes$") as error:
        load_job(tmp_path / "job.yaml")
    assert says in str(error.value)


def test_a_rule_that_a_run_did_not_have_drops_nothing_when_it_goes_on() -> None:
    chat = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:1/v1"}
    stored = parse_job({"constitution": "c", "judge": chat}, "job").model_dump(mode="json")
    assert stored["filters"].pop("cut_off") == "drop"
    assert parse_job(of_run(stored), "run.json").filters.cut_off == "keep"
    assert parse_job(of_run(stored, ["filters.cut_off=drop"]), "run.json").filters.cut_off == "drop"
