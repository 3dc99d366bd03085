"""What the two completions of a preference begin with alike, their prompt above all, is computed once.

In: a batch of sequences as TRL makes it, the chosen ones, then the rejected ones, padded on the right. Out: half as
many rows, and where each place of the batch stands in them. A row is

    tokens      p0 p1 p2 c0 c1 p2 r0 r1 r2          p: the prompt, c: chosen, r: rejected
    positions    0  1  2  3  4  2  3  4  5
    sees         all before it, but r and the p2 before them don't see c and the p2 before those

The prompt's last token stands there twice, since it is what predicts the first token of either: so every place still
predicts the next one, and a model's scoring need not know of any of this. Accelerating Direct Preference Optimization
with Prefix Sharing, arXiv:2410.20305.

Attention has to take such a mask, and everything else in a model a place's own position. No list says which models do:
the longest pairs of an update are computed both ways before it, unless as long ones were (`SharedPrompts.look`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from rlaif.learning.scoring import plainly
from rlaif.learning.trl_compat import FusedCausalLMOutput
from rlaif.transformers_compat import attention_mask_of

Asked = Callable[..., FusedCausalLMOutput]
"""What gives the log-probabilities of labelled tokens: `model(input_ids=..., attention_mask=..., labels=...)`."""

TOLERANCE = 1e-3
"""By which last hidden states in fp32 may differ, packed and not, as a share of the largest: both are rounded (1e-6).
Where a completion sees what it must not, or stands elsewhere, it is tenths."""
_BY_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
"""What a model is asked for of each labelled token."""


class Packed(NamedTuple):
    """A batch of pairs, one row each."""

    input_ids: torch.Tensor
    """[pairs, packed length]."""
    position_ids: torch.Tensor
    """[pairs, packed length]."""
    parts: torch.Tensor
    """[pairs, packed length]: what a place is of, 0 (what both begin with), 1 (chosen), 2 (rejected) or 3 (padding)."""
    labels: torch.Tensor
    """[pairs, packed length]: the token where it is scored, else -100."""
    places: torch.Tensor
    """[2 x pairs, length - 1]: where in its row each place of the batch stands that may be scored."""

    @property
    def sees(self) -> torch.Tensor:
        """Whether a place (the first of the two) sees another: [pairs, packed length, packed length]."""
        places = torch.arange(self.parts.size(1), device=self.parts.device)
        mine, other = self.parts.unsqueeze(2), self.parts.unsqueeze(1)
        return (places.unsqueeze(1) >= places) & ((other == 0) | (other == mine))

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the packed rows' places [pairs, packed length, ...] as those of the batch, [2 x pairs, length - 1,
        ...]; anything where it has padding."""
        rows = torch.arange(values.size(0), device=values.device).repeat(2).unsqueeze(1)
        return values[rows, self.places]


def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Packed:
    """Chosen and rejected sequences [2 x pairs, length] in one row each pair. Both have a first token in common."""
    pairs, device = input_ids.size(0) // 2, input_ids.device
    lengths = attention_mask.sum(1)
    (chosen, rejected), (chosen_ends, rejected_ends) = input_ids.chunk(2), lengths.chunk(2)
    alike = (chosen == rejected) & attention_mask.bool().chunk(2)[0] & attention_mask.bool().chunk(2)[1]
    again = alike.long().cumprod(1).sum(1) - 1  # the last token in common: [pairs], as all that follow
    width = int((chosen_ends + rejected_ends - again).max())
    at = torch.arange(width, device=device).expand(pairs, -1)  # [pairs, packed length]
    first, second = again.unsqueeze(1), chosen_ends.unsqueeze(1)  # where chosen and rejected go their own way
    ends = second + (rejected_ends - again).unsqueeze(1)
    is_rejected, is_padding = at >= second, at >= ends
    position = torch.where(is_rejected, at - second + first, at).masked_fill(is_padding, 0)
    row = torch.arange(pairs, device=device).unsqueeze(1) + pairs * is_rejected
    there = torch.arange(input_ids.size(1) - 1, device=device).expand(pairs, -1)
    moved = torch.where(there >= first, there - first + second, there)
    return Packed(
        input_ids=input_ids[row, position],
        position_ids=position,
        parts=torch.where(is_padding, 3, torch.where(is_rejected, 2, (at >= first).long())),
        # The copy of the last token in common is there to predict, not to be predicted.
        labels=labels[row, position].masked_fill(is_padding | (at == second), -100),
        places=torch.cat((there, moved)).clamp(max=width - 2),
    )


