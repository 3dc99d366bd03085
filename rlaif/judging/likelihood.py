"""The embedded judge: a frozen language model that compares likelihoods. torch and transformers live here only.

In: ballots, pairs, candidates and a constitution. Out: votes, scores and plain likelihoods, in chunks. For a
voice with a wanted and an opposite side,

    score(y) = log p(y | prefer, x) - log p(y | avoid, x)          (nats, summed over the sampled tokens)

where a side is an instruction (a system message) or examples (earlier chat turns). The end token is scored iff
the completion ended by itself: the one that was sampled, where it ends a turn of this model, too, else the one that
its chat template writes. A completion that was cut off pays `judge.missing_eos_penalty` instead, or the way to please
a text that asks for more would be never to stop. See docs/judges.md for what was measured, and for what this judge
can't do.

Speed, on a CPU, is arithmetic: the KV of a context's shared beginning is computed once and expanded over the
batch, a prompt's own tokens once for all its completions, the output layer runs at completion positions only,
and a completion is scored once under each context however many ballots ask.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlaif import transformers_compat
from rlaif.config import LikelihoodSettings
from rlaif.constitutions.constitution import Constitution, Voice
from rlaif.errors import UserError
from rlaif.hardware import torch_dtype
from rlaif.judging.ballots import GUARD_MEASURES
from rlaif.judging.cache import LikelihoodCache, likelihood_key
from rlaif.judging.candidates import Candidate
from rlaif.judging.outcomes import said_by_guard, said_by_scores, tolerances
from rlaif.models import without_empty_quantisation
from rlaif.records import (
    Ballot,
    Message,
    Pair,
    Quality,
    Record,
    Score,
    Usage,
    Vote,
    digest,
)
from rlaif.rendering import Renderer

if TYPE_CHECKING:
    import torch

_CHUNK_BATCHES = 4
_VOCABULARY_ROWS = 256
_SOFTMAX_ROWS = 16
_CACHE_ENTRIES = 200_000
_ALLOWED_ERROR = 0.5
"""Nats a token, on average: far more than bf16's rounding, far less than a wrong mask or a lost scale."""


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


class _Request(NamedTuple):
    """One sequence to score: messages before the answer, and the answer's tokens."""

    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]


