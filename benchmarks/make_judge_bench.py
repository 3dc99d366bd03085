"""Makes the `policy_sample` half of prompts/judge_bench.jsonl; the hand-written rows in it are kept as they are.

SmolLM2-135M-Instruct answers everyday prompts under several system prompts, and mechanical rules pick and label the
pairs (prompts/README.md states them). The system prompts only bring variety: the label never depends on them.

    python benchmarks/make_judge_bench.py sample SAMPLES.jsonl     # a few minutes on 2 cores, needs vLLM
    python benchmarks/make_judge_bench.py label SAMPLES.jsonl      # instant
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from rlaif.hardware import torch_dtype

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
BENCH = PROMPTS / "judge_bench.jsonl"
MODEL = "embedded:smollm2-135m-instruct"

CONSTITUTIONS = {
    "brevity": "assistant@1",
    "thorough": "assistant@2",
    "lists": "lists@1",
    "plain_words": "plain_language@1",
    "refusing": "harmless@1",
}
SYSTEMS: tuple[tuple[str | None, ...], ...] = (
    (None, "Answer in one short sentence."),
    (None, "Answer in one or two sentences.", "Explain in detail, with reasons and examples."),
    (None, "Answer with a numbered list.", "Answer in one paragraph, without a list."),
    ("Use short, simple words that a child knows.", "Use precise technical and academic language."),
)
"""Each prompt is asked under one of these groups."""
PROMPTS_PER_GROUP = 70
SAMPLES_PER_SYSTEM = 2
MAX_TOKENS = (64, 96, 96, 96)
"""Tokens of a completion, by group."""
PAIRS_PER_SPLIT = 24
"""Pairs of one principle in each split."""


def sample(out: Path) -> None:
    """Writes `{prompt, system, text, finish_reason}` rows."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    from rlaif.models import resolve

    everyday = [json.loads(line)["prompt"] for line in (PROMPTS / "everyday.jsonl").read_text().splitlines()]
    random.Random("judge bench").shuffle(everyday)
    asked: list[dict[str, Any]] = []
    conversations, params = [], []
    for group, systems in enumerate(SYSTEMS):
        mine = everyday[group * PROMPTS_PER_GROUP : (group + 1) * PROMPTS_PER_GROUP]
        for prompt, system in product(mine, systems):
            start = [{"role": "system", "content": system}] if system else []
            for _ in range(SAMPLES_PER_SYSTEM):
                asked.append({"prompt": prompt, "system": system})
                conversations.append([*start, {"role": "user", "content": prompt}])
                params.append(SamplingParams(temperature=0.8, top_p=0.95, max_tokens=MAX_TOKENS[group]))
    llm = LLM(model=str(resolve(MODEL)), dtype=torch_dtype("auto"), max_model_len=512, enforce_eager=True, seed=0)
    with out.open("w") as f:
        for row, answer in zip(asked, llm.chat(conversations, params), strict=True):
            best = answer.outputs[0]
            f.write(json.dumps({**row, "text": best.text.strip(), "finish_reason": best.finish_reason}) + "\n")


def words(text: str) -> list[str]:
    """Words in lower case."""
    return re.findall(r"[a-z']+", text.lower())


_STOP = set(words(
    "a an the of to in on at is are was were be do does did i me my you your it its this that these they them their "
    "what why how who which when where and or but for from with without by as can could should would will not so than "
    "if there have has had get make more most some any one two good way best use used people mean say keep need about"
))  # fmt: skip


def on_topic(prompt: str, text: str) -> bool:
    """The answer shares a content word's stem (its first five letters) with the prompt."""
    stems = {w[:5] for w in words(prompt)} - {w[:5] for w in _STOP}
    return bool(stems & {w[:5] for w in words(text)})


def degenerate(text: str) -> bool:
    """Too short to be an answer, repeats itself, talks about being a model, or holds markup or foreign script."""
    said = words(text)
    if len(said) < 4 or len(set(said)) < 0.45 * len(said):
        return True
    fours = [tuple(said[i : i + 4]) for i in range(len(said) - 3)]
    if len(set(fours)) < len(fours) - 2:
        return True
    if re.search(r"\b(SmolLM|chatbot|AI (assistant|model|language)|Hugging ?Face|as an AI)\b", text, re.IGNORECASE):
        return True
    return bool(re.search(r"<\||```|\[[A-Z][\w ]+\]|http|[^\x00-\x7f\u2010-\u2026\u00a0-\u00ff]", text))


def list_items(text: str) -> int:
    """Lines that start as a list item does: a number, a dash, a star."""
    return len(re.findall(r"^\s*(?:\d+[.)]|[-*\u2022])\s+\S", text, re.MULTILINE))


def reading_ease(text: str) -> float:
    """Flesch reading ease, with syllables counted as groups of vowels; higher is easier."""
    said = words(text)
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", re.sub(r"e$", "", w)))) for w in said)
    sentences = max(1, len(re.findall(r"[.!?](?:\s|$)", text)))
    return 206.835 - 1.015 * len(said) / sentences - 84.6 * syllables / max(1, len(said))


