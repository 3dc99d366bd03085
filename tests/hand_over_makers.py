"""The learner's half of the hand-over, for a process that never imports vLLM: vLLM changes transformers' classes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlaif.config import Learner, Lora, Precision, Sampling
from rlaif.hand_over import QUESTIONS, Trained, settings_for, train
from rlaif.workers import InlineWorker
from tests.architectures import make_model

SAMPLING: dict[str, Any] = {"max_tokens": 8, "max_model_len": 256, "kv_cache_gib": 0.05}


class Maker:
    """Makes a random model of each architecture, and trains it: a worker's object, so that one process does all."""

    def make(self, name: str, folder: str, lora: bool = False, precision: Precision = "fp32") -> Trained:
        """A model in `folder/model`, its trained policy in `folder/policy`."""
        from rlaif.models import load_tokenizer
        from rlaif.rendering import Renderer
        from rlaif.sampling.role import fixed_texts

        model = make_model(name, Path(folder) / "model")
        settings = settings_for(Learner(precision="fp32", lora=Lora(r=4, alpha=8) if lora else None))
        kwargs = {"model_path": str(model), "settings": settings, "seed": 0, "export_precision": precision}
        learner = InlineWorker("learner", "rlaif.learning:make", kwargs)
        texts = fixed_texts(Renderer(load_tokenizer(model)), list(QUESTIONS), SAMPLING["max_model_len"])
        return train(learner, texts, Path(folder))


def sampler(engine: Any, model: Path, precision: Precision = "fp32", **more: Any) -> InlineWorker:
    """A sampler in this process."""
    settings = Sampling(engine=engine, precision=precision, **SAMPLING, **more)
    return InlineWorker("sampler", "rlaif.sampling.role:make", {"model_path": str(model), "settings": settings})


if __name__ == "__main__":  # every architecture's policies into a folder, a line of JSON for each
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    args = parser.parse_args()
    for name in args.names:
        for kind, lora, precision in (("fp32", False, "fp32"), ("bf16", False, "bf16"), ("LoRA", True, "fp32")):
            made = Maker().make(name, str(args.folder / name / kind), lora, precision)
            (args.folder / name / kind / "trained.json").write_text(made.model_dump_json())
