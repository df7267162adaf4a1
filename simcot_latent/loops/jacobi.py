"""loop=jacobi: all thoughts are updated together, a few times (PCCoT).

Pass 0 reads the question, `<|bot|>` and K times a learned vector. Then x_1 = p(h_bot) and x_i = p(h_{i-1}), where h are
the hidden states of the pass before and p the projector, if there is one; T passes read the x at the same positions,
each seeing the question but not the passes before it. x_1 stays. The text sees the last pass. With T >= K this is
loop=sequential. Source: PCCoT, https://arxiv.org/abs/2506.18582, section 3.

Shapes: B rows, P tokens of all questions with `<|bot|>`, K states, N thoughts of all rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from simcot_latent.errors import require
from simcot_latent.loops.base import ThoughtLoop, Thoughts, by_row, keys_and_values, taps_at_last
from simcot_latent.loops.sequential import Projector
from simcot_latent.model.cache import StaticCaches, make_cache
from simcot_latent.model.gpt import GPT, init_weights
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


class Jacobi(ThoughtLoop):
    """T passes over all thoughts."""

    Config = JacobiConfig
    config: JacobiConfig
    gives_hidden = True
    gives_keys = True

    def __init__(self, width: int, config: JacobiConfig) -> None:
        super().__init__(width, config)
        self.start_D = nn.Parameter(torch.empty(width).normal_(std=0.02))  # as an embedding starts
        self.projector = None if config.projector_width is None else Projector(width, config.projector_width)
        if self.projector is not None:
            self.projector.apply(init_weights)

    def pack_questions(self, lengths: Sequence[int], counts: Sequence[int], tight: bool = False) -> Packing:
        return Packing.of(lengths, [1] * len(lengths), counts, tight=tight)

    def passes(self, counts: Sequence[int]) -> list[Packing]:
        return [Packing.of(counts)] * self.config.iterations

    def thought(self, hidden: Tensor) -> Tensor:
        """The thought (..., D) that a hidden state (..., D) becomes: itself, or its projection."""
        return hidden if self.projector is None else self.projector(hidden)

    def think(
        self,
        model: GPT,
        questions_PD: Tensor,
        packing: Packing,
        counts: Sequence[int],
        room: int,
        caches: StaticCaches | None = None,
        keys: bool = False,
    ) -> Thoughts:
        B, N, T = packing.rows, sum(counts), self.config.iterations
        device = questions_PD.device
        cache = make_cache(B, packing.longest + room, caches)
        x_ND = self.start_D.to(questions_PD.dtype).repeat(N, 1)  # with T = 0 these are the thoughts: no view of it
        taps = taps_at_last(packing, N) if keys and (T == 0 or N == 0) else None
        hidden_MD = model.transformer(torch.cat((questions_PD, x_ND)), packing, cache, read_out=B + N, taps=taps)
        bot_BD, hidden_ND = hidden_MD.split([B, N])
        if N == 0:
            none_BKD = by_row(hidden_ND, counts)
            return Thoughts(none_BKD, cache, None, none_BKD, bot_BD, *keys_and_values(taps, counts))
        again = Packing.of(counts).to(device)
        # Each thought comes of the state before it: that of the thought before, or, for the first, of <|bot|>.
        begins = [begin - count for begin, count in zip(accumulate(counts), counts, strict=True)]
        is_first_N = torch.zeros(N, dtype=torch.bool)
        is_first_N[[begin for begin, count in zip(begins, counts, strict=True) if count]] = True
        is_first_N1 = is_first_N.unsqueeze(1).to(device)
        first_ND = self.thought(bot_BD)[again.row_P]
        for step in range(T):
            cache.rewind(again)
            x_ND = torch.where(is_first_N1, first_ND, self.thought(hidden_ND).roll(1, dims=0))
            if keys and step == T - 1:
                taps = taps_at_last(again, N)
            hidden_ND = model.transformer(x_ND, again, cache, taps=taps)
        found = keys_and_values(taps, counts)
        return Thoughts(by_row(x_ND, counts), cache, None, by_row(hidden_ND, counts), bot_BD, *found)
