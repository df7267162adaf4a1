"""mode=weighted: fine-tuning on written solutions in which calculator steps weigh more. The baseline.

loss = sum(w * ce) / sum(w): w = `step_weight_multiplier` on tokens inside `<<..>>`, 1 elsewhere, and no
loss on the question.
There are no thoughts and no decoder here: it is *not* SIM-CoT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from simcot_latent.data.format import Example, concatenate
from simcot_latent.model.thoughts import ThoughtFormat
from simcot_latent.objectives.base import Objective, WrittenBatch


@dataclass
class WeightedConfig:
    """The baseline has no section of its own."""


class WeightedObjective(Objective):
    """Step-weighted fine-tuning on written solutions."""

    Config = WeightedConfig

    def thoughts_at(self, progress: float) -> ThoughtFormat:
        return ThoughtFormat(thinks=False)

    def collate(self, examples: Sequence[Example], thoughts: ThoughtFormat) -> WrittenBatch:
        texts = [concatenate([example.rationale, example.answer]) for example in examples]
        return self.collate_written([example.question for example in examples], texts)

    def forward(self, batch: WrittenBatch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.written_shares(batch, totals)
