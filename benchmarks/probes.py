"""Which of the shipped probes a base policy passes, by kind, and the perplexity of the fixed texts in two ways.

`python -m benchmarks.probes [MODEL] [--engine vllm] [--answers FILE]`: the tables of docs/forgetting.md. Minutes on two
cores without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlaif import models
from rlaif.config import Learner, Lora, Sampling
from rlaif.data.prompts import with_system
from rlaif.evaluation import probes, texts
from rlaif.learning import make_learner
from rlaif.records import PolicyVersion
from rlaif.sampling.role import SamplerRole

SYSTEM_PROMPTS = {"none": None, "shipped jobs": "You are a helpful assistant. Answer in a few sentences."}
MAX_TOKENS = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--answers", type=Path, help="write what was answered to each probe, as JSON")
    arguments = parser.parse_args()
    model = str(models.resolve(arguments.model))
    sampler = SamplerRole(model, Sampling(engine=arguments.engine, max_tokens=MAX_TOKENS, precision="fp32"))
    answers = {name: answered(sampler, system) for name, system in SYSTEM_PROMPTS.items()}
    kinds = Counter(p.kind for p in probes.shipped())
    print(f"probes passed by {arguments.model}, at temperature 0, at most {MAX_TOKENS} tokens, fp32")
    print(f"{'kind':12} probes  " + "  ".join(f"{name:>12}" for name in answers))
    for kind, count in [*kinds.items(), ("all", sum(kinds.values()))]:
        passed = [
            sum(p.passes(of[p.id]) for p in probes.shipped() if kind in (p.kind, "all")) for of in answers.values()
        ]
        print(f"{kind:12} {count:6}  " + "  ".join(f"{n:12}" for n in passed))
    if arguments.answers:
        arguments.answers.write_text(json.dumps(answers, indent=1, ensure_ascii=False))
    ours, plain, tokens = perplexities(model, sampler)
    print(f"perplexity of the fixed texts ({tokens} tokens): {ours:.4f} as a run has it, {plain:.4f} by transformers")


def answered(sampler: SamplerRole, system: str | None) -> dict[str, str]:
    """Probe → what was answered."""
    asked = with_system([p.asked() for p in probes.shipped()], system)
    chunks = sampler.sample(asked, 1, PolicyVersion(iteration=0, digest=""), 0, 0, "probe", temperature=0.0, top_p=1.0)
    return {c.prompt_id: c.text for chunk in chunks for c in chunk}


def perplexities(model: str, sampler: SamplerRole) -> tuple[float, float, int]:
    """As an evaluation computes it, by transformers' own loss, and over how many tokens."""
    given = [t.text for t in texts.shipped()]
    learner = make_learner("dpo", model, Learner(precision="fp32", lora=Lora(r=4)), seed=0)  # the LoRA is 0 as yet
    scored = learner.logprobs(sampler.sequences_in(given))
    learner.close()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    nats, tokens = 0.0, 0
    for text in given:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            nats += float(plain(input_ids=ids, labels=ids).loss) * (ids.size(1) - 1)
        tokens += ids.size(1) - 1
    mine = -sum(map(sum, scored)) / sum(map(len, scored))
    return math.exp(mine), math.exp(nats / tokens), tokens


if __name__ == "__main__":
    main()
