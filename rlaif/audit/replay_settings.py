"""What a replay decides with: the run's own settings, and those that are to be different.

In: a run, files and `--set` keys. Out: `Settings`, and what they change. A key that recorded votes can't answer for is
a user's mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlaif.config import Filters, Job, apply_override, changed_keys, parse_job
from rlaif.errors import UserError
from rlaif.judging.calibration import Calibration, read_calibration
from rlaif.rundir.store import RunDir

_REPARSED = ("judge.score_temperature", "judge.relevance_tolerance", "judge.fluency_tolerance", "judge.clamp")
"""Settings of the judge that say what a recorded reply or score means."""
_READ = ", ".join(_REPARSED)


class Settings(NamedTuple):
    """What a replay decides with."""

    job: Job
    """The run's, with what is to be different."""
    calibration: Calibration | None
    parser: bool
    """Read the replies, or the scores, again."""


def settings_of(
    run: RunDir,
    base_dir: Path,
    filters: Path | None = None,
    overrides: Sequence[str] = (),
    calibration: Path | None = None,
    aggregate: str | None = None,
    parser: bool = False,
) -> tuple[Settings, dict[str, tuple[Any, Any]]]:
    """The settings of a replay, and what they change. What nobody names stays as the run has it.

    Raises:
        UserError: a file or a key can't be used, or a key isn't one that recorded votes can answer for.
    """
    own = run.job()
    tree = own.model_dump(mode="json")
    if filters is not None:
        tree["filters"] |= _filter_keys(filters)
    for override in overrides:
        apply_override(tree, override)
    if aggregate is not None:
        tree["filters"]["aggregate"] = aggregate
    if calibration is not None:
        tree["filters"]["calibration"] = str(calibration)
    job = parse_job(tree, str(filters) if filters else "--set")
    changed = changed_keys(own.model_dump(mode="json"), job.model_dump(mode="json"))
    for key in changed:
        if not key.startswith(("filters.", *_REPARSED)):
            raise UserError(f"--set {key}: recorded votes can't answer for it; filters.* and, with --parser, {_READ}")
        if not key.startswith("filters.") and not parser:
            raise UserError(f"--set {key}: it says how recorded scores and replies are read; add --parser")
    if unknown := [rule for rule in job.filters.rules if rule not in own.filters.rules]:
        raise UserError(
            f"--set filters.rules: the log can't answer for {unknown[0]}, which the run didn't have, and a replay "
            "imports no code; it can leave rules out"
        )
    found = None
    if job.filters.calibration is not None:
        copy = run.path / "calibration.json"
        same = "filters.calibration" not in changed and calibration is None and copy.exists()
        found = read_calibration(copy if same else base_dir / job.filters.calibration)
    return Settings(job, found, parser), changed


def _filter_keys(path: Path) -> dict[str, Any]:
    """The filter keys of a YAML file: a job's `filters`, or the keys themselves."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--filters {path}: can't read it ({getattr(e, 'strerror', None) or e})") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"--filters {where}: not valid YAML ({getattr(e, 'problem', e)})") from e
    if isinstance(tree, dict) and "filters" in tree:
        tree = tree["filters"]
    elif isinstance(tree, dict) and not set(tree) & set(Filters.model_fields) and set(tree) & set(Job.model_fields):
        raise UserError(
            f"--filters {path}: the job has no `filters` section, so it filters as by default; name the keys"
        )
    if not isinstance(tree, dict):
        raise UserError(f"--filters {path}: expected filter keys (min_agreement: 0.8), or a job with `filters`")
    return tree
