"""Messages to token ids: what somebody wrote stays text, and the template is asked what it needs."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from rlaif.errors import UserError
from rlaif.records import Message
from rlaif.rendering import Renderer
from tests.chat_tokenizers import CHATML, KINDS, PARTS, byte_level

PLAIN = "How do I keep  bread fresh?\nPut it into a <b>bag</b> 🙂 'now'"


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def user(content: str) -> tuple[Message, ...]:
    return (Message(role="user", content=content),)


def chat(*contents: str) -> tuple[Message, ...]:
    return tuple(Message(role="user" if i % 2 == 0 else "assistant", content=c) for i, c in enumerate(contents))


def controls(tokenizer: Any, ids: tuple[int, ...]) -> list[int]:
    return [i for i in ids if i in tokenizer.added_tokens_decoder and i != tokenizer.unk_token_id]


def test_messages_without_control_tokens_are_encoded_with_the_template(tokenizer: Any) -> None:
    for messages in (user(PLAIN), chat("Hi", PLAIN, f" {PLAIN} ")):
        conversation = [m.model_dump() for m in messages]
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert Renderer(tokenizer).text(messages) == text
        assert Renderer(tokenizer).ids(messages) == tuple(tokenizer.encode(text, add_special_tokens=False))


def test_the_careful_way_cuts_text_as_the_usual_one(tokenizer: Any) -> None:
    """Around control tokens that the template wrote, and at a text's beginning and end. One message that spells one
    makes it careful; before and after that message the tokens are the usual ones."""
    renderer = Renderer(tokenizer)
    control = next(t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content != "<unk>")
    for at in range(3):
        said = [PLAIN, f" {PLAIN} ", PLAIN]
        said[at] = word = "a qxz b"
        text = renderer.text(chat(*said))
        usual = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = text.index(word)
        before = sum(end <= begins for _, end in usual.offset_mapping)
        after = sum(start >= begins + len(word) for start, _ in usual.offset_mapping)
        assert before + after > len(usual.input_ids) / 2
        said[at] = f"a {control} b"
        careful = renderer.ids(chat(*said))
        assert careful[:before] == tuple(usual.input_ids[:before])
        assert careful[-after:] == tuple(usual.input_ids[-after:])


@pytest.mark.parametrize("shape", ["{}", "What is {}?", "{}{}", " {}\n", "a{}b", "code: x{} y {}"])
def test_what_spells_a_control_token_is_text(tokenizer: Any, shape: str) -> None:
    renderer = Renderer(tokenizer)
    for token in [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content != "<unk>"]:
        said = shape.format(token, token)
        ids = renderer.ids(user(said))
        assert controls(tokenizer, ids) == controls(tokenizer, renderer.ids(user(shape.format("x", "x"))))
        if tokenizer.unk_token_id not in ids:  # a unigram model needn't know every sign
            whole = tokenizer.decode(ids, skip_special_tokens=False)
            assert said.strip() in whole, whole
            assert said.strip() in tokenizer.decode(ids, skip_special_tokens=True)


def test_every_message_of_a_chat_is_text(tokenizer: Any) -> None:
    token = next(t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content != "<unk>")
    renderer = Renderer(tokenizer)
    quoted, plain = (renderer.ids(chat(f"a {x} b", f"c {x}", f"{x} d")) for x in (token, "x"))
    assert controls(tokenizer, quoted) == controls(tokenizer, plain)


def test_an_answer_alone_is_text_too(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    assert renderer.plain_ids(PLAIN) == tuple(tokenizer.encode(PLAIN, add_special_tokens=False))
    for token in [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content != "<unk>"]:
        assert controls(tokenizer, renderer.plain_ids(f"It writes {token} there.")) == []


def test_marks_that_the_template_writes_are_text_in_a_question_and_marks_in_an_answer() -> None:
    tokenizer = KINDS["qwen"]()
    renderer = Renderer(tokenizer)
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert think not in renderer.ids(user("What is <think>?"))
    assert tokenizer.convert_tokens_to_ids("<b>") in renderer.ids(user("<|im_end|> or <b>"))  # no mark of the template
    assert think in renderer.ids(chat("Hi <|im_end|>", "<think>a</think>b", "Go on"))


def test_a_tokenizer_that_cant_tell_text_from_tokens_refuses() -> None:
    fast = KINDS["qwen"]()

    class Slow:
        chat_template = CHATML
        added_tokens_decoder = fast.added_tokens_decoder

        def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
            return fast.apply_chat_template(conversation, **kwargs)

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return list(fast.encode(text, add_special_tokens=add_special_tokens))

    assert Renderer(Slow()).ids(user("Hi")) == Renderer(fast).ids(user("Hi"))
    with pytest.raises(
        UserError, match=r"holds `<\|im_end\|>`, a control token of this model, and its tokenizer \(Slow\)"
    ):
        Renderer(Slow()).ids(user("What is <|im_end|>?"))


def test_an_ordinary_word_that_serves_as_padding_stays_a_word() -> None:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], CHATML, added=True, eos_token="<|im_end|>", pad_token="!")
    ids = Renderer(tokenizer).ids(user("Hi! <|im_end|>"))
    assert tokenizer.convert_tokens_to_ids("!") in ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1  # the template's


# What templates want and leave out.


def test_parts_are_sent_to_a_template_that_reads_parts() -> None:
    text = byte_level(["<|im_start|>", "<|im_end|>"], CHATML, added=True, eos_token="<|im_end|>")
    parts = byte_level(["<|im_start|>", "<|im_end|>"], PARTS, added=True, eos_token="<|im_end|>")
    for messages in (user("Hi"), chat("Hi", "Hello", "What is <|im_end|>?")):
        assert Renderer(parts).text(messages) == Renderer(text).text(messages)
        assert Renderer(parts).ids(messages) == Renderer(text).ids(messages)
    assert Renderer(parts).turn_end([]) == Renderer(text).turn_end([])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n<|im_end|>{% endfor %}", "leaves the user's message out"),
        ("{{ messages[-1]['role'] }}{{ messages[-1]['content'][0]['value'] }}", "leaves the user's message out"),
        ("{% for m in messages %}{{ m['content'][:8] }}{% endfor %}", "leaves the user's message out"),
        ("{% for m in messages %}{{ m['content'][:12] }}{% endfor %}", "without its words .`it` is missing"),
        ("{% for m in messages %}{{ m['content'].split(' ')[0] }}{% endfor %}", "without its words .`keep` is missing"),
    ],
)
def test_a_template_that_loses_words_is_refused(template: str, said: str) -> None:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], template, added=True, eos_token="<|im_end|>")
    with pytest.raises(UserError, match=said):
        Renderer(tokenizer).ids(user("bread, keep it fresh"))


@pytest.mark.parametrize(
    ("kept", "role"), [("messages[-1:]", "system"), ("messages[1:]", "system"), ("messages[:-1]", "user")]
)
def test_a_message_that_is_left_out_is_named(kept: str, role: str) -> None:
    template = CHATML.replace("for m in messages", f"for m in {kept}")
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], template, added=True, eos_token="<|im_end|>")
    # Their words are in the others' messages.
    messages = (Message(role="system", content="Hi"), *user("Hi"))
    with pytest.raises(UserError, match=f"leaves the {role}'s message out of what it renders"):
        Renderer(tokenizer).text(messages)


@pytest.mark.parametrize("filter", ["trim", "lower", "tojson", "replace('\n', ' ')"])
def test_a_template_that_only_changes_form_is_accepted(filter: str) -> None:
    template = CHATML.replace("m['content']", f"(m['content'] | {filter})")
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], template, added=True, eos_token="<|im_end|>")
    messages = user(' "Quoted", and\nnew lines; Größe, 日本 <|im_end|>\t')
    assert Renderer(tokenizer).ids(messages).count(tokenizer.eos_token_id) == 1


def test_a_template_that_forgets_earlier_thoughts_is_accepted() -> None:
    template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], template, added=True, eos_token="<|im_end|>")
    text = Renderer(tokenizer).text(chat("Hi", "<think>secret</think>Hello", "Bye"))
    assert "secret" not in text
    assert "Hello" in text


def test_arguments_reach_the_template_and_a_misspelt_one_is_refused() -> None:
    tokenizer = KINDS["qwen"]()
    assert Renderer(tokenizer, {"enable_thinking": False}).text(user("Hi")).endswith("<think>\n\n</think>\n\n")
    assert Renderer(tokenizer).text(user("Hi")).endswith("assistant\n")
    with pytest.raises(
        UserError, match=r"chat_template_args\.enable_thinkin: the policy's chat template doesn't read it"
    ):
        Renderer(tokenizer, {"enable_thinkin": False})


# The end of a turn.


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("qwen", "<|im_end|>"),
        ("smollm", "<|im_end|>"),
        ("llama", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("mistral", "</s>"),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes(kind: str, written: str) -> None:
    tokenizer = KINDS[kind]()
    end = tokenizer.convert_tokens_to_ids(written)
    declared = tokenizer.convert_tokens_to_ids({"qwen": "<|endoftext|>", "llama": "<|end_of_text|>"}.get(kind, written))
    found = Renderer(tokenizer).turn_end([declared])
    assert found.written == end
    assert found.stops == tuple(sorted({declared, end, tokenizer.eos_token_id}))


def test_a_turn_that_only_an_earlier_message_closes() -> None:
    template = CHATML.replace("+ '<|im_end|>' + '\n'", "+ ('' if loop.last else '<|im_end|>\n')")
    tokenizer = byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template, added=True, eos_token="<|endoftext|>"
    )
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert Renderer(tokenizer).turn_end([end]) == (end, tuple(sorted((end, eos))))
    assert Renderer(tokenizer).turn_end([eos]) == (eos, (eos,))  # what begins the next turn needn't end this one


def test_a_template_without_an_end_has_the_tokenizers() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer = byte_level(["<|endoftext|>", "<|eot|>"], template, added=True, eos_token="<|endoftext|>")
    other = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert Renderer(tokenizer).turn_end([]).written == tokenizer.eos_token_id
    assert Renderer(tokenizer).turn_end([other, tokenizer.eos_token_id]).written == tokenizer.eos_token_id
    assert Renderer(tokenizer).turn_end([other]).written == other


@pytest.mark.parametrize(
    ("template", "content", "begun"),
    [
        (CHATML, "bread?", "<|im_start|>assistant\n"),
        (CHATML.replace("assistant\n", "assistant\n<think>\n"), "bread?", "<|im_start|>assistant\n<think>\n"),
        # What a message ends with isn't the template's.
        ("{{ messages[0]['content'] }}", "What is <think>", ""),
        ("{{ messages[0]['content'] }}\n<think>", "think", "\n<think>"),
    ],
)
def test_what_a_template_begins_an_answer_with(template: str, content: str, begun: str) -> None:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], template, added=True, eos_token="<|im_end|>")
    assert Renderer(tokenizer).begun([Message(role="user", content=content)]) == begun
