"""steps=own_head: the model's own output head must say the steps at the thoughts' positions (LOTUS).

Each step group has C thoughts. The tokens of group b's step, and an end token if there is room, are predicted at
positions b * C .. b * C + C - 1 of [<|bot|>, thought 1, .., thought K], each by the position before it, so `<|bot|>`
predicts the first. A step of more than C tokens is cut. L_step is the mean over all these tokens. The published code
has no end tokens (`own_head_end=false`); with them, what a group says can be read. Source: LOTUS,
https://arxiv.org/abs/2606.31779.

Shapes: B rows, K thoughts, D width, M labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simcot_latent.config import MethodConfig
from simcot_latent.data.format import TaggedIds, join, newline
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.model.gpt import GPT
from simcot_latent.model.losses import Labelled, at_least_tiny, share
from simcot_latent.model.packing import take
from simcot_latent.terms.base import Collated, Rows, Term, TermLoss, Trace
from simcot_latent.terms.steps import StepGroups


@dataclass(frozen=True)
class OwnHeadSettings:
    """The settings that this part has from `latent` and `loss`, see there, and one of its own.

    Attributes:
        own_head_end: whether a step that leaves room in its group is followed by the end token.
    """

    step_weight: float = 1.0
    latents_per_step: int = 1
    surplus: str = "merge"
    missing: str = "mask"
    own_head_end: bool = True


@dataclass
class OwnHeadBatch:
    """Which of the B * (1 + K) hidden states at `<|bot|>` and thoughts predicts each label."""

    index_M: Tensor
    label_M: Tensor


class OwnHead(Term):
    """L_step through the model's own head."""

    Config = OwnHeadSettings
    config: OwnHeadSettings
    name = "step"
    needs_hidden = True
    is_read = True

    def __init__(self, model: GPT, tokenizer: Tokenizer, method: MethodConfig) -> None:
        super().__init__(model, tokenizer, method)
        config = self.config
        self.groups = StepGroups(config.latents_per_step, config.surplus, config.missing)
        self.newline = newline(tokenizer)
        self.end = [tokenizer.end_id] if config.own_head_end else []

    @property
    def weight(self) -> float:
        return self.config.step_weight

    def collate(self, rows: Rows) -> Collated:
        c, K = self.groups.latents_per_step, max(rows.counts)
        index: list[int] = []
        labels: list[int] = []
        for row, (example, stage, count) in enumerate(zip(rows.examples, rows.stages, rows.counts, strict=True)):
            answer = TaggedIds(example.answer.ids[:-1], example.answer.in_step[:-1])
            targets = self.groups.targets(example.steps, answer, self.groups.count(count), stage)
            for group, steps in enumerate(targets):
                ids = [] if steps is None else [*join(steps, self.newline).ids, *self.end][:c]
                index += range(row * (K + 1) + group * c, row * (K + 1) + group * c + len(ids))
                labels += ids
        batch = OwnHeadBatch(torch.tensor(index, dtype=torch.long), torch.tensor(labels, dtype=torch.long))
        return Collated(batch, {"step_tokens": torch.tensor(float(len(labels)))})

    def loss(self, trace: Trace, batch: OwnHeadBatch, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        bot_BD, hidden_BKD = trace.thoughts.bot_BD, trace.thoughts.hidden_BKD
        assert bot_BD is not None
        assert hidden_BKD is not None
        states_ND = torch.cat((bot_BD.unsqueeze(1), hidden_BKD), dim=1).flatten(0, 1)
        scale_M = torch.ones_like(batch.label_M, dtype=torch.float32) / at_least_tiny(totals["step_tokens"])

        def metrics(nll_M: Tensor, correct_M: Tensor) -> dict[str, Tensor]:
            return {"step_accuracy": share(correct_M.float(), totals["step_tokens"])}

        hidden_MD = take(states_ND, batch.index_M)
        return TermLoss(Labelled(hidden_MD, self.model.output_table, batch.label_M, scale_M), metrics=metrics)
