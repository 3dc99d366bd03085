"""Constitutions: named, versioned sets of principles, and the voices in which a judge can ask about them.

In: the text of `constitutions/<name>/v<N>.yaml`. Out: a frozen `Constitution` whose identity is the hash of
its parsed content (comments, layout, name and version don't count). Pure, but for the small loader below.

A principle offers *contrasts*: a wanted and an opposite side, as an instruction (`prefer` and `avoid`, and
their `paraphrases`) or as `examples`. Each contrast is one *voice*, and `use` says what it is for: `select`
voices choose which completions are compared, `decide` voices vote, `evaluate` voices only measure. The three
never mix, so that a policy is never measured with a question that trained it.

A rule is enough: for a use that a principle has no contrast for, `derived_by` adds voices that are derived from the
rule. They are no part of a text's content, so neither of its hash.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from rlaif.config import refuse_duplicate_keys
from rlaif.constitutions.checks import Check
from rlaif.constitutions.derived import Side, Wordings
from rlaif.constitutions.derived import Use as Use
from rlaif.errors import UserError, cant_read
from rlaif.records import ConstitutionRef, Message, Record, digest

_EXAMPLES_PER_VOICE = 2
_REFERENCE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_-]*)(?:@(?P<version>\d+))?")
_VERSION_FILE = re.compile(r"v(\d+)\.yaml")


class Paraphrase(Record):
    """Another wording of a principle's contrast."""

    prefer: str = Field(min_length=1)
    avoid: str = Field(min_length=1)
    use: Use = "decide"


class Example(Record):
    """A question with a better and a worse answer; two examples of the same use make one voice."""

    prompt: str = Field(min_length=1)
    better: str = Field(min_length=1)
    worse: str = Field(min_length=1)
    use: Use = "decide"

    @model_validator(mode="after")
    def _differ(self) -> Example:
        if self.better.strip() == self.worse.strip():
            raise ValueError("`better` and `worse` are the same text")
        return self


class Principle(Record):
    """One rule, and the ways to ask about it. A guard can veto a winner; it never elects one."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    rule: str = Field(min_length=1)
    """What a person, and a judge that reads, is told."""
    opposite: str | None = Field(None, min_length=1)
    """The rule turned around, for a judge that compares the two; where it is absent, by the words of the rule."""
    weight: float = Field(1.0, gt=0)
    guard: bool = False
    """A guard without contrasts is measured by the judge itself: relevance and fluency, for the likelihood judge."""
    prefer: str | None = None
    avoid: str | None = None
    paraphrases: tuple[Paraphrase, ...] = ()
    examples: tuple[Example, ...] = ()
    check: Check | None = None

    @model_validator(mode="after")
    def _two_sides(self) -> Principle:
        if (self.prefer is None) != (self.avoid is None):
            raise ValueError("give `prefer` and `avoid` together: a contrast has two sides")
        return self

    @property
    def lacks(self) -> tuple[Use, ...]:
        """The uses that no contrast serves. None of a guard: what has no contrast to decide is measured."""
        if self.guard:
            return ()
        have = {v.use for v in self.voices}
        return tuple(use for use in typing.get_args(Use) if use not in have)

    @property
    def has_words(self) -> bool:
        """Whether there is anything in the rule to read, or to derive from."""
        return any(character.isalpha() for character in self.rule)

    def derived(self, wordings: Wordings) -> tuple[Voice, ...]:
        """Voices for the uses that it lacks, by the rule and its opposite."""
        return tuple(
            self._voice(label, use, prefer, avoid)
            for use in (self.lacks if self.has_words else ())
            for label, prefer, avoid in wordings.contrasts(self.rule, use, self.opposite)
        )

    @property
    def voices(self) -> tuple[Voice, ...]:
        """The contrasts as voices: the main wording, the paraphrases, the examples two by two."""
        out: list[Voice] = []
        if self.prefer is not None and self.avoid is not None:
            out.append(self._voice("main", "decide", (self.prefer,), (self.avoid,)))
        for n, p in enumerate(self.paraphrases, 1):
            out.append(self._voice(f"paraphrase{n}", p.use, (p.prefer,), (p.avoid,)))
        for use in typing.get_args(Use):
            mine = [e for e in self.examples if e.use == use]
            for n, at in enumerate(range(0, len(mine), _EXAMPLES_PER_VOICE), 1):
                chunk = mine[at : at + _EXAMPLES_PER_VOICE]
                out.append(
                    Voice(
                        id=f"{self.id}/examples-{use}{n}",
                        principle=self.id,
                        use=use,
                        guard=self.guard,
                        prefer=tuple(m for e in chunk for m in _turn(e.prompt, e.better)),
                        avoid=tuple(m for e in chunk for m in _turn(e.prompt, e.worse)),
                    )
                )
        return tuple(out)

    def _voice(self, label: str, use: Use, prefer: Side, avoid: Side) -> Voice:
        return Voice(
            id=f"{self.id}/{label}",
            principle=self.id,
            use=use,
            guard=self.guard,
            prefer=_before(prefer),
            avoid=_before(avoid),
        )


class Voice(Record):
    """One way of asking about one principle: the messages that stand before the prompt on either side."""

    id: str
    principle: str
    use: Use
    guard: bool = False
    prefer: tuple[Message, ...]
    avoid: tuple[Message, ...]

    @property
    def hash(self) -> str:
        """Digest of the messages: what a ballot's `template` records."""
        return digest([[m.model_dump() for m in side] for side in (self.prefer, self.avoid)])


