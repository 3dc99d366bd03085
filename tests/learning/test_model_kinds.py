"""Models as people have them: dropout of every kind, generation configs that can't be saved, a policy's files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlaif import config
from rlaif.errors import UserError
from rlaif.learning import make_learner
from rlaif.learning.base import no_dropout, probe_logits
from rlaif.models import tokenizer_identity
from tests.learning.conftest import END, VOCABULARY, make_model, make_preferences

pytestmark = pytest.mark.slow

_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": END}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
_FFN = {**_SIZES, "intermediate_size": 96}
_OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64}

DROPOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "opt": ("OPTConfig", {**_SIZES, **_OPT, "dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.3}),
    "gpt-neox": ("GPTNeoXConfig", {**_FFN, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "falcon": ("FalconConfig", {**_SIZES, "hidden_dropout": 0.1, "attention_dropout": 0.1, "parallel_attn": False}),
    "phi": ("PhiConfig", {**_FFN, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.1}),
    "llama": ("LlamaConfig", {**_FFN, "attention_dropout": 0.2}),
    "xglm": ("XGLMConfig", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 2, "dropout": 0.1}),
    "mixtral": ("MixtralConfig", {**_FFN, "num_key_value_heads": 2, "router_jitter_noise": 0.3}),
}  # fmt: skip
"""Name → configuration class and sizes of a tiny model that is random in training."""


def make_random(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    name, sizes = DROPOUT[kind]
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**_IDS, **sizes))
    with torch.no_grad():  # initialised with .02, a tiny model's logits are too alike to show what is random
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    make_model(folder)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", DROPOUT)
def test_nothing_is_random_in_training(kind: str, tmp_path: Path, settings: config.Learner) -> None:
    model = make_random(kind, tmp_path / "base")
    assert not torch.allclose(probe_logits(model, True), probe_logits(model, False), atol=1e-3), "it would be random"
    made = make_learner("dpo", str(tmp_path / "base"), settings, seed=0)
    step = next(made.update(make_preferences(4), 0))
    assert step.metrics["margin"] == pytest.approx(0, abs=1e-6)
    if kind != "mixtral":  # TRL adds the loss that balances its experts
        assert step.loss == pytest.approx(math.log(2), abs=1e-6)
    made.save(tmp_path / "state", tmp_path / "policy")
    base, policy = (transformers.AutoConfig.from_pretrained(tmp_path / f).to_dict() for f in ("base", "policy"))
    assert {k: v for k, v in base.items() if "drop" in k} == {k: v for k, v in policy.items() if "drop" in k}


@pytest.mark.parametrize(
    "changes", [{"kind": "online_dpo"}, {"lora": config.Lora(r=2)}, {"args": {"gradient_checkpointing": True}}]
)
def test_nor_with_another_learner(changes: dict[str, Any], tmp_path: Path, settings: config.Learner) -> None:
    make_random("opt", tmp_path)
    changed = settings.model_copy(update=changes)
    step = next(make_learner(changed.kind, str(tmp_path), changed, seed=0).update(make_preferences(4), 0))
    assert step.loss == pytest.approx(math.log(2), abs=1e-6)


def test_a_model_that_stays_random_is_refused_by_name(tmp_path: Path) -> None:
    model = make_random("llama", tmp_path)

    def noise(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.randn_like(output) * module.training

    model.model.layers[0].mlp.register_forward_hook(noise)
    with pytest.raises(UserError, match="LlamaForCausalLM computes something else in training"):
        no_dropout(model)


def test_a_router_that_draws_in_training_is_refused_by_name(tmp_path: Path, settings: config.Learner) -> None:
    """PhiMoE draws an expert among the best in training; the number that says among how many counts in use, too."""
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.3}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(transformers.PhimoeConfig(**_IDS, **_FFN, **sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(make_model(tmp_path / "llama")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="PhimoeForCausalLM computes something else in training"):
        make_learner("dpo", str(tmp_path), settings, seed=0)


GENERATION: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_p": 0.9, "do_sample": False},
    {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [END, 5]},
    {"top_k": 5, "min_p": 0.1, "typical_p": 0.9},
    {"early_stopping": True, "length_penalty": 2.0, "num_beams": 1},
    {"max_new_tokens": 20, "suppress_tokens": [3], "some_future_setting": {"a": 1}},
    {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1},
    {"pad_token_id": -1, "max_length": 4096, "transformers_version": "4.28.1"},
]


@pytest.mark.parametrize("found", GENERATION, ids=lambda g: "-".join(g))
def test_a_generation_config_is_exported_as_it_was_found(
    found: dict[str, Any], tmp_path: Path, settings: config.Learner
) -> None:
    make_model(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(found))
    made = make_learner("dpo", str(tmp_path / "base"), settings, seed=0)
    made.save(tmp_path / "state", tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "generation_config.json").read_text()) == found
    base, policy = (GenerationConfig.from_pretrained(tmp_path / f).to_dict() for f in ("base", "policy"))
    assert base == policy


def test_generation_settings_of_an_old_config_are_kept(tmp_path: Path, settings: config.Learner) -> None:
    base = make_model(tmp_path / "base")
    (base / "generation_config.json").unlink()
    tree = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(tree | {"temperature": 0.7, "top_p": 0.9, "max_length": 50}))
    made = make_learner("dpo", str(base), settings, seed=0)
    made.save(tmp_path / "state", tmp_path / "policy")
    before, after = (AutoModelForCausalLM.from_pretrained(p).generation_config for p in (base, tmp_path / "policy"))
    for name in ("temperature", "top_p", "max_length", "eos_token_id", "do_sample"):
        assert getattr(before, name) == getattr(after, name), name


def test_a_policy_has_the_files_of_its_base(tmp_path: Path, settings: config.Learner) -> None:
    base = make_model(tmp_path / "base")
    kept = ["preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json", "LICENSE"]
    kept += ["additional_chat_templates/tool_use.jinja", "NOTICE.txt", "tekken.json", "spiece.model", "tokenizer_x.py"]
    left = ["README.md", "model.safetensors.index.json", "pytorch_model.bin", "model-Q4.gguf", "quantize_config.json"]
    left += ["original/tokenizer.model", "rlaif_model.json", ".gitattributes", "trainer_state.json", "onnx/x.json"]
    for name in kept + left:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}" if name.endswith("json") else f"of the base: {name}")
    made = make_learner("dpo", str(base), settings, seed=0)
    made.save(tmp_path / "state", tmp_path / "policy")
    found = {str(p.relative_to(tmp_path / "policy")) for p in (tmp_path / "policy").rglob("*") if p.is_file()}
    assert set(kept) <= found
    assert not found & set(left)
    assert all((tmp_path / "policy" / n).read_bytes() == (base / n).read_bytes() for n in kept)
    assert tokenizer_identity(tmp_path / "policy") == tokenizer_identity(base)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template["tool_use"]


@pytest.mark.parametrize("kind", ["dpo", "online_dpo"])
@pytest.mark.parametrize("pad", [None, VOCABULARY, VOCABULARY + 7])
def test_a_pad_beyond_the_embedding(kind: str, pad: int | None, tmp_path: Path, settings: config.Learner) -> None:
    base = make_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    if pad is not None:
        tokenizer.add_tokens([f"x{i}" for i in range(pad - VOCABULARY)])
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        assert tokenizer.pad_token_id == pad
    tokenizer.save_pretrained(base)
    expected = make_learner(kind, str(make_model(tmp_path / "plain")), settings, seed=0)
    made = make_learner(kind, str(base), settings, seed=0)
    a, b = ([s.loss for s in m.update(make_preferences(8), 0)] for m in (expected, made))
    assert a == pytest.approx(b)
    made.save(tmp_path / "state", tmp_path / "policy")
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").pad_token_id == pad
