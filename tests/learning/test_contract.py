"""Both learners against each other and against the formula of the paper, on a tiny fp32 model without dropout."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rlaif import config
from rlaif.constitutions.constitution import parse_constitution
from rlaif.errors import RlaifError, UserError
from rlaif.learning import kind_of, make_learner
from rlaif.learning.base import epoch_order
from rlaif.learning.divergence import batches, kl
from rlaif.learning.mixing import preferences_of
from rlaif.learning.policy_state import exported_state
from rlaif.learning.trl_compat import metric
from rlaif.records import Completion, Decision, Message, Pair, PolicyVersion, Preference, Prompt, Verdict
from rlaif.workers.weights import WeightsRef
from tests.learning.conftest import make_preferences
from tests.stubs import text as rules

pytestmark = pytest.mark.slow

KINDS = ["dpo", "online_dpo"]
BETA = 0.1


def learner(kind: str, path: str, settings: config.Learner, **changes: Any) -> Any:
    return make_learner(kind, path, settings.model_copy(update={"kind": kind, **changes}), seed=7)


def disturb(made: Any) -> None:
    """Makes the policy differ from its reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.trained().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in made.trained().items()}


def moments(made: Any) -> list[torch.Tensor]:
    states = made.trainer.optimizer.state_dict()["state"].values()
    return [s[name].clone() for s in states for name in ("exp_avg", "exp_avg_sq", "step")]


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


class BeforeTheStep(TrainerCallback):
    """What a step is about to be taken with: gradients, and the rewards of the last part of the batch."""

    def __init__(self, made: Any) -> None:
        self._trainer = made.trainer
        made.trainer.add_callback(self)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        trained = [(n, p) for n, p in self._trainer.model.named_parameters() if p.requires_grad]
        self.gradients = {n: p.grad.clone() for n, p in trained}
        self.rewards = [metric(self._trainer, f"rewards/{side}")[-1] for side in ("chosen", "rejected")]


def gradients(made: Any, pairs: list[Preference]) -> tuple[float, dict[str, torch.Tensor], list[float]]:
    """Loss, gradients and rewards of one step on `pairs`, the weights left alone. The learner mustn't clip."""
    assert len(pairs) <= made.settings.batch_size
    before, seen = weights(made), BeforeTheStep(made)
    (step,) = made.update(pairs, 0)
    made.trainer.remove_callback(seen)
    assert step.grad_norm < made.settings.max_grad_norm, "clipped"
    with torch.no_grad():
        for name, p in made.trained().items():
            p.copy_(before[name])
    return step.loss, seen.gradients, seen.rewards


def in_the_order(pairs: list[Preference], iteration: int) -> list[Preference]:
    """What an update with the seed 7 has to be given, to take the pairs in this order."""
    order = epoch_order(len(pairs), 7, iteration, 0)
    return [pairs[order.index(i)] for i in range(len(pairs))]


