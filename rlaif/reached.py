"""Names of other libraries that their documentation doesn't promise: who reaches which, and what for.

In: lists of `Reached`, one in each module of `BY_LIBRARY`; no other module touches such a name (tests/test_reached.py).
Out: those that the installed version no longer has. Run it before a pin in pyproject.toml is moved, and after:
`python -m rlaif.reached`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

BY_LIBRARY = {
    "transformers": "rlaif.transformers_compat",
    "accelerate": "rlaif.learning.accelerate_compat",
    "peft": "rlaif.learning.peft_compat",
    "trl": "rlaif.learning.trl_compat",
    "vllm": "rlaif.sampling.vllm_compat",
}
"""The one module for each library; its list is called `REACHED`. What belongs to transformers' `Trainer`, accelerate
and torch's schedules stands with TRL, whose trainers bring it."""


class Reached(NamedTuple):
    """A name that may be gone in another version, and what is wrong then."""

    module: str
    """Where it is imported from."""
    name: str
    """Within the module, dotted: `Trainer._tr_loss`, also for what an instance has only. "": the module itself."""
    breaks: str
    """What no longer works without it."""
    says: str = ""
    """A text that must stand in its source, for what has no name: a parameter, a message, what a function sets."""


def listed(module: str) -> tuple[Reached, ...]:
    """A module's `REACHED`, read without importing it: what it imports may be what is gone."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    known: dict[str, Any] = {"Reached": Reached}
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            with contextlib.suppress(NameError):  # made of what is imported
                exec(compile(ast.Module([node], []), spec.origin, "exec"), known)
    reached: tuple[Reached, ...] = known["REACHED"]
    return reached


def missing(reached: Iterable[Reached]) -> list[Reached]:
    """Those that the installed version hasn't; imports the library."""
    return [r for r in reached if not _is_there(r)]


def _is_there(reached: Reached) -> bool:
    try:
        found: Any = importlib.import_module(reached.module)
    except ImportError:
        return False
    parts = reached.name.split(".") if reached.name else []
    for i, part in enumerate(parts):
        if hasattr(found, part):
            found = getattr(found, part)
        else:  # an instance may have it
            return i == len(parts) - 1 and _sets(found, part)
    return reached.says in inspect.getsource(found) if reached.says else True


def _sets(cls: Any, name: str) -> bool:
    """Whether a class, or one that it inherits from, assigns `self.NAME`."""
    assigned = re.compile(rf"\bself\.{name}\b[^=\n(]*=(?!=)")
    return any(assigned.search(_source(c)) for c in getattr(cls, "__mro__", ()))


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # not written in Python
        return ""


def main(argv: list[str] | None = None) -> int:
    """`python -m rlaif.reached [LIBRARY ...]`: prints each name that is gone and what breaks; 1 when one is."""
    gone = 0
    for library in argv or BY_LIBRARY:
        if importlib.util.find_spec(library) is None:
            print(f"{library}: not installed")
            continue
        with contextlib.suppress(ImportError, AttributeError):  # most need nothing, and what is gone is told below
            importlib.import_module(BY_LIBRARY[library]).load()
        reached = listed(BY_LIBRARY[library])
        lost = missing(reached)
        gone += len(lost)
        print(f"{library}: {len(reached) - len(lost)} of {len(reached)} names are there")
        for r in lost:
            print(f"  {r.module}{':' * bool(r.name)}{r.name}{f' ({r.says})' if r.says else ''}: {r.breaks}")
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
