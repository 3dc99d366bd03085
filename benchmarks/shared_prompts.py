"""What it saves to compute a pair's prompt once: `python -m benchmarks.shared_prompts [PAIRS,PROMPT,COMPLETION ...]`.

In: sizes in tokens. Out: tokens and processor time of a forward and backward pass in fp32, on one thread, with whole
rows and with shared prompts in turn, and how far their log-probabilities are apart. Tokens are drawn at random: time
doesn't depend on which they are. Processor time, since a busy machine stretches the other kind.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlaif.learning.base import pad
from rlaif.learning.packing import SharedPrompts, pack
from rlaif.learning.scoring import score_completions_only
from rlaif.models import resolve

MODEL = "embedded:smollm2-135m-instruct"
SIZES = ("2,45,80", "1,300,80", "2,20,120")
ROUNDS = 4
SPREAD = 0.25
"""Lengths are drawn so far around what is asked for, as a share."""


def batch(pairs: int, prompt: int, completion: int, vocabulary: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random pairs as TRL makes a batch of them."""
    draw = random.Random(seed)

    def tokens(around: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(round(around * draw.uniform(1 - SPREAD, 1 + SPREAD)))]

    rows = [(p, tokens(completion)) for p in [tokens(prompt) for _ in range(pairs)] * 2]
    ids = [p + c for p, c in rows]
    return {
        "input_ids": pad(ids, 0, "right"),
        "attention_mask": pad([[1] * len(row) for row in ids], 0, "right"),
        "labels": pad([[-100] * len(p) + c for p, c in rows], -100, "right"),
    }


def measure(model: Any, given: dict[str, torch.Tensor]) -> str:
    """One line of the table."""
    prompts = SharedPrompts(model)
    width = given["input_ids"].size(1)
    if note := prompts.look([([1] * width, [1] * (width - 1) + [2])]):
        return note
    seconds: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, torch.Tensor] = {}
    for number in range(2 * ROUNDS):
        shared = number % 2 == 1
        ask: Callable[..., Any] = prompts.asked(model) if shared else model
        model.zero_grad()
        started = time.process_time()
        log_probs = ask(**given, fused_lm_head=True, use_cache=False).log_probs
        log_probs.sum().backward()
        seconds[shared].append(time.process_time() - started)
        found[shared] = log_probs.detach()
    whole, packed = (median(seconds[shared]) for shared in (False, True))
    tokens = given["input_ids"].numel(), pack(**given).input_ids.numel()
    apart = float((found[True] - found[False]).abs().max())
    return f"{tokens[0]:7} {tokens[1]:7} {whole:8.2f} {packed:8.2f} {whole / packed:6.2f} {apart:9.1e}"


def main(sizes: list[str]) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=torch.float32).eval()
    score_completions_only(model)
    print(f"{'sizes':12} {'whole':>7} {'shared':>7} {'whole s':>8} {'shared s':>8} {'ratio':>6} {'apart':>9}")
    for size in sizes or SIZES:
        pairs, prompt, completion = map(int, size.split(","))
        given = batch(pairs, prompt, completion, model.config.vocab_size)
        print(f"{size:12} {measure(model, given)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
