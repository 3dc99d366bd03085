"""`rlaif audit RUN agreement`: what the judge said, against what people said."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rlaif.cli.audit_common import run_of
from rlaif.console import Listing, inert, piped, stdout_console

if TYPE_CHECKING:
    from rlaif.trust.agreement import Agreement


def agreement(
    ctx: typer.Context,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """Judge against human on reviewed pairs: accuracy and Cohen's kappa, by slice.

    The labels are those of `rlaif review`. A pair on which a person, or the judge, named no side is counted apart.
    """
    from rlaif.trust.agreement import agreement as measured
    from rlaif.trust.agreement import labelled_pairs

    run = run_of(ctx)
    pairs, problems = labelled_pairs(run)
    rows = measured(pairs)
    for problem in problems:
        print(f"rlaif: {problem}", file=sys.stderr)
    if json_:
        beside = [
            {
                **x.label.model_dump(mode="json"),
                "judge": x.decision.verdict.outcome,
                "judge_p_first": x.decision.verdict.p_first,
                "judge_agreement": x.decision.verdict.agreement,
                "reasons": list(x.decision.reasons),
                "review_rule": x.decision.review_rule,
                "constitution": x.constitution,
            }
            for x in pairs
        ]
        agreed = [row.model_dump(mode="json") for row in rows]
        print(json.dumps({"run": str(run.path), "agreement": agreed, "labels": beside, "problems": problems}))
    elif not pairs:
        where = inert(str(run.path))
        stdout_console().print(f"{where}: no pair is labelled yet; rlaif review {where} shows those that wait")
    else:
        _table(rows)


def _table(rows: list[Agreement]) -> None:
    numbers = ("labels", "same side", "accuracy", "95%", "kappa", "human ties", "judge undecided")
    table = Listing("slice", "", *numbers, right=numbers, title="judge against human, on reviewed pairs")
    before = None
    for row in rows:
        low, high = row.interval
        value = str(int(row.value)) if row.slice == "iteration" else row.value
        table.add(
            "" if row.slice == before and not piped() else row.slice,
            value if row.slice != "all" else "",
            str(row.labels),
            f"{row.same}/{row.decided}",
            "-" if row.accuracy is None else f"{row.accuracy:.0%}",
            "-" if row.accuracy is None else f"{low:.0%}-{high:.0%}",
            "-" if row.kappa is None else f"{row.kappa:.2f}",
            str(row.human_ties),
            str(row.judge_undecided),
        )
        before = row.slice
    console = stdout_console()
    table.print(console)
    console.print(
        "Reviewed pairs are those that the filter doubted: this says little about the pairs that it was sure of."
    )
