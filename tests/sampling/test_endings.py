"""When an answer ends and what is its text, with scripted tokens: the rule of both engines, and thoughts on top."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rlaif import config, models  # noqa: E402
from rlaif.errors import UserError  # noqa: E402
from rlaif.records import Message, PolicyVersion, Prompt  # noqa: E402
from rlaif.sampling import Sample, SampleRequest  # noqa: E402
from rlaif.sampling import transformers as engine  # noqa: E402
from rlaif.sampling.endings import Endings  # noqa: E402
from rlaif.sampling.role import SamplerRole  # noqa: E402
from tests.chat_tokenizers import CHATML, KINDS, byte_level  # noqa: E402


def save(folder: Path, tokenizer: Any, generation_eos: Any = None) -> Path:
    """A tiny model with a tokenizer, in a folder."""
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(settings).save_pretrained(folder)
    if generation_eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ChatML; the generation config names `<|endoftext|>` alone."""
    tokenizer = KINDS["qwen"]()
    return save(tmp_path_factory.mktemp("qwen"), tokenizer, tokenizer.convert_tokens_to_ids("<|endoftext|>"))


Say = Callable[..., Sample]


@pytest.fixture
def say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """What the transformers engine makes of a policy that says a text, token by token."""

    def said(text: str, max_tokens: int = 64, **settings: Any) -> Sample:
        tokenizer = models.load_tokenizer(folder)
        script(monkeypatch, tokenizer.encode(text, add_special_tokens=False))
        sampler = engine.Sampler(str(folder), config.Sampling(engine="transformers", precision="fp32", **settings))
        request = SampleRequest(id="a", prompt_token_ids=(3,), seed=0, max_tokens=max_tokens, temperature=1, top_p=1)
        ((sample,),) = sampler.sample([request])
        return sample

    return said


def script(monkeypatch: pytest.MonkeyPatch, token_ids: list[int]) -> None:
    at = iter(range(10_000))
    monkeypatch.setattr(engine, "draw", lambda *_: token_ids[next(at)])


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_ends_with_either_end_token(say: Say, folder: Path, end: str) -> None:
    sample = say(f"In a bag.{end}How do I")
    assert (sample.text, sample.finish_reason) == ("In a bag.", "stop")
    assert sample.token_ids[-1] == models.load_tokenizer(folder).convert_tokens_to_ids(end)


@pytest.mark.parametrize(
    ("stop", "text", "answer"),
    [
        ("Question:", "In a bag.\nQuestion: What", "In a bag.\n"),
        ("\n\n", "In a bag.\n\nAnd", "In a bag."),
        ("bread", "How do I keep breadfruit fresh? bread", "How do I keep "),  # inside of a word, at its first place
        (" fresh?", "How do I keep it fresh? Put", "How do I keep it"),
        ("日本語", "It is 日本語 here", "It is "),  # bytes of several tokens
        ("🙂", "Fresh 🙂🙂", "Fresh "),
        ("Put", "Put it", ""),  # nothing before it
        ("x" * 30, "a" + "x" * 40, "a"),
    ],
)
def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(
    say: Say, folder: Path, stop: str, text: str, answer: str
) -> None:
    sample = say(text + "<|im_end|>", stop=["###", stop])
    assert (sample.text, sample.finish_reason) == (answer, "stop")
    tokenizer = models.load_tokenizer(folder)
    whole = tokenizer.encode(text, add_special_tokens=False)
    assert sample.token_ids == tuple(whole[: len(sample.token_ids)])  # as sampled ...
    assert stop in tokenizer.decode(sample.token_ids)  # ... up to the token that completes the string
    assert stop not in tokenizer.decode(sample.token_ids[:-1])


def test_without_the_string_an_answer_ends_as_before(say: Say) -> None:
    assert say("In a bag.<|im_end|>", stop=["###"]) == say("In a bag.<|im_end|>")
    cut = say("How do I keep bread fresh?", max_tokens=5, stop=["###"])
    assert (len(cut.token_ids), cut.finish_reason) == (5, "length")
    end = say("In a ba#", max_tokens=64, stop=["#"])
    at_the_limit = say("In a ba#", max_tokens=len(end.token_ids), stop=["#"])
    assert at_the_limit == end
    assert end.finish_reason == "stop"


