"""Loops that read all thoughts at once, several times over: `jacobi` and `looped`.

Pass 0 reads the question, `<|bot|>` and K times a learned vector. Each further pass reads something else at the same
positions, in place of the pass before: it sees the question and itself. The text sees the last.

Shapes: B rows, P tokens of all questions with `<|bot|>`, N thoughts of all rows, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simcot_latent.loops.base import ThoughtLoop, Thoughts, by_row, keys_and_values, taps_at_last
from simcot_latent.model.cache import StaticCaches, make_cache
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing

Update = Callable[[Tensor], Tensor]
"""What a pass reads (N, D), of the hidden states (N, D) of the pass before."""


class Block(ThoughtLoop):
    """A block of thoughts that is read again and again. A subclass says how often, and what the next pass reads."""

    gives_hidden = True
    gives_keys = True

    def __init__(self, width: int, config: Any) -> None:
        super().__init__(width, config)
        self.start_D = nn.Parameter(torch.empty(width).normal_(std=0.02))  # as an embedding starts

    @property
    @abstractmethod
    def again(self) -> int:
        """The passes after the first."""

    @abstractmethod
    def update(self, start_ND: Tensor, bot_BD: Tensor, block: Packing) -> Update:
        """How the thoughts of a batch are updated.

        Args:
            start_ND: what the first pass has read.
            bot_BD: the hidden states at `<|bot|>`.
            block: how the thoughts of all rows lie.
        """

    @abstractmethod
    def latents(self, x_ND: Tensor, hidden_ND: Tensor) -> Tensor:
        """The thoughts (N, D): what the last pass has read, or what came of it."""

    def pack_questions(self, lengths: Sequence[int], counts: Sequence[int], tight: bool = False) -> Packing:
        return Packing.of(lengths, [1] * len(lengths), counts, tight=tight)

    def passes(self, counts: Sequence[int]) -> list[Packing]:
        return [Packing.of(counts)] * self.again

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
        B, N = packing.rows, sum(counts)
        again = self.again if N else 0
        cache = make_cache(B, packing.longest + room, caches)
        x_ND = self.start_D.to(questions_PD.dtype).repeat(N, 1)  # these may be the thoughts: no view of the vector
        taps = taps_at_last(packing, N) if keys and not again else None
        hidden_MD = model.transformer(torch.cat((questions_PD, x_ND)), packing, cache, read_out=B + N, taps=taps)
        bot_BD, hidden_ND = hidden_MD.split([B, N])
        if again:
            block = Packing.of(counts).to(questions_PD.device)
            update = self.update(x_ND, bot_BD, block)
            for left in reversed(range(again)):
                cache.rewind(block)
                x_ND = update(hidden_ND)
                taps = taps_at_last(block, N) if keys and not left else None
                hidden_ND = model.transformer(x_ND, block, cache, taps=taps)
        latents_BKD, hidden_BKD = by_row(self.latents(x_ND, hidden_ND), counts), by_row(hidden_ND, counts)
        return Thoughts(latents_BKD, cache, None, hidden_BKD, bot_BD, *keys_and_values(taps, counts))
