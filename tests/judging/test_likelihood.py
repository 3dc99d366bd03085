"""The likelihood judge on a tiny random model: the fast path equals the plain one, votes say what they measured."""

from __future__ import annotations

import copy
import json
import math

import diskcache
import pytest

from rlaif.config import LikelihoodSettings
from rlaif.constitutions.constitution import parse_constitution
from rlaif.errors import UserError
from rlaif.judging.ballots import make_ballots, selecting_voices
from rlaif.judging.cache import LikelihoodCache, likelihood_key
from rlaif.records import Message, Pair, Vote

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from rlaif.judging.candidates import Candidate  # noqa: E402
from rlaif.judging.kv_scoring import Continuation, KVScorer  # noqa: E402
from rlaif.judging.likelihood import LikelihoodJudge, in_context  # noqa: E402

TEXT = """
summary: Test.
principles:
  - {id: answers, rule: Answer the question., guard: true}
  - id: brief
    rule: Be brief.
    prefer: Be brief.
    avoid: Be long.
    paraphrases:
      - {prefer: Few words., avoid: Many words., use: select}
    examples:
      - {prompt: "Why?", better: So., worse: Because of a great many things., use: evaluate}
"""


class CharTokenizer:
    """One token a character, and a chat template of markers: small enough to read."""

    chat_template = "yes"
    eos_token_id = 1

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return "".join(f"<{m['role'][0]}>{m['content']}</>" for m in messages) + "<a>"

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i + 8) for i in ids if i > 1)

    def encode(self, text, add_special_tokens):
        return [ord(ch) - 8 for ch in text]


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).float().eval()


@pytest.fixture
def judge(model):
    return LikelihoodJudge.of(model, CharTokenizer(), LikelihoodSettings(batch_tokens=64), name="tiny")


@pytest.fixture
def constitution():
    return parse_constitution(TEXT, "test", 1, "test.yaml")


def candidate(n, prompt, text, finish="stop", system=None):
    messages = (*([Message(role="system", content=system)] if system else []), Message(role="user", content=prompt))
    return Candidate(completion_id=f"c{n}", prompt_id=prompt, messages=messages, finish_reason=finish, text=text)


CANDIDATES = [
    candidate(0, "What is bread?", "Food."),
    candidate(1, "What is bread?", "A food made of flour and water, baked.", "length"),
    candidate(2, "Why sleep, and for how long each night?", "To rest."),
    candidate(3, "Why sleep, and for how long each night?", "Nobody knows, but all animals do it."),
    candidate(4, "Hi", "Hello", system="You are kind."),
    candidate(5, "Hi", "Who?", "length", system="You are kind."),
]
PAIRS = [
    Pair(id=f"p{i}", prompt_id=CANDIDATES[i].prompt_id, first=f"c{i}", second=f"c{i + 1}", method="all")
    for i in (0, 2, 4)
]


def plain_logp(model, judge, messages, answer):
    """The obvious way: one whole sequence, all logits."""
    prompt = judge.reader.context(messages)
    ids = torch.tensor([[*prompt, *answer]])
    logp = model(ids).logits[0].log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, t].item() for i, t in enumerate(answer))


def flat(chunks):
    return [x for chunk in chunks for x in chunk]


@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_prefix_cache_equals_plain_path(model, constitution, batch_tokens):
    judge = LikelihoodJudge.of(
        model, CharTokenizer(), LikelihoodSettings(batch_tokens=batch_tokens, missing_eos_penalty=0.0)
    )
    for voice in constitution.voices():
        got = flat(judge.score(CANDIDATES, constitution, [voice.id]))
        for c, score in zip(CANDIDATES, got, strict=True):
            want = plain_logp(model, judge, in_context(voice.prefer, c.messages), judge.reader.answer(c))
            want -= plain_logp(model, judge, in_context(voice.avoid, c.messages), judge.reader.answer(c))
            assert abs(want) > 1e-3, "a contrast without effect tests nothing"
            assert score.value * math.sqrt(len(judge.reader.answer(c))) == pytest.approx(want, abs=1e-4)


SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
KINDS = {
    "Llama": SMALL,
    # Its soft-capping and its window, small enough to matter to this model.
    "Gemma2": SMALL | {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 16},
    "Granite": SMALL | {"logits_scaling": 8.0},
    "Cohere": SMALL | {"logit_scale": 0.0625},
    "GPT2": {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3},
}


def of_kind(kind):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind])
    auto = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return auto.float().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_scored_as_its_own_forward_pass_does(kind, constitution):
    model = of_kind(kind)
    judge = LikelihoodJudge.of(model, CharTokenizer(), LikelihoodSettings(batch_tokens=64))
    assert judge.scorer.plain_head == (kind in ("Llama", "GPT2"))
    for row, c in zip(flat(judge.plain(CANDIDATES)), CANDIDATES, strict=True):
        assert row.logp == pytest.approx(plain_logp(model, judge, c.messages, judge.reader.answer(c)), rel=1e-5)
    voice = constitution.voices()[0]
    messages = [in_context(voice.prefer, c.messages) for c in CANDIDATES]
    for m, c in zip(messages, CANDIDATES, strict=True):
        (found,) = judge.scorer.logps([Continuation((), judge.reader.context(m), judge.reader.answer(c))]).values()
        assert sum(found) == pytest.approx(plain_logp(model, judge, m, judge.reader.answer(c)), rel=1e-5)


def test_a_model_that_forgets_its_cache_is_refused(monkeypatch):
    model = of_kind("Llama")
    whole = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda input_ids, **_: whole(input_ids=input_ids))
    with pytest.raises(UserError, match="LlamaForCausalLM gives other likelihoods with cached keys"):
        LikelihoodJudge.of(model, CharTokenizer(), LikelihoodSettings())


def test_a_template_without_a_system_role_is_the_users_mistake(model, constitution):
    class NoSystem(CharTokenizer):
        def apply_chat_template(self, messages, **kwargs):
            if messages[0]["role"] == "system":
                raise RuntimeError("System role not supported")
            return super().apply_chat_template(messages, **kwargs)

    judge = LikelihoodJudge.of(model, NoSystem(), LikelihoodSettings(), name="tiny")
    with pytest.raises(UserError, match=r"judge\.model tiny: .*refuses the roles system, user \(System role not supp"):
        flat(judge.cast(make_ballots(PAIRS, constitution, "tiny"), PAIRS, CANDIDATES, constitution))


def as_sampled(judge, c: Candidate) -> Candidate:
    """A candidate as a policy with the judge's own tokenizer samples it."""
    return c.model_copy(
        update={"prompt_token_ids": judge.reader.context(c.messages), "token_ids": judge.reader.answer(c)}
    )


def guard_votes(judge, constitution, sides) -> dict[str, Vote]:
    """By measure, on the pair of the first two; no other voice is asked."""
    ballots = [b for b in make_ballots(PAIRS[:1], constitution, "tiny") if b.guard]
    votes = flat(judge.cast(ballots, PAIRS[:1], sides, constitution))
    return {v.ballot.voice.rpartition("/")[2]: v for v in votes}


def test_a_guards_vote_holds_what_a_reference_computes(model, judge, constitution):
    sides = [as_sampled(judge, c) for c in CANDIDATES]
    votes = guard_votes(judge, constitution, sides)
    assert votes.keys() == {"relevance", "fluency"}
    of = {c.completion_id: c for c in sides}
    wanted = [plain_logp(model, judge, of[i].messages, of[i].token_ids) for i in (PAIRS[0].first, PAIRS[0].second)]
    for vote in votes.values():
        assert vote.logprobs == pytest.approx(wanted, abs=1e-4)
    contrasts = [b for b in make_ballots(PAIRS, constitution, "tiny") if not b.guard]
    assert {v.logprobs for v in flat(judge.cast(contrasts, PAIRS, sides, constitution))} == {None}


