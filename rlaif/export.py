"""A policy as plain transformers files with a model card that says what made it."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlaif.errors import UserError
from rlaif.models import hub_id
from rlaif.store import RunDir, disk_errors, make_folder, replace_dir
from rlaif.summary import summarise


def policy_path(run: RunDir, iteration: int | None = None) -> tuple[int, Path]:
    """(iterations behind it, folder) of a policy; the newest when `iteration` is None.

    Raises:
        UserError: the run has no such policy, or its weights were pruned.
    """
    here = {k + 1: run.iteration(k) for k in run.iterations()}
    # A folder whose update isn't complete belongs to no version yet.
    have = {k: p for k, stage in here.items() if stage.is_complete("updates") and (p := stage.path / "policy").is_dir()}
    if not have:
        raise UserError(f"{run.path}: no policy was trained yet; `rlaif status {run.path}` says where the run stands")
    wanted = max(have) if iteration is None else iteration
    if wanted not in have:
        kept = ", ".join(map(str, have))
        raise UserError(f"{run.path}: no weights after {wanted} iterations; kept are those after {kept}")
    return wanted, have[wanted]


def export_policy(run: RunDir, to: Path, iteration: int | None = None) -> Path:
    """Copies a policy's files and adds a README.md (model card). Returns the folder.

    Raises:
        UserError: `to` exists already, or there is no such policy.
    """
    if to.exists():
        raise UserError(f"{to}: exists already; name a new folder")
    updates, source = policy_path(run, iteration)
    card = model_card(run, updates)
    temporary = to.with_name(to.name + ".partial")
    with disk_errors(to):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for file in sorted(source.rglob("*")):  # copytree reports a full disk as a list of files
                if file.is_file():
                    copy = temporary / file.relative_to(source)
                    make_folder(copy.parent)
                    shutil.copy2(file, copy)
            (temporary / "README.md").write_text(card)
            replace_dir(temporary, to)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return to


def model_card(run: RunDir, updates: int) -> str:
    """Markdown: base model, texts, data, evaluation, versions, how to reproduce."""
    header, summary = run.header, summarise(run)
    job = header["job"]
    trained = summary.iterations[:updates]
    # The first versions counted the pairs of a skipped update, too.
    pairs = sum(m.trained_pairs for m in trained if m.steps)
    texts = list(dict.fromkeys(f"{m.constitution} ({m.constitution.hash})" for m in trained))
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {base}"] if (base := hub_id(job["policy"]["model"])) else []),
        "tags: [rlaif, dpo]",
        "---",
        f"# {run.path.name}, after {updates} iterations",
        "",
        f"Trained with rlaif {header['rlaif']} from `{job['policy']['model']}` by online preference learning: its own "
        f"answers were compared by the `{job['judge']['kind']}` judge `{job['judge']['model']}` under a written "
        "constitution, and pairs whose label was not consistent were dropped.",
        "",
        f"- constitutions in force, in order: {', '.join(texts)}",
        f"- pairs trained on: {pairs} of {sum(m.pairs for m in trained)} judged",
        f"- weights digest: `{run.iteration(updates - 1).policy_made()}`",
        f"- run: job digest `{header['job_digest']}`, code revision `{header['revision']}`",
        "",
        "## Held-out evaluation against the base policy",
        "",
        "| after | text | win rate (95 %) | words | ends by itself | KL per token |",
        "|---|---|---|---|---|---|",
    ]
    for e in summary.evaluations:
        low, high = e.win_interval or (0, 1)
        win = "" if e.win_rate is None else f"{e.win_rate:.2f} ({low:.2f}-{high:.2f})"
        if e.abstained:
            win = f"{win or '-'}, {e.abstained} of {e.answers} abstained"
        kl = "" if e.kl_per_token is None else f"{e.kl_per_token:.3f}"
        text = e.constitution if e.updates else "base"
        lines.append(f"| {e.updates} | {text} | {win} | {e.mean_words:.1f} | {e.ended_share:.0%} | {kl} |")
    lines += [
        "",
        "The win rate says how far the policy follows the text in the judge's eyes; it is no measure of truth.",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in header["packages"].items()),
        "",
    ]
    return "\n".join(lines)
