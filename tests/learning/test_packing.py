"""Chosen and rejected share their prompt, and no number changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rlaif import config
from rlaif.learning import make_learner
from rlaif.learning.as_exported import AsExported
from rlaif.learning.packing import SharedPrompts, pack
from rlaif.learning.scoring import score_completions_only
from tests.architectures import ARCHITECTURES, each, make_model
from tests.learning.conftest import make_preferences
from tests.learning.test_contract import disturb, gradients

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batch(sequences: list[tuple[list[int], list[int]]]) -> Batch:
    """Ids, mask and labels of prompts and completions, padded on the right, as TRL makes them."""
    width = max(len(p) + len(c) for p, c in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, mask, labels


def some_pairs() -> Batch:
    """Unequal lengths; completions that begin alike, one that begins another, one of a single token."""
    generator = torch.Generator().manual_seed(3)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, 300, (n,), generator=generator).tolist()

    prompts, alike = [tokens(n) for n in (9, 14, 1, 5)], tokens(3)
    chosen = [tokens(6), alike + tokens(4), tokens(8), alike]
    rejected = [tokens(9), alike + tokens(1), tokens(1), alike + tokens(2)]
    return batch([*zip(prompts, chosen, strict=True), *zip(prompts, rejected, strict=True)])


def shared(model: Any) -> SharedPrompts:
    """Packs whatever it is asked."""
    found = SharedPrompts(model)
    assert found.look([([1, 5, 6], [1, 5, 7, 8])]) is None
    return found


def test_a_row_is_the_prompt_and_both_completions() -> None:
    ids, mask, labels = batch([([10, 11, 12], [20, 21]), ([13], [22, 23]), ([10, 11, 12], [30]), ([13], [31])])
    packed = pack(ids, mask, labels)
    assert packed.input_ids.tolist() == [[10, 11, 12, 20, 21, 12, 30], [13, 22, 23, 13, 31, 13, 13]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 0, 1, 0, 0]]
    assert packed.labels.tolist() == [[-100, -100, -100, 20, 21, -100, 30], [-100, 22, 23, -100, 31, -100, -100]]
    seen = ["".join(map(str, row)) for row in packed.sees[0].int().tolist()]
    assert seen == ["1000000", "1100000", "1110000", "1111000", "1111100", "1100010", "1100011"]
    # The place that predicts a row's token, of those that are scored.
    predicts = packed.spread(packed.input_ids.roll(-1, 1))
    scored = labels[:, 1:] != -100
    assert torch.equal(predicts[scored], labels[:, 1:][scored])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("exported", [False, True], ids=["masters", "as exported"])
@pytest.mark.parametrize("name", each(ARCHITECTURES))
def test_gradients_are_those_of_whole_rows(name: str, exported: bool, lora: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(name, tmp_path), dtype=torch.float32).eval()
    score_completions_only(model, sum_sq_probs=True)
    asked, trained = with_lora(model) if lora else (model, dict(model.named_parameters()))
    ids, mask, labels = some_pairs()

    def computed(ask: Callable[..., Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        for p in trained.values():
            p.grad = None
        out = ask(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
        chosen, rejected = out.log_probs.sum(1).chunk(2)
        (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))).mean().backward()
        return out, {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}

    with AsExported(model, seed=7)() if exported else nullcontext():
        for p in model.parameters():
            p.data = p.data.float()  # what stands in half the memory is on the grid: all is fp32 without autocast
        whole, expected = computed(asked)
        packed, found = computed(shared(model).asked(asked))

    assert found.keys() == expected.keys()
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    for field in ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "label_mask"):
        torch.testing.assert_close(packed[field], whole[field], atol=1e-5, rtol=1e-5)


def with_lora(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A LoRA that does something on the model's layers, and its parameters."""
    from peft import LoraConfig, get_peft_model

    targets = config.Lora(r=4, alpha=8).target_modules
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained.values():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return wrapped, trained


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "online_dpo"])
def test_a_step_computes_fewer_tokens_and_the_same(kind: str, model_path: str, settings: config.Learner) -> None:
    changed = settings.model_copy(update={"kind": kind, "max_grad_norm": 1e6})
    made = make_learner(kind, model_path, changed, seed=7)
    disturb(made)
    seen: list[int] = []
    made.policy.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    pairs = make_preferences(4)

    def taken() -> tuple[float, dict[str, torch.Tensor], list[float], int]:
        out = gradients(made, pairs)
        return *out, seen[-1]

    loss, found, rewards, tokens = taken()
    made.trainer.asked = lambda model: model
    expected_loss, expected, expected_rewards, more_tokens = taken()
    assert tokens < 0.9 * more_tokens
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert rewards == pytest.approx(expected_rewards, abs=1e-5)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-5)