@pytest.mark.parametrize(
    "other",
    [{"prompt_token_ids": ()}, {"prompt_token_ids": (1, 5)}, {"token_ids": None}, {"token_ids": (5,)}],
    ids=lambda other: f"{next(iter(other))}-{next(iter(other.values()))}",
)
def test_of_other_tokens_than_the_policys_it_holds_nothing(judge, constitution, other):
    """One side is enough: a pair trains as a whole."""
    sides = [as_sampled(judge, c) for c in CANDIDATES]
    sides = [c.model_copy(update=other) if c.completion_id == PAIRS[0].second else c for c in sides]
    assert {v.logprobs for v in guard_votes(judge, constitution, sides).values()} == {None}


def test_what_isnt_finite_is_nobodys_reference(judge, constitution, monkeypatch):
    """JSON has no infinity: a row that held one could not be read again."""
    logps = judge.scorer.logps
    monkeypatch.setattr(
        judge.scorer, "logps", lambda asked: {c: (-math.inf,) * len(v) for c, v in logps(asked).items()}
    )
    votes = guard_votes(judge, constitution, [as_sampled(judge, c) for c in CANDIDATES])
    assert {v.logprobs for v in votes.values()} == {None}


def test_what_is_rounded_to_bf16_is_nobodys_reference(model, constitution):
    rounded = LikelihoodJudge.of(copy.deepcopy(model).to(torch.bfloat16), CharTokenizer(), LikelihoodSettings())
    sides = [as_sampled(rounded, c) for c in CANDIDATES]
    votes = guard_votes(rounded, constitution, sides)
    assert {v.outcome for v in votes.values()} <= {"first", "second", "tie"}
    assert {v.logprobs for v in votes.values()} == {None}


def test_a_judge_that_rested_says_what_it_would_have_said(model, constitution):
    ballots = make_ballots(PAIRS, constitution, "tiny")
    said = []
    for rests in (False, True):
        own = copy.deepcopy(model)
        judge = LikelihoodJudge.of(own, CharTokenizer(), LikelihoodSettings(batch_tokens=64), name="tiny")
        if rests:
            judge.rest()
            assert sum(p.untyped_storage().nbytes() for p in (*own.parameters(), *own.buffers())) == 0
            judge.wake()
        votes = flat(judge.cast(ballots, PAIRS, CANDIDATES, constitution))
        said.append([v.model_copy(update={"latency_s": 0}) for v in votes])
    assert said[0] == said[1]
    assert said[0]


def test_end_token_is_scored_iff_the_completion_ended(judge):
    ended, cut = candidate(0, "Hi", "Hello", "stop"), candidate(1, "Hi", "Hello", "length")
    assert judge.reader.answer(ended) == (*judge.reader.answer(cut), 1)


def test_sampled_token_ids_are_scored_as_they_are(judge):
    ids = judge.reader.answer(CANDIDATES[1])
    cut = CANDIDATES[0].model_copy(update={"token_ids": ids, "text": CANDIDATES[1].text})
    assert judge.reader.answer(cut) == ids


def test_another_models_token_ids_are_read_anew(judge):
    c = CANDIDATES[0].model_copy(update={"token_ids": (7, 8, 9)})
    assert judge.reader.answer(c) == judge.reader.answer(CANDIDATES[0])


def test_vote_follows_the_score_difference(judge, constitution):
    ballots = make_ballots(PAIRS, constitution, "tiny")
    votes = flat(judge.cast(ballots, PAIRS, CANDIDATES, constitution))
    assert {v.ballot.id for v in votes} == {b.id for b in ballots}
    contrasts = [v for v in votes if not v.ballot.guard]
    assert contrasts
    for v in contrasts:
        difference = v.score_first - v.score_second
        assert v.outcome == ("first" if difference > 0 else "second")
        assert v.p_first == pytest.approx(1 / (1 + math.exp(-difference / 4)), abs=1e-3)


