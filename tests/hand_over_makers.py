"""The learner's half of the hand-over, for a process that never imports vLLM: vLLM changes transformers' classes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlaif.config import Learner, Lora, Precision, Sampling
from rlaif.learning import make
from rlaif.loop.deep_check import QUESTIONS, Trained, settings_for, train
from rlaif.loop.gaps import decoding_gap, to_score_again
from rlaif.records import Completion, DecodingGap, Message, PolicyVersion, Prompt, TokenSequence
from rlaif.workers.inline import InlineWorker
from rlaif.workers.worker import Worker
from tests.architectures import make_model

PROMPTS = [Prompt(id=str(i), messages=(Message(role="user", content="why? " * (i + 1)),)) for i in range(3)]
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

    def model(self, name: str, folder: str) -> str:
        """A model in `folder/model`, not trained."""
        return str(make_model(name, Path(folder) / "model"))

    def decoded(self, name: str, folder: str, **sampling: Any) -> DecodingGap:
        """The gap of transformers' answers against a real learner that holds the same weights."""
        model = self.model(name, folder)
        with sampler("transformers", Path(model), **sampling) as engine:
            return self.gap(model, answers_of(engine))

    def gap(self, model: str, answers: list[Completion]) -> DecodingGap:
        """The same for answers that were made elsewhere: vLLM gets a process of its own."""
        some = to_score_again(answers, seed=0)
        texts = [TokenSequence(prompt_token_ids=c.prompt_token_ids, token_ids=c.token_ids) for c in some]
        learner = make(model_path=model, settings=Learner(precision="fp32"), seed=0)
        scored = learner.logprobs(texts)
        learner.close()
        return decoding_gap(some, scored)


def sampler(engine: Any, model: Path, precision: Precision = "fp32", rests: bool = False, **more: Any) -> InlineWorker:
    """A sampler in this process; `rests`: it will be asked to."""
    settings = Sampling(engine=engine, precision=precision, **SAMPLING | more)
    kwargs = {"model_path": str(model), "settings": settings, "rests": rests}
    return InlineWorker("sampler", "rlaif.sampling.role:make", kwargs)


def answers_of(engine: Worker) -> list[Completion]:
    """Four answers to each of `PROMPTS`."""
    chunks = engine.stream(
        "sample",
        prompts=PROMPTS,
        completions_per_prompt=4,
        policy=PolicyVersion(iteration=0, digest="d"),
        seed=0,
        iteration=0,
        prefix="0",
    )
    return [c for chunk in chunks for c in chunk]


if __name__ == "__main__":  # every architecture's policies into a folder, a line of JSON for each
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    args = parser.parse_args()
    for name in args.names:
        for kind, lora, precision in (("fp32", False, "fp32"), ("bf16", False, "bf16"), ("LoRA", True, "fp32")):
            made = Maker().make(name, str(args.folder / name / kind), lora, precision)
            (args.folder / name / kind / "trained.json").write_text(made.model_dump_json())
