"""Small tokenizers of the kinds that chat models have, with their makers' templates in short."""

from __future__ import annotations

from typing import Any

CORPUS = [
    "What does a chat template do? It writes who said what, and where a turn ends.",
    "The quick brown fox jumps over the lazy dog, and <angle> [square] |pipe| signs stand in code.",
    "How do I keep bread fresh? Put it into a linen bag. im start end of turn user assistant system",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 日本語 🙂",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _wrapped(plain: Any, template: str, **special: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    tokenizer.chat_template = template
    return tokenizer


def byte_level(special: list[str], template: str, added: bool, marks: tuple[str, ...] = (), **named: str) -> Any:
    """As GPT-2's. `added`: control tokens lie beyond the vocabulary (Qwen, Llama 3), else in it (SmolLM)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[] if added else special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(CORPUS * 2, trainer)
    plain.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    plain.add_tokens([AddedToken(t, special=False, normalized=False) for t in marks])
    return _wrapped(plain, template, **named)


def sentencepiece_bpe(special: list[str], template: str, **named: str) -> Any:
    """As Gemma's: spaces are `▁`, unknown characters bytes, control tokens in the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    plain = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    plain.normalizer = normalizers.Replace(" ", "▁")
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=pieces, show_progress=False)
    plain.train_from_iterator(CORPUS * 2, trainer)
    import json

    tree = json.loads(plain.to_str())  # the trainer makes every byte a special token
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] in ("<unk>", *special)]
    plain = Tokenizer.from_str(json.dumps(tree))
    plain.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return _wrapped(plain, template, unk_token="<unk>", **named)


def unigram(special: list[str], template: str, **named: str) -> Any:
    """As T5's: control tokens are pieces with a score, and would be taken for the likeliest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    plain = Tokenizer(models.Unigram())
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    plain.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=180, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
    )
    plain.train_from_iterator(CORPUS * 2, trainer)
    return _wrapped(plain, template, unk_token="<unk>", **named)


KINDS = {
    "qwen": lambda: byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        CHATML,
        added=True,
        marks=("<think>", "</think>", "<b>"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    ),
    "smollm": lambda: byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        CHATML.replace("enable_thinking", "other"),
        added=False,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    ),
    "llama": lambda: byte_level(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        LLAMA,
        added=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    ),
    "gemma": lambda: sentencepiece_bpe(
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        GEMMA,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    ),
    "mistral": lambda: unigram(["<s>", "</s>", "[INST]", "[/INST]"], MISTRAL, bos_token="<s>", eos_token="</s>"),
}
"""By the family that they are like; call one to have it."""
