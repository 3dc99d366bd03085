"""A tiny policy that differs from its reference, and pairs with ended and cut-off completions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlaif import config
from rlaif.records import Preference

VOCABULARY, END = 97, 2


def make_model(folder: Path, seed: int = 0) -> Path:
    """A two-layer Llama with random weights, large enough to have opinions, and a word tokenizer."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=END,
            pad_token_id=END,
            attention_dropout=0.1,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w2", bos_token="w1", pad_token="w2")
    tokenizer.save_pretrained(folder)
    return folder


def make_preferences(count: int, seed: int = 0) -> list[Preference]:
    """Random pairs of unequal lengths; every other completion is cut off (no end token)."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(least, most)))

    return [
        Preference(
            pair_id=f"{seed}-{i}",
            iteration=0,
            source="judge",
            constitution="0" * 16,
            prompt_id=f"p{i}",
            chosen_id=f"c{i}",
            rejected_id=f"r{i}",
            prompt_token_ids=(1, *tokens(1, 9)),
            chosen_token_ids=tokens(1, 12) + ((END,) if i % 2 else ()),
            rejected_token_ids=tokens(1, 12) + (() if i % 2 else (END,)),
            prompt="a prompt",
            chosen="chosen",
            rejected="rejected",
            p_chosen=0.9,
            agreement=1.0,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def settings() -> config.Learner:
    return config.Learner(precision="fp32", learning_rate=1e-2, warmup_steps=0, batch_size=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other on a model of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
