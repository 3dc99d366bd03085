"""The words of the system: one small frozen record for each thing that a run writes down.

A record is one line of a JSONL file (docs/run-directory.md). The data flows one way:
`Prompt -> Completion -> Pair -> Ballot -> Vote -> Verdict -> Decision -> Preference -> UpdateStep`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION = 2
"""Of what is written. Rows of schema 1 are read as they were: `UpdateStep` and `IterationMetrics` lift them."""

Outcome = Literal["first", "second", "tie", "abstain"]
Order = Literal["forward", "reversed", "none"]
"""Which of a pair a judge was shown first; none for a judge without slots."""
Side = Literal["first", "second"]
AbstainReason = Literal["unparsed", "truncated", "refused", "empty", "infra_error"]
FinishReason = Literal["stop", "length"]
LengthUnknown = Literal["few_prompts", "one_sided", "same_length", "no_overlap"]
LENGTH_UNKNOWN: dict[LengthUnknown, str] = {
    "few_prompts": "verdicts on too few prompts",
    "one_sided": "all verdicts are for one side",
    "same_length": "every answer differs in length by the same",
    "no_overlap": "too few answers are longer, or too few are shorter, than the base policy's",
}
"""Why a win rate at equal length can't be told, in words."""
DropReason = Literal[
    "identical",
    "too_few_votes",
    "abstained",
    "tie",
    "guard",
    "order_flip",
    "low_agreement",
    "low_margin",
    "uncalibrated",
    "cut_off",
]

CodeName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""`module:Class` or `module:function`: code of the user's own (extend.md)."""
Reason = DropReason | CodeName

AlarmKind = Literal[
    "short_answers",
    "equal_answers",
    "weights_gap",
    "decoding_gap",
    "cut_off",
    "cut_off_won",
    "kl",
    "abstained",
    "calibration_shift",
    "juror",
    "collapse",
    "jump",
    "self_praise",
    "agreement_drift",
    "order_flip_drift",
    "position_bias_drift",
    "abstained_drift",
    "kept_drift",
    "anchors",
    "silent_server",
    "leaning",
    "hacking",
    "labels",
    "constitution",
]

Feature = Literal["length", "lists", "hedges", "repetition", "self_praise", "to_judge"]
"""What of an answer could please a judge without being better."""

ReviewRule = Literal["below_agreement", "top_uncertain"]
RowSource = Literal["judge", "replay", "human", "data"]


def digest(value: Any, digits: int = 16) -> str:
    """sha256 (hex, first digits) of a value's canonical JSON: the identity of plans, ballots and texts."""
    return digest_of_text(canonical(value), digits)


def canonical(value: Any) -> str:
    """A value's canonical JSON."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest_of_text(text: str, digits: int = 16) -> str:
    """The same of a text that is canonical JSON already."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


