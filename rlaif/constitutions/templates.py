"""ChatSettings templates: the text of a question to a judge that reads, and what its reply looks like. Pure.

In: the sources of `prompts/judge/<name>.jinja` and of all that it includes; a constitution, a prompt and two
answers. Out: a `Template` whose identity is the hash of its sources, and the messages of one question.

The first line is a comment with YAML in it, `{# verdict: letter; max_tokens: 8 #}`. Two blocks, `system` and `user`,
become one message each. They see `constitution`, `principle` (the one that is asked about, or none: all of them),
`messages` (the prompt), `first` and `second` (the answers as shown), `first_cut_off` and `second_cut_off` (whether the
length limit ended them), and two codes to fence them with: `prompt_code`, a digest of the prompt, and `code`, a digest
of both answers. An answer can't know the other one, so
it can't write the line that ends its own quote. Answers are values: nothing in them is ever rendered.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Container, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.meta
import jinja2.sandbox
import yaml
from pydantic import Field, ValidationError

from rlaif.config import ChatSettings
from rlaif.constitutions.constitution import Constitution, Principle
from rlaif.errors import UserError, cant_read
from rlaif.records import Message, Record, digest

VerdictKind = Literal["letter", "last_line", "json"]

NAMES = (
    *("constitution", "principle", "messages", "first", "second", "first_cut_off", "second_cut_off"),
    *("code", "prompt_code"),
)
"""What a template may use."""

_FRONT_MATTER = re.compile(r"\s*\{#-?(?P<body>.*?)-?#\}", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# Markers that chat servers read as the end of a message, wherever they stand: <|im_end|>, </s>, [/INST], …
_CONTROL = re.compile(
    r"<(?=\|[^\s|<>]{1,64}\|?>|[^\s|<>]{1,64}\|>|/?(?:s|unk|bos|eos|start_of_turn|end_of_turn|think|extra_id_\d+)>"
    r"|</?SYS>>|｜[^\s<>]{1,64}｜>)|\[(?=/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS)\])",
    re.I,
)


class Source(Record):
    """One file of a template."""

    name: str
    """File name inside the templates' folder."""
    text: str


class FrontMatter(Record):
    """The first line of a template."""

    verdict: VerdictKind
    """`letter`: the reply is A, B or C. `last_line`: its last line is `Verdict: A`, `B` or `tie`. `json`: it is an
    object with `verdict`."""
    max_tokens: int = Field(ge=1)
    """Length limit of the reply, unless the job sets one."""
    pattern: str | None = None
    """last_line: another form of that line, a regular expression whose group `verdict` is A, B, C or tie."""


class Template(Record):
    """A judge template with everything that it includes: all that is needed to render it again."""

    name: str
    sources: tuple[Source, ...]
    """The template itself first, then what it includes, by name."""
    verdict: VerdictKind
    max_tokens: int
    pattern: str | None = None

    @property
    def hash(self) -> str:
        """Digest of all sources: what a ballot's `template` records."""
        return _hash(self.sources)

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """What a `json` reply must look like; None for the other kinds."""
        return _JSON_SCHEMA if self.verdict == "json" else None


_JSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "verdict": {"type": "string", "enum": ["A", "B", "tie"]}},
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}


def template_names(
    settings: ChatSettings, constitution: Constitution, role: Literal["decide", "evaluate"], known: Container[str] = ()
) -> list[str]:
    """The templates that a job asks with: its own, or the constitution's. `evaluate` has others, so that what measures
    the policy is not the question that trained it: those that the job names, or the deciding ones' counterparts among
    the `known` templates (`evaluating_name`)."""
    deciding = settings.templates or [constitution.template]
    if role == "decide":
        return deciding
    return settings.evaluate_templates or [
        name if (other := evaluating_name(name)) not in known else other for name in deciding
    ]


def evaluating_name(name: str) -> str:
    """What a deciding template's counterpart for held-out evaluation is called."""
    return f"{name}_evaluate"


def templates_in(folder: Path) -> list[str]:
    """Names of the templates in a folder."""
    return sorted(p.stem for p in folder.glob("*.jinja") if not p.name.startswith("_"))


