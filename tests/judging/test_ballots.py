"""Who is asked: uses never mix, and a ballot's id changes with anything that could change the answer."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as run_with
from hypothesis import strategies as st

from rlaif.config import Filters, Juror, LikelihoodSettings
from rlaif.constitutions.constitution import parse_constitution
from rlaif.constitutions.templates import parse_template
from rlaif.errors import UserError
from rlaif.judging.ballots import (
    ballots_of,
    evaluating_voices,
    juror_names,
    likelihood_parameters,
    make_ballots,
    make_chat_ballots,
    rounds,
    selecting_voices,
    settled,
)
from rlaif.judging.calibration import Panel
from rlaif.judging.filters import decide
from rlaif.judging.verdicts import aggregate
from rlaif.records import Pair, Vote, digest
from tests.judging.vote_makers import WEIGHTS, make_vote, vote_lists

TEXT = """
summary: Test.
principles:
  - {id: answers, rule: Answer the question., guard: true}
  - {id: polite, rule: Be polite., guard: true, prefer: Be polite., avoid: Be rude.}
  - id: brief
    rule: Be brief.
    prefer: Be brief.
    avoid: Be long.
    paraphrases:
      - {prefer: Few words., avoid: Many words., use: select}
      - {prefer: Short., avoid: Long., use: evaluate}
