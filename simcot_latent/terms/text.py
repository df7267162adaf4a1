"""The answer loss: cross-entropy of the text that the model writes, with or without thoughts before it.

L_ans = sum(w * ce) / sum(w): w = `step_weight_multiplier` on tokens inside `<<..>>`, 1 elsewhere, and no loss on the
question. Without thoughts that is step-weighted fine-tuning, mode=weighted.

Shapes: M labels, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import Example, TaggedIds, concatenate, lines
from simcot_latent.model.losses import Labelled, Targets, at_least_tiny, share


def written_text(example: Example, stage: Stage, newline: TaggedIds) -> TaggedIds:
    """What is written of a problem in a stage: what is left of its solution, then the answer."""
    return concatenate([written_solution(example, stage, newline), example.answer])


def written_solution(example: Example, stage: Stage, newline: TaggedIds) -> TaggedIds:
    """The steps that no thought replaces, without the tokens that are removed from them."""
    solution = example.rationale
    if stage.first_written != 0:
        steps = [] if stage.first_written is None else example.steps[stage.first_written :]
        solution = lines(steps, newline)
    part = kept(len(solution), stage.removed, stage.removed_side)
    return TaggedIds(solution.ids[part], solution.in_step[part])


def kept(length: int, removed: int | None, side: str) -> slice:
    """Which of so many tokens are left where some are removed.

    Args:
        removed: how many; None, or more than there are: all.
        side: from the `left` or the `right`.
    """
    gone = length if removed is None else min(removed, length)
    return slice(gone, length) if side == "left" else slice(0, length - gone)


def thought_text(example: Example, stage: Stage, newline: TaggedIds) -> TaggedIds:
    """What would be written in place of the thoughts of a stage."""
    if stage.first_written is None or stage.overlap:
        return example.rationale
    return lines(example.steps[: stage.first_written], newline)


def text_targets(texts: Sequence[TaggedIds], step_weight: float) -> Targets:
    """Every token of every text, one text after the other; the tokens of steps weigh `step_weight`."""
    text = concatenate(texts)
    return Targets.of(text.ids, [step_weight if in_step else 1.0 for in_step in text.in_step], text.in_step)


def target_totals(targets: Targets) -> dict[str, Tensor]:
    """Labels, their weights, and the labels that are tokens of steps."""
    return {
        "tokens": torch.tensor(float(len(targets))),
        "weights": targets.weight_M.sum(dtype=torch.float32),
        "step_tokens": targets.step_M.sum(dtype=torch.float32),
    }


def text_labels(hidden_MD: Tensor, table_VD: Tensor, targets: Targets, weights: Tensor) -> Labelled:
    """The labels of a text, scaled so that their cross-entropies sum to the loss.

    Args:
        weights: the sum of all labels' weights in the optimizer step.
    """
    return Labelled(hidden_MD, table_VD, targets.label_M, targets.weight_M / at_least_tiny(weights))


def written_step_accuracy(correct_M: Tensor, targets: Targets, totals: dict[str, Tensor]) -> Tensor:
    """The share of the tokens of written steps that are the most likely ones."""
    return share((correct_M & targets.step_M).float(), totals["step_tokens"])