class Record(BaseModel):
    """Base of all records: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


R = TypeVar("R", bound=BaseModel)
TOLD: set[str] = set()
"""Records of which was said that keys were left out, by this process."""


def stored(record: type[R], content: Any) -> R:
    """A record out of a run's files, as JSON text or as a tree. Keys that a newer rlaif added are left out, said once.

    Raises:
        ValidationError: it is none.
    """
    text = isinstance(content, str | bytes)
    read: Callable[..., R] = record.model_validate_json if text else record.model_validate
    try:
        return read(content)
    except ValidationError as e:
        extra = [p["loc"] for p in e.errors() if p["type"] == "extra_forbidden"]
        # Without what pydantic calls the member of a union.
        added = [[k for k in loc if not str(k).startswith("[")] for loc in extra]
        if not added:
            raise
        # Both raise when more is wrong than that. A tree may have a section that allows keys, and they are to stay.
        pruned = _without(content, added) if isinstance(content, dict) else None
        found = read(content, extra="ignore") if pruned is None else read(pruned)
        if not TOLD:  # once is enough: a run that has one has many
            first = ".".join(map(str, added[0]))
            print(
                f"note: a newer rlaif wrote this run: its {record.__name__} has `{first}`, which this one doesn't "
                "know; such keys are left out",
                file=sys.stderr,
            )
        TOLD.add(record.__name__)
        return found


def _without(tree: dict[str, Any], places: list[list[Any]]) -> dict[str, Any] | None:
    """A tree without the keys at some places; None where one isn't there, since a validator had moved it."""
    tree = copy.deepcopy(tree)
    for *way, key in places:
        at: Any = tree
        try:
            for step in way:
                at = at[step]
            del at[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


class Message(Record):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(Record):
    """What the policy is asked: one or more chat messages, the last one from the user."""

    id: str
    messages: tuple[Message, ...]
    category: str | None = None

    @property
    def text(self) -> str:
        """The last user message, as people read it."""
        return self.messages[-1].content


class PolicyVersion(Record):
    """Which weights sampled: the number of updates behind them, and the digest of the weights."""

    iteration: int
    digest: str


class Completion(Record):
    """One sampled answer, as token ids and as text. `token_ids` are as sampled, what ended them included iff
    `finish_reason` is stop (an end token, or what `sampling.stop` names); `text` is what counts as the answer: without
    that, and without thoughts where `policy.thinking` strips them."""

    id: str
    prompt_id: str
    policy: PolicyVersion
    index: int
    seed: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprob: float | None = None
    """Sum of the sampled tokens' log p under the policy (nats, untempered), where the engine reports it."""

    @property
    def cut_off(self) -> bool:
        """The length limit ended it."""
        return self.finish_reason == "length"


class TokenSequence(Record):
    """A prompt and a completion of it, as token ids: what is scored."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]

    @property
    def all_ids(self) -> tuple[int, ...]:
        """The prompt's tokens, then the completion's."""
        return (*self.prompt_token_ids, *self.token_ids)


class WeightsGap(Record):
    """How far apart the weights that sample and those that are trained are: fixed texts, scored by both."""

    tokens: int
    """Tokens compared."""
    mean: float
    """|Mean over them of log p(sampler) - log p(learner)|, in nats: rounding averages out, other weights don't."""
    typical: float
    """Mean of |log p(sampler) - log p(learner)|, in nats: about 0 in fp32, some 0.05 where the sampler computes in
    bf16."""
    worst: float
    """The largest |log p(sampler) - log p(learner)|, in nats."""
    sampler: str
    """Engine and precision that the sampler computes in."""
    exported: str
    """Precision of the weights that the sampler was given."""

    def within(self, limit: float) -> bool:
        """Whether `mean` is at most `limit`, and `typical` at most ten times that."""
        return self.mean <= limit and self.typical <= 10 * limit


class DecodingGap(Record):
    """How far apart answers as they were sampled and the weights that are trained are: some answers whose log p was
    recorded while they were decoded, token by token, scored again by the learner, each in one pass."""

    answers: int
    """Answers compared: the longest of the iteration's, and some drawn from the others."""
    tokens: int
    mean: float
    """|Mean over their tokens of log p(as recorded) - log p(learner)|, in nats; both are raw, at temperature 1 and
    top-p 1, whatever was sampled with."""
    error: float
    """Standard error of `mean`, over the answers: few short ones say little. 0 for a single one."""
    typical: float
    """Mean over the tokens of their answer's |difference a token|, in nats. Within an answer rounding averages out."""
    worst: float
    """The largest |difference a token| of an answer, in nats."""
    scored_by: Literal["learner", "sampler"] = "learner"
    """`sampler`: in one pass by the weights that sampled, where the learner has gone on from these (`staleness`)."""

    def within(self, limit: float) -> bool:
        """Whether `mean` is at most `limit`, but for what chance does in so few answers (two standard errors), and
        `typical` at most ten times that."""
        return self.mean - 2 * self.error <= limit and self.typical <= 10 * limit


class Score(Record):
    """A judge's score of a single completion by one voice; used to choose pairs, never to decide them."""

    completion_id: str
    prompt_id: str
    voice: str
    value: float


class Quality(Record):
    """How sane a completion is, measured under the frozen base; no label, never trains."""

    completion_id: str
    tokens: int
    logprob_per_token: float
    """Mean over tokens of log p(y | its prompt), nats."""
    relevance: float
    """Mean over tokens of log p(y | its prompt) - log p(y | another prompt), nats."""


class Divergence(Record):
    """How far the policy is from the base policy over one completion that was sampled at temperature 1 and top-p 1."""

    completion_id: str
    prompt_id: str
    tokens: int
    kl: float
    """Sum over its tokens' places of KL(policy, base) over the whole vocabulary, nats."""


class ProbeResult(Record):
    """Whether a policy passed a probe: a short question with one right answer."""

    probe_id: str
    kind: str
    """What the probe tests."""
    completion_id: str
    """The answer, drawn at temperature 0 (`probe_completions`)."""
    passed: bool


class TextScore(Record):
    """How likely a fixed text is to a policy."""

    text_id: str
    tokens: int
    """All of the text's, but the first, which nothing stands before."""
    logprob: float
    """Sum over them of log p(token | those before it) under the master weights, nats."""


class Pair(Record):
    """Two different completions of one prompt from the same policy version."""

    id: str
    prompt_id: str
    first: str
    second: str
    method: str
    selected_by: tuple[str, ...] = ()
    """Voices whose scores chose this pair; none of them may vote on it."""

    def swap(self) -> Pair:
        """The same pair shown the other way round."""
        return self.model_copy(update={"first": self.second, "second": self.first})


class VoiceKey(NamedTuple):
    """Which voice is asked: ballots of one pair and one key differ in the order shown alone."""

    judge: str
    voice: str
    principles: tuple[str, ...]
    sample_index: int


class Ballot(Record):
    """One fully determined question to one judge about one pair."""

    id: str
    pair_id: str
    judge: str
    voice: str
    principles: tuple[str, ...]
    guard: bool = False
    order: Order = "none"
    """Which completion is shown first; `none` for a judge without slots."""
    sample_index: int = 0
    seed: int = 0
    constitution: str
    """The constitution's hash."""
    template: str
    """Hash of the text or template that the question is rendered from."""
    parameters: str = ""
    """Digest of the judge's settings that could change the answer (a server's model, temperature, max_tokens, ...)."""

    @property
    def voice_key(self) -> VoiceKey:
        """The voice, whatever the pair and the order."""
        return VoiceKey(self.judge, self.voice, self.principles, self.sample_index)

    @property
    def question(self) -> tuple[object, ...]:
        """All but the pair: equal for the ballots of two pairs that ask the same."""
        b = self
        return *self.voice_key, b.guard, b.order, b.seed, b.constitution, b.template, b.parameters


class Usage(Record):
    """Tokens that a vote cost."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """All that was written, thoughts included, whether the server counts them in or beside."""
    cached_tokens: int = 0
    """Of the prompt's, those that the server had cached."""
    reasoning_tokens: int = 0
    """Of the completion's, those of thought."""
    estimated: bool = False
    """The server doesn't say: four characters a token."""


class Vote(Record):
    """The answer to a ballot. `first` means the pair's first completion, whichever order it was shown in."""

    ballot: Ballot
    model: str
    outcome: Outcome
    abstain_reason: AbstainReason | None = None
    p_first: float | None = None
    score_first: float | None = None
    """For a judge that scores: the voice's score of the first completion (nats)."""
    score_second: float | None = None
    logprobs: tuple[float, float] | None = None
    """Of a likelihood judge's guard: log p of the first completion and of the second one under the judge's model, of
    the tokens that were sampled, summed (nats). None where it read other tokens, or computes in less than fp32."""
    raw_reply: str
    finish_reason: str | None = None
    """As the server says it; None without a server, or without a reply."""
    prompt_hash: str | None = None
    """Digest of the rendered messages, as they were sent."""
    mass_neither: float | None = None
    """Where p(first) comes from label tokens: the probability that was on neither label."""
    error: str | None = None
    """What went wrong, for `infra_error`: one line, no secrets."""
    attempts: int = 1
    """Requests that were made for it; 0 when it came from the cache, or no server was asked."""
    reasked: int = 0
    """How often it was asked again, since a reply was empty or unreadable (`judge.reask`); `attempts` and `usage` hold
    those replies too."""
    fingerprint: str | None = None
    """What the server says of the model that answered: its `system_fingerprint` and what its list of models holds."""
    server: str | None = None
    """Which server answered: host, port and path. None where none was asked, none answered, or the run is older."""
    usage: Usage = Usage()
    latency_s: float = 0.0
    cached: bool = False
    """It cost this run nothing: from the cache, or another run's vote that was taken over (`source`)."""


class Verdict(Record):
    """All votes on one pair, aggregated. Guards are counted apart: they veto, they don't elect."""

    pair_id: str
    outcome: Outcome
    p_first: float | None
    agreement: float | None
    """Weighted share of the valid votes that name the winner; None without a valid vote."""
    valid_votes: int
    """Votes that the outcome follows from."""
    electing_votes: int | None = None
    """All votes but the guards': valid ones, abstentions, and those left out (a voice that answered in one of its two
    orders, a juror of weight 0). None in runs that began before this was counted."""
    abstentions: dict[AbstainReason, int] = Field(default_factory=dict)
    order_flip: bool = False
    slot_first: int = 0
    """Position bias: votes for the slot shown first, among ..."""
    slot_votes: int = 0
    """... votes for either slot by voices that were asked in both orders."""
    guard_first: int = 0
    """Guard votes for the first completion (that is, against the second)."""
    guard_second: int = 0
    guard_missing: int = 0
    """Guards that were asked and have no valid vote: nobody knows whether they would veto."""

    @property
    def abstained_of(self) -> tuple[int, int]:
        """Abstentions, and the votes that they are among."""
        lost = sum(self.abstentions.values())
        return lost, lost + self.valid_votes if self.electing_votes is None else self.electing_votes


class Decision(Record):
    """The filter's word on a verdict, or on a data set's label, and every rule that spoke against it."""

    pair_id: str
    status: Literal["kept", "dropped", "review"]
    reasons: tuple[Reason, ...]
    winner: Side | None
    verdict: Verdict
    said: dict[CodeName, str] = Field(default_factory=dict)
    """What rules of the job's own (`filters.rules`) said against it, by rule."""
    review_rule: ReviewRule | None = None
    """The setting of `filters.review` that sent the pair to review."""
    source: Literal["votes", "data"] = "votes"
    """Who says which side is better: the votes on the pair, or (`data`) the label of the data set that it is from. Then
    nobody voted, and the verdict is empty."""


class HumanLabel(Record):
    """A reviewer's word on a pair: one line of review/labels.jsonl, appended, never changed. The newest counts."""

    pair_id: str
    iteration: int
    """The iteration that sampled and judged the pair."""
    outcome: Literal["first", "second", "tie", "skip"]
    author: str
    time: str
    """UTC, ISO 8601."""
    reason: str | None = None
    constitution: str | None = None
    """Hash of the text that the reviewer had before them; None: the one that the pair was judged under."""


class TrainingRow(Protocol):
    """What the loop asks of a row that trains, whatever its type: `Preference` today."""

    @property
    def row_id(self) -> str:
        """What an update step names it by; no two rows of an iteration share one."""
        ...

    @property
    def source(self) -> RowSource:
        """Who said so: this iteration's judge, that of an earlier one, a person, or a data set's label."""
        ...


class Preference(Record):
    """Exactly what training saw: token ids as sampled, with their provenance."""

    pair_id: str
    iteration: int
    """The iteration that sampled and judged the pair."""
    source: RowSource
    constitution: str
    """Hash of the text that the verdict, or the person's word, is about. Of a replayed pair whose votes answer the
    questions of a later text, too, that one. Empty for a data set's label, which no text was asked about."""
    prompt_id: str
    chosen_id: str
    rejected_id: str
    prompt_token_ids: tuple[int, ...]
    chosen_token_ids: tuple[int, ...]
    rejected_token_ids: tuple[int, ...]
    prompt: str
    chosen: str
    rejected: str
    p_chosen: float | None
    agreement: float | None

    @property
    def sequences(self) -> tuple[TokenSequence, TokenSequence]:
        """The chosen and the rejected completion after their prompt."""
        chosen, rejected = (
            TokenSequence(prompt_token_ids=self.prompt_token_ids, token_ids=ids)
            for ids in (self.chosen_token_ids, self.rejected_token_ids)
        )
        return chosen, rejected

    def swap(self) -> Preference:
        """The same pair with the other side chosen."""
        return self.model_copy(
            update={
                "chosen_id": self.rejected_id,
                "rejected_id": self.chosen_id,
                "chosen_token_ids": self.rejected_token_ids,
                "rejected_token_ids": self.chosen_token_ids,
                "chosen": self.rejected,
                "rejected": self.chosen,
                "p_chosen": None if self.p_chosen is None else 1 - self.p_chosen,
            }
        )

    @property
    def row_id(self) -> str:
        """The pair's: a pair trains at most once an iteration."""
        return self.pair_id


Standing = Literal["kept", "turned", "dropped", "expired", "stale", "waiting"]
OnChange = Literal["expire", "rejudge", "keep"]


class OldPair(Record):
    """What a text made of a pair that was judged under an earlier one; the newest row of a pair and a text counts."""

    pair_id: str
    iteration: int
    """The iteration that sampled the pair."""
    source: Literal["judge", "human"]
    """Whose word it trained on before."""
    before: str
    """Hash of the text that it was judged under then."""
    constitution: str
    """Hash of the text that this row is about."""
    standing: Standing
    """`kept`: it may train as before. `turned`: it may train, with the other side chosen. `dropped`: the filters keep
    it no longer. `expired`: some of what was asked about it isn't asked any more. `stale`: the same, and it may train
    all the same (`replay.on_change: keep`). `waiting`: it isn't judged again yet."""
    on_change: OnChange | None = None
    """`replay.on_change` then. A run that goes on with another one looks at the pair again."""
    carried: int = 0
    """Votes that answer what the new text asks."""
    lost: int = 0
    """Votes that don't."""
    asked: int = 0
    """Ballots that had to be cast for it."""
    decision: Decision | None = None
    """By the votes that answer the new text's ballots; None where there is none yet, or a person's word counts."""


class BaseLogprob(Record):
    """How likely a completion is under the untrained policy, as the judge found: what a learner's reference is."""

    completion_id: str
    tokens: int
    """Of the completion."""
    logprob: float
    """log p(completion | prompt) of the tokens that were sampled, summed, in nats."""


class PolicyDistance(Record):
    """How far the policy has moved on an old pair's completions since it sampled them."""

    pair_id: str
    tokens: int
    """Of both completions."""
    distance: float
    """|log p now - log p then| of each completion, summed over both and divided by `tokens`: nats a token. Now is the
    learner's policy before the update; within a completion the tokens' differences add up, since their sum is what was
    recorded then."""


class UpdateStep(Record):
    """One optimizer step: which rows went into it, and what it did."""

    step: int
    """Global step over the whole run, from 1."""
    iteration: int
    row_ids: tuple[str, ...]
    """A preference's is its `pair_id`. Schema 1 called them `pair_ids`."""
    loss: float
    grad_norm: float
    """Before it was clipped."""
    learning_rate: float
    seconds: float
    metrics: dict[str, float]
    """What this kind of learner measures beside these. Schema 1 had `margin` and `accuracy` as fields."""
    notes: tuple[str, ...] = ()
    """What the learner has to say of the update; most often nothing."""

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, row: Any) -> Any:
        """A row of schema 1 as one of schema 2."""
        if not isinstance(row, dict) or not {"pair_ids", *_OF_PAIRS} <= row.keys():
            return row
        rest = {key: value for key, value in row.items() if key not in ("pair_ids", *_OF_PAIRS)}
        return {"row_ids": row["pair_ids"], "metrics": {name: row[name] for name in _OF_PAIRS}} | rest