def test_token_ids_and_special_tokens_stop(say: Say, folder: Path) -> None:
    tokenizer = models.load_tokenizer(folder)
    dot = tokenizer.convert_tokens_to_ids(".")
    sample = say("In a bag. Or not.", stop=[dot])
    assert (sample.text, sample.finish_reason, sample.token_ids[-1]) == ("In a bag", "stop", dot)
    sample = say("In a bag<|im_start|>user", stop=["<|im_start|>"])  # its text is in no decoded answer
    assert (sample.text, sample.finish_reason) == ("In a bag", "stop")
    with pytest.raises(UserError, match=r"sampling\.stop: 99999 is no token; the tokenizer has \d+"):
        say("In", stop=[99999])


def test_the_case_of_a_list_that_lacks_the_templates_end(tmp_path: Path) -> None:
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, added=False, eos_token="<|im_end|>")
    path = save(tmp_path / "model", tokenizer, generation_eos=0)
    endings = Endings(str(path), models.load_tokenizer(path), config.Sampling())
    assert endings.token_ids == {0, 2}
    assert models.turn_end(path, tokenizer) == (2, (0, 2))
    # An exported policy says so to other tools, which know its generation config alone.
    (path / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 7}')
    models.name_turn_ends(path, tokenizer)
    said = json.loads((path / "generation_config.json").read_text())
    assert said == {"eos_token_id": [0, 2], "top_k": 7}
    models.name_turn_ends(path, tokenizer)
    assert json.loads((path / "generation_config.json").read_text()) == said


# Thoughts, in the sampler as the loop sees it.


def answer(monkeypatch: pytest.MonkeyPatch, path: Path, said: str, limit: int = 64, **policy: Any) -> Any:
    script(monkeypatch, models.load_tokenizer(path).encode(said, add_special_tokens=False))
    settings = config.Sampling(engine="transformers", max_tokens=limit, precision="fp32", stop=["###"])
    role = SamplerRole(str(path), settings, config.Policy(**policy))
    prompt = Prompt(id="p", messages=(Message(role="user", content="How do I keep bread fresh?"),))
    ((completion,),) = role.sample([prompt], 1, PolicyVersion(iteration=0, digest="d"), 0, 0, "x")
    return completion


def test_a_thought_is_stripped_or_judged_and_always_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "<think>\nbread?\n</think>\n\nIn a bag.<|im_end|>"
    stripped = answer(monkeypatch, folder, said)
    assert (stripped.text, stripped.finish_reason) == ("In a bag.", "stop")
    judged = answer(monkeypatch, folder, said, thinking="judge")
    assert judged.text == "<think>\nbread?\n</think>\n\nIn a bag."
    assert stripped.token_ids == judged.token_ids
    assert models.load_tokenizer(folder).decode(stripped.token_ids) == said


def test_half_a_thought_is_an_empty_answer_that_was_cut_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = answer(monkeypatch, folder, "<think>\nbread? I know that", limit=6)
    assert (half.text, half.finish_reason, len(half.token_ids)) == ("", "length", 6)


def test_a_stop_string_ends_the_answer_after_a_thought(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = answer(monkeypatch, folder, "<think>bread</think>In a bag.### Question")
    assert (said.text, said.finish_reason) == ("In a bag.", "stop")
    in_the_thought = answer(monkeypatch, folder, "<think>bread ### Question</think>In a bag.")
    assert (in_the_thought.text, in_the_thought.finish_reason) == ("", "stop")


def test_marks_that_are_special_tokens_and_a_template_that_opens_the_thought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level(
        ["<|im_start|>", "<|im_end|>", "[THINK]", "[/THINK]"],
        CHATML.replace("assistant\n", "assistant\n[THINK]"),
        added=True,
        eos_token="<|im_end|>",
    )
    path = save(tmp_path / "model", tokenizer)
    assert answer(monkeypatch, path, "bread?[/THINK]In a bag.<|im_end|>").text == "In a bag."
    assert answer(monkeypatch, path, "[THINK]bread?[/THINK]In a bag.<|im_end|>").text == "In a bag."
    assert answer(monkeypatch, path, "bread? I know", limit=3).text == ""
    assert answer(monkeypatch, path, "bread?[/THINK]Bag.<|im_end|>", thinking="judge").text == "bread?Bag."


def test_arguments_of_the_template_are_in_what_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = models.load_tokenizer(folder)
    asked = answer(monkeypatch, folder, "In a bag.<|im_end|>", chat_template_args={"enable_thinking": False})
    assert tokenizer.decode(asked.prompt_token_ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert asked.text == "In a bag."