"""
PAIR = Pair(id="p", prompt_id="x", first="a", second="b", method="all")


def constitution(text=TEXT):
    return parse_constitution(text, "test", 1, "test.yaml")


@given(st.text(), st.text(), st.text(), st.text(), st.booleans())
def test_an_id_is_the_digest_of_the_question_and_its_pair(name, first, second, judge, with_parameters):
    """As every run's log has it: JSON is made of a question once, and of a pair's ids for each pair."""
    voice = {
        "judge": judge, "voice": "100%s", "principles": ("a", "%(b)s"), "guard": True, "sample_index": 2, "seed": 3,
        "constitution": "c", "template": "t",
    } | ({"parameters": "p"} if with_parameters else {})  # fmt: skip
    pair = Pair(id=name, prompt_id="x", first=first, second=second, method="all")
    for ballot in ballots_of([pair], [voice], ("forward", "reversed")):
        asked = {**voice, "order": ballot.order, "pair_id": name, "first": first, "second": second}
        assert ballot.id == digest(asked)
        assert ballot.model_dump(exclude={"id", "parameters"}) == {
            k: v for k, v in asked.items() if k not in ("first", "second", "parameters")
        }


def test_uses_do_not_mix():
    c = constitution()
    assert selecting_voices(c) == ["brief/paraphrase1"]
    assert [v.id for v in c.voices("decide") if not v.guard] == ["brief/main"]
    assert evaluating_voices(c) == ["brief/paraphrase2"]
    guards = [b.voice for b in make_ballots([PAIR], c, "j") if b.guard]
    assert guards == ["answers/relevance", "answers/fluency", "polite/main"]


def test_deciding_ballots_hold_guards_and_evaluating_ones_only_held_out_voices():
    deciding = make_ballots([PAIR], constitution(), "j")
    assert {(b.voice, b.guard) for b in deciding} == {
        ("brief/main", False), ("answers/relevance", True), ("answers/fluency", True),
        ("polite/main", True)
    }  # fmt: skip
    assert {b.voice for b in make_ballots([PAIR], constitution(), "j", "evaluate")} == {"brief/paraphrase2"}


def test_a_voice_that_selected_the_pair_does_not_vote_on_it():
    pair = PAIR.model_copy(update={"selected_by": ("brief/main",)})
    assert "brief/main" not in {b.voice for b in make_ballots([pair], constitution(), "j")}


def test_ids_change_with_the_question_and_with_nothing_else():
    def ids(pair=PAIR, text=TEXT, judge="j", seed=0):
        return {b.id for b in make_ballots([pair], constitution(text), judge, seed=seed)}

    assert ids() == ids()
    assert len(ids()) == 4
    for other in (
        ids(pair=PAIR.swap()),
        ids(text=TEXT.replace("Be long", "Be longer")),
        ids(judge="k"),
        ids(seed=1),
        ids(pair=PAIR.model_copy(update={"id": "q"})),
    ):
        assert not other & ids()


def test_settings_that_change_the_answer_change_the_question():
    def found(**changes):
        parameters = likelihood_parameters(LikelihoodSettings.model_validate(changes))
        ballots = make_ballots([PAIR], constitution(), "j", parameters=parameters)
        return frozenset(b.id for b in ballots), Panel.of(ballots).hash

    changes = ({"missing_eos_penalty": 1.0}, {"score_temperature": 1.0}, {"relevance_tolerance": 1.0},
               {"fluency_tolerance": 1.0})  # fmt: skip
    assert found() == found(batch_tokens=64)
    assert len({found(**c) for c in ({}, *changes)}) == 5
    # Ids of runs that were made before there were parameters.
    assert make_ballots([PAIR], constitution(), "j")[0].parameters == ""


# Judges behind servers


def jurors(*changes):
    return [Juror.model_validate({"model": "m", "api_key_env": None, "base_url": "http://me:pw@host:1/v1", **c})
            for c in changes or ({},)]  # fmt: skip


def template(text="", name="t"):
    source = (
        "{# verdict: letter; max_tokens: 8 #}{% block system %}{% for p in constitution.principles %}{{ p.rule }}"
        "{% endfor %}{% endblock %}{% block user %}{{ messages }}{{ code }}{{ first }}{{ code }}{{ second }}{{ code }}"
        "{{ principle.rule if principle else '' }}{% endblock %}"
    )
    return parse_template(name, {f"{name}.jinja": source + text})


def chat_ballots(pairs=(PAIR,), juror_list=None, templates=None, text=TEXT, **options):
    return list(
        make_chat_ballots(pairs, constitution(text), juror_list or jurors(), templates or [template()], **options)
    )


def test_a_chat_judge_is_asked_in_both_orders_times_everything():
    two = jurors({}, {"model": "n", "temperature": 1.0, "samples": 3})
    ballots = chat_ballots(juror_list=two, templates=[template(), template("x", "u")], votes_per_principle=True)
    assert len(ballots) == len({b.id for b in ballots}) == 2 * 2 * 3 * (1 + 3)
    voices = Counter((b.judge, b.voice, b.sample_index) for b in ballots)
    assert set(voices.values()) == {2}
    assert {b.voice for b in ballots} == {f"{t}/{p}" for t in "tu" for p in ("answers", "polite", "brief")}
    assert {b.principles for b in ballots if b.guard} == {("answers",), ("polite",)}
    assert {b.judge for b in ballots} == {"chat:m@host:1", "chat:n@host:1"}


def test_one_question_for_all_rules_unless_the_job_says_otherwise():
    for ballot in chat_ballots():
        assert (ballot.voice, ballot.principles, ballot.guard) == ("t", ("answers", "polite", "brief"), False)


def test_guards_do_not_evaluate():
    assert {b.voice for b in chat_ballots(votes_per_principle=True, role="evaluate")} == {"t/brief"}


def test_chat_ids_change_with_the_question_and_with_nothing_else():
    def ids(**options):
        return {b.id for b in chat_ballots(**options)}

    hot = {"temperature": 1.0}
    assert ids() == ids(seed=1) == ids(juror_list=jurors({"api_key_env": "X"}))
    assert ids(juror_list=jurors(hot)) != ids(juror_list=jurors(hot), seed=1)
    for other in (
        ids(pairs=[PAIR.swap()]),
        ids(text=TEXT.replace("Be brief.", "Be briefer.")),
        ids(templates=[template("!")]),
        *(ids(juror_list=jurors(c)) for c in (hot, {"max_tokens": 3}, {"model": "n"}, {"extra_body": {"a": 1}})),
    ):
        assert not other & ids()


def test_a_clamp_changes_the_questions_that_it_is_in_force_on():
    def panel(clamp, verdict):
        reads = template().model_copy(update={"verdict": verdict})
        return Panel.of(chat_ballots(templates=[reads], clamp=clamp)).hash

    assert panel(None, "last_line") != panel((0.4, 0.6), "last_line") != panel((0.3, 0.7), "last_line")
    assert panel(None, "letter") == panel((0.4, 0.6), "letter")


def test_two_jurors_that_differ_in_parameters_only_have_two_names():
    assert juror_names(jurors({}, {"temperature": 1.0}, {"model": "n"}, {})) == [
        "chat:m@host:1", "chat:m@host:1#2", "chat:n@host:1", "chat:m@host:1#3",
    ]  # fmt: skip


def test_votes_per_principle_need_a_template_that_shows_the_principle():
    deaf = parse_template("deaf", {"deaf.jinja": template().sources[0].text.replace("if principle", "if false")})
    with pytest.raises(UserError, match="`deaf` never shows `principle`"):
        chat_ballots(templates=[deaf], votes_per_principle=True)
    assert len(chat_ballots(templates=[deaf])) == 2


def test_rounds_hold_both_orders_of_each_pairs_next_voice():
    pairs = [PAIR, PAIR.model_copy(update={"id": "q", "selected_by": ("t",)})]
    ballots = chat_ballots(pairs=pairs, templates=[template(), template("x", "u"), template("y", "v")])
    turns = rounds(ballots)
    assert [len(r) for r in turns] == [4, 4, 2]
    assert sorted(b.id for r in turns for b in r) == sorted(b.id for b in ballots)
    for turn in turns:
        assert set(Counter((b.pair_id, b.judge, b.voice) for b in turn).values()) == {2}
        assert set(Counter(b.pair_id for b in turn).values()) == {2}


# Settled


def slot_ballot(n):
    """Ballots 0 and 1 are one voice's two orders, and so on; the last voice is a guard."""
    order = ("forward", "reversed")[n % 2]
    guard = n // 2 == 2
    return make_vote(
        "tie", n, voice=f"v{n // 2}", order=order, guard=guard, principle="kind" if guard else "brief"
    ).ballot


