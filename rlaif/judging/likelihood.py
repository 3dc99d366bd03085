"""The embedded judge: a frozen language model that compares likelihoods.

In: ballots, pairs, candidates and a constitution. Out: votes, scores and plain likelihoods, in chunks. For a
voice with a wanted and an opposite side,

    score(y) = log p(y | prefer, x) - log p(y | avoid, x)          (nats, summed over the sampled tokens)

where a side is an instruction (a system message) or examples (earlier chat turns). A completion that was cut off has
no end token to score (`reading`) and pays `judge.missing_eos_penalty` instead, or the way to please a text that asks
for more would be never to stop. See docs/judges.md for what was measured, and for what this judge can't do.

How log p is computed, and how seldom, is in `kv_scoring`: a completion is scored once under each context however many
ballots ask.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlaif.config import LikelihoodSettings
from rlaif.constitutions.constitution import Constitution, Voice
from rlaif.judging.ballots import GUARD_MEASURES
from rlaif.judging.cache import LikelihoodCache
from rlaif.judging.candidates import Candidate
from rlaif.judging.kv_scoring import KV_BATCHES, Continuation, KVScorer, Likelihoods, load_frozen
from rlaif.judging.outcomes import said_by_guard, said_by_scores, tolerances
from rlaif.judging.reading import Reader
from rlaif.records import (
    Ballot,
    Message,
    Pair,
    Prompt,
    Quality,
    Record,
    Score,
    Usage,
    Vote,
)


def make(model_path: str, settings: LikelihoodSettings) -> LikelihoodJudge:
    """Factory for a worker process."""
    return LikelihoodJudge(model_path, settings)


class Plain(Record):
    """How likely a completion is under the frozen model itself. Sums are in nats."""

    completion_id: str
    other_prompt_id: str
    """The prompt x' that relevance was measured against."""
    tokens: int
    """Scored tokens; 0 for an empty completion, whose likelihoods are then 0 as well."""
    logp: float
    """Sum of log p(y | x)."""
    logp_other: float
    """Sum of log p(y | x')."""

    @property
    def logp_per_token(self) -> float:
        """Fluency: mean log p of a token, in nats."""
        return self.logp / max(self.tokens, 1)

    @property
    def relevance(self) -> float:
        """Mean of log p(token | x) - log p(token | x'), in nats."""
        return (self.logp - self.logp_other) / max(self.tokens, 1)