_OF_PAIRS = ("margin", "accuracy")
"""What every learner measured when schema 1 was written."""


class ConstitutionRef(Record):
    """A text in force: its name for people, its hash for identity."""

    name: str
    version: int
    hash: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class PlanTexts(Record):
    """The text in force, with what its judge reads beside it."""

    constitution: ConstitutionRef
    templates: dict[str, str] = Field(default_factory=dict)
    """As in `Plan`."""
    derived: dict[str, str] = Field(default_factory=dict)
    """As in `Plan`."""


class PlanSource(Record):
    """Where an iteration's pairs are from, in a run with a `source`: nothing is sampled for it."""

    path: str
    """Of the run or the data, as the job names it."""
    iteration: int | None = None
    """Of that run, from 0; null for data."""
    iterations: tuple[int, ...] = ()
    """Those of that run which are taken in turn."""
    named: bool = False
    """The job names these iterations; else they are all that were judged when the first of them was taken."""
    position: int | None = None
    """Of data: the place of the iteration among those that it gave rows to, from 0; null for a run."""
    rows: tuple[str, ...] = ()
    """Of data: the rows that are taken, by their ids. Older plans name none: each took `prompts.per_iteration` of them,
    after as many of each iteration before."""
    sha256: str
    """Of what was read: a source that changes is noticed."""
    rejudged: bool = False
    """Its pairs are judged under the text in force; else their labels are as stored."""
    in_force: PlanTexts | None = None
    """By which held-out answers are judged, where labels are as stored and were given under another text than the one
    in force: the plan's own `constitution` is the one that the pairs were judged under."""


