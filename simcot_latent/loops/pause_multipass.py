"""loop=pause_multipass: one learned vector in place of every thought, a pass per thought (a control).

As many sequential passes as loop=sequential takes, but nothing is handed from one to the next. A token sees only those
before it, so the numbers are those of loop=pause: from loop=sequential it differs in the content alone.

Shapes: B rows, P tokens of all questions with `<|bot|>`, K states, R rows that are still thinking, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simcot_latent.loops.base import ThoughtLoop, Thoughts
from simcot_latent.loops.pause import Pause
from simcot_latent.model.cache import StaticCaches, make_cache
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing


class PauseMultipass(Pause):
    """The vector of `Pause`, read one by one."""

    gives_keys = False

    pack_questions = ThoughtLoop.pack_questions

    def passes(self, counts: Sequence[int]) -> list[Packing]:
        return [Packing.of([int(count > k) for count in counts]) for k in range(max(counts))]

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
        B, K = packing.rows, max(counts)
        cache = make_cache(B, packing.longest + K + room, caches)
        bot_BD = model.transformer(questions_PD, packing, cache, read_out=B)
        latents = []
        for one_each in self.passes(counts):
            one_each = one_each.to(questions_PD.device)
            x_RD = self.pause_D.to(questions_PD.dtype).expand(len(one_each), -1)
            hidden_RD = model.transformer(x_RD, one_each, cache)
            latents.append(hidden_RD.new_zeros(B, self.width).index_copy(0, one_each.row_P, hidden_RD))
        latents_BKD = torch.stack(latents, dim=1) if latents else bot_BD.new_zeros(B, 0, self.width)
        return Thoughts(latents_BKD, cache, None, latents_BKD, bot_BD)
