"""What is exported is what was trained: by rate, by precision, by architecture, with adapters and without."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rlaif import config, models
from rlaif.errors import UserError
from rlaif.learning import make_learner
from rlaif.learning.policy_state import exported_state, kept_in_fp32
from rlaif.learning.rounding import round_stochastically
from rlaif.records import Preference, TokenSequence
from tests.architectures import ARCHITECTURES, END, MIXTURES, VOCABULARY, each, make_model


def make_preferences(count: int, vocabulary: int = VOCABULARY) -> list[Preference]:
    generator = torch.Generator().manual_seed(3)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (n,), generator=generator).tolist())

    return [
        Preference(
            pair_id=f"{i}", iteration=0, source="judge", constitution="0" * 16, prompt_id=f"p{i}", chosen_id=f"c{i}",
            rejected_id=f"r{i}", prompt_token_ids=tokens(5), chosen_token_ids=(*tokens(9), END),
            rejected_token_ids=tokens(12), prompt="a prompt", chosen="chosen", rejected="rejected", p_chosen=0.9,
            agreement=1.0,
        )
        for i in range(count)
    ]  # fmt: skip


SEQUENCES = [TokenSequence(prompt_token_ids=(5, 6, 7), token_ids=tuple(range(10 + i, 26 + i))) for i in range(4)]


def scored(path: Path) -> torch.Tensor:
    """log p of the sequences' tokens by plain transformers from the folder alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for s in SEQUENCES:
        with torch.no_grad():
            logp = model(torch.tensor([s.all_ids])).logits[0].log_softmax(-1)
        found += [float(logp[len(s.prompt_token_ids) - 1 + i, t]) for i, t in enumerate(s.token_ids)]
    return torch.tensor(found)


def flat(values: list[tuple[float, ...]]) -> torch.Tensor:
    return torch.tensor([v for row in values for v in row])


def trained(path: Path, lora: config.Lora | None = None, **changes: Any) -> Any:
    settings = config.Learner(precision="fp32", batch_size=2, learning_rate=1e-2, warmup_steps=0, lora=lora)
    made = make_learner("dpo", str(path), settings.model_copy(update=changes), seed=7, export_precision="fp32")
    list(made.update(make_preferences(4), 0))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", each(ARCHITECTURES))
def test_full_weights_arrive(name: str, tmp_path: Path) -> None:
    made = trained(make_model(name, tmp_path / "base"))
    made.save(tmp_path / "state", tmp_path / "policy")
    master = flat(made.logprobs(SEQUENCES))
    assert (scored(tmp_path / "policy") - master).abs().max() < 1e-3
    assert (scored(tmp_path / "base") - master).abs().mean() > 0.1, "it has moved"


@pytest.mark.parametrize("name", each([*MIXTURES, "llama-tied", "gpt2", "phi3"]))
def test_adapters_arrive_merged(name: str, tmp_path: Path) -> None:
    made = trained(make_model(name, tmp_path / "base"), config.Lora(r=4, alpha=8))
    made.save(tmp_path / "state", tmp_path / "policy")
    master = flat(made.logprobs(SEQUENCES))
    for _ in range(2):  # what a name doesn't match is filled at random, so that two loads differ
        assert (scored(tmp_path / "policy") - master).abs().max() < 1e-3
    assert (scored(tmp_path / "base") - master).abs().mean() > 0.01, "it has moved"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "online_dpo"])
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_layer_is_refused(kind: Any, layer: str, tmp_path: Path) -> None:
    path = make_model("llama-tied", tmp_path / "base")
    settings = config.Learner(kind=kind, precision="fp32", lora=config.Lora(r=4, alpha=8, target_modules=[layer]))
    with pytest.raises(UserError, match="learner"):
        make_learner(kind, str(path), settings, seed=7)


