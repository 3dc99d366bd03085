"""A learner in bf16 computes with the weights that will sample, and gives the masters their gradients."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rlaif import config
from rlaif.learning import make_learner
from rlaif.learning.as_exported import AsExported
from rlaif.learning.peft_compat import adapted, plain, product
from rlaif.learning.rounding import round_stochastically
from rlaif.workers.weights import WeightsRef
from tests.architectures import each
from tests.architectures import make_model as make_architecture
from tests.learning.conftest import make_preferences

KINDS = ["dpo", "online_dpo"]
LORA = config.Lora(r=4, alpha=8)


@pytest.fixture(scope="module")
def on_grid(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base as people have it: its weights are bf16's."""
    folder = tmp_path_factory.mktemp("grid")
    AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return str(folder)


def learner(path: str, precision: config.Precision, kind: str = "dpo", **changes: Any) -> Any:
    settings = config.Learner(kind=kind, precision=precision, warmup_steps=0, batch_size=64, **changes)
    return make_learner(kind, path, settings, seed=7, export_precision="bf16")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", pytest.param("online_dpo", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("reference", ["previous", pytest.param("base", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("rate", "lora"), [(3e-6, None), (5e-5, LORA)], ids=["full", "lora"])
def test_the_margin_is_the_whole_moves(
    rate: float, lora: config.Lora | None, reference: str, kind: str, on_grid: str, tmp_path: Path
) -> None:
    """The same masters, looked at in fp32 and in bf16, where most weights moved by less than half a step of the grid.
    Rounded to the nearest, less than half of the margin was seen."""
    pairs, more = make_preferences(64), {"learning_rate": rate, "lora": lora, "kind": kind, "reference": reference}
    exact = learner(on_grid, "fp32", **more)
    for k in range(10):
        list(exact.update(pairs, k))
    digest = exact.save(tmp_path / "state", tmp_path / "policy").digest

    def margin(precision: config.Precision, nearest: bool = False) -> float:
        made = learner(on_grid, precision, **more)
        made.load(WeightsRef(digest=digest, path=tmp_path / "state"))
        if nearest:  # as autocast does it
            made.policy_as_exported = made.base_as_exported = nullcontext
        # `previous` starts every update at 0: what moves within one is to be seen.
        steps = list(made.update(pairs * (8 if reference == "previous" else 1), 10))
        return steps[-1].metrics["margin"]

    whole, seen, lost = margin("fp32"), margin("bf16"), margin("bf16", nearest=True)
    print(f"margin at {rate:g}: in fp32 {whole:.4f}, as exported {seen:.4f}, to the nearest {lost:.4f}")
    assert whole > 0.001
    assert seen == pytest.approx(whole, rel=0.3)
    assert lost < 0.6 * whole


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        *[(name, False) for name in ("llama", "llama-tied", "gemma3", "gpt2", "opt", "mixtral", "qwen3-moe")],
        *[(name, True) for name in ("llama", "gpt2", "gemma3", "qwen3-moe")],
    ],
)
@pytest.mark.slow
def test_inside_are_the_weights_of_the_export(name: str, lora: bool, tmp_path: Path) -> None:
    """To the bit, whether the base lies on the grid or not; outside again are the masters."""
    path = str(make_architecture(name, tmp_path / "base"))
    made = learner(path, "bf16", learning_rate=1e-3, lora=LORA if lora else None)
    list(made.update(make_preferences(8), 0))
    made.save(tmp_path / "state", tmp_path / "policy")
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype="auto").named_parameters())
    model = made.policy
    masters = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="in the middle"), made.policy_as_exported():
        inside = {plain(name): p.detach().clone() for name, p in model.named_parameters() if ".lora_" not in name}
        raise RuntimeError("in the middle")
    assert inside.keys() == exported.keys()
    for key, value in exported.items():
        torch.testing.assert_close(inside[key].float(), value.float(), atol=0, rtol=0)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p, masters[key], atol=0, rtol=0)
    if lora:
        assert any(not torch.equal(inside[n], masters[m]) for m in masters if (n := plain(m)) in inside)


@pytest.mark.parametrize("name", each(["llama", "gpt2", "mixtral", "qwen3-moe", "olmoe"]))
def test_a_loras_gradients_are_those_through_the_merged_weights(name: str, tmp_path: Path) -> None:
    """By plain autograd: the untrained model with W + sBA in the place of W, rounded, the rounding without gradient."""
    from peft import LoraConfig, get_peft_model

    path = make_architecture(name, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    plain_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    targets = config.Lora(r=4, alpha=8).target_modules
    wrapped = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    adapters = {n: p for n, p in wrapped.get_base_model().named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for p in adapters.values():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    ids = torch.randint(3, 90, (2, 11), generator=generator)

    with AsExported(wrapped.get_base_model(), seed=7)():
        for p in wrapped.get_base_model().parameters():
            p.data = p.data.float()  # what stands in half the memory lies on the grid: without autocast, all is fp32
        found_loss = wrapped(ids, labels=ids).loss
        found_loss.backward()
    found = {n: p.grad.clone() for n, p in adapters.items()}
    for p in adapters.values():
        p.grad = None

    state = {**dict(plain_model.named_parameters()), **dict(plain_model.named_buffers())}
    state = {n: v.detach() for n, v in state.items()}
    for key, layers in adapted(wrapped.get_base_model()).items():
        merged = state[key]
        for layer in layers:
            merged = merged + product(layer)
        state[key] = merged + (round_stochastically(merged, 7, key).float() - merged).detach()
    for key, value in state.items():
        if key not in adapted(wrapped.get_base_model()) and key in dict(plain_model.named_parameters()):
            state[key] = round_stochastically(value, 7, key).float()
    loss = functional_call(plain_model, state, (ids,), {"labels": ids}).loss
    loss.backward()
    assert found_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-3
    for key, p in adapters.items():
        torch.testing.assert_close(found[key], p.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_starts_as_its_reference_with_biases_off_the_grid(kind: str, tmp_path: Path) -> None:
    """Weights on bf16's grid and biases that aren't: both are rounded alike on both sides."""
    path = make_architecture("qwen2", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(p.to(torch.bfloat16))
    assert any(not torch.equal(p, p.to(torch.bfloat16).float()) for n, p in model.named_parameters() if "bias" in n)
    model.save_pretrained(path)
    (step,) = learner(str(path), "bf16", kind).update(make_preferences(8), 0)
    assert step.metrics["margin"] == 0


def test_a_lora_on_what_stays_in_fp32_adds_to_it(on_grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a weight isn't rounded, so no LoRA is merged into it either."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["o_proj"])
    made = learner(on_grid, "bf16", lora=config.Lora(r=4, alpha=8, target_modules=["o_proj"]))
    with torch.no_grad():
        for p in made.trained().values():
            p.add_(0.1)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        outside = made.policy(ids).logits
        with made.policy_as_exported():
            inside = made.policy(ids).logits
    torch.testing.assert_close(inside, outside, atol=0, rtol=0)


def test_an_untrained_base_needs_no_rounding(on_grid: str) -> None:
    """Nothing is copied where a frozen weight lies on the grid."""
    base = AutoModelForCausalLM.from_pretrained(on_grid, dtype=torch.float32).requires_grad_(False)
    assert AsExported(base, seed=7).names == ()
    with torch.no_grad():
        base.model.norm.weight.add_(1e-5)
    assert AsExported(base, seed=7).names == ("model.norm.weight",)
