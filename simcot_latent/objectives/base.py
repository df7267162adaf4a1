"""What an objective is: how a problem is batched, what is lost, and how its model answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simcot_latent.config import RunConfig
from simcot_latent.data.format import Example, TaggedIds, concatenate, encode_problem
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.losses import Labelled, Targets, at_least_tiny, cross_entropy, share
from simcot_latent.model.packing import Packing
from simcot_latent.model.step_decoder import StepDecoder
from simcot_latent.model.thoughts import ThoughtFormat


@dataclass
class WrittenBatch:
    """Rows `prompt + text`, every token of the text a label.

    Attributes:
        ids_P: token ids of all rows but each one's last: first the tokens that predict nothing (prompts without their
            last token), then those that predict a text.
        packing: how they lie.
        targets: the labels, in the order of the latter.
        totals: what the shares of this batch are divided by, once summed over the whole optimizer step.
    """

    ids_P: Tensor
    packing: Packing
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

    def begin_stage(self, before: ThoughtFormat, thoughts: ThoughtFormat) -> None:
        """Called before the first step of each stage but the first, with how the stage before it answers, too."""

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
        thoughts = self.thoughts
        return encode_problem(
            self.tokenizer,
            problem,
            thinks=thoughts.thinks,
            rationale=self.run.rationale,  # type: ignore[arg-type]
            question_end=thoughts.question_end,
            answer_mark=thoughts.answer_mark,
        )

    @abstractmethod
    def collate(self, examples: Sequence[Example], thoughts: ThoughtFormat) -> Any:
        """A batch to train answering like `thoughts` on: a dataclass of CPU tensors and `totals` (see `losses`)."""

    @abstractmethod
    def forward(self, batch: Any, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Shares of the optimizer step: `loss`, which is minimised, and what else is to be logged."""

    def collate_written(self, prompts: Sequence[list[int]], texts: Sequence[TaggedIds]) -> WrittenBatch:
        """Prompts without loss, then texts in which the tokens of steps weigh `step_weight_multiplier`."""
        silent = [prompt[:-1] for prompt in prompts]
        predicting = [[prompt[-1], *text.ids[:-1]] for prompt, text in zip(prompts, texts, strict=True)]
        packing = Packing.of(list(map(len, silent)), list(map(len, predicting)), tight=True)
        targets = self.text_targets(texts)
        return WrittenBatch(
            flat_ids(silent, predicting), packing, targets, target_totals(targets) | position_totals(packing)
        )

    def text_targets(self, texts: Sequence[TaggedIds]) -> Targets:
        """Every token of every text, one text after the other."""
        text = concatenate(texts)
        return Targets.of(text.ids, self.weigh(text), text.in_step)

    def weigh(self, text: TaggedIds) -> list[float]:
        """The loss weight of each token of a text."""
        return [self.run.step_weight_multiplier if in_step else 1.0 for in_step in text.in_step]

    def written_shares(self, batch: WrittenBatch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted cross-entropy sum(w * ce) / sum(w) of a written batch, and the accuracy on its step tokens."""
        targets = batch.targets
        scale_M = targets.weight_M / at_least_tiny(totals["weights"])
        with gathered_gradients(self.model):
            hidden_MD = self.model(batch.ids_P, batch.packing, read_out=len(targets))
            found = cross_entropy(
                Labelled(hidden_MD, self.model.output_table, targets.label_M, scale_M),
                softcap=self.model.config.logit_softcap,
            )
        shares = {"loss": found.loss}
        if self.run.track_step_accuracy:
            shares["step_accuracy"] = share((found.correct_M & targets.step_M).float(), totals["step_tokens"])
        return shares


def flat_ids(*parts: Iterable[Sequence[int]]) -> Tensor:
    """Token ids of rows, one after the other."""
    return torch.tensor(list(chain.from_iterable(chain.from_iterable(parts))), dtype=torch.long)


def target_totals(targets: Targets) -> dict[str, Tensor]:
    """Labels, their weights, and the labels that are tokens of steps."""
    return {
        "tokens": torch.tensor(float(len(targets))),
        "weights": targets.weight_M.sum(dtype=torch.float32),
        "step_tokens": targets.step_M.sum(dtype=torch.float32),
    }


def position_totals(*packings: Packing) -> dict[str, Tensor]:
    """Tokens that are read, and the slots of the rectangles in which attention lays them out."""
    return {
        "positions": torch.tensor(float(sum(map(len, packings)))),
        "slots": torch.tensor(float(sum(packing.slots for packing in packings))),
    }
