"""The engine that asks servers, against a small one that answers as vLLM's does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaif import config
from rlaif.config import parse_job
from rlaif.errors import RlaifError, UserError
from rlaif.records import Message, PolicyVersion, Prompt, TokenSequence
from rlaif.sampling import Sample, SampleRequest, server, vllm_compat
from rlaif.sampling.role import can_rest, make
from rlaif.sampling.server import Sampler
from rlaif.sampling.vllm_compat import TakesWeights
from tests.sampling.conftest import END

pytestmark = pytest.mark.slow

KEY = "secret"


class Stub:
    """Answers every prompt with the same tokens, backwards under other weights than it was given first; keeps what it
    is asked."""

    def __init__(self, tokens: list[int] | None = None) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.held = "another run's"
        self.given: list[str] = []
        self.meanwhile: Callable[[], object] = lambda: None
        """What happens while it samples an answer."""
        self.tokens = tokens or [5, 6, 7, END]
        self.unknown = ""
        self.second: dict[str, str] = {}
        """What its second process says, where that is something else: it is one of two that hold the model together."""
        self.busy = 0
        """How often its prefix cache can't be emptied."""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                known = self.headers["Authorization"] == f"Bearer {KEY}"
                content = json.dumps(stub.answer(self.path, body) if known else {}).encode()
                self.send_response(200 if known else 401)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        self.asked.append((path, body))
        if path == "/collective_rpc":
            if body["method"] == "rlaif_take":
                self.held = body["kwargs"]["path"]
                self.given.append(self.held)
            said = {"rlaif_take": "", "rlaif_held": self.held, "rlaif_check": self.unknown}
            return {"results": [said[body["method"]], self.second.get(body["method"], said[body["method"]])]}
        if path == "/reset_prefix_cache":
            self.busy -= 1
            return {"success": self.busy < 0}
        self.meanwhile()
        tokens = self.tokens if self.held in self.given else self.tokens[::-1]
        logprobs = [None, *({str(t): {"logprob": -float(t)}} for t in body["prompt"][1:])]
        choice = {
            "token_ids": tokens,
            "logprobs": {"token_logprobs": [-0.5] * len(tokens)},
            "finish_reason": "stop" if tokens[-1] == END else "length",
            "prompt_logprobs": logprobs,
        }
        return {"choices": [choice]}

    def paths(self) -> list[str]:
        return [body["method"] if path == "/collective_rpc" else path for path, body in self.asked]

    @property
    def prompts(self) -> list[list[int]]:
        return [body["prompt"] for path, body in self.asked if path == "/v1/completions"]


@pytest.fixture
def stubs() -> Iterator[list[Stub]]:
    stubs = [Stub(), Stub()]
    yield stubs
    for stub in stubs:
        stub.server.shutdown()
        stub.server.server_close()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLICY_KEY", KEY)


def sampler(model: Path, stubs: list[Stub], **changes: Any) -> Sampler:
    urls = [stub.url for stub in stubs]
    given = {"engine": "server", "base_url": urls, "api_key_env": "POLICY_KEY", "max_tokens": 8, "max_model_len": 64}
    return Sampler(str(model), config.Sampling.model_validate(given | changes))


def requests(prompts: int = 4, each: int = 3) -> list[SampleRequest]:
    return [
        SampleRequest(
            id=f"p{p}-{i}",
            prompt_token_ids=(3 + p, 4),
            seed=10 * p + i,
            max_tokens=8,
            temperature=0.7,
            top_p=0.9,
            place=p,
        )
        for p in range(prompts)
        for i in range(each)
    ]


def run(engine: Sampler, asked: list[SampleRequest]) -> dict[str, Sample]:
    return {s.id: s for batch in engine.sample(asked) for s in batch}


def test_servers_share_the_prompts_and_each_has_all_answers_of_its_own(tiny: Path, stubs: list[Stub]) -> None:
    found = run(sampler(tiny, stubs), requests())
    assert sorted(found) == sorted(r.id for r in requests())
    assert {(s.token_ids, s.finish_reason, s.logprob, s.text) for s in found.values()} == {
        ((5, 6, 7, END), "stop", -2.0, "w5 w6 w7")
    }
    of_each = [{tuple(p) for p in stub.prompts} for stub in stubs]
    assert of_each == [{(3, 4), (5, 4)}, {(4, 4), (6, 4)}]
    assert [len(stub.prompts) for stub in stubs] == [6, 6]