def test_swapping_a_pair_mirrors_its_votes(judge, constitution):
    mirrored = [p.swap() for p in PAIRS]
    votes = {
        (v.ballot.pair_id, v.ballot.voice): v
        for v in flat(judge.cast(make_ballots(PAIRS, constitution, "t"), PAIRS, CANDIDATES, constitution))
    }
    mirror = {"first": "second", "second": "first", "tie": "tie"}
    for v in flat(judge.cast(make_ballots(mirrored, constitution, "t"), mirrored, CANDIDATES, constitution)):
        assert v.outcome == mirror[votes[v.ballot.pair_id, v.ballot.voice].outcome]


def test_owed_ballots_get_the_numbers_of_a_whole_cast(model, constitution):
    settings = LikelihoodSettings(batch_tokens=64)
    ballots = make_ballots(PAIRS, constitution, "tiny")
    whole = LikelihoodJudge.of(model, CharTokenizer(), settings)
    want = {v.ballot.id: v.raw_reply for v in flat(whole.cast(ballots, PAIRS, CANDIDATES, constitution))}
    resumed = LikelihoodJudge.of(model, CharTokenizer(), settings)
    got = flat(resumed.cast(ballots[4:], PAIRS, CANDIDATES, constitution))
    assert {v.ballot.id: v.raw_reply for v in got} == {b.id: want[b.id] for b in ballots[4:]}


def test_guard_votes_against_the_side_beyond_its_tolerance(model, constitution):
    strict = LikelihoodJudge.of(
        model, CharTokenizer(), LikelihoodSettings(relevance_tolerance=0.0, fluency_tolerance=0.0)
    )
    loose = LikelihoodJudge.of(
        model, CharTokenizer(), LikelihoodSettings(relevance_tolerance=99.0, fluency_tolerance=99.0)
    )
    ballots = [b for b in make_ballots(PAIRS, constitution, "tiny") if b.guard]
    assert {b.voice for b in ballots} == {"answers/relevance", "answers/fluency"}
    for v in flat(strict.cast(ballots, PAIRS, CANDIDATES, constitution)):
        measure = v.ballot.voice.split("/")[1]
        a, b = json.loads(v.raw_reply)[measure]
        assert v.outcome == ("first" if a > b else "second")
    assert {v.outcome for v in flat(loose.cast(ballots, PAIRS, CANDIDATES, constitution))} == {"tie"}


def test_a_completion_that_was_cut_off_pays_for_it(model, constitution):
    free = LikelihoodJudge.of(model, CharTokenizer(), LikelihoodSettings(missing_eos_penalty=0.0))
    strict = LikelihoodJudge.of(model, CharTokenizer(), LikelihoodSettings(missing_eos_penalty=7.0))
    ballots = [b for b in make_ballots(PAIRS, constitution, "tiny") if not b.guard]
    cut = {c.completion_id for c in CANDIDATES if c.finish_reason == "length"}
    assert 0 < len(cut) < len(CANDIDATES)
    by_id = {p.id: p for p in PAIRS}
    for a, b in zip(*(flat(j.cast(ballots, PAIRS, CANDIDATES, constitution)) for j in (free, strict)), strict=True):
        pair = by_id[a.ballot.pair_id]
        assert b.score_first == pytest.approx(a.score_first - 7.0 * (pair.first in cut), abs=2e-4)
        assert b.score_second == pytest.approx(a.score_second - 7.0 * (pair.second in cut), abs=2e-4)


def test_a_completion_that_nobody_knows_the_end_of_pays_nothing(model, constitution):
    free, strict = (
        LikelihoodJudge.of(model, CharTokenizer(), LikelihoodSettings(missing_eos_penalty=p)) for p in (0.0, 7.0)
    )
    unknown = [c.model_copy(update={"finish_reason": None}) for c in CANDIDATES]
    ballots = [b for b in make_ballots(PAIRS, constitution, "tiny") if not b.guard]
    scores = [[v.score_first for v in flat(j.cast(ballots, PAIRS, unknown, constitution))] for j in (free, strict)]
    assert scores[0] == scores[1]
    assert all(strict.reader.answer(c)[-1] != 1 for c in unknown)


