"""A run that starts from an adapter, and the adapter of a run on its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlaif import models
from rlaif.config import load_job
from rlaif.errors import UserError
from rlaif.export import export_adapter, export_policy
from rlaif.rundir.store import RunDir
from tests.conftest import make_project, project_job
from tests.stubs import Quiet

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("trl")


def make_adapter(base: Path, to: Path, **changes: Any) -> Path:
    """A LoRA with random weights on all linear layers of a model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(
        plain, LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)
    )
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn_like(p))
    wrapped.save_pretrained(to)
    return to


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 43).view(2, 20)).logits.float()


def with_adapter(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter))


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Merging without a process of its own, and a cache folder of its own; the calls."""
    calls: list[list[str]] = []

    def merge(arguments: list[str], what: str, progress: models.Progress) -> str:
        calls.append(arguments)
        models.merge_adapter(*map(Path, arguments[1:]))
        return "in this process"

    monkeypatch.setattr(models, "run_child", merge)
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    return calls


def test_the_untrained_policy_is_model_and_adapter(
    tiny_model: Path, tmp_path: Path, in_this_process: list[list[str]]
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", use_rslora=True, rank_pattern={"q_proj": 2})
    merged = models.resolve_policy(str(tiny_model), str(adapter))
    assert (plain(merged) - plain(tiny_model)).abs().max() > 0.1
    torch.testing.assert_close(plain(merged), with_adapter(tiny_model, adapter), atol=1e-4, rtol=1e-4)
    assert models.tokenizer_identity(merged) == models.tokenizer_identity(tiny_model)
    assert not list(merged.glob("adapter*"))
    assert models.resolve_policy(str(tiny_model), str(adapter)) == merged
    assert models.resolve_policy(str(tiny_model), None) == tiny_model
    assert len(in_this_process) == 1
    other = make_adapter(tiny_model, tmp_path / "other", r=2)
    assert models.resolve_policy(str(tiny_model), str(other)) != merged


def test_an_adapters_own_chat_template_counts(tiny_model: Path, tmp_path: Path, in_this_process: Any) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }} w5")
    merged = models.resolve_policy(str(tiny_model), str(adapter))
    assert models.load_tokenizer(merged).chat_template == "{{ messages[0]['content'] }} w5"


def test_adapters_that_fit_nothing_are_refused(tiny_model: Path, tmp_path: Path, in_this_process: Any) -> None:
    from tests.sampling.conftest import make_model

    for heads_dim, changes in ((16, {}), (32, {"target_modules": ["q_proj"]})):
        other = make_model(tmp_path / f"other{heads_dim}", seed=1, heads_dim=heads_dim)
        if heads_dim == 32:  # three layers, where the policy has two
            tree = json.loads((other / "config.json").read_text())
            (other / "config.json").write_text(json.dumps(tree | {"num_hidden_layers": 3, "layer_types": None}))
        adapter = make_adapter(other, tmp_path / f"adapter{heads_dim}", **changes)
        with pytest.raises(UserError, match=r"policy.adapter .*: doesn't fit the model") as error:
            models.resolve_policy(str(tiny_model), str(adapter))
        assert "\n" not in str(error.value)
    (adapter / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"policy.adapter .*: doesn't fit"):
        models.resolve_policy(str(tiny_model), str(adapter))
    assert not list((tmp_path / "cache" / "models").glob("merged-*[!k]"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"no adapter_config\.json"),
        ({"adapter_config.json": {"peft_type": "LORA"}}, r"no adapter_model\.safetensors"),
        (
            {"adapter_config.json": {"peft_type": "PREFIX_TUNING"}, "adapter_model.safetensors": {}},
            "PREFIX_TUNING can't",
        ),
    ],
)
def test_folders_that_hold_no_adapter(tiny_model: Path, tmp_path: Path, files: dict[str, Any], says: str) -> None:
    from rlaif.loop.cost import estimate

    (tmp_path / "adapter").mkdir()
    for name, content in files.items():
        (tmp_path / "adapter" / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"policy.adapter .*{says}"):
        models.resolve_policy(str(tiny_model), str(tmp_path / "adapter"))
    make_project(tmp_path, tiny_model)
    for adapter, message in ((tmp_path / "adapter", says), ("./nowhere", "no such folder")):
        with pytest.raises(UserError, match=message):
            estimate(load_job(tmp_path / "tiny.yaml", [f"policy.adapter={adapter}"]), tmp_path)


def test_merging_runs_in_a_process_of_its_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    told: list[str] = []
    merged = models.resolve_policy(str(tiny_model), str(adapter), lambda message, share: told.append(message))
    torch.testing.assert_close(plain(merged), with_adapter(tiny_model, adapter), atol=1e-4, rtol=1e-4)
    assert "merging the adapter" in told


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two iterations of a LoRA."""
    from rlaif.loop.launch import execute

    root = tmp_path_factory.mktemp("lora")
    job = project_job(
        root,
        tiny_model,
        iterations=2,
        schedule={0: "rules@1"},
        learner={"lora": {"r": 4, "alpha": 8}, "learning_rate": 5e-2, "warmup_steps": 0},
        eval={"every": 1, "prompts": 2},
    )
    return execute(job, root / "runs" / "lora", root, Quiet())


