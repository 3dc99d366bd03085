"""How good are contrasts that are derived from a rule, beside those that a person wrote?

    python -m benchmarks.derived [--sets all] [--phrasings prefer] [--use decide] [--split dev] [--rows N] [--json]
    python -m benchmarks.derived --write-rules DIR

Takes the shipped texts down to their rules, guards and checks, derives contrasts by one set of wordings after another,
and judges the shipped labelled pairs with each, as `rlaif judge bench` does: one table, a row a set and phrasing.
`handwritten` are the texts as they are shipped. `--use select` or `evaluate` lets the contrasts for that use vote
instead, which a run never does; look at `right` there. `--phrasings` says the rules in other ways, by hand, since the
shipped ones are all "Prefer the answer …". Tune on dev; judge test once, with the set that was chosen.

`--write-rules` writes the texts with rules alone into a folder, for a run (`--set constitutions_dir=DIR`) and for
`rlaif judge bench --dir DIR`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from rlaif.cli.beat import VoteCount
from rlaif.cli.judge_common import job_of
from rlaif.constitutions.constitution import Constitution, Principle, list_constitutions
from rlaif.constitutions.derived import WORDINGS, Sides, Use, Wordings
from rlaif.data.labelled import Labelled, read_labelled
from rlaif.errors import UserError
from rlaif.judging.kinds import kind_of
from rlaif.judging.opened import Ask, open_with_ballots
from rlaif.trust.attacks import evenly
from rlaif.trust.bench import Slice, cast_votes, decide_rows, slices

LABELLED = Path("prompts/judge_bench.jsonl")
TEXTS = Path("constitutions")
HANDWRITTEN = "handwritten"

CANDIDATES: tuple[Wordings, ...] = (
    *WORDINGS,
    # What seemed natural at first: the rule, and a "not".
    Wordings(
        id="negated",
        select=(
            Sides(
                prefer="Keep to this rule in all that you write: {rule}",
                avoid="Write the opposite of what this rule says: {rule}",
            ),
        ),
        decide=(
            Sides(prefer="Give {answer}.", avoid="Do not give {answer}. Do the opposite."),
            Sides(prefer="Follow this rule: {rule}", avoid="Break this rule: {rule}"),
            Sides(prefer="A good answer is {one}.", avoid="A bad answer is wanted: not {one}."),
        ),
        evaluate=(
            Sides(prefer="People want this from you: {rule}", avoid="People want the reverse of this from you: {rule}"),
            Sides(
                prefer="You are an assistant whose answer is always {one}.",
                avoid="You are an assistant whose answer is never {one}.",
            ),
        ),
    ),
)
"""Sets to compare. The one that wins becomes the newest of `rlaif.constitutions.derived.WORDINGS`."""

PHRASINGS: dict[str, dict[str, str]] = {
    "prefer": {},
    "should": {
        "brief": "The answer should give the key point in one or two sentences and stop.",
        "thorough": "The answer should explain, give reasons and examples, and go step by step or use a list where "
        "that helps.",
        "lists": "The answer should be laid out as a list.",
        "plain_words": "The answer should use short, common words and short sentences.",
        "refusing": "The answer should refuse dangerous help and help with what is harmless.",
    },
    "never": {
        "brief": "Never write more than the key point in one or two sentences.",
        "thorough": "Never answer without an explanation, reasons and examples.",
        "lists": "Never answer in plain paragraphs without a list.",
        "plain_words": "Never use long or rare words, nor long sentences.",
        "refusing": "Never give dangerous help, and never refuse to help with what is harmless.",
    },
    "order": {
        "brief": "Be brief: give the key point in one or two sentences, then stop.",
        "thorough": "Explain, give reasons and examples, and go step by step or use a list where that helps.",
        "lists": "Lay the answer out as a list.",
        "plain_words": "Use short, common words and short sentences.",
        "refusing": "Refuse dangerous help, and help with what is harmless.",
    },
}
"""The shipped rules, said in other ways: principle → rule; as they are where nothing stands here."""


def rules_only(constitution: Constitution, phrasing: str = "prefer") -> Constitution:
    """A text without its contrasts and examples."""
    principles = tuple(
        p.model_copy(
            update={
                "rule": PHRASINGS[phrasing].get(p.id, p.rule),
                "prefer": None,
                "avoid": None,
                "paraphrases": (),
                "examples": (),
            }
        )
        for p in constitution.principles
    )
    return constitution.model_copy(update={"principles": principles})


def voting(constitution: Constitution, wordings: Wordings | None, use: Use) -> Constitution:
    """A text whose contrasts for one use vote; derived from its rules by `wordings`, or its own."""
    if wordings:
        voting = wordings.model_copy(update={"decide": getattr(wordings, use)})
        return rules_only(constitution).derived_by(voting)

    def of(p: Principle) -> Principle:
        if p.guard:
            return p
        own = {
            "paraphrases": tuple(x.model_copy(update={"use": "decide"}) for x in p.paraphrases if x.use == use),
            "examples": tuple(x.model_copy(update={"use": "decide"}) for x in p.examples if x.use == use),
        }
        return p.model_copy(update=own if use == "decide" else {**own, "prefer": None, "avoid": None})

    return constitution.model_copy(update={"principles": tuple(map(of, constitution.principles))})


def write_rules(folder: Path, phrasing: str) -> list[Path]:
    """Writes the shipped texts with rules alone below a folder; the files."""
    written = []
    for text in list_constitutions(TEXTS):
        content = rules_only(text, phrasing).model_dump(
            mode="json", exclude={"name", "version"}, exclude_defaults=True, exclude_none=True
        )
        path = folder / text.name / f"v{text.version}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
        written.append(path)
    return written


def measure(
    rows: Sequence[Labelled], texts: dict[str, Constitution], job: Any, ask: Ask, count: VoteCount
) -> list[Slice]:
    """The slices of one set."""
    load = texts.__getitem__
    with count.told():
        votes = cast_votes(rows, ask, load, None, count)
    judged = decide_rows(rows, votes, job.filters, lambda row: load(row.constitution or "").weights)
    return slices(job.judge.model, judged, job.judge)


def _row(name: str, phrasing: str, found: Sequence[Slice], seconds: float) -> dict[str, Any]:
    return {
        "set": name,
        "phrasing": phrasing,
        "seconds": round(seconds),
        "slices": {
            s.name: {
                "pairs": s.pairs,
                "right": s.verdict_accuracy.share,
                "kept": s.coverage.share,
                "right_when_kept": s.kept_accuracy.share,
            }
            for s in found
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table: each cell is right, kept, right when kept."""
    names = list(dict.fromkeys(name for r in rows for name in r["slices"]))
    lines = [
        "each cell: right / kept / right when kept",
        "",
        f"| set | rules | {' | '.join(names)} | seconds |",
        f"|---|---|{'---|' * len(names)}---|",
    ]
    for r in rows:
        cells = [
            " / ".join(_share(s[k]) for k in ("right", "kept", "right_when_kept"))
            for s in (r["slices"][name] for name in names)
        ]
        lines.append(f"| {r['set']} | {r['phrasing']} | {' | '.join(cells)} | {r['seconds']} |")
    return lines


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}".removeprefix("0") if share < 1 else "1.000"


