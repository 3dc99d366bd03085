"""A run's preferences as a dataset that TRL's trainers take: conversational prompt, chosen, rejected, and provenance.

`datasets` is imported here and only when it is needed: nothing else of the audit wants it.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlaif.audit.index import Index
from rlaif.errors import RlaifError, UserError
from rlaif.records import HumanLabel, Preference, stored
from rlaif.review.labels import in_force, labels_noted, read_labels
from rlaif.rundir.store import RunDir, disk_errors

SUFFIXES = (".parquet", ".jsonl")

_ROWS = """
SELECT f.pair_id, f.iteration AS trained_in, f.judged_in AS iteration, f.source, c.text_name AS constitution,
    f.constitution AS constitution_hash, x.policy_iteration, x.policy_digest, f.p_chosen, f.agreement,
    coalesce(v.valid_votes, 0) AS valid_votes, coalesce(v.abstentions, 0) AS abstentions, v.judges, v.judge_models,
    f.prompt_id, q.messages, x.text AS chosen_text, y.text AS rejected_text, x.finish_reason AS chosen_finish_reason,
    y.finish_reason AS rejected_finish_reason, f.line,
    EXISTS (
        SELECT 1 FROM trained g WHERE g.pair_id = f.pair_id AND g.iteration > f.iteration AND g.chosen_id <> f.chosen_id
    ) AS superseded
FROM preferences f
LEFT JOIN completions x ON x.completion_id = f.chosen_id LEFT JOIN completions y ON y.completion_id = f.rejected_id
LEFT JOIN constitutions c ON c.constitution = f.constitution
LEFT JOIN (SELECT prompt_id, any_value(messages) AS messages FROM prompts GROUP BY ALL) q ON q.prompt_id = f.prompt_id
LEFT JOIN (
    SELECT pair_id, count(*) FILTER (outcome <> 'abstain' AND NOT guard) AS valid_votes,
        count(*) FILTER (outcome = 'abstain' AND NOT guard) AS abstentions,
        list_sort(list(DISTINCT judge)) AS judges, list_sort(list(DISTINCT model)) AS judge_models
    FROM votes WHERE iteration IS NOT NULL AND pair_id IN (SELECT pair_id FROM preferences WHERE iteration = ?)
    GROUP BY pair_id
) v ON v.pair_id = f.pair_id
WHERE f.iteration = ? AND f.source <> 'replay' AND (? IS NULL OR f.iteration = ?)
    AND (f.pair_id, f.chosen_id) IN (SELECT (pair_id, chosen_id) FROM trained)
    AND (? IS NULL OR c.text_name = ? OR starts_with(f.constitution, ?))
ORDER BY f.line
"""


def preference_rows(
    index: Index, iteration: int | None = None, constitution: str | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of the dataset, in the order of the log; a replayed pair comes once, where it first was in the mix.

    A pair of a skipped update comes only if a later update replayed it: no other was trained on.

    `iteration` is counted from 0, `constitution` is name@version or the beginning of a hash. Prompt, chosen and
    rejected are lists of messages, as TRL's conversational preference format has them. Texts whose own file is gone
    or damaged come from the preference's line, which has them too. `superseded` is a row whose pair was trained with
    the other side later: a person corrected its label.
    """
    for k in index.run.iterations():
        asked = [k, k, iteration, iteration, constitution, constitution, constitution]
        rows = index.rows(_ROWS, asked)
        bare = [r["line"] for r in rows if not r["messages"] or r["chosen_text"] is None or r["rejected_text"] is None]
        lines = index.source_lines("preferences", {"iteration": k, "evaluation": None}, bare)
        labels = _labels_then(index.run, k) if any(r["source"] == "human" for r in rows) else {}
        for r in rows:
            messages, chosen, rejected = r.pop("messages"), r.pop("chosen_text"), r.pop("rejected_text")
            line = lines.get(r.pop("line"))
            own = stored(Preference, line) if line else None
            label = labels.get(r["pair_id"]) if r["source"] == "human" else None
            asked_text = own.prompt if own else r["prompt_id"]
            yield {
                "prompt": [dict(m) for m in messages] if messages else [{"role": "user", "content": asked_text}],
                "chosen": [{"role": "assistant", "content": own.chosen if own and chosen is None else chosen}],
                "rejected": [{"role": "assistant", "content": own.rejected if own and rejected is None else rejected}],
                **{name: value for name, value in r.items() if name != "trained_in"},
                "label_author": label.author if label else None,
                "label_time": label.time if label else None,
                "run": str(index.run.path.name),
            }


def _labels_then(run: RunDir, k: int) -> dict[str, HumanLabel]:
    """The labels in force when iteration k took them; none where its meta file doesn't say how many there were."""
    try:
        size = labels_noted(run.iteration(k)).get("size")
    except (RlaifError, OSError):
        return {}
    return in_force(read_labels(run, size).labels) if isinstance(size, int) else {}


def export_preferences(index: Index, to: Path, iteration: int | None = None, constitution: str | None = None) -> int:
    """Writes the preferences to a Parquet or JSONL file; how many there are.

    Raises:
        UserError: another suffix, the file exists, there are no preferences, or `datasets` isn't installed.
    """
    if to.suffix not in SUFFIXES:
        raise UserError(f"--to {to}: the suffix says what to write: {' or '.join(SUFFIXES)}")
    if to.exists():
        raise UserError(f"--to {to}: exists already; name another file")
    try:
        import datasets
    except ImportError as e:
        raise UserError("export needs the `datasets` package: pip install datasets") from e

    if next(preference_rows(index, iteration, constitution), None) is None:
        raise UserError(f"{index.run.path}: no such preferences; `rlaif audit {index.run.path}` shows what was kept")
    datasets.disable_progress_bars()
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache, disk_errors(to):
        made = datasets.Dataset.from_generator(
            preference_rows,
            features=_features(datasets),
            cache_dir=cache,
            gen_kwargs={"index": index, "iteration": iteration, "constitution": constitution},
            fingerprint=uuid.uuid4().hex,  # its own would pickle the index
        )
        partial = to.with_name(f"{to.name}.partial")
        if to.suffix == ".parquet":
            made.to_parquet(str(partial))
        else:
            made.to_json(str(partial), force_ascii=False)
        partial.replace(to)
        return len(made)


def _features(datasets: Any) -> Any:
    text, real, whole = datasets.Value("string"), datasets.Value("float64"), datasets.Value("int64")
    messages = datasets.List({"role": text, "content": text})
    return datasets.Features(
        {
            "prompt": messages, "chosen": messages, "rejected": messages,
            "pair_id": text, "iteration": whole, "source": text, "constitution": text, "constitution_hash": text,
            "policy_iteration": whole, "policy_digest": text, "p_chosen": real, "agreement": real,
            "valid_votes": whole, "abstentions": whole, "judges": datasets.List(text),
            "judge_models": datasets.List(text),
            "prompt_id": text, "chosen_finish_reason": text, "rejected_finish_reason": text,
            "superseded": datasets.Value("bool"), "label_author": text, "label_time": text, "run": text,
        }
    )  # fmt: skip
