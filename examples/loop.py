"""The whole idea on one page: sample, judge, filter, one DPO step, again. No store, no workers, no vLLM.

    .venv/bin/python examples/loop.py --iterations 3

`rlaif run` does the same with what a real run needs: it can be killed anywhere, logs every vote, samples with vLLM,
measures held-out answers, and says when something goes wrong. Read this first, then the loop's own module.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlaif
from rlaif import models

ANSWERS = 4  # sampled for each prompt
MAX_TOKENS = 64
BETA = 0.1  # how strongly the policy is held to the untrained one
LEARNING_RATE = 1e-5


class Answer(NamedTuple):
    """A sampled answer: token ids for training, text for the judge."""

    prompt: str
    prompt_ids: list[int]
    ids: list[int]  # as sampled; the end token is among them only if the answer ended by itself
    text: str
    ended: bool


class Preference(NamedTuple):
    """Of two answers to one prompt, the one that the judge prefers, and the other."""

    chosen: Answer
    rejected: Answer


def sample(policy: Any, tokenizer: Any, prompts: list[str]) -> Iterator[list[Answer]]:
    """Fresh answers of the policy as it is now: that is what makes this online."""
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        prompt_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            out = policy.generate(
                torch.tensor([prompt_ids]),
                attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                max_new_tokens=MAX_TOKENS,
                num_return_sequences=ANSWERS,
                pad_token_id=tokenizer.eos_token_id,
            )
        answers = []
        for row in out[:, len(prompt_ids) :].tolist():
            ended = tokenizer.eos_token_id in row
            ids = row[: row.index(tokenizer.eos_token_id) + 1] if ended else row
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers.append(Answer(prompt, prompt_ids, ids, text, ended))
        yield answers


def judged(judge: rlaif.Judge, answers: list[Answer]) -> Iterator[tuple[rlaif.Opinion, Answer, Answer]]:
    """Pairs of a prompt's answers, with what the judge says of them under the constitution."""
    for first, second in itertools.islice(itertools.combinations(answers, 2), 2):
        ends = tuple("stop" if a.ended else "length" for a in (first, second))
        yield judge(first.prompt, first.text, second.text, finish_reasons=ends), first, second  # type: ignore[arg-type]


def kept(opinion: rlaif.Opinion, first: Answer, second: Answer) -> Preference | None:
    """A pair trains only if its label can be trusted: the votes agree, and no guard objects."""
    if opinion.decision.status != "kept":
        return None
    return Preference(first, second) if opinion.outcome == "first" else Preference(second, first)


def log_p(model: Any, answer: Answer) -> torch.Tensor:
    """log p(answer | prompt), summed over the answer's tokens."""
    ids = torch.tensor([answer.prompt_ids + answer.ids])
    logits = model(ids).logits[0, len(answer.prompt_ids) - 1 : -1]  # position t predicts token t + 1
    return logits.float().log_softmax(-1).gather(-1, ids[0, len(answer.prompt_ids) :, None]).sum()


def dpo_step(policy: Any, base: Any, optimizer: torch.optim.Optimizer, batch: list[Preference]) -> float:
    """One optimizer step of Direct Preference Optimization (arXiv 2305.18290, eq. 7)."""
    total = 0.0
    for pair in batch:
        with torch.no_grad():
            before = log_p(base, pair.chosen) - log_p(base, pair.rejected)
        loss = -logsigmoid(BETA * (log_p(policy, pair.chosen) - log_p(policy, pair.rejected) - before))
        (loss / len(batch)).backward()
        total += loss.item() / len(batch)
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def main(arguments: list[str] | None = None) -> None:
    """Trains, and prints a line for each iteration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct", help="policy, and frozen judge")
    parser.add_argument("--constitution", default="assistant@1", help="name@version, or a file")
    parser.add_argument("--prompts", type=Path, default=Path("prompts/everyday.jsonl"), help="JSONL with `prompt`")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--prompts-per-iteration", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    folder = models.resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    judge = rlaif.Judge(args.constitution, model=args.model, filters={"min_agreement": 0.6})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    asked = itertools.cycle(json.loads(line)["prompt"] for line in args.prompts.open())

    for iteration in range(1, args.iterations + 1):
        answers, preferences, pairs = [], [], 0
        for some in sample(policy, tokenizer, list(itertools.islice(asked, args.prompts_per_iteration))):
            answers += some
            for opinion, first, second in judged(judge, some):
                pairs += 1
                if (preference := kept(opinion, first, second)) is not None:
                    preferences.append(preference)
        loss = dpo_step(policy, base, optimizer, preferences) if preferences else float("nan")
        words = sum(len(a.text.split()) for a in answers) / len(answers)
        ended = sum(a.ended for a in answers) / len(answers)
        print(
            f"iteration {iteration}: kept {len(preferences)} of {pairs} pairs, loss {loss:.3f}; "
            f"answers have {words:.0f} words, {ended:.0%} ended by themselves",
            flush=True,
        )


if __name__ == "__main__":
    main()