def load_template(folder: Path | str, name: str) -> Template:
    """Reads `<folder>/<name>.jinja` and what it includes, and checks it (`parse_template`).

    Raises:
        UserError: there is no such template, or it can't be used; with file and line.
    """
    root = Path(folder)
    if not _NAME.fullmatch(name) or not (root / f"{name}.jinja").is_file():
        known = templates_in(root)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known) or 'none'}"
        raise UserError(f"judge template `{name}`: no {root / name}.jinja; {hint}")
    sources: dict[str, str] = {}
    owed = [f"{name}.jinja"]
    while owed:
        file = owed.pop()
        if file not in sources:
            sources[file] = _read(root, file)
            owed += _included(file, sources[file], str(root))
    return parse_template(name, sources, str(root))


def parse_template(name: str, sources: dict[str, str], folder: str = "prompts/judge") -> Template:
    """A template of the given files (file name → text), checked before anything is asked with it: it must compile,
    use known names only, and show every rule, the prompt and both answers between their codes.

    Raises:
        UserError: with `folder`, file and line.
    """
    own = f"{name}.jinja"
    front = _front_matter(sources[own], f"{folder}/{own}")
    ordered = [own, *sorted(f for f in sources if f != own)]
    template = Template(
        name=name, sources=tuple(Source(name=f, text=sources[f]) for f in ordered), **front.model_dump()
    )
    for source in template.sources:
        _refuse_unknown_names(source, folder)
    _check_output(template, f"{folder}/{own}")
    return template


def render(
    template: Template,
    constitution: Constitution,
    principle: Principle | None,
    prompt: Sequence[Message],
    first: str,
    second: str,
    cut_off: tuple[bool, bool] = (False, False),
) -> tuple[Message, ...]:
    """The messages of one question; `first` is shown as A. `principle` is the one asked about, None for all; `cut_off`
    says of `first` and of `second` whether the length limit ended it.

    Raises:
        UserError: the template fails on these values.
    """
    messages = tuple(Message(role=m.role, content=_inert(m.content)) for m in prompt)
    values = {
        "constitution": constitution,
        "principle": principle,
        "messages": messages,
        "first": _inert(first),
        "second": _inert(second),
        "first_cut_off": cut_off[0],
        "second_cut_off": cut_off[1],
        # The same in both orders: only the places of the answers differ.
        "code": digest(sorted([first, second])),
        "prompt_code": digest([m.content for m in prompt]),
    }
    compiled = _compiled(template.name, template.sources)
    try:
        context = compiled.new_context(values)
        texts = {name: "".join(compiled.blocks[name](context)).strip() for name in ("system", "user")}
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as e:
        raise UserError(f"judge template {_place(e, template)}: {e}") from e
    return (Message(role="system", content=texts["system"]), Message(role="user", content=texts["user"]))


def shown_by(template: Template, constitution: Constitution, principle: str | None) -> str:
    """Digest of the words that a template makes of a text, whatever the pair: the question about some pair that doesn't
    matter, with answers that ended and with ones that were cut off. `principle` is the id of the one asked about.

    Raises:
        UserError: the template fails.
    """
    about = constitution.principle(principle) if principle else None
    prompt = (Message(role="user", content="?"),)
    asked = [render(template, constitution, about, prompt, "1", "2", (cut, cut)) for cut in (False, True)]
    return digest([[m.content for m in messages] for messages in asked])


def asks_by_principle(template: Template) -> bool:
    """Whether a question about one principle differs from a question about all."""
    probe = _probe()
    prompt = (Message(role="user", content="?"),)
    whole, single = (render(template, probe, p, prompt, "1", "2") for p in (None, probe.principles[0]))
    return whole != single


def _inert(text: str) -> str:
    """The text with a space inside everything that a chat server could take for the end of the message."""
    return _CONTROL.sub(lambda m: f"{m[0]} ", text)


@lru_cache(maxsize=64)
def _hash(sources: tuple[Source, ...]) -> str:
    return digest([[s.name, s.text] for s in sources])


def _environment(sources: dict[str, str] | None = None) -> jinja2.Environment:
    found = sources or {}
    # With its name as file name, a source can be told from the others in a traceback.
    load = jinja2.FunctionLoader(lambda name: (found[name], name, None) if name in found else None)
    return jinja2.sandbox.SandboxedEnvironment(
        loader=load,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


@lru_cache(maxsize=64)
def _compiled(name: str, sources: tuple[Source, ...]) -> jinja2.Template:
    return _environment({s.name: s.text for s in sources}).get_template(f"{name}.jinja")


def _read(root: Path, file: str) -> str:
    path = root / file
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{path}: a template includes files of its own folder only")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise cant_read(path, "the judge template", e) from e


def _parse(file: str, text: str, folder: str) -> jinja2.nodes.Template:
    try:
        return _environment().parse(text, file)
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"{folder}/{file}:{e.lineno}: {e.message}") from e


