"""curriculum=none: one stage from the start to the end."""

from __future__ import annotations

from simcot_latent.curricula.base import Curriculum, Stage
from simcot_latent.parts import NONE


class NoCurriculum(Curriculum):
    """Thoughts stand for all steps; in a method without thoughts, all steps are written."""

    def stage_at(self, progress: float) -> Stage:
        return Stage() if self.loop == NONE else self.all_replaced

    @property
    def resets_optimizer(self) -> bool:
        return False
