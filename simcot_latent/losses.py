"""The arithmetic that objectives share: where labels are, what they weigh, and what a share of a loss is.

Every number here is a *share of an optimizer step*: a sum over the labels of one micro-batch on one rank, divided by a
total over all micro-batches and all ranks. Shares therefore add up to the step's value, whatever way a step is cut.

Shapes: M labelled positions, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Targets:
    """The labelled positions of a padded batch, and only those: logits are computed nowhere else.

    Attributes:
        index_M: position in the batch flattened to (rows * length), whose hidden state predicts the label.
        label_M: the token to predict.
        weight_M: what the label weighs in the loss.
        step_M: True where the label is a token of a calculator step.
    """

    index_M: Tensor
    label_M: Tensor
    weight_M: Tensor
    step_M: Tensor

    @classmethod
    def from_rows(
        cls, rows: Iterable[tuple[int, Sequence[int], Sequence[float], Sequence[bool]]], ids_BT: Tensor
    ) -> Targets:
        """One (first position, labels, weights, step flags) a row of the padded batch `ids_BT`."""
        length = ids_BT.shape[1]
        index: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        steps: list[bool] = []
        for row, (start, row_labels, row_weights, row_steps) in enumerate(rows):
            first = row * length + start
            index.extend(range(first, first + len(row_labels)))
            labels.extend(row_labels)
            weights.extend(row_weights)
            steps.extend(row_steps)
        return cls(
            torch.tensor(index, dtype=torch.long),
            torch.tensor(labels, dtype=torch.long),
            torch.tensor(weights, dtype=torch.float32),
            torch.tensor(steps, dtype=torch.bool),
        )


def cross_entropy(hidden: Tensor, targets: Targets, logits_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Per-label cross-entropy and correctness.

    Args:
        hidden: hidden states, (rows, length, D).
        targets: where the labels are.
        logits_of: hidden states (M, D) to logits (M, V).

    Returns:
        Cross-entropy in nats (M,), float32, and whether the most likely token is the label (M,).
    """
    logits_MV = logits_of(hidden.flatten(0, 1)[targets.index_M])
    correct_M = logits_MV.detach().argmax(-1) == targets.label_M
    return F.cross_entropy(logits_MV, targets.label_M, reduction="none"), correct_M


def share(values_M: Tensor, total: Tensor) -> Tensor:
    """sum(values) / total; a total of zero (nothing of that kind in the whole step) gives zero."""
    return values_M.sum() / total.clamp(min=torch.finfo(torch.float32).tiny)


def add_up(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Key-wise sum of shares, or of totals."""
    return {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}
