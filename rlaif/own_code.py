"""Code of the user's own that a job names: found, imported, its settings checked, known by its source's digest.

In: `module:Class` or `module:function`, as a job says it (docs/extend.md). Out: the class or function, and the sha256
of its module's file. The module is looked for in the folder where the command runs, then where Python looks. Who runs a
job, or asks its judge, imports it; who reads a log never does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from rlaif.config import Job, OwnJudge, OwnLearner, OwnSampling, Section
from rlaif.errors import UserError, needs_extra

S = TypeVar("S", bound=Section)
SHOWN_DIGITS = 16
"""Of a digest, where it stands in a name; elsewhere all 64."""


class Code(NamedTuple):
    """A class or function of the user's own."""

    name: str
    """As the job says it."""
    made: Any
    file: Path
    sha256: str
    """Of the file that its module was read from."""

    def __str__(self) -> str:
        return f"{self.name} ({self.file}, sha256 {self.sha256[:SHOWN_DIGITS]})"


_LOADED: dict[tuple[str, Path], tuple[str, ModuleType]] = {}
"""(module, folder where it was asked for) → digest of its source, and the module."""


def load(setting: str, name: str, sha256: str | None = None, anew: bool = False) -> Code:
    """What a job names, imported the first time that this process asks for it.

    Args:
        setting: The job's, for messages: `judge.kind`.
        sha256: What its source must be: another process read it.
        anew: Looks whether the file has changed since, and reads it again then.

    Raises:
        UserError: there is no such module or name, importing it fails, or its source is another one.
    """
    said, (module_name, _, attribute) = f"{setting} {name}", name.partition(":")
    key = module_name, Path.cwd()
    if anew or key not in _LOADED:
        _import(said, module_name)
    digest, module = _LOADED[key]
    file = Path(str(module.__file__))
    if sha256 not in (None, digest):
        raise UserError(f"{said}: {file} was changed while the run started; start again")
    if (made := getattr(module, attribute, None)) is None:
        raise UserError(f"{said}: {file} has no `{attribute}`")
    return Code(name, made, file, digest)


def _import(said: str, name: str) -> None:
    here = Path.cwd()
    before = sys.modules.pop(name, None)
    path = list(sys.path)
    try:
        sys.path.insert(0, str(here))
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a package above it is missing, or is none
        spec = None
    finally:
        sys.path[:] = path
        if before is not None:
            sys.modules[name] = before
    if str(here) not in sys.path:  # for its neighbours; last, where none of them can hide a library's module
        sys.path.append(str(here))
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(f"{said}: no module `{name}` in {here} or among the installed packages")
    source = Path(spec.origin).read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    if (known := _LOADED.get((name, here))) is not None and known[0] == digest:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # These very bytes, not a compiled file that may be older: the log says what ran.
        exec(compile(source, spec.origin, "exec", dont_inherit=True), module.__dict__)
    except Exception as e:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        if isinstance(e, ImportError) and (needed := needs_extra(e)):
            raise UserError(f"{said}: {needed}") from e
        line = next((f.lineno for f in reversed(traceback.extract_tb(e.__traceback__)) if f.filename == spec.origin), 0)
        at = f"{spec.origin}:{line}" if line else spec.origin
        why = " ".join(str(e).split())
        raise UserError(f"{said}: {at}: importing it failed ({type(e).__name__}: {why})") from e
    _LOADED[name, here] = digest, module


def checked(code: Code, section: S, where: str) -> S:
    """A section of the job as the class's own settings: its `Settings`, a subclass of the section's class.

    Raises:
        UserError: a key is unknown, or a value doesn't fit.
    """
    settings = getattr(code.made, "Settings", type(section))
    if not (isinstance(settings, type) and issubclass(settings, type(section))):
        raise UserError(f"{code.name}.Settings: expected a subclass of rlaif.config.{type(section).__name__}")
    given = section.model_dump(exclude_unset=True)
    if unknown := [key for key in given if key not in settings.model_fields]:
        known = ", ".join(f"`{key}`" for key in settings.model_fields if key not in Section.model_fields)
        raise UserError(f"unknown key `{where}.{unknown[0]}`; {code.name} knows {known}")
    try:
        found: S = settings.model_validate(given)
    except ValidationError as e:
        first = e.errors()[0]
        at = ".".join(map(str, (where, *first["loc"])))
        # What is missing, or wrong together, comes with the whole section, and a key or a token may be in it.
        found_ = "" if isinstance(first["input"], dict) else f" (found {first['input']!r})"
        raise UserError(f"{at}: {first['msg'].removeprefix('Value error, ')}{found_}") from e
    return found