def test_plain_is_measured_against_another_prompt(model, judge):
    rows = flat(judge.plain(CANDIDATES))
    assert [r.completion_id for r in rows] == [c.completion_id for c in CANDIDATES]
    for c, r in zip(CANDIDATES, rows, strict=True):
        assert r.other_prompt_id != c.prompt_id
        assert r.logp == pytest.approx(plain_logp(model, judge, c.messages, judge.reader.answer(c)), abs=1e-4)
        assert r.relevance == pytest.approx((r.logp - r.logp_other) / r.tokens)


def test_empty_completion_abstains(judge, constitution):
    candidates = [candidate(0, "Hi", "", "length"), candidate(1, "Hi", "Hello")]
    pairs = [Pair(id="p", prompt_id="Hi", first="c0", second="c1", method="all")]
    votes = flat(judge.cast(make_ballots(pairs, constitution, "t"), pairs, candidates, constitution))
    assert {(v.outcome, v.abstain_reason) for v in votes} == {("abstain", "empty")}
    assert [s.completion_id for s in flat(judge.score(candidates, constitution, ["brief/main"]))] == ["c1"]


def test_each_request_is_computed_once(judge, constitution, monkeypatch):
    ballots = make_ballots(PAIRS, constitution, "tiny")
    list(judge.cast(ballots, PAIRS, CANDIDATES, constitution))
    monkeypatch.setattr(judge.scorer.model.base_model, "forward", lambda **_: pytest.fail("computed again"))
    list(judge.cast(ballots, PAIRS, CANDIDATES, constitution))


# Tokenizers as chat models have them: the end of a turn, and other models' tokens.


@pytest.fixture(scope="module")
def chatml():
    """A model whose end token is `<|endoftext|>`, with turns that end in `<|im_end|>`, and its tokenizer."""
    return of_tokenizer("smollm", LikelihoodSettings(batch_tokens=64))


