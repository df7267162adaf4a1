"""What each thought group of a problem was supervised to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simcot_latent.checkpoint import Checkpoint, setting
from simcot_latent.data.format import align_steps
from simcot_latent.data.problem import Problem

if TYPE_CHECKING:
    pass


def gold_groups(checkpoint: Checkpoint, problem: Problem) -> list[str | None]:
    """What each group of a problem was taught to say, as text."""
    latent, groups = setting(checkpoint, "latent"), checkpoint.thoughts.groups
    steps = [step.text for step in problem.steps]
    if checkpoint.thoughts.n_latents < latent["n_latents"]:
        steps = steps[:groups]  # in an early stage the later steps are still written
    aligned = align_steps(
        steps,
        f"{checkpoint.thoughts.answer_mark} {problem.answer}",
        groups,
        surplus=latent["surplus"],
        missing=latent["missing"],
    )
    return [None if group is None else "\n".join(group) for group in aligned]


def holds_step(problem: Problem, group: int) -> bool:
    """Whether a group (0, 1, ...) that is taught something is taught a step, not the answer for want of one."""
    return group < len(problem.steps)
