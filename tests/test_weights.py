"""A reference to weights: the same on the other side of a process, and one clear line where it leads nowhere."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from rlaif.errors import UserError, WorkerError
from rlaif.models import digest_of
from rlaif.workers.start import start_worker
from rlaif.workers.weights import WeightsMissing, WeightsRef, keep, parts_of, seen_here


class Reader:
    """What a worker does with a reference."""

    def load(self, weights: WeightsRef) -> tuple[str, str]:
        return weights.digest, weights.folder().name


def test_it_travels(tmp_path: Path) -> None:
    ref = WeightsRef(digest="d" * 16, path=tmp_path)
    assert pickle.loads(pickle.dumps(ref)) == ref == WeightsRef.model_validate_json(ref.model_dump_json())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["process", "inline"])
def test_a_worker_reads_from_where_it_says(mode: Any, tmp_path: Path) -> None:
    ref = WeightsRef(digest="d" * 16, path=tmp_path)
    gone = ref.model_copy(update={"path": tmp_path / "policy"})
    with start_worker(mode, "sampler", f"{__name__}:Reader", {}, tmp_path / "log") as worker:
        assert worker.call("load", weights=ref) == (ref.digest, tmp_path.name)
        with pytest.raises(UserError) as caught:
            worker.call("load", weights=gone)
    assert str(caught.value) == f"{gone.path}: the policy's weights are gone; restore them, or start a new run"


def test_a_sampler_names_a_folder_without_weights(tiny_model: Path, tmp_path: Path) -> None:
    """A learner's state, say, or a copy that was broken off."""
    from rlaif.config import Sampling
    from rlaif.sampling.role import make

    sampler = make(str(tiny_model), Sampling(engine="transformers", precision="fp32", max_tokens=8, max_model_len=64))
    (tmp_path / "state.pt").touch()
    with pytest.raises(UserError, match=r": no weights of a policy in this folder; restore them"):
        sampler.load(WeightsRef(digest="d" * 16, path=tmp_path))


# ---- a machine that keeps folders


SMALL = {
    "config.json": "{}",
    "generation_config.json": '{"eos_token_id": 2}',
    "chat_template.jinja": "one",
    "tokenizer_config.json": "{}",
    "additional_chat_templates/tools.jinja": "one",
}


def a_model(folder: Path, **changed: str) -> WeightsRef:
    """`changed`: what else one of its files says; weights are those of every other."""
    for name, content in SMALL.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(changed.get(name, content))
    (folder / "model.safetensors").write_bytes(b"weights")
    return WeightsRef.of(folder)


def arrives(ref: WeightsRef) -> Path:
    return keep(ref, [(name, list(parts)) for name, parts in parts_of(ref.path)], lambda part: part)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another machine's cache, which doesn't see the folders of this one."""
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "elsewhere"))
    return tmp_path / "there is no such folder"


@pytest.mark.parametrize("name", SMALL)
def test_what_was_kept_serves_no_model_whose_other_files_changed(name: str, tmp_path: Path, elsewhere: Path) -> None:
    first, second = a_model(tmp_path / "first"), a_model(tmp_path / "second", **{name: '{"changed": 1}'})
    assert first.digest == second.digest == digest_of(tmp_path / "second")
    kept = arrives(first)
    far = [ref.model_copy(update={"path": elsewhere}) for ref in (first, second)]
    assert seen_here(far[0]).path == kept
    with pytest.raises(WeightsMissing):
        seen_here(far[1])
    corrected = arrives(second)
    assert (seen_here(far[1]).path, seen_here(far[0]).path) == (corrected, kept)
    assert (corrected / name).read_text() == '{"changed": 1}'
    with pytest.raises(WeightsMissing):  # the folder has the path that was named, and something else in it
        seen_here(WeightsRef.of(tmp_path / "second").model_copy(update={"path": first.path, "files": "another"}))


def test_files_that_nobody_reads_are_no_other_model(tmp_path: Path) -> None:
    ref = a_model(tmp_path)
    for name in ("README.md", ".gitattributes", "rlaif_model.json", "trainer_state.json", "picture.png"):
        (tmp_path / name).write_text(name)
    assert WeightsRef.of(tmp_path) == ref


def test_a_kept_folder_that_was_changed_is_sent_again(tmp_path: Path, elsewhere: Path) -> None:
    ref = a_model(tmp_path / "model")
    far = ref.model_copy(update={"path": elsewhere})
    (arrives(ref) / "chat_template.jinja").write_text("changed by hand")
    with pytest.raises(WeightsMissing):
        seen_here(far)
    arrives(ref)
    assert (seen_here(far).path / "chat_template.jinja").read_text() == "one"


def test_what_arrives_changed_is_damaged(tmp_path: Path, elsewhere: Path) -> None:
    ref = a_model(tmp_path / "model")
    files: list[tuple[str, list[bytes]]] = [(name, list(parts)) for name, parts in parts_of(ref.path)]
    other = [(name, [b"half"] if name == "config.json" else parts) for name, parts in files]
    with pytest.raises(WorkerError, match=f"weights {ref.name} arrived as {ref.digest}-.*: damaged"):
        keep(ref, other, lambda part: part)


def test_a_reference_that_leaves_says_all_that_is_read(tmp_path: Path) -> None:
    ref = a_model(tmp_path / "model")
    plain = WeightsRef(digest=ref.digest, path=ref.path)
    assert plain.whole() == ref
    assert plain.model_copy(update={"path": tmp_path / "none"}).whole().files is None
