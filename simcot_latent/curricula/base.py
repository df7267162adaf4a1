"""What a curriculum is: how problems are put to the model at each share of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from simcot_latent.config import LatentConfig, NoSettings
from simcot_latent.errors import UserError, require
from simcot_latent.parts import NONE


@dataclass(frozen=True)
class Stage:
    """A stretch of training in which all problems are put to the model in the same way.

    Attributes:
        thoughts: latent thoughts per question, all of which the model reads.
        first_written: the first step (0, 1, ..) that is written as text; those before it are left to the thoughts.
            None: no step is written.
    """

    thoughts: int = 0
    first_written: int | None = 0

    def __post_init__(self) -> None:
        require(self.thoughts >= 0, "stage.thoughts", self.thoughts, "at least 0")
        first = self.first_written
        require(first is None or first >= 0, "stage.first_written", first, "at least 0, or null where no step is")


class Curriculum(ABC):
    """The stages of a training run.

    Attributes:
        config: an instance of `Config`, set once it is made.

    Args:
        latent: the options of thoughts.
        loop: the key of the method's thought loop.
    """

    Config: ClassVar[type] = NoSettings
    """A dataclass of its settings. Those of the command line are the keys of the same name under `latent`."""

    def __init__(self, latent: LatentConfig, loop: str) -> None:
        self.latent, self.loop = latent, loop
        self.config: Any = None

    @abstractmethod
    def stage_at(self, progress: float) -> Stage:
        """The stage at a share of training (0: start, 1: end)."""

    @property
    def resets_optimizer(self) -> bool:
        """Whether the optimizer's moments are forgotten when a stage begins."""
        return False

    def require_loop(self, key: str) -> None:
        """Refuses a method without thoughts.

        Args:
            key: this curriculum's.
        """
        if self.loop == NONE:
            raise UserError(f"curriculum={key}: needs thoughts, which loop=none has not; take a loop, or none")
