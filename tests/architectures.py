"""Tiny random models of the architectures that people train, in folders: what goes through a reload, an export, a loss.

In: a name of `ARCHITECTURES`. Out: a folder with config, safetensors, a word tokenizer and a chat template. Two layers,
hidden size 64: small enough for a table of all of them, large enough to have opinions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCABULARY, END = 320, 2
_HIDDEN, _HEADS, _KV_HEADS = 64, 2, 1  # a head of 32: the smallest that vLLM's attention on the CPU takes

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": END,
}

_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_OWN_HEADS: dict[str, Any] = {"num_key_value_heads": None}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, **_UNTIED}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _UNTIED),
    "llama-tied": ("LlamaConfig", _TIED),
    "qwen2": ("Qwen2Config", _UNTIED),
    "qwen2-tied": ("Qwen2Config", _TIED),
    "qwen3": ("Qwen3Config", {"head_dim": 32, **_UNTIED}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 32, **_TIED}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            **_TIED,
        },
    ),
    "mistral": ("MistralConfig", _UNTIED),
    "phi3": ("Phi3Config", _UNTIED),
    "olmo2": ("Olmo2Config", _UNTIED),
    "gpt2": ("GPT2Config", _OWN_HEADS),
    "gpt-neox": ("GPTNeoXConfig", {**_OWN_HEADS, **_UNTIED}),
    "granite": (
        "GraniteConfig",
        {
            "logits_scaling": 2.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            **_TIED,
        },
    ),
    "opt": (
        "OPTConfig",
        {**_OWN_HEADS, "ffn_dim": 96, "word_embed_proj_dim": _HIDDEN, "dropout": 0.1, "init_std": 0.2},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **_EXPERTS}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 64, "decoder_sparse_step": 1, **_EXPERTS},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, **_EXPERTS}),
}
"""Name → transformers' config class, and what it takes beside the common sizes; None takes a common one away."""

MIXTURES = ("mixtral", "qwen3-moe", "olmoe")
_QUICK = ("llama-tied", "gpt2", "mixtral")


def each(names: Iterable[str]) -> list[Any]:
    """A test's parameters: those names. The quick part of the suite takes a few of them; a table is slow as a whole."""
    import pytest

    return [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in names]


def make_model(name: str, folder: Path, seed: int = 0) -> Path:
    """A random model of that architecture; another `seed` gives other weights for the same folder layout."""
    import torch
    import transformers

    kind, extra = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{k: v for k, v in (_COMMON | extra).items() if v is not None})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms start at one everywhere and biases at zero: a swap of two would not show
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """Bytes as tokens, which every architecture's own tokenizer class reads; `</s>` ends an answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {t: i for i, t in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(t, special=True) for t in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    return tokenizer
