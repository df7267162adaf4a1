"""written=joint: the same model also writes the whole solution, in a pass of its own (CODI's teacher).

The pass reads the question without `<|bot|>`, the steps and the answer. Source: CODI, https://arxiv.org/abs/2502.21074,
section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from simcot_latent.errors import require
from simcot_latent.terms.base import Term, TermLoss, Trace
from simcot_latent.terms.text import text_labels


@dataclass(frozen=True)
class JointConfig:
    """Settings of written=joint.

    Attributes:
        written_weight: weight of the loss on the written solution; 0: the pass trains nothing by itself.
    """

    written_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.written_weight >= 0, "loss.written_weight", self.written_weight, "at least 0")


class Joint(Term):
    """Cross-entropy of the written solution, weighted as the answer loss is."""

    Config = JointConfig
    config: JointConfig
    name = "written"
    needs_written = True

    @property
    def weight(self) -> float:
        return self.config.written_weight

    def loss(self, trace: Trace, batch: Any, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        assert trace.written_MD is not None
        assert trace.written_targets is not None
        table_VD, weights = self.model.output_table, totals["written_weights"]
        return TermLoss(text_labels(trace.written_MD, table_VD, trace.written_targets, weights))
