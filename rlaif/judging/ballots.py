"""Who is asked what: which voices select, decide and evaluate, and the ballots for a set of pairs. Pure.

The three uses never mix: a voice that selected a pair never votes on it, and a held-out contrast
(`use: evaluate`) neither selects nor decides, so that what measures the policy has not trained it.

A judge behind a server is asked in both orders always, times templates, samples, jurors and, where the job says so,
principles. Early stop: its ballots in rounds, and when a pair needs no more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from json.encoder import encode_basestring as json_string
from typing import Any, Literal
from urllib.parse import urlsplit

from rlaif.config import Filters, Juror, LikelihoodSettings
from rlaif.constitutions.constitution import Constitution, Principle, Use
from rlaif.constitutions.templates import Template, asks_by_principle
from rlaif.errors import UserError
from rlaif.judging import filters as rules
from rlaif.judging.verdicts import aggregate
from rlaif.records import (
    Ballot,
    Order,
    Outcome,
    Pair,
    Side,
    VoiceKey,
    Vote,
    canonical,
    digest,
    digest_of_text,
)

Role = Literal["decide", "evaluate"]

GUARD_MEASURES = ("relevance", "fluency")
"""What a likelihood judge measures for a guard that has no contrast of its own."""

_SIDES: tuple[Side, ...] = ("first", "second")

# How many tokens to ask for at each place. Twenty is the most that servers give; with reasoning before the verdict
# every one of its tokens carries them too.
_TOP_LOGPROBS = {"letter": 20, "last_line": 5}


def selecting_voices(constitution: Constitution) -> list[str]:
    """Ids of the voices that score single completions to choose pairs."""
    return _electing(constitution, "select")


def evaluating_voices(constitution: Constitution) -> list[str]:
    """Ids of the held-out voices that only measure."""
    return _electing(constitution, "evaluate")


def make_ballots(
    pairs: Iterable[Pair],
    constitution: Constitution,
    judge_name: str,
    role: Role = "decide",
    seed: int = 0,
    parameters: str = "",
) -> list[Ballot]:
    """Ballots for a judge without slots: one per pair and voice, pair by pair.

    `decide` asks the deciding voices and the guards; `evaluate` asks the held-out voices only. `judge_name` should name
    the exact weights, and `parameters` be those of the judge's settings (`likelihood_parameters`).
    """
    asked: list[tuple[str, str, bool, str]] = [
        (v.id, v.principle, False, v.hash) for v in constitution.voices(role) if not v.guard
    ]
    if role == "decide":
        asked += [(v, p.id, True, template) for p in constitution.principles for v, template in _guard_voices(p)]
    voices = [
        {
            "judge": judge_name,
            "voice": voice,
            "principles": (principle,),
            "guard": guard,
            "sample_index": 0,
            "seed": seed,
            "constitution": constitution.hash,
            "template": template,
            **({"parameters": parameters} if parameters else {}),
        }
        for voice, principle, guard, template in asked
    ]
    return list(ballots_of(pairs, voices, ("none",)))


def ballots_of(pairs: Iterable[Pair], voices: Sequence[Mapping[str, Any]], orders: Sequence[Order]) -> Iterator[Ballot]:
    """A ballot for every pair, voice and order, pair by pair, one at a time: there may be millions. A voice is all of a
    ballot's fields but pair and order; one that selected a pair has no word on it.

    An id is the digest of everything that could change the answer, so a vote is found again iff the question is the
    same.
    """
    asked = [{**voice, "order": order} for voice in voices for order in orders]
    identities = [_identity_of(question) for question in asked]
    for pair in pairs:
        ids = pair.first, pair.id, pair.second
        for question, identity in zip(asked, identities, strict=True):
            if question["voice"] not in pair.selected_by:
                yield Ballot.model_validate({"id": identity(*ids), "pair_id": pair.id, **question})


def _identity_of(question: Mapping[str, Any]) -> Callable[[str, str, str], str]:
    """The `digest` of a question together with a pair's first completion, its id and its second completion: all but
    these is made into JSON once."""
    names = ("first", "pair_id", "second")  # in the order of sorted keys
    texts = {name: canonical(value).replace("%", "%%") for name, value in question.items()} | dict.fromkeys(names, "%s")
    form = "{" + ",".join(f"{canonical(name)}:{texts[name]}" for name in sorted(texts)) + "}"
    return lambda first, pair_id, second: digest_of_text(form % tuple(map(json_string, (first, pair_id, second))))


def likelihood_parameters(settings: LikelihoodSettings) -> str:
    """Digest of what turns a likelihood judge's numbers into votes."""
    names = ("missing_eos_penalty", "score_temperature", "relevance_tolerance", "fluency_tolerance")
    numbers = {name: getattr(settings, name) for name in names}
    # What older runs didn't have is in the digest only where it is set: theirs stays the same.
    return digest(numbers | {k: v for k in ("chat_template_args",) if (v := getattr(settings, k))})