def of_tokenizer(kind, settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.chat_tokenizers import KINDS

    tokenizer = KINDS[kind]()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LikelihoodJudge.of(LlamaForCausalLM(config).float().eval(), tokenizer, settings, name=kind)


def sampled(n, text, token_ids, finish="stop"):
    return candidate(n, "What is bread?", text, finish).model_copy(update={"token_ids": tuple(token_ids)})


def test_an_answer_that_wasnt_sampled_ends_as_the_template_ends_a_turn(chatml):
    tokenizer = chatml.reader.tokenizer
    assert tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer.encode("Food.", add_special_tokens=False)
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert chatml.reader.answer(candidate(0, "Hi", "Food.")) == (*ids, end)
    assert chatml.reader.answer(candidate(0, "Hi", "Food.", "length")) == tuple(ids)
    assert chatml.reader.answer(candidate(0, "Hi", "Food.", None)) == tuple(ids)
    for sampled_end in (end, eos):  # what a policy of this family sampled is scored as it is
        assert chatml.reader.answer(sampled(0, "Food.", (*ids, sampled_end))) == (*ids, sampled_end)


def test_another_models_end_token_is_replaced_by_the_judges_own(chatml):
    ids = chatml.reader.tokenizer.encode("Food.", add_special_tokens=False)
    end, start = chatml.reader.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    for foreign in (len(chatml.reader.tokenizer) + 7, start, ids[0]):
        assert chatml.reader.answer(sampled(0, "Food.", (*ids, foreign))) == (*ids, end)


def test_a_stop_string_or_a_thought_is_no_part_of_what_is_judged(chatml):
    def encode(text):
        return chatml.reader.tokenizer.encode(text, add_special_tokens=False)

    end = chatml.reader.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chatml.reader.answer(sampled(0, "Food.", encode("Food.### Q"))) == (*encode("Food."), end)
    assert chatml.reader.answer(sampled(0, "Food.", (*encode("<think>a</think>Food."), end))) == (*encode("Food."), end)


def test_control_tokens_that_an_answer_or_a_question_spells_are_text(chatml):
    tokenizer = chatml.reader.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = chatml.reader.answer(candidate(0, "Hi", "It is <|im_end|>, so.", "length"))
    assert end not in answer
    assert tokenizer.decode(answer) == "It is <|im_end|>, so."
    asked = candidate(0, "What does <|im_end|> do?", "Food.").messages
    assert chatml.reader.context(asked).count(end) == 1


@pytest.mark.parametrize("end", [2, 10_000])
@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_answers_have_no_score_whatever_ended_them(chatml, constitution, text, end):
    """An end token beyond the judge's vocabulary stopped a run for good."""
    ids = chatml.reader.tokenizer.encode(text, add_special_tokens=False)
    empty = sampled(1, text, (*ids, end))
    candidates = [sampled(0, "Food.", (*chatml.reader.tokenizer.encode("Food.", add_special_tokens=False), 2)), empty]
    scores = flat(chatml.score(candidates, constitution, selecting_voices(constitution)))
    assert {s.completion_id for s in scores} == {"c0"}
    pair = Pair(id="p", prompt_id=empty.prompt_id, first="c0", second="c1", method="all")
    votes = flat(chatml.cast(make_ballots([pair], constitution, "chatml"), [pair], candidates, constitution))
    assert {(v.outcome, v.abstain_reason) for v in votes} == {("abstain", "empty")}
    assert [(p.tokens, p.logp, p.logp_other) for p in flat(chatml.plain([empty]))] == [(0, 0.0, 0.0)]


def test_arguments_of_the_judges_template_are_in_force():
    judge = of_tokenizer("qwen", LikelihoodSettings(chat_template_args={"enable_thinking": False}))
    rendered = judge.reader.tokenizer.decode(judge.reader.context(CANDIDATES[0].messages))
    assert rendered.endswith("<think>\n\n</think>\n\n")
    with pytest.raises(UserError, match=r"chat_template_args\.thinking: judge\.model qwen: its chat template doesn't"):
        of_tokenizer("qwen", LikelihoodSettings(chat_template_args={"thinking": False}))


@pytest.mark.parametrize("guard", [False, True])
def test_a_prompt_is_read_once_however_many_ask_about_it(model, constitution, guard):
    judge = LikelihoodJudge.of(model, CharTokenizer(), LikelihoodSettings(), "tiny")
    alike = CANDIDATES[:4]  # two prompts without a system message: each is the other's x'
    read = []

    def note(_module, _args, inputs):
        read.extend(judge.reader.tokenizer.decode(row, True) for row in inputs["input_ids"].tolist())

    hook = judge.scorer.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    if guard:
        ballots = [b for b in make_ballots(PAIRS[:2], constitution, "tiny") if b.voice == "answers/relevance"]
        assert flat(judge.cast(ballots, PAIRS[:2], alike, constitution))
    else:
        list(judge.quality(alike))
    hook.remove()  # the model is the module's
    for prompt in {c.prompt_id for c in alike}:
        assert sum(prompt in text for text in read) == 1


class Counted(KVScorer):
    """Keeps what it was asked to compute."""

    def __init__(self, *args):
        self.asked = []
        super().__init__(*args)
        self.asked.clear()  # that of its trial

    def logps(self, continuations):
        self.asked.extend(continuations)
        return super().logps(continuations)


@pytest.fixture
def remembering(model, tmp_path, monkeypatch):
    """Makes a judge with a cache, and the list of what it computes."""
    monkeypatch.setattr("rlaif.judging.likelihood.KVScorer", Counted)

    def make(weights="w", model=model, **settings):
        judge = LikelihoodJudge.of(model, CharTokenizer(), LikelihoodSettings(batch_tokens=64, **settings), name="tiny")
        judge.remember(LikelihoodCache(tmp_path), weights)
        return judge, judge.scorer.asked

    return make


def said(judge, constitution, candidates=CANDIDATES):
    ballots = make_ballots(PAIRS, constitution, "tiny")
    votes = flat(judge.cast(ballots, PAIRS, candidates, constitution))
    return [v.model_copy(update={"latency_s": 0.0, "cached": False}) for v in votes], {v.cached for v in votes}


def test_what_a_frozen_judge_computed_is_kept_to_the_last_bit(constitution, judge, remembering):
    plain = said(judge, constitution)
    first, computed = remembering()
    assert said(first, constitution) == plain
    assert computed
    again, computed = remembering()
    votes, cached = said(again, constitution)
    assert (votes, cached, computed) == (plain[0], {True}, [])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("missing_eos_penalty", 3.0), ("score_temperature", 7.0), ("relevance_tolerance", 0.001),
     ("fluency_tolerance", 0.001)],
)  # fmt: skip
def test_a_setting_of_votes_makes_other_votes_of_the_same_likelihoods(model, constitution, remembering, setting, value):
    first, _ = remembering()
    before, _ = said(first, constitution)
    fresh = LikelihoodJudge.of(
        model, CharTokenizer(), LikelihoodSettings(batch_tokens=64, **{setting: value}), name="tiny"
    )
    again, computed = remembering(**{setting: value})
    votes, _ = said(again, constitution)
    assert votes == said(fresh, constitution)[0] != before
    assert computed == []