class Plan(Record):
    """What an iteration will do, written before it does anything."""

    iteration: int
    seed: int
    constitution: ConstitutionRef
    """The text that its pairs are judged under."""
    templates: dict[str, str] = Field(default_factory=dict)
    """Judge templates in force, for a judge that reads: name → hash."""
    derived: dict[str, str] = Field(default_factory=dict)
    """Wordings by which contrasts that the text lacks are derived from its rules, for a likelihood judge: id → hash."""
    code: dict[str, str] = Field(default_factory=dict)
    """Code of the user's own that the job names: `module:name` → sha256 of its source."""
    policy: PolicyVersion
    """That samples, and unless it is stale begins the iteration; with a `source` it samples nothing."""
    staleness: int = 0
    """Iterations, of which each may have updated the policy, between that one and the one that begins the iteration
    (`pipeline.staleness`)."""
    prompt_ids: tuple[str, ...]
    evaluate: bool
    source: PlanSource | None = None
    """Where its pairs are from; null: from the policy."""

    @property
    def labels_as_stored(self) -> bool:
        """Its pairs have been judged before, by whomever."""
        return self.source is not None and not self.source.rejudged

    @property
    def in_force(self) -> Plan:
        """The same under the text in force, as held-out answers are judged: another one than the pairs' where they have
        labels as they were stored."""
        text = self.source.in_force if self.source else None
        if text is None:
            return self
        return self.model_copy(update={name: getattr(text, name) for name in PlanTexts.model_fields})