class LikelihoodJudge:
    """Scores, votes and plain likelihoods by one frozen causal language model with a chat template.

    A vote's p(first) is sigmoid((score(first) - score(second)) / `settings.score_temperature`).
    """

    def __init__(self, model_path: str, settings: LikelihoodSettings, name: str | None = None):
        """Loads a local model folder on the GPU or the CPU. `name` is recorded in votes.

        Raises:
            UserError: the folder holds no model, or its tokenizer has no chat template.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # who asks this judge has lines of their own for what takes time
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                model_path, dtype=torch_dtype(settings.precision), **without_empty_quantisation(model_path)
            )
            tokenizer = AutoTokenizer.from_pretrained(model_path)
        except (OSError, ValueError, ImportError, AssertionError) as e:
            raise UserError(f"judge.model {model_path}: can't load the model ({str(e).splitlines()[0]})") from e
        self._setup(model.to(device), tokenizer, settings, name or Path(model_path).name)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, settings: LikelihoodSettings, name: str = "given") -> LikelihoodJudge:
        """A judge of a model and tokenizer that are already loaded (tests, notebooks)."""
        judge = cls.__new__(cls)
        judge._setup(model, tokenizer, settings, name)
        return judge

    def _setup(self, model: Any, tokenizer: Any, settings: LikelihoodSettings, name: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"judge.model {name}: its tokenizer has no chat template; take an instruction-tuned model")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.settings = settings
        self.name = name
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._renderer = Renderer(tokenizer, settings.chat_template_args, f"judge.model {name}: its chat template")
        self._turn_end = self._renderer.turn_end(_end_tokens(model, self._vocabulary))
        self._known: dict[_Request, tuple[float, ...]] = {}
        self._store: LikelihoodCache | None = None
        self._computed_by = ""
        self._stored: set[_Request] = set()  # of `_known`, what was computed by an earlier process
        self._asked_anew = False
        self._rendered: dict[tuple[Message, ...], tuple[int, ...]] = {}
        self._answers: dict[Any, tuple[int, ...]] = {}
        # A window counts cache slots: with prompts of several lengths, padding would take room in it.
        self._one_length = getattr(model.config.get_text_config(), "sliding_window", None) is not None
        self._check_forward()

    def remember(self, store: LikelihoodCache, weights: str) -> None:
        """From now on takes what was computed before from a store, and puts there what is new.

        Args:
            weights: Identity of the model's files; what else its arithmetic depends on is found here.
        """
        import torch
        import transformers

        self._store = store
        how = {
            "weights": weights,
            "class": type(self.model).__name__,
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "attention": transformers_compat.attention_of(self.model),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self._computed_by = digest(how, digits=64)

    def score(
        self, candidates: Sequence[Candidate], constitution: Constitution, voices: Sequence[str]
    ) -> Iterator[list[Score]]:
        """Scores of single completions by the given voices, voice by voice, in chunks. Empty ones get no score.

        A score is the summed log-ratio divided by the square root of its number of tokens, so that the best
        and the worst of several samples are not simply the longest ones.
        """
        for name in voices:
            voice = constitution.voice(name)
            for chunk in self._chunks(candidates, lambda c: len(self._answer(c))):
                scored = [c for c in chunk if self._answer(c)]
                values = self._contrast(voice, scored)
                yield [
                    Score(
                        completion_id=c.completion_id,
                        prompt_id=c.prompt_id,
                        voice=name,
                        value=value / math.sqrt(len(self._answer(c))),
                    )
                    for c, value in zip(scored, values, strict=True)
                ]

    def cast(
        self,
        ballots: Sequence[Ballot],
        pairs: Sequence[Pair],
        candidates: Sequence[Candidate],
        constitution: Constitution,
    ) -> Iterator[list[Vote]]:
        """Votes on the given ballots, in chunks: write each before asking for the next.

        `pairs` and `candidates` are the whole iteration's, also when only some ballots are still owed: the guards'
        other prompts follow from them, so a resumed run asks the same. A vote is `cached` when nothing of its chunk had
        to be computed (`remember`).
        """
        by_id = {c.completion_id: c for c in candidates}
        prompts = _prompts(candidates)
        owed: dict[str, dict[str, list[Ballot]]] = {}
        for ballot in ballots:
            owed.setdefault(ballot.voice, {}).setdefault(ballot.pair_id, []).append(ballot)
        for voice, of_pair in owed.items():
            for chunk in self._chunks(pairs, lambda p: sum(len(self._answer(by_id[i])) for i in (p.first, p.second))):
                if not any(pair.id in of_pair for pair in chunk):
                    continue
                started = time.monotonic()
                self._asked_anew = False
                sides = [by_id[i] for pair in chunk for i in (pair.first, pair.second)]
                if voice.rpartition("/")[2] in GUARD_MEASURES:
                    seed = next(b.seed for pair in chunk for b in of_pair.get(pair.id, ()))
                    answers = self._guard_answers(voice.rpartition("/")[2], sides, prompts, seed)
                else:
                    answers = self._contrast_answers(constitution.voice(voice), sides)
                seconds = round((time.monotonic() - started) / len(chunk), 4)
                stored = self._store is not None and not self._asked_anew
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
        for chunk in self._chunks(candidates, lambda c: len(self._answer(c))):
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
            [_Request(c.messages, self._answer(c)) for c in chunk]
            + [_Request(m, self._answer(c)) for c, (_, m) in zip(chunk, others, strict=True)]
        )
        own, other = logps[: len(chunk)], logps[len(chunk) :]
        return [
            Plain(completion_id=c.completion_id, other_prompt_id=o, tokens=len(self._answer(c)), logp=a, logp_other=b)
            for c, (o, _), a, b in zip(chunk, others, own, other, strict=True)
        ]

    def _contrast(self, voice: Voice, candidates: Sequence[Candidate]) -> list[float]:
        prefer = self._logps([_Request(_join(voice.prefer, c.messages), self._answer(c)) for c in candidates])
        avoid = self._logps([_Request(_join(voice.avoid, c.messages), self._answer(c)) for c in candidates])
        penalty = self.settings.missing_eos_penalty
        return [
            a - b - (penalty if c.finish_reason == "length" else 0.0)
            for c, a, b in zip(candidates, prefer, avoid, strict=True)
        ]

    def _contrast_answers(self, voice: Voice, sides: Sequence[Candidate]) -> list[dict[str, Any]]:
        values = self._contrast(voice, sides)
        out: list[dict[str, Any]] = []
        for first, second, a, b in zip(sides[::2], sides[1::2], values[::2], values[1::2], strict=True):
            tokens = (len(self._answer(first)), len(self._answer(second)))
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
        asked = [_Request(c.messages, self._answer(c)) for c in sides]
        others: list[str | None] = [None] * len(sides)
        tolerance = tolerances(self.settings)[measure]
        if measure == "relevance":
            drawn = [_other_prompt(c.prompt_id, c.messages, prompts, seed) for c in sides]
            others = [prompt_id for prompt_id, _ in drawn]
            asked += [_Request(m, self._answer(c)) for c, (_, m) in zip(sides, drawn, strict=True)]
        # All in one call: one side's other prompt is another one's own, and is read once for both.
        values = self._token_logps(asked)
        if measure == "relevance":
            own, unasked = values[: len(sides)], values[len(sides) :]
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
                    "usage": Usage(
                        prompt_tokens=sum(len(self._render(c.messages)) for c in sides[i : i + 2]),
                        completion_tokens=sum(len(v) for v in values[i : i + 2]),
                    ),
                }
            )
        return out

    def _usage(self, voice: Voice, first: Candidate, second: Candidate) -> Usage:
        contexts = [self._render(_join(side, first.messages)) for side in (voice.prefer, voice.avoid)]
        return Usage(
            prompt_tokens=2 * sum(map(len, contexts)),
            completion_tokens=2 * (len(self._answer(first)) + len(self._answer(second))),
        )

    def _answer(self, candidate: Candidate) -> tuple[int, ...]:
        """The tokens that are scored: those that were sampled, where they are this model's; none of a blank text."""
        key = (candidate.text, candidate.token_ids, candidate.finish_reason)
        if key not in self._answers:
            if len(self._answers) > _CACHE_ENTRIES:
                self._answers.clear()
            self._answers[key] = self._read(candidate) if candidate.text.strip() else ()
        return self._answers[key]

    def _read(self, candidate: Candidate) -> tuple[int, ...]:
        sampled, text = candidate.token_ids or (), candidate.text
        stops, written = self._turn_end.stops, self._turn_end.written
        known_end = written is not None and written < self._vocabulary
        ended = (written,) if candidate.finish_reason == "stop" and known_end else ()
        # Another model's end token may be another word here, or none: only this model's own are taken over.
        whole = [(sampled, ())] if sampled and (candidate.finish_reason != "stop" or sampled[-1] in stops) else []
        for ids, end in (*whole, (sampled[:-1], ended), (sampled, ())):
            known = ids and max(ids) < self._vocabulary
            if known and self.tokenizer.decode(ids, skip_special_tokens=True) == text:
                return (*ids, *end)
        return (*self._renderer.plain_ids(text), *ended)

    def _render(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        if messages not in self._rendered:
            if len(self._rendered) > _CACHE_ENTRIES:
                self._rendered.clear()
            try:
                self._rendered[messages] = self._renderer.ids(messages)
            except UserError as e:
                raise UserError(
                    f"{e}; a contrast is a system message or earlier turns, so take a model that allows both"
                ) from e
        return self._rendered[messages]

    def _check_forward(self) -> None:
        """Chooses the way to the logits, and compares what it gives with the model's own forward pass.

        Some models scale or cap the output layer's product (Gemma 2, Granite, Cohere); theirs is the slower way.
        """
        import torch

        contexts = [(Message(role="user", content=text),) for text in ("Hi", "What is bread made of?")]
        answer = self._render(contexts[-1])[:16]
        try:
            with torch.inference_mode():
                ids = torch.tensor([[*self._render(contexts[-1]), *answer]], device=self.model.device)  # [1, L]
                logits = self.model(input_ids=ids).logits.float()  # [1, L, V]
                head = self.model.get_output_embeddings()
                self._plain_head = type(head) is torch.nn.Linear and torch.equal(
                    head(self.model.base_model(input_ids=ids)[0]).float(), logits
                )
                *_, found = self._token_logps([_Request(messages, answer) for messages in contexts])
                self._known.clear()
                logps = logits[0, -len(answer) - 1 : -1].log_softmax(1)
                wanted = logps.gather(1, ids[0, -len(answer) :, None])[:, 0].tolist()
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as e:
            why = (str(e).splitlines() or [type(e).__name__])[0]
            raise UserError(f"judge.model {self.name}: this kind of model can't score completions here ({why})") from e
        off = sum(abs(a - b) for a, b in zip(found, wanted, strict=True)) / len(answer)
        if not off <= _ALLOWED_ERROR:
            raise UserError(
                f"judge.model {self.name}: {type(self.model).__name__} gives other likelihoods with cached keys and "
                f"values than in one pass (by {off:.2f} nats a token); take another model"
            )

    def _chunks(self, items: Sequence[Any], tokens: Any) -> Iterator[Sequence[Any]]:
        """Consecutive items of about `_CHUNK_BATCHES` forward passes: what is lost when a run is killed."""
        budget = _CHUNK_BATCHES * self.settings.batch_tokens
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

    def _logps(self, requests: Sequence[_Request]) -> list[float]:
        """Summed log p of each request's tokens, in nats."""
        return [math.fsum(logps) for logps in self._token_logps(requests)]

    def _token_logps(self, requests: Sequence[_Request]) -> list[tuple[float, ...]]:
        """log p of each of a request's tokens, in nats; each different request is computed once."""
        missing = [r for r in dict.fromkeys(requests) if r not in self._known]
        if len(self._known) + len(missing) > _CACHE_ENTRIES:
            self._known.clear()
            self._stored.clear()
            missing = list(dict.fromkeys(requests))
        if self._store is not None:
            missing = self._without_stored(missing, self._store)
        by_head: dict[tuple[Message, ...], list[_Request]] = {}
        for r in missing:
            by_head.setdefault(r.messages[:-1], []).append(r)
        for head, group in by_head.items():
            self._compute(head, group)
        if self._store is not None:
            self._store.put([(self._key(r), self._known[r]) for r in missing])
            self._asked_anew = self._asked_anew or not self._stored.issuperset(requests)
        return [self._known[r] for r in requests]

    def _key(self, request: _Request) -> str:
        return likelihood_key(self._computed_by, self._render(request.messages), request.token_ids)

    def _without_stored(self, requests: Sequence[_Request], store: LikelihoodCache) -> list[_Request]:
        """Takes what the store holds into `_known`; returns the rest."""
        rest = []
        for r in requests:
            logps = store.get(self._key(r), len(r.token_ids)) if r.token_ids else ()
            if logps is None:
                rest.append(r)
            else:
                self._known[r] = logps
                self._stored.add(r)
        return rest

    def _compute(self, head: tuple[Message, ...], requests: Sequence[_Request]) -> None:
        """Fills `_known` for requests that share all messages but the last."""
        import torch

        shared = _common_prefix(
            *(self._render((*head, Message(role="user", content=probe))) for probe in ("0", "Who is it?"))
        )
        prompts: dict[tuple[int, ...], list[_Request]] = {}
        for r in requests:
            if r.token_ids:
                prompts.setdefault(self._render(r.messages), []).append(r)
            else:
                self._known[r] = ()
        # A tokenizer that merges across the boundary gives such a prompt another beginning: score it alone.
        alike = [p for p in prompts if p[: len(shared)] == shared]
        unlike = [p for p in prompts if p[: len(shared)] != shared]
        with torch.inference_mode():
            # One prompt gains nothing from a separate pass over its beginning.
            for group, start in ((alike, len(shared) if len(alike) > 1 else 0), (unlike, 0)):
                prefix = self._prefill(shared[:start]) if start else None
                for batch in self._prompt_batches(group, prompts):
                    self._known.update(self._forward(batch, prompts, start, prefix))

    def _prompt_batches(
        self, group: Sequence[tuple[int, ...]], requests: dict[tuple[int, ...], list[_Request]]
    ) -> Iterator[list[tuple[int, ...]]]:
        """Prompts of similar length whose KV is held at a time: those of a chunk's answer tokens."""
        batch: list[tuple[int, ...]] = []
        tokens = 0
        for p in sorted(group, key=lambda p: (len(p), p)):
            mine = sum(len(r.token_ids) for r in requests[p])
            full = tokens + mine > _CHUNK_BATCHES * self.settings.batch_tokens
            if batch and (full or (self._one_length and len(p) != len(batch[0]))):
                yield batch
                batch, tokens = [], 0
            batch.append(p)
            tokens += mine
        if batch:
            yield batch

    def _row_batches(self, rows: Sequence[tuple[int, _Request]]) -> Iterator[Sequence[tuple[int, _Request]]]:
        """Answers by length, longest first, at most `batch_tokens` with their padding."""
        rows = sorted(rows, key=lambda row: (-len(row[1].token_ids), row[0], row[1].token_ids))
        while rows:
            n = max(self.settings.batch_tokens // len(rows[0][1].token_ids), 1)
            yield rows[:n]
            rows = rows[n:]

    def _prefill(self, ids: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of a shared beginning: per layer two tensors [1, kv heads, len(ids), head dim]."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache()
        tokens = torch.tensor([ids], device=self.model.device)
        self.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return transformers_compat.keys_and_values(cache)

    def _forward(
        self,
        batch: Sequence[tuple[int, ...]],
        requests: dict[tuple[int, ...], list[_Request]],
        start: int,
        prefix: list[tuple[torch.Tensor, torch.Tensor]] | None,
    ) -> Iterator[tuple[_Request, tuple[float, ...]]]:
        """Two passes: the prompts' own tokens [P, S] once, then their answers [B, T] on top of the gathered KV.

        The last prompt token is left to the second pass, which needs the logits that follow it.
        """
        import torch
        from transformers import DynamicCache

        device = self.model.device
        own = [p[start:-1] for p in batch]
        past = start + max(map(len, own))
        input_ids, own_mask = _pad(own, past - start, device)  # [P, S]
        prompt_mask = torch.cat([torch.ones(len(batch), start, dtype=torch.long, device=device), own_mask], 1)
        cache = DynamicCache()
        for i, (k, v) in enumerate(prefix or ()):
            cache.update(k.expand(len(batch), -1, -1, -1), v.expand(len(batch), -1, -1, -1), i)
        if past > start:
            positions = torch.arange(start, past, device=device).expand(len(batch), -1)
            self.model.base_model(
                input_ids=input_ids,
                attention_mask=prompt_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        layers = transformers_compat.keys_and_values(cache)
        for rows in self._row_batches([(i, r) for i, p in enumerate(batch) for r in requests[p]]):
            index = torch.tensor([i for i, _ in rows], device=device)
            gathered = DynamicCache()
            for i, (keys, values) in enumerate(layers):
                gathered.update(keys[index], values[index], i)
            # Inputs are the last prompt token and the answer but its last token: logits then stand for the answer.
            inputs = [(batch[i][-1], *r.token_ids[:-1]) for i, r in rows]
            width = max(map(len, inputs))
            input_ids, mask = _pad(inputs, width, device)  # [B, T]
            lengths = torch.tensor([len(batch[i]) - 1 for i, _ in rows], device=device)  # [B]
            targets, _ = _pad([r.token_ids for _, r in rows], width, device)
            keep = mask.bool()
            arguments = {
                "input_ids": input_ids,
                "attention_mask": torch.cat([prompt_mask[index], mask], 1),
                "position_ids": lengths[:, None] + torch.arange(width, device=device),  # [B, T]
                "past_key_values": gathered,
                "use_cache": True,
            }
            if self._plain_head:
                hidden = self.model.base_model(**arguments).last_hidden_state  # [B, T, H]
                logps = self._target_logps(hidden[keep], targets[keep])
            else:
                logps = _logps_of(self._kept_logits(keep, arguments), targets[keep], _SOFTMAX_ROWS)
            by_row = logps.cpu().split([len(r.token_ids) for _, r in rows])
            yield from ((r, tuple(values.tolist())) for (_, r), values in zip(rows, by_row, strict=True))

    def _kept_logits(self, keep: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """The model's own logits [N, V] at the N positions that `keep` [B, T] marks."""

        def select(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (inputs[0][keep],)  # [B, T, H] -> [N, H]

        hook = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            logits: torch.Tensor = self.model(**arguments).logits
        finally:
            hook.remove()
        return logits

    def _target_logps(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p of each target [N] in fp32 from its hidden state [N, H]; the whole [N, V] never exists."""
        import torch

        # fp32 in pieces that stay in the CPU's cache: a fifth of the time of the whole, a twentieth of logsumexp.
        rows_at_once = _SOFTMAX_ROWS if hidden.device.type == "cpu" else _VOCABULARY_ROWS
        logp = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        head = self.model.get_output_embeddings()
        # One buffer for all pieces: fresh pages for each cost as much as the product.
        buffer = torch.empty(_VOCABULARY_ROWS, head.out_features, dtype=hidden.dtype, device=hidden.device)
        for at in range(0, len(targets), _VOCABULARY_ROWS):
            part = slice(at, at + _VOCABULARY_ROWS)
            logits = torch.mm(hidden[part], head.weight.t(), out=buffer[: len(hidden[part])])  # [rows, V]
            if head.bias is not None:
                logits += head.bias
            logp[part] = _logps_of(logits, targets[part], rows_at_once)
        return logp


def _logps_of(logits: torch.Tensor, targets: torch.Tensor, rows_at_once: int) -> torch.Tensor:
    """log p of each target [N] in fp32 from its logits [N, V], some rows at a time."""
    import torch

    pieces = zip(logits.split(rows_at_once), targets[:, None].split(rows_at_once), strict=True)
    return torch.cat([z.float().log_softmax(1).gather(1, y)[:, 0] for z, y in pieces])


def _end_tokens(model: Any, vocabulary: int) -> tuple[int, ...]:
    """The model's own list, from its generation config or else its config; a default may be beyond its vocabulary."""
    for settings in (getattr(model, "generation_config", None), model.config):
        eos = getattr(settings, "eos_token_id", None)
        if eos is not None:
            return tuple(i for i in (eos if isinstance(eos, (list, tuple)) else (eos,)) if i < vocabulary)
    return ()


def _join(context: tuple[Message, ...], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The context before the prompt; an instruction is added to the prompt's own system message, after it."""
    if messages[0].role != "system":
        return (*context, *messages)
    if context and context[0].role == "system":
        system = Message(role="system", content=f"{messages[0].content}\n\n{context[0].content}")
        return (system, *context[1:], *messages[1:])
    return (messages[0], *context, *messages[1:])


def _prompts(candidates: Sequence[Candidate]) -> dict[str, tuple[Message, ...]]:
    return {c.prompt_id: c.messages for c in sorted(candidates, key=lambda c: c.prompt_id)}


_FALLBACK = ("fallback", (Message(role="user", content="Tell me about the weather in the mountains."),))


def _other_prompt(
    prompt_id: str, messages: tuple[Message, ...], prompts: dict[str, tuple[Message, ...]], seed: int
) -> tuple[str, tuple[Message, ...]]:
    """Another prompt x', seeded; a fixed one when the batch has a single prompt."""
    others = [(i, m) for i, m in prompts.items() if i != prompt_id and m != messages]
    return random.Random(f"{seed}:{prompt_id}").choice(others) if others else _FALLBACK


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]


def _pad(rows: Sequence[Sequence[int]], width: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [rows, width] and their mask of ones and zeros."""
    import torch

    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
