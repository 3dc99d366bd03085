"""Prompt sets: where prompts come from, and which of them an iteration takes.

In: a JSONL, JSON, CSV or Parquet file, or `datasets:NAME[:SPLIT]`. A row has `prompt` (text, or a chat as TRL writes
it), `messages` (chat), `conversations` (a chat as ShareGPT writes it) or two answers, `chosen` and `rejected`, with the
prompt in both; it may have `id` and `category`; other columns are ignored, and a job may say what they are called.
Answers at the end of a chat are left out: the policy gives its own. Out: `Prompt`s.

A file is somebody's own: a row with both columns or a repeated prompt is a mistake there. Data sets made for other
trainings have both as a matter of course: `prompt` counts, and repeats are skipped.

The order is a function of the seed and of how many were taken before, which plans say: a resumed run continues it.
"""

from __future__ import annotations

import ast
import itertools
import json
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from rlaif.config import Columns, Prompts
from rlaif.data.tables import Placed, read_rows, wrong_delimiter
from rlaif.errors import UserError, first_line, first_problem
from rlaif.records import Message, Prompt, digest

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
DATASETS_PREFIX = "datasets:"


def load_prompts(
    source: str,
    base_dir: Path,
    note: Callable[[str], None] | None = None,
    columns: Columns | None = None,
    columns_required: bool = True,
    places: dict[str, str] | None = None,
) -> list[Prompt]:
    """Reads a prompt set.

    Args:
        source: a file (relative to `base_dir`, or absolute), `datasets:NAME[:SPLIT]` or `datasets:NAME:CONFIG:SPLIT`;
            the split is `train` if absent, and NAME may be a folder.
        base_dir: folder that relative files are looked up in.
        note: told how many repeated prompts of a data set were skipped, and how many prompts are transcripts.
        columns: what the columns are called, where they have other names.
        columns_required: without it, rows that have none of these are read by the usual names (the held-out set may be
            another file).
        places: gets where each prompt was found (`file:line`), by its id.

    Returns:
        The prompts in the source's order. A prompt without `id` gets one from the hash of its messages.

    Raises:
        UserError: the source is missing, empty, of an unknown format or not readable, a package for it is not
            installed, a row is malformed, or an id occurs twice. The message names file and line.
    """
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    foreign, skipped = source.startswith(DATASETS_PREFIX), 0
    conversations: dict[str, tuple[Message, ...]] = {}
    named = _Named(columns or Columns(), columns_required)
    transcripts: list[_Cut] = []
    for where, given in rows_of(source, base_dir):
        row = named.usual(given, where)
        prompt = _prompt(row, where, foreign, transcripts)
        if foreign and conversations.setdefault(prompt.id, prompt.messages) == prompt.messages and prompt.id in seen:
            skipped += 1
            continue
        if prompt.id in seen:
            hint = "give each row an id of its own" if _has_id(row) else "the prompt is repeated, remove one of the two"
            raise UserError(f"{where}: id `{prompt.id}` was already used at {seen[prompt.id]}; {hint}")
        seen[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source}: no prompts in it; a row looks like {_EXAMPLE}")
    named.check(source)
    if places is not None:
        places |= seen
    if skipped and note:
        note(f"{source}: {skipped} repeated prompts skipped, {len(prompts)} are left")
    if transcripts and note:
        note(_said_of(transcripts, source))
    return prompts


def with_system(prompts: Iterable[Prompt], system_prompt: str | None) -> list[Prompt]:
    """Puts a system message before every prompt that has none of its own. Ids stay."""
    if system_prompt is None:
        return list(prompts)
    system = Message(role="system", content=system_prompt)
    return [
        p if any(m.role == "system" for m in p.messages) else p.model_copy(update={"messages": (system, *p.messages)})
        for p in prompts
    ]


