"""The command line: exit codes, one line for a mistake, JSON that parses, nothing heavy for --help."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlaif import __version__, cli
from rlaif.config import load_job
from rlaif.errors import RlaifError, RunInterrupted, UserError, WorkerError
from tests.conftest import make_project
from tests.stubs import write_texts

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    ["init"],
    ["run"],
    ["status"],
    ["export"],
    ["chat"],
    ["doctor"],
    ["models"],
    ["constitution", "list"],
    ["constitution", "show"],
    ["constitution", "check"],
    ["constitution", "diff"],
    ["constitution", "log"],
    ["judge", "bench"],
    ["judge", "attack"],
    ["judge", "calibrate"],
    ["review"],
]


@pytest.fixture
def rlaif(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkout: Path):
    """Runs the command in this process, in a fresh clone or in `cwd`: (exit code, stdout, stderr)."""

    def run(*arguments: str, cwd: Path = checkout) -> tuple[int, str, str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["rlaif", *arguments])
        with pytest.raises(SystemExit) as e:
            cli.main()
            sys.exit(0)
        code = e.value.code
        out = capsys.readouterr()
        return (code if isinstance(code, int) else 0 if code is None else 1), out.out, out.err

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(rlaif, command: list[str]) -> None:
    code, out, _ = rlaif(*command, "--help")
    assert code == 0
    assert f"rlaif {' '.join(command)} [" in out  # before it: how pytest was started
    description = next(line.strip() for line in out.splitlines()[1:] if line.strip())
    assert len(description) > 20
    assert not description.startswith("Options")


def imported_by(*arguments: str) -> tuple[int, set[str]]:
    """The exit code of a command, and every module that it imported."""
    code = (
        f"import sys; sys.argv = ['rlaif', *{arguments!r}]\nfrom rlaif.cli import main\ncode = 0\n"
        "try: main()\nexcept SystemExit as e: code = e.code or 0\n"
        "print(repr((code, sorted(sys.modules))), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, modules = ast.literal_eval(done.stderr.splitlines()[-1])
    return status, set(modules)


AT_WORK = {  # what only a command that does something needs
    "accelerate", "asyncio", "datasets", "diskcache", "duckdb", "fastapi", "filelock", "httpx", "jinja2", "matplotlib",
    "numpy", "openai", "peft", "psutil", "scipy", "sklearn", "torch", "transformers", "trl", "uvicorn", "vllm",
}  # fmt: skip
TO_READ = {"rich", "rlaif.config", "rlaif.records", "rlaif.rundir.store", "yaml"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected", "needless"),
    [
        ((), 2, AT_WORK | TO_READ | {"pydantic"}),
        (("--help",), 0, AT_WORK | TO_READ | {"pydantic"}),
        (("--version",), 0, AT_WORK | TO_READ | {"pydantic"}),
        (("--no-such-option",), 2, AT_WORK | TO_READ | {"pydantic"}),
        # typer brings pydantic as soon as it reads a command's own arguments.
        (("rum",), 2, AT_WORK | TO_READ),
        (("run",), 2, AT_WORK | TO_READ),
        (("init",), 2, AT_WORK | TO_READ),
        (("init", "--help"), 0, AT_WORK | TO_READ),
        (("init", "project"), 0, AT_WORK),
        (("run", "--help"), 0, AT_WORK | TO_READ),
        (("run", "a", "--no-such-option"), 2, AT_WORK | TO_READ),
        (("audit", "x", "--help"), 0, AT_WORK | TO_READ),
        (("constitution", "diff", "--help"), 0, AT_WORK | TO_READ),
        (("judge", "bench", "--alpha", "much"), 2, AT_WORK | TO_READ),
        (("status", "no/run"), 2, AT_WORK),
        (("status", str(ROOT / "tests/data/run_schema1")), 0, AT_WORK),
        (("run", "jobs/none.yaml"), 2, AT_WORK),
        (("run", "jobs/quickstart.yaml", "--set", "learner.bta=1"), 2, AT_WORK),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_nothing_is_imported_before_it_is_needed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: int, needless: set[str]
) -> None:
    monkeypatch.chdir(checkout)
    code, modules = imported_by(*arguments)
    assert code == expected
    assert "typer" in modules
    assert not needless & modules


def test_version(rlaif) -> None:
    assert rlaif("--version") == (0, f"rlaif {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "jobs/none.yaml"], "jobs/none.yaml: can't read the job file"),
        (["run", "jobs/quickstart.yaml", "--set", "learner.bta=1"], "unknown key `learner.bta`; did you mean `beta`?"),
        (
            [
                "run",
                "jobs/quickstart.yaml",
                "--set",
                "judge.kind=recorded",
                "--set",
                "pairing.method=random",
            ],
            "judge.kind: no judge is called 'recorded'; there are `likelihood`, `chat`, and `module:Class`",
        ),
        (["run", "jobs/quickstart.yaml", "--set", "seed"], "expected KEY=VALUE"),
        (["status", "no/run"], "no such run"),
        (["export", "no/run", "--to", "x"], "no such run"),
        (["chat", "no/run"], "no such run"),
        (["models", "no/such/folder/here"], "no such folder"),
        (["constitution", "show", "asistant"], "did you mean `assistant`?"),
        (["constitution", "show", "assistant@99"], "there is assistant@1"),
        (["run", "jobs/quickstart.yaml", "--dry-run", "--set", "prompts.train=gone.jsonl"], "gone.jsonl"),
        (["run", "jobs/quickstart.yaml", "--dry-run", "--set", "policy.model=./nope"], "./nope: no such folder"),
        (["run", "jobs/quickstart.yaml", "--dry-run", "--set", "policy.model=embedded:foo"], "no such embedded model"),
        (["run", "jobs/quickstart.yaml", "--dry-run", "--set", "judge.model=embedded:foo"], "no such embedded model"),
        (
            ["run", "jobs/quickstart.yaml", "--dry-run", "--set", "prompts.per_iteration=3"],
            "filters.min_kept_pairs=4: an iteration has at most 3 pairs",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(rlaif, arguments: list[str], message: str) -> None:
    code, out, err = rlaif(*arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("rlaif: ")
    assert message in err


SHIPPED = "`rlaif init DIR` writes the"
A_FOLDER = "this is a folder"


@pytest.mark.parametrize(
    ("arguments", "next_step"),
    [
        (["run", "jobs/quickstart.yaml"], SHIPPED),
        (["run", "jobs/quickstart.yaml", "--dry-run"], SHIPPED),
        (["doctor", "--job", "jobs/quickstart.yaml"], SHIPPED),
        (["constitution", "list"], SHIPPED),
        (["constitution", "list", "--json"], SHIPPED),
        (["constitution", "check"], SHIPPED),
        (["constitution", "show", "assistant"], SHIPPED),
        (["constitution", "diff", "assistant@1", "assistant@2"], SHIPPED),
        (["judge", "bench"], SHIPPED),
        (["judge", "attack"], SHIPPED),
        (["judge", "calibrate", "--to", "c.json"], SHIPPED),
        (["judge", "bench", "pairs.jsonl"], "check the name"),
        (["status", "runs/quickstart"], "`rlaif run JOB` makes one"),
        (["constitution", "log", "runs/quickstart"], "`rlaif run JOB` makes one"),
        (["report", "runs/quickstart"], "`rlaif run JOB` makes one"),
        (["run", "."], A_FOLDER),
        (["doctor", "--job", "."], A_FOLDER),
        (["judge", "bench", "."], A_FOLDER),
        (["judge", "attack", "."], A_FOLDER),
        (["judge", "calibrate", ".", "--to", "c.json"], A_FOLDER),
        (["judge", "bench", "--job", "."], A_FOLDER),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_in_an_empty_folder_the_next_step_is_said(rlaif, tmp_path: Path, arguments: list[str], next_step: str) -> None:
    code, out, err = rlaif(*arguments, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert next_step in err
    assert "Errno" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["run"], ["status"], ["run", "a", "--no-such-option"], ["rum"]])
def test_wrong_usage_is_exit_2(rlaif, arguments: list[str]) -> None:
    code, _, err = rlaif(*arguments)
    assert code == 2
    assert "Usage:" in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("yours"), 2, "rlaif: yours"),
        (RlaifError("ours"), 1, "rlaif: ours"),
        (WorkerError("worker"), 1, "rlaif: worker"),
        (RunInterrupted("stopped"), 130, "rlaif: stopped"),
        (
            OSError(28, "No space left on device", "a/file"),
            1,
            "rlaif: a/file: No space left on device; free some and run the same command again",
        ),
        (
            OSError(28, "No space left on device"),
            1,
            "rlaif: a file: No space left on device; free some and run the same command again",
        ),
    ],
)
def test_exit_codes(rlaif, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, line: str) -> None:
    def fail(**_: str) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert rlaif("doctor") == (code, "", line + "\n")


def test_a_dry_run_prints_the_plan_and_writes_nothing(rlaif, tmp_path: Path) -> None:
    make_project(tmp_path, "no-such/model-on-the-hub")
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = rlaif("run", "tiny.yaml", "--dry-run", "--json", cwd=tmp_path)
    plan = json.loads(out)
    assert code == 0
    assert plan["samples"] == 3 * 6 * 4
    assert plan["train_prompts"] == 12
    assert plan["constitutions"] == {"0": "rules@1", "2": "rules@2"}
    assert plan["run"] == "runs/tiny"
    code, out, _ = rlaif("run", "tiny.yaml", "--dry-run", cwd=tmp_path)
    assert code == 0
    assert "nothing was run" in out
    assert "at once" not in out
    code, out, _ = rlaif("run", "tiny.yaml", "--dry-run", "--set", "pipeline.staleness=2", cwd=tmp_path)
    assert "2 iterations sampled and judged before the update is done (pipeline.staleness)" in " ".join(out.split())
    assert "pipeline.stream" not in out
    assert sorted(tmp_path.rglob("*")) == before


def test_constitution_list_json(rlaif) -> None:
    code, out, _ = rlaif("constitution", "list", "--json")
    assert code == 0
    assert {"assistant", "harmless"} <= {row["name"] for row in json.loads(out)}


def test_doctor_json(rlaif) -> None:
    code, out, _ = rlaif("doctor", "--json")
    assert code in (0, 1)
    assert {"name", "status", "found", "mend"} <= set(json.loads(out)[0])


def test_a_broken_constitution_at_the_start_is_exit_2(rlaif, tmp_path: Path) -> None:
    make_project(tmp_path, "no/such/model", constitution="rules")
    (tmp_path / "constitutions/rules/v2.yaml").write_text("summary: [")
    code, _, err = rlaif("run", "tiny.yaml", cwd=tmp_path)
    assert code == 2
    assert "v2.yaml:" in err
    assert "Traceback" not in err


def test_a_vanished_prompt_file_at_the_start_is_exit_2(rlaif, tmp_path: Path) -> None:
    make_project(tmp_path, "no/such/model")
    (tmp_path / "train.jsonl").unlink()
    code, _, err = rlaif("run", "tiny.yaml", cwd=tmp_path)
    assert code == 2
    assert "train.jsonl" in err.splitlines()[-1]


def test_constitution_check_says_what_it_did_not_read(tmp_path: Path, rlaif) -> None:
    code, _, err = rlaif("constitution", "check", "--dir", "nope", cwd=tmp_path)
    assert code == 2
    assert "nope: no constitution in it" in err
    folder = write_texts(tmp_path, 1)
    code, out, _ = rlaif("constitution", "check", cwd=tmp_path)
    assert (code, out.split()[-1]) == (0, "ok")
    (folder / "v2.yml").write_text("")
    code, out, err = rlaif("constitution", "check", cwd=tmp_path)
    assert (code, out.split()[-1]) == (2, "ok")
    assert "constitutions/rules/v2.yml: nothing reads it" in err
    for version in (3, 4):
        (folder / f"v{version}.yaml").write_text("summary: [")
    code, out, err = rlaif("constitution", "check", cwd=tmp_path)
    assert (code, out.split()[-1], len(err.splitlines())) == (2, "ok", 3)  # every one of them is named


def test_constitution_check_knows_the_templates(tmp_path: Path, rlaif) -> None:
    folder = write_texts(tmp_path, 1)
    shutil.copytree(ROOT / "prompts" / "judge", tmp_path / "prompts" / "judge")
    assert rlaif("constitution", "check", cwd=tmp_path)[0] == 0
    (folder / "v1.yaml").write_text((folder / "v1.yaml").read_text() + "template: pairwize\n")
    code, _, err = rlaif("constitution", "check", cwd=tmp_path)
    assert code == 2
    assert "constitutions/rules/v1.yaml: judge template `pairwize`" in err
    assert "did you mean `pairwise`?" in err


def test_constitution_check_and_show_say_what_is_derived(tmp_path: Path, rlaif) -> None:
    folder = tmp_path / "constitutions" / "support"
    folder.mkdir(parents=True)
    (folder / "v1.yaml").write_text(
        "summary: Support.\nprinciples:\n  - {id: polite, rule: The answer should be polite.}\n"
        "  - {id: kind, rule: the answer should be  polite}\n"
    )
    code, out, _ = rlaif("constitution", "check", cwd=tmp_path)
    assert code == 0
    assert "  likelihood judge: yes; derived.2 derives from the rule: polite (select, decide, evaluate), kind" in out
    assert "  chat judge: yes, as it is; missing for best_worst: scores of single answers" in out
    assert "  warning: principles `polite` and `kind` have the same rule" in out
    code, out, _ = rlaif("constitution", "check", "--json", cwd=tmp_path)
    (text,) = json.loads(out)
    assert [j["judge"] for j in text["judges"]] == ["likelihood", "chat"]
    assert len(text["warnings"]) == 1
    code, out, _ = rlaif("constitution", "show", "support", cwd=tmp_path)
    assert "derived from the rule (evaluate, polite/derived.2-evaluate1)" in out
    assert "prefer: You are a helpful assistant. The answer should be polite." in out


@pytest.mark.parametrize("arguments", [("run", "tiny.yaml"), ("run", "tiny.yaml", "--dry-run")])
def test_a_text_that_does_not_serve_its_judge_is_exit_2(
    rlaif, tiny_model: Path, tmp_path: Path, arguments: tuple[str]
) -> None:
    make_project(tmp_path, tiny_model, constitution="rules")
    (tmp_path / "constitutions/rules/v2.yaml").write_text("summary: s\nprinciples:\n  - {id: dots, rule: '...'}\n")
    code, _, err = rlaif(*arguments, cwd=tmp_path)
    assert code == 2
    assert "constitution rules@2, principle `dots`: its rule is '...', without a word" in err
    assert "Traceback" not in err


def test_a_run_with_a_name_starts_another_from_its_job(rlaif, tmp_path: Path) -> None:
    job = load_job(make_project(tmp_path, "no-such/model-on-the-hub"))
    header = {"schema_version": 1, "job": job.model_dump(mode="json")}
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text(json.dumps(header))
    code, out, err = rlaif("run", "runs/a", "--set", "seed=3", "--name", "b", "--dry-run", "--json", cwd=tmp_path)
    assert code == 0, err
    assert json.loads(out)["run"] == "runs/b"
    code, out, _ = rlaif("run", "runs/a", "--dry-run", "--json", cwd=tmp_path)
    assert (json.loads(out)["run"], json.loads(out)["iterations_done"]) == ("runs/a", 0)
    code, out, _ = rlaif("run", "runs/a", "--dry-run", cwd=tmp_path)
    assert "0 of these are done, 3 are left" in out
    for wrong in (["--max-tokens", "0"], ["--temperature", "-1"], ["--temperature", "nan"]):
        code, _, err = rlaif("chat", "runs/a", *wrong, cwd=tmp_path)
        assert code == 2
        assert wrong[0] in err


def test_ctrl_c_while_the_command_is_imported_is_no_traceback() -> None:
    code = (
        "import builtins, sys\nfrom rlaif.__main__ import main\nreal = builtins.__import__\n"
        "def interrupted(name, *rest):\n    if name == 'rlaif.cli': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = interrupted\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "rlaif: interrupted\n")


@pytest.mark.slow
def test_a_run_from_the_command_line(tiny_model: Path, tmp_path: Path, rlaif) -> None:
    pytest.importorskip("trl")
    make_project(tmp_path, tiny_model, iterations=1, schedule={0: "rules@1"}, replay={"share": 0.0})
    code, out, err = rlaif("run", "tiny.yaml", "--json", cwd=tmp_path)
    assert code == 0, err
    summary = json.loads(out)
    assert [e["updates"] for e in summary["evaluations"]] == [0, 1]
    assert len(summary["answers"]) == 3
    assert "iteration 1/1 done  rules@1" in err
    code, out, _ = rlaif("status", "runs/tiny", "--json", cwd=tmp_path)
    assert json.loads(out)["iterations_done"] == 1
    code, out, err = rlaif("run", "runs/tiny", cwd=tmp_path)
    assert code == 0
    assert "held-out answers" in out
    code, out, _ = rlaif("export", "runs/tiny", "--to", "policy", cwd=tmp_path)
    assert code == 0
    assert (tmp_path / "policy/model.safetensors").exists()
    card = (tmp_path / "policy/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["rlaif", "dpo"]}, "a local base is no hub id"
    assert "constitutions in force, in order: rules@1 (" in card
    assert f"from `{tiny_model}`" in card
    assert [line.split("|")[1].strip() for line in card.splitlines() if line.startswith("| ")][1:] == ["0", "1"]
    code, out, err = rlaif("chat", "runs/tiny", "--prompt", "w5 w6", "--max-tokens", "4", cwd=tmp_path)
    assert code == 0, err
    assert [line.partition(":")[0] for line in out.splitlines() if ":" in line] == ["base", "after 1"]
    assert "w" in out.partition("base:")[2].partition("after")[0]
    code, _, err = rlaif("run", "tiny.yaml", "--set", "seed=3", cwd=tmp_path)
    assert code == 2
    assert "seed (0 -> 3)" in err
