"""A policy as plain transformers files with a model card that says what made it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlaif import models
from rlaif.audit.summary import deciding_line, reference_line, retention_lines, summarise
from rlaif.errors import UserError
from rlaif.models import hub_id
from rlaif.records import LENGTH_UNKNOWN, EvaluationMetrics
from rlaif.rundir.store import RunDir, disk_errors, make_folder, replace_dir

_Scaled = dict[str, tuple[Any, float]]
"""An adapter's tensors by name, each with the scale of its product."""


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
    _refuse_existing(to)
    updates, source = policy_path(run, iteration)
    card = model_card(run, updates)
    with _made_whole(to) as temporary:
        for file in sorted(source.rglob("*")):  # copytree reports a full disk as a list of files
            if file.is_file():
                copy = temporary / file.relative_to(source)
                make_folder(copy.parent)
                shutil.copy2(file, copy)
        (temporary / "README.md").write_text(card)
    return to


def export_adapter(run: RunDir, to: Path, iteration: int | None = None) -> Path:
    """Writes the newest policy's LoRA alone, as peft does (fp32), with a model card. Returns the folder.

    It belongs on `policy.model`: where the run started from an adapter, both are in it, side by side.

    Raises:
        UserError: `to` exists already, the run trained no LoRA, or that policy's adapter isn't kept.
    """
    from safetensors.numpy import load_file, save_file

    _refuse_existing(to)
    job = run.job()
    lora = job.learner.lora
    if lora is None:
        raise UserError(f"{run.path}: trained full weights, there is no adapter; leave out --adapter")
    updates, _ = policy_path(run, iteration)
    state = run.path / "learner" / f"{updates - 1:04d}" / "weights.safetensors"
    if not state.is_file():
        raise UserError(
            f"{run.path}: the adapter after {updates} iterations isn't kept, only the newest one is; leave out "
            "--iteration, or --adapter"
        )
    weights = {name.replace(".default.", "."): value for name, value in load_file(state).items()}
    modules = {_module(name) for name in weights}
    if unlike := sorted(m for m in modules if not m or m.endswith("experts") or ".base_layer" in m):
        raise UserError(f"{run.path}: the adapter of `{unlike[0]}` can't be exported alone; leave out --adapter")
    rank, alpha = lora.r, lora.alpha
    if job.policy.adapter is not None:
        first = first_adapter(run, job.policy.model, job.policy.adapter)
        weights = _side_by_side(first, {name: (v, lora.alpha / lora.r) for name, v in weights.items()})
        rank = alpha = next(v.shape[0] for name, v in weights.items() if ".lora_A." in name)
        modules = {_module(name) for name in weights}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": job.policy.model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    card = model_card(run, updates).replace("library_name: transformers", "library_name: peft", 1)
    with _made_whole(to) as temporary:
        make_folder(temporary)
        save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (temporary / "README.md").write_text(card)
    return to


def _module(name: str) -> str:
    """The layer that a tensor of an adapter belongs to."""
    return name.removeprefix("base_model.model.").rpartition(".lora_")[0]


