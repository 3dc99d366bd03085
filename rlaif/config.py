"""The job: one typed tree, read from sparse YAML, resolved with its defaults, refused when unknown.

In: a job file and `--set a.b=c` overrides. Out: a `Job`. Every field has a docstring; docs/job.md
is generated from them.
"""

from __future__ import annotations

import copy
import datetime
import difflib
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeGuard, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from rlaif.errors import UserError
from rlaif.records import CodeName, OnChange

_T = TypeVar("_T")
Precision = Literal["auto", "bf16", "fp32"]
"""`auto`: bf16 on hardware that multiplies it, else fp32."""


@dataclass(frozen=True)
class MayChange:
    """Marks a setting that a run may go on with changed (`--allow-change`), since what was decided so far stays
    comparable; what is below it, too. Of a free mapping, those keys alone, where some are named."""

    keys: tuple[str, ...] = ()
    lists: bool = False
    """Only a list, for another list."""


Adjustable = Annotated[_T, MayChange()]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are an error, docstrings under fields are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _no_reserved_template_args(args: dict[str, Any]) -> dict[str, Any]:
    ours = ("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "truncation",
            "max_length", "padding", "return_tensors", "return_dict")  # fmt: skip
    if set_here := [name for name in ours if name in args]:
        raise ValueError(f"`{set_here[0]}` is no argument of a chat template that a job may set; remove it")
    return args


class Policy(Section):
    """The model in training."""

    model: str = "embedded:smollm2-135m-instruct"
    """A hub id, a local folder, or `embedded:smollm2-135m-instruct`."""
    adapter: str | None = None
    """A LoRA of peft's, by folder or hub id: the untrained policy is `model` with it merged in. With `learner.lora` a
    new adapter trains on top."""
    system_prompt: str | None = None
    """Put before every prompt that has no system message of its own."""
    chat_template_args: dict[str, Any] = Field(default_factory=dict)
    """Given to the chat template as they are (`{enable_thinking: false}`, `{reasoning_effort: low}`)."""
    thinking: Literal["strip", "judge"] = "strip"
    """What a judge sees of an answer that begins with a thought (`<think>...</think>` and its like): `strip` the answer
    alone, `judge` all of it. Stripped, a thought that wasn't finished is an empty answer. What trains are the sampled
    tokens, thought included."""

    _template_args = field_validator("chat_template_args")(_no_reserved_template_args)


def _check_addresses(urls: Sequence[str], expected: str) -> None:
    """Whether addresses can be taken apart, and each is there once.

    Raises:
        ValueError: not so.
    """
    try:
        for url in urls:
            _ = urlsplit(url).port  # raises at a port that is none, as urlsplit at an unfinished [IPv6]
    except ValueError as e:
        raise ValueError(f"no address ({e}); expected {expected}") from e
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ValueError("a server is named twice; name it once")


class Columns(Section):
    """What a prompt set's own columns are called. One inside another is named by its path (`question.text`,
    `turns.0`)."""

    prompt: str | None = None
    """The column with the prompt: text, or a chat."""
    system: str | None = None
    """The column with the system prompt; an empty cell: none."""
    id: str | None = None
    """The column with the id."""
    category: str | None = None
    """The column with the category."""

    @property
    def named(self) -> dict[str, str]:
        """The columns that a job names."""
        return {name: column for name, column in self if column is not None}


