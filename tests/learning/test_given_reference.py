"""A reference that somebody else has scored is taken as it is, if it is the same."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from rlaif import config
from rlaif.learning import make_learner
from rlaif.learning.base import epoch_order
from rlaif.learning.dpo import APART, COMPARED, LOSSES
from rlaif.records import Preference
from tests.learning.conftest import make_preferences

pytestmark = pytest.mark.slow

ROWS = 12


def pairs() -> list[Preference]:
    return make_preferences(ROWS)


@pytest.fixture(scope="module")
def scored(model_path: str) -> dict[str, float]:
    """log p of every completion under the untrained policy, each by a pass of its own."""
    return scores_of(model_path, pairs())


def scores_of(model_path: str, rows: list[Preference]) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    out = {}
    for pair in rows:
        for i, sequence in zip((pair.chosen_id, pair.rejected_id), pair.sequences, strict=True):
            ids = torch.tensor([sequence.all_ids])
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            out[i] = float(log_p[len(sequence.prompt_token_ids) - 1 :].sum())
    return out


def trained(
    path: str,
    settings: config.Learner,
    given: dict[str, float] | None,
    rows: list[Preference] | None = None,
    **changes: Any,
) -> tuple[list[Any], dict[str, torch.Tensor], int]:
    """Steps, weights after them, and rows that the reference was computed for."""
    made = make_learner("dpo", path, settings.model_copy(update=changes), seed=7)
    with torch.no_grad():  # it differs from its reference: a log-ratio of 0 would hide which one was taken
        for p in made.trained().values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    computed: list[int] = []
    score = made.trainer.compute_ref_log_probs
    made.trainer.compute_ref_log_probs = lambda model, batch: (
        computed.append(batch["input_ids"].size(0) // 2),
        score(model, batch),
    )[1]
    if given is not None:
        made.use_reference(given)
    steps = list(made.update(rows or pairs(), 0))
    return steps, {n: p.clone() for n, p in made.trained().items()}, sum(computed)


@pytest.mark.parametrize("lora", [None, config.Lora(r=4, alpha=8)], ids=["full", "lora"])
def test_it_is_computed_for_a_few_rows_alone(
    lora: config.Lora | None, model_path: str, settings: config.Learner, scored: dict[str, float]
) -> None:
    expected, weights, whole = trained(model_path, settings, None, lora=lora)
    steps, found, some = trained(model_path, settings, scored, lora=lora)
    assert (whole, some) == (ROWS, COMPARED)
    assert [s.notes for s in steps] == [()] * len(steps)
    for a, b in zip(steps, expected, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-5)
        assert a.metrics["margin"] == pytest.approx(b.metrics["margin"], abs=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0)


def test_another_models_is_not_taken_and_told(
    model_path: str, settings: config.Learner, scored: dict[str, float]
) -> None:
    others = {i: logprob - 20 * APART * 13 for i, logprob in scored.items()}
    expected, weights, _ = trained(model_path, settings, None)
    steps, found, computed = trained(model_path, settings, others)
    assert computed == ROWS
    assert [len(s.notes) for s in steps] == [1, 0, 0]
    assert "nats a token from this learner's" in steps[0].notes[0]
    assert [s.loss for s in steps] == [s.loss for s in expected]
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=0)


def test_what_is_not_given_is_computed(model_path: str, settings: config.Learner, scored: dict[str, float]) -> None:
    """Of a part of the batch all or nothing: a row of another iteration has nobody who knows it."""
    some = dict(list(scored.items())[:-2])
    expected, _, _ = trained(model_path, settings, None)
    steps, _, computed = trained(model_path, settings, some)
    assert computed in (COMPARED, COMPARED + settings.batch_size)
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in expected], abs=1e-5)


def test_it_serves_one_update(model_path: str, settings: config.Learner, scored: dict[str, float]) -> None:
    made = make_learner("dpo", model_path, settings, seed=7)
    made.use_reference(scored)
    list(made.update(pairs(), 0))
    computed: list[Any] = []
    score = made.trainer.compute_ref_log_probs
    made.trainer.compute_ref_log_probs = lambda model, batch: (computed.append(batch), score(model, batch))[1]
    list(made.update(pairs(), 1))
    assert len(computed) == 3


def test_a_learner_in_bf16_rounds_its_own(model_path: str, settings: config.Learner, scored: dict[str, float]) -> None:
    _, _, computed = trained(model_path, settings, scored, precision="bf16")
    assert computed == ROWS


def alike_where_they_are_compared() -> list[Preference]:
    """Rows whose first ones of an update have sides of equal length, and no others."""
    rows = make_preferences(ROWS, seed=1)
    for i in epoch_order(ROWS, seed=7, iteration=0, epoch=0)[:COMPARED]:
        ids = rows[i].rejected_token_ids
        rows[i] = rows[i].model_copy(update={"chosen_token_ids": (*ids[:-1], 5)})
    apart = [len(row.chosen_token_ids) != len(row.rejected_token_ids) for row in rows]
    assert ROWS - COMPARED >= sum(apart) > 4
    return rows


SETTINGS: dict[str, dict[str, Any]] = {
    "ld_alpha": {"args": {"ld_alpha": 0.3}},
    "every loss": {"loss_type": list(LOSSES), "args": {"label_smoothing": 0.1}},
    "forward KL": {"args": {"f_divergence_type": "forward_kl"}},
    "alpha divergence": {"args": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}},
    "WPO": {"args": {"use_weighting": True}},
}


@pytest.mark.parametrize("named", SETTINGS)
def test_no_setting_makes_it_another(named: str, model_path: str, settings: config.Learner) -> None:
    """Whatever TRL makes of log-probabilities: given or computed, the steps are the same."""
    rows, how = alike_where_they_are_compared(), SETTINGS[named]
    expected, weights, _ = trained(model_path, settings, None, rows, **how)
    steps, found, computed = trained(model_path, settings, scores_of(model_path, rows), rows, **how)
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in expected], rel=1e-4, abs=1e-5)
    assert computed == (ROWS if named == "ld_alpha" else COMPARED)
    assert [s.notes for s in steps] == [()] * len(steps)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=0)


def test_no_other_setting_decides_what_a_reference_is() -> None:
    """A newer TRL may have one more: then it belongs into the table above."""
    asked = inspect.getsource(DPOTrainer.compute_ref_log_probs)
    found = set(re.findall(r"self\.((?:args\.)?\w+)", asked))
    assert found == {"accelerator", "args.gradient_checkpointing_kwargs", "ld_alpha", "model", "ref_model"}
