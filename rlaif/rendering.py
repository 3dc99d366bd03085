"""Messages to token ids by a model's chat template: one way for the policy, for a judge that reads by a template, and
for the token that ends a turn. A tokenizer comes in, nothing is loaded here.

What somebody wrote is data. Text in a message that spells a control token (`<|im_end|>` in a question about chat
templates) is encoded as the text that it is; only what the template itself writes becomes control tokens. A message
without such text is encoded together with the template, as the model's makers do it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from rlaif.errors import UserError
from rlaif.records import Message


class ChatTokenizer(Protocol):
    """The part of a tokenizer that rendering needs; one of transformers' also has `added_tokens_decoder`,
    `backend_tokenizer`, `chat_template` and `eos_token_id`."""

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **template_args: Any
    ) -> Any:
        """As in transformers."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """As in transformers."""


class TurnEnd(NamedTuple):
    """How an assistant's turn ends."""

    written: int | None
    """The token that the chat template closes it with, or else the tokenizer's end token: what an answer that ended
    by itself is scored with when it wasn't sampled as tokens. None: the model has no such token."""
    stops: tuple[int, ...]
    """Every token that ends it: the model's own list, the tokenizer's end token and the template's."""


class Renderer:
    """A model's chat template with its arguments.

    Args:
        tokenizer: with a chat template.
        template_args: given to the template (`enable_thinking: false`).
        owner: who the template belongs to, as errors say it.

    Raises:
        UserError: the template doesn't know one of the arguments; it would be without effect, and nothing would say so.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        template_args: Mapping[str, Any] | None = None,
        owner: str = "the policy's chat template",
    ) -> None:
        self._tokenizer = tokenizer
        self._args = dict(template_args or {})
        self._owner = owner
        self._check_args()
        self._as_parts: dict[tuple[str, ...], bool] = {}
        self._relabelled: dict[str, _Relabelled] = {}

    def text(self, messages: Sequence[Message]) -> str:
        """What the model continues: the messages, up to where the answer begins.

        Raises:
            UserError: the template refuses these messages, or what it renders lacks one of them.
        """
        return self._text(messages, answer_next=True)

    def _text(self, messages: Sequence[Message], answer_next: bool) -> str:
        rendered = self._apply(messages, self._wants_parts(tuple(m.role for m in messages)), answer_next)
        for m in messages:
            # An earlier answer's thoughts are rightly left out by many templates.
            if m.role != "assistant" and (word := _first_missing(m.content, rendered)) is not None:
                raise UserError(
                    f"{self._owner} renders the {m.role}'s message without its words (`{word[:40]}` is missing); take "
                    "a model whose template writes messages as they are, or mend the template"
                )
        return rendered

    def begun(self, messages: Sequence[Message]) -> str:
        """What the template writes after the last message, for the answer to go on with.

        Raises:
            UserError: as `text`.
        """
        text = self.text(messages)
        try:
            asked = self._apply(messages, self._wants_parts(tuple(m.role for m in messages)), answer_next=False)
        except UserError:
            asked = text
        if text != asked and text.startswith(asked):
            return text[len(asked) :]
        # It writes the same either way, or closes another turn when no answer follows.
        probed = self.text([*messages[:-1], messages[-1].model_copy(update={"content": _PROBE})])
        _, found, after = probed.rpartition(_PROBE)
        return after if found else ""

    def ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """`text` as token ids. The template writes the special tokens itself, so none are added.

        Raises:
            UserError: as `text`; or a message spells a control token, and the tokenizer can't take it for text.
        """
        return self._ids(messages, answer_next=True)

    def answered_ids(self, messages: Sequence[Message], answer: str, end: int | None) -> tuple[int, ...]:
        """The token ids of an answer that wasn't sampled, as they follow those of `ids`: the template writes it, as TRL
        has it do. What it writes after `end`, the token that ends a turn, no policy samples, and is left out; where it
        writes none, `end` is added.

        Raises:
            UserError: as `ids`.
        """
        asked = self.ids(messages)
        try:
            whole = self._ids([*messages, Message(role="assistant", content=answer)], answer_next=False)
        except UserError:
            whole = ()
        # A template that writes more before an answer that it waits for: the answer comes after that, as if sampled.
        tail = whole[len(asked) :] if whole[: len(asked)] == asked else self.plain_ids(answer)
        if end in tail:
            tail = tail[: len(tail) - tail[::-1].index(end) - 1]
        return tail if end is None else (*tail, end)

    def _ids(self, messages: Sequence[Message], answer_next: bool) -> tuple[int, ...]:
        quoted = self._quoted(messages)
        if not quoted:
            return tuple(self._tokenizer.encode(self._text(messages, answer_next), add_special_tokens=False))
        mark = _unused("zq", (m.content for m in messages))
        fenced = {token: f"{mark}x{number}y" for number, token in enumerate(quoted)}
        shown = [m.model_copy(update={"content": self._sub(m, fenced.__getitem__)}) for m in messages]
        text = self._text(shown, answer_next)
        relabelled = self._relabel(messages, quoted[0])
        # Control tokens that are left are the template's own.
        text = self._controls_in.sub(lambda found: relabelled.names[found[0]], text)
        for token, fence in fenced.items():
            text = text.replace(fence, token)
        return relabelled.encode(text)

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """An answer alone as token ids, none of them a special token.

        Raises:
            UserError: as `ids`.
        """
        answer = [Message(role="assistant", content=text)]
        if not (quoted := self._quoted(answer)):
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))
        relabelled = self._relabel(answer, quoted[0])
        kept = self._controls_in.sub(lambda t: t[0] if t[0] in self._special else relabelled.names[t[0]], text)
        return relabelled.encode(kept)

    def turn_end(self, declared: Sequence[int]) -> TurnEnd:
        """How a turn ends, by what the template writes after an assistant's message.

        Args:
            declared: the model's own list (`eos_token_id` of its generation config).
        """
        eos = getattr(self._tokenizer, "eos_token_id", None)
        named = [i for i in declared if i in self._added.values()]
        fallback = eos if eos is not None and (eos in declared or not named) else next(iter(named or declared), None)
        closes = self._closing_token({*declared, *([] if eos is None else [eos])})
        written = fallback if closes is None else closes
        stops = {*declared, *(i for i in (eos, closes) if i is not None)}
        return TurnEnd(written, tuple(sorted(stops)))

    def check_roles(self, roles: tuple[str, ...]) -> None:
        """Whether the template writes messages of these roles.

        Raises:
            UserError: it refuses them (what it raised is the error's cause), or leaves one out.
        """
        self._wants_parts(roles)

    # ---- the template

    def _check_args(self) -> None:
        template = getattr(self._tokenizer, "chat_template", None)
        if not isinstance(template, str):
            return
        for name in self._args:
            if name not in ("tools", "documents", "chat_template") and not re.search(
                rf"\b{re.escape(name)}\b", template
            ):
                raise UserError(
                    f"chat_template_args.{name}: {self._owner} doesn't read it, so it would be without effect; the "
                    "model's card says which arguments there are"
                )

    def _wants_parts(self, roles: tuple[str, ...]) -> bool:
        """Whether the template reads content as a list of parts, by what becomes of probes in messages of these roles.

        Raises:
            UserError: it refuses the roles, or leaves a message out both ways.
        """
        if roles not in self._as_parts:
            probes = [
                Message.model_validate({"role": role, "content": f"{_PROBE}{i}z"}) for i, role in enumerate(roles)
            ]
            left_out, refused = None, None
            for as_parts in (False, True):
                try:
                    rendered = self._apply(probes, as_parts)
                except UserError as e:
                    refused = refused or e
                    continue
                printed = "'type'" in rendered  # the list itself, by a template that takes it for text
                lacking = [p.role for p in probes if printed or p.content not in rendered.casefold()]
                if not lacking:
                    self._as_parts[roles] = as_parts
                    break
                left_out = left_out or lacking[0]
            else:
                if left_out is None and refused is not None:
                    raise refused
                raise UserError(
                    f"{self._owner} leaves the {left_out}'s message out of what it renders, given as text and as "
                    f"content parts (roles {', '.join(roles)}); take a model whose template writes it, or mend the "
                    "template"
                )
        return self._as_parts[roles]

    def _apply(self, messages: Sequence[Message], as_parts: bool, answer_next: bool = True) -> str:
        conversation: list[dict[str, Any]] = [
            {"role": m.role, "content": [{"type": "text", "text": m.content}] if as_parts else m.content}
            for m in messages
        ]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=answer_next, **self._args
                )
            )
        except Exception as e:  # templates raise what they like
            roles = ", ".join(m.role for m in messages)
            raise UserError(f"{self._owner} refuses the roles {roles} ({' '.join(str(e).split())})") from e

    def _closing_token(self, known: set[int]) -> int | None:
        """The control token that follows an assistant's message, but for white space; None where text follows.

        The last message's, where the template closes that; else an earlier one's, if it is a `known` end: what stands
        between two turns may as well begin the next.
        """
        turn = [Message(role="user", content="ask"), Message(role="assistant", content=f"{_PROBE}0z")]
        for messages, known_only in ((turn, False), ([*turn, turn[0]], True)):
            after = self._after(messages, turn[-1].content)
            ends = {t: i for t, i in self._added.items() if i in known or (t in self._special and not known_only)}
            following = [t for t in ends if t.strip() and after.startswith(t.strip())]
            if after or known_only:
                return ends[max(following, key=len)] if following else None
        return None

    def _after(self, messages: Sequence[Message], content: str) -> str:
        """What a template writes after a message; "" where it refuses or drops it, too."""
        for as_parts in (False, True):
            try:
                rendered = self._apply(messages, as_parts, answer_next=False)
            except UserError:
                continue
            _, found, after = rendered.rpartition(content)
            if found:
                return after.lstrip()
        return ""

    # ---- control tokens

    @cached_property
    def _added(self) -> dict[str, int]:
        decoder = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {token.content: i for i, token in decoder.items() if token.content}

    @cached_property
    def _special(self) -> set[str]:
        decoder = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {token.content for token in decoder.values() if token.special}

    @cached_property
    def _controls(self) -> dict[str, int]:
        """Texts that would be read as control tokens: special ones, and others that the template writes."""
        template = str(getattr(self._tokenizer, "chat_template", None) or "")
        found = {
            text: i
            for text, i in self._added.items()
            if not text.isspace() and (text in self._special or (len(text) > 2 and text in template))
        }
        # Some tokenizers have an ordinary word or sign for padding; it is no less a word for that.
        words = [text for text in found if len(text) == 1 or text.isalnum()]
        if words:
            ordinary = self._without(words)
            found = {t: i for t, i in found.items() if t not in words or ordinary(t) != [i]}
        return found

    @cached_property
    def _controls_in(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self._controls, key=len, reverse=True))) or "(?!)")

    def _quoted(self, messages: Sequence[Message]) -> list[str]:
        """Control tokens that messages spell, in a fixed order."""
        found: dict[str, None] = {}
        for m in messages:
            self._sub(m, lambda token: found.setdefault(token) or token)
        return list(found)

    def _sub(self, message: Message, replace: Callable[[str], str]) -> str:
        """Its content with the control tokens that it spells replaced. Marks of thoughts in an earlier answer are
        left to the template, which looks for them."""
        if not self._controls:
            return message.content

        def one(found: re.Match[str]) -> str:
            mine = message.role == "assistant" and found[0] not in self._special
            return found[0] if mine else replace(found[0])

        return self._controls_in.sub(one, message.content)

    def _backend(self) -> dict[str, Any] | None:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else dict(json.loads(backend.to_str()))

    def _without(self, words: Sequence[str]) -> Callable[[str], list[int]]:
        """The tokenizer as it would encode were these no added tokens."""
        tree = self._backend()
        if tree is None:
            return lambda text: []
        from tokenizers import Tokenizer

        tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] not in words]
        bare = Tokenizer.from_str(json.dumps(tree))
        return lambda text: list(bare.encode(text, add_special_tokens=False).ids)

    def _relabel(self, messages: Sequence[Message], quoted: str) -> _Relabelled:
        mark = _unused("\ue0f1", (m.content for m in messages))
        if mark not in self._relabelled:
            tree = self._backend()
            if tree is None:
                raise UserError(
                    f"a text holds `{quoted}`, a control token of this model, and its tokenizer "
                    f"({type(self._tokenizer).__name__}) can't read it as text; take the text out, or a model with a "
                    "tokenizer.json"
                )
            self._relabelled[mark] = _Relabelled.of(tree, self._controls, mark)
        return self._relabelled[mark]


class _Relabelled(NamedTuple):
    """A copy of a tokenizer in which control tokens have names that no text holds: what spells them is plain text
    to it, and around them it cuts text as the original does."""

    names: dict[str, str]
    """Of each control token in the copy, by the original's."""
    encode: Callable[[str], tuple[int, ...]]

    @classmethod
    def of(cls, tree: dict[str, Any], controls: Mapping[str, int], mark: str) -> _Relabelled:
        """`tree` is the original's tokenizer.json; `mark` occurs in no text."""
        from tokenizers import Tokenizer

        names = {token: f"{mark}{number}{mark}" for number, token in enumerate(controls)}
        tree = {**tree, "post_processor": None, "truncation": None, "padding": None}
        tree["added_tokens"] = [{**t, "content": names.get(t["content"], t["content"])} for t in tree["added_tokens"]]
        model = dict(tree["model"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:  # Unigram: pieces with scores, by id
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:  # a merge that made a control token out of text
            model["merges"] = [m for m in model["merges"] if _merged(m) not in names]
        tree["model"] = model
        copy = Tokenizer.from_str(json.dumps(tree))
        original = {copy.token_to_id(names[token]): i for token, i in controls.items()}

        def encode(text: str) -> tuple[int, ...]:
            return tuple(original.get(i, i) for i in copy.encode(text, add_special_tokens=False).ids)

        return cls(names, encode)


_PROBE = "qzprobe"
_WORDS = re.compile(r"\w+")


def _merged(merge: Any) -> str:
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def _first_missing(content: str, rendered: str) -> str | None:
    """The first word of a message that isn't in what was rendered, all of them in order; None when none is missing."""
    content, rendered = content.casefold(), rendered.casefold()
    at = 0
    for word in _WORDS.findall(content) or content.split():
        at = rendered.find(word, at)
        if at < 0:
            return str(word)
        at += len(word)
    return None


def _unused(mark: str, texts: Iterable[str]) -> str:
    """`mark`, lengthened until no text holds it."""
    whole, longer = "\0".join(texts), mark
    while longer in whole:
        longer += mark
    return longer
