"""What learners from pairs share: rows are preferences, and a step knows how far apart their sides are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from rlaif.learning.base import Row, TrlLearner
from rlaif.learning.packing import SharedPrompts
from rlaif.records import Preference, TokenSequence


class PairwiseLearner(TrlLearner):
    """A TRL trainer that takes a chosen and a rejected completion of one prompt, and computes that prompt once."""

    row_type: ClassVar = Preference
    step_metrics: ClassVar = {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `TrlLearner`."""
        super().__init__(*args, **kwargs)
        self._prompts = SharedPrompts(self.policy, self.root)
        self.trainer.asked = self._prompts.asked

    def look_at(self, rows: Sequence[Row]) -> None:
        """Whether these rows can share their prompts."""
        sides = [(row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]) for row in rows]
        if (note := self._prompts.look(sides)) is not None:
            self.notes.append(note)

    def row(self, given: Preference) -> Row:
        """A preference: `prompt`, `prompt_ids`, `chosen_ids` and `rejected_ids`."""
        return {
            "row_id": given.row_id,
            "completion_ids": (given.chosen_id, given.rejected_id),
            "prompt": given.prompt,
            "prompt_ids": list(given.prompt_token_ids),
            "chosen_ids": list(given.chosen_token_ids),
            "rejected_ids": list(given.rejected_token_ids),
        }

    def sequences(self, row: Row) -> list[TokenSequence]:
        """Both sides."""
        prompt = tuple(row["prompt_ids"])
        return [
            TokenSequence(prompt_token_ids=prompt, token_ids=tuple(row[side]))
            for side in ("chosen_ids", "rejected_ids")
        ]
