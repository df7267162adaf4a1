"""What a curriculum is: how problems are put to the model at each share of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from simcot_latent.config import MethodConfig, NoSettings, RunConfig
from simcot_latent.errors import UserError, require, require_choice
from simcot_latent.parts import NONE

SIDES = ("left", "right")


@dataclass(frozen=True)
class Stage:
    """A stretch of training in which all problems are put to the model in the same way.

    Attributes:
        thoughts: latent thoughts per question, all of which the model reads.
        first_written: the first step (0, 1, ..) that is written as text; those before it are left to the thoughts.
            None: no step is written.
        overlap: whether the thoughts stand for the steps that are written, too.
        removed: tokens that are removed from what is written before the answer; None: all.
        removed_side: where they are removed, `left` or `right`.
    """

    thoughts: int = 0
    first_written: int | None = 0
    overlap: bool = False
    removed: int | None = 0
    removed_side: str = "left"

    def __post_init__(self) -> None:
        require(self.thoughts >= 0, "stage.thoughts", self.thoughts, "at least 0")
        first = self.first_written
        require(first is None or first >= 0, "stage.first_written", first, "at least 0, or null where no step is")
        removed = self.removed
        require(removed is None or removed >= 0, "stage.removed", removed, "at least 0, or null where all tokens are")
        require_choice("stage.removed_side", self.removed_side, SIDES)

    @property
    def in_words(self) -> str:
        """For people."""
        thoughts = f"{self.thoughts} thoughts"
        if self.removed == 0:
            return thoughts
        removed = f"{'all' if self.removed is None else self.removed} written tokens removed"
        return f"{thoughts}, {removed}" if self.thoughts else removed


class Curriculum(ABC):
    """The stages of a training run.

    Attributes:
        config: an instance of `Config`, set once it is made.

    Args:
        method: the parts and their settings.
        run: how long training is.

    Raises:
        UserError: there are no such stages.
    """

    Config: ClassVar[type] = NoSettings
    """A dataclass of its settings. Those of the command line are the keys of the same name under `latent`."""

    def __init__(self, method: MethodConfig, run: RunConfig) -> None:
        self.latent, self.loop, self.run = method.latent, method.loop, run
        self.config: Any = method.settings(self.Config)

    def begin(self, steps_per_epoch: float, num_steps: int) -> None:  # noqa: B027, most need not know
        """Called once before training, with its length in optimizer steps."""

    @abstractmethod
    def stage_at(self, progress: float) -> Stage:
        """The stage at a share of training (0: start, 1: end)."""

    mixes_stages: ClassVar[bool] = False
    """Whether each row of a step has a stage of its own, see `draw_stage`."""

    def draw_stage(self, progress: float, seed: int) -> Stage:
        """The stage of a row at a share of training.

        Args:
            seed: of what is drawn for the row.
        """
        return self.stage_at(progress)

    @property
    def warning(self) -> str | None:
        """What a user may not have meant; None: nothing. Asked for after `begin`."""
        return None

    @property
    def resets_optimizer(self) -> bool:
        """Whether the optimizer's moments are forgotten when a stage begins."""
        return self.latent.reset_optimizer

    @property
    def writes_single_steps(self) -> bool:
        """Whether a stage writes some of a problem's steps after its thoughts, so that solutions must be steps."""
        return self.latent.surplus == "write"

    @property
    def all_replaced(self) -> Stage:
        """The stage in which thoughts stand for as many steps as they can."""
        latent = self.latent
        return Stage(latent.n_latents, first_written=latent.groups if latent.surplus == "write" else None)

    def require_loop(self, key: str) -> None:
        """Refuses a method without thoughts.

        Args:
            key: this curriculum's.
        """
        if self.loop == NONE:
            raise UserError(f"curriculum={key}: needs thoughts, which loop=none has not; take a loop, or none")
