"""A learner that gave its memory back between updates takes the steps of one that never did, to the bit."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif import config
from rlaif.learning import make_learner
from rlaif.records import Completion, PolicyVersion, TokenSequence
from tests.learning.conftest import make_preferences
from tests.unmapped import unmap

pytestmark = pytest.mark.slow

HOW: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": config.Lora(r=4, alpha=8)},
    "bf16": {"precision": "bf16"},
    "bf16 LoRA": {"precision": "bf16", "lora": config.Lora(r=4, alpha=8)},
    "online": {"kind": "online_dpo"},
    "previous": {"reference": "previous"},
}
PAIRS = [make_preferences(8, seed) for seed in range(3)]
TEXTS = [TokenSequence(prompt_token_ids=p.prompt_token_ids, token_ids=p.chosen_token_ids) for p in PAIRS[0]]
ANSWERS = [
    Completion(
        id=p.pair_id, prompt_id=p.prompt_id, policy=PolicyVersion(iteration=1, digest=""), index=0, seed=0,
        prompt_token_ids=p.prompt_token_ids, token_ids=p.chosen_token_ids, text="", finish_reason="length",
    )
    for p in PAIRS[0]
]  # fmt: skip


@pytest.fixture(autouse=True)
def _unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    unmap(monkeypatch)


def made(path: str, settings: config.Learner, how: str) -> Any:
    torch.manual_seed(0)  # what a LoRA begins with
    given = settings.model_copy(update=HOW[how])
    learner = make_learner(given.kind, path, given, seed=7, export_precision="fp32")
    for p in learner.trainer.model.parameters():  # type: ignore[attr-defined]
        p.data = p.data.clone()  # TRL's trainer has them where a CPU can't give them back
    return learner


def tensors() -> dict[int, tuple[int, str]]:
    """Storages of tensors that live in this process, by address: their bytes, and a shape."""
    found = {}
    for thing in gc.get_objects():
        if (
            issubclass(type(thing), torch.Tensor)
            and thing.device.type == "cpu"
            and (at := thing.untyped_storage()).nbytes()
        ):
            found[at.data_ptr()] = at.nbytes(), str(tuple(thing.shape))
    return found


@pytest.mark.parametrize("how", HOW)
def test_steps_with_rests_between_are_those_without(
    how: str, model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    said = []
    for rests in (False, True):
        learner = made(model_path, settings, how)
        heard: list[Any] = []
        for iteration, pairs in enumerate(PAIRS):
            steps = [step.model_dump(exclude={"seconds"}) for step in learner.update(pairs, iteration)]
            if rests:
                learner.rest()
                learner.wake()
            heard += [steps, learner.logprobs(TEXTS), list(learner.divergences(ANSWERS))]
            if rests:
                learner.rest()
                learner.wake()
        policy = learner.save(tmp_path / f"state{rests}", tmp_path / f"policy{rests}")
        weights = {name: value.clone() for name, value in learner.trained().items()}
        moments = [m.clone() for of in learner.trainer.optimizer.state.values() for m in of.values()]
        said.append((heard, weights, moments, policy.digest))
        learner.close()
    (a, weights, moments, digest), (b, others, their_moments, their_digest) = said
    assert a == b
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert len(moments) == len(their_moments) > 0
    assert all(map(torch.equal, moments, their_moments))
    assert digest == their_digest


@pytest.mark.parametrize("how", HOW)
def test_resting_it_holds_next_to_nothing(how: str, model_path: str, settings: config.Learner) -> None:
    gc.collect()
    before = tensors()
    learner = made(model_path, settings, how)
    list(learner.update(PAIRS[0], 0))
    list(learner.divergences(ANSWERS))
    gc.collect()
    held = {at: of for at, of in tensors().items() if at not in before}
    learner.rest()
    left = {at: of for at, of in tensors().items() if at not in before}
    assert sum(size for size, _ in held.values()) > 100_000, "weights, moments and a reference"
    assert sum(size for size, _ in left.values()) < 2_000, sorted(left.values())[-5:]
    learner.wake()
    learner.close()