def first_adapter(run: RunDir, model: str, adapter: str) -> _Scaled:
    """The tensors of the LoRA that a run started from, each with its scale.

    Raises:
        UserError: it is more than products of two matrices, or no longer what the run started from.
    """
    if models.digest_of(models.resolve_policy(model, adapter)) != run.header["models"]["policy"]:
        raise UserError(f"{run.path}: {model} or {adapter} changed since the run was started; restore them")
    folder = models.resolve_adapter(adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    more = [
        k
        for k in ("use_dora", "modules_to_save", "lora_bias", "target_parameters", "layer_replication")
        if config.get(k)
    ]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    more += (
        ["init_lora_weights"] if config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva") else []
    )
    tensors = _tensors(folder / "adapter_model.safetensors") if not more else {}
    more += [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if more or str(config.get("peft_type")).upper() != "LORA":
        what = more[0] if more else config.get("peft_type")
        raise UserError(
            f"{run.path}: started from {adapter}, which is no plain LoRA ({what}), so that no adapter alone can hold "
            "what came of it; leave out --adapter"
        )
    scaled = {}
    for name, value in tensors.items():
        rank = tensors[name.replace(".lora_B.", ".lora_A.")].shape[0]
        patterns = config.get("alpha_pattern") or {}
        own = (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", _module(name)))
        alpha = next(own, config.get("lora_alpha", 8))
        scaled[name] = value, alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return scaled


def _side_by_side(*adapters: _Scaled) -> dict[str, Any]:
    """Several LoRAs as one of scale 1: B₁A₁s₁ + B₂A₂s₂ = [B₁s₁ B₂s₂] [A₁; A₂], filled up with zeros to one rank."""
    import numpy as np

    modules = sorted({name.rpartition(".lora_")[0] for adapter in adapters for name in adapter})
    out = {}
    for module in modules:
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        mine = [adapter for adapter in adapters if a in adapter]
        out[a] = np.concatenate([adapter[a][0] for adapter in mine], axis=0)
        out[b] = np.concatenate([adapter[b][0] * adapter[b][1] for adapter in mine], axis=1)
    rank = max(value.shape[0] for name, value in out.items() if ".lora_A." in name)
    for name, value in out.items():
        by_rank = (rank - value.shape[0], 0) if ".lora_A." in name else (0, rank - value.shape[1])
        out[name] = np.pad(value, ((0, by_rank[0]), (0, by_rank[1]))).astype(np.float32)
    return out


def _tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file as fp32 arrays; numpy itself has no bf16."""
    import numpy as np
    from safetensors import deserialize

    if not path.is_file():
        raise UserError(f"{path}: no such file; save the adapter as safetensors, or leave out --adapter")
    out = {}
    for name, tensor in deserialize(path.read_bytes()):
        kinds = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
        value = np.frombuffer(tensor["data"], kinds[tensor["dtype"]]).reshape(tensor["shape"])
        if tensor["dtype"] == "BF16":
            value = (value.astype("<u4") << 16).view("<f4")
        out[name] = value.astype(np.float32)
    return out


def _refuse_existing(to: Path) -> None:
    if to.exists():
        raise UserError(f"{to}: exists already; name a new folder")


@contextmanager
def _made_whole(to: Path) -> Iterator[Path]:
    """A temporary folder that becomes `to` when all of it is written; nothing is left of it otherwise."""
    temporary = to.with_name(to.name + ".partial")
    with disk_errors(to):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            yield temporary
            replace_dir(temporary, to)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _beside_the_table(evaluations: Iterable[EvaluationMetrics], updates: int) -> list[str]:
    """What the voices that train and the reference judge say of this policy, and what it kept of the base policy's
    abilities, where that was measured."""
    mine = next((e for e in evaluations if e.updates == updates), None)
    if mine is None:
        return []
    by_reference = reference_line(mine)
    never_trains = f"{by_reference}; it never trains" if by_reference else None
    lines = [*filter(None, (deciding_line(mine), never_trains)), *retention_lines(mine.retention)]
    return [*(f"- {' '.join(line.split())}" for line in lines), *([""] if lines else [])]


def model_card(run: RunDir, updates: int) -> str:
    """Markdown: base model, texts, data, evaluation, versions, how to reproduce."""
    header, summary = run.header, summarise(run)
    job = header["job"]
    trained = summary.iterations[:updates]
    # The first versions counted the pairs of a skipped update, too.
    pairs = sum(m.trained_pairs for m in trained if m.steps)
    texts = list(dict.fromkeys(f"{m.constitution} ({m.constitution.hash})" for m in trained))
    adapter = f" with `{job['policy']['adapter']}` merged in" if job["policy"].get("adapter") else ""
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {base}"] if (base := hub_id(job["policy"]["model"])) else []),
        "tags: [rlaif, dpo]",
        "---",
        f"# {run.path.name}, after {updates} iterations",
        "",
        f"Trained with rlaif {header['rlaif']} from `{job['policy']['model']}`{adapter} by online preference learning: "
        f"its own answers were compared by the `{job['judge']['kind']}` judge `{job['judge']['model']}` under a "
        "written constitution, and pairs whose label was not consistent were dropped.",
        "",
        f"- constitutions in force, in order: {', '.join(texts)}",
        *(
            [f"- rendered with the chat template's arguments `{json.dumps(args)}`: give it the same"]
            if (args := job["policy"].get("chat_template_args"))
            else []
        ),
        f"- pairs trained on: {pairs} of {sum(m.pairs for m in trained)} judged",
        f"- weights digest: `{run.iteration(updates - 1).policy_made()}`",
        f"- run: job digest `{header['job_digest']}`, code revision `{header['revision']}`",
        "",
        "## Held-out evaluation against the base policy",
        "",
        "| after | text | win rate (95 %) | at equal length (95 %) | words | ends by itself | KL per token (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in summary.evaluations:
        low, high = e.win_interval or (0, 1)
        win = "" if e.win_rate is None else f"{e.win_rate:.2f} ({low:.2f}-{high:.2f})"
        if e.abstained:
            win = f"{win or '-'}, {e.abstained} of {e.answers} abstained"
        at_length = "" if e.length_controlled_win_rate is None else f"{e.length_controlled_win_rate:.2f}"
        if at_length and e.length_controlled_interval:
            at_length += f" ({e.length_controlled_interval[0]:.2f}-{e.length_controlled_interval[1]:.2f})"
        if e.length_controlled_unknown:
            at_length = f"unknown: {LENGTH_UNKNOWN[e.length_controlled_unknown]}"
        kl = "" if e.kl_per_token is None or e.kl_by_older_version else f"{e.kl_per_token:.3f}"
        if kl and e.kl_answers and e.kl_interval:
            kl += f" ({e.kl_interval[0]:.3f}-{e.kl_interval[1]:.3f})"
        text = e.constitution if e.updates else "base"
        lines.append(
            f"| {e.updates} | {text} | {win} | {at_length} | {e.mean_words:.1f} | {e.ended_share:.0%} | {kl} |"
        )
    lines += [
        "",
        *_beside_the_table(summary.evaluations, updates),
        "The win rate says how far the policy follows the text in the judge's eyes; it is no measure of truth.",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in header["packages"].items()),
        "",
    ]
    return "\n".join(lines)