def exclude_held_out(
    train: Iterable[Prompt], held_out: Iterable[Prompt], note: Callable[[str], None] | None = None
) -> list[Prompt]:
    """The training prompts without those that the held-out set has too; `note` is told how many those are.

    Conversations are compared without system messages, letter case and white space, so that a stray space or a
    system prompt doesn't let a held-out question into training. An id says nothing across two files that both count
    from 1: a training prompt whose id is another held-out one's is known by its digest instead.
    """
    held, given = list(held_out), list(train)
    ids, texts = {p.id for p in held}, {_conversation(p) for p in held}
    left = [p for p in given if _conversation(p) not in texts]
    renamed = sum(p.id in ids for p in left)
    if note and len(left) < len(given):
        note(f"{len(given) - len(left)} training prompts are held out, too, and left out; {len(left)} are left")
    if note and renamed:
        note(f"{renamed} training prompts have the id of another held-out one, and are known by their digest instead")
    return [p.model_copy(update={"id": held_out_id(p)}) if p.id in ids else p for p in left]


def held_out_id(prompt: Prompt) -> str:
    """How a training prompt is known whose own id is another held-out one's: by its digest."""
    return digest(prompt.model_dump(mode="json"))


def check_enough(train: list[Prompt], settings: Prompts) -> None:
    """Whether the training set holds an iteration.

    Raises:
        UserError: it holds fewer prompts than one takes.
    """
    _refuse_empty(train)
    if settings.per_iteration > len(train):
        raise UserError(
            f"prompts.per_iteration={settings.per_iteration}: {settings.train} has {len(train)} prompts to train on "
            f"(without the held-out ones); set prompts.per_iteration={len(train)} or less, or add prompts"
        )


def shipped_held_out(settings: Prompts) -> str | None:
    """What to say of a job that trains on its own prompts and is evaluated on ours; None of any other."""
    fields = Prompts.model_fields
    if settings.train == fields["train"].default or settings.held_out != fields["held_out"].default:
        return None
    return (
        f"prompts.held_out: evaluated on the shipped questions ({settings.held_out}); name a set like {settings.train} "
        "(of one data set: `datasets:NAME:train[:90%]` and `train[90%:]`)"
    )


class Named(Protocol):
    """A prompt, or another row that has an id."""

    @property
    def id(self) -> str: ...


N = TypeVar("N", bound=Named)


def prompts_for(prompts: Sequence[N], seed: int, before: Sequence[int], wanted: int) -> list[N]:
    """The prompts (or other rows with an id) of one iteration, a pure function of its arguments.

    Iterations follow each other through passes over all prompts, each shuffled anew. Where one crosses into the next
    pass, it skips there what it already has, and leaves that for later in the pass: no iteration asks a prompt twice,
    and every pass still has every prompt once, however many each iteration took.

    Args:
        prompts: the training set, in a fixed order.
        seed: the job's seed.
        before: how many each earlier iteration took.
        wanted: how many to take.

    Raises:
        UserError: there are no prompts.
        ValueError: fewer than an iteration takes (`check_enough`).
    """
    _refuse_empty(prompts)
    total = len(prompts)
    if wanted > total:
        raise ValueError(f"{wanted} prompts an iteration of {total}")
    # Which prompts a pass has to put later depends on the pass before it, so walk from the first; it is cheap.
    current, number, at = _shuffled(prompts, seed, 0), 0, 0
    taken: list[N] = []
    for size in (*before, wanted):
        size = min(size, total)  # a data set may have had more rows then
        taken, at = current[at : at + size], at + size
        if at > total:
            number, at = number + 1, at - total
            current = _following(taken, _shuffled(prompts, seed, number), at)
            taken += current[:at]
    return taken


def _following(had: Sequence[N], shuffled: list[N], wanted: int) -> list[N]:
    """The next pass, for an iteration that had these of the one before and takes so many more."""
    ids = {p.id for p in had}
    first = [p for p in shuffled if p.id not in ids][:wanted]
    chosen = {p.id for p in first}
    return first + [p for p in shuffled if p.id not in chosen]


_WANTED = {"prompt": "text that isn't blank", "messages": "a list of {role, content} that isn't empty"}
_EXAMPLE = '{"id": "bread", "prompt": "How do I keep bread fresh?"}'


def _shuffled(prompts: Sequence[N], seed: int, epoch: int) -> list[N]:
    shuffled = list(prompts)
    random.Random(f"prompts/{seed}/{epoch}").shuffle(shuffled)
    return shuffled


def _refuse_empty(prompts: Sequence[Named]) -> None:
    if not prompts:
        raise UserError(
            "no training prompts are left; check `prompts.train`, and that it isn't all in the held-out set"
        )