class AnswerStats(Record):
    """What can be counted about answers without a judge."""

    answers: int
    mean_words: float
    mean_tokens: float
    list_share: float
    """Answers with two list items or more."""
    ended_share: float
    """Answers that ended by themselves, not at the length limit."""
    distinct_share: float
    """Different answers to a prompt, among all."""
    distinct_1_in_100: float | None = None
    """Different words that 100 words hold, drawn at random from all answers: on average, over 100, letter case aside.
    Unlike distinct-1 it doesn't fall as answers grow longer. None with fewer words, and in what older versions wrote:
    their `distinct_1` and `distinct_2` are other numbers, and are left out."""
    distinct_2_in_100: float | None = None
    """The same of pairs of neighbouring words."""
    repeated_line_share: float | None = None
    """Lines and sentences that stood in their answer before, over all of them. None in what older versions wrote."""

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, stats: Any) -> Any:
        if not isinstance(stats, dict):
            return stats
        return {key: value for key, value in stats.items() if key not in ("distinct_1", "distinct_2")}


class JudgedStats(Record):
    """What judged pairs look like without their labels: those of a calibration beside those of an iteration."""

    pairs: int
    kept: int
    mean_agreement: float | None
    """Over the pairs with a valid vote; None without one."""
    agreement_sd: float | None
    """Standard deviation over the same pairs."""
    agreeing: int | None = None
    """How many those are; None in what older versions wrote."""
    mean_words: float
    """Of an answer."""
    answers: int
    """Those of which it is known how they ended; of the others nothing says that they were cut off."""
    cut_off: int
    """Of these, the ones that the length limit ended."""
    one_cut_off: int
    """Pairs with one answer that was cut off and one that ended: there a missing end can decide."""