def _included(file: str, text: str, folder: str) -> list[str]:
    """The files that a source includes, imports or extends."""
    names = list(jinja2.meta.find_referenced_templates(_parse(file, text, folder)))
    if None in names:
        raise UserError(f"{folder}/{file}: an include must name its file, not compute it")
    return [n for n in names if n is not None]


def _front_matter(text: str, source: str) -> FrontMatter:
    match = _FRONT_MATTER.match(text)
    example = "for example {# verdict: letter; max_tokens: 8 #}"
    if match is None:
        raise UserError(f"{source}:1: the first line says what the reply looks like, {example}")
    try:
        tree = yaml.safe_load(match["body"].strip().replace("; ", "\n"))
        front = FrontMatter.model_validate(tree)
        if front.pattern is not None and "verdict" not in re.compile(front.pattern).groupindex:
            raise UserError(f"{source}:1: pattern: needs a group (?P<verdict>…)")
    except (yaml.YAMLError, re.error) as e:
        raise UserError(f"{source}:1: not a first line ({str(e).splitlines()[0]}), {example}") from e
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(str(p) for p in error["loc"]) or "first line"
        raise UserError(f"{source}:1: {where}: {error['msg']}; {example}") from e
    return front


def _refuse_unknown_names(source: Source, folder: str) -> None:
    """Also a name in a branch that no check renders must be known before the first call."""
    tree = _parse(source.name, source.text, folder)
    for unknown in sorted(jinja2.meta.find_undeclared_variables(tree) - set(NAMES)):
        line = min(n.lineno for n in tree.find_all(jinja2.nodes.Name) if n.name == unknown)
        near = difflib.get_close_matches(unknown, NAMES, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known names: {', '.join(NAMES)}"
        raise UserError(f"{folder}/{source.name}:{line}: `{unknown}` is not defined; {hint}")


def _check_output(template: Template, source: str) -> None:
    """Renders marked data, and looks for all of it in what a judge would read."""
    try:
        missing = {"system", "user"} - set(_compiled(template.name, template.sources).blocks)
    except jinja2.TemplateNotFound as e:
        raise UserError(f"{source}: includes `{e.name}`, and there is no such file") from e
    if missing:
        raise UserError(f"{source}: needs {{% block {sorted(missing)[0]} %}}; a template has two, system and user")
    probe = _probe()
    prompt = (Message(role="user", content="the-prompt-that-is-asked"),)
    first, second = "the-answer-that-is-shown-first", "the-answer-that-is-shown-second"
    for cut_off in ((False, False), (True, True)):
        messages = render(template, probe, None, prompt, first, second, cut_off)
        _check_shown("\n".join(m.content for m in messages), probe, prompt, first, second, source)


def _check_shown(
    shown: str, probe: Constitution, prompt: tuple[Message, ...], first: str, second: str, source: str
) -> None:
    rules = [p.rule for p in probe.principles]
    if not all(rule in shown for rule in rules):
        raise UserError(
            f"{source}: the constitution is not in it: show the rule of every one of `constitution.principles`"
        )
    for what, text in (("messages", prompt[0].content), ("first", first), ("second", second)):
        if text not in shown:
            raise UserError(f"{source}: `{what}` is not in it; a judge needs the prompt and both answers")
    code = digest(sorted([first, second]))
    for what, text in (("first", first), ("second", second)):
        before, _, after = shown.partition(text)
        if code not in before.split("\n\n")[-1] or code not in after.split("\n\n")[0]:
            raise UserError(
                f"{source}: `{what}` needs a line with `code` directly before and after it, as in _answers.jinja"
            )


@lru_cache(maxsize=1)
def _probe() -> Constitution:
    principles = (
        Principle(id="one", rule="the-first-rule-of-the-probe", prefer="p", avoid="a"),
        Principle(id="two", rule="the-second-rule-of-the-probe", prefer="p", avoid="a"),
    )
    return Constitution(name="probe", version=1, summary="Probe.", principles=principles)


def _place(error: Exception, template: Template) -> str:
    """File and line of the innermost template frame that an error came through."""
    files = {s.name for s in template.sources}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    if not frames:
        return f"{template.name}.jinja"
    file, line = frames[-1].filename, frames[-1].lineno or 1
    compiled = _compiled(template.name, template.sources).environment.get_template(file)
    return f"{file}:{compiled.get_corresponding_lineno(line)}"
