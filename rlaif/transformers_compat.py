"""What transformers doesn't document and we need, on a model, its cache or its source; see `rlaif.reached`.

In: a model, a cache, a config. Out: plain answers. Nothing heavy is imported at the top: some of it is asked where
torch isn't installed. What belongs to its `Trainer` is in `rlaif.learning.trl_compat`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlaif.reached import Reached

REACHED = (
    Reached(
        "transformers",
        "PreTrainedModel._keep_in_fp32_modules_strict",
        "a bf16 export rounds biases that choose experts, and tokens go elsewhere",
    ),
    Reached("transformers", "PreTrainedModel._is_stateful", "the transformers sampler takes models that keep a state"),
    Reached("transformers", "DynamicCache.layers", "the likelihood judge doesn't get at cached keys and values"),
    Reached("transformers", "DynamicCache.batch_select_indices", "rows that are done can't leave the sampler's batch"),
    Reached("transformers.cache_utils", "DynamicLayer.batch_select_indices", "the same, asked of each layer"),
    Reached("transformers.cache_utils", "DynamicLayer.keys", "the likelihood judge can't share a prompt's keys"),
    Reached("transformers.cache_utils", "DynamicLayer.values", "the likelihood judge can't share a prompt's values"),
    Reached(
        "transformers",
        "PreTrainedConfig._attn_implementation",
        "stored likelihoods are taken over from another kernel of attention",
    ),
    Reached(
        "transformers.masking_utils",
        "ALL_MASK_ATTENTION_FUNCTIONS",
        "chosen and rejected completions compute their prompt twice",
    ),
    Reached(
        "transformers.models.auto.modeling_auto",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "a model that nobody can train is found out after the start, not in the plan",
    ),
    Reached("transformers.models.auto.tokenization_auto", "", "the same, of a tokenizer that needs code of its own"),
)


def kept_in_fp32(model: Any, names: Iterable[str]) -> set[str]:
    """Of these names of parameters those that `from_pretrained` keeps in fp32 where the rest is bf16: patterns of
    `PreTrainedModel._keep_in_fp32_modules_strict`. `_keep_in_fp32_modules` is for fp16 alone."""
    patterns = [p.replace("*", ".*") for p in getattr(model, "_keep_in_fp32_modules_strict", None) or ()]
    return {name for name in names if any(re.search(p, name) for p in patterns)}


def rows_can_leave(model: Any) -> bool:
    """Whether rows of a batch can be taken out of a model's cache while others go on: `PreTrainedModel._is_stateful`
    says that it keeps a state instead, and only layers with `batch_select_indices` can be cut."""
    from transformers import DynamicCache

    layers = DynamicCache(config=model.config).layers
    return not getattr(model, "_is_stateful", False) and all(hasattr(x, "batch_select_indices") for x in layers)


def keep_rows(cache: Any, rows: Any) -> None:
    """Takes all rows but these (a tensor of indices) out of a `DynamicCache`, by its `batch_select_indices`."""
    cache.batch_select_indices(rows)


def keys_and_values(cache: Any) -> list[tuple[Any, Any]]:
    """Of each layer of a `DynamicCache`, [batch, kv heads, length, head dim]: its `layers` hold them as `keys` and
    `values`, which its documentation shows and its reference leaves out."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def attention_of(model: Any) -> str | None:
    """The kernel of attention that a model computes with (`config._attn_implementation`); others round otherwise."""
    found = getattr(model.config, "_attn_implementation", None)
    return None if found is None else str(found)


def attention_mask_of(model: Any, sees: Any) -> Any:
    """A mask of one's own as the model's kernel of attention takes it: `sees` [rows, length, length] says which places
    see which. `ALL_MASK_ATTENTION_FUNCTIONS` has what makes each kernel's; a model takes such a one as it is.

    Raises:
        KeyError: transformers makes no masks for that kernel.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def mask_function(row: Any, head: Any, place: Any, other: Any) -> Any:
        return sees[row, place, other]

    return ALL_MASK_ATTENTION_FUNCTIONS[attention_of(model)](
        batch_size=sees.size(0),
        q_length=sees.size(1),
        kv_length=sees.size(2),
        mask_function=mask_function,
        allow_is_causal_skip=False,
        dtype=model.dtype,
        config=model.config,
        device=sees.device,
    )


def without_origin(settings: dict[str, Any]) -> dict[str, Any]:
    """A config's dict without the names under which `to_dict` keeps where it was read from (`_name_or_path`): a copy
    elsewhere has another place."""
    return {k: v for k, v in settings.items() if k not in ("_name_or_path", "_model_name_or_path")}


@functools.cache
def causal_types() -> frozenset[str] | None:
    """The model types that `AutoModelForCausalLM` takes: `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`, read from its source,
    since importing it would bring torch into a process that has no use for it. None where transformers isn't
    installed, or has changed."""
    source = auto_source("modeling_auto.py")
    if source is None:
        return None
    try:
        tree = ast.parse(source)
        names = next(
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
        )
        return frozenset(name for name, _ in ast.literal_eval(names.args[0]))  # type: ignore[attr-defined]
    except (SyntaxError, StopIteration, ValueError, AttributeError, IndexError):
        return None


def auto_source(name: str) -> str | None:
    """The source of a module of `transformers.models.auto`, which map names to classes; None where it isn't
    installed, or has no such file."""
    spec = importlib.util.find_spec("transformers")
    file = Path(spec.origin).parent / "models" / "auto" / name if spec is not None and spec.origin else None
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else None
