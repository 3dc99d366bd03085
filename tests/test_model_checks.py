"""What a model's JSON files tell before it is loaded: one line, exit 2, before anything is sampled."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif import transformers_compat
from rlaif.cli import app
from rlaif.config import Job, parse_job
from rlaif.constitutions.constitution import Constitution, parse_constitution
from rlaif.errors import UserError
from rlaif.loop import launch
from rlaif.loop.model_checks import check_likelihood_judge, check_policy
from rlaif.models import without_empty_quantisation
from tests.conftest import make_project, project_job
from tests.stubs import Quiet, text

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "eos_token_id": 2}
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}"
)
"""As Gemma's first."""


def folder(root: Path, tokenizer: dict[str, Any] | None = None, **config: Any) -> Path:
    (root / "config.json").write_text(json.dumps({**LLAMA, **config}))
    (root / "tokenizer_config.json").write_text(json.dumps(tokenizer or {}))
    return root


def job(max_model_len: int = 1024, **changes: Any) -> Job:
    tree: dict[str, Any] = {"constitution": "rules", "sampling": {"max_model_len": max_model_len, "max_tokens": 16}}
    return parse_job({**tree, "policy": {"model": "M"}, "judge": {"model": "J"}, **changes}, "test")


def refusal(path: Path, of: Job) -> str:
    with pytest.raises(UserError) as error:
        check_policy(path, of)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    return str(error.value)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 64, "n_ctx": 64}, 64),
        ({"model_type": "opt", "architectures": ["OPTForCausalLM"], "max_position_embeddings": 2048}, 2048),
        ({"model_type": "mpt", "architectures": ["MptForCausalLM"], "max_seq_len": 512}, 512),
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"], "seq_length": 300}, 300),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, 1024),
        ({"max_position_embeddings": 256}, 256),
        ({"max_position_embeddings": 256, "rope_scaling": None}, 256),
        ({"max_position_embeddings": 256, "rope_scaling": {"type": "linear", "factor": 4.0}}, 1024),
        ({"max_position_embeddings": 256, "rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": YARN}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": YARN}, 2048),
        ({"max_position_embeddings": 900, "rope_scaling": {**YARN, "type": "llama3", "factor": 1.5}}, 900),
        ({"max_position_embeddings": 900, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, 900),
        (
            {
                "max_position_embeddings": 900,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}},
                "model_type": "gemma3_text",
            },
            900,
        ),
        ({"model_type": "gemma3", "architectures": None, "text_config": {"max_position_embeddings": 700}}, 700),
        ({"model_type": "roberta", "is_decoder": True, "max_position_embeddings": 514, "pad_token_id": 1}, 512),
    ],
)
def test_a_window_smaller_than_max_model_len(tmp_path: Path, config: dict[str, Any], window: int) -> None:
    path = folder(tmp_path, **config)
    check_policy(path, job(window))
    message = refusal(path, job(window + 1))
    assert message.startswith(f"policy.model M: knows {window} positions (")
    assert f"set sampling.max_model_len={window} or less" in message
    with pytest.raises(UserError, match=rf"judge.model J: knows {window} positions"):
        check_likelihood_judge(path, job(window + 1), [])