def answers(ballot):
    """What a vote on a ballot can be; soft votes can also contradict their outcome."""
    soft = (None,) if ballot.guard else (None, 0.0, 0.3, 0.6, 1.0)
    for outcome in ("first", "second", "tie"):
        for p in soft if outcome != "tie" else (None,):
            yield Vote(ballot=ballot, model="m", outcome=outcome, p_first=p, raw_reply="")
    yield Vote(ballot=ballot, model="m", outcome="abstain", abstain_reason="empty", raw_reply="")


@pytest.mark.slow
@run_with(deadline=None, max_examples=60)
@given(st.data())
def test_settled_means_that_nothing_can_change_the_decision(data):
    filters = Filters(
        min_votes=data.draw(st.integers(1, 4)),
        max_abstention_share=data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        min_agreement=data.draw(st.sampled_from([0.0, 0.5, 0.6, 0.75, 1.0])),
        min_margin=data.draw(st.sampled_from([0.0, 0.2, 0.4, 0.5])),
        guards=data.draw(st.booleans()),
    )
    # Whole voices, as rounds ask them; the other case is below.
    numbers = [n for voice in data.draw(st.permutations(range(3))) for n in (2 * voice, 2 * voice + 1)]
    cut = data.draw(st.sampled_from([2, 4]))
    votes = [data.draw(st.sampled_from(list(answers(slot_ballot(n))))) for n in numbers[:cut]]
    left = [slot_ballot(n) for n in numbers[cut:]]
    if not settled(votes, left, filters):
        return
    texts = {"a": "1", "b": "2"}
    ends = {
        (d.status, d.winner)
        for rest in itertools.product(*(list(answers(b)) for b in left))
        for d in [decide(aggregate([*votes, *rest]), PAIR, filters, texts)]
    }
    assert ends == {("dropped", None)}


def test_a_voice_that_was_asked_in_one_order_settles_nothing():
    none = [Vote(ballot=slot_ballot(n), model="m", outcome="abstain", abstain_reason="empty", raw_reply="")
            for n in (0, 1, 2)]  # fmt: skip
    strict = Filters(min_votes=4)
    assert settled(none[:2], [slot_ballot(n) for n in (2, 3)], strict)
    assert not settled(none, [slot_ballot(3)], strict)


def test_settled_saves_something():
    def vote(outcome, n):
        reason = "empty" if outcome == "abstain" else None
        return Vote(ballot=slot_ballot(n), model="m", outcome=outcome, abstain_reason=reason, raw_reply="")

    left = [slot_ballot(n) for n in (2, 3)]
    flip = [vote("first", 0), vote("second", 1)]
    agreed = [vote("first", 0), vote("first", 1)]
    assert settled(flip, left, Filters())
    assert not settled(flip, left, Filters(calibration="file.json"))
    assert not settled(agreed, left, Filters())
    assert settled(agreed, [], Filters())
    assert not settled([], left, Filters())
    assert settled([vote("first", 0), vote("tie", 1)], left, Filters(min_agreement=1.0))
    assert settled([vote("abstain", 0), vote("abstain", 1)], [slot_ballot(2)], Filters(max_abstention_share=0.5))
    assert not settled([vote("abstain", 0)], [slot_ballot(2)], Filters(max_abstention_share=0.5))
    both_vetoed = [*agreed, vote("first", 4), vote("second", 5)]
    assert settled(both_vetoed, left, Filters())
    assert not settled(both_vetoed, left, Filters(guards=False))


@given(vote_lists())
def test_settled_is_never_wrong_about_random_votes(votes):
    for cut in range(len(votes)):
        if settled(votes[:cut], [v.ballot for v in votes[cut:]], Filters(), WEIGHTS):
            assert decide(aggregate(votes, WEIGHTS), PAIR, Filters(), {"a": "1", "b": "2"}).status == "dropped"


def test_template_arguments_are_parameters_where_there_are_any() -> None:
    alike = (
        likelihood_parameters(LikelihoodSettings()),
        likelihood_parameters(LikelihoodSettings(chat_template_args={})),
    )
    assert len({*alike, "87910f03faa3ce99"}) == 1  # as every earlier run recorded it
    assert likelihood_parameters(LikelihoodSettings(chat_template_args={"enable_thinking": False})) not in alike