class LikelihoodJudge:
    """Scores, votes and plain likelihoods by one frozen causal language model with a chat template.

    A vote's p(first) is sigmoid((score(first) - score(second)) / `settings.score_temperature`).
    """

    def __init__(self, model_path: str, settings: LikelihoodSettings, name: str | None = None):
        """Loads a local model folder on the GPU or the CPU. `name` is recorded in votes.

        Raises:
            UserError: the folder holds no model, or its tokenizer has no chat template.
        """
        model, tokenizer = load_frozen(model_path, settings.precision)
        self._setup(model, tokenizer, settings, name or Path(model_path).name)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, settings: LikelihoodSettings, name: str = "given") -> LikelihoodJudge:
        """A judge of a model and tokenizer that are already loaded (tests, notebooks)."""
        judge = cls.__new__(cls)
        judge._setup(model, tokenizer, settings, name)
        return judge

    def _setup(self, model: Any, tokenizer: Any, settings: LikelihoodSettings, name: str) -> None:
        self.settings = settings
        self.name = name
        vocabulary: int = model.get_input_embeddings().num_embeddings
        self.reader = Reader(tokenizer, name, settings.chat_template_args, _end_tokens(model, vocabulary), vocabulary)
        """What it makes of messages and completions."""
        questions = [(Message(role="user", content=text),) for text in ("Hi", "What is bread made of?")]
        answer = self.reader.context(questions[-1])[:16]
        trial = [Continuation(self.reader.beginning(()), self.reader.context(q), answer) for q in questions]
        self.scorer = KVScorer(model, name, settings.batch_tokens, trial)
        """What computes; votes ask it through a memory."""
        self._likelihoods = Likelihoods(self.scorer)

    def remember(self, store: LikelihoodCache, weights: str) -> None:
        """From now on takes what was computed before from a store, and puts there what is new.

        Args:
            weights: Identity of the model's files; what else its arithmetic depends on is found here.
        """
        self._likelihoods.remember(store, weights)

    def rest(self) -> None:
        """Weights go to RAM. Until it wakes nothing can be computed."""
        self.scorer.memory.rest()

    def wake(self) -> None:
        """They come back."""
        self.scorer.memory.wake()

    def score(
        self, candidates: Sequence[Candidate], constitution: Constitution, voices: Sequence[str]
    ) -> Iterator[list[Score]]:
        """Scores of single completions by the given voices, voice by voice, in chunks. Empty ones get no score.

        A score is the summed log-ratio divided by the square root of its number of tokens, so that the best
        and the worst of several samples are not simply the longest ones.
        """
        for name in voices:
            voice = constitution.voice(name)
            for chunk in self._chunks(candidates, lambda c: len(self.reader.answer(c))):
                scored = [c for c in chunk if self.reader.answer(c)]
                values = self._contrast(voice, scored)
                yield [
                    Score(
                        completion_id=c.completion_id,
                        prompt_id=c.prompt_id,
                        voice=name,
                        value=value / math.sqrt(len(self.reader.answer(c))),
                    )
                    for c, value in zip(scored, values, strict=True)
                ]

    def cast(
        self,
        ballots: Sequence[Ballot],
        pairs: Sequence[Pair],
        candidates: Sequence[Candidate],
        constitution: Constitution,
        prompts: Sequence[Prompt] = (),
    ) -> Iterator[list[Vote]]:
        """Votes on the given ballots, in chunks: write each before asking for the next.

        `pairs` and `candidates` are the whole call's, also when only some ballots are still owed: chunks follow from
        them, so a resumed run asks the same. The guards' other prompts are drawn from `prompts` (default: the
        candidates' own). A vote is `cached` when nothing of its chunk had to be computed (`remember`).
        """
        by_id = {c.completion_id: c for c in candidates}
        others = _prompts(candidates) if not prompts else {p.id: p.messages for p in sorted(prompts, key=_by_id)}
        owed: dict[str, dict[str, list[Ballot]]] = {}
        for ballot in ballots:
            owed.setdefault(ballot.voice, {}).setdefault(ballot.pair_id, []).append(ballot)
        for voice, of_pair in owed.items():
            for chunk in self._chunks(
                pairs, lambda p: sum(len(self.reader.answer(by_id[i])) for i in (p.first, p.second))
            ):
                if not any(pair.id in of_pair for pair in chunk):
                    continue
                started = time.monotonic()
                asked_anew = self._likelihoods.asked_anew
                sides = [by_id[i] for pair in chunk for i in (pair.first, pair.second)]
                if voice.rpartition("/")[2] in GUARD_MEASURES:
                    seed = next(b.seed for pair in chunk for b in of_pair.get(pair.id, ()))
                    answers = self._guard_answers(voice.rpartition("/")[2], sides, others, seed)
                else:
                    answers = self._contrast_answers(constitution.voice(voice), sides)
                seconds = round((time.monotonic() - started) / len(chunk), 4)
                stored = self._likelihoods.asked_anew == asked_anew
                yield [
                    Vote(ballot=b, model=self.name, attempts=0, latency_s=seconds, cached=stored, **answer)
                    for pair, answer in zip(chunk, answers, strict=True)
                    for b in of_pair.get(pair.id, ())
                ]

    def plain(
        self, candidates: Sequence[Candidate], prompts: Sequence[Candidate] | None = None, seed: int = 0
    ) -> Iterator[list[Plain]]:
        """Each completion's likelihood under its own prompt and under another one, in chunks.

        The other prompt is drawn, seeded by the completion's prompt, from those of `prompts` (default: of the
        candidates themselves).
        """
        others = _prompts(prompts or candidates)
        for chunk in self._chunks(candidates, lambda c: len(self.reader.answer(c))):
            yield self._plain(chunk, others, seed)

    def quality(
        self, candidates: Sequence[Candidate], prompts: Sequence[Candidate] | None = None, seed: int = 0
    ) -> Iterator[list[Quality]]:
        """`plain`, as means over tokens."""
        for chunk in self.plain(candidates, prompts, seed):
            yield [
                Quality(
                    completion_id=p.completion_id,
                    tokens=p.tokens,
                    logprob_per_token=p.logp_per_token,
                    relevance=p.relevance,
                )
                for p in chunk
            ]

    def _plain(self, chunk: Sequence[Candidate], prompts: dict[str, tuple[Message, ...]], seed: int) -> list[Plain]:
        others = [_other_prompt(c.prompt_id, c.messages, prompts, seed) for c in chunk]
        # Asked together: one completion's other prompt is another one's own, and is read once for both.
        logps = self._logps(
            [self._asked(c.messages, c) for c in chunk]
            + [self._asked(m, c) for c, (_, m) in zip(chunk, others, strict=True)]
        )
        own, other = logps[: len(chunk)], logps[len(chunk) :]
        return [
            Plain(
                completion_id=c.completion_id,
                other_prompt_id=o,
                tokens=len(self.reader.answer(c)),
                logp=a,
                logp_other=b,
            )
            for c, (o, _), a, b in zip(chunk, others, own, other, strict=True)
        ]

    def _contrast(self, voice: Voice, candidates: Sequence[Candidate]) -> list[float]:
        prefer = self._logps([self._asked(in_context(voice.prefer, c.messages), c) for c in candidates])
        avoid = self._logps([self._asked(in_context(voice.avoid, c.messages), c) for c in candidates])
        penalty = self.settings.missing_eos_penalty
        return [
            a - b - (penalty if c.finish_reason == "length" else 0.0)
            for c, a, b in zip(candidates, prefer, avoid, strict=True)
        ]

    def _contrast_answers(self, voice: Voice, sides: Sequence[Candidate]) -> list[dict[str, Any]]:
        values = self._contrast(voice, sides)
        out: list[dict[str, Any]] = []
        for first, second, a, b in zip(sides[::2], sides[1::2], values[::2], values[1::2], strict=True):
            tokens = (len(self.reader.answer(first)), len(self.reader.answer(second)))
            if not first.text.strip() or not second.text.strip() or 0 in tokens:
                out.append({"outcome": "abstain", "abstain_reason": "empty", "raw_reply": "{}"})
                continue
            said = said_by_scores(a - b, self.settings.score_temperature)
            out.append(
                {
                    "outcome": said.outcome,
                    "p_first": said.p_first,
                    "score_first": round(a, 4),
                    "score_second": round(b, 4),
                    "raw_reply": json.dumps({"score": [round(a, 4), round(b, 4)], "tokens": tokens}),
                    "usage": self._usage(voice, first, second),
                }
            )
        return out

    def _guard_answers(
        self, measure: str, sides: Sequence[Candidate], prompts: dict[str, tuple[Message, ...]], seed: int
    ) -> list[dict[str, Any]]:
        """A guard votes for the side that is better by more than its tolerance, and is even otherwise.

        Both sides are measured over as many tokens as the shorter one has: a question leaves its mark on an
        answer's first words, so a mean over all of them would speak against every longer answer.
        """
        asked = [self._asked(c.messages, c) for c in sides]
        others: list[str | None] = [None] * len(sides)
        tolerance = tolerances(self.settings)[measure]
        if measure == "relevance":
            drawn = [_other_prompt(c.prompt_id, c.messages, prompts, seed) for c in sides]
            others = [prompt_id for prompt_id, _ in drawn]
            asked += [self._asked(m, c) for c, (_, m) in zip(sides, drawn, strict=True)]
        # All in one call: one side's other prompt is another one's own, and is read once for both.
        values = self._likelihoods.logps(asked)
        own, unasked = values[: len(sides)], values[len(sides) :]
        if measure == "relevance":
            values = [tuple(x - y for x, y in zip(v, u, strict=True)) for v, u in zip(own, unasked, strict=True)]
        out: list[dict[str, Any]] = []
        for i in range(0, len(sides), 2):
            tokens = min(len(values[i]), len(values[i + 1]))
            if not tokens:
                out.append({"outcome": "abstain", "abstain_reason": "empty", "raw_reply": "{}"})
                continue
            a, b = (sum(v[:tokens]) / tokens for v in values[i : i + 2])
            reply: dict[str, Any] = {measure: [round(a, 4), round(b, 4)], "tokens": tokens, "tolerance": tolerance}
            if others[i] is not None:
                reply["other_prompt"] = others[i]
            out.append(
                {
                    "outcome": said_by_guard(a - b, tolerance).outcome,
                    "score_first": round(a, 4),
                    "score_second": round(b, 4),
                    "raw_reply": json.dumps(reply),
                    "logprobs": self._as_sampled(sides[i : i + 2], own[i : i + 2]),
                    "usage": Usage(
                        prompt_tokens=sum(len(self.reader.context(c.messages)) for c in sides[i : i + 2]),
                        completion_tokens=sum(len(v) for v in values[i : i + 2]),
                    ),
                }
            )
        return out

    def _as_sampled(self, sides: Sequence[Candidate], logps: Sequence[tuple[float, ...]]) -> tuple[float, ...] | None:
        """Summed log p of both sides, where they are of the policy's own tokens and not rounded to less than fp32.
        What isn't finite is no reference."""
        exact = str(self.scorer.model.dtype) == "torch.float32"
        same = all(
            (self.reader.context(c.messages), self.reader.answer(c)) == (c.prompt_token_ids, c.token_ids) for c in sides
        )
        sums = tuple(map(math.fsum, logps))
        return sums if exact and same and all(map(math.isfinite, sums)) else None

    def _usage(self, voice: Voice, first: Candidate, second: Candidate) -> Usage:
        contexts = [self.reader.context(in_context(side, first.messages)) for side in (voice.prefer, voice.avoid)]
        return Usage(
            prompt_tokens=2 * sum(map(len, contexts)),
            completion_tokens=2 * (len(self.reader.answer(first)) + len(self.reader.answer(second))),
        )

    def _chunks(self, items: Sequence[Any], tokens: Any) -> Iterator[Sequence[Any]]:
        """Consecutive items of about `KV_BATCHES` forward passes: what is lost when a run is killed."""
        budget = KV_BATCHES * self.settings.batch_tokens
        chunk: list[Any] = []
        used = 0
        for item in items:
            chunk.append(item)
            used += tokens(item)
            if used >= budget:
                yield chunk
                chunk, used = [], 0
        if chunk:
            yield chunk

    def _asked(self, messages: tuple[Message, ...], candidate: Candidate) -> Continuation:
        """A candidate's answer after these messages."""
        beginning, context = self.reader.beginning(messages[:-1]), self.reader.context(messages)
        return Continuation(beginning, context, self.reader.answer(candidate))

    def _logps(self, asked: Sequence[Continuation]) -> list[float]:
        """Summed log p of each answer's tokens, in nats."""
        return [math.fsum(logps) for logps in self._likelihoods.logps(asked)]


