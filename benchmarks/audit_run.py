"""Writes a large run directory, as a long job with a chat judge would leave it; used by `benchmarks.audit`.

Files, digests and the chain of inputs are valid, decisions follow from the votes by the package's own rules, sizes
are those of real runs: a vote is about 900 bytes, half of them with reasoning; an answer has about 90 words.
Everything is written as it is made, so memory does not grow with the run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from rlaif.config import Filters, parse_job
from rlaif.constitutions.constitution import Constitution, parse_constitution
from rlaif.constitutions.templates import load_template
from rlaif.intervals import wilson
from rlaif.judging.filters import decide
from rlaif.judging.verdicts import aggregate
from rlaif.records import SCHEMA_VERSION, Ballot, Decision, EvaluationMetrics, IterationMetrics, Pair, Vote, digest
from rlaif.rundir.store import row_digest, write_json

VOTES_PER_PAIR = 5
PAIRS_PER_STEP = 8
PROMPTS = 2000
EVALUATED_PROMPTS = 100

_JUDGES = ("chat:careful@judge.example", "chat:contrary@judge.example")
# Juror, template, order: the first juror is asked with both templates in both orders, the second once.
_ASKED = (
    (0, "pairwise", "forward"),
    (0, "pairwise", "reversed"),
    (0, "pairwise_reasoned", "forward"),
    (0, "pairwise_reasoned", "reversed"),
    (1, "pairwise", "forward"),
)
_JUDGE_TEMPLATES = [
    load_template(Path(__file__).resolve().parent.parent / "prompts" / "judge", name)
    for name in ("pairwise", "pairwise_reasoned")
]
_TEMPLATES = {t.name: t.hash for t in _JUDGE_TEMPLATES}
_SYLLABLES = ("ba", "co", "di", "fu", "ga", "he", "lo", "mi", "nu", "pe", "ra", "so", "ti", "vu", "wa", "zo")
_POOL = 4000

Progress = Callable[[int, int], None]


class _Rows:
    """A stage's file on its way, with its digest."""

    def __init__(self, folder: Path, stage: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{stage}.jsonl").open("wb")
        self._sha = hashlib.sha256()
        self._of_rows = bytearray()
        self._folder, self._stage = folder, stage
        self.rows = 0

    def add(self, *lines: str) -> None:
        """Writes whole lines."""
        for line in lines:
            content = f"{line}\n".encode()
            self._file.write(content)
            self._sha.update(content)
            self._of_rows += row_digest(content)
        self.rows += len(lines)

    def done(self, inputs: dict[str, str], **extra: Any) -> str:
        """Writes the meta file; returns the digest."""
        self._file.close()
        sha256 = self._sha.hexdigest()
        meta = {
            "schema_version": SCHEMA_VERSION, "rows": self.rows, "sha256": sha256,
            "row_digests": base64.b64encode(self._of_rows).decode(), "inputs": inputs, "seconds": 1.0,
        }  # fmt: skip
        write_json(self._folder / f"{self._stage}.meta.json", meta | extra)
        return sha256


class _Words:
    """Texts of made-up words, with their token ids, already as JSON."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(3000)]
        self._tokens = [str(rng.randrange(49_000)) for _ in range(_POOL)]
        self.replies = [
            f"{self.text(rng.randint(40, 80)).capitalize()}.\\n\\nVerdict: " for _ in range(_POOL)
        ]  # a reasoned reply without its verdict; \n as JSON has it

    def text(self, words: int) -> str:
        """So many words. They need no escaping in JSON."""
        return " ".join(self._rng.choices(self._words, k=words))

    def token_ids(self, count: int) -> str:
        """So many token ids."""
        start = self._rng.randrange(_POOL - count)
        return f"[{','.join(self._tokens[start : start + count])}]"


def write_run(
    path: Path, pairs: int = 200_000, iterations: int = 50, seed: int = 0, told: Progress | None = None
) -> None:
    """Writes a run of so many pairs (five votes each) over so many iterations, and two evaluations."""
    rng = random.Random(seed)
    words = _Words(rng)
    texts = [_text(1), _text(2)]
    job = parse_job(
        {
            "name": path.name,
            "iterations": iterations,
            "schedule": {0: "rules@1", **({iterations // 2: "rules@2"} if iterations > 1 else {})},
            "judge": {
                "kind": "chat", "model": "careful", "base_url": "https://judge.example/v1",
                "templates": list(_TEMPLATES), "jury": [{"model": "contrary", "base_url": "https://judge.example/v1"}],
                "prices": {"careful": {"prompt": 0.4, "completion": 1.6}},
            },
            "filters": {"min_agreement": 0.75},
            "learner": {"batch_size": PAIRS_PER_STEP},
        },
        "the benchmark",
    )  # fmt: skip
    path.mkdir(parents=True)
    tree = job.model_dump(mode="json")
    write_json(
        path / "run.json",
        {
            "schema_version": SCHEMA_VERSION, "rlaif": "0.1.0", "job": tree, "job_digest": digest(tree),
            "models": {"policy": "base-weights"}, "packages": {}, "python": "3.11", "revision": None,
        },
    )  # fmt: skip
    for text in texts:
        folder = path / "constitutions" / text.hash
        folder.mkdir(parents=True)
        write_json(folder / "constitution.json", text.model_dump(mode="json"))
        (folder / "source.yaml").write_text(_source(text.version))
    for template in _JUDGE_TEMPLATES:
        folder = path / "constitutions" / template.hash
        folder.mkdir()
        for source in template.sources:
            (folder / source.name).write_text(source.text)
    prompts = _write_prompts(path, words)
    run = _Run(path, job.filters, rng, words, prompts)
    events = [_event("started", None, f"{iterations} iterations")]
    for k in range(iterations):
        text = texts[0] if k < max(iterations // 2, 1) else texts[1]
        if k and k == iterations // 2:
            events.append(_event("constitution_changed", k, f"after {k} iterations, {text.ref} is in force"))
        share = pairs * (k + 1) // iterations - pairs * k // iterations
        run.iteration(k, text, share, k + 1 == iterations)
        if told:
            told(k + 1, iterations)
    for updates, text in ((0, texts[0]), (iterations, texts[-1] if iterations > 1 else texts[0])):
        run.evaluation(updates, text)
    events += [_event("alarm", iterations - 1, "an alarm of the benchmark"), _event("finished", None, "done")]
    (path / "events.jsonl").write_text("".join(f"{e}\n" for e in events))


def _text(version: int) -> Constitution:
    return parse_constitution(_source(version), "rules", version, "the benchmark")


def _source(version: int) -> str:
    """A constitution as its author would have written it."""
    sides = "prefer: Do it., avoid: Do not do it."
    return (
        f"summary: Rules {version}.\nprinciples:\n"
        f"  - {{id: answers, rule: Prefer the answer that answers the question., {sides}}}\n"
        f"  - {{id: brief, rule: 'Prefer the answer that is brief, version {version}.', {sides}}}\n"
    )


def _event(kind: str, iteration: int | None, message: str) -> str:
    value = {"time": "2026-01-01T00:00:00.000+00:00", "kind": kind, "iteration": iteration, "message": message}
    return json.dumps(value | {"data": {}})


def _write_prompts(path: Path, words: _Words) -> dict[str, str]:
    """Both prompt files; id → text."""
    (path / "prompts").mkdir()
    texts = {}
    for name in ("train", "held_out"):
        with (path / "prompts" / f"{name}.jsonl").open("w") as f:
            for i in range(PROMPTS):
                content = f"{words.text(14)}?"
                row = f'{{"id":"{name}-{i:05d}","messages":[{{"role":"user","content":"{content}"}}],"category":null}}'
                f.write(row + "\n")
                texts[f"{name}-{i:05d}"] = content
    return texts


class _Run:
    """What all iterations share."""

    def __init__(self, path: Path, filters: Filters, rng: random.Random, words: _Words, prompts: dict[str, str]):
        self.path, self.filters, self.rng, self.words, self.prompts = path, filters, rng, words, prompts
        self.step = 0
        self.policy = (0, "base-weights")

    def iteration(self, k: int, constitution: Constitution, pairs: int, evaluate: bool) -> None:
        """One iteration's folder."""
        folder = self.path / "iterations" / f"{k:04d}"
        folder.mkdir(parents=True)
        prompt_ids = [f"train-{(k * pairs + n) % PROMPTS:05d}" for n in range(pairs)]
        plan = {
            "iteration": k, "seed": 0, "constitution": constitution.ref.model_dump(), "templates": _TEMPLATES,
            "policy": {"iteration": self.policy[0], "digest": self.policy[1]},
            "prompt_ids": sorted(set(prompt_ids)), "evaluate": evaluate,
        }  # fmt: skip
        write_json(folder / "plan.json", plan)
        preferences, updates = _Rows(folder, "preferences"), _Rows(folder, "updates")
        kept: list[str] = []

        def keep(decision: Decision, pair: Pair, sides: tuple[str, str], answers: tuple[str, str], prompt: str) -> None:
            v = decision.verdict
            chosen = 0 if decision.winner == "first" else 1
            ids = (pair.first, pair.second)
            p = v.p_first if chosen == 0 else 1 - (v.p_first or 0)
            preferences.add(
                f'{{"pair_id":"{pair.id}","iteration":{k},"source":"judge","constitution":"{constitution.hash}",'
                f'"prompt_id":"{pair.prompt_id}","chosen_id":"{ids[chosen]}","rejected_id":"{ids[1 - chosen]}",'
                f'"prompt_token_ids":{prompt},"chosen_token_ids":{sides[chosen]},'
                f'"rejected_token_ids":{sides[1 - chosen]},'
                f'"prompt":"{self.prompts[pair.prompt_id]}","chosen":"{answers[chosen]}",'
                f'"rejected":"{answers[1 - chosen]}",'
                f'"p_chosen":{p},"agreement":{v.agreement}}}'
            )
            kept.append(pair.id)

        shas, counted = self._judged(folder, f"{k:04d}", constitution, prompt_ids, keep)
        shas["preferences"] = preferences.done({"decisions": shas["decisions"]})
        for at in range(0, len(kept), PAIRS_PER_STEP):
            self.step += 1
            ids = json.dumps(kept[at : at + PAIRS_PER_STEP], separators=(",", ":"))
            updates.add(
                f'{{"step":{self.step},"iteration":{k},"row_ids":{ids},"loss":{0.7 - 0.2 * self.rng.random():.6f},'
                f'"grad_norm":1.5,"learning_rate":0.00005,"seconds":0.5,"metrics":{{"margin":0.1,"accuracy":0.75}}}}'
            )
        after = digest([self.policy[1], shas["preferences"]])
        updates.done({"preferences": shas["preferences"]}, skipped=False, policy_digest=after)
        self.policy = (k + 1, after)
        metrics = IterationMetrics.model_validate({
            "iteration": k, "constitution": plan["constitution"], "policy": plan["policy"],
            "sampled": _sampled(2 * pairs), "pairs": pairs, "votes": VOTES_PER_PAIR * pairs, "abstentions": {},
            "kept": len(kept), "kept_share": len(kept) / pairs if pairs else None, "dropped_by_first_reason": counted,
            "mean_agreement": None, "trained_pairs": len(kept), "replayed_pairs": 0, "judge_tokens": 0,
            "steps": -(-len(kept) // PAIRS_PER_STEP), "loss": None, "grad_norm": None, "learner_metrics": {},
            "seconds": {},
        })  # fmt: skip
        write_json(folder / "metrics.json", metrics.model_dump(mode="json"))

    def evaluation(self, updates: int, constitution: Constitution) -> None:
        """One evaluation's folder; the base policy's has answers only."""
        folder = self.path / "evaluations" / f"{updates:04d}"
        prompt_ids = [f"held_out-{n:05d}" for n in range(EVALUATED_PROMPTS)]
        n = len(prompt_ids)
        wins = n
        if updates:
            _, counted = self._judged(folder, f"eval{updates:04d}", constitution, prompt_ids, None)
            wins = counted["first"]
        else:
            completions = _Rows(folder, "completions")
            for i in prompt_ids:
                completions.add(self._answer(f"eval0000-{i}-0", i, 0)[0])
            completions.done({})
        metrics = EvaluationMetrics.model_validate({
            "updates": updates, "constitution": constitution.ref, **_sampled(n), "wins": wins if updates else 0,
            "losses": n - wins, "undecided": 0, "win_rate": wins / n if updates else None,
            "win_interval": wilson(wins, n) if updates else None, "checks": {}, "kl_per_token": 0.1, "relevance": 0.5,
            "base_logprob_per_token": -1.0, "seconds": 0.0,
        })  # fmt: skip
        write_json(folder / "metrics.json", metrics.model_dump(mode="json"))

    def _answer(self, completion_id: str, prompt_id: str, index: int) -> tuple[str, str, str, str]:
        """A completion's row, its text, its token ids and its prompt's."""
        count = self.rng.randint(40, 140)
        text, tokens, prompt = self.words.text(count), self.words.token_ids(count), self.words.token_ids(40)
        row = (
            f'{{"id":"{completion_id}","prompt_id":"{prompt_id}","policy":{{"iteration":{self.policy[0]},'
            f'"digest":"{self.policy[1]}"}},"index":{index},"seed":{self.rng.randrange(2**31)},'
            f'"prompt_token_ids":{prompt},"token_ids":{tokens},"text":"{text}","finish_reason":"stop",'
            f'"logprob":-{count}.5}}'
        )
        return row, text, tokens, prompt

    def _judged(
        self,
        folder: Path,
        prefix: str,
        constitution: Constitution,
        prompt_ids: list[str],
        keep: Callable[..., None] | None,
    ) -> tuple[dict[str, str], Counter[str]]:
        """Completions, pairs, votes and decisions; their digests, and first reasons (or winners, in an evaluation)."""
        stages = ["completions", "pairs", "votes", "decisions"]
        rows = {s: _Rows(folder, s) for s in [*stages, "scores" if keep else "quality"]}
        counted: Counter[str] = Counter()
        for n, prompt_id in enumerate(prompt_ids):
            ids = [f"{prefix}-{prompt_id}-{n}-{i}" for i in (0, 1)]
            answers = [self._answer(c, prompt_id, i) for i, c in enumerate(ids)]
            rows["completions"].add(*(a[0] for a in answers))
            if not keep:
                rows["quality"].add(
                    *(f'{{"completion_id":"{i}","tokens":90,"logprob_per_token":-1.0,"relevance":0.5}}' for i in ids)
                )
            pair = Pair(id=digest([prompt_id, *ids]), prompt_id=prompt_id, first=ids[0], second=ids[1], method="random")
            rows["pairs"].add(pair.model_dump_json())
            cast = tuple(self._outcomes())
            rows["votes"].add(*(self._vote(i, cast[i], pair.id, constitution.hash) for i in range(VOTES_PER_PAIR)))
            decision = _decided(cast, self.filters)
            verdict = decision.verdict.model_copy(update={"pair_id": pair.id})
            decision = decision.model_copy(update={"pair_id": pair.id, "verdict": verdict})
            rows["decisions"].add(decision.model_dump_json())
            counted[verdict.outcome if not keep else decision.reasons[0] if decision.reasons else "kept"] += 1
            if keep and decision.winner:
                keep(decision, pair, *zip(*((a[2], a[1]) for a in answers), strict=True), answers[0][3])
        counted.pop("kept", None)
        shas: dict[str, str] = {}
        inputs = {"completions": [], "scores": ["completions"], "quality": ["completions"],
                  "pairs": ["completions", "scores"], "votes": ["pairs"], "decisions": ["votes"]}  # fmt: skip
        for stage in ("completions", "scores", "quality", "pairs", "votes", "decisions"):
            if stage in rows:
                shas[stage] = rows[stage].done({s: shas[s] for s in inputs[stage] if s in shas})
        return shas, counted

    def _outcomes(self) -> list[tuple[str, float | None]]:
        """What each vote says and its p(first): mostly all alike, sometimes a flip, a tie or nothing."""
        rng = self.rng
        first = rng.random() < 0.5
        mood = rng.random()
        out: list[tuple[str, float | None]] = []
        for i, (_, template, order) in enumerate(_ASKED):
            side = first
            if mood < 0.15 and template == "pairwise":  # names the slot shown first
                side = order == "forward"
            elif (mood < 0.3 and i == 4) or rng.random() < 0.02:
                side = not first
            if rng.random() < 0.01:
                out.append(("abstain", None))
            elif rng.random() < 0.02:
                out.append(("tie", None))
            else:
                p = round(0.55 + 0.05 * rng.randrange(9), 2)
                letter = p if side else round(1 - p, 2)
                out.append(("first" if side else "second", letter if template == "pairwise" else None))
        return out

    def _vote(self, i: int, cast: tuple[str, float | None], pair_id: str, constitution: str) -> str:
        juror, template, order = _ASKED[i]
        outcome, p = cast
        rng = self.rng
        letter = {"first": "A", "second": "B", "tie": "C"}.get(outcome, "I can not say.")
        if order == "reversed":
            letter = {"A": "B", "B": "A"}.get(letter, letter)
        reply = letter
        if template == "pairwise_reasoned":
            reply = rng.choice(self.words.replies) + {"C": "tie"}.get(letter, letter)
        reason = '"unparsed"' if outcome == "abstain" else "null"
        seed = rng.getrandbits(64)
        cached = seed % 20 == 0
        return (
            f'{{"ballot":{{"id":"{seed:016x}","pair_id":"{pair_id}","judge":"{_JUDGES[juror]}","voice":"{template}",'
            f'"principles":["answers","brief"],"guard":false,"order":"{order}","sample_index":0,"seed":0,'
            f'"constitution":"{constitution}","template":"{_TEMPLATES[template]}","parameters":"cccccccccccccccc"}},'
            f'"model":"{("careful", "contrary")[juror]}-2026-01","outcome":"{outcome}","abstain_reason":{reason},'
            f'"p_first":{"null" if p is None else p},"score_first":null,"score_second":null,"raw_reply":"{reply}",'
            '"finish_reason":"stop","prompt_hash":null,"mass_neither":null,"error":null,'
            f'"attempts":{0 if cached else 1},'
            f'"usage":{{"prompt_tokens":{400 + seed % 200},"completion_tokens":{len(reply) // 5 + 1}}},'
            f'"latency_s":{0.1 + seed % 997 / 1000:.3f},"cached":{"true" if cached else "false"}}}'
        )


def _sampled(answers: int) -> dict[str, float]:
    return {"answers": answers, "mean_words": 90.0, "mean_tokens": 90.0, "list_share": 0.0, "ended_share": 1.0,
            "distinct_share": 1.0}  # fmt: skip


@cache
def _decided(cast: tuple[tuple[str, float | None], ...], filters_: Filters) -> Decision:
    """The package's own decision on such votes; a pair of other names differs by its id only."""
    pair = Pair(id="p", prompt_id="q", first="a", second="b", method="random")
    votes = []
    for (juror, template, order), (outcome, p) in zip(_ASKED, cast, strict=True):
        ballot = Ballot(
            id="x", pair_id="p", judge=_JUDGES[juror], voice=template, principles=("answers", "brief"),
            order=order, constitution="c", template=_TEMPLATES[template],
        )  # fmt: skip
        abstained = "unparsed" if outcome == "abstain" else None
        votes.append(Vote(ballot=ballot, model="m", outcome=outcome, abstain_reason=abstained, p_first=p, raw_reply=""))
    return decide(aggregate(votes), pair, filters_, {"a": "1", "b": "2"})