@pytest.mark.parametrize("config", [{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, {}])
def test_a_model_without_a_window_takes_any(tmp_path: Path, config: dict[str, Any]) -> None:
    check_policy(folder(tmp_path, **config), job(100_000))


@pytest.mark.parametrize(
    ("quantised", "says"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes, 8 bit"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ, 4 bit"),
        ({"quant_method": "awq", "bits": 4}, "AWQ, 4 bit"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": []}, "MXFP4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_quantised_weights_are_refused_by_name(tmp_path: Path, quantised: dict[str, Any], says: str) -> None:
    message = refusal(folder(tmp_path, quantization_config=quantised), job())
    assert message.startswith(f"policy.model M: its weights are quantised ({says})")
    check_likelihood_judge(tmp_path, job(), [])  # a judge doesn't train


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_quantised_weights_that_a_file_beside_tells_of(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert f"its weights are quantised ({'ModelOpt' if name.startswith('hf') else ''}" in refusal(
        folder(tmp_path), job()
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "decoder"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "an encoder-decoder (`bart`)"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "`bert` reads in both directions"),
        ({"model_type": "roberta", "architectures": ["RobertaForCausalLM"]}, "`roberta` reads in both directions"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "those of LlamaForSequenceClassification"),
        ({"architectures": ["LlamaModel"]}, "those of LlamaModel, without an output layer"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "no causal language model of type `vit`"),
        ({"model_type": "brand_new", "architectures": ["BrandNewForCausalLM"]}, "of type `brand_new`"),
        (
            {"model_type": "brand_new", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "modeling_x.X"}},
            "needs code of its own (modeling_x.X)",
        ),
        ({"model_type": "brand_new", "auto_map": {"AutoModel": "m.X"}, "architectures": None}, "code of its own (m.X)"),
    ],
)  # fmt: skip
def test_models_that_go_on_with_no_text(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    pytest.importorskip("transformers")
    assert says in refusal(folder(tmp_path, **config), job())


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoConfig": "x.Y"}},
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        {"architectures": None},
        {"architectures": ["AutoModelForCausalLMWithValueHead"]},
    ],
)
def test_what_transformers_has_itself_goes_through(tmp_path: Path, config: dict[str, Any]) -> None:
    check_policy(folder(tmp_path, **config), job())


def test_a_tokenizer_with_code_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = {"auto_map": {"AutoTokenizer": ["tokenization_my.MyTokenizer", None]}}
    for kind in ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None):
        check_policy(folder(tmp_path, {**code, "tokenizer_class": kind}), job())
    check_policy(folder(tmp_path, {"tokenizer_class": "MyTokenizer"}), job())
    message = refusal(folder(tmp_path, {**code, "tokenizer_class": "MyTokenizer"}), job())
    assert "its tokenizer needs code of its own (MyTokenizer)" in message


@pytest.mark.parametrize("place", ["config", "text_config"])
@pytest.mark.parametrize("pad", [100, 49152])
def test_a_pad_beyond_the_embedding(tmp_path: Path, place: str, pad: int) -> None:
    ids = {"pad_token_id": pad, "vocab_size": 100, "eos_token_id": [2, 3]}
    path = folder(tmp_path, **(ids if place == "config" else {"text_config": ids}))
    message = refusal(path, job())
    assert f"pad_token_id {pad} in config.json is beyond its embedding of 100 tokens" in message
    assert "for example 2, the end token" in message


@pytest.mark.parametrize("pad", [None, 0, 99, -1])
def test_a_pad_within_the_embedding(tmp_path: Path, pad: int | None) -> None:
    check_policy(folder(tmp_path, pad_token_id=pad), job())


def test_a_template_that_writes_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    added = {"100": {"content": "<|im_start|>"}, "99": {"content": "<|im_end|>"}, "101": {"content": "<unused>"}}
    path = folder(tmp_path, {"chat_template": CHATML, "added_tokens_decoder": added})
    assert "its chat template writes `<|im_start|>` (token 100)" in refusal(path, job())
    del added["100"]
    check_policy(folder(tmp_path, {"chat_template": CHATML, "added_tokens_decoder": added}), job())


def rules(extra: str = "") -> Constitution:
    return parse_constitution(text() + extra, "rules", 1, "test")


EXAMPLES = """
summary: Text.
principles:
  - id: wish
    rule: Rule.
    examples:
      - {prompt: a, better: b, worse: c}
"""


