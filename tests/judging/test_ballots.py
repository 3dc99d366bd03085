"""Who is asked: uses never mix, and a ballot's id changes with anything that could change the answer."""

from __future__ import annotations

from rlaif.constitution import parse_constitution
from rlaif.judging.ballots import deciding_voices, evaluating_voices, guard_voices, make_ballots, selecting_voices
from rlaif.records import Pair

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


def test_uses_do_not_mix():
    c = constitution()
    assert selecting_voices(c) == ["brief/paraphrase1"]
    assert deciding_voices(c) == ["brief/main"]
    assert evaluating_voices(c) == ["brief/paraphrase2"]
    assert guard_voices(c) == ["answers/relevance", "answers/fluency", "polite/main"]


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