def other_candidates(**change):
    return [c.model_copy(update=change) if c.completion_id == "c3" else c for c in CANDIDATES]


@pytest.mark.parametrize(
    "change",
    [{"finish_reason": "length"}, {"text": "Nobody knows."},
     {"messages": (Message(role="user", content="Why sleep, and for how long each day?"),)}],
    ids=["cut off", "text", "prompt"],
)  # fmt: skip
def test_another_answer_or_prompt_is_computed(model, constitution, remembering, change):
    first, _ = remembering()
    said(first, constitution)
    changed = other_candidates(**change)
    again, computed = remembering()
    fresh = LikelihoodJudge.of(model, CharTokenizer(), LikelihoodSettings(batch_tokens=64), name="tiny")
    votes, cached = said(again, constitution, changed)
    for vote, wanted in zip(votes, said(fresh, constitution, changed)[0], strict=True):
        assert vote.score_first == pytest.approx(wanted.score_first, abs=2e-4)  # batched otherwise
        assert vote.score_second == pytest.approx(wanted.score_second, abs=2e-4)
    assert computed
    assert False in cached


def test_other_wording_weights_or_precision_are_computed(model, constitution, remembering):
    first, everything = remembering()
    said(first, constitution)
    reworded = parse_constitution(TEXT.replace("prefer: Be brief.", "prefer: Be short."), "test", 1, "test.yaml")
    again, computed = remembering()
    said(again, reworded)
    assert any("Be short." in again.reader.tokenizer.decode(c.context, True) for c in computed)
    assert not any("Be brief." in again.reader.tokenizer.decode(c.context, True) for c in computed)
    assert len(computed) < len(everything)
    weights, computed = remembering(weights="v")
    said(weights, constitution)
    assert len(computed) == len(everything)
    import copy

    half, computed = remembering(model=copy.deepcopy(model).bfloat16())
    said(half, constitution)
    assert len(computed) == len(everything)
    assert first.scorer.computed_by("w") != half.scorer.computed_by("w")


def test_a_damaged_likelihood_is_computed_again(constitution, remembering, tmp_path):
    first, everything = remembering()
    before = said(first, constitution)
    by_key = {likelihood_key(first.scorer.computed_by("w"), c.context, c.token_ids): c for c in everything}
    damaged = dict(zip(by_key, (b"abc", "text", b""), strict=False))
    with diskcache.Cache(str(tmp_path)) as store:
        assert by_key.keys() == set(store)
        for key, value in damaged.items():
            store[key] = value
    again, computed = remembering()
    assert said(again, constitution)[0] == before[0]
    assert set(computed) == {by_key[key] for key in damaged}


def test_a_key_tells_context_and_answer_apart():
    keys = {likelihood_key("m", c, a) for c, a in (((1, 2), (3,)), ((1,), (2, 3)), ((1, 2, 3), ()), ((), (1, 2, 3)))}
    assert len(keys) == 4
    assert likelihood_key("n", (1,), (2,)) != likelihood_key("m", (1,), (2,))