@pytest.mark.parametrize("where", ["tokenizer_config", "list", "jinja"])
def test_a_judge_that_refuses_a_system_message(tmp_path: Path, where: str) -> None:
    written: Any = {"tokenizer_config": NO_SYSTEM, "list": [{"name": "default", "template": NO_SYSTEM}]}.get(where)
    path = folder(tmp_path, {"chat_template": written} if written else None)
    if where == "jinja":
        (path / "chat_template.jinja").write_text(NO_SYSTEM)
    with pytest.raises(UserError) as error:
        check_likelihood_judge(path, job(), [rules()])
    assert "judge.model J: its chat template refuses the roles system, user (System role not supported)" in str(
        error.value
    )
    assert "`wish/main` of rules@1" in str(error.value)
    only_examples = parse_constitution(EXAMPLES, "rules", 2, "test")
    check_likelihood_judge(path, job(), [only_examples])
    with pytest.raises(UserError, match="refuses the roles system, user, assistant, user"):
        check_likelihood_judge(path, job(policy={"model": "M", "system_prompt": "Be kind."}), [only_examples])
    check_policy(path, job())  # the policy's prompts may have none


def test_a_judge_that_leaves_a_system_message_out(tmp_path: Path) -> None:
    silent = "{% for m in messages if m['role'] != 'system' %}[{{ m['content'] }}]{% endfor %}"
    with pytest.raises(UserError, match=r"leaves the system's message out .*`wish/main` of rules@1"):
        check_likelihood_judge(folder(tmp_path, {"chat_template": silent}), job(), [rules()])
    # One that can't write parts at all: it leaves it out all the same.
    silent = "{% for m in messages if m['role'] != 'system' %}{{ '[' + m['content'] + ']' }}{% endfor %}"
    with pytest.raises(UserError, match="leaves the system's message out"):
        check_likelihood_judge(folder(tmp_path, {"chat_template": silent}), job(), [rules()])


def test_a_judge_is_asked_with_its_templates_arguments(tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' and not system_too %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    )
    path = folder(tmp_path, {"chat_template": template})
    with pytest.raises(UserError, match=r"refuses the roles system, user \(no system\)"):
        check_likelihood_judge(path, job(), [rules()])
    check_likelihood_judge(path, job(judge={"model": "J", "chat_template_args": {"system_too": True}}), [rules()])
    with pytest.raises(UserError, match=r"chat_template_args.sistem: judge.model J: its chat template doesn't read it"):
        check_likelihood_judge(path, job(judge={"model": "J", "chat_template_args": {"sistem": True}}), [rules()])


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}",
        "{% for m in messages %}{% if loop.first and m.role == 'user' %}{{ undefined_thing.x }}{% endif %}{% endfor %}",
        "{% unknown_tag %}",
    ],
    ids=["chatml", "generation", "parts", "not understood", "not parsed"],
)  # fmt: skip
def test_judges_that_are_asked(tmp_path: Path, template: str) -> None:
    path = folder(tmp_path, {"chat_template": template, "bos_token": {"content": "<s>"}})
    check_likelihood_judge(path, job(), [rules()])


def wrong_model(root: Path, tiny_model: Path, **config: Any) -> Path:
    """The tiny model with another config.json."""
    import shutil

    shutil.copytree(tiny_model, root / "model")
    tree = json.loads((root / "model" / "config.json").read_text()) | config
    (root / "model" / "config.json").write_text(json.dumps(tree))
    return root / "model"


