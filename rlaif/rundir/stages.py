"""Which stages there are: the one place that loop, store, audit and pages read.

A stage is a file of rows of one record, made from the rows of the stages before it. To add one: a line here, a function
in `rlaif/loop/` that makes its rows, and a line in `Loop.iterate` that calls it.
"""

from __future__ import annotations

from typing import NamedTuple

from rlaif.records import (
    BaseLogprob,
    Completion,
    Decision,
    Divergence,
    OldPair,
    Pair,
    PolicyDistance,
    Preference,
    ProbeResult,
    Quality,
    Record,
    Score,
    TextScore,
    UpdateStep,
    Vote,
)


class Stage(NamedTuple):
    """A part of an iteration or an evaluation, with a file of its own."""

    name: str
    """Of the file, and in metrics and events."""
    record: type[Record]
    """What a row is."""
    inputs: tuple[str, ...] = ()
    """Stages that the rows are made from; their digests are in the meta file."""
    resumable: bool = False
    """Whether the rest can be made later: a vote stands by itself, an answer's sampling depends on its batch."""
    optional: bool = False
    """Only there where something was to be done."""
    spoken_of: bool = False
    """What later stages say is about these very rows: once one of them is begun, its durable rows stay."""


ITERATION = (
    Stage("change_pairs", Pair, optional=True),
    Stage("change_votes", Vote, ("change_pairs",), resumable=True, optional=True),
    Stage("change_decisions", Decision, ("change_votes",), optional=True),
    Stage("completions", Completion, spoken_of=True),
    Stage("scores", Score, ("completions",), resumable=True),
    Stage("pairs", Pair, ("completions", "scores")),
    Stage("votes", Vote, ("pairs",), resumable=True),
    Stage("base_logprobs", BaseLogprob, ("votes",), optional=True),
    Stage("decisions", Decision, ("votes",)),
    Stage("rejudged_votes", Vote, resumable=True, optional=True),
    Stage("old_pairs", OldPair, ("rejudged_votes",), optional=True),
    Stage("policy_distances", PolicyDistance, ("old_pairs",), resumable=True, optional=True),
    Stage("preferences", Preference, ("decisions", "old_pairs", "policy_distances")),
    Stage("updates", UpdateStep, ("preferences", "base_logprobs")),
    Stage("anchor_votes", Vote, resumable=True, optional=True),
)
"""Of an iteration, in the order of the data flow."""

EVALUATION = (
    Stage("completions", Completion),
    Stage("quality", Quality, ("completions",)),
    Stage("kl_completions", Completion),
    Stage("divergences", Divergence, ("kl_completions",)),
    Stage("pairs", Pair, ("completions",)),
    Stage("votes", Vote, ("pairs",), resumable=True),
    Stage("decisions", Decision, ("votes",)),
    Stage("probe_completions", Completion, optional=True),
    Stage("probe_results", ProbeResult, ("probe_completions",), optional=True),
    Stage("texts", TextScore, optional=True),
    Stage("earlier_pairs", Pair, ("completions",), optional=True),
    Stage("earlier_votes", Vote, ("earlier_pairs",), resumable=True, optional=True),
    Stage("earlier_decisions", Decision, ("earlier_votes",), optional=True),
    Stage("deciding_votes", Vote, ("pairs",), resumable=True, optional=True),
    Stage("deciding_decisions", Decision, ("deciding_votes",), optional=True),
    Stage("reference_votes", Vote, ("pairs",), resumable=True, optional=True),
    Stage("reference_decisions", Decision, ("reference_votes",), optional=True),
)
"""Of an evaluation, in the same order; those after `completions` are there where they are asked for."""

REFERENCE_VOTES = "reference_votes"
"""The stage of the reference judge's."""
VOTES = tuple(
    dict.fromkeys(s.name for s in (*ITERATION, *EVALUATION) if s.record is Vote and s.name != REFERENCE_VOTES)
)
"""Stages whose rows are votes: what the judge was asked, and cost, is all of them. The reference judge is another."""
MORE_VOTES = tuple(s.name for s in ITERATION if s.record is Vote and s.optional)
"""Of an iteration, those on pairs of earlier ones, and on held-out answers at a change of text."""
NAMES = tuple(stage.name for stage in ITERATION if not stage.optional)
"""Stages that every iteration has."""
ITERATION_NAMES = tuple(stage.name for stage in ITERATION)
"""Those, and the ones that only some have."""
EVALUATION_NAMES = tuple(stage.name for stage in EVALUATION if not stage.optional)
"""Stages that evaluations have, whatever the job measures beside them."""