_SIZES = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
UNFIT = {
    "alibi": ("BloomConfig", {"vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 2}),
    "state-space": ("MambaConfig", {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "local-bias": (
        "GPTNeoConfig",
        {**_SIZES, "num_layers": 2, "num_heads": 2, "window_size": 8, "attention_types": [[["global", "local"], 1]]},
    ),
}
"""Name → configuration of a model that computes something else of a packed row."""


@pytest.mark.parametrize("name", UNFIT)
def test_who_can_not_is_found_by_its_numbers(name: str) -> None:
    kind, sizes = UNFIT[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    prompt = list(range(3, 23))
    pair = ([*prompt, 40, 41, 42, 43], [*prompt, 50, 51, 52])
    found = SharedPrompts(model)
    note = found.look([pair])
    assert note is not None
    assert type(model).__name__ in note
    assert found.asked(model) is model
    assert found.look([pair]) is None, "told twice"


def test_a_window_counts_where_rows_are_longer_than_it(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model("gemma3", tmp_path), dtype=torch.float32)
    found = SharedPrompts(model)
    short, long = (([*range(3, n), 5, 6, 7], [*range(3, n), 8, 9]) for n in (20, 60))
    assert found.look([short]) is None
    assert found.asked(model) is not model
    assert found.look([short, long]) is not None
    assert found.asked(model) is model
    assert found.look([short]) is None
    assert found.asked(model) is not model


def test_a_long_sequence_counts_whose_row_is_short(tmp_path: Path) -> None:
    """A window is about one sequence; another pair may have more tokens in all."""
    model = AutoModelForCausalLM.from_pretrained(make_model("gemma3", tmp_path), dtype=torch.float32)
    even = ([*range(3, 33)], [*range(3, 32), 50])
    uneven = ([3, *range(100, 145)], [3, 4])
    found = SharedPrompts(model)
    assert sum(map(len, even)) > sum(map(len, uneven))
    assert found.look([even]) is None
    assert found.look([even, uneven]) is not None


def test_the_learner_says_it_with_its_first_step(tmp_path: Path, settings: config.Learner) -> None:
    made = make_learner("dpo", str(make_model("gemma3", tmp_path)), settings, seed=0)
    long = [p.model_copy(update={"prompt_token_ids": tuple(range(3, 63))}) for p in make_preferences(6)]
    notes = [[step.notes for step in made.update(rows, 0)] for rows in (make_preferences(6), long, long)]
    assert notes[0] == [(), ()]
    assert "Gemma3" in notes[1][0][0]
    assert notes[1][1:] + notes[2] == [(), (), ()]


def test_long_completions_of_short_prompts_are_computed_whole(model_path: str) -> None:
    """A packed row's attention costs more than its prompt saves."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    asked: list[int] = []

    def ask(input_ids: torch.Tensor, **_: Any) -> Any:
        asked.append(input_ids.size(0))
        return {"log_probs": torch.zeros(input_ids.size(0), input_ids.size(1) - 1)}

    found = shared(model).asked(ask)
    for prompt, completion in ((100, 20), (5, 900)):
        sides = [(list(range(3, 3 + prompt)), [side] * completion) for side in (7, 8)]
        ids, mask, labels = batch([(p, c) for p, c in sides])
        found(input_ids=ids, attention_mask=mask, labels=labels)
    assert asked == [1, 2]


def test_a_loss_that_balances_experts_sees_every_token(model_path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    given = dict(zip(("input_ids", "attention_mask", "labels"), some_pairs(), strict=True))
    rows: list[int] = []
    ask = shared(model).asked(lambda input_ids, **_: rows.append(input_ids.size(0)))
    ask(**given, output_router_logits=True)
    assert rows == [8]