class Constitution(Record):
    """A text that can be in force. `name` and `version` are for people; `hash` is its identity."""

    name: str
    version: int
    summary: str = Field(min_length=1)
    template: str = "pairwise"
    """Name of the judge template (`prompts/judge/<template>.jinja`) for judges that read the rules."""
    principles: tuple[Principle, ...] = Field(min_length=1)
    _wordings: Wordings | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _sound(self) -> Constitution:
        seen: set[str] = set()
        for p in self.principles:
            if p.id in seen:
                raise ValueError(f"two principles are called `{p.id}`; each needs an id of its own")
            seen.add(p.id)
        if all(p.guard for p in self.principles):
            raise ValueError("every principle is a guard, and guards only veto; add one that can choose")
        return self

    @property
    def hash(self) -> str:
        """Digest of the parsed content without name and version; a default counts the same written out or left out."""
        return digest(self.model_dump(mode="json", exclude={"name", "version"}, exclude_defaults=True))

    @property
    def ref(self) -> ConstitutionRef:
        """Name, version and hash."""
        return ConstitutionRef(name=self.name, version=self.version, hash=self.hash)

    @property
    def weights(self) -> dict[str, float]:
        """Principle id → weight."""
        return {p.id: p.weight for p in self.principles}

    def principle(self, principle_id: str) -> Principle:
        """The principle of this id; KeyError when there is none."""
        return {p.id: p for p in self.principles}[principle_id]

    @property
    def wordings(self) -> Wordings | None:
        """By which voices are derived; None: a use without a contrast has no voice."""
        return self._wordings

    def derived_by(self, wordings: Wordings | None) -> Constitution:
        """The same text, with voices derived from its rules where it lacks contrasts; the hash stays. A text that lacks
        none has no use for wordings."""
        text = self.model_copy()
        rules = [p.rule for p in self.principles if p.lacks and p.has_words and p.opposite is None]
        text._wordings = wordings.of_rules(rules) if wordings and self.derives else None
        return text

    @property
    def derives(self) -> bool:
        """Whether a principle lacks a contrast for some use, and has a rule to derive it from."""
        return any(p.lacks and p.has_words for p in self.principles)

    def voices(self, use: Use | None = None) -> tuple[Voice, ...]:
        """All voices in file order, each principle's derived ones after its own; or those for one use."""
        return tuple(
            v
            for p in self.principles
            for v in (*p.voices, *(p.derived(self._wordings) if self._wordings else ()))
            if use is None or v.use == use
        )

    def voice(self, voice_id: str) -> Voice:
        """The voice of this id; KeyError when there is none."""
        return {v.id: v for v in self.voices()}[voice_id]