def juror_names(jurors: Sequence[Juror]) -> list[str]:
    """What ballots call each juror: model and server, numbered where two have both in common. Never a key. One with a
    list of servers is the model alone: who of them is asked changes no question."""
    names: list[str] = []
    for juror in jurors:
        name = f"chat:{juror.model}"
        if isinstance(juror.base_url, str):
            # Without the user and password that an address can hold.
            name += f"@{urlsplit(juror.base_url).netloc.rpartition('@')[2]}"
        same = sum(n == name or n.startswith(f"{name}#") for n in names)
        names.append(f"{name}#{same + 1}" if same else name)
    return names


def request_parameters(juror: Juror, template: Template) -> dict[str, Any]:
    """Everything of a request but its messages and its seed, as the server gets it; null in `extra_body` removes."""
    body: dict[str, Any] = {
        "model": juror.model,
        "temperature": juror.temperature,
        "max_tokens": juror.max_tokens or template.max_tokens,
    }
    if juror.logprobs and template.verdict in _TOP_LOGPROBS:
        body |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS[template.verdict]}
    if template.json_schema is not None:
        schema = {"name": "verdict", "strict": True, "schema": template.json_schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if "max_completion_tokens" in juror.extra_body:  # servers refuse both
        del body["max_tokens"]
    return {k: v for k, v in (body | juror.extra_body).items() if v is not None}


def _chat_parameters(juror: Juror, template: Template, clamp: tuple[float, float] | None) -> str:
    """Digest of the request's parameters, and of how its reply is read."""
    parameters = request_parameters(juror, template)
    more: dict[str, Any] = {}
    if clamp is not None and template.verdict != "letter":
        more["clamp"] = clamp
    if juror.system_role != "auto":
        more["system_role"] = juror.system_role
    return digest([parameters, more] if more else parameters)


def make_chat_ballots(
    pairs: Iterable[Pair],
    constitution: Constitution,
    jurors: Sequence[Juror],
    templates: Sequence[Template],
    role: Role = "decide",
    votes_per_principle: bool = False,
    seed: int = 0,
    clamp: tuple[float, float] | None = None,
) -> Iterator[Ballot]:
    """Ballots for judges behind servers, pair by pair, one at a time: there may be millions.

    A voice is template, principle (with `votes_per_principle`), juror and sample; each is asked in both orders. With
    votes per principle a guard's ballots can veto, and are left out of `evaluate`; otherwise one question shows all
    rules. At temperature 0 the seed is 0 whatever the job's: the question is the same. `templates` are those of the
    role (`template_names`), `clamp` is the job's (`judge.clamp`).

    Raises:
        UserError: votes per principle from a template that asks about the whole constitution only.
    """
    principles: list[Principle | None] = [None]
    if votes_per_principle:
        principles = [p for p in constitution.principles if role == "decide" or not p.guard]
        for template in templates:
            if not asks_by_principle(template):
                raise UserError(
                    f"judge.votes_per_principle: template `{template.name}` never shows `principle`, so every question "
                    "would be the same; show it, or set judge.votes_per_principle: false"
                )
    everything = tuple(p.id for p in constitution.principles)
    voices = [
        {
            "judge": name,
            "voice": f"{template.name}/{principle.id}" if principle else template.name,
            "principles": (principle.id,) if principle else everything,
            "guard": principle is not None and principle.guard,
            "sample_index": sample,
            "seed": (seed * 1_000_003 + sample) % 2**31 if juror.temperature > 0 else 0,
            "constitution": constitution.hash,
            "template": template.hash,
            "parameters": _chat_parameters(juror, template, clamp),
        }
        for sample in range(max(j.samples for j in jurors))
        for template in templates
        for principle in principles
        for juror, name in zip(jurors, juror_names(jurors), strict=True)
        if sample < juror.samples
    ]
    yield from ballots_of(pairs, voices, ("forward", "reversed"))


def rounds(ballots: Iterable[Ballot]) -> list[list[Ballot]]:
    """The ballots in rounds, for early stop: in each, every pair's next voice, in both orders. Follows from the
    ballots' own order alone, never from who answers first."""
    out: list[list[Ballot]] = []
    voices: dict[str, dict[VoiceKey, int]] = {}
    for ballot in ballots:
        mine = voices.setdefault(ballot.pair_id, {})
        turn = mine.setdefault(ballot.voice_key, len(mine))
        if turn == len(out):
            out.append([])
        out[turn].append(ballot)
    return out


def settled(
    votes: Sequence[Vote], left: Sequence[Ballot], settings: Filters, weights: Mapping[str, float] | None = None
) -> bool:
    """Whether no answer to the ballots that are left can change the filter's decision on a pair.

    True once nothing is left, or when neither side can be kept any more. A pair that would be kept now never is
    settled before its last vote: that vote could flip the order. Never true with a calibrated filter or a review,
    which compare verdicts of all votes, nor while a voice has been asked in one of its orders only: an abstention in
    the other takes its vote away again.
    """
    if not left:
        return True
    if not votes or settings.calibration is not None or settings.review is not None:
        return False
    if {v.ballot.voice_key for v in votes} & {b.voice_key for b in left}:
        return False
    return not any(_can_be_kept(side, votes, left, settings, weights) for side in _SIDES)


def _can_be_kept(
    side: Side, votes: Sequence[Vote], left: Sequence[Ballot], settings: Filters, weights: Mapping[str, float] | None
) -> bool:
    """Whether some answers could; each rule is given those that suit it best, so this errs on the side of yes."""
    so_far = aggregate(votes, weights)
    if rules.order_flip(so_far, settings):
        return False
    best = aggregate([*votes, *(_unanimous(b, side) for b in left)], weights)
    if rules.too_few_votes(best, settings) or rules.abstained(best, settings):
        return False
    against = so_far.guard_second if side == "first" else so_far.guard_first
    if settings.guards and against:
        return False
    if settings.aggregate == "dawid_skene":  # what a vote weighs is known after the last one
        return True
    if settings.aggregate == "majority":
        hard = [v.model_copy(update={"p_first": None}) for v in votes]
        best = aggregate([*hard, *(_unanimous(b, side) for b in left)], weights)
    elif settings.aggregate == "mean" and rules.low_margin(best, settings):
        return False
    return best.outcome == side and not rules.low_agreement(best, settings)


def _unanimous(ballot: Ballot, side: Side) -> Vote:
    """The vote that helps a side most: for it, or from a guard not against it."""
    outcome: Outcome = "tie" if ballot.guard else side
    return Vote(ballot=ballot, model="", outcome=outcome, raw_reply="")


def _electing(constitution: Constitution, use: Use) -> list[str]:
    return [v.id for v in constitution.voices(use) if not v.guard]


def _guard_voices(principle: Principle) -> list[tuple[str, str]]:
    """(voice id, hash of what it shows) for a guard principle; empty for one that elects."""
    if not principle.guard:
        return []
    contrasts = [(v.id, v.hash) for v in principle.voices if v.use == "decide"]
    return contrasts or [(f"{principle.id}/{m}", digest(["guard", m])) for m in GUARD_MEASURES]
