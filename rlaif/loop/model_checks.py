"""What can be said of a model from its folder's JSON files alone, before it is loaded. No torch.

In: a folder, and the job. Out: nothing, or a `UserError` in one line: a run that can't go through must not find out
after an hour of sampling and judging. What only the weights tell is the workers' to say, when they load them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
import jinja2.sandbox

from rlaif.config import ChatSettings, Job
from rlaif.constitutions.constitution import Constitution
from rlaif.errors import UserError
from rlaif.judging.transport import check_url
from rlaif.models import names_no_quantiser
from rlaif.rendering import Renderer
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


def check_likelihood_judge(folder: Path, job: Job, constitutions: Iterable[Constitution]) -> None:
    """Whether a model can judge by likelihood under these texts.

    Raises:
        UserError: it can't be loaded, or its chat template refuses, or leaves out, what is put before a prompt.
    """
    config = _json(folder / "config.json")
    said = f"judge.model {job.judge.model}"
    _check_kind(config, said)
    _check_window(config, job, said)
    _check_tokens(folder, config, said)
    renderer = _renderer(folder, getattr(job.judge, "chat_template_args", {}), f"{said}: its chat template")
    if renderer is None:
        return
    asked: dict[tuple[str, ...], str] = {}
    for constitution in constitutions:
        for voice in constitution.voices():
            before = [m.role for m in voice.prefer]
            if job.policy.system_prompt is not None and "system" not in before:
                before.insert(0, "system")
            asked.setdefault((*before, "user"), f"`{voice.id}` of {constitution.ref}")
    for roles, what in asked.items():
        try:
            renderer.check_roles(roles)
        except UserError as e:
            if e.__cause__ is not None and not isinstance(e.__cause__, _Refused):
                continue  # what goes wrong otherwise is the worker's to say
            first = " and ".join(dict.fromkeys(roles[:-1]))
            raise UserError(
                f"{e}; {what} puts {first} messages before a prompt: take a judge whose template writes them"
            ) from e


def _check_kind(config: dict[str, Any], said: str) -> None:
    """Whether transformers has this architecture, as one that predicts a next token."""
    kind = str(config.get("model_type") or "")
    known = causal_types()
    code = _own_code(config.get("auto_map"), "AutoModelForCausalLM")
    if code and known is not None and kind not in known:
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
    named = config.get("architectures")
    classes = [named] if isinstance(named, str) and named else []
    if isinstance(named, list):
        classes = [str(c) for c in named]
    if classes and not any(head in c for c in classes for head in _HEADS):
        raise UserError(
            f"{said}: its weights are those of {classes[0]}, without an output layer that predicts a next token; take "
            "a causal language model (...ForCausalLM)"
        )


def _own_code(auto_map: Any, name: str) -> str | None:
    """The class, in code of a model's own, that `auto_map` names; it is written in several forms."""
    if isinstance(auto_map, dict):
        auto_map = auto_map.get(name) or list(auto_map.values())
    while isinstance(auto_map, list | dict):
        auto_map = next((v for v in (auto_map.values() if isinstance(auto_map, dict) else auto_map) if v), None)
    return str(auto_map) if auto_map else None


def _quantised(folder: Path, config: dict[str, Any]) -> str | None:
    """How the weights are quantised, in words; None when they aren't."""
    beside = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
    for name, what in beside.items():  # of tools that leave config.json alone
        if (folder / name).is_file():
            return f"{what}, {name}"
    for tree in (config, _text(config)):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(found := tree.get(key), dict) and not names_no_quantiser(found):
                method = str(found.get("quant_method") or found.get("quant_algo") or "")
                if not method and (found.get("load_in_4bit") or found.get("load_in_8bit")):
                    method = "bitsandbytes"
                bits = found.get("bits") or found.get("w_bit") or (4 if found.get("load_in_4bit") else None)
                bits = bits or (8 if found.get("load_in_8bit") else None)
                return f"{_QUANTISERS.get(method, method or key)}{f', {bits} bit' if bits else ''}"
    return None


