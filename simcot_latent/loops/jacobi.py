"""loop=jacobi: all thoughts are updated together, a few times (PCCoT).

Pass 0 reads the question, `<|bot|>` and K times a learned vector. Then x_1 = p(h_bot) and x_i = p(h_{i-1}), where h are
the hidden states of the pass before and p the projector, if there is one; T passes read the x at the same positions,
each seeing the question but not the passes before it. x_1 stays. The text sees the last pass. With T >= K this is
loop=sequential. Source: PCCoT, https://arxiv.org/abs/2506.18582, section 3.

Shapes: B rows, N thoughts of all rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simcot_latent.errors import require
from simcot_latent.loops.block import Block, Update
from simcot_latent.loops.sequential import Projector
from simcot_latent.model.gpt import init_weights
from simcot_latent.model.packing import Packing


@dataclass(frozen=True)
class JacobiConfig:
    """Settings of loop=jacobi.

    Attributes:
        iterations: T, the passes over all thoughts after the first; PCCoT takes 3.
        projector_width: as of loop=sequential.
    """

    iterations: int = 3
    projector_width: int | None = None

    def __post_init__(self) -> None:
        require(self.iterations >= 0, "latent.iterations", self.iterations, "at least 0")
        width = self.projector_width
        require(width is None or width >= 1, "latent.projector_width", width, "at least 1, or null for no projector")


class Jacobi(Block):
    """T passes over all thoughts."""

    Config = JacobiConfig
    config: JacobiConfig

    def __init__(self, width: int, config: JacobiConfig) -> None:
        super().__init__(width, config)
        self.projector = None if config.projector_width is None else Projector(width, config.projector_width)
        if self.projector is not None:
            self.projector.apply(init_weights)

    @property
    def again(self) -> int:
        return self.config.iterations

    def thought(self, hidden: Tensor) -> Tensor:
        """The thought (..., D) that a hidden state (..., D) becomes: itself, or its projection."""
        return hidden if self.projector is None else self.projector(hidden)

    def update(self, start_ND: Tensor, bot_BD: Tensor, block: Packing) -> Update:
        # Each thought comes of the state before it: that of the thought before, or, for the first, of <|bot|>.
        is_first_N1, first_ND = (block.offset_P == 0).unsqueeze(1), self.thought(bot_BD)[block.row_P]
        return lambda hidden_ND: torch.where(is_first_N1, first_ND, self.thought(hidden_ND).roll(1, dims=0))

    def latents(self, x_ND: Tensor, hidden_ND: Tensor) -> Tensor:
        return x_ND