def sequence_logp(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """log p(completion | prompt), unpadded: the definition."""
    ids = torch.tensor([prompt + completion])
    log_p = model(ids).logits[0].log_softmax(-1)
    return sum(log_p[len(prompt) - 1 + i, token] for i, token in enumerate(completion))  # type: ignore[return-value]


def by_hand(policy: Any, reference: Any, pairs: list[Preference]) -> tuple[torch.Tensor, torch.Tensor]:
    """DPO's loss (arXiv:2305.18290, eq. 7) and the log-ratios [pairs, (chosen, rejected)], one sequence at a time."""
    ratios = []
    for p in pairs:
        for completion in (p.chosen_token_ids, p.rejected_token_ids):
            with torch.no_grad():
                before = sequence_logp(reference, p.prompt_token_ids, completion)
            ratios.append(sequence_logp(policy, p.prompt_token_ids, completion) - before)
    table = torch.stack(ratios).view(-1, 2)
    return -torch.nn.functional.logsigmoid(BETA * (table[:, 0] - table[:, 1])).mean(), table


@pytest.mark.parametrize("kind", KINDS)
def test_log_ratios_loss_and_gradients_are_the_formulas(kind: str, model_path: str, settings: config.Learner) -> None:
    made = learner(kind, model_path, settings, max_grad_norm=1e6)
    disturb(made)
    pairs = make_preferences(4)
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    policy = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    policy.load_state_dict(made.policy.state_dict())
    expected_loss, expected_ratios = by_hand(policy, reference, pairs)
    expected_loss.backward()

    loss, grads, _ = gradients(made, pairs)

    assert abs(expected_loss.item() - math.log(2)) > 0.01, "the policy must differ from its reference"
    assert loss == pytest.approx(expected_loss.item(), abs=1e-4)
    close(grads, {n: p.grad for n, p in policy.named_parameters()}, atol=1e-4)
    for pair, row in zip(pairs, expected_ratios, strict=True):
        _, _, rewards = gradients(made, [pair])
        assert [reward / BETA for reward in rewards] == pytest.approx(row.tolist(), abs=1e-4)


def some_completions() -> list[Completion]:
    return [
        Completion(
            id=p.pair_id, prompt_id=p.prompt_id, policy=PolicyVersion(iteration=1, digest=""), index=0, seed=0,
            prompt_token_ids=p.prompt_token_ids, token_ids=p.chosen_token_ids, text="", finish_reason="length",
        )
        for p in make_preferences(11)
    ]  # fmt: skip


def kl_by_hand(made: Any, base_path: str, asked: list[Completion]) -> list[float]:
    """KL(policy, base) over the vocabulary, summed over each completion's places: the definition, in fp32."""
    base, policy = (AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval() for _ in range(2))
    policy.load_state_dict(exported_state(made.policy, "fp32", seed=0))
    out = []
    with torch.no_grad():
        for c in asked:
            ids = torch.tensor([c.prompt_token_ids + c.token_ids])
            p, q = (m(ids).logits[0, len(c.prompt_token_ids) - 1 : -1].log_softmax(-1) for m in (policy, base))
            out.append(float((p.exp() * (p - q)).sum()))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [None, config.Lora(r=4, alpha=8)], ids=["full", "lora"])
@pytest.mark.parametrize("reference", ["base", "previous"])
def test_divergences_are_kl_over_the_vocabulary(
    kind: str, reference: str, lora: config.Lora | None, model_path: str, settings: config.Learner
) -> None:
    made = learner(kind, model_path, settings, lora=lora, reference=reference)
    disturb(made)
    before = weights(made)
    asked = some_completions()
    found = {d.completion_id: d for chunk in made.divergences(asked) for d in chunk}
    for c, nats in zip(asked, kl_by_hand(made, model_path, asked), strict=True):
        assert found[c.id].kl == pytest.approx(nats, rel=1e-3)
        assert found[c.id].tokens == len(c.token_ids)
    assert min(d.kl for d in found.values()) > 0.01, "the policy must differ from the base"
    close(weights(made), before)


@pytest.mark.parametrize("lora", [None, config.Lora(r=4, alpha=8)], ids=["full", "lora"])
@pytest.mark.parametrize("reference", ["base", "previous"])
def test_divergences_see_moves_below_bf16s_grid(
    reference: str, lora: config.Lora | None, model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    """Base weights on the grid, a small rate, and a learner that computes in bf16: autocast rounds the move away."""
    grid = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    grid.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(tmp_path)
    rate = 2e-5 if lora is None else 2e-4
    changes = {"lora": lora, "reference": reference, "precision": "bf16", "learning_rate": rate}
    made = learner("dpo", str(tmp_path), settings, **changes)
    for k in range(3):
        list(made.update(make_preferences(8), k))
    asked = some_completions()
    found = sum(d.kl for chunk in made.divergences(asked) for d in chunk)
    by_hand = sum(kl_by_hand(made, str(tmp_path), asked))
    assert by_hand > 1e-4
    assert found == pytest.approx(by_hand, rel=0.02)


def test_an_untrained_policy_has_not_diverged(model_path: str, settings: config.Learner) -> None:
    made = learner("dpo", model_path, settings)
    sampled = Completion(
        id="c", prompt_id="p", policy=PolicyVersion(iteration=0, digest=""), index=0, seed=0, prompt_token_ids=(1, 5),
        token_ids=(4, 9, 2), text="", finish_reason="stop",
    )  # fmt: skip
    ((found,),) = made.divergences([sampled])
    assert found.kl == 0.0
    disturb(made)
    next(iter(made.trained().values())).fill_(float("nan"))
    with pytest.raises(RlaifError, match="not finite"):
        list(made.divergences([sampled]))


def test_divergences_hold_no_more_logits_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        Completion(
            id=str(n), prompt_id="p", policy=PolicyVersion(iteration=0, digest=""), index=0, seed=0,
            prompt_token_ids=(1,), token_ids=(5,) * n, text="", finish_reason="length",
        )
        for n in (1, 2, 3, 9, 4, 5)
    ]  # fmt: skip
    monkeypatch.setattr("rlaif.learning.divergence.PLACES", 8)
    assert [[c.id for c in batch] for batch in batches(asked, 2)] == [["1", "2"], ["3", "4"], ["5"], ["9"]]
    assert [[c.id for c in batch] for batch in batches(asked, 9)] == [["1", "2", "3"], ["4"], ["5"], ["9"]]