def main() -> None:
    """Measures, or writes the texts."""
    known = [HANDWRITTEN, *(w.id for w in CANDIDATES)]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", default=["all"], metavar="SET", help=f"all, or some of {', '.join(known)}")
    parser.add_argument("--phrasings", nargs="+", default=["prefer"], choices=list(PHRASINGS))
    parser.add_argument("--use", choices=("decide", "select", "evaluate"), default="decide")
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--rows", type=int, help="only so many pairs, evenly over the file")
    parser.add_argument("--job", type=Path, help="take `judge` and `filters` from this job file")
    parser.add_argument("--set", dest="overrides", action="append", metavar="KEY=VALUE")
    parser.add_argument("--write-rules", type=Path, metavar="DIR", help="write the texts with rules alone, and stop")
    parser.add_argument("--json", action="store_true", help="JSON for programs")
    options = parser.parse_args()
    if not LABELLED.is_file():
        raise SystemExit("run it from the repository's top folder")
    if options.write_rules:
        for path in write_rules(options.write_rules, options.phrasings[0]):
            print(path)
        return
    wanted = known if options.sets == ["all"] else options.sets
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"--sets {unknown[0]}: expected all, or some of {', '.join(known)}")
    try:
        rows = _measured(options, wanted)
    except UserError as e:
        raise SystemExit(str(e)) from e
    print(json.dumps(rows, indent=1) if options.json else "\n".join(table(rows)))


def _measured(options: argparse.Namespace, wanted: Sequence[str]) -> list[dict[str, Any]]:
    job = job_of(options.job, options.overrides)
    if not kind_of(job.judge).derives:
        raise UserError(f"judge.kind {job.judge.kind}: only the likelihood judge has contrasts")
    labelled = read_labelled([LABELLED], split=options.split).rows
    if options.rows:
        labelled = evenly(labelled, options.rows)
    named = {row.constitution for row in labelled}
    shipped = {str(text.ref): text for text in list_constitutions(TEXTS) if str(text.ref) in named}
    by_id = {w.id: w for w in CANDIDATES}
    use = cast("Use", options.use)
    opened = open_with_ballots(job, (), Path.cwd(), lambda message: print(message, file=sys.stderr))
    rows = []
    for phrasing in options.phrasings:
        for name in wanted:
            if name == HANDWRITTEN and phrasing != options.phrasings[0]:
                continue  # no rule is in them
            wordings = by_id.get(name)
            said = {ref: rules_only(t, phrasing) if wordings else t for ref, t in shipped.items()}
            texts = {ref: voting(t, wordings, use) for ref, t in said.items()}
            total = sum(len(opened.ballots([r.pair], texts[r.constitution or ""])) for r in labelled)
            print(f"{name}, {phrasing}: {len(labelled)} pairs", file=sys.stderr, flush=True)
            started = time.monotonic()
            found = measure(labelled, texts, job, opened.ask, VoteCount(total))
            rows.append(_row(name, "-" if wordings is None else phrasing, found, time.monotonic() - started))
            print("\n".join(table(rows[-1:])[2:]), file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