def _conversation(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    said = (m for m in prompt.messages if m.role != "system")
    return tuple((m.role, " ".join(m.content.casefold().split())) for m in said)


def _has_id(row: Any) -> bool:
    return isinstance(row, dict) and row.get("id") not in (None, "")


class _Named:
    """Rows by the names that a job gives their columns, brought to the usual ones."""

    def __init__(self, columns: Columns, required: bool) -> None:
        self._columns = columns.named
        self._required = required
        self._unseen = dict(self._columns)

    def usual(self, row: Any, where: str) -> Any:
        """The row under the usual names.

        Raises:
            UserError: it has no column of the prompt's name.
        """
        if not self._columns or not isinstance(row, dict):
            return row
        found = {name: _at(row, column) for name, column in self._columns.items()}
        lacking = found.get("prompt") is _ABSENT or all(value is _ABSENT for value in found.values())
        if lacking and not self._required:
            return row
        if found.get("prompt") is _ABSENT:
            hint = f"; {told}" if (told := wrong_delimiter(row)) else ""
            raise UserError(
                f"{where}: no column `{self._columns['prompt']}` (prompts.columns.prompt), found {_listed(row)}{hint}"
            )
        for name, value in found.items():
            if value is not _ABSENT:
                self._unseen.pop(name, None)
        # What is named by the job is what counts: a column of the usual name holds something else.
        instead = _CHATS if "prompt" in found else ()
        kept = {k: v for k, v in row.items() if k not in (*instead, *found)}
        renamed = {"system": _SYSTEM}
        return kept | {renamed.get(n, n): None if value is _ABSENT else value for n, value in found.items()}

    def check(self, source: str) -> None:
        """Whether every named column was there.

        Raises:
            UserError: one was in no row.
        """
        if self._required and self._unseen:
            name, column = next(iter(self._unseen.items()))
            raise UserError(f"{source}: no row has a column `{column}` (prompts.columns.{name}); correct its name")


_ABSENT: Any = object()
_CHATS = ("prompt", "messages", "conversations", "chosen", "rejected")
"""Columns that hold a prompt, in the order in which a data set's count."""


def _at(row: Mapping[str, Any], path: str) -> Any:
    """A column by its name, else by its path (`question.text`, `turns.0`)."""
    if path in row:
        return row[path]
    at: Any = row
    for part in path.split("."):
        if isinstance(at, dict) and part in at:
            at = at[part]
        elif isinstance(at, list) and part.isdecimal() and int(part) < len(at):
            at = at[int(part)]
        else:
            return _ABSENT
    return at


def _listed(row: Mapping[str, Any]) -> str:
    return f"`{'`, `'.join(map(str, row)) or 'nothing'}`"


_QUESTIONS = re.compile(
    r"prompts?|questions?|instructions?|quer(?:y|ies)|inputs?|requests?|problems?|tasks?|goals?|utterances?|texts?|turns"
    r"|user|message|dialog(?:ue)?s?|chats?|conversation|frage|pregunta|domanda|vraag|behaviou?r",
    re.I,
)
_ANSWERS = re.compile(
    r"answers?|responses?|outputs?|completions?|repl(?:y|ies)|targets?|solutions?|references?|chosen|rejected|assistant"
    r"|system|categor(?:y|ies)|labels?|rationale|explanation",
    re.I,
)
_FACTS = re.compile(
    r"ids?|idx|index|uuid|guid|key|hash|no|nr|number|class|topic|tags?|type|kind|genre|domain|group|score|rating|rank"
    r"|split|source|origin|url|link|lang|language|locale|date|time|timestamp|model|author|name|title|license|context"
    r"|metadata|meta",
    re.I,
)
"""Words in the names of columns: of those that hold a prompt, of those that hold something else wherever the word
stands (`system_prompt`), and where it stands last (`prompt_id`)."""


def _question_column(row: Mapping[str, Any]) -> str | None:
    """The column that most plausibly holds the prompt, as `prompts.columns` names it; None when none does."""
    found: list[tuple[tuple[int, ...], str]] = []
    owed = [(str(k), v) for k, v in row.items()]
    for path, value in owed:  # grows on its way
        if isinstance(value, dict) and not _is_message(value) and path.count(".") < 2:
            owed += [(f"{path}.{k}", v) for k, v in value.items()]
            continue
        if isinstance(value, list) and value and isinstance(value[0], str):
            path, value = f"{path}.0", value[0]
        words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", path))
        if any(map(_ANSWERS.fullmatch, words)) or any(map(_FACTS.fullmatch, words[-1:])):
            continue
        known = any(map(_QUESTIONS.fullmatch, words))
        if _chat_of(value) is not None:
            found.append(((known + 1, 1, 0, 0), path))
        elif isinstance(value, str) and (text := value.strip()):
            sentence = " " in text or not text.isascii()
            if known or sentence:
                found.append(((known + sentence, 0, text.endswith(("?", "\uff1f")), len(text)), path))
    return max(found, key=lambda at: at[0])[1] if found else None


def _columns_hint(row: Mapping[str, Any]) -> str:
    """What to do about a row without a prompt."""
    if told := wrong_delimiter(row):
        return told
    if any(len(str(name).split()) > 4 or str(name).endswith("?") for name in row):
        return "these are no names of columns: put a line with them (`prompt`) above the first row"
    column = _question_column(row) or "NAME"
    named = column if re.fullmatch(r"[^\W\d][\w.-]*(?: [\w.-]+)*", column) else json.dumps(column, ensure_ascii=False)
    return f"where it is called otherwise, set prompts.columns: {{prompt: {named}}}"


def _prompt(row: Any, where: str, foreign: bool, transcripts: list[_Cut]) -> Prompt:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}; a row looks like {_EXAMPLE}")
    # CSV and Parquet have every column in every row: an empty cell is an absent field.
    fields = {k: v for k, v in row.items() if v is not None and v != ""}
    here = [c for c in _CHATS[:3] if c in fields]
    if not here and (blank := [c for c in _CHATS[:2] if c in row]) and "chosen" not in fields:
        raise UserError(f"{where}: `{blank[0]}` must be {_WANTED[blank[0]]}, found {row[blank[0]]!r}")
    if not here and "chosen" not in fields:
        raise UserError(
            f"{where}: a row needs either `prompt` (text) or `messages` (chat), found {_listed(row)}; "
            f"{_columns_hint(row)}"
        )
    if len(here) > 1 and not foreign:
        found = "both" if set(here) == {"prompt", "messages"} else f"`{'` and `'.join(here)}`"
        raise UserError(f"{where}: a row needs either `prompt` (text) or `messages` (chat), found {found}")
    chat = _chat(fields[here[0]], here[0], where, transcripts) if here else _before_the_answers(fields, where)
    column = here[0] if here else "chosen"
    messages = _question(_with_system_cell(chat, row, column, where), column, where)
    category = fields.get("category")
    for said in (str(fields.get("id", "")), str(category), *(m.content for m in messages)):
        try:
            said.encode()
        except UnicodeEncodeError as e:
            half = ascii(said[e.start])
            raise UserError(f"{where}: holds {half}, half of a character; no file can store it, correct it") from e
    return Prompt(
        id=str(fields["id"]) if "id" in fields else digest([m.model_dump() for m in messages]),
        messages=messages,
        category=None if category is None else str(category),
    )


