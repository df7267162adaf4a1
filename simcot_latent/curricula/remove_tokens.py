"""curriculum=remove_tokens: the tokens of the written solution are removed one after the other (iCoT).

There are no thoughts. In every epoch some more tokens of the solution are left out of what is trained, from its left or
its right end, until the answer follows the question at once. Each row of a batch loses a few more than its share, drawn
anew in every step, so that a stage has been met before it begins ("removal smoothing"):

    P(offset >= k) = exp(-lambda k) for k = 0 .. 99, and no offset is larger

Validation and evals draw nothing. Source: https://arxiv.org/abs/2405.14838, section 3, and its code,
https://github.com/da03/Internalize_CoT_Step_by_Step.

What follows the gap moves up, as it does there by default. The code can keep its positions instead, which is not
offered here: a model that answers at once would have to be told how long the solution is that it does not write. The
code reads that off the gold solution of each test problem. (It also moves the token *before* the gap, since what is
generated counts its positions on from there; only what follows the gap should move.) And it forgets the optimizer's
moments at each token but where the last batch had none left to lose; here it is at each token.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from random import Random

from simcot_latent.config import MethodConfig, RunConfig
from simcot_latent.curricula.base import SIDES, Curriculum, Stage
from simcot_latent.errors import UserError, require, require_choice
from simcot_latent.parts import NONE

MOST_OFFSET = 99
"""The largest offset."""

UNTOLD_STEPS = 1000
"""Optimizer steps that an epoch is taken to have while `begin` has not told."""


@dataclass(frozen=True)
class RemoveTokensConfig:
    """Settings of curriculum=remove_tokens.

    Attributes:
        remove_per_epoch: tokens by which the removal grows in each epoch: by one in every
            round(steps per epoch / remove_per_epoch) steps, or in each step where that is 0.
        remove_side: which end of the solution they are removed from, `left` or `right`.
        remove_start: tokens that are removed from the first step on.
        remove_all_at: all tokens are removed once it would be so many; None: the removal only ever grows by one.
        removal_smoothing: lambda, of the offsets; None: there are none.
        pretrain_epochs: epochs at the start in which nothing grows and there are no offsets.
    """

    remove_per_epoch: float = 8.0
    remove_side: str = "left"
    remove_start: int = 0
    remove_all_at: int | None = 39
    removal_smoothing: float | None = 4.0
    pretrain_epochs: int = 0

    def __post_init__(self) -> None:
        each, limit, smoothing = self.remove_per_epoch, self.remove_all_at, self.removal_smoothing
        require(0 < each < math.inf, "latent.remove_per_epoch", each, "above 0, finite")
        require_choice("latent.remove_side", self.remove_side, SIDES)
        require(self.remove_start >= 0, "latent.remove_start", self.remove_start, "at least 0")
        right = "at least 1, or null to remove one token after the other to the end"
        require(limit is None or limit >= 1, "latent.remove_all_at", limit, right)
        right = "above 0, or null for no random offsets"
        require(smoothing is None or smoothing > 0, "latent.removal_smoothing", smoothing, right)
        require(self.pretrain_epochs >= 0, "latent.pretrain_epochs", self.pretrain_epochs, "at least 0")


class RemoveTokens(Curriculum):
    """Tokens of the solution are removed; see `RemoveTokensConfig` for when."""

    Config = RemoveTokensConfig
    config: RemoveTokensConfig
    mixes_stages = True

    def __init__(self, method: MethodConfig, run: RunConfig) -> None:
        super().__init__(method, run)
        if self.loop != NONE:
            raise UserError(
                f"loop={self.loop}: must be none with curriculum=remove_tokens, in which nothing is thought; "
                "curriculum=fixed_k removes written steps behind thoughts"
            )
        if run.rationale == "none":
            raise UserError(
                "rationale=none: must be equations or natural with curriculum=remove_tokens, which removes what is "
                "written"
            )
        smoothing = self.config.removal_smoothing
        probabilities = offset_probabilities(math.inf if smoothing is None else smoothing)
        self.at_most = list(accumulate(probabilities[:-1]))  # how likely an offset of at most 0, 1, .. is
        self.begin(UNTOLD_STEPS, UNTOLD_STEPS * run.num_epochs)

    def begin(self, steps_per_epoch: float, num_steps: int) -> None:
        self.num_steps = num_steps
        self.first_step = math.ceil(self.config.pretrain_epochs * steps_per_epoch)  # the first after pretraining
        self.period = round(steps_per_epoch / self.config.remove_per_epoch)  # steps from one token to the next

    def removed_at(self, step: int) -> int | None:
        """The tokens that are removed in an optimizer step (0-based), without offset; None: all."""
        config, steps = self.config, step - self.first_step
        if steps < 0:
            return config.remove_start
        removed = config.remove_start + (steps // self.period if self.period else steps + 1)
        return None if config.remove_all_at is not None and removed >= config.remove_all_at else removed

    def step_at(self, progress: float) -> int:
        """The optimizer step at a share of training; at its end, the last."""
        return min(round(progress * self.num_steps), self.num_steps - 1)

    def stage_at(self, progress: float) -> Stage:
        return Stage(removed=self.removed_at(self.step_at(progress)), removed_side=self.config.remove_side)

    def draw_stage(self, progress: float, seed: int) -> Stage:
        stage = self.stage_at(progress)
        if stage.removed is None or self.step_at(progress) < self.first_step:
            return stage
        return replace(stage, removed=stage.removed + self.draw_offset(seed))

    def draw_offset(self, seed: int) -> int:
        """What a row loses beyond its share."""
        # Of Python's draws, `random` is the one that stays the same in later versions.
        return bisect_right(self.at_most, Random(seed).random())

    @property
    def warning(self) -> str | None:
        removed = self.removed_at(self.num_steps - 1)
        if removed is None or self.config.remove_all_at is None:
            return None
        return (
            f"curriculum=remove_tokens: {removed} tokens are removed in the last step, not all; raise num_epochs, or "
            f"latent.remove_per_epoch (now {self.config.remove_per_epoch:g})"
        )


def offset_probabilities(smoothing: float) -> list[float]:
    """How likely each offset is, from 0 to `MOST_OFFSET`.

    Args:
        smoothing: lambda; infinite: the offset is always 0.
    """
    at_least = [1.0, *(math.exp(-smoothing * k) for k in range(1, MOST_OFFSET + 1)), 0.0]
    return [this - following for this, following in pairwise(at_least)]
