"""How likely a frozen model finds tokens after others. torch and transformers are used here only, of all judges.

In: contexts and continuations, as token ids. Out: log p of each of a continuation's tokens, in nats. The logits are the
model's own: which way leads to them is chosen, and held against its forward pass, before anything is scored.

Speed, on a CPU, is arithmetic: the keys and values (KV) of what contexts begin with are computed once and expanded
over the batch, a context's own tokens once for all its continuations, and the output layer runs at continuations'
positions only. On top, `Likelihoods` computes nothing twice, in this process or, with a store, in any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlaif import transformers_compat
from rlaif.config import Precision
from rlaif.device_memory import DeviceMemory, tensors_of
from rlaif.errors import UserError
from rlaif.hardware import torch_dtype
from rlaif.judging.cache import LikelihoodCache, likelihood_key
from rlaif.models import without_empty_quantisation
from rlaif.records import digest

if TYPE_CHECKING:
    import torch

KV_BATCHES = 4
"""Forward passes over continuations for which contexts' KV is held at a time."""
_VOCABULARY_ROWS = 256
_SOFTMAX_ROWS = 16
_ALLOWED_ERROR = 0.5
"""Nats a token, on average: far more than bf16's rounding, far less than a wrong mask or a lost scale."""
_KNOWN_ENTRIES = 200_000


class Continuation(NamedTuple):
    """Tokens to score after a context's."""

    beginning: tuple[int, ...]
    """What this context and others are expected to begin with. A context that begins otherwise is scored alone."""
    context: tuple[int, ...]
    """All tokens before, the beginning included; at least one."""
    token_ids: tuple[int, ...]