class Change(Record):
    """One difference between two texts. `principle` is None for the constitution's own fields."""

    principle: str | None
    kind: Literal["added", "removed", "changed"]
    field: str | None = None
    before: Any = None
    after: Any = None


def diff(a: Constitution, b: Constitution) -> list[Change]:
    """What became different from `a` to `b`: own fields first, then principle by principle. Empty iff hashes agree."""
    changes = [
        Change(principle=None, kind="changed", field=f, before=getattr(a, f), after=getattr(b, f))
        for f in ("summary", "template")
        if getattr(a, f) != getattr(b, f)
    ]
    old = {p.id: p.model_dump(mode="json") for p in a.principles}
    new = {p.id: p.model_dump(mode="json") for p in b.principles}
    for name in [*old, *(k for k in new if k not in old)]:
        if name not in new:
            changes.append(Change(principle=name, kind="removed", before=old[name]))
        elif name not in old:
            changes.append(Change(principle=name, kind="added", after=new[name]))
        else:
            changes += [
                Change(principle=name, kind="changed", field=f, before=old[name][f], after=new[name][f])
                for f in old[name]
                if old[name][f] != new[name][f]
            ]
    if not changes and list(old) != list(new):
        changes.append(Change(principle=None, kind="changed", field="order", before=list(old), after=list(new)))
    return changes


def parse_constitution(text: str, name: str, version: int, source: str) -> Constitution:
    """Parses a constitution file's text; `source` names it in errors.

    Raises:
        UserError: with `source`, the line, what was found and what was allowed.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as e:  # ValueError: 2024-13-45 looks like a date, and is none
        mark = getattr(e, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        why = " ".join(str(getattr(e, "problem", None) or e).split())
        raise UserError(f"{where}: not valid YAML ({why})") from e
    except RecursionError as e:
        raise UserError(f"{source}: nested too deeply for a constitution") from e
    if not isinstance(tree, dict) or root is None:
        raise UserError(
            f"{source}:1: a constitution is a mapping with `summary` and `principles`, found {type(tree).__name__}"
        )
    refuse_duplicate_keys(root, source)
    for key in ("name", "version"):
        if key in tree:
            line = _line(root, (key,))
            raise UserError(f"{source}:{line}: `{key}` comes from the file's place (<name>/v<N>.yaml); delete the line")
    try:
        parsed = Constitution.model_validate({**tree, "name": name, "version": version})
    except ValidationError as e:
        found = e.errors()
        if any(len(err["loc"]) > 1 and err["loc"][0] == "principles" for err in found):
            # A principle that can't be read is one too few; only the first is news.
            found = [err for err in found if (err["loc"], err["type"]) != (("principles",), "too_short")]
        errors = [f"{source}:{_line(root, err['loc'])}: {_explain(err)}" for err in found]
        raise UserError("; ".join(errors)) from e
    for loc, why in _without_effect(parsed):
        raise UserError(f"{source}:{_line(root, loc)}: {'.'.join(map(str, loc))}: {why}")
    return parsed


def _without_effect(constitution: Constitution) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Where a file says what can't be meant, and why. Not part of the record: a run's stored text stays readable."""
    same = "`prefer` and `avoid` are the same text"
    for i, p in enumerate(constitution.principles):
        here = ("principles", i)
        if not math.isfinite(p.weight):
            yield (*here, "weight"), f"a weight is a finite number, found {p.weight}"
        if p.opposite is not None and p.opposite.split() == p.rule.split():
            yield (*here, "opposite"), "it says the same as the rule"
        if p.prefer is not None and p.avoid is not None and p.prefer.strip() == p.avoid.strip():
            yield (*here, "avoid"), same
        for n, other in enumerate(p.paraphrases):
            if other.prefer.strip() == other.avoid.strip():
                yield (*here, "paraphrases", n), same
        for what in ("words", "list_items"):
            least, most = (getattr(p.check, f"{bound}_{what}", None) for bound in ("min", "max"))
            if least is not None and most is not None and least > most:
                yield (*here, "check"), f"no answer can meet min_{what} {least} and max_{what} {most}"


