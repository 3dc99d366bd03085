"""Seeds and rendered prompts, with a tokenizer small enough to read."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from rlaif.data.prompts import with_system
from rlaif.errors import UserError
from rlaif.records import Message, Prompt
from rlaif.rendering import Renderer
from rlaif.sampling import SampleRequest
from rlaif.sampling.requests import check_length, render_prompt, seed_for


class Letters:
    """Each character is a token; messages render as `role:content;`."""

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        if conversation[0]["content"] == "forbidden":
            raise ValueError("System role not supported")
        text = "".join(f"{m['role']}:{m['content']};" for m in conversation)
        return text + "assistant:" * add_generation_prompt

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]


PROMPT = Prompt(id="p1", messages=(Message(role="user", content="Hi"),))


def test_seeds_are_stable_and_all_different() -> None:
    assert seed_for(0, 0, "p1", 0) == 225073559  # as every earlier run recorded it
    seeds = {seed_for(*key) for key in product((0, 1), range(4), ("p1", "p11", "1"), range(12))}
    assert len(seeds) == 2 * 4 * 3 * 12
    assert all(0 <= s < 2**31 for s in seeds)


def test_rendered_up_to_the_answer_without_extra_special_tokens() -> None:
    assert Renderer(Letters()).text(PROMPT.messages) == "user:Hi;assistant:"
    assert render_prompt(Renderer(Letters()), PROMPT) == tuple(map(ord, "user:Hi;assistant:"))


def test_system_prompt_comes_first_unless_the_prompt_has_one() -> None:
    own = Prompt(id="p2", messages=(Message(role="system", content="Mine"), *PROMPT.messages))
    ours, theirs = with_system([PROMPT, own], "Be kind.")
    assert Renderer(Letters()).text(ours.messages) == "system:Be kind.;user:Hi;assistant:"
    assert Renderer(Letters()).text(theirs.messages) == "system:Mine;user:Hi;assistant:"


def test_a_template_that_refuses_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"prompt p1: .* roles system, user \(System role not supported\)"):
        render_prompt(Renderer(Letters()), with_system([PROMPT], "forbidden")[0])


@pytest.mark.parametrize(("prompt_tokens", "fits"), [(6, True), (7, False)])
def test_a_prompt_that_leaves_no_room_is_refused(prompt_tokens: int, fits: bool) -> None:
    request = SampleRequest(id="a", prompt_token_ids=(1,) * prompt_tokens, seed=0, max_tokens=4, temperature=1, top_p=1)
    if fits:
        check_length(request, 10)
    else:
        with pytest.raises(UserError, match=r"need 11, sampling\.max_model_len is 10"):
            check_length(request, 10)
