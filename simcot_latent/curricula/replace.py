"""curriculum=replace: thoughts replace the written steps one after the other (Coconut).

First every step is written (`latent.warmup`), then thoughts replace the first step, the first two, ..
(`latent.stages`), and in the rest of training all of them. Source: https://arxiv.org/abs/2412.06769, section 3.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from simcot_latent.config import LatentConfig
from simcot_latent.curricula.base import Curriculum, Stage


class Replace(Curriculum):
    """Steps are replaced from the first on; see `LatentConfig` for when."""

    def __init__(self, latent: LatentConfig, loop: str) -> None:
        super().__init__(latent, loop)
        self.require_loop("replace")
        # How many steps thoughts replace in each stage, and at what share of training it ends.
        self.stage_groups = [0, *(steps for steps, _ in latent.schedule), latent.groups]
        self.stage_ends = list(accumulate([latent.warmup, *(share for _, share in latent.schedule)]))

    def stage_at(self, progress: float) -> Stage:
        groups = self.stage_groups[bisect_right(self.stage_ends, progress + 1e-9)]  # shares are sums of decimals
        return self.stage_of(groups)

    def stage_of(self, groups: int) -> Stage:
        """The stage in which thoughts replace so many steps; where that is one per step group, no step is written."""
        latent = self.latent
        if groups == latent.groups:
            return self.all_replaced
        return Stage(max(0, groups * latent.latents_per_step - (not latent.feeds_last)), first_written=groups)

    @property
    def writes_single_steps(self) -> bool:
        return True

    @property
    def resets_optimizer(self) -> bool:
        return self.latent.reset_optimizer