class Prompts(Section):
    """Where prompts come from."""

    train: str = "prompts/everyday.jsonl"
    """JSONL, JSON, CSV or Parquet file (or one with `.gz`), `datasets:NAME[:SPLIT]` or `datasets:NAME:CONFIG:SPLIT`. A
    row has `prompt` (text or chat), `messages` or `conversations` (chat), or `chosen` and `rejected`; answers at a
    chat's end are left out."""
    held_out: str = "prompts/everyday_held_out.jsonl"
    """The same, for evaluation; a prompt found in both never trains."""
    columns: Columns = Columns()
    """Names of the columns, where they are others (`{prompt: question, id: question_id}`); in `held_out` where its rows
    have the prompt's."""
    per_iteration: int = Field(24, ge=1)
    """Prompts an iteration takes, in a seeded order that starts again when it runs out."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """When a prompt, as the policy's chat template renders it, leaves no room for an answer (`sampling.max_tokens`)
    within `sampling.max_model_len`: stop before anything is sampled and name it, or leave it out and say so."""


class Sampling(Section):
    """How the policy answers."""

    engine: Literal["vllm", "transformers", "server"] = "vllm"
    """`vllm`, or `transformers` where vLLM isn't installed; `server`: vLLM's servers
    ([scale.md](scale.md#sampling-from-servers)); or `module:Class`, a class of yours
    ([extend.md](extend.md)), whose own settings stand beside these."""
    completions_per_prompt: int = Field(4, ge=2)
    """Completions sampled for each prompt."""
    max_tokens: int = Field(64, ge=1)
    """Length limit of a completion, in tokens."""
    temperature: float = Field(0.8, gt=0)
    """Sampling temperature."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus: the smallest set of tokens with this much probability."""
    stop: list[StrictStr | StrictInt] = Field(default_factory=list)
    """What else ends an answer, beside the tokens that end the model's turn: strings, or token ids. The answer's text
    stops before it; the tokens that were sampled, up to the one that completes it, train."""
    max_model_len: Adjustable[int] = Field(1024, ge=32)
    """Longest prompt plus completion, in tokens."""
    precision: Adjustable[Precision] = "auto"
    """What the policy samples in. `auto`: bf16 on hardware that multiplies it, else fp32. An update's weights are
    exported in it, bf16 by stochastic rounding."""
    kv_cache_gib: Adjustable[float] = Field(1.0, gt=0)
    """Memory for vLLM's KV cache on the CPU, GiB."""
    gpu_memory_utilization: Adjustable[float] = Field(0.4, gt=0, le=1)
    """Share of a GPU that vLLM may use (untried here). With `device: shared` 0.8 by default."""
    enforce_eager: Adjustable[bool] = False
    """vLLM on a GPU without compiled graphs: starts in seconds, samples slower (untried here; always on a CPU)."""
    tensor_parallel_size: Adjustable[int] = Field(1, ge=1)
    """GPUs that one sampler spans (two processes on a CPU are tested, GPUs untried)."""

    replicas: Adjustable[int] = Field(1, ge=1)
    """With `engine: server`: so many servers are started, each with `tensor_parallel_size` GPUs."""
    base_url: Adjustable[str | list[str] | None] = None
    """With `engine: server`: one or more servers that you started, instead. They must read the run's folder."""
    api_key_env: Adjustable[str | None] = None
    """The environment variable that holds the key of `base_url`'s servers; null for servers without one."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Servers that somebody else started."""
        return (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url or ())

    @property
    def spans(self) -> int:
        """GPUs that it takes altogether of the loop's machine; none where its servers are somebody else's."""
        return 0 if self.addresses else self.tensor_parallel_size * self.replicas

    @field_validator("base_url")
    @classmethod
    def _can_be_reached(cls, given: str | list[str] | None) -> str | list[str] | None:
        if given is None:
            return given
        urls = given if isinstance(given, list) else [given]
        if not urls:
            raise ValueError("expected http(s)://HOST[:PORT], or a list of such")
        _check_addresses(urls, "http(s)://HOST[:PORT]")
        return given

    @field_validator("stop")
    @classmethod
    def _can_stop(cls, stop: list[str | int]) -> list[str | int]:
        if any(s == "" or (isinstance(s, int) and s < 0) for s in stop):
            raise ValueError('a stop is a string that isn\'t empty or a token id from 0, for example ["\\n\\n", 13]')
        return stop

    @model_validator(mode="after")
    def _servers_alone(self) -> Sampling:
        for key, default in (("replicas", 1), ("base_url", None), ("api_key_env", None)):
            if self.engine in ("vllm", "transformers") and getattr(self, key) != default:
                raise ValueError(f"sampling.{key}: of `engine: server`; set that, or leave {key} out")
        if self.base_url and self.replicas > 1:
            raise ValueError("sampling.replicas: how many servers the run starts; with base_url it starts none")
        return self

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> Sampling:
        if self.max_tokens >= self.max_model_len:
            raise ValueError(
                f"sampling.max_model_len: {self.max_model_len} tokens leave no room for a prompt before an answer of "
                f"max_tokens={self.max_tokens}; give a larger max_model_len or a smaller max_tokens"
            )
        return self


class OwnSampling(Sampling):
    """Sampling by a class of the user's own. Its `Settings` are a subclass of this one; until they are checked, keys
    that they add are kept as they are."""

    model_config = ConfigDict(extra="allow")

    engine: CodeName  # type: ignore[assignment]
    """The class, as `module:Class`."""


class Source(Section):
    """Pairs that exist, in place of fresh ones ([offline.md](offline.md)): nothing is sampled to train on. A name
    alone is its `data`."""

    run: str | None = None
    """A run directory, whose stored pairs train: iteration k takes those of the k-th of its iterations, starting over
    when there are fewer."""
    iterations: str | int | None = None
    """Which of that run's iterations, from 0: `0-5`, or one; all that are judged when absent."""
    data: str | None = None
    """A preference data set: a JSONL, JSON, CSV or Parquet file (or one with `.gz`), or `datasets:NAME` as in
    `prompts.train`. A row has a prompt, `chosen` and `rejected`, text or chat. Each iteration takes the next
    `prompts.per_iteration` rows, in a seeded order that starts again when it runs out."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of the data's columns, where they are others: `{prompt: question, first: a, second: b, label: winner}`; the
    keys are those of `rlaif judge bench --map`."""
    rejudge: bool = False
    """Judge the pairs under this job's text. Else their labels are as stored: a run's votes, which this job's filters
    decide on, or a data set's own."""

    @model_validator(mode="before")
    @classmethod
    def _data_alone(cls, tree: Any) -> Any:
        return {"data": tree} if isinstance(tree, str) else tree

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.run is None) == (self.data is None):
            raise ValueError("source: give exactly one of `run` and `data`")
        if self.data is not None and self.iterations is not None:
            raise ValueError("source.iterations: of a `run`; rows of `data` are taken prompts.per_iteration at a time")
        if self.run is not None and self.columns:
            raise ValueError("source.columns: of `data`; a run's files have columns of their own")
        if self.iterations is not None and not _RANGE.fullmatch(str(self.iterations)):
            raise ValueError(f"source.iterations: found {self.iterations!r}, expected one or a range, for example 0-5")
        if self.iterations is not None and not self.wanted:
            raise ValueError(f"source.iterations: {self.iterations} holds none; the first comes first, as in 0-5")
        return self

    def __str__(self) -> str:
        """In words, with iterations counted from 1, as commands do."""
        wanted = self.wanted
        which = "all iterations" if wanted is None else f"iterations {wanted[0] + 1} to {wanted[-1] + 1}"
        which = f"iteration {wanted[0] + 1}" if wanted is not None and len(wanted) == 1 else which
        what = f"pairs of {self.data}" if self.run is None else f"pairs of {self.run}, {which}"
        return f"{what}, {'judged again' if self.rejudge else 'labels as stored'}"

    @property
    def wanted(self) -> range | None:
        """The iterations that the job names; None for all."""
        if self.iterations is None:
            return None
        first, _, last = str(self.iterations).partition("-")
        return range(int(first), int(last or first) + 1)


_RANGE = re.compile(r"\d+(-\d+)?")


class Pairing(Section):
    """Which completions are compared."""

    method: Literal["random", "all", "best_worst"] = "best_worst"
    """`best_worst` needs a judge that scores single completions; its selecting voices never decide. Other judges:
    `random` by default."""
    max_pairs_per_prompt: int = Field(1, ge=1)
    """At most this many pairs a prompt."""


class Juror(Section):
    """One model behind an OpenAI-compatible server (`/v1/chat/completions`), or several that serve the same one."""

    model: str
    """The name that the server knows."""
    base_url: Annotated[str | list[str], MayChange(lists=True)] = "https://api.openai.com/v1"
    """The server, up to and including `/v1`; or a list of servers with the same model, which share the requests
    ([judges.md](judges.md#one-model-on-several-servers))."""
    api_key_env: Adjustable[str | None] = "OPENAI_API_KEY"
    """The environment variable that holds the key; null for a server without one. Keys are never written or logged."""
    temperature: float = Field(0.0, ge=0)
    """Of the judge's replies."""
    samples: int = Field(1, ge=1)
    """Replies to each question; more than one needs a temperature above 0, or they would be one voice."""
    max_tokens: int | None = Field(None, ge=1)
    """Length limit of a reply; the template's own when absent. A reasoning model needs room to think."""
    logprobs: bool = True
    """Ask for the log-probabilities of the label tokens, where the template's verdict is one letter."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Sent with every request as it is (`{reasoning_effort: low}`, `{chat_template_kwargs: {...}}`)."""
    system_role: Literal["auto", "merged"] = "auto"
    """Where the system message goes: `auto` sends it as one, and puts it before the user's for a server that refuses
    it; `merged` always does."""
    headers: Adjustable[dict[str, str]] = Field(default_factory=dict)
    """More headers: name, and the environment variable that holds the value (`{api-key: AZURE_OPENAI_API_KEY}`).
    Values are never written or logged."""
    query: Adjustable[dict[str, str]] = Field(default_factory=dict)
    """Query parameters of every request (`{api-version: "2024-10-21"}`); no secrets."""
    ca_file: Adjustable[str | None] = None
    """PEM file of certificates to trust beside the system's, for a server with one of your own."""

    @field_validator("base_url", mode="before")
    @classmethod
    def _can_be_taken_apart(cls, given: Any) -> Any:
        urls = given if isinstance(given, list) else [given]
        if not urls or not all(isinstance(url, str) for url in urls):
            raise ValueError("expected http(s)://HOST[:PORT]/v1, or a list of such, as text; put them in quotes")
        _check_addresses(urls, "http(s)://HOST[:PORT]/v1")
        return given

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its server, or all of them."""
        return (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url)

    @property
    def request(self) -> dict[str, Any]:
        """What is asked of whom: everything but the key, and how often."""
        how = ("api_key_env", "samples", "ca_file")
        asked = {name: getattr(self, name) for name in Juror.model_fields if name not in how}
        return asked | {"base_url": sorted(url.rstrip("/") for url in self.addresses)}


class Budget(Section):
    """What a judge may cost, over the whole run. At the limit the run stops, and can go on with a larger one."""

    calls: int | None = Field(None, ge=1)
    """Requests that were answered; a reply from the cache costs nothing."""
    tokens: int | None = Field(None, ge=1)
    """Prompt and completion tokens."""
    money: float | None = Field(None, gt=0)
    """By `judge.prices`, in their currency."""


class Price(Section):
    """What a model's tokens cost, per million."""

    prompt: float = Field(ge=0)
    """A million prompt tokens."""
    completion: float = Field(ge=0)
    """A million completion tokens."""
    reasoning: float | None = Field(None, ge=0)
    """A million tokens of thought; `completion` when absent."""
    cached: float | None = Field(None, ge=0)
    """A million prompt tokens that the server had cached; `prompt` when absent."""


class Judge(Section):
    """Who compares. What all kinds of judge share; each has settings of its own, and refuses those of another."""

    kind: str
    """`likelihood` (a frozen model in a worker), `chat` (a server), or `module:Class`, a class of yours
    ([extend.md](extend.md)) with settings of its own. `likelihood` when absent."""
    model: str
    """What judges, as its kind says."""
    precision: Adjustable[Precision] = "auto"
    """What frozen models compute in: a likelihood judge, and, whoever judges, who measures how sane answers are. `auto`
    as in `sampling.precision`."""

    asked_as: ClassVar[tuple[str, ...]] = ()
    """Settings that change what it is asked, or how it answers, and that ballots name by a digest alone."""

    @property
    def cut_off_counts(self) -> bool:
        """Whether it matters to this judge that an answer was cut off, and not only how it reads."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _of_older_runs(cls, tree: Any) -> Any:
        """Older runs have the keys of all kinds in run.json, and `votes`, which no run could use: those at their
        defaults said nothing."""
        if not isinstance(tree, dict):
            return tree
        silent = {"votes": None} | _foreign(cls) if cls in JUDGES.values() else {}
        return {k: v for k, v in tree.items() if k not in silent or v != silent[k]}

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """A job with what follows from a judge of this kind where the job doesn't say it. `tree` isn't checked yet."""
        return tree

    def check_in(self, job: Job) -> None:
        """Raises a ValueError where the rest of the job doesn't fit this judge."""
        if job.replay.rejudge.tokens is not None or job.replay.rejudge.money is not None:
            raise ValueError(f"replay.rejudge: `{self.kind}` counts no tokens, and has no price; limit calls")


class LikelihoodSettings(Judge):
    """A frozen model in a worker compares how likely an answer is under `prefer` and under `avoid`."""

    kind: Literal["likelihood"] = "likelihood"
    """A frozen model in a worker."""
    model: str = "embedded:smollm2-135m-instruct"
    """The frozen model that judges: a hub id, a local folder, or `embedded:smollm2-135m-instruct`."""
    chat_template_args: dict[str, Any] = Field(default_factory=dict)
    """Given to its chat template; the policy's when absent and both are one model."""
    batch_tokens: Adjustable[int] = Field(1024, ge=64)
    """Tokens of one forward pass."""
    score_temperature: float = Field(4.0, gt=0)
    """p(first) = sigmoid(score difference / this). In nats; larger is less sure."""
    missing_eos_penalty: float = Field(20.0, ge=0)
    """Taken from the score of a completion that the length limit cut off, in nats; as in TRL, for half an answer."""
    relevance_tolerance: float = Field(0.3, ge=0)
    """The guard votes against a side that is less relevant than the other by more than this (nat a token)."""
    fluency_tolerance: float = Field(0.5, ge=0)
    """The guard votes against a side that the frozen base finds less likely by more than this (nat a token)."""
    cache: Adjustable[str | None] = "~/.cache/rlaif/replies"
    """Folder of stored likelihoods (`rlaif judge`, `rlaif constitution diff --run`); null for none."""

    asked_as: ClassVar[tuple[str, ...]] = ("missing_eos_penalty", "chat_template_args")

    @property
    def cut_off_counts(self) -> bool:
        """It takes the penalty from such an answer's score."""
        return self.missing_eos_penalty > 0

    _template_args = field_validator("chat_template_args")(_no_reserved_template_args)

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """A judge that is the policy's own model reads answers as the policy was asked for them."""
        judge, policy = tree.get("judge") or {}, tree.get("policy")
        if not isinstance(judge, dict) or not isinstance(policy, dict):
            return tree
        if not policy.get("chat_template_args") or "chat_template_args" in judge:
            return tree
        asked = policy.get("model", Policy.model_fields["model"].default)
        if judge.get("model", cls.model_fields["model"].default) != asked:
            return tree
        return tree | {"judge": judge | {"chat_template_args": policy["chat_template_args"]}}


class Serve(Section):
    """vLLM's servers, which the run starts on this machine and stops ([judges.md](judges.md#servers-that-we-start))."""

    model: str
    """What they serve: a hub id, a local folder, or `embedded:smollm2-135m-instruct`."""
    replicas: Adjustable[int] = Field(1, ge=1)
    """So many servers, which share the requests."""
    tensor_parallel_size: Adjustable[int] = Field(1, ge=1)
    """GPUs that each of them spans (untried here)."""
    args: Annotated[
        dict[str, Any],
        MayChange(("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens")),
    ] = Field(default_factory=dict)
    """Further options of vLLM's server as they are (`{max_model_len: 8192, quantization: fp8}`); no secrets."""
    start_timeout_s: Adjustable[float] = Field(1800.0, gt=0)
    """Longest wait until a server answers."""

    @field_validator("args")
    @classmethod
    def _not_ours(cls, args: dict[str, Any]) -> dict[str, Any]:
        named = {key.replace("-", "_") for key in args}
        if ours := sorted(named & {"model", "served_model_name", "tensor_parallel_size"}):
            raise ValueError(f"`{ours[0]}` follows from the other settings of the judge; remove it")
        if ours := sorted(named & {"host", "port", "uds", "root_path", "api_key", "ssl_keyfile", "ssl_certfile"}):
            raise ValueError(f"`{ours[0]}`: the run chooses how its servers are reached; remove it")
        if "hf_token" in named:
            raise ValueError("`hf_token` would be written into the run; export HF_TOKEN, and remove it")
        return args


SHARED_UTILIZATION = 0.8
"""Of a GPU's memory, with `device: shared`: the processes that rest keep some for themselves."""
SERVED = ["http://127.0.0.1/v1"]
"""The address of a server that we start, as long as nobody knows its port; a list, so that no ballot names it."""
_NO_SERVERS_NAME = "judge.model: a chat judge needs the name that its server knows, for example gpt-4.1-mini"


class ChatSettings(Judge, Juror):
    """Any OpenAI-compatible server answers a question rendered from a template."""

    kind: Literal["chat"] = "chat"
    """A server."""
    model: str
    """The name that the server knows; `serve.model` when absent."""
    serve: Serve | None = None
    """Start the servers for the run, instead of naming them in `base_url`."""
    templates: list[str] = Field(default_factory=list)
    """Judge templates (`prompts/judge/<name>.jinja`), each a voice; the constitution's own when empty."""
    evaluate_templates: list[str] = Field(default_factory=list)
    """Templates for held-out evaluation, so that a policy isn't measured with the question that trained it. When empty,
    for each template NAME that decides NAME_evaluate; NAME itself where there is no such file."""
    templates_dir: str = "prompts/judge"
    """Folder of the templates."""
    votes_per_principle: bool = False
    """One question for each principle instead of one for all; a guard's question can then veto."""
    jury: list[Juror] = Field(default_factory=list)
    """More judges beside this one; each is a voice."""
    clamp: tuple[float, float] | None = None
    """Bounds of p(first) for templates that reason first, as in Constitutional AI: `[0.4, 0.6]`."""
    concurrency: Adjustable[int] = Field(16, ge=1)
    """Requests under way at once, all judges and their servers together."""
    timeout_s: Adjustable[float] = Field(120.0, gt=0)
    """Longest wait for one reply."""
    max_retries: Adjustable[int] = Field(5, ge=0)
    """Further attempts after a 429, a 5xx, a timeout or a cut connection, with jittered exponential waits. With several
    servers, an attempt is over when none is left to ask at once."""
    reask: Adjustable[int] = Field(1, ge=0)
    """How often a question is asked again whose reply is empty or unreadable; each costs a call."""
    requests_per_minute: Adjustable[int | None] = Field(None, ge=1)
    """Limit of the server; of each, where there are several."""
    tokens_per_minute: Adjustable[int | None] = Field(None, ge=1)
    """Limit of the server, prompt and completion together; of each, where there are several."""
    breaker_failures: Adjustable[int] = Field(20, ge=1)
    """After this many in a row the judge is down, and the run pauses. Counted are ballots that failed after all retries
    or were left without a word, and pairs that were rejected as a short question is too."""
    budget: Adjustable[Budget] = Budget()
    prices: Adjustable[dict[str, Price]] = Field(default_factory=dict)
    """Price per model name, for `budget.money`."""
    cache: Adjustable[str | None] = "~/.cache/rlaif/replies"
    """Folder of stored replies, shared between runs; null for none."""
    fingerprint: Adjustable[bool] = True
    """Stored replies count only for the model that gave them: what the server's list of models says of it (asked at the
    start), and its `system_fingerprint` where it gives one. And several servers must say the same of it."""
    early_stop: bool = False
    """Cast ballots in rounds, and leave out a pair whose decision can't change any more. Never with a calibrated
    filter."""

    def at(self, urls: Sequence[str], api_key_env: str) -> ChatSettings:
        """This judge where its servers are (`serve`)."""
        return self.model_copy(update={"base_url": list(urls), "api_key_env": api_key_env})

    def cached_as(self, url: str) -> str:
        """What stored replies call a server. One that was started for a run has another port in the next one."""
        return SERVED[0] if self.serve and url in self.addresses else url

    @property
    def jurors(self) -> tuple[Juror, ...]:
        """All judges behind servers: this one, then the jury."""
        mine = {name: getattr(self, name) for name in Juror.model_fields}
        return (Juror.model_validate(mine), *self.jury)

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """It compares two answers and scores none, and its winners may be cut off."""
        return _paired_at_random(_without_cut_off_winners(tree))

    def check_in(self, job: Job) -> None:
        """Raises a ValueError where the rest of the job doesn't fit this judge."""
        if job.pairing.method == "best_worst":
            raise ValueError(
                f"pairing.method: `best_worst` needs a judge that scores single answers, `{self.kind}` compares "
                "two; set random or all"
            )
        if job.cluster and job.cluster.judge:
            raise ValueError(
                f"cluster.judge: a `{self.kind}` judge computes nothing, it waits for its servers; raise "
                "judge.concurrency, and put more servers behind judge.base_url"
            )
        if self.early_stop and job.filters.calibration:
            raise ValueError("judge.early_stop: never with filters.calibration, which counts on every vote; drop one")
        unpriced = [juror.model for juror in self.jurors if juror.model not in self.prices]
        if job.replay.rejudge.money is not None and unpriced:
            raise ValueError(f"judge.prices: no price for `{unpriced[0]}`, and replay.rejudge.money needs one")
        if self.early_stop and job.filters.review:
            raise ValueError("judge.early_stop: never with filters.review, which compares pairs by all votes; drop one")

    @model_validator(mode="before")
    @classmethod
    def _a_servers_own(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("chat_template_args"):
            raise ValueError(
                "judge.chat_template_args: a server renders its own template; set judge.extra_body: "
                "{chat_template_kwargs: {...}}, if it takes that"
            )
        return tree

    @model_validator(mode="before")
    @classmethod
    def _served(cls, tree: Any) -> Any:
        """What follows from servers that we start."""
        if not isinstance(tree, dict) or not (serve := tree.get("serve")):
            return tree
        ours: dict[str, Any] = {"base_url": SERVED, "api_key_env": None}
        for key in ("base_url", "api_key_env", "headers", "query", "ca_file"):
            if tree.get(key) and tree[key] != ours.get(key):
                raise ValueError(
                    f"judge.{key}: judge.serve starts the servers and knows how to reach them; leave it out"
                )
        name = serve.get("model") if isinstance(serve, dict) else getattr(serve, "model", None)
        return ({"model": name} if name else {}) | tree | ours

    @model_validator(mode="after")
    def _complete(self) -> ChatSettings:
        if self.model.startswith("embedded:") and self.serve is None:
            raise ValueError(_NO_SERVERS_NAME)
        if self.clamp is not None and not 0 <= self.clamp[0] < self.clamp[1] <= 1:
            raise ValueError(f"judge.clamp: {list(self.clamp)} are no bounds of a probability; for example [0.4, 0.6]")
        for juror in self.jurors:
            if juror.samples > 1 and juror.temperature == 0:
                raise ValueError("judge.samples: equal requests at temperature 0 are one voice; raise the temperature")
        for key, names in (("templates", self.templates), ("evaluate_templates", self.evaluate_templates)):
            if double := [n for n in names if names.count(n) > 1]:
                raise ValueError(f"judge.{key}: `{double[0]}` is named twice, and would be one voice; name it once")
        asked = [j.request for j in self.jurors if j.temperature == 0]
        if twice := [r for r in asked if asked.count(r) > 1]:
            raise ValueError(
                f"judge.jury: two judges send `{twice[0]['model']}` the same requests at temperature 0, and would be "
                "one voice; take one out, or let them differ"
            )
        return self


class OwnJudge(Judge):
    """A judge of the user's own. Its `Settings` are a subclass of this one; until they are checked, keys that they add
    are kept as they are."""

    model_config = ConfigDict(extra="allow")

    kind: CodeName
    """The class, as `module:Class`."""
    model: str = ""
    """For the class to read, and what tables call the judge; the class's name when absent."""

    @model_validator(mode="after")
    def _named(self) -> OwnJudge:
        if not self.model:  # it doesn't count as given: the class's `Settings` may have a default
            self.__dict__["model"] = self.kind.rpartition(":")[2]
        return self

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """Whether it scores single answers, and what it makes of one that was cut off, nobody knows yet."""
        return _paired_at_random(_without_cut_off_winners(tree))


JUDGES: dict[str, type[Judge]] = {"likelihood": LikelihoodSettings, "chat": ChatSettings}
"""The settings of each kind of judge that rlaif has."""


def _judge_class(judge: Any) -> type[Judge] | None:
    """The settings' class of a judge that isn't checked yet; None where it names no kind that there is."""
    kind = judge.get("kind", "likelihood") if isinstance(judge, dict) else getattr(judge, "kind", "likelihood")
    return JUDGES.get(str(kind), OwnJudge if isinstance(kind, str) and ":" in kind else None)


def _tag_of_judge(judge: Any) -> str:
    found = _judge_class(judge)
    return _tag_of(found) if found else "[unknown]"


def _tag_of(section: type[BaseModel]) -> str:
    return f"[{section.__name__}]"


def _foreign(cls: type[Judge]) -> dict[str, Any]:
    """The keys that other kinds of judge have and this one lacks, with their defaults as run.json has them."""
    out: dict[str, Any] = {}
    for other in JUDGES.values() if cls in JUDGES.values() else ():  # of a class of the user's own, nobody knows
        for name, field in other.model_fields.items():
            if name not in cls.model_fields:
                default = field.get_default(call_default_factory=True)
                out[name] = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
    return out


def _paired_at_random(tree: dict[str, Any]) -> dict[str, Any]:
    """A job's default where nobody scores single answers."""
    pairing = tree.get("pairing")
    if pairing is None:
        return tree | {"pairing": {"method": "random"}}
    if isinstance(pairing, dict) and "method" not in pairing:
        return tree | {"pairing": pairing | {"method": "random"}}
    return tree


def _without_cut_off_winners(tree: dict[str, Any]) -> dict[str, Any]:
    """A job's default where the judge takes no penalty from such an answer."""
    filters = tree.get("filters", {})
    if isinstance(filters, dict) and "cut_off" not in filters:
        return tree | {"filters": filters | {"cut_off": "drop"}}
    return tree


AnyJudge = Annotated[
    Annotated[LikelihoodSettings, Tag("[LikelihoodSettings]")]
    | Annotated[ChatSettings, Tag("[ChatSettings]")]
    | Annotated[OwnJudge, Tag("[OwnJudge]")],
    Discriminator(_tag_of_judge),
]


class Review(Section):
    """Which pairs a person is asked about, instead of being kept or dropped. They wait in the run for a label."""

    below_agreement: float | None = Field(None, ge=0, le=1)
    """Every pair whose votes agree less than this; null for none."""
    top_uncertain: int = Field(0, ge=0)
    """Of the rest, this many an iteration: lowest agreement first, then p(first) nearest to 0.5. Kept pairs too, where
    no other is less certain; with a calibration only pairs that it doesn't keep."""

    @model_validator(mode="after")
    def _asks_something(self) -> Review:
        if self.below_agreement is None and not self.top_uncertain:
            raise ValueError("filters.review: give below_agreement, top_uncertain or both; leave it out for no review")
        return self


class Filters(Section):
    """Which labels are trusted."""

    aggregate: Literal["mean", "majority", "dawid_skene"] = "mean"
    """How votes become a verdict: `mean` of p(first), `majority` of outcomes, `dawid_skene` for a jury (jurors are
    weighted by how they agree, fitted once an iteration; with fewer than 20 pairs all weigh the same). A calibration
    learns the weights from its labels instead."""
    calibration: str | None = None
    """File of `rlaif judge calibrate`: pairs under its threshold are dropped (`uncalibrated`)."""
    uncalibrated: Literal["drop", "stop"] = "stop"
    """When judge, template, constitution or how they are asked (system prompt, ...) are not what was calibrated: drop
    every such pair, or stop the run. Pairs with one cut-off answer, where it counts for the judge and no labelled pair
    had one, are dropped either way."""
    min_votes: int = Field(1, ge=1)
    """Valid votes a pair needs (`too_few_votes`)."""
    max_abstention_share: float = Field(0.5, ge=0, le=1)
    """Abstentions over all votes, at most (`abstained`)."""
    min_agreement: float = Field(1.0, ge=0, le=1)
    """Weighted share of valid votes that name the winner, at least (`low_agreement`)."""
    min_margin: float = Field(0.0, ge=0, le=0.5)
    """|p(first) - 0.5|, at least (`low_margin`)."""
    cut_off: Literal["keep", "drop"] = "keep"
    """A pair whose winner the length limit cut off, while the loser ended by itself (`cut_off`). In a job `drop` by
    default but with a likelihood judge, which has `judge.missing_eos_penalty`."""
    rules: tuple[CodeName, ...] = ()
    """Rules of yours beside the others, each `module:function` ([extend.md](extend.md)): a pair that one has something
    to say against is dropped, with the rule's name as the reason."""
    guards: bool = True
    """A guard's vote against the winner drops the pair (`guard`)."""
    min_kept_pairs: int = Field(4, ge=1)
    """Fewer kept pairs than this, human labels included: no update in this iteration, recorded as `skipped_update`."""
    review: Review | None = None
    """Pairs to ask a person about; absent: no review."""


def _tag_by(key: str, ours: type[BaseModel], own: type[BaseModel]) -> Callable[[Any], str]:
    """Which of two sections a tree is: that of rlaif, or the one with code of the user's own under `key`."""

    def tag(tree: Any) -> str:
        named = tree.get(key) if isinstance(tree, dict) else getattr(tree, key, None)
        return _tag_of(own if isinstance(named, str) and ":" in named else ours)

    return tag


class Lora(Section):
    """Low-rank adapters instead of full weights; merged before every reload of the sampler."""

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: int = Field(32, ge=1)
    """Scale numerator."""
    target_modules: str | list[str] = "all-linear"
    """As in peft."""


class Learner(Section):
    """How preferences become an update."""

    kind: Literal["dpo", "online_dpo"] = "dpo"
    """TRL's `DPOTrainer`, or a thin adapter on its experimental `OnlineDPOTrainer`; or `module:Class`, a class of yours
    ([extend.md](extend.md)), whose own settings stand beside these."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference policy."""
    loss_type: str | list[str] = "sigmoid"
    """As in TRL: one, or with `kind: dpo` several (`args.loss_weights`)."""
    learning_rate: Adjustable[float] = Field(1e-5, gt=0)
    """Adam's learning rate after the warm-up, constant by default (`args.lr_scheduler_type`). Found on 135M parameters;
    the shipped jobs take half as much again (docs/experiments.md). Untried: a third of it for 1B, a tenth for 7B, ten
    times it for LoRA. Watch `monitors.kl`."""
    warmup_steps: int = Field(4, ge=0)
    """Optimizer steps over which the rate rises from 0, once a run: Adam's first steps are as large as its later ones,
    and know less."""
    batch_size: int = Field(4, ge=1)
    """Pairs in one optimizer step."""
    epochs: int = Field(1, ge=1)
    """Passes over the kept pairs of an iteration."""
    max_grad_norm: Adjustable[float] = Field(1.0, gt=0)
    """Gradient clipping."""
    reference: Literal["base", "previous", "at_change"] = "base"
    """What `beta` pulls to: the untrained policy, the policy before this iteration, or (`at_change`) the one that the
    text in force began with, which is the untrained one until the text changes."""
    max_kl: Adjustable[float | None] = Field(None, gt=0)
    """An update stops once its policy is further than this from the one that began the iteration: KL, nats a token, on
    the rows of the step just taken ([forgetting.md](forgetting.md)). Absent: all steps are taken."""
    precision: Adjustable[Precision] = "auto"
    """Autocast of the update; master weights and Adam state are fp32 in both. `auto` as in `sampling.precision`."""
    lora: Lora | None = None
    """Train adapters; full weights when absent."""
    accelerate: Adjustable[str | None] = None
    """A config file of accelerate (`accelerate config` writes one): the learner is as many processes as it says, by DDP
    or FSDP2 ([scale-ray.md](scale-ray.md#the-learner-in-several-processes)). They have to divide `batch_size`, which is
    shared out to them. Absent: one process, or as many as `cluster.learner` says, by DDP."""
    args: Annotated[
        dict[str, Any], MayChange(("per_device_train_batch_size", "gradient_checkpointing", "report_to", "run_name"))
    ] = Field(default_factory=dict)
    """Passed to TRL's config as they are (`report_to: wandb`, `weight_decay: 0.01`, ...); trackers: view.md."""


class OwnLearner(Learner):
    """Learning by a class of the user's own; as `OwnSampling`."""

    model_config = ConfigDict(extra="allow")

    kind: CodeName  # type: ignore[assignment]
    """The class, as `module:Class`."""


class Rejudge(Section):
    """What judging old pairs again may cost in one iteration; what is left over waits for the next one. Without any of
    these all of them are judged at once."""

    calls: int | None = Field(None, ge=1)
    """Ballots. Pairs are taken whole."""
    tokens: int | None = Field(None, ge=1)
    """Prompt and completion tokens; what a pair will cost is guessed by those before it."""
    money: float | None = Field(None, gt=0)
    """By `judge.prices`, in their currency; guessed like the tokens."""


class Replay(Section):
    """Old preferences against forgetting."""

    share: float = Field(0.0, ge=0, le=0.9)
    """Share of an update that may be replayed pairs, rounded down to whole ones; they come after the fresh ones."""
    max_age: int = Field(4, ge=1)
    """Oldest iteration that may be replayed, counted back."""
    on_change: Adjustable[OnChange] = "expire"
    """What a new text does to pairs that were judged under an old one ([change.md](change.md)). `expire`: a pair stays
    if the new text asks again all that was asked about it. `rejudge`: what the new text asks and nobody asked yet is
    asked now, and the pair is decided anew. `keep`: it stays as it was judged, drawn more rarely."""
    rejudge: Adjustable[Rejudge] = Rejudge()
    """Limits of `on_change: rejudge`, an iteration; pairs whose votes are most evenly split come first."""
    stale_weight: Adjustable[float] = Field(0.25, gt=0, le=1)
    """With `on_change: keep`: weight in the draw of a pair that the new text would judge by other questions, against
    that of another one of its age."""
    half_life: Adjustable[float | None] = Field(None, gt=0)
    """Iterations after which a pair's weight in the draw has halved; null: age doesn't count. The ratio of two weights
    is that of the chances to be drawn first; the more of the old pairs an update takes, the less weights tell."""
    half_distance: Adjustable[float | None] = Field(None, gt=0)
    """A pair's weight in the draw halves for every so many nats a token that the policy moved on its completions since
    then: |log p now - log p then|. Null: that isn't measured. Measuring costs a pass of the learner
    over the old pairs, and needs an engine that records log p. A pair without one, as of a data set, counts as moved as
    far as the farthest."""


class Eval(Section):
    """Held-out evaluation."""

    every: Adjustable[int] = Field(4, ge=1)
    """Evaluate after this many iterations; also before the first, at every change of text, and at the end."""
    prompts: int = Field(48, ge=1)
    """Held-out prompts used, in file order."""
    samples: int = Field(1, ge=1)
    """Answers for each."""
    temperature: float | None = Field(None, ge=0)
    """Of held-out answers; `sampling.temperature` when absent. Training wants samples that explore, people read answers
    that don't: set here what the policy will be used with."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Of held-out answers; `sampling.top_p` when absent."""
    kl_prompts: Adjustable[int] = Field(16, ge=0)
    """The first so many of these prompts get one more answer, at temperature 1 and top-p 1, on which KL from the base
    policy is computed; 0: KL isn't measured."""
    retention: Adjustable[bool] = False
    """Measure what is forgotten, too ([forgetting.md](forgetting.md)): probes that the base policy passed, the
    perplexity of fixed texts, and the win rate under every earlier text of the run. The base policy is measured before
    the first iteration, so a run that began without it can't have it later."""
    probes: str | None = None
    """File of probes of your own, in place of those that come with rlaif: JSON, JSONL, CSV or Parquet, with `prompt`
    and `answer` (or `check`, or `refuses`), perhaps `kind`."""
    cache: Adjustable[bool] = True
    """Take the base policy's answers and scores from an earlier run of the same model, prompts, seed and settings, and
    keep them for later ones ([run-directory.md](run-directory.md#evaluations-of-the-base-policy))."""
    deciding_voices: Adjustable[bool] = False
    """Held-out pairs are also put before the voices that decide which pairs train. `monitors.hacking` then holds their
    word against the held-out question's: what has risen by the former alone was learned from that question."""
    reference_judge: AnyJudge | None = None
    """Another judge, with settings as `judge` has them, that compares the same held-out answers and never trains:
    another model, or another server. Where what trains is pleased and this one isn't, `monitors.hacking` tells
    ([monitors.md](monitors.md#a-judge-that-is-being-fooled))."""

    @field_validator("reference_judge")
    @classmethod
    def _of_ours(cls, judge: Judge | None) -> Judge | None:
        if isinstance(judge, OwnJudge):
            raise ValueError("a class of yours judges training alone; give a reference of kind `likelihood` or `chat`")
        if isinstance(judge, ChatSettings) and judge.serve:
            raise ValueError(
                "eval.reference_judge.serve: only the job's own judge has servers that we start; start this one's "
                "yourself, and name them in base_url"
            )
        return judge


class Monitor(Section):
    """What is watched for, and what the run does when it is found."""

    action: Literal["warn", "pause", "rollback", "off"] = "warn"
    """`warn`: noted, and the run goes on. `pause`: the run stops after the iteration, and the same command goes on.
    `rollback`: it stops the same, taken back to the newest iteration at which this had something to look at and was
    silent, if `keep_checkpoints` kept that; what came after is kept beside it. `off`: nobody looks."""

    @field_validator("action", mode="before")
    @classmethod
    def _off_without_quotes(cls, action: Any) -> Any:
        return "off" if action is False else action  # YAML reads off as false


class KlMonitor(Monitor):
    """The policy is far from the base policy."""

    limit: float = 0.5
    """KL from the base policy, nats a token (`eval.kl_prompts`), at most."""


class ShortAnswersMonitor(Monitor):
    """Sampled answers are short."""

    limit: float = 6.0
    """Words of an iteration's sampled answers on average, at least."""


class EqualAnswersMonitor(Monitor):
    """Sampled answers repeat each other."""

    limit: float = Field(0.5, ge=0, le=1)
    """Share of different ones among an iteration's sampled answers, at least."""


class CutOffMonitor(Monitor):
    """The length limit ends most sampled answers."""

    limit: float = Field(0.8, ge=0, le=1)
    """Share of an iteration's sampled answers that the length limit cut off, at most."""


class CutOffWonMonitor(Monitor):
    """The judge prefers answers that were cut off."""

    limit: float = Field(0.5, ge=0, le=1)
    """Of two answers one of which was cut off, the judge prefers that one in at most this share of the pairs of the
    last four iterations under the text, beyond chance (3.5 standard deviations)."""


class WeightsGapMonitor(Monitor):
    """The policy that samples is not the one that is trained."""

    limit: float = Field(0.02, gt=0)
    """Both score fixed texts, which may differ by no more than this on average (nats a token), and by ten times this in
    absolute value. Over 0.5 the run ends, whatever the action."""


class DecodingGapMonitor(Monitor):
    """Answers as they were decoded are not those of the policy that is trained."""

    limit: float = Field(0.02, gt=0)
    """The same for sampled answers, as they were decoded and as the learner scores them, beyond chance (two standard
    errors)."""


class CollapseMonitor(Monitor):
    """The policy has few words left, or is sure of every one."""

    vocabulary: float = Field(0.5, ge=0, le=1)
    """Different words in 200 of the sampled answers' words: at least so many times those of the first iteration."""
    entropy: float = Field(0.25, ge=0, le=1)
    """-log p of a sampled token on average, at least so many times that of the first iteration."""


class JumpMonitor(Monitor):
    """Sampled answers are unlike those of the iteration before, under the same text."""

    length_ratio: float = Field(2.0, ge=1)
    """So many times longer, or shorter, may they be (mean words), and by more than prompts differ by chance. With fewer
    than 6 prompts nothing is told."""
    ended: float = Field(0.4, ge=0, le=1)
    """The share of those that end by themselves may differ by this, and by chance, likewise."""


class SelfPraiseMonitor(Monitor):
    """Sampled answers praise themselves, or speak to whoever judges them."""

    limit: float = Field(0.1, ge=0, le=1)
    """Share of an iteration's sampled answers that do either, at most, beyond chance (3.5 standard deviations)."""


class AbstainedMonitor(Monitor):
    """The judge abstains: failed calls, unreadable replies."""

    limit: float = Field(0.2, ge=0, le=1)
    """Share of the pairs without a valid vote, at most, in an iteration or in the last four under the text. The same
    of the held-out answers that it was asked about, and the reference judge. Both beyond chance (3.5 standard
    deviations). An evaluation without a single vote is always told."""


class DriftMonitor(Monitor):
    """A share of the judged pairs moves, under the same text."""

    limit: float = Field(6.0, gt=0)
    """The sum of the iterations' surprises, in standard deviations, at which it is told
    ([monitors.md](monitors.md#charts))."""
    least: float = Field(0.15, ge=0, le=1)
    """Smallest difference of the shares, before and since, that is worth telling."""


class AgreementDriftMonitor(DriftMonitor):
    """Fewer pairs on which all votes name one side."""


class OrderFlipDriftMonitor(DriftMonitor):
    """More pairs on which the order that the judge is shown decides."""


class PositionBiasDriftMonitor(DriftMonitor):
    """Of the pairs that the order decides, the judge prefers the slot shown first on more, or on fewer."""


class AbstainedDriftMonitor(DriftMonitor):
    """More pairs without a valid vote."""


class KeptDriftMonitor(DriftMonitor):
    """More pairs are kept, or fewer."""

    limit: float = Field(7.0, gt=0)
    """As of the other charts; there are two of this, one a direction, and kept shares move as a policy learns."""


class AnchorsMonitor(Monitor):
    """Pairs that were judged under the text in force are asked about again every few iterations: their verdicts must
    not move while judge and text don't. A model behind an alias that changes is caught. A judge whose weights the run
    knows isn't asked."""

    pairs: int = Field(32, ge=1)
    """Pairs that are asked about again: the first ones under the text. `judge.cache` isn't read for them."""
    every: int = Field(4, ge=1)
    """Iterations from one time to the next."""
    limit: float = Field(0.1, ge=0, le=1)
    """Share of them whose verdict moved, at most, beyond chance (2.8 standard deviations). With fewer than 8 that got a
    verdict both times nothing is told."""


class SilentServerMonitor(Monitor):
    """One of several servers that share a judge's ballots answers none of them in an iteration. When it answers again,
    the run says so (the event `judge_server`)."""

    votes: int = Field(8, ge=1)
    """Votes asked anew in an iteration, for each of the servers that share them: with fewer nothing is told, since one
    that failed once would look like one that is down."""


class HackingMonitor(Monitor):
    """The win rate has risen, and what should have risen with it hasn't: the reference judge's, the length-controlled
    one, or the checks; or what the base policy could is lost (`eval.retention`)."""

    gap: float = Field(0.2, ge=0, le=1)
    """So much more has the win rate risen above a half, at least, and more than chance does (99.5 %). It has surely
    (its 99.5 % interval), the other hasn't (its 95 % interval)."""
    kept: float = Field(0.8, ge=0, le=1)
    """Share of the probes that the base policy passed which are still passed, at least (the upper end of the 95 %
    interval)."""


class LeaningMonitor(Monitor):
    """Winners have more of something than losers that is no merit, in more of the kept pairs than the limit. It counts
    the last 8 iterations under the text, and asks for more than chance (2.4 standard deviations). What a principle's
    `check` asks for is no finding, and of what is null nothing is."""

    length: float | None = Field(0.9, ge=0.5, le=1)
    """Words, or fewer of them."""
    lists: float | None = Field(0.9, ge=0.5, le=1)
    """List items, or fewer of them."""
    hedges: float | None = Field(0.9, ge=0.5, le=1)
    """Hedging words ("perhaps", "it depends") by word, or fewer of them."""
    repetition: float | None = Field(0.8, ge=0.5, le=1)
    """Runs of three words that come again."""
    self_praise: float | None = Field(0.7, ge=0.5, le=1)
    """Words in praise of the answer itself."""
    to_judge: float | None = Field(0.7, ge=0.5, le=1)
    """Words to whoever judges."""


class CalibrationShiftMonitor(Monitor):
    """With a calibration: judged pairs are unlike those that were calibrated."""

    kept: float = Field(0.25, ge=0, le=1)
    """The share of kept pairs, in the last four iterations under the text, may differ from the calibration's by this,
    and by chance (3.5 standard deviations)."""
    agreement: float = Field(0.15, ge=0, le=1)
    """The same for the votes' mean agreement."""
    cut_off: float = Field(0.25, ge=0, le=1)
    """The same for the share of answers that the length limit cut off; labelled ones of which nothing says how they
    ended count as ended."""
    length_ratio: float = Field(2.0, ge=1)
    """So many times longer, or shorter, than the labelled ones may the judged answers be (mean words). With fewer than
    16 pairs nothing is told of it."""


class JurorMonitor(Monitor):
    """A juror's votes weigh nothing, in 3 of the last 4 iterations under the text and in this one, although no label
    says so."""


class Monitors(Section):
    """What a run watches, by kind ([monitors.md](monitors.md)). Older keys (`max_kl`, `stop_on_alarm`) are read as they
    were."""

    kl: KlMonitor = KlMonitor()
    short_answers: ShortAnswersMonitor = ShortAnswersMonitor()
    equal_answers: EqualAnswersMonitor = EqualAnswersMonitor()
    cut_off: CutOffMonitor = CutOffMonitor()
    cut_off_won: CutOffWonMonitor = CutOffWonMonitor()
    weights_gap: WeightsGapMonitor = WeightsGapMonitor()
    decoding_gap: DecodingGapMonitor = DecodingGapMonitor()
    abstained: AbstainedMonitor = AbstainedMonitor()
    calibration_shift: CalibrationShiftMonitor = CalibrationShiftMonitor()
    juror: JurorMonitor = JurorMonitor()
    collapse: CollapseMonitor = CollapseMonitor()
    jump: JumpMonitor = JumpMonitor()
    self_praise: SelfPraiseMonitor = SelfPraiseMonitor()
    agreement_drift: AgreementDriftMonitor = AgreementDriftMonitor()
    order_flip_drift: OrderFlipDriftMonitor = OrderFlipDriftMonitor()
    position_bias_drift: PositionBiasDriftMonitor = PositionBiasDriftMonitor()
    abstained_drift: AbstainedDriftMonitor = AbstainedDriftMonitor()
    kept_drift: KeptDriftMonitor = KeptDriftMonitor()
    anchors: AnchorsMonitor = AnchorsMonitor()
    silent_server: SilentServerMonitor = SilentServerMonitor()
    leaning: LeaningMonitor = LeaningMonitor()
    hacking: HackingMonitor = HackingMonitor()

    @model_validator(mode="before")
    @classmethod
    def _of_older_jobs(cls, tree: Any) -> Any:
        return cls.lifted(tree) if isinstance(tree, dict) else tree

    @classmethod
    def lifted(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """A tree of before each kind had a section, when there was one number for it and one action for all."""
        older = {key: tree[key] for key in (*_OLDER_LIMITS, "stop_on_alarm") if key in tree}
        lifted = {key: value for key, value in tree.items() if key not in older}
        for key, places in _OLDER_LIMITS.items():
            for kind, setting in places if key in older else ():
                said = lifted.get(kind) or {}
                if not isinstance(said, dict):  # what is wrong with it is said of it
                    continue
                name, value = ("action", "off") if older[key] is None else (setting, older[key])
                if name in said:
                    raise ValueError(
                        f"monitors.{key} is monitors.{kind}.{name} now, which is given too; set that alone"
                    )
                lifted[kind] = said | {name: value}
        if older.get("stop_on_alarm") not in (None, True, False):
            raise ValueError("monitors.stop_on_alarm: expected true or false; or give a kind `action: pause`")
        for kind in cls.model_fields if older.get("stop_on_alarm") else ():
            if isinstance(said := lifted.get(kind) or {}, dict):
                lifted[kind] = {"action": "pause"} | said
        return lifted


_OLDER_LIMITS: dict[str, tuple[tuple[str, str], ...]] = {
    "max_kl": (("kl", "limit"),),
    "min_mean_words": (("short_answers", "limit"),),
    "min_distinct_share": (("equal_answers", "limit"),),
    "max_weights_gap": (("weights_gap", "limit"), ("decoding_gap", "limit")),
    "max_abstained_share": (("abstained", "limit"),),
    "max_cut_off_share": (("cut_off", "limit"),),
    "max_cut_off_won": (("cut_off_won", "limit"),),
    "max_kept_shift": (("calibration_shift", "kept"),),
    "max_agreement_shift": (("calibration_shift", "agreement"),),
    "max_cut_off_shift": (("calibration_shift", "cut_off"),),
    "max_length_ratio": (("calibration_shift", "length_ratio"),),
}
"""Older key → where its number stands now: kind and setting."""


class Checkpoints(Section):
    """Which checkpoints of a run are kept, by their number."""

    last: int | None = None
    """So many, the newest."""
    every: int | None = None
    """Those after so many iterations, twice as many, and so on."""


class Pipeline(Section):
    """What happens at the same time ([scale.md](scale.md)). The log and the decisions are the same either way."""

    stream: Adjustable[bool | None] = None
    """The judge works on prompts that are sampled while the policy samples others. When absent, where judge and sampler
    share no device: a server elsewhere, a GPU for each, replicas on a cluster."""
    staleness: Adjustable[int] = Field(0, ge=0)
    """Iteration k samples from the policy after k - staleness iterations, so that it can be sampled and judged while
    earlier ones train. 0: from the newest."""


WorkerKind = Literal["process", "inline"]
PlacedRole = Literal["sampler", "learner", "judge"]


class Place(Section):
    """Where a role runs: `sampler`, `learner`, or `judge`, which takes along who measures relevance and base log p.
    Absent: as `workers` says, all roles on one GPU; of several, the sampler takes the first, the learner the next, the
    judge the one after (untried on several GPUs). A role that is elsewhere takes none."""

    worker: WorkerKind | None = None
    """In place of the job's `workers`, for this role."""
    devices: list[int] | None = Field(None, min_length=1)
    """Its GPUs, counted from 0 among those that the process sees: as many as `sampling.tensor_parallel_size` for the
    sampler, as many as its processes for the learner, one for the judge. For servers of `judge.serve` as many as they
    span. Not for an `inline` worker, which sees what the loop's process sees."""

    @field_validator("devices")
    @classmethod
    def _counted_from_0(cls, devices: list[int] | None) -> list[int] | None:
        if devices and (min(devices) < 0 or len(set(devices)) != len(devices)):
            raise ValueError("these are no GPUs; for example [0]")
        return devices


def _whole_or_a_part(gpus: float | None) -> float | None:
    """As Ray takes it."""
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g} GPUs: give a whole number, or a part of one")
    return gpus


def _one_at_most(gpus: float | None) -> float | None:
    """As processes that compute together take it: no two of them share one."""
    if gpus not in (None, 0, 1):
        raise ValueError(f"{gpus:g} GPUs: a process of the learner has one, or none")
    return gpus


class Share(Section):
    """How many workers have a role on a cluster, and what each has."""

    replicas: int = Field(1, ge=1)
    """How many share the role's work; each holds the whole model."""
    gpus: Annotated[float | None, AfterValidator(_whole_or_a_part)] = Field(None, ge=0)
    """GPUs of each, on one machine; a fraction shares one, which vLLM can't. When absent: none where the cluster has
    none, else `sampling.tensor_parallel_size` for the sampler, one for a judge. Untried on GPUs."""


class LearnerShare(Section):
    """The learner's processes on a cluster, which compute each step together."""

    processes: int = Field(ge=1)
    """How many; they have to divide `learner.batch_size`."""
    gpus: Annotated[float | None, AfterValidator(_one_at_most)] = Field(None, ge=0)
    """GPUs of each. When absent: none where the cluster has none, else one. Untried on GPUs."""


class Cluster(Section):
    """Roles that are several workers on a [Ray cluster](scale-ray.md); a role that isn't named here stays where
    `placement` says. Needs the extra `ray`."""

    address: str = "local"
    """`local`: this machine alone, as a cluster that is made for the run and listens to nobody else. `auto`: the
    cluster that this machine belongs to. `HOST:6379` or `ray://HOST:10001` (untried): another."""
    sampler: Share | None = None
    """Who samples. Not with `sampling.engine: server`, whose servers are the replicas."""
    judge: Share | None = None
    """Who judges. Not for a judge behind servers, which waits and computes nothing."""
    learner: LearnerShare | None = None
    """Who trains. Its first process has to see the run directory."""
    max_restarts: int = Field(3, ge=0)
    """How often another may take the place of a replica that died, for each role; then the run pauses. What has no
    replica, as the learner: how often the run goes on from its log by itself, with every worker started anew."""

    def of(self, role: str) -> Share | None:
        """The replicas that a role has here; None: it is elsewhere, or has none."""
        return {"sampler": self.sampler, "judge": self.judge}.get(role)

    @property
    def wants_gpus(self) -> bool:
        """Some role names GPUs."""
        return any(share and share.gpus for share in (self.sampler, self.judge, self.learner))

    @property
    def asked(self) -> int:
        """Processes in all."""
        replicas = sum(share.replicas for share in (self.sampler, self.judge) if share)
        return replicas + (self.learner.processes if self.learner else 0)

    @model_validator(mode="after")
    def _names_a_role(self) -> Cluster:
        if not self.asked:
            raise ValueError("names no role; for example `sampler: {replicas: 2}`")
        return self


class Job(Section):
    """A training job."""

    name: Adjustable[str | None] = None
    """Name of the run directory under `runs/`; the job file's name when absent."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Everything random follows from this."""
    iterations: Adjustable[int] = Field(8, ge=1)
    """How many iterations."""
    constitution: str | None = None
    """`assistant` follows the newest version on disk, also while the job runs; `assistant@2` pins one."""
    schedule: dict[int, str] | None = None
    """Texts by first iteration, e.g. `{0: assistant@1, 4: assistant@2}`; instead of `constitution`."""
    constitutions_dir: str = "constitutions"
    """Folder that holds the constitutions."""
    policy: Policy = Policy()
    prompts: Prompts = Prompts()
    source: Source | None = None
    """Where pairs come from; absent: from the policy, which is sampled anew in every iteration."""
    sampling: Annotated[
        Annotated[Sampling, Tag("[Sampling]")] | Annotated[OwnSampling, Tag("[OwnSampling]")],
        Discriminator(_tag_by("engine", Sampling, OwnSampling)),
    ] = Sampling()
    pairing: Pairing = Pairing()
    judge: AnyJudge = LikelihoodSettings()
    filters: Filters = Filters()
    learner: Annotated[
        Annotated[Learner, Tag("[Learner]")] | Annotated[OwnLearner, Tag("[OwnLearner]")],
        Discriminator(_tag_by("kind", Learner, OwnLearner)),
    ] = Learner()
    replay: Replay = Replay()
    eval: Eval = Eval()
    monitors: Adjustable[Monitors] = Monitors()
    pipeline: Pipeline = Pipeline()
    placement: Adjustable[dict[PlacedRole, Place]] = Field(default_factory=dict)
    """By role, where it runs."""
    workers: Adjustable[WorkerKind] = "process"
    """Sampler, judge and learner each in a process of its own, or (tests) in the loop's; `placement` says it of one."""
    device: Adjustable[Literal["shared"] | None] = None
    """`shared`: roles on one GPU take turns with its memory ([scale.md](scale.md#one-gpu-in-turns), untried). Absent:
    each keeps its part for the whole run."""
    cluster: Adjustable[Cluster | None] = None
    """Roles that are several workers, on this machine or on others."""

    keep_checkpoints: Adjustable[Literal["all", "evaluated"] | Checkpoints | None] = None
    """What a branch or a rollback can go on from: after which iterations policy and learner's state are kept. `all`,
    `evaluated`, `{last: 3}` or `{every: 4}`, and always the newest. When absent, evaluated policies and the newest, and
    the newest state alone. `rlaif status` says what each costs ([runs.md](runs.md))."""

    @field_validator("keep_checkpoints", mode="before")
    @classmethod
    def _says_which(cls, value: Any) -> Any:
        if value is None or value in ("all", "evaluated") or isinstance(value, Checkpoints):
            return value
        said = {k: n for k, n in value.items() if n is not None} if isinstance(value, dict) else {}
        if len(said) != 1 or not all(k in ("last", "every") and type(n) is int and n > 0 for k, n in said.items()):
            raise ValueError("expected all, evaluated, {last: N} or {every: N}, N from 1")
        return said

    @model_validator(mode="before")
    @classmethod
    def _devices_of_older_jobs(cls, tree: Any) -> Any:
        """Before `placement` there was `devices`: a role's GPUs, or null."""
        if not isinstance(tree, dict) or not isinstance(older := tree.get("devices"), dict):
            return tree
        rest = {key: value for key, value in tree.items() if key != "devices"}
        places = {role: {"devices": devices} for role, devices in older.items() if devices is not None}
        if not places:
            return rest
        placement = tree.get("placement") or {}
        if not isinstance(placement, dict):  # what is wrong with it is said of it
            return rest
        if twice := [role for role in places if role in placement]:
            raise ValueError(f"devices: placement.{twice[0]} says it too; remove `devices`, its older name")
        return rest | {"placement": placement | places}

    @model_validator(mode="after")
    def _one_gpu_for_one(self) -> Job:
        for role, place in self.placement.items():
            serves = isinstance(self.judge, ChatSettings) and self.judge.serve
            several = {"sampler": True, "learner": self.learner.accelerate, "judge": serves}[role]
            if not several and len(place.devices or [0]) > 1:
                raise ValueError(f"placement.{role}.devices: {place.devices}, but it runs on one; for example [0]")
        return self

    @model_validator(mode="before")
    @classmethod
    def _completed_by_its_judge(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and (judge := _judge_class(tree.get("judge") or {})):
            return judge.completed(tree)
        return tree

    @model_validator(mode="after")
    def _fits_its_share(self) -> Job:
        share, span = self.cluster and self.cluster.sampler, self.sampling.tensor_parallel_size
        if not share:
            return self
        if self.sampling.engine == "server":
            raise ValueError(
                "cluster.sampler: not with `sampling.engine: server`, whose servers are the replicas: each sampler of "
                "a cluster would start servers of its own, or change those of the others. Leave cluster.sampler out "
                "and give sampling.replicas, or more servers in sampling.base_url; or set sampling.engine: vllm"
            )
        if share.gpus is not None and share.gpus < span > 1:
            raise ValueError(
                f"cluster.sampler.gpus: {share.gpus:g} for sampling.tensor_parallel_size: {span}; give as many"
            )
        if self.sampling.engine == "vllm" and 0 < (share.gpus or 0) < 1:
            raise ValueError(
                f"cluster.sampler.gpus: {share.gpus:g}, and replicas on one GPU start at the same time, while vLLM "
                "measures the memory that it has free; give 1, and fewer replicas: one of them batches what two would"
            )
        return self

    @model_validator(mode="after")
    def _fits_its_judge(self) -> Job:
        self.judge.check_in(self)
        return self

    @model_validator(mode="before")
    @classmethod
    def _most_of_a_shared_device(cls, tree: Any) -> Any:
        """A job's default where nobody else has memory meanwhile."""
        sampling = tree.get("sampling", {}) if isinstance(tree, dict) and tree.get("device") == "shared" else None
        if not isinstance(sampling, dict) or "gpu_memory_utilization" in sampling:
            return tree
        return tree | {"sampling": sampling | {"gpu_memory_utilization": SHARED_UTILIZATION}}

    @model_validator(mode="after")
    def _one_at_a_time(self) -> Job:
        """Of a shared device."""
        elsewhere = isinstance(self.judge, ChatSettings) and self.judge.serve is None
        for key, given, why in (
            ("pipeline.staleness", self.pipeline.staleness, "it lets the policy be sampled while it trains"),
            ("pipeline.stream", self.pipeline.stream and not elsewhere, "it lets the judge work while others sample"),
            ("cluster", self.cluster, "those of a cluster have GPUs of their own"),
        ):
            if given and self.device == "shared":
                raise ValueError(f"{key}: not with `device: shared`, whose roles work one at a time: {why}; drop one")
        return self

    @model_validator(mode="after")
    def _samples_ahead(self) -> Job:
        if self.pipeline.staleness and self.source is not None:
            raise ValueError("pipeline.staleness: a job with a `source` samples nothing that could be stale; drop one")
        return self

    @model_validator(mode="after")
    def _one_source_of_texts(self) -> Job:
        if (self.constitution is None) == (self.schedule is None):
            raise ValueError("give exactly one of `constitution` and `schedule`")
        if self.schedule is not None and 0 not in self.schedule:
            raise ValueError("`schedule` needs an entry for iteration 0")
        if early := [k for k in self.schedule or {} if k < 0]:
            raise ValueError(f"`schedule` names iteration {early[0]}; the first one is 0")
        return self


def load_job(path: Path | str, overrides: list[str] | None = None) -> Job:
    """Reads a job file and applies `a.b=value` overrides (values are YAML).

    Raises:
        UserError: the file is missing or malformed, a key is unknown, or a value doesn't fit.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        refuse_duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader), str(path))
        tree = yaml.safe_load(text)
    except RecursionError as e:
        raise UserError(f"{path}: nested too deeply; a job is a mapping of settings, see docs/job.md") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8") from e
    except IsADirectoryError as e:
        raise UserError(
            f"{path}: can't read the job file (this is a folder, and no run: it has no run.json); name a file, for "
            "example jobs/quickstart.yaml"
        ) from e
    except OSError as e:
        raise UserError(
            f"{path}: can't read the job file ({e.strerror}); `ls jobs` shows the shipped ones, "
            "`rlaif init DIR` writes them"
        ) from e
    except (yaml.YAMLError, ValueError) as e:
        where = getattr(e, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        why = " ".join(str(getattr(e, "problem", e)).split())
        raise UserError(f"{path}{line}: not valid YAML ({why})") from e
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a job is a mapping of settings, found {type(tree).__name__}; see docs/job.md")
    for override in overrides or []:
        apply_override(tree, override)
    job = parse_job(tree, str(path))
    if idle := without_effect(job):
        raise UserError("; ".join(f"{path}: {message}" for message in idle))
    return job


class _Needs(NamedTuple):
    """Settings that do nothing unless another one says so."""

    keys: tuple[str, ...]
    """Of settings, or of sections, which stand for each setting in them but for a monitor's action."""
    switch: str
    """The other one's key. A job that gives it, too, turns them off knowingly, as one of several variants does."""
    on: Callable[[Job], bool]
    says: str


_NEEDS = (
    _Needs(
        ("replay.max_age", "replay.rejudge", "replay.stale_weight", "replay.half_life", "replay.half_distance"),
        "replay.share",
        lambda job: job.replay.share > 0,
        "nothing is replayed while replay.share is 0; set it, for example replay.share=0.3",
    ),
    _Needs(
        ("replay.rejudge",),
        "replay.on_change",
        lambda job: job.replay.on_change == "rejudge",
        "a limit of `replay.on_change: rejudge`; set that",
    ),
    _Needs(
        ("replay.stale_weight",),
        "replay.on_change",
        lambda job: job.replay.on_change == "keep",
        "for `replay.on_change: keep`; set that",
    ),
    _Needs(
        ("eval.probes", "monitors.hacking.kept"),
        "eval.retention",
        lambda job: job.eval.retention,
        "probes are asked with eval.retention alone; set eval.retention=true",
    ),
    _Needs(
        ("monitors.anchors",),
        "judge.kind",
        lambda job: not isinstance(job.judge, LikelihoodSettings),
        "a likelihood judge isn't asked again, since the run knows its weights; they are for another judge.kind",
    ),
)


def without_effect(job: Job) -> list[str]:
    """What a job gives that does nothing, or that no number can meet: a line each, with the key and what to do. Where a
    job was stored by a run, which gives everything, only the latter."""
    said = []
    for needs in _NEEDS:
        if not needs.on(job) and not _given(job, needs.switch):
            idle = [key for key in needs.keys if _given(job, key)]
            said += [f"{key}: without effect; {needs.says}, or leave {key} out" for key in idle]
    for kind, settings, what in (
        ("kl", job.monitors.kl, "KL from the base policy is 0 or more, so every evaluation would raise the alarm"),
        ("short_answers", job.monitors.short_answers, "answers have no fewer words than 0, so none would raise it"),
    ):
        if settings.limit < 0:
            said.append(
                f"monitors.{kind}.limit: {settings.limit:g}, and {what}; give a limit of 0 or more, or set "
                f"monitors.{kind}.action=off"
            )
    return said


def worth_knowing(job: Job) -> list[str]:
    """What whoever starts a job should know of it, and a dry run says before."""
    back = [kind for kind, monitor in job.monitors if monitor.action == "rollback"]
    keep = job.keep_checkpoints
    if not back or not (keep is None or (isinstance(keep, Checkpoints) and keep.last is not None)):
        return without_effect(job)
    named = ", ".join(f"monitors.{kind}.action=rollback" for kind in back)
    few = f"{named}: only the {f'newest {keep.last} checkpoints are' if keep else 'newest checkpoint is'} kept"
    less = (
        "a shift that began before them leaves none to go back to; see" if keep else "there is none to go back to; set"
    )
    return [f"{few}, so {less} keep_checkpoints", *without_effect(job)]


def _given(job: Job, key: str) -> bool:
    """Whether a job gives a setting, or anything but an action in a section."""
    at: Any = job
    for part in key.split("."):
        if part not in at.model_fields_set:
            return False
        at = getattr(at, part)
    return bool(at.model_fields_set - {"action"}) if isinstance(at, Section) else at is not None


def parse_job(tree: dict[str, Any], source: str) -> Job:
    """Validates a tree of settings; `source` names it in errors."""
    try:
        return Job.model_validate(tree)
    except ValidationError as e:
        raise UserError("; ".join(f"{source}: {_explain(err)}" for err in e.errors())) from e


def refuse_duplicate_keys(node: yaml.Node | None, source: str, inside: tuple[yaml.Node, ...] = ()) -> None:
    """PyYAML silently keeps the last of two equal keys: what was written first would not be in force.

    Raises:
        UserError: a key is given twice, or an anchor holds itself; `source` and the line.
    """
    if node is not None and any(node is outer for outer in inside):
        raise UserError(f"{source}:{node.start_mark.line + 1}: an anchor that holds itself; write the value out")
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                raise UserError(f"{source}:{key.start_mark.line + 1}: `{name}` is given twice; delete one")
            seen.add(name)
            refuse_duplicate_keys(value, source, (*inside, node))
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            refuse_duplicate_keys(child, source, (*inside, node))


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets `a.b=value` (the value is YAML) in a tree of settings, in place."""
    key, sep, value = override.partition("=")
    if not sep or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, for example --set learner.beta=0.2")
    *parents, last = key.split(".")
    node = tree
    for n, part in enumerate(parents):
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {_no_section(parents[: n + 1], child)}")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"--set {override}: the value is not valid YAML") from e


def _no_section(path: list[str], value: Any) -> str:
    """Why no setting can be set in a value, and where it can."""
    key, known = ".".join(path), _known_keys(tuple(path))
    if not known:
        return f"`{key}` is a value, not a section"
    keys = ", ".join(f"{key}.{name}" for name in known)
    return f"`{key}` was given as {value!r}, and only a section has settings in it; give {keys}, each by its key"


def of_run(tree: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A job as a run stored it, with overrides. A key that only another kind of judge knows is left out: older runs
    have all of them, and an override may name another kind than the run's. Where one of the two is code of the user's
    own, nobody knows its keys, and what the run's judge had is left out. A rule that the run's rlaif didn't have
    dropped nothing in it, whatever a new job's default is.

    Raises:
        UserError: an override isn't KEY=VALUE.
    """
    tree = copy.deepcopy(tree)
    if isinstance(filters := tree.get("filters"), dict):
        filters.setdefault("cut_off", "keep")
    if isinstance(watched := tree.get("monitors"), dict):  # before an override names the same by its newer key
        tree["monitors"] = Monitors.lifted(watched)
    before = dict(judge) if isinstance(judge := tree.get("judge"), dict) else {}
    for override in overrides:
        apply_override(tree, override)
    if not isinstance(judge := tree.get("judge"), dict) or (kind := _judge_class(judge)) is None:
        return tree
    said = {override.partition("=")[0] for override in overrides}
    of_another = {*_foreign(kind)}
    if (was := _judge_class(before)) is not kind or judge.get("kind") != before.get("kind"):
        of_another |= {*before} - {*Judge.model_fields} | {"model"} if OwnJudge in (was, kind) else set()
    foreign = {key for key in of_another if not any(f"{s}.".startswith(f"judge.{key}.") for s in said)}
    return tree | {"judge": {key: value for key, value in judge.items() if key not in foreign}}


_YAML_READS = {
    datetime.date: "a date",
    datetime.datetime: "a time",
    int: "a number",
    float: "a number",
    bool: "true or false",
}
"""What YAML makes of text without quotes."""


_FEW = 4
"""Places that are named of a key which stands in another section."""


def _explain(error: Any) -> str:
    where = ".".join(str(p) for p in error["loc"] if not _is_tag(p))
    if error["type"] == "union_tag_invalid":
        found, kinds = error["input"].get("kind"), ", ".join(f"`{kind}`" for kind in JUDGES)
        return f"{where}.kind: no judge is called {found!r}; there are {kinds}, and `module:Class` for one of yours"
    if error["type"] == "missing" and where == "judge.model":
        return _NO_SERVERS_NAME
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        if where and re.match(rf"{re.escape(where)}[.:]", message):  # it names its own key
            return str(message)
        if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
            message = "expected a section, `key: value` lines below it"
        if not where:
            return str(message)
        if error["type"] == "string_type" and (read_as := _YAML_READS.get(type(error["input"]))):
            shown = yaml.safe_dump(error["input"]).split("\n")[0]
            shown = "" if where.endswith("base_url") else f" {shown}"
            return f"{where}: expected text, and YAML reads{shown or ' this'} as {read_as}; put it in quotes"
        # Not an address's, nor a section's that may hold one: passwords stand in some.
        silent = where.endswith("base_url") or isinstance(error["input"], dict)
        return f"{where}: {message}" + ("" if silent else f" (found {error['input']!r})")
    key, known = str(error["loc"][-1]), _known_keys(error["loc"][:-1])
    if where == f"judge.{key}" and (knowing := [kind for kind, cls in JUDGES.items() if key in cls.model_fields]):
        mine = next(kind for kind, cls in JUDGES.items() if error["loc"][1] == _tag_of(cls))
        return f"unknown key `{where}` for `judge.kind: {mine}`; it is known to `{'`, `'.join(knowing)}`"
    elsewhere = [path for path in _paths(Job) if path.rpartition(".")[2] == key]  # right, but in another section
    if len(elsewhere) > _FEW:  # as a monitor's `limit`: nobody can say which was meant
        elsewhere = []
    near = elsewhere or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else f"known keys: {', '.join(known)}"
    if not elsewhere and where.startswith("learner."):
        hint += "; other settings of TRL's go into learner.args"
    return f"unknown key `{where}`; {hint}"


def _is_tag(part: Any) -> bool:
    """Not a key of the job: pydantic's own word in a place, as which section of a union it is."""
    return isinstance(part, str) and part.startswith("[") and part.endswith("]")


def _paths(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a section, but for those of lists and free mappings."""
    out = []
    for name, field in section.model_fields.items():
        out.append(f"{prefix}{name}")
        for inner in sections_in(field.annotation):
            out += _paths(inner, f"{prefix}{name}.")
    return list(dict.fromkeys(out))


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    """The keys of the section at a place of the job; none when there is no section."""
    at: Any = Job
    for part in loc:
        found = sections_in(at)
        if _is_tag(part):
            at = next((s for s in found if part == _tag_of(s)), at)
        elif found:
            field = next((s.model_fields[str(part)] for s in found if str(part) in s.model_fields), None)
            at = field.annotation if field else None
        else:  # an index of a list, or a key of a mapping
            at = next(iter(typing.get_args(at)[-1:]), None)
    return sorted({name for section in sections_in(at) for name in section.model_fields})


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field can hold; none for a plain value, and for a list or mapping of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is Annotated:
        return sections_in(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [s for a in typing.get_args(annotation) for s in sections_in(a)]
    return []


def may_change(key: str, *jobs: Job) -> bool:
    """Whether a run may go on with another value of a dotted key: in the run's job, and in the one that it is to go on
    with, where both are given."""
    return all(_may_change_in(job, key.split(".")) for job in jobs)


def _may_change_in(job: Job, parts: Sequence[str]) -> bool:
    at: Any = job
    for number, part in enumerate(parts):
        if isinstance(at, list) and part.isdecimal() and int(part) < len(at):
            at = at[int(part)]
            continue
        field = type(at).model_fields.get(part) if isinstance(at, BaseModel) else None
        if field is None:
            return False
        at = getattr(at, part)
        if marks := [m for m in field.metadata if isinstance(m, MayChange)]:
            named = not marks[0].keys or bool({*parts[number + 1 :]} & {*marks[0].keys})
            return named and (isinstance(at, list) or not marks[0].lists)
    return False


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ between two resolved jobs: `{key: (old, new)}`. Sections in lists of one
    length go by their place (`judge.jury.0.model`)."""
    out: dict[str, tuple[Any, Any]] = {}
    for key in sorted(set(old) | set(new), key=str):
        a, b = old.get(key), new.get(key)
        if _sections(a) and _sections(b) and len(a) == len(b):
            a, b = dict(enumerate(a)), dict(enumerate(b))
        if isinstance(a, dict) and isinstance(b, dict):
            out |= changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            out[f"{prefix}{key}"] = (a, b)
    return out


def _sections(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
