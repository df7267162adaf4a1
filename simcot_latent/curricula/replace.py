"""curriculum=replace: thoughts replace the written steps one after the other (Coconut).

First every step is written (`latent.warmup`), then thoughts replace the first step, the first two, ..
(`latent.stages`), and in the rest of training all of them. Source: https://arxiv.org/abs/2412.06769, section 3.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any

from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Curriculum, Stage
from simcot_latent.errors import UserError, require


class Replace(Curriculum):
    """Steps are replaced from the first on; see `LatentConfig` for when."""

    key = "replace"

    def __init__(self, method: MethodConfig, run: RunConfig) -> None:
        super().__init__(method, run)
        self.require_loop(self.key)
        latent, stages = self.latent, schedule(self.latent, run)
        # How many steps thoughts replace in each stage, and at what share of training it ends.
        self.stage_groups = [0, *(steps for steps, _ in stages), latent.groups]
        self.stage_ends = list(accumulate([latent.warmup, *(share for _, share in stages)]))
        total = latent.warmup + sum(share for _, share in stages)
        require(total < 1, "latent.stages", f"{total:g} of training with the warm-up", "below 1 in total")
        for steps in self.stage_groups[1:]:
            thoughts = self.stage_of(steps).thoughts
            require(thoughts >= 1, "latent.feeds_last", False, "true in stages of a single thought")

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


def schedule(latent: LatentConfig, run: RunConfig) -> list[tuple[int, float]]:
    """Every stage between the warm-up and the last: how many steps are replaced, and for what share of training.

    Raises:
        UserError: `latent.stages` is none, or is in epochs where `num_iterations` says how long training is.
    """
    if not isinstance(latent.stages, list):
        right = "a share of training, from 0 to below 1, or a list of {steps: .., share: ..}"
        require(_is_number(latent.stages) and 0 <= latent.stages < 1, "latent.stages", latent.stages, right)
        n = latent.groups - 1
        return [] if latent.stages == 0 else [(steps, latent.stages / n) for steps in range(1, n + 1)]
    right = f"{{steps: 1 to {latent.groups}, share: above 0, below 1}}, or the same with epochs: above 0"
    found: list[tuple[int, float]] = []
    for i, stage in enumerate(latent.stages):
        key, share = f"latent.stages[{i}]", None
        if isinstance(stage, dict) and type(stage.get("steps")) is int and 1 <= stage["steps"] <= latent.groups:
            if set(stage) == {"steps", "share"} and _is_number(stage["share"]) and 0 < stage["share"] < 1:
                share = stage["share"]
            elif set(stage) == {"steps", "epochs"} and _is_number(stage["epochs"]) and stage["epochs"] > 0:
                if run.num_iterations != -1:
                    raise UserError(f"{key}={stage}: is in epochs, so training must be: leave num_iterations out")
                share = stage["epochs"] / run.num_epochs
        require(share is not None, key, stage, right)
        found.append((stage["steps"], share or 0.0))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