def _chat(value: Any, column: str, where: str, transcripts: list[_Cut]) -> list[Message]:
    """The messages of a cell: a chat, or (in `prompt`) what a user says."""
    if isinstance(value, str) and column == "prompt":
        if not value.strip():
            raise UserError(f"{where}: `prompt` must be {_WANTED['prompt']}, found {value!r}")
        if (found := chat_in(value, column, where)) is not None:
            return _messages(found, column, where)
        if not (turns := _transcript(value)):
            _refuse_transcript(value, column, where)
            return [Message(role="user", content=value)]
        transcripts.append((where, turns[-1].content if turns[-1].role == "assistant" else None))
        return turns
    if column == "prompt" and not isinstance(value, str | list) and _chat_of(value) is None:
        raise UserError(f"{where}: `prompt` must be {_WANTED['prompt']}, found {value!r}")
    return _messages(value, column, where)


def _before_the_answers(fields: dict[str, Any], where: str) -> list[Message]:
    """The prompt that two answers have in common.

    Raises:
        UserError: they are answers alone, or answers to different prompts.
    """
    sides = []
    for name in ("chosen", "rejected"):
        if name not in fields:
            continue
        value = fields[name]
        found = chat_in(value, name, where) if isinstance(value, str) else value
        if found is None:
            if not (side := _transcript(value)):
                raise UserError(
                    f"{where}: `{name}` is an answer without its prompt; say which column has that "
                    "(prompts.columns: {prompt: NAME}), or give whole chats as `chosen` and `rejected`"
                )
        else:
            side = _messages(found, name, where)
        sides.append(side)
    shared = [a for a, b in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(sides[0], sides[-1], strict=False))]
    if not any(m.role == "user" for m in shared):
        raise UserError(f"{where}: `chosen` and `rejected` don't begin with the same prompt; give it as `prompt`")
    return shared