def test_an_adapter_is_exported_alone(trained: RunDir, tiny_model: Path, tmp_path: Path) -> None:
    adapter, policy = export_adapter(trained, tmp_path / "adapter"), export_policy(trained, tmp_path / "policy")
    assert {p.name for p in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert "library_name: peft" in (adapter / "README.md").read_text()
    found, merged, base = with_adapter(tiny_model, adapter), plain(policy), plain(tiny_model)
    assert (found - merged).abs().mean() < 0.2 * (found - base).abs().mean(), "as near as the policy's precision"
    models.check_adapter(adapter, "this")


def test_only_the_newest_adapter_is_kept(trained: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="after 1 iterations isn't kept"):
        export_adapter(trained, tmp_path / "adapter", iteration=1)
    assert not list(tmp_path.iterdir())


def test_a_run_of_full_weights_has_no_adapter(trained: RunDir, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained.path, tmp_path / "run"))
    header = json.loads((run / "run.json").read_text())
    header["job"]["learner"]["lora"] = None
    (run / "run.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="full weights"):
        export_adapter(RunDir(run), tmp_path / "adapter")


def test_a_run_starts_from_an_adapter(tiny_model: Path, tmp_path: Path, in_this_process: list[list[str]]) -> None:
    from rlaif.loop.launch import execute

    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    job = project_job(
        tmp_path,
        tiny_model,
        iterations=1,
        schedule={0: "rules@1"},
        policy={"adapter": str(adapter)},
        eval={"every": 1, "prompts": 2},
    )
    run = execute(job, tmp_path / "runs" / "a", tmp_path, Quiet())
    merged = models.resolve_policy(str(tiny_model), str(adapter))
    assert run.header["models"]["policy"] == models.digest_of(merged)
    policy = plain(export_policy(run, tmp_path / "out"))
    assert (policy - plain(merged)).abs().mean() < 0.5 * (policy - plain(tiny_model)).abs().mean()
    assert f"`{tiny_model}` with `{adapter}` merged in" in (tmp_path / "out" / "README.md").read_text()
    assert len(in_this_process) == 1


@pytest.mark.parametrize(
    "first",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 3, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"r": 8, "target_modules": ["q_proj", "down_proj"]},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_came_of_an_adapter_is_one_adapter(
    first: dict[str, Any], dtype: str, tiny_model: Path, tmp_path: Path, in_this_process: list[list[str]]
) -> None:
    from safetensors.torch import load_file, save_file

    from rlaif.loop.launch import execute

    adapter = make_adapter(tiny_model, tmp_path / "adapter", **first)
    file = adapter / "adapter_model.safetensors"
    save_file({k: v.to(getattr(torch, dtype)) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    job = project_job(
        tmp_path,
        tiny_model,
        iterations=1,
        schedule={0: "rules@1"},
        policy={"adapter": str(adapter)},
        learner={"lora": {"r": 4, "alpha": 8}, "learning_rate": 5e-2},
        sampling={"precision": "fp32"},
        eval={"every": 1, "prompts": 2},
    )
    run = execute(job, tmp_path / "runs" / "a", tmp_path, Quiet())
    found = with_adapter(tiny_model, export_adapter(run, tmp_path / "both"))
    policy = plain(export_policy(run, tmp_path / "out"))
    assert (policy - with_adapter(tiny_model, adapter)).abs().max() > 0.05, "it trained"
    torch.testing.assert_close(found, policy, atol=1e-3, rtol=1e-3)


def test_what_came_of_another_kind_of_adapter_is_none(
    tiny_model: Path, tmp_path: Path, in_this_process: list[list[str]]
) -> None:
    from rlaif.export import first_adapter

    adapter = make_adapter(tiny_model, tmp_path / "adapter", use_dora=True)
    run = RunDir(tmp_path / "run")
    digest = models.digest_of(models.resolve_policy(str(tiny_model), str(adapter)))
    run.path.mkdir(exist_ok=True)
    for found, message in ((digest, r"no plain LoRA \(use_dora\)"), ("0" * 16, "changed since the run")):
        (run.path / "run.json").write_text(json.dumps({"schema_version": 1, "models": {"policy": found}}))
        with pytest.raises(UserError, match=message):
            first_adapter(run, str(tiny_model), str(adapter))