def test_kl_of_a_token_that_nobody_says() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert float(kl(logits, logits)) == 0.0
    p, q = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5]])
    assert float(kl(p.log(), q.log())) == pytest.approx(0.2 * math.log(0.4) + 0.8 * math.log(1.6))


def test_the_learners_agree_on_several_steps(model_path: str, settings: config.Learner) -> None:
    a, b = (learner(kind, model_path, settings, epochs=2) for kind in KINDS)
    assert [made.row_type for made in (a, b)] == [kind_of(kind).row_type for kind in KINDS], "told without an import"
    steps_a, steps_b = (list(made.update(make_preferences(6), 0)) for made in (a, b))
    assert len(steps_a) == 4
    for x, y in zip(steps_a, steps_b, strict=True):
        assert (x.row_ids, x.step, x.learning_rate) == (y.row_ids, y.step, y.learning_rate)
        assert x.metrics.keys() == {"margin", "accuracy"}
        assert {"loss": x.loss, **x.metrics} == pytest.approx({"loss": y.loss, **y.metrics}, abs=1e-3)


def test_our_scoring_is_trls(model_path: str) -> None:
    """The CPU replacement of TRL's fused head gives every field that TRL's gives."""
    from rlaif.learning.scoring import score_completions_only
    from rlaif.learning.trl_compat import add_fused_lm_head

    ours, theirs = (AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32) for _ in range(2))
    fields = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    score_completions_only(ours, sum_sq_probs=True)
    add_fused_lm_head(theirs, outputs=fields)
    ids = torch.randint(3, 90, (3, 11))
    labels = ids.masked_fill(torch.arange(11) < torch.tensor([[2], [5], [7]]), -100)
    a, b = (m.eval()(input_ids=ids, labels=labels, fused_lm_head=True) for m in (ours, theirs))
    for field in fields:
        torch.testing.assert_close(a[field], b[field], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def decided(pairs: list[Preference], dropped: str | None = None) -> list[Preference]:
    """What `preferences_of` makes of these pairs, judged for their chosen side; `dropped` is a pair's id."""
    policy = PolicyVersion(iteration=0, digest="d")
    prompts, completions, shown, decisions = {}, [], [], []
    for p in pairs:
        prompts[p.prompt_id] = Prompt(id=p.prompt_id, messages=(Message(role="user", content=p.prompt),))
        for id, tokens in ((p.chosen_id, p.chosen_token_ids), (p.rejected_id, p.rejected_token_ids)):
            about = {"id": id, "prompt_id": p.prompt_id, "policy": policy, "index": 0, "seed": 0, "text": id}
            ids = {"prompt_token_ids": p.prompt_token_ids, "token_ids": tokens}
            completions.append(Completion(**about, **ids, finish_reason="stop", logprob=0.0))
        shown.append(Pair(id=p.pair_id, prompt_id=p.prompt_id, first=p.chosen_id, second=p.rejected_id, method="all"))
        verdict = Verdict(pair_id=p.pair_id, outcome="first", p_first=0.9, agreement=0.6, valid_votes=5)
        out = {"status": "dropped", "reasons": ("low_agreement",)} if p.pair_id == dropped else {"status": "kept"}
        decisions.append(Decision(**{"pair_id": p.pair_id, "reasons": (), "winner": "first", "verdict": verdict} | out))
    text = parse_constitution(rules(), "rules", 1, "test")
    return preferences_of(0, prompts, completions, shown, decisions, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_decision_trains_as_if_the_pair_were_never_there(
    kind: str, model_path: str, settings: config.Learner
) -> None:
    pairs = make_preferences(4)
    with_it, without, kept = decided(pairs, pairs[1].pair_id), decided([pairs[0], *pairs[2:]]), decided(pairs)
    trained = []
    for preferences in (with_it, without, kept):
        made = learner(kind, model_path, settings)
        steps = list(made.update(preferences, 0))
        trained.append((weights(made), [s.row_ids for s in steps], [s.loss for s in steps]))
    close(trained[0][0], trained[1][0])
    assert trained[0][1:] == trained[1][1:]
    assert any(not torch.equal(trained[0][0][n], trained[2][0][n]) for n in trained[0][0]), "it would have counted"


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_an_earlier_step_leaves_no_gradient_behind(
    kind: str, model_path: str, settings: config.Learner
) -> None:
    made = learner(kind, model_path, settings, max_grad_norm=1e6)
    disturb(made)
    some, another = make_preferences(3), make_preferences(1, seed=9)
    loss, grads, _ = gradients(made, some)
    gradients(made, another)
    again, grads_again, _ = gradients(made, some)
    _, grads_with, _ = gradients(made, some + another)
    assert loss == again
    close(grads, grads_again)
    assert any(not torch.allclose(grads[n], grads_with[n]) for n in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_two_iterations_of_one_step_are_one_trainer_of_two(
    kind: str, model_path: str, settings: config.Learner
) -> None:
    pairs = {p.pair_id: p for p in make_preferences(8)}
    two, one = (learner(kind, model_path, settings) for _ in range(2))
    steps = list(one.update(list(pairs.values()), 0))
    again = [
        step
        for k, taken in enumerate(steps)
        for step in two.update(in_the_order([pairs[i] for i in taken.row_ids], k), k)
    ]

    assert [s.step for s in steps] == [s.step for s in again] == [1, 2]
    assert [s.row_ids for s in steps] == [s.row_ids for s in again]
    close(weights(two), weights(one))
    for a, b in zip(moments(two), moments(one), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_two_iterations_of_one_step_are_trls_own_training(
    model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    """Against `DPOTrainer.train()` itself, from the same token ids, two steps in one call."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Given(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    pairs = make_preferences(8)
    made = learner("dpo", model_path, settings)
    steps = [*made.update(pairs[:4], 0), *made.update(pairs[4:], 1)]
    order = {pair_id: i for i, pair_id in enumerate(i for s in steps for i in s.row_ids)}
    rows = [
        {
            "prompt_ids": list(p.prompt_token_ids),
            "chosen_ids": list(p.chosen_token_ids),
            "rejected_ids": list(p.rejected_token_ids),
        }
        for p in sorted(pairs, key=lambda p: order[p.pair_id])
    ]
    trl = Given(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attention_dropout=0.0),
        ref_model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        args=DPOConfig(
            str(tmp_path), learning_rate=1e-2, per_device_train_batch_size=4, num_train_epochs=1, bf16=False,
            lr_scheduler_type="constant", gradient_checkpointing=False, report_to="none", save_strategy="no",
            use_cpu=True, disable_tqdm=True, max_length=None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_path),
    )  # fmt: skip
    trl.train()
    close(weights(made), {n: p.data for n, p in trl.model.named_parameters()}, atol=1e-4)
    theirs = trl.optimizer.state_dict()["state"].values()
    expected = [s[name] for s in theirs for name in ("exp_avg", "exp_avg_sq", "step")]
    for a, b in zip(moments(made), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_the_end_of_a_schedule_ends_no_training(model_path: str, settings: config.Learner) -> None:
    for schedule in ("linear", "cosine"):
        args = {"lr_scheduler_type": schedule, "max_steps": 2}
        made = learner("dpo", model_path, settings, args=args, batch_size=2)
        steps = [step for k in range(2) for step in made.update(make_preferences(4), k)]
        assert [step.step for step in steps] == [1, 2, 3, 4]
        assert [step.learning_rate for step in steps] == pytest.approx([1e-2, 1e-2 / 2, 0, 0])


def test_gradient_checkpointing_changes_no_number(model_path: str, settings: config.Learner) -> None:
    plain = learner("dpo", model_path, settings)
    spared = learner("dpo", model_path, settings, args={"gradient_checkpointing": True})
    assert spared.trainer.model.is_gradient_checkpointing
    a, b = (list(made.update(make_preferences(4), 0)) for made in (plain, spared))
    assert [step.loss for step in a] == pytest.approx([step.loss for step in b])
    close(weights(plain), weights(spared))


def test_numbers_as_yaml_reads_them(model_path: str, settings: config.Learner) -> None:
    made = learner("dpo", model_path, settings, args={"adam_epsilon": "1e-7", "weight_decay": "1e-2"})
    group = made.trainer.optimizer.param_groups[0]
    assert (group["eps"], made.trainer.args.weight_decay) == (1e-7, 1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [None, config.Lora(r=4, alpha=8)], ids=["full", "lora"])
def test_save_and_load_go_on_as_if_nothing_happened(
    kind: str, lora: config.Lora | None, model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    changes = {"lora": lora, "args": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}}
    made = learner(kind, model_path, settings, **changes)
    list(made.update(make_preferences(6, seed=1), 0))
    digest = made.save(tmp_path / "state", tmp_path / "policy").digest
    expected = list(made.update(make_preferences(6, seed=2), 1))

    again = make_learner(kind, model_path, settings.model_copy(update=changes), seed=7)
    again.load(WeightsRef(digest=digest, path=tmp_path / "state"))
    assert again.global_step == 2
    assert again.save(tmp_path / "state2", tmp_path / "policy2").digest == digest
    found = list(again.update(make_preferences(6, seed=2), 1))
    assert [s.model_copy(update={"seconds": 0}) for s in found] == [
        s.model_copy(update={"seconds": 0}) for s in expected
    ]
    assert expected[-1].learning_rate == 1e-2 * 3 / 4  # the schedule went on, too
    close(weights(made), weights(again))
    for a, b in zip(moments(made), moments(again), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_state_is_read_as_it_is_taken(
    model_path: str, settings: config.Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is mapped, so that not every process holds it in RAM; what a learner goes on with is memory of its own,
    which it can give back."""
    made, again = (learner("dpo", model_path, settings) for _ in range(2))
    list(made.update(make_preferences(4), 0))
    digest = made.save(tmp_path / "state", tmp_path / "policy").digest
    load, mapped = torch.load, []

    def seen(*args: Any, **kwargs: Any) -> Any:
        mapped.append(kwargs.get("mmap"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", seen)
    again.load(WeightsRef(digest=digest, path=tmp_path / "state"))
    assert mapped == [True]
    assert all(m.untyped_storage().resizable() for of in again.trainer.optimizer.state.values() for m in of.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_optimizer_goes_on_from_an_exported_policy(
    kind: str, model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    pairs = make_preferences(8)
    first = learner(kind, model_path, settings, warmup_steps=3)
    list(first.update(pairs, 0))
    policy = first.save(tmp_path / "state", tmp_path / "policy")
    exported = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float32).state_dict()
    first.start(policy, first.global_step)  # whatever moments it has
    close(weights(first), {name: exported[name] for name in weights(first)})
    assert moments(first) == []
    new = learner(kind, model_path, settings, warmup_steps=3)
    new.start(policy, 7)
    steps = list(first.update(pairs[:2], 1)), list(new.update(pairs[:2], 1))
    assert [s.step for s in steps[1]] == [8]
    assert [s[0].learning_rate for s in steps] == pytest.approx([1e-2 * 2 / 3, 1e-2])  # as after 2 steps, and after 7
    assert steps[0][0].loss == steps[1][0].loss


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_a_new_optimizer_goes_on_with_the_rates_of_the_old_one(
    schedule: str, model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    """In the warm-up, in the middle, and after the schedule's end."""
    args = {"lr_scheduler_type": schedule, "max_steps": 8}
    made = learner("dpo", model_path, settings, args=args, warmup_steps=3, batch_size=2)
    policy = made.save(tmp_path / "state", tmp_path / "policy")
    pairs = make_preferences(4)
    rates = [step.learning_rate for k in range(6) for step in made.update(pairs, k)]
    for begun in (1, 5, 8, 10):
        made.start(policy, begun)
        found = [step.learning_rate for step in made.update(pairs, 0)]
        assert found == pytest.approx(rates[begun : begun + 2], abs=1e-12)
    assert rates[-1] == (settings.learning_rate if schedule == "constant_with_warmup" else pytest.approx(0, abs=1e-12))


def test_adapters_need_their_own_state(model_path: str, settings: config.Learner, tmp_path: Path) -> None:
    made = learner("dpo", model_path, settings, lora=config.Lora(r=2))
    with pytest.raises(UserError, match="a policy has its adapter merged"):
        made.start(made.save(tmp_path / "state", tmp_path / "policy"), 0)


@pytest.mark.parametrize("scheduler", ["constant", "constant_with_warmup"])
def test_another_learning_rate_counts_from_where_it_is_given(
    scheduler: str, model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    args = {"lr_scheduler_type": scheduler, **({"warmup_steps": 8} if scheduler != "constant" else {})}
    pairs = make_preferences(8)
    first = learner("dpo", model_path, settings, args=args)
    before = [step.learning_rate for step in first.update(pairs, 0)]
    digest = first.save(tmp_path / "state", tmp_path / "policy").digest
    slower = learner("dpo", model_path, settings, args=args, learning_rate=settings.learning_rate / 4)
    slower.load(WeightsRef(digest=digest, path=tmp_path / "state"))
    after = [step.learning_rate for step in slower.update(pairs, 1)]
    going_on = [step.learning_rate for step in first.update(pairs, 1)]
    assert after == pytest.approx([rate / 4 for rate in going_on])
    assert after[0] < max(before)


@pytest.mark.parametrize("lora", [None, config.Lora(r=4, alpha=8)], ids=["full", "lora"])
def test_the_exported_policy_is_the_trained_one(
    lora: config.Lora | None, model_path: str, settings: config.Learner, tmp_path: Path
) -> None:
    changed = settings.model_copy(update={"lora": lora})
    made: Any = make_learner("dpo", model_path, changed, seed=7, export_precision="bf16")
    list(made.update(make_preferences(8), 0))
    before = weights(made)
    digest = made.save(tmp_path / "state", tmp_path / "policy").digest
    close(before, weights(made))

    assert len(digest) == 16
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert exported.dtype == torch.bfloat16
    assert exported.config.attention_dropout == 0.1, "the policy's own configuration, not the trainer's"
    assert not list((tmp_path / "policy").glob("adapter*"))
    AutoTokenizer.from_pretrained(tmp_path / "policy")
    ids = torch.randint(3, 90, (2, 9))
    trained = made.trainer.model.eval()(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)(input_ids=ids).logits
    error = (exported.float()(input_ids=ids).logits - trained).abs().mean()
    assert error < 0.2 * (base - trained).abs().mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", ["base", "previous"])
def test_bf16_starts_at_ln_2(kind: str, reference: str, model_path: str, settings: config.Learner) -> None:
    """Policy and reference round alike: what the loss sees is the update, not bf16's noise."""
    changes = {"precision": "bf16", "reference": reference, "batch_size": 8}
    step = next(learner(kind, model_path, settings, **changes).update(make_preferences(8), 0))
    assert (step.loss, step.metrics["margin"]) == pytest.approx((math.log(2), 0.0), abs=1e-6)


def test_reference_previous_starts_every_update_at_ln_2(model_path: str, settings: config.Learner) -> None:
    for lora in (None, config.Lora(r=4, alpha=8)):
        moving = learner("dpo", model_path, settings, reference="previous", lora=lora)
        fixed = learner("dpo", model_path, settings, reference="base", lora=lora)
        first = [next(s.loss for s in made.update(make_preferences(4), 0)) for made in (moving, fixed)]
        second = [next(s.loss for s in made.update(make_preferences(4), 1)) for made in (moving, fixed)]
        assert first == pytest.approx([math.log(2)] * 2, abs=1e-5)
        assert second[0] == pytest.approx(math.log(2), abs=1e-5)
        assert second[1] < math.log(2) - 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_step_add_up_to_the_step(kind: str, model_path: str, settings: config.Learner) -> None:
    whole = learner(kind, model_path, settings, batch_size=5)
    parts = learner(kind, model_path, settings, batch_size=5, args={"per_device_train_batch_size": 2})
    a, b = (next(made.update(make_preferences(5), 0)) for made in (whole, parts))
    found, expected = ((s.loss, s.metrics["margin"], s.grad_norm) for s in (a, b))
    assert found == pytest.approx(expected, abs=1e-4)
    close(weights(whole), weights(parts), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_off_completion_gets_no_end_token(kind: str, model_path: str, settings: config.Learner) -> None:
    """Without the end token's gradient, the loss must change when one is added."""
    made = learner(kind, model_path, settings, max_grad_norm=1e6)
    disturb(made)
    pair = make_preferences(1)[0]
    assert pair.chosen_token_ids[-1] != 2
    ended = pair.model_copy(update={"chosen_token_ids": (*pair.chosen_token_ids, 2)})
    assert gradients(made, [pair])[0] != pytest.approx(gradients(made, [ended])[0], abs=1e-4)


def test_order_is_ours_and_follows_from_its_seed(model_path: str, settings: config.Learner) -> None:
    made = learner("dpo", model_path, settings, epochs=2, batch_size=3)
    pairs = make_preferences(7)
    steps = list(made.update(pairs, 3))
    seen = [i for s in steps for i in s.row_ids]
    assert seen == [pairs[i].pair_id for epoch in range(2) for i in epoch_order(7, 7, 3, epoch)]
    assert [len(s.row_ids) for s in steps] == [3, 3, 1] * 2
    assert epoch_order(9, 0, 0, 0) != epoch_order(9, 0, 0, 1) != epoch_order(9, 0, 1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_refused_before_it_reaches_the_weights(kind: str, model_path: str, settings: config.Learner) -> None:
    made = learner(kind, model_path, settings)
    list(made.update(make_preferences(4), 0))
    before, step = weights(made), made.global_step
    hook = made.policy.get_output_embeddings().register_forward_hook(lambda m, i, o: o * float("nan"))
    with pytest.raises(RlaifError, match=r"update step 2: the loss is nan .*0-\d.* not taken"):
        list(made.update(make_preferences(4), 1))
    hook.remove()
    close(before, weights(made))
    assert made.global_step == step
    assert all(math.isfinite(s.loss) for s in made.update(make_preferences(4), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow(kind: str, model_path: str, settings: config.Learner) -> None:
    made = learner(kind, model_path, settings)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def run(iteration: int) -> None:
        list(made.update(make_preferences(8, seed=iteration), iteration))

    for i in range(3):
        run(i)
    count, rss = tensors(), psutil.Process().memory_info().rss
    for i in range(3, 23):
        run(i)
    assert tensors() <= count
    assert psutil.Process().memory_info().rss < rss + 64 * 2**20
    assert len(made.trainer.state.log_history) <= 2
    assert all(len(v) <= 2 for v in made.trainer.state.__dict__.values() if isinstance(v, list))


def test_callbacks_see_what_a_trl_user_expects(
    model_path: str, settings: config.Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(("begin", kwargs["optimizer"] is not None))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(("log", dict(logs)))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(("end", state.global_step))

    import transformers.integrations.integration_utils as trackers

    monkeypatch.setitem(trackers.INTEGRATION_TO_CALLBACK, "tensorboard", Watch)
    made = learner("dpo", model_path, settings, args={"report_to": ["tensorboard"]})
    step = list(made.update(make_preferences(8), 0))[-1]
    made.close()
    assert [name for name, _ in seen] == ["begin", "log", "log", "end"]
    logs = seen[2][1]
    assert logs["rewards/margins"] == pytest.approx(step.metrics["margin"])
    assert (logs["loss"], logs["grad_norm"]) == pytest.approx((step.loss, step.grad_norm), abs=1e-4)
    assert {"rewards/accuracies", "logps/chosen", "learning_rate", "entropy"} <= logs.keys()


def test_what_a_tracker_writes_outlives_the_learner(
    model_path: str, settings: config.Learner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import transformers.integrations.integration_utils as trackers

    class Tracker(TrainerCallback):
        """Writes beside the trainer's checkpoints, as TensorBoard's does, and keeps the rest until it is told."""

        def __init__(self) -> None:
            self._wandb = self
            self.kept: list[str] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.folder = Path(args.output_dir) / "runs"
            self.kept.append(f"{state.global_step}{'' if 'loss' in logs else sorted(logs)}")

        def finish(self) -> None:
            self.folder.mkdir()
            (self.folder / "log").write_text(" ".join(self.kept))

    monkeypatch.setitem(trackers.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    changed = settings.model_copy(update={"args": {"report_to": ["tensorboard"]}})
    made = make_learner("dpo", model_path, changed, seed=7, output_dir=str(tmp_path / "out"))
    list(made.update(make_preferences(8), 0))
    made.track({"weights_gap/mean": 0.1}, 2)
    made.close()
    assert (tmp_path / "out" / "runs" / "log").read_text() == "1 2 2['weights_gap/mean']"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": {"weigth_decay": 0.1}}, "learner.args.weigth_decay.*did you mean `weight_decay`"),
        ({"args": {"learning_rate": 0.1}}, "set in learner.learning_rate"),
        ({"args": {"loss_type": "ipo"}}, "set in learner.loss_type"),
        ({"args": {"lr_scheduler_type": "cosine"}}, "max_steps"),
        ({"args": {"warmup_steps": 0.1}}, "max_steps"),
        ({"args": {"adam_epsilon": "small"}}, "learner.args.adam_epsilon: expected a number, found 'small'"),
        ({"args": {"neftune_noise_alpha": 5}}, "remove it"),
        ({"args": {"report_to": "nonsense"}}, "TRL refuses.*nonsense"),
        ({"loss_type": ["sigmoid", "nonsense"]}, "nonsense"),
        ({"loss_type": []}, "learner.loss_type"),
        ({"args": {"sync_ref_model": True}}, "TRL refuses"),
        ({"args": {"optim": "nonsense"}}, "TRL refuses.*nonsense"),
        ({"loss_type": "nonsense"}, "nonsense"),
        ({"kind": "online_dpo", "loss_type": "hinge"}, "learner.kind=dpo"),
        ({"kind": "online_dpo", "args": {"missing_eos_penalty": 1.0}}, "flip verdicts"),
        ({"kind": "ppo"}, "there are `dpo`, `online_dpo`"),
    ],
)
def test_a_users_mistake_is_named(
    changes: dict[str, Any], message: str, model_path: str, settings: config.Learner
) -> None:
    changed = settings.model_copy(update=changes)
    with pytest.raises(UserError, match=message):
        make_learner(changed.kind, model_path, changed, seed=0)


def test_args_reach_trl(model_path: str, settings: config.Learner) -> None:
    made = learner("dpo", model_path, settings, args={"weight_decay": 0.25, "label_smoothing": 0.125})
    assert made.trainer.label_smoothing == 0.125
    assert made.trainer.optimizer.param_groups[0]["weight_decay"] == 0.25


def test_state_of_another_model_is_refused(model_path: str, settings: config.Learner, tmp_path: Path) -> None:
    learner("dpo", model_path, settings).save(tmp_path / "state", tmp_path / "policy")
    adapted = make_learner("dpo", model_path, settings.model_copy(update={"lora": config.Lora()}), 7)
    with pytest.raises(UserError, match="another model"):
        adapted.load(WeightsRef(digest="", path=tmp_path / "state"))
    with pytest.raises(UserError, match="can't read the learner's state"):
        adapted.load(WeightsRef(digest="", path=tmp_path / "nowhere"))


def test_a_full_disk_is_named(
    model_path: str, settings: config.Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    learner = make_learner("dpo", model_path, settings, seed=0)
    if Path("/dev/full").exists():
        (tmp_path / "a").mkdir()
        (tmp_path / "a/state.pt").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"/a: no space left on the disk; free some and run the same") as e:
            learner.save(tmp_path / "a", tmp_path / "policy")
        assert "\n" not in str(e.value)

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("rlaif.learning.base.save_file", fail)
    with pytest.raises(UserError, match=r"/b: no space left on the disk"):
        learner.save(tmp_path / "b", tmp_path / "policy")


def test_importing_the_package_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, rlaif.learning; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