def _with_system_cell(chat: list[Message], row: dict[str, Any], column: str, where: str) -> list[Message]:
    """The chat after the row's own system prompt: a column that a job names, or that ShareGPT's rows have."""
    system = row.get(_SYSTEM) or (row.get("system") if column == "conversations" else None)
    if system is None or system == "":
        return chat
    if not isinstance(system, str):
        raise UserError(f"{where}: the system prompt must be text, found {system!r}")
    mine = [m for m in chat if m.role == "system"]
    if mine and mine[0].content.strip() != system.strip():
        raise UserError(f"{where}: two system prompts, one in the chat and one in a column of its own; remove one")
    return chat if mine else [Message(role="system", content=system), *chat]


_SYSTEM = "\0system"
"""Where a system prompt is put whose column a job names: a `system` that it doesn't name is ignored, as any other."""

_Cut = tuple[str, str | None]
"""Where a prompt that is a transcript was found, and the answer at its end."""

_SAID = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
_OTHER_TRANSCRIPT = re.compile(
    r"\s*(?:#+ *)?(?:Human|User)\s*:.*\s(?:#+ *)?(?:Assistant|AI|Bot|GPT|ChatGPT|Model)\s*:\s*", re.I | re.S
)
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""ShareGPT's names for who speaks, and others' of the kind."""
_SPEAKERS = ("system", "user", "assistant", "developer", "tool", "function", *_ROLES)


def _transcript(text: str) -> list[Message]:
    """The turns of a chat in one string, as Anthropic's HH-RLHF writes them; none when it is none."""
    text = text.replace("\r\n", "\n")
    begins = text.startswith("\n\nHuman:")
    text = text.strip("\n ")
    if not text.startswith("Human:") or not (begins or "\n\nAssistant:" in text):
        return []
    _, *parts = _SAID.split(text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    said = [Message(role="user" if who == "Human" else "assistant", content=what.strip()) for who, what in turns]
    return said[:-1] if len(said) > 1 and not said[-1].content else said


def _refuse_transcript(text: str, column: str, where: str) -> None:
    """Whether text can be asked as it stands, as far as transcripts go.

    Raises:
        UserError: it is one in another form, which ends where an answer is wanted.
    """
    if _OTHER_TRANSCRIPT.fullmatch(text):
        raise UserError(
            f"{where}: `{column}` is a transcript that waits for an answer, and would be asked as one message; give "
            "the chat as `messages`, or with a blank line before each `Human:` and `Assistant:`, as HH-RLHF has it"
        )


def _said_of(transcripts: list[_Cut], source: str) -> str:
    """What becomes of prompts that are transcripts, in one line."""
    many = f"{len(transcripts)} prompts are transcripts" if len(transcripts) > 1 else "1 prompt is a transcript"
    said = f"{source}: {many} (`Human: ... Assistant: ...`), read as chats"
    if cut := [(where, answer) for where, answer in transcripts if answer is not None]:
        where, answer = cut[0]
        end = " ".join(answer.split())
        end = end if len(end) <= 60 else f"...{end[-57:]}"
        said += (
            f"; what {len(cut)} of them {'has' if len(cut) == 1 else 'have'} after the last `Assistant:` is left out "
            f"as an answer, first at {where} (`{end}`)"
        )
    return said


_CHAT_BEGINS = re.compile(r"""\s*(?:["']?\s*[\[{]|\(\s*\{|-\s|(?:np\.|numpy\.)?array\(|\w*message\w*\()""", re.I)
_ROLE = re.compile(
    r"""(?:^|[{(,\[\s])\\*(?P<quote>["']?)(?:role|from)\\*(?P=quote)\s*[:=]\s*\\*["']?(?P<who>\w*)""", re.I
)
_CONTENT = re.compile(r"""\b(?:content|value|parts|text)\\*["']?\s*[:=]""", re.I)


def chat_in(text: str, column: str, where: str) -> Any:
    """The messages that a text cell holds, as JSON, or as Python or numpy print them; None for text.

    Raises:
        UserError: it holds a chat in a form that can't be read. Nobody wants that asked as it stands.
    """
    if not _CHAT_BEGINS.match(text) or not (roles := list(_ROLE.finditer(text))):
        return None
    tree, why = _tree(text)
    if (found := _chat_of(tree)) is not None:
        return found
    speaks = [r for r in roles if r["who"].casefold() in _SPEAKERS]
    if not speaks or not (_CONTENT.search(text) or (why and any(r["quote"] for r in speaks))):
        return None
    if why:
        raise UserError(f"{where}: `{column}` is text but not JSON ({why}); {_GIVE_CHAT}")
    raise UserError(f"{where}: `{column}` holds a chat in a form that isn't read; {_GIVE_CHAT}")


_GIVE_CHAT = (
    'give a chat as [{"role": "user", "content": "..."}], and text that only looks like one as the content of such a '
    "message"
)


def _tree(cell: str) -> tuple[Any, str | None]:
    """What a cell holds as JSON, or as Python or numpy print it (pandas writes a CSV so); else why it isn't JSON."""
    try:
        tree = json.loads(cell)
    except (ValueError, RecursionError) as e:
        for form in (cell.strip(), _without_numpy(cell)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SyntaxWarning)  # of escapes in what is somebody's text
                    return ast.literal_eval(form), None
            except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                continue
        return None, getattr(e, "msg", "nested too deeply")
    return _tree(tree) if isinstance(tree, str) and _CHAT_BEGINS.match(tree) else (tree, None)


_NUMPY = re.compile(
    r"""(?P<text>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|(?P<call>(?:np\.|numpy\.)?array\()"""
    r"""|(?P<kind>,\s*dtype=[^)]*\))|(?P<messages>\}\s*\{)|(?P<parts>\]\s*\[)""",
    re.S,
)


def _without_numpy(cell: str) -> str:
    """What numpy prints (`[{'role': ...} {'role': ...}]`, `array([...], dtype=object)`) as Python does."""
    instead = {"call": "(", "kind": ")", "messages": "}, {", "parts": "], ["}
    return _NUMPY.sub(lambda m: instead.get(str(m.lastgroup), m[0]), cell.strip())


def _chat_of(tree: Any) -> list[Any] | None:
    """The messages of a list, of a single message, or of an object that has them; None of anything else."""
    if isinstance(tree, dict):
        if _is_message(tree):
            return [tree]
        names = ("messages", "conversations", "conversation", "prompt")
        chats = [chat for name in names if isinstance(chat := tree.get(name), list)]
        if len(chats) != 1 or (chat := _chat_of(chats[0])) is None:
            return None
        system = tree.get("system")
        return [{"role": "system", "content": system}, *chat] if isinstance(system, str) and system.strip() else chat
    if isinstance(tree, list | tuple) and tree and all(map(_is_message, tree)):
        return list(tree)
    return None


def _is_message(tree: Any) -> bool:
    """Whether it is a chat's message, whoever speaks."""
    if not isinstance(tree, dict):
        return False
    share_gpt = "value" in tree and str(tree.get("from")).casefold() in _SPEAKERS
    return share_gpt or (isinstance(tree.get("role"), str) and "content" in tree)


def _messages(chat: Any, column: str, where: str) -> list[Message]:
    if isinstance(chat, str):  # a CSV cell
        chat, why = _tree(chat)
        if why:
            raise UserError(f"{where}: `{column}` is text but not JSON ({why}); {_GIVE_CHAT}")
    chat = _chat_of(chat) or chat
    if not isinstance(chat, list) or not chat:
        raise UserError(f"{where}: `{column}` must be a list of {{role, content}} that isn't empty")
    try:
        return [Message.model_validate(_message(m, column, where)) for m in chat]
    except ValidationError as e:
        raise UserError(f"{where}: `{column}`: {first_problem(e)} (a message is {{role, content}})") from e


def _message(given: Any, column: str, where: str) -> Any:
    """One message of a chat with the keys and values that `Message` has, as far as it can be told."""
    if not isinstance(given, dict):
        return given
    out = {k: v for k, v in given.items() if v is not None}  # Arrow fills every field of a message that any row has
    share_gpt = "from" in out and "role" not in out
    if share_gpt:
        out = {"role": out["from"], "content": out.get("value")}
        if out["content"] is None:
            raise UserError(f"{where}: `{column}`: a message from `{out['role']}` without `value`")
    if isinstance(role := out.get("role"), str) and (share_gpt or column == "conversations"):
        out["role"] = _ROLES.get(role.casefold(), role)
    if isinstance(parts := out.get("content"), list):
        out["content"] = "".join(_part(p, column, where) for p in parts)
    return out


def _part(part: Any, column: str, where: str) -> str:
    """The text of one part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    raise UserError(f"{where}: `{column}`: a message holds a part of type `{kind}`; rlaif reads text parts alone")


def _question(messages: list[Message], column: str, where: str) -> tuple[Message, ...]:
    """The chat up to the user's last turn."""
    messages = list(messages)
    while len(messages) > 1 and messages[-1].role == "assistant":
        messages.pop()
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise UserError(f"{where}: the last of `{column}` must be the user's and not blank, found {messages[-1]!r}")
    return tuple(messages)


def rows_of(source: str, base_dir: Path, what: str = "prompt file", example: str = _EXAMPLE) -> Iterable[Placed]:
    """The rows of a file or a data set, as they stand; `what` it is and what a row looks like are for errors.

    Raises:
        UserError: it can't be read.
    """
    if source.startswith(DATASETS_PREFIX):
        return _dataset_rows(source)
    path = base_dir / source
    if not path.exists():
        raise UserError(f"{path}: no such {what}; give a {', '.join(FORMATS)} file or `{DATASETS_PREFIX}NAME[:SPLIT]`")
    kind = "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()
    if kind not in FORMATS:
        raise UserError(f"{path}: unknown format `{kind}`; {what}s are read from {', '.join(FORMATS)}")
    return read_rows(path, f"; a row looks like {example}")


def _dataset_rows(source: str) -> Iterator[Placed]:
    name, *rest = re.split(r":(?![^\[]*\])", source.removeprefix(DATASETS_PREFIX))  # not in `train[:80%]`
    if not name or len(rest) > 2:
        raise UserError(
            f"{source}: expected `{DATASETS_PREFIX}NAME`, `{DATASETS_PREFIX}NAME:SPLIT` or "
            f"`{DATASETS_PREFIX}NAME:CONFIG:SPLIT`"
        )
    split = (rest[-1] if rest else "") or "train"
    names = [name, *filter(None, rest[:-1])]
    import datasets

    try:
        if any((Path(name) / f).is_file() for f in ("dataset_dict.json", "state.json")):  # of `save_to_disk`
            saved = datasets.load_from_disk(name)
            rows = _slice(saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}, split, source)
        else:
            rows = datasets.load_dataset(*names, split=split)
    except UserError:
        raise
    # load_dataset raises a dozen kinds for a wrong name, a wrong split and a missing network alike.
    except Exception as e:
        raise UserError(
            f"{source}: datasets can't load it ({first_line(e)}); "
            "check name, configuration, split and network, or give a file"
        ) from e
    yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows))


def _slice(splits: Mapping[str, Any], split: str, source: str) -> Any:
    """The rows that `train[:90%]` or `train+test` names, of data that is loaded."""
    import datasets

    asked = re.findall(r"(?:^|\+)\s*([^\[\]+\s]+)", split)
    if unknown := [s for s in asked if s not in splits]:
        if len(splits) == 1 and unknown == ["train"]:  # the default, of a set that has another name
            return _slice({"train": next(iter(splits.values()))}, split, source)
        raise UserError(f"{source}: no split `{unknown[0]}`; there is {', '.join(splits)}")
    lengths = {name: len(rows) for name, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    cut = [
        splits[p.splitname].select(range(p.from_ or 0, lengths[p.splitname] if p.to is None else p.to)) for p in parts
    ]
    return cut[0] if len(cut) == 1 else datasets.concatenate_datasets(cut)