def _check_window(config: dict[str, Any], job: Job, said: str) -> None:
    for scaling in _rope_scalings(_text(config)):
        factor = scaling.get("factor")
        if _rope_kind(scaling) != "default" and factor is not None and not (_is_number(factor) and factor > 0):
            raise UserError(
                f"{said}: the factor of its RoPE scaling in config.json is {factor!r}; set the number above 0 that the "
                "model was trained with"
            )
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
        pad = text.get("pad_token_id")
        return key, window - (pad if isinstance(pad, int) else 0) - 1  # their first position comes after the padding's
    longest = float(window)
    for scaling in _rope_scalings(text):
        factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
        if not _is_number(factor):
            continue
        if _is_number(original):
            longest = max(longest, original * factor)
        elif _rope_kind(scaling) in _STRETCHES and not str(text.get("model_type", "")).startswith("gemma3"):
            longest = max(longest, window * factor)
    return key, int(longest)


def _rope_kind(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether it can be reckoned with: JSON as Python reads it has Infinity and NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
        try:
            found = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
        except (OSError, ValueError) as e:
            raise UserError(f"{folder}: a chat template isn't readable ({e}); the model folder is damaged") from e
    return found or None


def _added_tokens(folder: Path) -> dict[str, int]:
    """The tokens that a tokenizer adds, with their numbers, as far as they are told."""
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(decoder, dict):
        told = [(t, number) for number, t in decoder.items()]
    else:
        listed = decoder if isinstance(decoder, list) else _json(folder / "tokenizer.json").get("added_tokens")
        told = [(t, t.get("id")) for t in (listed if isinstance(listed, list) else ()) if isinstance(t, dict)]
    found = {}
    for token, number in told:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and re.fullmatch(r"[0-9]{1,18}", str(number)):
            found[content] = int(number)
    return found


def _renderer(folder: Path, template_args: Mapping[str, Any], owner: str) -> Renderer | None:
    """A renderer with the template that a folder's tokenizer renders with; None where there is none, or none that is
    understood without transformers.

    Raises:
        UserError: the template doesn't read one of the arguments.
    """
    source = (chat_templates(folder) or {}).get("default")
    if source is None:
        return None
    tokenizer = _json(folder / "tokenizer_config.json")
    special = {k: v.get("content") if isinstance(v, dict) else v for k, v in tokenizer.items() if k.endswith("_token")}
    try:
        template = _Template(source, {k: v for k, v in special.items() if isinstance(v, str)})
    except Exception:  # templates raise what they like, and may use what only transformers has
        return None
    renderer = Renderer(template, template_args, owner)
    try:
        renderer.check_roles(("user",))
    except UserError:  # it may use what only transformers has
        return None
    return renderer


class _Template:
    """The part of a tokenizer that writes messages, by its files alone: a chat template as transformers renders it."""

    def __init__(self, source: str, names: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: "2026-01-01"
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        self.chat_template = source
        self._template = environment.from_string(re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", source))
        self._names = names

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **template_args: Any
    ) -> str:
        """As in transformers, as text."""
        given = {"tools": None, "documents": None, **self._names, **template_args}
        return self._template.render(messages=conversation, add_generation_prompt=add_generation_prompt, **given)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Nothing here knows tokens."""
        raise NotImplementedError


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
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); the model folder is damaged") from e
    return content if isinstance(content, dict) else {}


def check_addresses(job: Job) -> None:
    """Whether the servers that a job names could be there, without asking: for a dry run, too.

    Raises:
        UserError: one couldn't.
    """
    for url in job.sampling.addresses:
        check_url(url, "sampling.base_url", "http(s)://HOST[:PORT]")
    for judge in (job.judge, job.eval.reference_judge):
        if isinstance(judge, ChatSettings) and not judge.serve:
            for juror in judge.jurors:
                for url in juror.addresses:
                    check_url(url)
