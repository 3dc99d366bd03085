"""A preference data set as a source: in the forms that people have, in the policy's tokens, without a made-up vote."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaif.audit.replay import replay
from rlaif.audit.replay_settings import settings_of
from rlaif.audit.verify import verify
from rlaif.config import Job, parse_job
from rlaif.data.labelled import read_to_train
from rlaif.errors import RunInterrupted, UserError
from rlaif.loop.source_data import LabelledPairs
from rlaif.loop.source_run import StoredPairs
from rlaif.records import (
    Completion,
    ConstitutionRef,
    Decision,
    EvaluationMetrics,
    IterationMetrics,
    Message,
    Pair,
    Plan,
    PlanSource,
    PolicyVersion,
    Preference,
    Vote,
)
from rlaif.rendering import Renderer
from rlaif.rundir.store import RunDir, read_record
from tests.chat_tokenizers import KINDS
from tests.conftest import project_job, rlaif_here
from tests.stubs import Quiet

pytestmark = pytest.mark.slow

USER, ANSWER = "How do I keep  bread fresh?", "Put it into a <b>bag</b> 🙂 'now'"


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]


FORMS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": USER, "chosen": ANSWER, "rejected": "No."},
    "chat": {"prompt": chat(USER), "chosen": chat("", ANSWER)[1:], "rejected": chat("", "No.")[1:]},
    "whole chats": {"chosen": chat(USER, ANSWER), "rejected": chat(USER, "No.")},
    "text and whole chats": {"prompt": USER, "chosen": chat(USER, ANSWER), "rejected": chat(USER, "No.")},
    "hh-rlhf": {
        "chosen": f"\n\nHuman: {USER}\n\nAssistant: {ANSWER}",
        "rejected": f"\n\nHuman: {USER}\n\nAssistant: No.",
    },
    "label": {"instruction": USER, "output_1": "No.", "output_2": ANSWER, "label": 2},
}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".csv":
        with file.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    elif file.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_pairs_are_read_in_the_forms_that_people_have(form: str, ending: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"pairs.{ending}", [FORMS[form]])
    [row] = read_to_train(f"pairs.{ending}", tmp_path).rows
    better, worse = (row.first, row.second) if row.label == "first" else (row.second, row.first)
    asked = row.messages or (Message(role="user", content=row.prompt),)
    assert asked == (Message(role="user", content=USER),)
    assert (better, worse) == (ANSWER, "No.")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": USER, "chosen": ANSWER}, "which column is the first"),
        ({"chosen": chat(USER, "A.", "Why?", "B."), "rejected": chat(USER, "No.")}, "found assistant, user, assistant"),
        ({"prompt": chat(USER, "A."), "chosen": "B.", "rejected": "C."}, "the last one by the user"),
        ({"prompt": USER, "chosen": 3.5, "rejected": None}, "expected text"),
    ],
)
def test_rows_that_cannot_train_are_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(UserError, match=rf"pairs.jsonl.*{said}"):
        read_to_train("pairs.jsonl", tmp_path)


def test_what_the_audit_exports_is_read(tmp_path: Path) -> None:
    """As `rlaif audit RUN export` writes it: a chat, how answers ended, and more that is left alone."""
    more = {"pair_id": "p1", "chosen_finish_reason": "length", "rejected_finish_reason": "stop", "label_author": None}
    write_rows(tmp_path / "pairs.jsonl", [FORMS["chat"] | more])
    [row] = read_to_train("pairs.jsonl", tmp_path).rows
    assert (row.id, row.first, row.first_finish, row.second_finish) == ("p1", ANSWER, "length", "stop")


def test_a_data_set_is_read_by_its_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([FORMS["chat"], FORMS["chat"]]).save_to_disk(tmp_path / "saved")
    found = read_to_train(f"datasets:{tmp_path / 'saved'}", tmp_path)
    assert [row.first for row in found.rows] == [ANSWER] * 2
    assert found.digest == read_to_train(f"datasets:{tmp_path / 'saved'}", tmp_path).digest


# In the policy's tokens.


@pytest.mark.parametrize("kind", list(KINDS))
def test_token_ids_are_those_of_trls_own_tokenization(kind: str, tmp_path: Path) -> None:
    """Of the same rows in chat form, by `DPOTrainer`; what the template writes after the end of a turn is left out."""
    trl = pytest.importorskip("trl")
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = KINDS[kind]()
    rows = [
        {"prompt": chat(*before), "chosen": chat("", better)[1:], "rejected": chat("", worse)[1:]}
        for before, better, worse in (
            ((USER,), ANSWER, "No."),
            (("Hi", "Hello.", USER), f"{ANSWER}\n\n- one\n- two", "Zwölf Boxkämpfer 日本語"),
        )
    ]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 1, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    trainer = trl.DPOTrainer(
        model=LlamaForCausalLM(config),
        ref_model=LlamaForCausalLM(config),  # else it is looked for where the model is from
        args=trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    renderer = Renderer(tokenizer)
    end = renderer.turn_end([tokenizer.eos_token_id]).written
    assert end is not None
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        messages = tuple(Message.model_validate(m) for m in row["prompt"])
        assert renderer.ids(messages) == tuple(theirs["prompt_ids"])
        for side in ("chosen", "rejected"):
            ours = renderer.answered_ids(messages, row[side][0]["content"], end)
            given = tuple(theirs[f"{side}_ids"])
            assert ours == given[: len(ours)]
            assert ours[-1] == end
            assert not tokenizer.decode(given[len(ours) :]).strip()


def test_an_answer_comes_after_what_the_template_writes_before_one() -> None:
    """Where the template writes more before an answer that it waits for, TRL would cut the prompt off."""
    tokenizer = KINDS["qwen"]()
    renderer = Renderer(tokenizer, {"enable_thinking": False})
    messages = (Message(role="user", content=USER),)
    end = tokenizer.eos_token_id
    assert tokenizer.decode(renderer.ids(messages)).endswith("</think>\n\n")
    assert renderer.answered_ids(messages, ANSWER, end) == (*renderer.plain_ids(ANSWER), end)


def test_an_answer_that_spells_an_end_token_does_not_end_there() -> None:
    tokenizer = KINDS["qwen"]()
    renderer = Renderer(tokenizer)
    end = tokenizer.eos_token_id
    ids = renderer.answered_ids((Message(role="user", content=USER),), "Write <|im_end|> there.", end)
    assert ids.count(end) == 1
    assert tokenizer.decode(ids) == "Write <|im_end|> there.<|im_end|>"


# A run.


def data_job(root: Path, model: Path, rows: int = 9, **changes: Any) -> Job:
    """A project whose pairs are words of the tiny model; the third and the last prompt are held out."""
    pairs = [
        {"prompt": f"w{10 + i} w5", "chosen": f"w{20 + i} w6 w7", "rejected": f"w{30 + i}", "id": f"row{i}"}
        for i in range(rows - 1)
    ]
    pairs.append({"prompt": "w40 w3 w4", "chosen": "w20", "rejected": "w21", "id": "held"})
    write_rows(root / "pairs.jsonl", pairs)
    tree = {"source": "pairs.jsonl", "schedule": {0: "rules@1"}, "prompts": {"per_iteration": 4}, "iterations": 3}
    return project_job(root, model, **(tree | changes))


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    root = tmp_path_factory.mktemp("data")
    return execute(data_job(root, tiny_model), root / "run", root, Quiet())


def test_a_run_trains_on_a_files_pairs_without_a_vote(trained: RunDir) -> None:
    assert trained.iterations() == [0, 1, 2]
    seen = []
    for k in trained.iterations():
        here = trained.iteration(k)
        assert here.read("votes", Vote) == []
        decisions = here.read("decisions", Decision)
        assert {(d.status, d.source, d.verdict.outcome, d.verdict.valid_votes) for d in decisions} == {
            ("kept", "data", "abstain", 0)
        }
        completions = {c.id: c for c in here.read("completions", Completion)}
        assert all(c.token_ids[-1] == 2 and c.finish_reason == "stop" for c in completions.values())
        preferences = [p for p in here.read("preferences", Preference) if p.source != "replay"]
        assert {(p.source, p.constitution) for p in preferences} == {("data", "")}
        assert all("w6 w7" in p.chosen and "w6" not in p.rejected for p in preferences)
        assert len(preferences) == 4
        assert here.policy_made() is not None
        seen += [p.pair_id for p in preferences]
    assert len({*seen}) == 12
    assert len({i.partition("-")[2] for i in seen[:8]}) == 8, "every row once before one comes again"
    assert not any("held" in i for i in seen)
    firsts = [d.winner for k in trained.iterations() for d in trained.iteration(k).read("decisions", Decision)]
    assert {*firsts} == {"first", "second"}, "no order carries the label"


def test_such_a_run_is_verified_measured_and_replayed(trained: RunDir, tmp_path: Path) -> None:
    assert verify(trained).holds
    metrics = read_record(trained.iteration(0).path / "metrics.json", IterationMetrics)
    assert (metrics.kept, metrics.votes, metrics.mean_agreement, metrics.trained_pairs) == (4, 0, None, 4)
    # Its answers are short, and nobody voted: neither the policy nor the judge is at fault.
    told = {e.data["kind"] for e in trained.events() if e.kind == "alarm"}
    assert not told & {"abstained", "short_answers"}
    assert (metrics.given, metrics.judged) == (True, None)
    assert read_record(trained.evaluation(3).path / "metrics.json", EvaluationMetrics).win_rate is not None
    settings, _ = settings_of(trained, tmp_path, overrides=["filters.min_agreement=1.0"])
    again = replay(trained, settings)
    assert (again.total("kept_before"), again.total("kept_after"), again.problems) == (12, 12, ())


def test_the_audit_says_that_nobody_voted(trained: RunDir) -> None:
    pair = trained.iteration(0).read("pairs", Pair)[0].id
    said = {name: " ".join(rlaif_here("audit", str(trained.path), *more).stdout.split()) for name, more in {
        "overview": (), "show": ("show", pair), "trace": ("trace", "3"),
    }.items()}  # fmt: skip
    assert "source: pairs of pairs.jsonl, labels as stored" in said["overview"]
    assert "labelled by the data set that it is from, paired by labelled" in said["show"]
    assert "nobody voted: the data set that it is from calls" in said["show"]
    assert "no text: 14 preferences with the label of a data set" in said["trace"]
    assert "replay" in said["trace"]


def test_a_run_on_data_is_no_source_of_labels(trained: RunDir, tmp_path: Path) -> None:
    """It has no votes; its pairs can be judged."""
    job = parse_job({"constitution": "rules", "source": {"run": str(trained.path)}}, "test")
    assert job.source is not None
    with pytest.raises(UserError, match=r"iteration 0 of .* has a data set's labels and no votes"):
        StoredPairs(job.source, tmp_path)
    StoredPairs(job.source.model_copy(update={"rejudge": True}), tmp_path)


def test_its_pairs_can_be_judged_under_the_jobs_text(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    job = data_job(tmp_path, tiny_model, source={"data": "pairs.jsonl", "rejudge": True}, iterations=1)
    run = execute(job, tmp_path / "run", tmp_path, Quiet())
    votes = run.iteration(0).read("votes", Vote)
    assert {v.ballot.pair_id for v in votes} == {p.id for p in run.iteration(0).read("pairs", Pair)}
    assert {d.source for d in run.iteration(0).read("decisions", Decision)} == {"votes"}
    assert {v.ballot.constitution for v in votes} == {run.plan(0).constitution.hash}


def test_a_file_that_changed_is_noticed_when_a_run_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    job = data_job(tmp_path, tiny_model, iterations=1)
    with monkeypatch.context() as patch:
        patch.setattr("rlaif.loop.loop.update", _interrupted)
        with pytest.raises(RunInterrupted):
            execute(job, tmp_path / "run", tmp_path, Quiet())
    content = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(content.replace("w20 w6 w7", "w20 w6 w8"))
    with pytest.raises(UserError, match=r"source.data: pairs.jsonl isn't what it was when this run's plan was written"):
        execute(job, tmp_path / "run", tmp_path, Quiet())
    (tmp_path / "pairs.jsonl").write_text(content)
    assert execute(job, tmp_path / "run", tmp_path, Quiet()).iteration(0).policy_made() is not None


def _interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("too_long", ["refuse", "drop"])
def test_pairs_that_are_too_long_are_told_at_the_start(too_long: str, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    job = data_job(tmp_path, tiny_model, iterations=2, prompts={"per_iteration": 4, "too_long": too_long})
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    rows[1]["chosen"] = "w6 w7 " * 40
    write_rows(tmp_path / "pairs.jsonl", rows)
    progress = Quiet()
    if too_long == "refuse":
        with pytest.raises(UserError, match=r"pairs.jsonl: row row1: .*84 tokens, sampling.max_model_len is 64"):
            execute(job, tmp_path / "run", tmp_path, progress)
        return
    run = execute(job, tmp_path / "run", tmp_path, progress)
    assert any("1 pairs are too long and left out" in said for said in progress.notes)
    trained = [p.pair_id for k in (0, 1) for p in run.iteration(k).read("preferences", Preference)]
    assert not any("row1" in i for i in trained)


def source_of(root: Path, per_iteration: int) -> LabelledPairs:
    tree = {"constitution": "rules", "source": "pairs.jsonl", "prompts": {"per_iteration": per_iteration}}
    job = parse_job(tree, "test")
    assert job.source is not None
    source = LabelledPairs(job.source, job, root, lambda message: None)
    source.settle(source.prompts)
    return source


def named(source: LabelledPairs, k: int, noted: PlanSource) -> tuple[str, ...]:
    """The rows that an iteration takes, by their ids."""
    it: Any = SimpleNamespace(k=k, source=noted)
    return tuple(pair.removeprefix(f"{k:04d}-") for pair in source.labels(it))


def taken(root: Path, per_iteration: int, iterations: int, given: tuple[PlanSource, ...] = ()) -> list[PlanSource]:
    """What plans note that come after others, of eleven rows with one prompt."""
    write_rows(root / "pairs.jsonl", [FORMS["plain"] | {"chosen": f"Answer {i}.", "id": f"row{i}"} for i in range(11)])
    source = source_of(root, per_iteration)
    policy, text = PolicyVersion(iteration=0, digest="base"), ConstitutionRef(name="rules", version=1, hash="h")
    plan = Plan(iteration=0, seed=0, constitution=text, policy=policy, prompt_ids=(), evaluate=False)
    noted = list(given)
    for k in range(len(given), len(given) + iterations):
        made = source.planned(plan, noted, RunDir(root)).source
        assert made is not None
        assert source.gave(made)
        assert named(source, k, made) == made.rows
        noted.append(made)
    return noted


def test_a_pass_stays_whole_where_a_branch_takes_another_number_of_rows(tmp_path: Path) -> None:
    parent = taken(tmp_path, 4, 2)
    rows = [row for noted in taken(tmp_path, 2, 2, tuple(parent)) for row in noted.rows]
    assert len(rows) == 4 + 4 + 2 + 2
    assert len({*rows[:11]}) == 11


def test_a_plan_that_names_no_rows_takes_those_that_it_took(tmp_path: Path) -> None:
    """Plans did so before they named them."""
    noted = taken(tmp_path, 4, 5)
    older = tuple(plan.model_copy(update={"rows": ()}) for plan in noted[:4])
    assert taken(tmp_path, 4, 1, older)[-1] == noted[-1]
    source = source_of(tmp_path, 4)
    assert [named(source, k, plan) for k, plan in enumerate(older)] == [plan.rows for plan in noted[:4]]


def test_too_few_pairs_are_told(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [FORMS["plain"]])
    job = parse_job({"constitution": "rules", "source": "pairs.jsonl", "prompts": {"per_iteration": 2}}, "test")
    assert job.source is not None
    source = LabelledPairs(job.source, job, tmp_path, lambda message: None)
    with pytest.raises(UserError, match=r"prompts.per_iteration=2: pairs.jsonl has 1 pairs to train on"):
        source.settle(source.prompts)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"run": "a", "data": "b"}, "exactly one of `run` and `data`"),
        ({}, "exactly one of `run` and `data`"),
        ({"data": "b", "iterations": "0-5"}, "source.iterations: of a `run`"),
        ({"run": "a", "iterations": "5-2"}, "holds none"),
        ({"run": "a", "iterations": "first"}, "expected one or a range"),
        ({"run": "a", "columns": {"prompt": "q"}}, "source.columns: of `data`"),
    ],
)
def test_a_source_that_says_two_things_is_refused(source: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_job({"constitution": "rules", "source": source}, "test")


def test_a_key_that_no_column_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "good": "b", "bad": "c"}\n')
    with pytest.raises(UserError, match=r"source\.columns\.chosen: no such key; .*keys: id, prompt, .*first, second"):
        read_to_train("pairs.jsonl", tmp_path, {"chosen": "good", "rejected": "bad"})