class AnswerCounts(Record):
    """Of an iteration's sampled answers, what monitors of the policy look at."""

    mean_words_error: float | None
    """Standard error of `sampled.mean_words`, over the prompts; None with fewer than two."""
    ended_error: float | None = None
    """The same of `sampled.ended_share`; None in what older versions wrote, too."""
    prompts: int | None = None
    """How many prompts were answered; None in what older versions wrote."""
    nats_per_token: float | None
    """-log p of a sampled token on average, under the policy and untempered: how open it still is. None where the
    engine reports none."""
    vocabulary: float | None
    """Different words in 200 of all answers' words, drawn without replacement: the expected number. None with fewer."""
    self_praise: int
    """Answers that praise themselves."""
    to_judge: int
    """Answers with words to whoever judges them."""


class PairCounts(Record):
    """Of an iteration's judged pairs, how many are so: what charts of the judge are made of."""

    pairs: int
    abstained: int
    """Without a valid vote."""
    unanimous: int
    """Whose valid votes all name one side."""
    flipped: int
    """On which a voice gave another answer when the order changed."""
    kept: int
    leans_first: int = 0
    """On which voices that were asked in both orders named the slot shown first more often than the other, and ..."""
    leans_second: int = 0
    """... less often. On all others the slots are even. Both 0 in runs from before they were counted."""


class Leaning(Record):
    """Whether winners have more of something than losers do."""

    more: int
    """Winners that have more of it than the loser, among ..."""
    pairs: int
    """... kept pairs in which one side has more."""


class AnchorCounts(Record):
    """What became of verdicts when their pairs were asked about again."""

    pairs: int
    """With a verdict both times."""
    moved: int
    """Whose verdict is another now."""


class AgainstBase(Record):
    """Held-out answers against the base policy's, counted as an evaluation's are."""

    win_rate: float | None
    """As an evaluation's, and so the rest."""
    win_interval: tuple[float, float] | None
    wins: int
    losses: int
    undecided: int
    abstained: int
    asked: int | None = None


class UnderText(AgainstBase):
    """Held-out answers against the base policy's, judged under another text than that of their evaluation."""

    constitution: ConstitutionRef


