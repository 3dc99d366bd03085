"""The sampler as the loop sees it: prompts in, completions out, new weights by reference.

The engine (vLLM or transformers) knows token ids only; prompts are rendered here with the policy's own
chat template, once per prompt, and thoughts are taken out of what was said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

from rlaif import models, own_code, thoughts
from rlaif.config import OwnSampling, Policy, Sampling
from rlaif.errors import UserError
from rlaif.hardware import precision_here
from rlaif.records import Completion, PolicyVersion, Prompt, TokenSequence
from rlaif.rendering import Renderer
from rlaif.sampling import GivenAnswer, PromptProblem, Sample, SampleRequest
from rlaif.sampling.endings import Endings
from rlaif.sampling.requests import needs_more_than, render_prompt, seed_for
from rlaif.workers.weights import WeightsRef


def make(
    model_path: str,
    settings: Sampling,
    policy: Policy | None = None,
    sha256: str | None = None,
    logs: Path | None = None,
    rests: bool = False,
) -> SamplerRole:
    """Factory for a worker process; `sha256` is the digest that the loop knows of an engine of the user's own, `logs` a
    folder for the logs of what an engine starts; `rests`: it will be asked to."""
    return SamplerRole(model_path, settings, policy, sha256, logs, rests)


def can_rest(settings: Sampling) -> bool:
    """Whether an engine gives back what it holds of a GPU, and takes it again. Servers that somebody else started
    aren't ours to ask."""
    if isinstance(settings, OwnSampling):
        return own_code.can_rest(own_code.of_sampler(settings)[0])
    return not settings.addresses


def _engine(model_path: str, settings: Sampling, sha256: str | None, logs: Path | None, rests: bool) -> Engine:
    if isinstance(settings, OwnSampling):
        code, own = own_code.of_sampler(settings, sha256)
        made: Engine = code.made(model_path, own)
        return made
    if settings.engine == "vllm":
        from rlaif.sampling import vllm

        return vllm.Sampler(model_path, settings, rests)
    if settings.engine == "server":
        from rlaif.sampling import server

        return server.Sampler(model_path, settings, logs, rests)
    from rlaif.sampling import transformers

    return transformers.Sampler(model_path, settings)