def constitution_files(directory: Path | str) -> dict[str, dict[int, Path]]:
    """Name → version → file, for every `<name>/v<N>.yaml` below the folder, sorted; nothing is parsed."""
    root = Path(directory)
    out: dict[str, dict[int, Path]] = {}
    for path in sorted(root.glob("*/v*.yaml")):
        if match := _VERSION_FILE.fullmatch(path.name):
            out.setdefault(path.parent.name, {})[int(match[1])] = path
    return {name: dict(sorted(versions.items())) for name, versions in out.items()}


def misnamed_files(directory: Path | str) -> list[Path]:
    """YAML files beside the versions that nothing reads, because they are not called `v<N>.yaml`."""
    files = sorted(p for pattern in ("*/*.yaml", "*/*.yml") for p in Path(directory).glob(pattern))
    return [p for p in files if not _VERSION_FILE.fullmatch(p.name)]


def list_constitutions(directory: Path | str) -> list[Constitution]:
    """All texts below the folder, by name and version. UserError when one doesn't parse."""
    return [
        _read(path, name, version)[0]
        for name, versions in constitution_files(directory).items()
        for version, path in versions.items()
    ]


_NONE = "none (`rlaif init DIR` writes the shipped ones)"


def load_constitution(directory: Path | str, reference: str) -> Constitution:
    """Loads `assistant` (the newest version on disk) or `assistant@2` (that one).

    Raises:
        UserError: the reference is malformed, nothing of that name or version exists, or the file doesn't parse.
    """
    return load_with_source(directory, reference)[0]


def load_with_source(directory: Path | str, reference: str) -> tuple[Constitution, bytes]:
    """`load_constitution`, and the very bytes that were parsed: a file may be saved again at any time."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(f"constitution `{reference}`: expected NAME or NAME@VERSION, for example assistant@2")
    files = constitution_files(directory)
    versions = files.get(match["name"])
    if versions is None:
        near = difflib.get_close_matches(match["name"], list(files), n=1, cutoff=0.5)
        known = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(files) or _NONE}"
        raise UserError(f"constitution `{reference}`: no {directory}/{match['name']}/v<N>.yaml; {known}")
    version = int(match["version"]) if match["version"] else max(versions)
    if version not in versions:
        have = ", ".join(f"{match['name']}@{v}" for v in versions)
        raise UserError(f"constitution `{reference}`: no {directory}/{match['name']}/v{version}.yaml; there is {have}")
    return _read(versions[version], match["name"], version)


def _read(path: Path, name: str, version: int) -> tuple[Constitution, bytes]:
    try:
        source = path.read_bytes()
        text = source.decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise cant_read(path, "the constitution", e) from e
    return parse_constitution(text, name, version, str(path)), source


def _before(side: Side) -> tuple[Message, ...]:
    return _turn(*side) if len(side) > 1 else (Message(role="system", content=side[0]),)


def _turn(prompt: str, answer: str) -> tuple[Message, Message]:
    return Message(role="user", content=prompt), Message(role="assistant", content=answer)


def _explain(error: Any) -> str:
    loc = error["loc"]
    where = ".".join(str(p) for p in loc) or "constitution"
    if error["type"] == "missing":
        return f"`{where}` is missing"
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    known = _known_keys(loc[:-1])
    near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key `{where}`; {hint}"


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    inside: dict[str, type[BaseModel]] = {
        "principles": Principle,
        "paraphrases": Paraphrase,
        "examples": Example,
        "check": Check,
    }
    names = [p for p in loc if isinstance(p, str)]
    model = inside[names[-1]] if names else Constitution
    return [k for k in model.model_fields if model is not Constitution or k not in ("name", "version")]


def _line(root: yaml.Node, loc: tuple[Any, ...]) -> int:
    """Line (from 1) of the deepest node on the way to `loc`; an unknown key's own line."""
    node, line = root, root.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line