class IterationMetrics(Record):
    """metrics.json of an iteration. What has a default was not counted yet when the first runs were written."""

    iteration: int
    constitution: ConstitutionRef
    policy: PolicyVersion
    """The one that sampled; with a `source`, the one that began the iteration."""
    staleness: int = 0
    """The plan's."""
    sampled: AnswerStats
    given: bool = False
    """Its answers are those of a `source`: the policy sampled none."""
    pairs: int
    votes: int
    ballots_saved: int = 0
    """Not asked, by `judge.early_stop`."""
    abstentions: dict[AbstainReason, int]
    """Votes that named nothing."""
    kept: int
    kept_share: float | None
    """None without a pair."""
    review: int = 0
    """Pairs sent to people."""
    dropped_by_first_reason: dict[Reason, int]
    mean_agreement: float | None
    """None without a valid vote."""
    trained_pairs: int
    """0 when the update was skipped; the first versions counted the pairs that it would have taken."""
    human_pairs: int = 0
    """Of those, as people labelled them."""
    replayed_pairs: int
    old_pairs: dict[Standing, int] = Field(default_factory=dict)
    """What the text in force made of pairs that were judged under others (`OldPair.standing`); empty where none were
    owed that."""
    steps: int
    """Optimizer steps; 0 when the update was skipped."""
    loss: float | None
    """Mean over the steps, as the next two; None without an update."""
    grad_norm: float | None
    learner_metrics: dict[str, float]
    """`metrics` of the steps, by name; empty without an update. Schema 1 had `margin` alone, as a field."""
    stopped_at_kl: float | None = None
    """KL, nats a token, at which the update stopped before its last step (`learner.max_kl`); None where it took all."""
    order_flips: int = 0
    """Pairs on which a voice gave another answer when the order changed."""
    position_bias: float | None = None
    """Share of votes for the slot shown first; None for a judge without slots."""
    one_cut_off: int = 0
    """Pairs with a winner of whose two answers the length limit cut off one ..."""
    cut_off_won: int = 0
    """... and those of them whose winner is that one, kept or not."""
    juror_weights: dict[str, float] = Field(default_factory=dict)
    """What each juror's votes weighed (`filters.aggregate: dawid_skene`); empty without such a jury."""
    juror_agreement: dict[str, float | None] = Field(default_factory=dict)
    """Juror → share of the pairs on which it names the verdict's side, of those on which both name one; empty without
    a jury."""
    judged: JudgedStats | None = None
    """What the judged pairs look like, for `monitors` to hold against the calibration's."""
    pair_counts: PairCounts | None = None
    """Of the judged pairs, for charts of the judge; None in what older versions wrote, as the next."""
    answer_counts: AnswerCounts | None = None
    """Of the sampled answers, for monitors of the policy."""
    anchors: AnchorCounts | None = None
    """What was asked again; None where nothing was."""
    leanings: dict[Feature, Leaning] = Field(default_factory=dict)
    """What winners have more of."""
    servers: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Juror → server → votes that it answered, where the juror was asked anew; a server of the juror's list that
    answered none has 0. Empty for a judge without a server."""
    at_change: UnderText | None = None
    """What the held-out answers of the policy before it win under its text, where that is another than before: where
    following begins. None in other iterations, and in runs from before it was measured."""
    judge_calls: int = 0
    """Requests to the judge's servers. These, `servers` and the next two count votes on old pairs, on anchors and at a
    change of text, too."""
    judge_cached: int = 0
    """Votes from the cache."""
    judge_tokens: int
    """Of votes that were not from the cache."""
    judge_tokens_per_kept_pair: float | None = None
    seconds: dict[str, float]
    """Wall time by stage."""
    wall_s: float | None = None
    """Seconds from the end of the iteration before it, or from where a process took the run up, to its own end: less
    than its stages together where some ran at the same time. None in runs that began before it was measured."""
    streamed_votes: int | None = None
    """Votes that were there before the last completion was; None where nothing was streamed (`pipeline.stream`)."""
    weights_gap: WeightsGap | None = None
    """Of the policy that was sampled from; None in a run that didn't measure it."""
    decoding_gap: DecodingGap | None = None
    """Of the answers that were sampled; None in a run that didn't measure it."""

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, metrics: Any) -> Any:
        """Metrics of schema 1 as those of schema 2."""
        return lift_metrics(metrics)


def lift_metrics(metrics: Any) -> Any:
    """metrics.json of an iteration, as JSON of either schema, as schema 2 has it."""
    if not isinstance(metrics, dict) or "margin" not in metrics or "learner_metrics" in metrics:
        return metrics
    rest = {key: value for key, value in metrics.items() if key != "margin"}
    return rest | {"learner_metrics": {} if metrics["margin"] is None else {"margin": metrics["margin"]}}


class Referred(AgainstBase):
    """Held-out answers against the base policy's, as the reference judge says (`eval.reference_judge`)."""

    judge: str
    """Who it is, as ballots name it."""


class ProbeCounts(Record):
    """Probes by what the base policy and a later one made of them."""

    probes: int
    base_passed: int
    """By the base policy. Only these can be forgotten."""
    kept: int
    """Of those, passed by this policy, too."""
    gained: int
    """Passed by this policy and not by the base policy."""


class Retention(Record):
    """What a policy still can of what the base policy could (`eval.retention`)."""

    probes: ProbeCounts
    kept_share: float | None
    """`kept` over `base_passed`. None where the base policy passed none."""
    kept_interval: tuple[float, float] | None
    """Wilson, 95 %, over those probes."""
    by_kind: dict[str, ProbeCounts]
    """The same by what a probe tests."""
    perplexity: float | None
    """Of the fixed texts: exp(-mean log p a token). None, as the next two, where the tokenizer knows none of their
    words."""
    base_perplexity: float | None
    """The base policy's."""
    perplexity_ratio: float | None
    """`perplexity` over `base_perplexity`: above 1 ordinary writing has become less likely."""
    perplexity_ratio_interval: tuple[float, float] | None
    """95 %, over the texts; None with fewer than two."""
    earlier: dict[str, UnderText] = Field(default_factory=dict)
    """By the text's hash, each text that was in force before and isn't any more."""


