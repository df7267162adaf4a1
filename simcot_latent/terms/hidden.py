"""distill=hidden: where the answer's number begins, hidden states are pulled towards those of the written pass (CODI).

    D = mean over layers l of  mean over rows and width of smooth_l1(s_l - t_l) / std(t_l)

s_l and t_l are the hidden states of layer l at the token before the number, after thoughts and after written steps. No
gradient reaches t_l. std is the unbiased one over all of t_l in the micro-batch, so what the loss comes to depends, a
little, on how a step is cut into micro-batches (`device_batch_size`, ranks); without it (`distill_norm=none`) it does
not. The layers are the embedding output, each block and the last after the final norm. Source: CODI,
https://arxiv.org/abs/2502.21074, section 3, and its code.

Shapes: B rows, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simcot_latent.errors import require, require_choice
from simcot_latent.model.taps import transformers_layers
from simcot_latent.terms.base import Collated, Rows, Term, TermLoss, Trace, Wanted

DISTANCES: dict[str, Callable[..., Tensor]] = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "mse": F.mse_loss}


@dataclass(frozen=True)
class HiddenConfig:
    """Settings of distill=hidden.

    Attributes:
        distill_weight: weight of the pull; CODI takes 1 for GPT-2 and 20 for models of a billion parameters.
        distill_distance: `smooth_l1` (CODI), `l1` or `mse`.
        distill_layers: `all` (CODI: the embedding output among them) or `blocks` (PCCoT: without it).
        distill_norm: what a layer's distance is divided by: `std` (CODI) or `none`.
    """

    distill_weight: float = 1.0
    distill_distance: str = "smooth_l1"
    distill_layers: str = "all"
    distill_norm: str = "std"

    def __post_init__(self) -> None:
        require(self.distill_weight >= 0, "loss.distill_weight", self.distill_weight, "at least 0")
        require_choice("loss.distill_distance", self.distill_distance, tuple(DISTANCES))
        require_choice("loss.distill_layers", self.distill_layers, ("all", "blocks"))
        require_choice("loss.distill_norm", self.distill_norm, ("std", "none"))


@dataclass
class HiddenBatch:
    """Where the number of each answer is predicted: tokens of the text's pass, and of the written one."""

    text_B: Tensor
    written_B: Tensor


class Hidden(Term):
    """The pull of hidden states."""

    Config = HiddenConfig
    config: HiddenConfig
    name = "distill"
    needs_written = True

    @property
    def weight(self) -> float:
        return self.config.distill_weight

    @property
    def layers(self) -> list[int]:
        """Which hidden states, as `Taps` count them."""
        layers = transformers_layers(self.model.config.n_layer)
        return layers if self.config.distill_layers == "all" else layers[1:]

    def collate(self, rows: Rows) -> Collated:
        every = range(len(rows.examples))
        text = [rows.in_text(row, rows.number_in(rows.texts, row)) for row in every]
        written = [rows.in_written(row, rows.number_in(rows.solutions, row)) for row in every]
        return Collated(HiddenBatch(torch.tensor(text), torch.tensor(written)))

    def wants_of_text(self, batch: HiddenBatch) -> Wanted:
        return Wanted(batch.text_B, self.layers, hidden=True)

    def wants_of_written(self, batch: HiddenBatch) -> Wanted:
        return Wanted(batch.written_B, self.layers, hidden=True, detach=True)

    def loss(self, trace: Trace, batch: HiddenBatch, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        assert trace.text_taps is not None
        assert trace.written_taps is not None
        student_LBD, teacher_LBD = trace.text_taps.hidden_LND.float(), trace.written_taps.hidden_LND.float()
        distance_LBD = DISTANCES[self.config.distill_distance](student_LBD, teacher_LBD, reduction="none")
        distance_L = distance_LBD.mean(2).sum(1) / totals["rows"]
        if self.config.distill_norm == "std":
            distance_L = distance_L / teacher_LBD.flatten(1).std(1)
        return TermLoss(value=distance_L.mean())