class Engine(Protocol):
    """vLLM, its servers, transformers, or a class of the user's own: token ids in, token ids out."""

    def sample(self, requests: list[SampleRequest]) -> Iterator[list[Sample]]:
        """Yields samples as they finish."""

    def load(self, policy_path: str) -> None:
        """New weights, by folder."""

    def logprobs(self, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
        """log p of each completion token under them, in nats."""

    # One of the user's own needn't have these (`can_rest`).

    def rest(self) -> None:
        """Gives back what it holds of a GPU; the weights are kept elsewhere."""

    def wake(self) -> None:
        """Takes it again."""


GAP_PROMPTS, GAP_TOKENS = 8, 64
"""Texts that are scored to compare weights, and their tokens at most: a second's work, and enough tokens that the
rounding of a sampler in bf16 averages out (0.07 / sqrt(512) = 0.003 nats)."""


def fixed_texts(renderer: Renderer, prompts: list[Prompt], max_model_len: int) -> list[TokenSequence]:
    """Texts to compare weights by: each of the first prompts, continued by the words of those after it.

    Nothing needs to be sampled for them, so they are there before anything is, and the same in every iteration.
    """
    some = prompts[:GAP_PROMPTS]
    out = []
    for i, prompt in enumerate(some):
        ids = renderer.plain_ids(" ".join(p.text for p in [*some[i + 1 :], *some[: i + 1]]))
        start = render_prompt(renderer, prompt)
        room = min(GAP_TOKENS, max_model_len - len(start) - 1)
        if start and ids[: max(room, 0)]:
            out.append(TokenSequence(prompt_token_ids=start, token_ids=ids[:room]))
    return out


class SamplerRole:
    """Samples completions of prompts from the newest weights it was given."""

    def __init__(
        self,
        model_path: str,
        settings: Sampling,
        policy: Policy | None = None,
        sha256: str | None = None,
        logs: Path | None = None,
        rests: bool = False,
    ):
        self._settings = settings
        self._strip = (policy or Policy()).thinking == "strip"
        self._tokenizer = models.load_tokenizer(model_path)
        self._renderer = Renderer(self._tokenizer, (policy or Policy()).chat_template_args)
        self._endings = Endings(model_path, self._tokenizer, settings)
        self._engine = _engine(model_path, settings, sha256, logs, rests)

    def close(self) -> None:
        """Ends what the engine started."""
        if hasattr(self._engine, "close"):
            self._engine.close()

    def rest(self) -> None:
        """The engine gives back what it holds of a GPU (`can_rest`)."""
        self._engine.rest()

    def wake(self) -> None:
        """It takes it again, and holds the weights that it held."""
        self._engine.wake()

    def load(self, weights: WeightsRef) -> None:
        """New weights.

        Raises:
            UserError: there are none where the reference says.
        """
        folder = weights.folder()
        if not models.weight_files(folder):
            raise UserError(f"{folder}: no weights of a policy in this folder; restore them, or start a new run")
        self._engine.load(str(folder))

    def problems(self, prompts: list[Prompt]) -> list[PromptProblem]:
        """What keeps prompts from being sampled, before any is: each that its template can't render as it was given, or
        that leaves no room for an answer."""
        found = []
        for prompt in prompts:
            try:
                length = len(self._renderer.ids(prompt.messages))
            except UserError as e:
                found.append(PromptProblem(prompt_id=prompt.id, problem=str(e)))
                continue
            if too_long := needs_more_than(self._settings.max_model_len, length, self._settings.max_tokens):
                found.append(PromptProblem(prompt_id=prompt.id, problem=too_long, too_long=True))
        return found

    def tokens_of(self, answers: list[GivenAnswer]) -> list[TokenSequence]:
        """Answers that weren't sampled, in the policy's tokens; one that ended by itself has its end token."""
        end = self._endings.written
        out = []
        for answer in answers:
            asked = render_prompt(self._renderer, answer.prompt)
            ids = self._renderer.answered_ids(answer.prompt.messages, answer.text, end)
            if answer.finish_reason == "length" and end is not None:
                ids = ids[:-1]
            out.append(TokenSequence(prompt_token_ids=asked, token_ids=ids))
        return out

    def answer_problems(self, answers: list[GivenAnswer]) -> list[PromptProblem]:
        """What keeps answers that weren't sampled from training, by their ids: as `problems`."""
        found, limit = [], self._settings.max_model_len
        for answer in answers:
            try:
                [tokens] = self.tokens_of([answer])
            except UserError as e:
                found.append(PromptProblem(prompt_id=answer.id, problem=str(e)))
                continue
            if (length := len(tokens.all_ids)) > limit:
                said = f"a prompt and its answer have {length} tokens, sampling.max_model_len is {limit}"
                found.append(PromptProblem(prompt_id=answer.id, problem=said, too_long=True))
        return found

    def computes_in(self) -> str:
        """Engine and precision, as `vllm fp32`."""
        return f"{self._settings.engine} {precision_here(self._settings.precision)}"

    def sequences_of(self, prompts: list[Prompt]) -> list[TokenSequence]:
        """`fixed_texts` as this policy's template renders them."""
        return fixed_texts(self._renderer, prompts, self._settings.max_model_len)

    def sequences_in(self, texts: list[str]) -> list[TokenSequence]:
        """Plain texts as the policy's tokenizer reads them, its own special tokens added, as much of each as fits: the
        first token is what the others follow."""
        read = [tuple(self._tokenizer.encode(text)[: self._settings.max_model_len]) for text in texts]
        return [TokenSequence(prompt_token_ids=ids[:1], token_ids=ids[1:]) for ids in read]

    def logprobs(self, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
        """log p of each completion token under the weights that sample now, in nats."""
        return self._engine.logprobs(sequences)

    def sample(
        self,
        prompts: list[Prompt],
        completions_per_prompt: int,
        policy: PolicyVersion,
        seed: int,
        iteration: int,
        prefix: str,
        temperature: float | None = None,
        top_p: float | None = None,
        have: Collection[str] = (),
    ) -> Iterator[list[Completion]]:
        """Yields completions as they finish, in chunks; each is named `<prefix>-<prompt id>-<index>`.

        `temperature` and `top_p` take the place of the settings' own. Answers that somebody has (`have`) are left out;
        their prompts are among `prompts` all the same, since a prompt's place is counted among them.
        """
        settings = self._settings
        requests, about, begun = [], {}, {}
        for place, prompt in enumerate(prompts):
            ids = render_prompt(self._renderer, prompt)
            begun[prompt.id] = thoughts.opening(self._renderer.begun(prompt.messages)) if self._strip else ""
            for index in range(completions_per_prompt):
                request = SampleRequest(
                    id=f"{prefix}-{prompt.id}-{index}",
                    prompt_token_ids=ids,
                    seed=seed_for(seed, iteration, prompt.id, index),
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature if temperature is None else temperature,
                    top_p=settings.top_p if top_p is None else top_p,
                    place=place,
                )
                if request.id not in have:
                    requests.append(request)
                    about[request.id] = (prompt.id, index, request)
        for chunk in self._engine.sample(requests):
            yield [
                Completion(
                    id=s.id,
                    prompt_id=about[s.id][0],
                    policy=policy,
                    index=about[s.id][1],
                    seed=about[s.id][2].seed,
                    prompt_token_ids=about[s.id][2].prompt_token_ids,
                    token_ids=s.token_ids,
                    text=self._text(s, begun[about[s.id][0]]),
                    finish_reason=s.finish_reason,
                    logprob=s.logprob,
                )
                for s in chunk
            ]

    def _text(self, sample: Sample, begun: str) -> str:
        """What was answered, without thoughts if those are stripped. `begun` is the mark that its prompt ends with.

        Marks are special tokens to some tokenizers, so they are looked for where those are still in the text.
        """
        if not self._strip:
            return sample.text
        body = self._endings.body(sample.token_ids)
        said = begun + str(self._tokenizer.decode(body, skip_special_tokens=False))
        if not thoughts.has_marks(said):
            return sample.text
        answer = thoughts.without_thoughts(said)
        for token in sorted({t for t in body if t in self._tokenizer.all_special_ids}):
            answer = answer.replace(str(self._tokenizer.decode([token])), "")
        return self._endings.cut(answer)