class SharedPrompts:
    """Asks models for log-probabilities of pairs that share their prompts, where they can and it is less work."""

    def __init__(self, model: PreTrainedModel, root: torch.nn.Module | None = None) -> None:
        """`model` is the policy; its reference is built like it. `root`: see `scoring.plainly`."""
        self._model, self._root = model, root
        self._hidden_size = getattr(model.config, "hidden_size", 0)
        self._agreed = (0, 0)
        """The most tokens of one sequence, and of both, that were computed alike."""
        self._on = False
        self._told = False

    def look(self, pairs: Sequence[tuple[list[int], list[int]]]) -> str | None:
        """Decides whether an update on these pairs (chosen and rejected, prompts included) shares prompts: whether the
        pairs with the longest sequence and the longest row can. An attention that sees only so far shows there alone.

        Returns:
            What to tell, once, where they can't.
        """
        longest = [max(pairs, key=length) for length in (_of_one, _of_both)] if pairs else []
        self._on = all(self._agree(pair) for pair in longest)
        if self._on or self._told:
            return None
        self._told = True
        return (
            f"{type(self._model).__name__} computes something else where chosen and rejected share a prompt: each has "
            "its own, which is slower"
        )

    def asked(self, model: Any) -> Asked:
        """What stands for `model` where a trainer asks it for the log-probabilities of a batch of pairs."""
        return functools.partial(self._ask, model) if self._on else model

    def _ask(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **more: Any
    ) -> FusedCausalLMOutput:
        packed = pack(input_ids, attention_mask, labels)
        balances = more.get("output_router_logits")  # a loss that counts the tokens of each expert, prompts twice
        if balances or not self._is_less(packed.input_ids, input_ids):
            whole: FusedCausalLMOutput = model(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more
            )
            return whole
        inputs = {"attention_mask": attention_mask_of(self._model, packed.sees), "position_ids": packed.position_ids}
        out = model(input_ids=packed.input_ids, labels=packed.labels, **inputs, **more)
        scored = labels[:, 1:] != -100
        given = {name: out[name] for name in _BY_TOKEN if out.get(name) is not None}
        spread = {name: packed.spread(value).masked_fill(~scored, 0) for name, value in given.items()}
        return FusedCausalLMOutput(label_mask=scored, **spread)

    def _is_less(self, packed: torch.Tensor, whole: torch.Tensor) -> bool:
        """A usual layer takes 24 d^2 operations a token, and 4 d for each that its row has room for, d being the hidden
        size: with long completions the longer rows cost more than the prompts that they save."""
        return packed.numel() * (6 * self._hidden_size + packed.size(1)) < whole.numel() * (
            6 * self._hidden_size + whole.size(1)
        )

    def _agree(self, pair: tuple[list[int], list[int]]) -> bool:
        """Whether the model computes a pair's last hidden states alike, packed and not, under its masters; known of one
        that is no longer than those that it did."""
        lengths = (_of_one(pair), _of_both(pair))
        if all(mine <= known for mine, known in zip(lengths, self._agreed, strict=True)):
            return True
        width, device = max(map(len, pair)), self._model.device
        ids = torch.tensor([side + [0] * (width - len(side)) for side in pair], device=device)
        mask = torch.tensor([[1] * len(side) + [0] * (width - len(side)) for side in pair], device=device)
        packed = pack(ids, mask, ids)
        try:
            sees = attention_mask_of(self._model, packed.sees)
            alike = self._last_hidden(packed.input_ids, sees, position_ids=packed.position_ids)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError):
            return False  # a forward pass that isn't made for such a mask, or takes no positions
        whole = self._last_hidden(ids, mask)[:, :-1]
        apart = (packed.spread(alike) - whole).abs().amax(-1)[mask[:, 1:] == 1]  # of places that predict a token
        if not bool((apart <= TOLERANCE * whole.abs().max()).all()):
            return False
        self._agreed = (max(self._agreed[0], lengths[0]), max(self._agreed[1], lengths[1]))
        return True

    @torch.no_grad()
    def _last_hidden(self, input_ids: torch.Tensor, mask: Any, **more: Any) -> torch.Tensor:
        """What goes into the model's head, [rows, length, hidden], by its plain forward pass, outside of autocast."""
        model = self._model
        kept: list[torch.Tensor] = []

        def keep(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            kept.append(inputs[0])
            return (inputs[0][:, :1],)

        was_training = model.training
        model.eval()
        hook = model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            plainly(model, self._root, input_ids=input_ids, attention_mask=mask, use_cache=False, **more)
        finally:
            hook.remove()
            model.train(was_training)
        return kept[0]


def _of_one(pair: tuple[list[int], list[int]]) -> int:
    return max(map(len, pair))


def _of_both(pair: tuple[list[int], list[int]]) -> int:
    return sum(map(len, pair))
