"""What can be said of a model from its folder's JSON files alone, before it is loaded. No torch.

In: a folder, and the job. Out: nothing, or a `UserError` in one line: a run that can't go through must not find out
after an hour of sampling and judging. What only the weights tell is the workers' to say, when they load them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from rlaif.config import Job
from rlaif.constitution import Constitution
from rlaif.errors import UserError
from rlaif.transformers_compat import auto_source, causal_types

_WINDOWS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length",
            "seq_length", "n_ctx", "max_target_positions")  # fmt: skip
"""What architectures call the number of positions that they know, or were trained on. Some have none (Mamba)."""
_DEFAULT_POSITIONS = {"gpt2": 1024, "gpt-sw3": 1024, "gpt_bigcode": 1024, "opt": 2048, "gpt_neo": 2048, "gptj": 2048,
                      "codegen": 2048, "biogpt": 1024, "openai-gpt": 512, "ctrl": 256}  # fmt: skip
"""Of architectures with a table of positions, where a config leaves the number out."""
_STRETCHES = ("linear", "dynamic", "ntk", "yarn")
"""Kinds of RoPE scaling whose factor isn't in `max_position_embeddings` yet, unless the config says what it was."""
_BOTH_WAYS = (
    *("albert", "bert", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra"),
    *("ernie", "megatron-bert", "modernbert", "mpnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Encoders, which read in both directions unless their config says `is_decoder`."""
_NEVER_CAUSAL = ("xlm", "xlnet", "reformer")
_QUANTISERS = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4"}
_HEADS = ("ForCausalLM", "LMHead", "ForConditionalGeneration", "GenerationDecoder")
"""What is in the names of classes that predict a next token."""


def check_policy(folder: Path, job: Job) -> None:
    """Whether a model can be the policy of a job.

    Raises:
        UserError: it can't be loaded, trained or asked as the job wants.
    """
    config = _json(folder / "config.json")
    said = f"policy.model {job.policy.model}"
    _check_kind(config, said)
    if quantised := _quantised(folder, config):
        raise UserError(
            f"{said}: its weights are quantised ({quantised}), and such weights can't be trained here; give the model "
            "that it was made from, in full precision"
        )
    _check_window(config, job, said)
    _check_tokens(folder, config, said)


def check_likelihood_judge(folder: Path, job: Job, texts: Iterable[Constitution]) -> None:
    """Whether a model can judge by likelihood under these texts.

    Raises:
        UserError: it can't be loaded, or its chat template refuses, or leaves out, what is put before a prompt.
    """
    config = _json(folder / "config.json")
    said = f"judge.model {job.judge.model}"
    _check_kind(config, said)
    _check_window(config, job, said)
    _check_tokens(folder, config, said)
    if (template := _Template.of(folder)) is None:
        return
    asked: dict[tuple[str, ...], str] = {}
    for text in texts:
        for voice in text.voices():
            before = [m.role for m in voice.prefer]
            if job.policy.system_prompt is not None and "system" not in before:
                before.insert(0, "system")
            asked.setdefault((*before, "user"), f"`{voice.id}` of {text.ref}")
    for roles, what in asked.items():
        if (problem := template.problem(roles)) is not None:
            raise UserError(
                f"{said}: its chat template {problem}, and {what} puts {' and '.join(dict.fromkeys(roles[:-1]))} "
                "messages before a prompt; take a judge whose template writes them"
            )


def _check_kind(config: dict[str, Any], said: str) -> None:
    """Whether transformers has this architecture, as one that predicts a next token."""
    kind = str(config.get("model_type", ""))
    known = causal_types()
    if config.get("auto_map") and known is not None and kind not in known:
        code = config["auto_map"].get("AutoModelForCausalLM") or next(iter(config["auto_map"].values()))
        raise UserError(
            f"{said}: needs code of its own ({code}), which isn't run here; take a model whose architecture "
            "transformers has"
        )
    if config.get("is_encoder_decoder"):
        raise UserError(
            f"{said}: an encoder-decoder (`{kind}`); rlaif trains decoders, which go on where a prompt ends"
        )
    reads_both_ways = kind in _BOTH_WAYS and not _text(config).get("is_decoder")
    if kind in _NEVER_CAUSAL or reads_both_ways:
        raise UserError(f"{said}: `{kind}` reads in both directions and can't go on with a text; take a causal model")
    if known is not None and kind and kind not in known:
        raise UserError(
            f"{said}: transformers knows no causal language model of type `{kind}`; take another model, or a newer "
            "transformers"
        )
    classes = [str(c) for c in config.get("architectures") or ()]
    if classes and not any(head in c for c in classes for head in _HEADS):
        raise UserError(
            f"{said}: its weights are those of {classes[0]}, without an output layer that predicts a next token; take "
            "a causal language model (...ForCausalLM)"
        )


def _quantised(folder: Path, config: dict[str, Any]) -> str | None:
    """How the weights are quantised, in words; None when they aren't."""
    beside = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
    for name, what in beside.items():  # of tools that leave config.json alone
        if (folder / name).is_file():
            return f"{what}, {name}"
    for tree in (config, _text(config)):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(found := tree.get(key), dict):
                method = str(found.get("quant_method") or found.get("quant_algo") or "")
                if not method and (found.get("load_in_4bit") or found.get("load_in_8bit")):
                    method = "bitsandbytes"
                bits = found.get("bits") or found.get("w_bit") or (4 if found.get("load_in_4bit") else None)
                bits = bits or (8 if found.get("load_in_8bit") else None)
                return f"{_QUANTISERS.get(method, method or key)}{f', {bits} bit' if bits else ''}"
    return None


def _check_window(config: dict[str, Any], job: Job, said: str) -> None:
    found = _window(config)
    if found is None or job.sampling.max_model_len <= found[1]:
        return
    key, window = found
    room = f" (and max_tokens below that; it is {job.sampling.max_tokens})" if job.sampling.max_tokens >= window else ""
    raise UserError(
        f"{said}: knows {window} positions ({key}, config.json), sampling.max_model_len is "
        f"{job.sampling.max_model_len}; set sampling.max_model_len={window} or less{room}"
    )


def _window(config: dict[str, Any]) -> tuple[str, int] | None:
    """The longest text that a model knows positions for, and what its config calls that; None: as long as one likes,
    or not said."""
    text = _text(config)
    found = next(((k, v) for k in _WINDOWS if isinstance(v := text.get(k), int) and v > 0), None)
    if found is None and (kept := _DEFAULT_POSITIONS.get(str(text.get("model_type")))) is not None:
        found = "by default", kept
    if found is None:
        return None
    key, window = found
    if text.get("model_type") in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "data2vec-text"):
        return key, window - int(text.get("pad_token_id") or 0) - 1  # their first position comes after the padding's
    longest = float(window)
    for scaling in _rope_scalings(text):
        kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
        factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
        if not isinstance(factor, int | float):
            continue
        if isinstance(original, int):
            longest = max(longest, original * factor)
        elif kind in _STRETCHES and not str(text.get("model_type", "")).startswith("gemma3"):
            longest = max(longest, window * factor)
    return key, int(longest)


def _rope_scalings(text: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The RoPE settings of all kinds of layers."""
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(found := text.get(key), dict):
            yield found
            yield from (v for v in found.values() if isinstance(v, dict))


def _check_tokens(folder: Path, config: dict[str, Any], said: str) -> None:
    """Whether transformers has the tokenizer, and the embedding a row for every token that config or chat template
    write."""
    tokenizer = _json(folder / "tokenizer_config.json")
    code, kind = tokenizer.get("auto_map"), tokenizer.get("tokenizer_class")
    source = auto_source("tokenization_auto.py")
    own_code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if own_code and isinstance(kind, str) and source is not None:
        names = {kind, kind.removesuffix("Fast"), f"{kind}Fast"}
        plain = kind.startswith(("PreTrainedTokenizer", "TokenizersBackend"))
        if not plain and not any(f'"{name}"' in source for name in names):
            raise UserError(
                f"{said}: its tokenizer needs code of its own ({kind}), which isn't run here; take a model whose "
                "tokenizer transformers has"
            )
    text = _text(config)
    rows = text.get("vocab_size")
    if not isinstance(rows, int):
        return
    pad = text.get("pad_token_id", config.get("pad_token_id"))
    if isinstance(pad, int) and pad >= rows:
        end = text.get("eos_token_id", config.get("eos_token_id"))
        end = end[0] if isinstance(end, list) and end else end
        hint = f", for example {end}, the end token" if isinstance(end, int) and end < rows else ""
        raise UserError(
            f"{said}: pad_token_id {pad} in config.json is beyond its embedding of {rows} tokens; set one from 0 to "
            f"{rows - 1}{hint}"
        )
    template = "\n".join((chat_templates(folder) or {}).values())
    for token, number in _added_tokens(folder).items():
        if number >= rows and len(token) > 2 and token in template:
            raise UserError(
                f"{said}: its chat template writes `{token}` (token {number}), and its embedding has {rows} tokens; "
                "resize the embedding, or take the template that the model was trained with"
            )


def chat_templates(folder: Path) -> dict[str, str] | None:
    """A tokenizer's chat templates by name, as transformers finds them; None without one."""
    tokenizer = _json(folder / "tokenizer_config.json")
    written = tokenizer.get("chat_template")
    found = {"default": written} if isinstance(written, str) else {}
    if isinstance(written, list):
        found = {
            str(t["name"]): str(t["template"])
            for t in written
            if isinstance(t, dict) and {"name", "template"} <= set(t)
        }
    files = {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
    files |= {f.stem: f for f in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if files:  # they take the place of what tokenizer_config.json has
        found = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    return found or None


def _added_tokens(folder: Path) -> dict[str, int]:
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return {str(t.get("content")): int(i) for i, t in decoder.items() if isinstance(t, dict)}
    found = _json(folder / "tokenizer.json").get("added_tokens")
    return {str(t.get("content")): int(t.get("id", 0)) for t in found or () if isinstance(t, dict)}


class _Template:
    """A chat template rendered as transformers does it, for the question whether it takes some messages."""

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: "2026-01-01"
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        self._template = environment.from_string(re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", source))
        self._names = names

    @classmethod
    def of(cls, folder: Path) -> _Template | None:
        """The template that a folder's tokenizer renders with; None where there is none, or none that is understood."""
        source = (chat_templates(folder) or {}).get("default")
        if source is None:
            return None
        tokenizer = _json(folder / "tokenizer_config.json")
        special = {k: v["content"] if isinstance(v, dict) else v for k, v in tokenizer.items() if k.endswith("_token")}
        try:
            template = cls(source, {k: v for k, v in special.items() if isinstance(v, str)})
            plain = template._whole(("user",))
        except Exception:  # templates raise what they like, and may use what only transformers has
            return None
        return template if plain else None

    def problem(self, roles: tuple[str, ...]) -> str | None:
        """What the template does to messages of these roles, in words; None when it writes them all."""
        try:
            return None if self._whole(roles) else f"leaves out a message of the roles {', '.join(roles)}"
        except _Refused as e:
            return f"refuses the roles {', '.join(roles)} ({' '.join(str(e).split())})"
        except Exception:  # what goes wrong otherwise is the worker's to say
            return None

    def _whole(self, roles: tuple[str, ...]) -> bool:
        """Whether all that is said is rendered, given as text or as parts."""
        said = [(role, f"qzprobe{number}z") for number, role in enumerate(roles)]
        for as_parts in (False, True):
            given = [{"role": r, "content": [{"type": "text", "text": t}] if as_parts else t} for r, t in said]
            rendered = self._template.render(
                **self._names, messages=given, add_generation_prompt=True, tools=None, documents=None
            )
            if "'type'" not in rendered and all(text in rendered.casefold() for _, text in said):
                return True
        return False


class _Refused(jinja2.TemplateError):
    pass


def _refuse(message: str) -> None:
    raise _Refused(message)


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that is about text: models that also see have one of their own."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(inner := config.get(key), dict):
            return inner
    return config


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); the model folder is damaged") from e
    return content if isinstance(content, dict) else {}
