"""What one pass of training reads: problems in the form in which a stage of training has them; see `method.py`.

Shapes: P tokens of all questions with `<|bot|>`, or of all rows; A of all texts from `<|eot|>` on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from simcot_latent.loops.given import Given
from simcot_latent.model.losses import Targets
from simcot_latent.model.packing import Packing


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


@dataclass
class ThoughtBatch:
    """Questions to think about, what follows the thoughts, and what the terms need.

    Attributes:
        question_ids_P, questions: questions, `<|bot|>` of all rows last; how the first pass lies, if there are others.
        text_ids_A, texts: `<|eot|>` and the text after it, without the last token; how the last pass lies.
        targets: the text after `<|eot|>`.
        counts: the states of each row; see `ThoughtLoop.states`.
        given: the thoughts, of a loop that is given them in training.
        terms: each term's own batch, by name.
        totals: see `WrittenBatch`.
        written: the written pass, if a term needs one; its totals are among the others, as `written_...`.
    """

    question_ids_P: Tensor
    questions: Packing
    text_ids_A: Tensor
    texts: Packing
    targets: Targets
    counts: tuple[int, ...]
    terms: dict[str, Any]
    totals: dict[str, Tensor]
    given: Given | None = None
    written: WrittenBatch | None = None


def flat_ids(*parts: Iterable[Sequence[int]]) -> Tensor:
    """Token ids of rows, one after the other."""
    return torch.tensor(list(chain.from_iterable(chain.from_iterable(parts))), dtype=torch.long)


def position_totals(*packings: Packing) -> dict[str, Tensor]:
    """Tokens that are read, and the slots of the rectangles in which attention lays them out."""
    return {
        "positions": torch.tensor(float(sum(map(len, packings)))),
        "slots": torch.tensor(float(sum(packing.slots for packing in packings))),
    }
