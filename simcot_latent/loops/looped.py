"""loop=looped: a block of thoughts is read again and again, each time with what came out before (LOTUS).

Pass 0 reads the question, `<|bot|>` and K times a learned vector E. R further passes read E plus the hidden state of
the pass before at the same position. Each sees the question but not the passes before it; the text sees the last. What
stands at a position after the last pass is the thought. Source: LOTUS, https://arxiv.org/abs/2606.31779.

Shapes: B rows, P tokens of all questions with `<|bot|>`, K states, N thoughts of all rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simcot_latent.errors import require
from simcot_latent.loops.base import ThoughtLoop, Thoughts, by_row, keys_and_values, taps_at_last
from simcot_latent.model.cache import StaticCaches, make_cache
from simcot_latent.model.gpt import GPT
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


class Looped(ThoughtLoop):
    """R passes over all thoughts, each on top of the one before."""

    Config = LoopedConfig
    config: LoopedConfig
    gives_hidden = True
    gives_keys = True

    def __init__(self, width: int, config: LoopedConfig) -> None:
        super().__init__(width, config)
        self.start_D = nn.Parameter(torch.empty(width).normal_(std=0.02))  # as an embedding starts

    def pack_questions(self, lengths: Sequence[int], counts: Sequence[int], tight: bool = False) -> Packing:
        return Packing.of(lengths, [1] * len(lengths), counts, tight=tight)

    def passes(self, counts: Sequence[int]) -> list[Packing]:
        return [Packing.of(counts)] * self.config.loops

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
        B, N, R = packing.rows, sum(counts), self.config.loops
        cache = make_cache(B, packing.longest + room, caches)
        start_ND = self.start_D.to(questions_PD.dtype).expand(N, -1)
        taps = taps_at_last(packing, N) if keys and (R == 0 or N == 0) else None
        hidden_MD = model.transformer(torch.cat((questions_PD, start_ND)), packing, cache, read_out=B + N, taps=taps)
        bot_BD, hidden_ND = hidden_MD.split([B, N])
        if N == 0:
            none_BKD = by_row(hidden_ND, counts)
            return Thoughts(none_BKD, cache, None, none_BKD, bot_BD, *keys_and_values(taps, counts))
        again = Packing.of(counts).to(questions_PD.device)
        for loop in range(R):
            cache.rewind(again)
            if keys and loop == R - 1:
                taps = taps_at_last(again, N)
            hidden_ND = model.transformer(start_ND + hidden_ND, again, cache, taps=taps)
        latents_BKD = by_row(hidden_ND, counts)
        return Thoughts(latents_BKD, cache, None, latents_BKD, bot_BD, *keys_and_values(taps, counts))