class EvaluationMetrics(AnswerStats):
    """metrics.json of an evaluation: held-out answers against the base policy's."""

    updates: int
    """After so many iterations; 0 is the base policy."""
    constitution: ConstitutionRef
    win_rate: float | None
    """Undecided answers as half a win, abstained ones left out: mean over the prompts of the mean over a prompt's
    answers. None when nobody was asked, and when the judge abstained on every answer that it was asked about."""
    win_interval: tuple[float, float] | None
    """Wilson, 95 %, over so many prompts."""
    length_controlled_win_rate: float | None = None
    """The win rate as it would be if answers had as many words as the base policy's: a logistic model of the verdict
    with a term for length, at no difference (Dubois et al. 2024). Read it beside the raw one: a text may ask for
    length. None where it can't be told, and in what older versions wrote."""
    length_controlled_interval: tuple[float, float] | None = None
    """95 %, over the prompts."""
    length_controlled_unknown: LengthUnknown | None = None
    """Why it can't be told: verdicts on fewer than 10 prompts; all verdicts for one side; every answer longer by the
    same number of words, so that the effect of length doesn't show. Or `no_overlap`: longer answers than the base
    policy's on fewer than 5 prompts, or shorter ones, so that next to nothing was seen near equal length. Older
    versions told a rate there, which was close to the raw one."""
    wins: int
    losses: int
    undecided: int
    """Answers with a tied verdict, and answers equal to the base policy's, which nobody is asked about."""
    abstained: int = 0
    """Answers without a valid vote (failed calls, unreadable replies); the first versions counted them as undecided."""
    asked: int | None = None
    """Answers that somebody was asked about: those unlike the base policy's. None in what older versions wrote."""
    kl_per_token: float | None
    """KL(policy, base), nats: the sum of `kl` over the sum of `tokens` (Divergence); 0 for the base policy itself, None
    when not measured (`eval.kl_prompts: 0`). Where `kl_answers` is null it is what older versions wrote: the mean of
    log p(policy) - log p(base) over the held-out answers' tokens, off by temperature and top-p, even in its sign."""
    kl_interval: tuple[float, float] | None = None
    """95 %, over the prompts; None with fewer than two."""
    kl_per_completion: float | None = None
    """Mean of `kl` over the answers: of a whole answer, up to the length limit."""
    kl_per_completion_interval: tuple[float, float] | None = None
    """As `kl_interval`."""
    kl_answers: int | None = None
    """Answers that KL was measured on; none are needed for the base policy. Null in runs that began before it was."""
    relevance: float
    """Mean over the answers, as the next (Quality)."""
    base_logprob_per_token: float
    checks: dict[str, float]
    """Principle → share of the answers that pass its check."""
    base_checks: dict[str, float] = Field(default_factory=dict)
    """The same of the base policy's answers; empty about the base policy, and in what older versions wrote."""
    deciding: AgainstBase | None = None
    """The same held-out answers by the voices that decide which pairs train (`eval.deciding_voices`)."""
    referred: Referred | None = None
    """What a judge that never trains says of the same answers; None without one."""
    seconds: float
    weights_gap: WeightsGap | None = None
    """Of the policy that was evaluated; None in a run that didn't measure it."""
    retention: Retention | None = None
    """What of the base policy's abilities is left; None where it isn't measured (`eval.retention`)."""

    @property
    def kl_by_older_version(self) -> bool:
        """`kl_per_token` is the biased estimate of older versions."""
        return self.kl_answers is None and self.kl_per_token is not None


class Alarm(Record):
    """A finding that somebody should look at, with its numbers: the `data` of an event of kind `alarm`."""

    kind: AlarmKind
    iteration: int
    """The one that it was found in, from 0."""
    message: str
    """One sentence."""
    measured: float | None = None
    """What was found, where it is one number."""
    limit: float | None = None
    """What it was held against, as the setting has it."""
    since: int | None = None
    """The iteration from which on it is so, where it is found by several; None: by this one."""
    action: Literal["warn", "pause", "rollback"] = "warn"
    """What the run does: notes it and goes on, stops, or stops to be taken back (`monitors.KIND.action`). The first
    versions called a pause `stop`."""

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, alarm: Any) -> Any:
        if isinstance(alarm, dict) and alarm.get("action") == "stop":
            return alarm | {"action": "pause"}
        return alarm


class Parent(Record):
    """The run that another one went on from: `parent` in its run.json (runs.md)."""

    run: str
    """Name of its folder, which lies beside the run's own."""
    iterations: int
    """How many of its iterations are the run's own past."""
    head: str | None
    """Its head after them, as `5:3f2a...`, which stands in the run's own heads.jsonl too; null where it had none."""


class Event(Record):
    """One line of events.jsonl."""

    time: str
    """UTC, ISO 8601."""
    kind: str
    iteration: int | None = None
    message: str
    data: dict[str, Any] = Field(default_factory=dict)
