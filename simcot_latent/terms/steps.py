"""Which step each group of thoughts stands for: the one place that training, validation, evals and the probe ask.

Thoughts are cut into step groups of `latents_per_step`; group g of a problem stands for its step g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.problem import Problem
from simcot_latent.errors import require, require_choice

T = TypeVar("T")


@dataclass(frozen=True)
class StepGroups:
    """How thoughts stand for steps. Source: https://arxiv.org/abs/2509.20317, section 4, and its published code.

    Attributes:
        latents_per_step: c, the thoughts of a group.
        surplus: `merge` adds the steps beyond the last group to it (both published flavours), `drop` leaves them out;
            where the stage writes them (`write`), no group says them.
        missing: what a group without a step is supervised to say: the `answer` (the flavour on Coconut), or nothing,
            `mask` (the flavour on CODI).
        drop_last: whether the last step of a solution is left out (`latent.drop_last_step`).
    """

    latents_per_step: int = 1
    surplus: str = "merge"
    missing: str = "mask"
    drop_last: bool = False

    def __post_init__(self) -> None:
        require(self.latents_per_step >= 1, "groups.latents_per_step", self.latents_per_step, "at least 1")
        require_choice("groups.surplus", self.surplus, ("merge", "drop", "write"))
        require_choice("groups.missing", self.missing, ("mask", "answer"))

    def count(self, states: int) -> int:
        """The groups that so many states make."""
        return states // self.latents_per_step

    def targets(self, steps: Sequence[T], answer: T, groups: int, stage: Stage) -> list[list[T] | None]:
        """What each group of a problem is to say, as a list of steps; None: it is not supervised.

        Args:
            steps: the problem's, in order.
            answer: what stands for a step where there is none left, if `missing` says so.
            groups: how many there are.
            stage: in an early one, the later steps are still written.
        """
        steps = steps if stage.overlap else steps[: stage.first_written]
        found: list[list[T] | None] = [[step] for step in steps[:groups]]
        if len(steps) > groups > 0 and self.surplus == "merge":
            found[-1] = list(steps[groups - 1 :])
        return found + [[answer] if self.missing == "answer" else None] * (groups - len(found))

    def gold(self, problem: Problem, groups: int, stage: Stage, answers: AnswerFormat) -> list[str | None]:
        """The same as text, a step per line."""
        steps = [step.text for step in problem.steps[: -1 if self.drop_last else None]]
        found = self.targets(steps, answers.answer_line(problem.answer), groups, stage)
        return [None if group is None else "\n".join(group) for group in found]


def holds_step(problem: Problem, group: int) -> bool:
    """Whether a group (0, 1, ...) that is supervised is to say a step, not the answer for want of one."""
    return group < len(problem.steps)
