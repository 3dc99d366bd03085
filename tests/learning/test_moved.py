"""An update's brake (`learner.max_kl`), and the policy that it is pulled to (`learner.reference: at_change`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlaif import config
from rlaif.errors import RlaifError, UserError
from rlaif.learning import make_learner, too_far
from rlaif.learning.moved import Moved, term
from rlaif.records import TokenSequence
from rlaif.workers.weights import WeightsRef
from tests.learning.conftest import make_preferences
from tests.learning.test_contract import (
    BETA,
    by_hand,
    close,
    disturb,
    kl_by_hand,
    learner,
    sequence_logp,
    some_completions,
    weights,
)

pytestmark = pytest.mark.slow


def sequence(*token_ids: int) -> TokenSequence:
    return TokenSequence(prompt_token_ids=(1,), token_ids=token_ids)


def test_kl_of_tokens_by_hand() -> None:
    then = {sequence(3, 4): (-1.0, -2.0), sequence(5): (-3.0,)}
    now = {sequence(3, 4): (-1.5, -2.0), sequence(5): (-2.0,)}
    scores = iter([then, now, now])
    moved = Moved(lambda asked: [table[s] for table in [next(scores)] for s in asked])
    moved.begin([*then, sequence(5)])  # a completion that two rows share
    expected = [math.exp(-0.5) - 1 + 0.5, 0.0, math.exp(1) - 1 - 1]
    assert moved.kl([*then]) == pytest.approx(sum(expected) / 3)
    assert moved.kl([sequence(3, 4)]) == pytest.approx(sum(expected[:2]) / 2)


@pytest.mark.parametrize("log_ratio", [-30.0, -1.0, -1e-9, 0.0, 1e-9, 1.0, 5.0])
def test_a_term_is_never_negative(log_ratio: float) -> None:
    assert term(log_ratio) >= 0


@pytest.mark.parametrize("log_ratio", [1000.0, math.inf, -math.inf, math.nan])
def test_a_term_that_is_no_number_is_never_near(log_ratio: float) -> None:
    assert not term(log_ratio) <= 1e300


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_no_number_is_too_far(
    kl: float, model_path: str, settings: config.Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN is not greater than anything."""
    made = learner("dpo", model_path, settings, max_kl=1e9)
    (step,) = made.update(make_preferences(4), 0)
    assert not too_far(step, 1e9)
    assert too_far(step.model_copy(update={"metrics": {"kl": kl}}), 1e9)
    monkeypatch.setattr(Moved, "kl", lambda *_: kl)
    with pytest.raises(RlaifError, match=r"update step 2: KL from the policy .* broke the policy"):
        list(made.update(make_preferences(8), 1))


def test_terms_estimate_kl() -> None:
    """Drawn from the policy that began: their mean is KL(then, now)."""
    generator = torch.Generator().manual_seed(0)
    then, now = (torch.randn(50, generator=generator).log_softmax(-1) for _ in range(2))
    truth = float((then.exp() * (then - now)).sum())
    drawn = torch.multinomial(then.exp(), 40_000, replacement=True, generator=generator)
    found = sum(term(float(now[t] - then[t])) for t in drawn) / len(drawn)
    assert found == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("kind", ["dpo", "online_dpo"])
def test_an_update_stops_at_the_step_that_goes_too_far(kind: str, model_path: str, settings: config.Learner) -> None:
    pairs = make_preferences(16)
    free = learner(kind, model_path, settings, max_kl=1e9)
    steps = list(free.update(pairs, 0))
    kls = [s.metrics["kl"] for s in steps]
    assert len(steps) == 4
    assert all(kl > 0 for kl in kls)
    limit = (min(kls[:2]) + kls[1]) / 2 if kls[0] < kls[1] else kls[0] * 0.99
    stops = next(n for n, kl in enumerate(kls) if kl > limit)
    held = learner(kind, model_path, settings, max_kl=limit)
    taken = list(held.update(pairs, 0))
    assert [s.metrics["kl"] for s in taken] == pytest.approx(kls[: stops + 1])
    assert [too_far(s, limit) for s in taken] == [False] * stops + [True]
    assert held.global_step == stops + 1
    # The next update measures from its own beginning, and begins.
    assert next(held.update(pairs, 1)).metrics["kl"] > 0