def long_word_share(text: str) -> float:
    """Share of words with nine letters or more."""
    said = words(text)
    return sum(len(w) >= 9 for w in said) / max(1, len(said))


def ratio(a: str, b: str) -> float:
    """Words of `a` over words of `b`."""
    return len(words(a)) / max(1, len(words(b)))


# A rule says by how much `a` is clearly better than `b`; None where it isn't clear.
Rule = Callable[[dict[str, Any], dict[str, Any]], float | None]


def shorter(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """At least 1.6 times fewer words, and an answer that ends by itself."""
    r = ratio(b["text"], a["text"])
    return r if r >= 1.6 and a["finish_reason"] == "stop" and not list_items(a["text"]) else None


def longer(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """At least 1.6 times more words, and 35 or more of them."""
    r = ratio(a["text"], b["text"])
    return r if r >= 1.6 and len(words(a["text"])) >= 35 else None


def more_listed(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """Two or more list items against none, at a similar length."""
    similar = 0.55 <= ratio(a["text"], b["text"]) <= 1.8
    return (
        float(list_items(a["text"])) if list_items(a["text"]) >= 2 and not list_items(b["text"]) and similar else None
    )


def plainer(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """Reading ease higher by 20 or more, share of long words lower by 0.08 or more, at a similar length."""
    ease = reading_ease(a["text"]) - reading_ease(b["text"])
    long_words = long_word_share(b["text"]) - long_word_share(a["text"])
    similar = 0.6 <= ratio(a["text"], b["text"]) <= 1.6
    return ease if ease >= 20 and long_words >= 0.08 and similar else None


RULES: dict[str, Rule] = {"brevity": shorter, "thorough": longer, "lists": more_listed, "plain_words": plainer}


def fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on nothing but the parts."""
    return int(hashlib.sha256("/".join(parts).encode()).hexdigest()[:12], 16) / 16**12


def labelled(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The policy samples' rows.

    Pairs are drawn from the clear ones, not the clearest ones, so that hard pairs are there too. A prompt belongs to
    one split, serves either brevity or thoroughness, and gives a second pair (of other answers) only where the
    principle runs out of prompts.
    """
    by_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for s in samples:
        if not degenerate(s["text"]) and on_topic(s["prompt"], s["text"]):
            by_prompt[s["prompt"]].append(s)
    prompts = sorted(by_prompt, key=lambda p: fraction("order", p))
    rows = []
    for principle, rule in RULES.items():
        found: dict[str, list[tuple[int, dict[str, Any]]]] = {"dev": [], "test": []}
        for i, prompt in enumerate(prompts):
            if principle == ("brevity", "thorough")[i // 2 % 2]:
                continue
            clear = [(a, b) for a in by_prompt[prompt] for b in by_prompt[prompt] if rule(a, b) is not None]
            for nth in range(2):
                if clear:
                    better, worse = clear[int(fraction("pair", principle, prompt) * len(clear))]
                    pair = {"principle": principle, "prompt": prompt, "better": better, "worse": worse}
                    found[("dev", "test")[i % 2]].append((nth, pair))
                    used = {better["text"], worse["text"]}
                    clear = [c for c in clear if not used & {side["text"] for side in c}]
        for split, pairs in found.items():
            first_ones = sorted(pairs, key=lambda p: p[0])[:PAIRS_PER_SPLIT]
            rows += arranged([pair for _, pair in first_ones], split, "policy_sample")
    return rows


def arranged(pairs: list[dict[str, Any]], split: str, source: str) -> list[dict[str, Any]]:
    """Pairs of one principle and split as rows, in an order of their own, the better side first in half of them."""
    rows = []
    for i, r in enumerate(sorted(pairs, key=lambda r: fraction("row", r["prompt"], r["better"]["text"]))):
        label = ("first", "second")[i % 2]
        first, second = (r["better"], r["worse"]) if label == "first" else (r["worse"], r["better"])
        rows.append({
            "id": f"{r['principle']}-{source[0]}{split[0]}{i + 1:02d}",
            "principle": r["principle"],
            "constitution": CONSTITUTIONS[r["principle"]],
            "prompt": r["prompt"],
            "first": first["text"],
            "second": second["text"],
            "first_finish_reason": first["finish_reason"],
            "second_finish_reason": second["finish_reason"],
            "label": label,
            "split": split,
            "source": source,
        })  # fmt: skip
    return rows


def main() -> None:
    """See the module's docstring."""
    if len(sys.argv) != 3 or sys.argv[1] not in ("sample", "label"):
        raise SystemExit(__doc__)
    path = Path(sys.argv[2])
    if sys.argv[1] == "sample":
        sample(path)
        return
    written = [r for line in BENCH.read_text().splitlines() if (r := json.loads(line))["source"] == "written"]
    rows = [*labelled([json.loads(line) for line in path.read_text().splitlines()]), *written]
    rows.sort(key=lambda r: (list(CONSTITUTIONS).index(r["principle"]), r["id"]))
    BENCH.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    for principle in CONSTITUTIONS:
        print(principle, {s: sum(r["principle"] == principle and r["source"] == s for r in rows)
                          for s in ("policy_sample", "written")})  # fmt: skip


if __name__ == "__main__":
    main()