def load_frozen(path: str, precision: Precision) -> tuple[Any, Any]:
    """A causal language model from a local folder, on the GPU or the CPU, and its tokenizer.

    Raises:
        UserError: the folder holds none that can be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # who asks a judge has lines of their own for what takes time
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch_dtype(precision), **without_empty_quantisation(path)
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, AssertionError) as e:
        raise UserError(f"judge.model {path}: can't load the model ({str(e).splitlines()[0]})") from e
    return model.to(device), tokenizer


class KVScorer:
    """One frozen model's log-likelihoods, by forward passes that share keys and values."""

    plain_head: bool
    """Whether the logits are the output layer's product and no more. Some models scale or cap it (Gemma 2, Granite,
    Cohere); theirs are taken from the whole model, which is slower."""

    def __init__(self, model: Any, name: str, batch_tokens: int, trial: Sequence[Continuation]):
        """Freezes the model, and compares what is computed here with its own forward pass.

        Args:
            name: The model's, for errors.
            batch_tokens: Continuations' tokens in one forward pass, padding included.
            trial: What is compared: the last of these, scored together with the others.

        Raises:
            UserError: this kind of model can't be scored with cached keys and values, or gives other likelihoods so.
        """
        self.model = model.eval().requires_grad_(False)
        self.memory = DeviceMemory(lambda: tensors_of(model))
        self.batch_tokens = batch_tokens
        # A window counts cache slots: with contexts of several lengths, padding would take room in it.
        self._one_length = getattr(model.config.get_text_config(), "sliding_window", None) is not None
        self._choose_head(name, trial)

    def computed_by(self, weights: str) -> str:
        """Digest of what the last bit of a likelihood depends on, but for the batch that it was computed in.

        Args:
            weights: Identity of the model's files.
        """
        import torch
        import transformers

        how = {
            "weights": weights,
            "class": type(self.model).__name__,
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "attention": transformers_compat.attention_of(self.model),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return digest(how, digits=64)

    def logps(self, continuations: Sequence[Continuation]) -> dict[Continuation, tuple[float, ...]]:
        """log p of each token of each continuation, in nats, as the model's precision gives it; of none, nothing."""
        import torch

        found: dict[Continuation, tuple[float, ...]] = {}
        by_beginning: dict[tuple[int, ...], dict[tuple[int, ...], list[Continuation]]] = {}
        for c in dict.fromkeys(continuations):
            if c.token_ids:
                by_beginning.setdefault(c.beginning, {}).setdefault(c.context, []).append(c)
            else:
                found[c] = ()
        with torch.inference_mode():
            for beginning, by_context in by_beginning.items():
                alike = [ids for ids in by_context if ids[: len(beginning)] == beginning]
                unlike = [ids for ids in by_context if ids[: len(beginning)] != beginning]
                # One context gains nothing from a separate pass over its beginning.
                for group, start in ((alike, len(beginning) if len(alike) > 1 else 0), (unlike, 0)):
                    prefix = self._prefill(beginning[:start]) if start else None
                    for batch in self._context_batches(group, by_context):
                        found.update(self._forward(batch, by_context, start, prefix))
        return found

    def _choose_head(self, name: str, trial: Sequence[Continuation]) -> None:
        import torch

        context, answer = trial[-1].context, trial[-1].token_ids
        try:
            with torch.inference_mode():
                ids = torch.tensor([[*context, *answer]], device=self.model.device)  # [1, L]
                logits = self.model(input_ids=ids).logits.float()  # [1, L, V]
                head = self.model.get_output_embeddings()
                self.plain_head = type(head) is torch.nn.Linear and torch.equal(
                    head(self.model.base_model(input_ids=ids)[0]).float(), logits
                )
                found = self.logps(trial)[trial[-1]]
                logps = logits[0, -len(answer) - 1 : -1].log_softmax(1)
                wanted = logps.gather(1, ids[0, -len(answer) :, None])[:, 0].tolist()
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as e:
            why = (str(e).splitlines() or [type(e).__name__])[0]
            raise UserError(f"judge.model {name}: this kind of model can't score completions here ({why})") from e
        off = sum(abs(a - b) for a, b in zip(found, wanted, strict=True)) / len(answer)
        if not off <= _ALLOWED_ERROR:
            raise UserError(
                f"judge.model {name}: {type(self.model).__name__} gives other likelihoods with cached keys and "
                f"values than in one pass (by {off:.2f} nats a token); take another model"
            )

    def _context_batches(
        self, group: Sequence[tuple[int, ...]], by_context: dict[tuple[int, ...], list[Continuation]]
    ) -> Iterator[list[tuple[int, ...]]]:
        """Contexts of similar length whose KV is held at a time."""
        batch: list[tuple[int, ...]] = []
        tokens = 0
        for ids in sorted(group, key=lambda ids: (len(ids), ids)):
            mine = sum(len(c.token_ids) for c in by_context[ids])
            full = tokens + mine > KV_BATCHES * self.batch_tokens
            if batch and (full or (self._one_length and len(ids) != len(batch[0]))):
                yield batch
                batch, tokens = [], 0
            batch.append(ids)
            tokens += mine
        if batch:
            yield batch

    def _row_batches(self, rows: Sequence[tuple[int, Continuation]]) -> Iterator[Sequence[tuple[int, Continuation]]]:
        """Continuations by length, longest first, at most `batch_tokens` with their padding."""
        rows = sorted(rows, key=lambda row: (-len(row[1].token_ids), row[0], row[1].token_ids))
        while rows:
            n = max(self.batch_tokens // len(rows[0][1].token_ids), 1)
            yield rows[:n]
            rows = rows[n:]

    def _prefill(self, ids: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of a beginning: per layer two tensors [1, kv heads, len(ids), head dim]."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache()
        tokens = torch.tensor([ids], device=self.model.device)
        self.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return transformers_compat.keys_and_values(cache)

    def _forward(
        self,
        batch: Sequence[tuple[int, ...]],
        by_context: dict[tuple[int, ...], list[Continuation]],
        start: int,
        prefix: list[tuple[torch.Tensor, torch.Tensor]] | None,
    ) -> Iterator[tuple[Continuation, tuple[float, ...]]]:
        """Two passes: the contexts' own tokens [P, S] once, then their continuations [B, T] on top of the gathered KV.

        A context's last token is left to the second pass, which needs the logits that follow it.
        """
        import torch
        from transformers import DynamicCache

        device = self.model.device
        own = [ids[start:-1] for ids in batch]
        past = start + max(map(len, own))
        input_ids, own_mask = _pad(own, past - start, device)  # [P, S]
        context_mask = torch.cat([torch.ones(len(batch), start, dtype=torch.long, device=device), own_mask], 1)
        cache = DynamicCache()
        for i, (k, v) in enumerate(prefix or ()):
            cache.update(k.expand(len(batch), -1, -1, -1), v.expand(len(batch), -1, -1, -1), i)
        if past > start:
            positions = torch.arange(start, past, device=device).expand(len(batch), -1)
            self.model.base_model(
                input_ids=input_ids,
                attention_mask=context_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        layers = transformers_compat.keys_and_values(cache)
        for rows in self._row_batches([(i, c) for i, ids in enumerate(batch) for c in by_context[ids]]):
            index = torch.tensor([i for i, _ in rows], device=device)
            gathered = DynamicCache()
            for i, (keys, values) in enumerate(layers):
                gathered.update(keys[index], values[index], i)
            # Inputs are a context's last token and the continuation but its last: logits then stand for the latter.
            inputs = [(batch[i][-1], *c.token_ids[:-1]) for i, c in rows]
            width = max(map(len, inputs))
            input_ids, mask = _pad(inputs, width, device)  # [B, T]
            lengths = torch.tensor([len(batch[i]) - 1 for i, _ in rows], device=device)  # [B]
            targets, _ = _pad([c.token_ids for _, c in rows], width, device)
            keep = mask.bool()
            arguments = {
                "input_ids": input_ids,
                "attention_mask": torch.cat([context_mask[index], mask], 1),
                "position_ids": lengths[:, None] + torch.arange(width, device=device),  # [B, T]
                "past_key_values": gathered,
                "use_cache": True,
            }
            if self.plain_head:
                hidden = self.model.base_model(**arguments).last_hidden_state  # [B, T, H]
                logps = self._target_logps(hidden[keep], targets[keep])
            else:
                logps = _logps_of(self._kept_logits(keep, arguments), targets[keep], _SOFTMAX_ROWS)
            by_row = logps.cpu().split([len(c.token_ids) for _, c in rows])
            yield from ((c, tuple(values.tolist())) for (_, c), values in zip(rows, by_row, strict=True))

    def _kept_logits(self, keep: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """The model's own logits [N, V] at the N positions that `keep` [B, T] marks."""

        def select(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (inputs[0][keep],)  # [B, T, H] -> [N, H]

        hook = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            logits: torch.Tensor = self.model(**arguments).logits
        finally:
            hook.remove()
        return logits

    def _target_logps(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p of each target [N] in fp32 from its hidden state [N, H]; the whole [N, V] never exists."""
        import torch

        # fp32 in pieces that stay in the CPU's cache: a fifth of the time of the whole, a twentieth of logsumexp.
        rows_at_once = _SOFTMAX_ROWS if hidden.device.type == "cpu" else _VOCABULARY_ROWS
        logp = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        head = self.model.get_output_embeddings()
        # One buffer for all pieces: fresh pages for each cost as much as the product.
        buffer = torch.empty(_VOCABULARY_ROWS, head.out_features, dtype=hidden.dtype, device=hidden.device)
        for at in range(0, len(targets), _VOCABULARY_ROWS):
            part = slice(at, at + _VOCABULARY_ROWS)
            logits = torch.mm(hidden[part], head.weight.t(), out=buffer[: len(hidden[part])])  # [rows, V]
            if head.bias is not None:
                logits += head.bias
            logp[part] = _logps_of(logits, targets[part], rows_at_once)
        return logp


class Likelihoods:
    """What a scorer said, each continuation computed once."""

    def __init__(self, scorer: KVScorer):
        self._scorer = scorer
        self._known: dict[Continuation, tuple[float, ...]] = {}
        self._store: LikelihoodCache | None = None
        self._computed_by = ""
        self._stored: set[Continuation] = set()  # of `_known`, what was computed by an earlier process
        self.asked_anew = 0
        """Calls of `logps` that earlier processes hadn't computed all of; always so without a store."""

    def remember(self, store: LikelihoodCache, weights: str) -> None:
        """From now on takes what was computed before from a store, and puts there what is new.

        Args:
            weights: Identity of the model's files; what else its arithmetic depends on is found here.
        """
        self._store, self._computed_by = store, self._scorer.computed_by(weights)

    def logps(self, continuations: Sequence[Continuation]) -> list[tuple[float, ...]]:
        """log p of each of a continuation's tokens, in nats."""
        missing = [c for c in dict.fromkeys(continuations) if c not in self._known]
        if len(self._known) + len(missing) > _KNOWN_ENTRIES:
            self._known.clear()
            self._stored.clear()
            missing = list(dict.fromkeys(continuations))
        if self._store is not None:
            missing = self._without_stored(missing, self._store)
        self._known.update(self._scorer.logps(missing))
        if self._store is not None:
            self._store.put([(self._key(c), self._known[c]) for c in missing])
        self.asked_anew += not self._stored.issuperset(continuations)
        return [self._known[c] for c in continuations]

    def _key(self, continuation: Continuation) -> str:
        return likelihood_key(self._computed_by, continuation.context, continuation.token_ids)

    def _without_stored(self, continuations: Sequence[Continuation], store: LikelihoodCache) -> list[Continuation]:
        """Takes what the store holds into `_known`; returns the rest."""
        rest = []
        for c in continuations:
            logps = store.get(self._key(c), len(c.token_ids)) if c.token_ids else ()
            if logps is None:
                rest.append(c)
            else:
                self._known[c] = logps
                self._stored.add(c)
        return rest


def _logps_of(logits: torch.Tensor, targets: torch.Tensor, rows_at_once: int) -> torch.Tensor:
    """log p of each target [N] in fp32 from its logits [N, V], some rows at a time."""
    import torch

    pieces = zip(logits.split(rows_at_once), targets[:, None].split(rows_at_once), strict=True)
    return torch.cat([z.float().log_softmax(1).gather(1, y)[:, 0] for z, y in pieces])


def _pad(rows: Sequence[Sequence[int]], width: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [rows, width] and their mask of ones and zeros."""
    import torch

    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
