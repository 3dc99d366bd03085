"""A reference to weights: the same on the other side of a process, and one clear line where it leads nowhere."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from rlaif.errors import UserError
from rlaif.workers.start import start_worker
from rlaif.workers.weights import WeightsRef


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
