"""loop=looped: a block of thoughts is read again and again, each time with what came out before (LOTUS).

Pass 0 reads the question, `<|bot|>` and K times a learned vector E. R further passes read E plus the hidden state of
the pass before at the same position. Each sees the question but not the passes before it; the text sees the last. What
stands at a position after the last pass is the thought. Source: LOTUS, https://arxiv.org/abs/2606.31779.

Shapes: B rows, N thoughts of all rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from simcot_latent.errors import require
from simcot_latent.loops.block import Block, Update
from simcot_latent.model.packing import Packing


@dataclass(frozen=True)
class LoopedConfig:
    """Settings of loop=looped.

    Attributes:
        loops: R, the passes over all thoughts after the first; LOTUS takes as many as there are step groups.
    """

    loops: int = 4

    def __post_init__(self) -> None:
        require(self.loops >= 0, "latent.loops", self.loops, "at least 0")


class Looped(Block):
    """R passes over all thoughts, each on top of the one before."""

    Config = LoopedConfig
    config: LoopedConfig

    @property
    def again(self) -> int:
        return self.config.loops

    def update(self, start_ND: Tensor, bot_BD: Tensor, block: Packing) -> Update:
        return lambda hidden_ND: start_ND + hidden_ND

    def latents(self, x_ND: Tensor, hidden_ND: Tensor) -> Tensor:
        return hidden_ND