def test_the_brake_measures_and_changes_nothing(model_path: str, settings: config.Learner) -> None:
    pairs = make_preferences(8)
    made = [learner("dpo", model_path, settings, max_kl=limit) for limit in (None, 1e9)]
    plain, measured = [list(m.update(pairs, 0)) for m in made]
    assert [s.loss for s in plain] == [s.loss for s in measured]
    assert all("kl" not in s.metrics for s in plain)
    close(weights(made[0]), weights(made[1]))


def test_kl_is_that_of_the_steps_rows(model_path: str, settings: config.Learner) -> None:
    pairs = make_preferences(4)
    made = learner("dpo", model_path, settings, max_kl=1e9)
    (step,) = made.update(pairs, 0)
    terms = []
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        after = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        after.load_state_dict(made.policy.state_dict())
        for p in pairs:
            for ids in (p.chosen_token_ids, p.rejected_token_ids):
                for end in range(1, len(ids) + 1):
                    place = (*p.prompt_token_ids, *ids[: end - 1])
                    log_r = sequence_logp(after, place, ids[end - 1 : end]) - sequence_logp(
                        before, place, ids[end - 1 : end]
                    )
                    terms.append(float(log_r.exp() - 1 - log_r))
    assert step.metrics["kl"] == pytest.approx(sum(terms) / len(terms), rel=1e-3)


@pytest.mark.parametrize("lora", [None, config.Lora(r=4)])
@pytest.mark.parametrize("kind", ["dpo", "online_dpo"])
def test_the_reference_is_the_policy_at_the_change(
    kind: str, lora: config.Lora | None, model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    made = make_learner(
        kind, model_path, settings.model_copy(update={"reference": "at_change", "lora": lora}), 7, None, "fp32"
    )
    pairs = make_preferences(4)
    first = next(iter(made.update(pairs, 0)))
    assert first.loss == pytest.approx(math.log(2), abs=1e-4), "until a change it is the untrained policy"
    change = made.export(tmp_path / "change")
    made.refer_to(change)
    again = next(iter(made.update(pairs, 1)))
    assert again.loss == pytest.approx(math.log(2), abs=1e-4), "the policy is its own reference at first"
    later = make_preferences(4, seed=3)
    before = next(iter(made.update(later, 2)))
    assert before.loss != pytest.approx(math.log(2), abs=1e-4), "and keeps it while it goes on"
    # A second change takes the first one's place.
    second = made.export(tmp_path / "second")
    made.refer_to(second)
    assert next(iter(made.update(later, 3))).loss == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("lora", [None, config.Lora(r=4)])
def test_in_bf16_the_policy_at_the_change_is_its_export(
    lora: config.Lora | None, model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"reference": "at_change", "lora": lora, "precision": "bf16"})
    made: Any = make_learner("dpo", model_path, settings, 7, None, "bf16")
    disturb(made)
    made.refer_to(made.export(tmp_path / "change"))
    assert next(iter(made.update(make_preferences(4), 0))).loss == pytest.approx(math.log(2), abs=1e-3)


def test_loss_against_the_policy_at_the_change(model_path: str, settings: config.Learner, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"reference": "at_change", "max_grad_norm": 1e6})
    made: Any = make_learner("dpo", model_path, settings, 7, None, "fp32")
    disturb(made)
    made.refer_to(made.export(tmp_path / "change"))
    disturb(made)
    pairs = make_preferences(4)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "change", dtype=torch.float32).eval()
    policy = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    policy.load_state_dict(made.policy.state_dict())
    expected, _ = by_hand(policy, reference, pairs)
    (step,) = made.update(pairs, 0)
    assert step.loss == pytest.approx(expected.item(), rel=1e-4)
    assert settings.beta == BETA


def test_kl_from_the_base_policy_is_not_from_the_reference(
    model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"reference": "at_change"})
    made: Any = make_learner("dpo", model_path, settings, 7, None, "fp32")
    disturb(made)
    made.refer_to(made.export(tmp_path / "change"))
    found = {d.completion_id: d.kl for chunk in made.divergences(some_completions()) for d in chunk}
    by_hand = kl_by_hand(made, model_path, some_completions())
    assert [found[c.id] for c in some_completions()] == pytest.approx(by_hand, rel=1e-3)
    assert min(by_hand) > 1e-3


def test_a_reference_whose_files_are_gone(model_path: str, settings: config.Learner, tmp_path: Path) -> None:
    made = learner("dpo", model_path, settings, reference="at_change")
    with pytest.raises(UserError, match="weights are gone"):
        made.refer_to(WeightsRef(digest="0" * 16, path=tmp_path / "none"))