def test_stochastic_rounding_keeps_the_expectation_and_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(100_000, generator=generator).to(torch.bfloat16).float()
    assert torch.equal(round_stochastically(grid, 0, "w").float(), grid)
    value = grid + grid.abs() * 2e-4  # a twentieth to a tenth of a step
    rounded = round_stochastically(value, 0, "w").float()
    move, wanted = rounded - grid, value - grid
    assert float(move.sum() / wanted.sum()) == pytest.approx(1, abs=0.05)
    assert bool((value.to(torch.bfloat16).float() == grid).float().mean() > 0.9), "what rounding to the nearest loses"
    assert torch.equal(rounded, round_stochastically(value, 0, "w").float())
    assert not torch.equal(rounded, round_stochastically(value, 1, "w").float())
    assert not torch.equal(rounded, round_stochastically(value, 0, "v").float())
    large = torch.tensor([3.0e38, -3.0e38, 0.0, -0.0, 1e-39])
    assert bool(round_stochastically(large, 0, "w").isfinite().all())


def test_what_a_model_keeps_in_fp32_stays(tmp_path: Path) -> None:
    """Routing biases decide which experts answer: a rounded one sends a token elsewhere."""
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.tensor([1.0001]))
    model._keep_in_fp32_modules_strict = {"e_score_correction_bias"}
    model.router = torch.nn.Module()
    model.router.e_score_correction_bias = torch.nn.Parameter(torch.tensor([5.0001]))
    kept = exported_state(model, "bf16", 0)
    assert kept["w"].dtype == torch.bfloat16
    assert torch.equal(kept["router.e_score_correction_bias"], torch.tensor([5.0001]))


def test_what_stays_in_fp32_is_what_a_reader_keeps_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 `from_pretrained` keeps what its class strictly wants in fp32, by parts of names, dots included, and
    nothing else: anything more in the export would be rounded to the nearest by whoever reads it."""
    path = make_model("llama", tmp_path / "base")
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["input_layernorm", "norm"])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["gate_proj.weight", "1.self_attn.o_"])
    read = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    wanted = {name for name, p in read.named_parameters() if p.dtype == torch.float32}
    assert len(wanted) == 3
    assert kept_in_fp32(read) - {name for name, _ in read.named_buffers()} == wanted


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = make_model("llama", tmp_path / "base")
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights \(`lm_head.weight`\)"):
        trained(path)


def test_rounding_follows_the_weight_not_the_step(tmp_path: Path) -> None:
    """A weight that didn't move since the last export is rounded as it was then."""
    value = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    moved = value.clone()
    moved[:100] += 1
    before, after = (round_stochastically(v, 0, "w") for v in (value, moved))
    assert torch.equal(before[100:], after[100:])


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("rate", [1e-6, pytest.param(3e-5, marks=pytest.mark.nightly)])
def test_the_move_arrives_at_realistic_rates(rate: float, tmp_path: Path) -> None:
    """The share of the master's move in all logits that arrives, and what is left beside its direction."""
    path = models.resolve("embedded:smollm2-135m-instruct")
    settings = config.Learner(precision="fp32", batch_size=2, learning_rate=rate, warmup_steps=0)
    made: Any = make_learner("dpo", str(path), settings, seed=7, export_precision="bf16")
    list(made.update(make_preferences(12, vocabulary=40_000), 0))
    made.save(tmp_path / "state", tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["dtype"] == "bfloat16"
    state = exported_state(made.policy, "fp32", 0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(10, 40_000, (4, 24), generator=torch.Generator().manual_seed(5))

    def logits(weights: dict[str, torch.Tensor] | None) -> torch.Tensor:
        if weights is not None:
            model.load_state_dict({name: value.float() for name, value in weights.items()})
        with torch.no_grad():
            return model(ids).logits.log_softmax(-1).flatten()

    base = logits(None)
    move = logits(state) - base

    def arrives(weights: dict[str, torch.Tensor]) -> tuple[float, float]:
        made_it = logits(weights) - base
        return float(made_it @ move / (move @ move)), float((made_it - move).norm() / move.norm())

    nearest, lost = arrives({name: value.to(torch.bfloat16) for name, value in state.items()})
    shares, errors = zip(*[arrives(exported_state(made.policy, "bf16", seed)) for seed in range(4)], strict=True)
    exported, _ = arrives(AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict())
    print(f"rate {rate:g}: nearest {nearest:.3f} (off {lost:.3f}), at random {fmean(shares):.3f} ({fmean(errors):.3f})")
    assert nearest < 0.5
    assert 0.9 < fmean(shares) < 1.1
    assert fmean(errors) < 0.7 * lost
    assert 0.7 < exported < 1.3
