"""What an objective is: how a problem is batched, what is lost, and how its model answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simcot_latent.config import RunConfig
from simcot_latent.data.batch import pad_right
from simcot_latent.data.format import Example, TaggedIds, encode_problem
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.losses import Targets, cross_entropy, share
from simcot_latent.model.gpt import GPT
from simcot_latent.model.step_decoder import StepDecoder
from simcot_latent.model.thoughts import ThoughtFormat


@dataclass
class WrittenBatch:
    """Rows `prompt + text`, every token of the text a label.

    Attributes:
        ids_BT: token ids, padded on the right.
        targets: the labels, over (B, T).
        totals: what the shares of this batch are divided by, once summed over the whole optimizer step.
    """

    ids_BT: Tensor
    targets: Targets
    totals: dict[str, Tensor]


class Objective(nn.Module, ABC):
    """One way to train: turns problems into batches and batches into a loss with named parts.

    The module holds all that is trained, so that one DDP wrapper sees every parameter. A subclass is registered by
    naming it in a yaml file of `configs/mode/`.
    """

    Config: ClassVar[type]
    """A dataclass of the config sections that belong to this objective alone."""

    step_decoder: StepDecoder | None

    def __init__(self, model: GPT, tokenizer: Tokenizer, run: RunConfig, config: Any) -> None:
        super().__init__()
        self.model = model
        self.step_decoder = None
        self.tokenizer = tokenizer
        self.run = run
        self.config = config

    @abstractmethod
    def thoughts_at(self, progress: float) -> ThoughtFormat:
        """How the model is trained to answer at a share of training (0: start, 1: end).

        A change begins a new stage of training.
        """

    @property
    def thoughts(self) -> ThoughtFormat:
        """How the trained model answers."""
        return self.thoughts_at(1.0)

    def begin_stage(self, thoughts: ThoughtFormat) -> None:
        """Called before the first step of each stage but the first."""

    @property
    def resets_optimizer(self) -> bool:
        """Whether the optimizer's moments are forgotten when a stage begins."""
        return False

    @property
    def extra_length(self) -> int:
        """Positions this objective needs beyond the written form of a problem."""
        return 0

    def encode(self, problem: Problem) -> Example:
        """A problem in token ids."""
        return encode_problem(self.tokenizer, problem, thinks=self.thoughts.thinks, rationale=self.run.rationale)  # type: ignore[arg-type]

    @abstractmethod
    def collate(self, examples: Sequence[Example], thoughts: ThoughtFormat) -> Any:
        """A batch to train answering like `thoughts` on: a dataclass of CPU tensors and `totals` (see `losses`)."""

    @abstractmethod
    def forward(self, batch: Any, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Shares of the optimizer step: `loss`, which is minimised, and what else is to be logged."""

    def collate_written(self, prompts: Sequence[list[int]], texts: Sequence[TaggedIds]) -> WrittenBatch:
        """Prompts without loss, then texts in which the tokens of steps weigh `step_weight_multiplier`."""
        rows = [prompt + text.ids for prompt, text in zip(prompts, texts, strict=True)]
        ids_BT, mask_BT = pad_right(rows, self.tokenizer.pad_id)
        # The hidden state *before* a token predicts it.
        targets = Targets.from_rows(
            [
                (len(prompt) - 1, text.ids, self.weigh(text), text.in_step)
                for prompt, text in zip(prompts, texts, strict=True)
            ],
            ids_BT,
        )
        return WrittenBatch(ids_BT, targets, target_totals(targets) | position_totals(mask_BT))

    def weigh(self, text: TaggedIds) -> list[float]:
        """The loss weight of each token of a text."""
        return [self.run.step_weight_multiplier if in_step else 1.0 for in_step in text.in_step]

    def written_shares(self, batch: WrittenBatch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted cross-entropy sum(w * ce) / sum(w) of a written batch, and the accuracy on its step tokens."""
        # Padding is on the right, so causal attention alone keeps it out of sight.
        hidden_BTD = self.model(batch.ids_BT)
        return self.answer_shares(hidden_BTD, batch.targets, totals)

    def answer_shares(self, hidden: Tensor, targets: Targets, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Shares of `loss` and, where tracked, `step_accuracy` of the labels in `targets`."""
        loss_M, correct_M = cross_entropy(hidden, targets, self.model.logits)
        shares = {"loss": share(loss_M * targets.weight_M, totals["weights"])}
        if self.run.track_step_accuracy:
            shares["step_accuracy"] = share((correct_M & targets.step_M).float(), totals["step_tokens"])
        return shares


def target_totals(targets: Targets) -> dict[str, Tensor]:
    """Labels, their weights, and the labels that are tokens of steps."""
    return {
        "tokens": torch.tensor(float(len(targets.label_M))),
        "weights": targets.weight_M.sum(dtype=torch.float32),
        "step_tokens": targets.step_M.sum(dtype=torch.float32),
    }


def position_totals(*masks: Tensor) -> dict[str, Tensor]:
    """Positions computed, padding included, and those that are real."""
    return {
        "positions": torch.tensor(float(sum(mask.numel() for mask in masks))),
        "real_positions": torch.tensor(float(sum(int(mask.sum()) for mask in masks))),
    }