def _end_tokens(model: Any, vocabulary: int) -> tuple[int, ...]:
    """The model's own list, from its generation config or else its config; a default may be beyond its vocabulary."""
    for settings in (getattr(model, "generation_config", None), model.config):
        eos = getattr(settings, "eos_token_id", None)
        if eos is not None:
            return tuple(i for i in (eos if isinstance(eos, (list, tuple)) else (eos,)) if i < vocabulary)
    return ()


def in_context(context: tuple[Message, ...], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The context before the prompt; an instruction is added to the prompt's own system message, after it."""
    if messages[0].role != "system":
        return (*context, *messages)
    if context and context[0].role == "system":
        system = Message(role="system", content=f"{messages[0].content}\n\n{context[0].content}")
        return (system, *context[1:], *messages[1:])
    return (messages[0], *context, *messages[1:])


def _by_id(prompt: Prompt) -> str:
    return prompt.id


def _prompts(candidates: Sequence[Candidate]) -> dict[str, tuple[Message, ...]]:
    return {c.prompt_id: c.messages for c in sorted(candidates, key=lambda c: c.prompt_id)}


_FALLBACK = ("fallback", (Message(role="user", content="Tell me about the weather in the mountains."),))


def _other_prompt(
    prompt_id: str, messages: tuple[Message, ...], prompts: dict[str, tuple[Message, ...]], seed: int
) -> tuple[str, tuple[Message, ...]]:
    """Another prompt x', seeded; a fixed one when the batch has a single prompt."""
    others = [(i, m) for i, m in prompts.items() if i != prompt_id and m != messages]
    return random.Random(f"{seed}:{prompt_id}").choice(others) if others else _FALLBACK