def test_a_run_and_its_dry_run_refuse_before_anything_is_loaded(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrong_model(tmp_path, tiny_model, max_position_embeddings=32)
    monkeypatch.setattr(launch, "start_worker", lambda *_: pytest.fail("a worker was started"))
    with pytest.raises(UserError, match="knows 32 positions"):
        launch.execute(project_job(tmp_path, model), tmp_path / "run", tmp_path, Quiet())
    assert not (tmp_path / "run" / "run.json").exists()
    monkeypatch.chdir(tmp_path)
    for arguments in (["--dry-run"], []):
        result = CliRunner().invoke(app, ["run", str(make_project(tmp_path, model)), *arguments])
        assert isinstance(result.exception, UserError)
        assert "knows 32 positions" in str(result.exception)


def test_a_judge_is_checked_with_the_texts_in_force(tmp_path: Path, tiny_model: Path) -> None:
    judge = wrong_model(tmp_path, tiny_model)
    (judge / "chat_template.jinja").write_text(NO_SYSTEM)
    with pytest.raises(UserError, match=r"refuses the roles system, user .*`wish/main` of rules@1"):
        launch.execute(
            project_job(tmp_path, tiny_model, judge={"model": str(judge)}), tmp_path / "run", tmp_path, Quiet()
        )


def test_no_heavy_library_is_imported() -> None:
    code = (
        "import sys; from rlaif import transformers_compat; known = transformers_compat.causal_types(); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules], known is None or len(known) > 100)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[] True"


def test_the_list_of_transformers_is_read() -> None:
    pytest.importorskip("transformers")
    known = transformers_compat.causal_types()
    assert known is not None
    assert {"llama", "gpt2", "opt", "gemma3", "qwen3_moe"} <= known
    assert not {"t5", "vit"} & known


# Files that no tool writes so, and somebody's does


@pytest.mark.parametrize(
    ("auto_map", "code"),
    [
        (["modeling_x.X", None], "modeling_x.X"),
        ("modeling_x.X", "modeling_x.X"),
        ({"AutoModelForCausalLM": ["modeling_x.X", None]}, "modeling_x.X"),
        ({"AutoModel": {"default": "modeling_x.X"}}, "modeling_x.X"),
        ({"AutoModelForCausalLM": None, "AutoConfig": "c.C"}, "c.C"),
        ([["c.C"]], "c.C"),
    ],
)
def test_an_odd_auto_map_names_its_code(tmp_path: Path, auto_map: Any, code: str) -> None:
    pytest.importorskip("transformers")
    said = refusal(folder(tmp_path, model_type="brand_new", auto_map=auto_map), job())
    assert f"needs code of its own ({code})" in said
    check_policy(folder(tmp_path, auto_map=auto_map), job())  # transformers has this one itself


@pytest.mark.parametrize("auto_map", [[], {}, "", None, [None], 7, {"AutoModel": None}])
def test_an_auto_map_that_names_nothing(tmp_path: Path, auto_map: Any) -> None:
    check_policy(folder(tmp_path, auto_map=auto_map), job())


@pytest.mark.parametrize("decoder", [[], ["<a>"], "x", 7, {"x": {"content": "<a>"}}, {"5": "<a>"}, {"5": None},
                                     {"5": {}}, {"5": {"content": None}}, {"1e3": {"content": "<a>"}},
                                     {"-1": {"content": "<a>"}},
                                     [{"id": None, "content": "<a>"}], [{"id": [1], "content": 7}]])  # fmt: skip
def test_odd_added_tokens(tmp_path: Path, decoder: Any) -> None:
    path = folder(tmp_path, {"chat_template": "<a> {{ messages[0]['content'] }}", "added_tokens_decoder": decoder})
    check_policy(path, job())
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": decoder}))
    for tokenizer in ({}, {"added_tokens_decoder": decoder}):
        check_policy(folder(tmp_path, tokenizer), job())


def test_added_tokens_in_other_forms_are_still_checked(tmp_path: Path) -> None:
    for decoder in (
        {"100": {"content": "<a>"}},
        {"100": "<a>"},
        [{"id": 100, "content": "<a>"}],
        [{"id": "100", "content": "<a>"}],
    ):
        path = folder(tmp_path, {"chat_template": "{{ '<a>' }}", "added_tokens_decoder": decoder})
        assert "its chat template writes `<a>` (token 100)" in refusal(path, job())


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), -1.0, 0, "4.0", [4.0], True, {}])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters", "layers"])
def test_a_rope_factor_that_none_can_reckon_with(tmp_path: Path, factor: Any, place: str) -> None:
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 512}
    found = {"rope_parameters": {"full_attention": scaling}} if place == "layers" else {place: scaling}
    path = folder(tmp_path, max_position_embeddings=512, **found)
    assert f"the factor of its RoPE scaling in config.json is {factor!r}" in refusal(path, job(512))


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), None])
def test_a_rope_factor_that_nothing_reads(tmp_path: Path, factor: Any) -> None:
    scaling = {"rope_type": "default", "factor": factor, "original_max_position_embeddings": float("nan")}
    check_policy(folder(tmp_path, max_position_embeddings=512, rope_parameters=scaling), job(512))
    check_policy(folder(tmp_path, max_position_embeddings=512, rope_scaling=["yarn"]), job(512))


