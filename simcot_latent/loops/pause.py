"""loop=pause: one learned vector in place of every thought, all in one pass (the control of latent methods).

The vector is the input at each thought's position; what stands there after the final norm is the thought. A method with
thoughts that does no better than this one gains nothing from feeding hidden states back. Source: pause tokens, Goyal et
al. 2023, https://arxiv.org/abs/2310.02226; as a control, Coconut's "pause as thought",
https://arxiv.org/abs/2412.06769, section 4.3.

Shapes: B rows, P tokens of all questions with `<|bot|>`, K states, N thoughts of all rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simcot_latent.config import NoSettings
from simcot_latent.loops.base import ThoughtLoop, Thoughts, by_row, keys_and_values, taps_at_last
from simcot_latent.model.cache import StaticCaches, make_cache
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing


class Pause(ThoughtLoop):
    """All thoughts in the question's pass, from one learned vector."""

    gives_hidden = True
    gives_keys = True

    def __init__(self, width: int, config: NoSettings) -> None:
        super().__init__(width, config)
        self.pause_D = nn.Parameter(torch.empty(width).normal_(std=0.02))  # as an embedding starts

    def pack_questions(self, lengths: Sequence[int], counts: Sequence[int], tight: bool = False) -> Packing:
        return Packing.of(lengths, [1] * len(lengths), counts, tight=tight)

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
        cache = make_cache(B, packing.longest + room, caches)
        x_PD = torch.cat((questions_PD, self.pause_D.to(questions_PD.dtype).expand(N, -1)))
        taps = taps_at_last(packing, N) if keys else None
        hidden_MD = model.transformer(x_PD, packing, cache, read_out=B + N, taps=taps)
        bot_BD, hidden_ND = hidden_MD.split([B, N])
        latents_BKD = by_row(hidden_ND, counts)
        return Thoughts(latents_BKD, cache, None, latents_BKD, bot_BD, *keys_and_values(taps, counts))