def of_judge(settings: OwnJudge, sha256: str | None = None, anew: bool = False) -> tuple[Code, OwnJudge]:
    """The class that a job's `judge.kind` names, and its settings.

    Raises:
        UserError: it can't be one.
    """
    code = load("judge.kind", settings.kind, sha256, anew)
    _needs(code, "judge.kind", "cast")
    return code, checked(code, settings, "judge")


def of_learner(settings: OwnLearner, sha256: str | None = None, anew: bool = False) -> tuple[Code, OwnLearner]:
    """The same of `learner.kind`."""
    code = load("learner.kind", settings.kind, sha256, anew)
    asked = ["update", "save", "load", "export", "exports_in", "logprobs", "divergences"]
    if settings.reference == "at_change":
        asked.append("refer_to")
    _needs(code, "learner.kind", *asked)
    return code, checked(code, settings, "learner")


def of_sampler(settings: OwnSampling, sha256: str | None = None, anew: bool = False) -> tuple[Code, OwnSampling]:
    """The same of `sampling.engine`."""
    code = load("sampling.engine", settings.engine, sha256, anew)
    _needs(code, "sampling.engine", "sample", "load", "logprobs")
    return code, checked(code, settings, "sampling")


def can_rest(code: Code) -> bool:
    """Whether objects of a class give back what they hold of a GPU, and take it again (`device: shared`)."""
    return all(callable(getattr(code.made, method, None)) for method in ("rest", "wake"))


def of_rule(name: str, anew: bool = False) -> Code:
    """A function that a job's `filters.rules` names.

    Raises:
        UserError: it can't be one.
    """
    code = load("filters.rules", name, anew=anew)
    if not callable(code.made) or isinstance(code.made, type):
        raise UserError(f"filters.rules {name}: expected a function of a verdict and the filters' settings")
    return code


def _needs(code: Code, setting: str, *methods: str) -> None:
    if not isinstance(code.made, type):
        raise UserError(f"{setting} {code.name}: expected a class")
    if missing := [m for m in methods if not callable(getattr(code.made, m, None))]:
        raise UserError(
            f"{setting} {code.name}: the class has no method `{missing[0]}`; docs/extend.md says what it needs"
        )


def resolved(job: Job) -> tuple[Job, tuple[Code, ...]]:
    """A job with the defaults of what it names of the user's own, and that code as it is now; nothing of either for a
    job that names none.

    Raises:
        UserError: something that it names can't be used.
    """
    found: list[Code] = []
    sections: dict[str, BaseModel] = {}
    readers: tuple[tuple[str, type[BaseModel], Callable[..., tuple[Code, BaseModel]]], ...] = (
        ("judge", OwnJudge, of_judge),
        ("learner", OwnLearner, of_learner),
        ("sampling", OwnSampling, of_sampler),
    )
    for name, own, read in readers:
        if isinstance(section := getattr(job, name), own):
            code, settings = read(section, anew=True)
            found.append(code)
            sections[name] = own.model_validate(settings.model_dump(mode="json"))
            best_worst = name == "judge" and job.pairing.method == "best_worst"
            if best_worst and not callable(getattr(code.made, "score", None)):
                raise UserError(
                    f"pairing.method: `best_worst` needs a judge that scores single answers, and {code.name} has no "
                    "method `score`; set random or all"
                )
    found += [of_rule(name, anew=True) for name in job.filters.rules]
    return (job.model_copy(update=sections) if sections else job), tuple(found)