def test_a_run_that_goes_on_asks_the_same_servers(tiny: Path, stubs: list[Stub]) -> None:
    """Whatever is there by then, of all prompts but the first and the last one."""
    settings = {"engine": "server", "base_url": [stub.url for stub in stubs], "max_tokens": 8, "max_model_len": 64}
    role = make(str(tiny), config.Sampling.model_validate(settings | {"api_key_env": "POLICY_KEY"}))
    prompts = [Prompt(id=f"p{n}", messages=(Message(role="user", content=f"w{n + 3}"),)) for n in range(5)]
    policy = PolicyVersion(iteration=0, digest="d")

    def sampled(have: frozenset[str]) -> tuple[set[str], list[set[tuple[int, ...]]]]:
        for stub in stubs:
            stub.asked.clear()
        found = {c.id for some in role.sample(prompts, 2, policy, 0, 0, "0000", have=have) for c in some}
        return found, [{tuple(ids) for ids in stub.prompts} for stub in stubs]

    whole, before = sampled(frozenset())
    assert [len(prompts) for prompts in before] == [3, 2]
    there = frozenset(name for name in whole if "p0" not in name and "p4-1" not in name)
    rest, after = sampled(there)
    assert rest == whole - there
    assert [len(prompts) for prompts in after] == [2, 0]
    assert after[0] < before[0]


def test_what_is_asked_is_what_the_engine_inside_is_given(tiny: Path, stubs: list[Stub]) -> None:
    run(sampler(tiny, stubs[:1]), requests(1, 1))
    [body] = [body for path, body in stubs[0].asked if path == "/v1/completions"]
    assert (body["seed"], body["temperature"], body["top_p"], body["max_tokens"]) == (0, 0.7, 0.9, 8)
    assert body["logprobs"] == 0
    assert body["return_token_ids"]
    assert body["stop_token_ids"] == [END]


def test_weights_are_handed_over_by_path_and_asked_about(tiny: Path, stubs: list[Stub]) -> None:
    engine = sampler(tiny, stubs)
    assert {stub.held for stub in stubs} == {str(tiny)}, "whatever they held before"
    engine.load("/run/policy")
    assert {stub.held for stub in stubs} == {"/run/policy"}
    before = len(stubs[0].asked)
    run(engine, requests(1, 1))
    assert stubs[0].paths()[before:] == ["rlaif_held", "/reset_prefix_cache", "/v1/completions", "rlaif_held"]


def test_a_server_that_was_started_again_samples_nothing(tiny: Path, stubs: list[Stub]) -> None:
    engine = sampler(tiny, stubs)
    stubs[1].held = ""
    with pytest.raises(RlaifError, match="holds the weights of its start"):
        run(engine, requests())
    assert stubs[0].prompts == []
    with pytest.raises(RlaifError, match="holds the weights of its start"):
        engine.logprobs([TokenSequence(prompt_token_ids=(3,), token_ids=(4,))])


@pytest.mark.parametrize(
    ("method", "says", "error"),
    [
        ("rlaif_check", "SomeMethod", "not known to take new weights for this model .SomeMethod."),
        ("rlaif_take", "lm_head", "tiny.*: not all weights reached the sampler .lm_head."),
        ("rlaif_held", "/another", "holds the weights of /another"),
    ],
)
def test_each_process_of_a_server_is_asked(tiny: Path, stubs: list[Stub], method: str, says: str, error: str) -> None:
    stubs[1].second = {method: says}
    with pytest.raises(RlaifError, match=error):
        run(sampler(tiny, stubs), requests())
    assert stubs[0].prompts == []


def test_answers_of_other_weights_are_never_handed_out(tiny: Path, stubs: list[Stub]) -> None:
    """Another run gives a server its policy in the middle of a batch: what is handed out is written, and judged."""
    engine = sampler(tiny, stubs)

    def taken_over() -> None:
        if len(stubs[0].prompts) > 3:
            stubs[0].held = "/another"

    stubs[0].meanwhile = taken_over
    found = []
    with pytest.raises(RlaifError, match=r"holds the weights of /another.*somebody else gives it weights"):
        for some in engine.sample(requests()):
            found += some
    assert {s.token_ids for s in found} <= {(5, 6, 7, END)}
    with pytest.raises(RlaifError, match="holds the weights of /another"):
        engine.logprobs([TokenSequence(prompt_token_ids=(3,), token_ids=(4,))])