@pytest.mark.parametrize(
    "section", [{}, {"quant_method": None}, {"quant_method": "none"}, {"load_in_4bit": False, "load_in_8bit": False}]
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_a_section_about_quantised_weights_that_says_nothing(tmp_path: Path, key: str, section: dict[str, Any]) -> None:
    check_policy(folder(tmp_path, **{key: section}), job())
    inner = {"text_config": {key: section, "vocab_size": 100}, "model_type": "gemma3", "architectures": None}
    check_policy(folder(tmp_path, **inner), job())
    assert "are quantised" in refusal(folder(tmp_path, **{key: {**section, "bits": 4}}), job())


@pytest.mark.parametrize("section", [{}, {"quant_method": None}, {"load_in_4bit": False}])
def test_a_model_with_such_a_section_is_loaded(tmp_path: Path, tiny_model: Path, section: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copytree(tiny_model, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": section}))
    more = without_empty_quantisation(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", **more)
    assert "quantization_config" not in model.config.to_dict()
    assert without_empty_quantisation(tiny_model) == {}


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", "", 7, {}, [None, "LlamaForCausalLM"]])
def test_architectures_in_other_forms(tmp_path: Path, architectures: Any) -> None:
    check_policy(folder(tmp_path, architectures=architectures), job())


def test_an_architecture_without_a_list_is_still_checked(tmp_path: Path) -> None:
    assert "those of LlamaModel, without an output layer" in refusal(
        folder(tmp_path, architectures="LlamaModel"), job()
    )


ODD: tuple[Any, ...] = (None, "", "x", 7, -1, 0.5, True, [], ["x"], [[]], {}, {"x": "y"}, float("inf"), float("nan"))


@pytest.mark.parametrize(
    "key",
    ["model_type", "architectures", "auto_map", "vocab_size", "pad_token_id", "eos_token_id", "text_config",
     "is_decoder", "quantization_config", "max_position_embeddings", "rope_scaling", "rope_parameters",
     "is_encoder_decoder"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_whatever_a_config_holds_there_is_no_traceback(tmp_path: Path, key: str, kind: str) -> None:
    for odd in ODD:
        path = folder(tmp_path, **{"model_type": kind, "is_decoder": True, "max_position_embeddings": 512, key: odd})
        with contextlib.suppress(UserError):
            check_policy(path, job(128))


@pytest.mark.parametrize("key", ["auto_map", "tokenizer_class", "chat_template", "added_tokens_decoder", "bos_token"])
def test_whatever_a_tokenizers_config_holds_there_is_no_traceback(tmp_path: Path, key: str) -> None:
    for odd in ODD:
        folder(tmp_path, {"chat_template": CHATML, "tokenizer_class": "LlamaTokenizer", key: odd})
        with contextlib.suppress(UserError):
            check_policy(tmp_path, job())
            check_likelihood_judge(tmp_path, job(), [])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_files_that_can_not_be_read_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    if name.endswith("json") or content == b"\xff\xfe":
        assert "the model folder is damaged" in refusal(tmp_path, job())
