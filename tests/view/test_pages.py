"""The pages over plain HTTP: headers, hosts, errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest

from rlaif.judging.verdicts import aggregate
from rlaif.review.queue import Queue
from rlaif.rundir.store import RunDir
from tests.conftest import rlaif_here
from tests.judging.vote_makers import make_vote
from tests.view.conftest import served
from tests.view.runs import make_run, reviewed_job


def get(url: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, dict(e.headers), e.read().decode()


def post(url: str, form: dict[str, str], **headers: str) -> tuple[int, dict[str, str], str]:
    """The same, of a form that was sent."""
    request = urllib.request.Request(url, data=urlencode(form).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, dict(e.headers), e.read().decode()


@pytest.mark.parametrize("path", ["/", "/static/style.css", "/nothing", "/version"])
def test_every_answer_forbids_foreign_script(address: str, path: str) -> None:
    _, headers, _ = get(address + path)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_a_name_that_is_not_this_machine_is_refused(address: str) -> None:
    status, _, text = get(address, Host="rebound.example:8321")
    assert status == 400
    assert "loopback" in text
    assert get(address, Host="localhost:1234")[0] == 200


@pytest.mark.slow
def test_iterations_that_an_older_policy_sampled_say_so(stub_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stub_run, tmp_path / "run")
    column = "Sampled iterations before"
    with served(run) as url:
        assert column not in get(url)[2]
    assert "stale" not in rlaif_here("audit", str(run)).stdout
    metrics = run / "iterations/0001/metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"staleness": 1}))
    with served(run) as url:
        assert column in get(url)[2]
    header = next(line for line in rlaif_here("audit", str(run)).stdout.splitlines() if "slot 1" in line)
    assert "stale" in header


@pytest.mark.slow
def test_a_text_is_shown_with_what_it_includes_from_a_folder(stub_run: Path, tmp_path: Path) -> None:
    shutil.copytree(stub_run, tmp_path / "run")
    text = next(tmp_path.glob("run/constitutions/*/source.yaml")).parent
    (text / "parts").mkdir()
    (text / "parts/task.jinja").write_text("compare them\n")
    with served(tmp_path / "run") as url:
        _, _, page = get(f"{url}/constitutions/{text.name}")
    assert "parts/task.jinja" in page
    assert "compare them" in page


def test_a_change_of_text_is_a_line_in_every_table_over_time(address: str) -> None:
    _, _, page = get(address)
    rows = re.findall(r"<tr( class=\"turned\")?><th scope=\"row\" class=\"n\">(?:<a[^>]*>)?(\w+)", page)
    assert rows == [
        *(("", "1"), ("", "2"), (' class="turned"', "3"), ("", "4")),
        *(("", "base"), ("", "2"), (' class="turned"', "4")),
    ]


def test_the_constitutions_say_what_each_change_did(address: str, stub_run: Path) -> None:
    from rlaif.audit.text_log import text_log

    _, _, page = get(f"{address}/constitutions")
    first, second = text_log(RunDir.open(stub_run)).texts
    said = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert f"{first.names[0]} {first.hash} 1 to 2 the first" in said
    assert f"{second.names[0]} {second.hash} 3 to 4 the text itself changed: summary" in said
    assert re.search(r"wish changed: [a-z, ]*rule", said)
    assert second.old_pairs is not None
    assert f"{second.old_pairs.expired} expired" in said
    assert said.count("under it") + said.count("not measured under this text") >= 2


@pytest.mark.slow
def test_constitutions_of_a_damaged_run_are_listed(stub_run: Path, tmp_path: Path) -> None:
    shutil.copytree(stub_run, tmp_path / "run")
    (tmp_path / "run/evaluations/0004/metrics.json").write_text("{")
    with served(tmp_path / "run") as url:
        status, _, page = get(f"{url}/constitutions")
    assert status == 200
    assert "evaluations/0004/metrics.json" in page
    assert "rules@2</a>, first in iteration 3" in page


def test_an_address_with_a_word_of_ours_is_understood(address: str) -> None:
    status, _, page = get(f"{address}/pairs?reason=no%20such&filter=x&status=kept")
    assert status == 200
    assert "reason=no such" in page


def test_unknown_pages_are_a_line(address: str) -> None:
    for path in ("/nothing", "/static/../app.py", "/static/app.py"):
        status, _, text = get(address + path)
        assert status == 404
        assert "Traceback" not in text


def test_no_generated_api_pages(address: str) -> None:
    assert [get(f"{address}/{p}")[0] for p in ("docs", "redoc", "openapi.json")] == [404] * 3


@pytest.mark.slow
def test_a_damaged_file_is_named_and_the_rest_is_shown(stub_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stub_run, run)
    (run / "iterations/0001/metrics.json").write_text('{"iteration": 1,\n oops')
    with served(run) as url:
        status, _, text = get(url)
    assert status == 200
    assert re.search("Unreadable:</strong> [^<]*iterations/0001/metrics.json", text)
    assert "rules@2" in text


@pytest.mark.slow
def test_a_form_of_another_page_stores_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, reviewed_job())
    with served(run) as url:
        _, headers, text = get(f"{url}/review")
        cookie = headers["set-cookie"].partition(";")[0] + "; rlaif_author=Ada"
        assert "HttpOnly" in headers["set-cookie"]
        assert "samesite=strict" in headers["set-cookie"].lower()
        token = re.findall('name="token" value="([0-9a-f]+)"', text)[0]
        pair = re.findall('name="pair" value="([^"]+)"', get(f"{url}/review", Cookie=cookie)[2])[0]
        form = {"pair": pair, "answer": "1", "token": token}
        assert post(f"{url}/review", form | {"token": "0" * 64}, Cookie=cookie)[0] == 403
        assert post(f"{url}/review", {"pair": pair, "answer": "1"}, Cookie=cookie)[0] == 403
        assert post(f"{url}/review", form, Cookie="rlaif_author=Ada")[0] == 403
        assert post(f"{url}/review", form | {"reason": "x" * 100_000}, Cookie=cookie)[0] == 413
        assert not (run / "review" / "labels.jsonl").exists()
        assert "expected 1, 2, t" in post(f"{url}/review", form | {"answer": "x"}, Cookie=cookie)[2]
        assert post(f"{url}/review", form, Cookie=cookie)[0] == 200
    assert len((run / "review" / "labels.jsonl").read_text().splitlines()) == 1


def test_what_an_address_can_not_mean_is_said(address: str) -> None:
    status, _, text = get(f"{address}/pairs?status=keptt&min_agreement=much&text=question&offset=-3")
    assert status == 200
    assert all(part in text for part in ("status=keptt", "min_agreement=much", "offset=-3", "question 1"))


def test_an_unknown_pair_or_text_is_a_line(address: str) -> None:
    for path in (
        "/pairs/nosuch",
        "/constitutions/..%2F..%2Frun.json",
        "/constitutions/00000000",
        "/questions/x/nosuch",
    ):
        status, _, text = get(address + path)
        assert status == 404, path
        assert "Traceback" not in text
        assert "schema_version" not in text


def test_a_version_changes_when_something_is_written(stub_run: Path, tmp_path: Path) -> None:
    from rlaif.rundir.store import RunDir
    from rlaif.view.facts import version_of

    run = RunDir(tmp_path / "run")
    shutil.copytree(stub_run, run.path)
    first = version_of(run)
    assert version_of(run) == first
    run.event("resumed", "again")
    second = version_of(run)
    run.iteration(9).path.mkdir()
    third = version_of(run)
    (run.iteration(9).path / "votes.jsonl.partial").touch()
    fourth = version_of(run)
    (run.iteration(9).path / "votes.jsonl.partial").write_text("more of a long stage\n")
    assert len({first, second, third, fourth, version_of(run)}) == 5


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlaif", "view", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{tmp_path}: no run" in done.stderr
    assert "no folder of runs either" in done.stderr
    assert "`rlaif view runs`" in done.stderr


def test_the_version_is_json(address: str) -> None:
    assert set(json.loads(get(f"{address}/version")[2])) == {"version"}


def test_a_voice_is_shown_as_flipped_by_the_rule_that_drops_its_pair() -> None:
    from rlaif.view.pages import votes_by_voice

    votes = [make_vote("first", 0, voice="v", order="forward"), make_vote("tie", 1, voice="v", order="reversed")]
    (voice,) = votes_by_voice(SimpleNamespace(votes=votes, vote_lines=["1", "2"]))  # type: ignore[arg-type]
    assert voice["flipped"] is aggregate(votes).order_flip is True


@pytest.mark.slow
def test_a_damaged_decision_is_named_on_its_pages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made")
    path = run / "iterations" / "0000" / "decisions.jsonl"
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    lines[0] = json.dumps(first | {"status": "perhaps"})
    path.write_text("".join(line + "\n" for line in lines))
    with served(run) as url:
        for address in ("/", "/pairs", f"/pairs/{first['pair_id']}"):
            status, _, text = get(url + address)
            assert status == 200, address
            if address != "/":
                assert "decisions.jsonl" in text


def test_a_principle_is_measured_by_votes_about_it_alone(stub_run: Path, tmp_path: Path) -> None:
    from rlaif.audit.index import Index
    from rlaif.records import Vote
    from rlaif.rundir.store import RunDir, read_rows
    from rlaif.view.facts import read_facts

    run = RunDir(tmp_path / "run")
    shutil.copytree(stub_run, run.path)
    last = max(run.evaluations())
    path = run.evaluation(last).path / "votes.jsonl"
    votes = [v for v in read_rows(path, Vote) if not v.ballot.guard]
    together = {"principles": ("alone", "other")}
    changed = [v.model_copy(update={"outcome": "first", "abstain_reason": None,
                                    "ballot": v.ballot.model_copy(update={"principles": ("alone",)})})
               if i % 2 else v.model_copy(update={"ballot": v.ballot.model_copy(update=together)})
               for i, v in enumerate(votes)]  # fmt: skip
    path.write_text("".join(v.model_dump_json() + "\n" for v in changed))
    with Index.open(run) as index:
        rows = {p.principle: p for p in read_facts(index, run).principles}
    assert rows["alone"].win_rate == 1
    assert rows["alone"].pairs == len({v.ballot.pair_id for v in changed[1::2]})
    assert (rows["other"].win_rate, rows["other"].pairs) == (None, 0)


def test_money_keeps_digits_that_say_something() -> None:
    from rlaif.view.html import money

    assert [money(x) for x in (0, 0.0067, 0.00012, 0.1, 12.345)] == ["0.00", "0.0067", "0.00012", "0.10", "12.35"]


@pytest.mark.slow
def test_a_pair_that_cannot_be_shown_is_named_and_another_asked_about(tmp_path: Path) -> None:
    run = make_run(tmp_path, reviewed_job())
    queue = Queue(RunDir.open(run))
    question = queue.next("Ada")
    assert question is not None
    queue.release("Ada")
    path = run / "iterations" / f"{question.iteration:04d}" / "completions.jsonl"
    path.unlink()
    with served(run) as url:
        status, _, text = get(f"{url}/review", Cookie="rlaif_author=Ada")
    assert status == 200
    assert f"{path}: No such file or directory; its pair is left out" in text
    assert "Which answer is better" in text