def test_it_is_asked_what_it_holds_while_answers_are_owed(
    tiny: Path, stubs: list[Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once all of a batch's answers have had their turn: they move on as they finish."""
    monkeypatch.setattr(server, "MAX_SEQUENCES", 1)
    [stub, _], first_has_moved_on = stubs, threading.Event()
    stub.meanwhile = lambda: len(stub.prompts) == 1 or first_has_moved_on.wait(10)
    answers = sampler(tiny, [stub]).sample(requests())
    assert len(next(answers)) == 1
    assert len(stub.prompts) <= 2
    first_has_moved_on.set()
    assert sum(len(some) for some in answers) == 11


def test_a_cache_of_older_weights_is_not_read(tiny: Path, stubs: list[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps all of it while a request holds some, and says so with status 200."""
    monkeypatch.setattr(server, "POLL_S", 0.01)
    engine = sampler(tiny, stubs)
    stubs[1].busy = 3  # answers that nobody waits for any more
    assert len(run(engine, requests())) == 12
    stubs[1].busy = 10**6
    asked = [len(stub.prompts) for stub in stubs]
    monkeypatch.setattr(server, "FREE_S", 0.05)
    said = f"{stubs[1].url.removesuffix('/v1')}: its prefix cache can't be emptied.*one run at a time"
    with pytest.raises(RlaifError, match=said):
        run(engine, requests())
    with pytest.raises(RlaifError, match=said):
        engine.load("/run/policy")
    assert [len(stub.prompts) for stub in stubs] == asked
    assert {stub.held for stub in stubs} == {str(tiny)}, "whoever samples there keeps its weights"


def test_a_cache_of_older_weights_is_not_read_inside() -> None:
    emptied = [True, False, False]
    llm = SimpleNamespace(reset_prefix_cache=lambda: emptied.pop(0), collective_rpc=lambda *_, **__: [""])
    vllm_compat.reload_weights(llm, "/run/policy")
    with pytest.raises(RlaifError, match="the prefix cache can't be emptied"):
        vllm_compat.reload_weights(llm, "/run/policy")
    with pytest.raises(RlaifError, match="the prefix cache can't be emptied"):
        vllm_compat.forget_prompts(llm)


def test_weights_that_came_in_part_are_not_the_weights_of_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker(TakesWeights):
        def get_model(self) -> Any:
            return SimpleNamespace(modules=list)

    lost = ["", "some weights"]
    monkeypatch.setattr(vllm_compat, "take", lambda modules, reload: lost.pop(0))
    worker = Worker()
    assert worker.rlaif_take("/whole") == ""
    assert worker.rlaif_held() == "/whole"
    assert worker.rlaif_take("/lacks") == "some weights"
    assert worker.rlaif_held() == "/lacks, in part"
    with pytest.raises(RlaifError, match="/lacks: not all weights reached the sampler"):
        vllm_compat.check_taken("/lacks", ["", "some weights"])


def test_servers_of_somebody_else_are_not_asked_to_rest(tiny: Path, stubs: list[Stub]) -> None:
    engine = sampler(tiny, stubs)
    asked = [stub.paths() for stub in stubs]
    engine.rest()
    engine.wake()
    assert [stub.paths() for stub in stubs] == asked
    assert not can_rest(config.Sampling(engine="server", base_url=stubs[0].url))
    assert can_rest(config.Sampling(engine="server", replicas=2))


def test_servers_that_it_started_rest_and_wake(
    tiny: Path, stubs: list[Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    class Started:
        urls = (stubs[0].url,)
        key = KEY

        def __init__(self, role: str, replicas: int) -> None: ...
        def start(self, *_: Any) -> None:
            told.append(_[-2:])

        def ready(self) -> None: ...
        def rest(self) -> None:
            told.append("rest")

        def wake(self) -> None:
            told.append("wake")

    monkeypatch.setattr(server, "Servers", Started)
    engine = make(str(tiny), config.Sampling(engine="server"), logs=tmp_path, rests=True)
    engine.rest()
    engine.wake()
    assert told == [(True, True), "rest", "wake"]


def test_stop_strings_are_looked_for_at_every_token(tiny: Path, stubs: list[Stub]) -> None:
    found = run(sampler(tiny, stubs, stop=["w6"]), requests(1, 1))["p0-0"]
    assert found.token_ids == (5, 6)
    assert (found.text, found.finish_reason, found.logprob) == ("w5 ", "stop", -1.0)


def test_logprobs_are_those_of_the_completion(tiny: Path, stubs: list[Stub]) -> None:
    sequences = [TokenSequence(prompt_token_ids=(3, 4), token_ids=(5, n)) for n in (6, 7, 8)]
    assert sampler(tiny, stubs).logprobs(sequences) == [(-5.0, -6.0), (-5.0, -7.0), (-5.0, -8.0)]


def test_what_cannot_be_used_is_refused(tiny: Path, stubs: list[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    stubs[0].unknown = "AWQLinearMethod"
    with pytest.raises(UserError, match=r"not known to take new weights for this model \(AWQLinearMethod\)"):
        sampler(tiny, stubs)
    monkeypatch.setenv("POLICY_KEY", "wrong")
    with pytest.raises(UserError, match=r"sampling.api_key_env: http.* refuses the key"):
        sampler(tiny, stubs)
    monkeypatch.delenv("POLICY_KEY")
    with pytest.raises(UserError, match="POLICY_KEY is not set"):
        sampler(tiny, stubs)
    stubs[0].server.shutdown()
    stubs[0].server.server_close()
    monkeypatch.setenv("POLICY_KEY", KEY)
    with pytest.raises(RlaifError, match="no answer from"):
        sampler(tiny, stubs[:1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"replicas": 2}, "sampling.replicas: of `engine: server`"),
        ({"base_url": ["http://127.0.0.1:1"]}, "sampling.base_url: of `engine: server`"),
        ({"engine": "server", "base_url": ["http://127.0.0.1:1"], "replicas": 2}, "with base_url it starts none"),
    ],
)
def test_settings_of_servers_alone(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_job({"constitution": "rules", "sampling": settings}, "test")
