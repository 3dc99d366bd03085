"""The sampler without vLLM, on a tiny random model."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rlaif import config  # noqa: E402
from rlaif.errors import UserError  # noqa: E402
from rlaif.sampling import Sample, SampleRequest  # noqa: E402
from rlaif.sampling.requests import seed_for  # noqa: E402
from rlaif.sampling.transformers import Sampler  # noqa: E402
from tests.sampling.conftest import END  # noqa: E402
from tests.unmapped import unmap  # noqa: E402

pytestmark = pytest.mark.slow


def make_requests(count: int = 12, temperature: float = 1.0, top_p: float = 1.0) -> list[SampleRequest]:
    return [
        SampleRequest(
            id=f"r{i}",
            prompt_token_ids=tuple(range(3, 5 + i % 5)),
            seed=seed_for(0, 0, f"p{i}", 0),
            max_tokens=24,
            temperature=temperature,
            top_p=top_p,
        )
        for i in range(count)
    ]


def run(sampler: Sampler, requests: list[SampleRequest]) -> dict[str, Sample]:
    return {s.id: s for batch in sampler.sample(requests) for s in batch}


@pytest.fixture(scope="module")
def sampler(tiny: Path) -> Sampler:
    return Sampler(str(tiny), config.Sampling(engine="transformers", max_tokens=24, max_model_len=64, precision="fp32"))


def test_every_request_is_answered_once_and_again_the_same(sampler: Sampler) -> None:
    requests = make_requests(40)  # more than one batch
    first = [s.id for batch in sampler.sample(requests) for s in batch]
    assert sorted(first) == sorted(r.id for r in requests)
    assert run(sampler, requests) == run(sampler, requests)


def test_the_end_token_is_kept_iff_stopped(sampler: Sampler) -> None:
    samples = run(sampler, make_requests(40)).values()
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for s in samples:
        assert (s.token_ids[-1] == END) == (s.finish_reason == "stop")
        assert END not in s.token_ids[:-1]
        assert len(s.token_ids) == 24 or s.finish_reason == "stop"
        assert "w2 " not in f"{s.text} "


def test_after_a_rest_it_samples_the_same(tiny: Path, other_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmap(monkeypatch)
    settings = config.Sampling(engine="transformers", max_tokens=24, max_model_len=64, precision="fp32")
    made = Sampler(str(tiny), settings)
    for weights in (tiny, other_tiny):
        made.load(str(weights))
        before, held = run(made, make_requests()), held_now()
        made.rest()
        assert held - held_now() > 40_000, "bytes of weights"
        made.wake()
        assert held_now() == held
        assert run(made, make_requests()) == before


def held_now() -> int:
    """Bytes of parameters in this process."""
    gc.collect()
    parameters = [thing for thing in gc.get_objects() if type(thing) is torch.nn.Parameter]
    return sum({p.data_ptr(): p.untyped_storage().nbytes() for p in parameters}.values())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprob_is_the_models_own(sampler: Sampler, tiny: Path, temperature: float) -> None:
    """Untempered, whatever the batch, the padding and the rows that left: against one plain forward pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    requests = make_requests(temperature=temperature, top_p=0.9)
    for s in run(sampler, requests).values():
        prompt = next(r.prompt_token_ids for r in requests if r.id == s.id)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + s.token_ids])).logits[0, len(prompt) - 1 : -1]
        rows = logits.log_softmax(dim=-1)
        assert s.logprob == pytest.approx(float(rows[range(len(s.token_ids)), list(s.token_ids)].sum()), abs=1e-3)
        if temperature == 0:
            assert s.token_ids == tuple(logits.argmax(dim=-1).tolist())


def test_samples_follow_the_distribution(sampler: Sampler, tiny: Path) -> None:
    """First tokens of many seeds against softmax at the temperature, cut to the nucleus."""
    requests = [
        SampleRequest(id=str(i), prompt_token_ids=(3, 4), seed=i, max_tokens=1, temperature=0.8, top_p=0.9)
        for i in range(2000)
    ]
    counts = torch.zeros(61)
    for s in run(sampler, requests).values():
        counts[s.token_ids[0]] += 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        p = (model(torch.tensor([[3, 4]])).logits[0, -1] / 0.8).softmax(dim=-1)
    ordered, order = p.sort(descending=True)
    p[order[ordered.cumsum(0) - ordered >= 0.9]] = 0
    p /= p.sum()
    assert counts[p == 0].sum() == 0
    assert float((counts / 2000 - p).abs().sum()) < 0.15


def test_new_weights_change_the_answers_and_the_old_ones_bring_them_back(
    tiny: Path, other_tiny: Path, sampler: Sampler
) -> None:
    before = run(sampler, make_requests())
    sampler.load(str(other_tiny))
    changed = run(sampler, make_requests())
    sampler.load(str(tiny))
    assert changed != before
    assert run(sampler, make_requests()) == before


def test_a_prompt_that_leaves_no_room_is_a_user_error(sampler: Sampler) -> None:
    long = make_requests(1)[0].model_copy(update={"prompt_token_ids": (3,) * 60})
    with pytest.raises(UserError, match="max_model_len is 64"):
        list(sampler.sample([long]))


def test_damaged_weights_are_named(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="policy: can't load these weights"):
        Sampler(str(folder), config.Sampling(engine="transformers", max_model_len=64, max_tokens=8))
