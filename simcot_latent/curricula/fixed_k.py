"""curriculum=fixed_k: all thoughts from the start, and written steps are removed one after the other.

As SIM-CoT's authors say they train models of a billion parameters. First every step is written behind the thoughts
(`latent.warmup`), then the first step is left out, the first two, .. (`latent.stages`), and in the rest of training no
step is written. The thoughts stand for all steps throughout, so steps can be written and thought of at once.
"""

from __future__ import annotations

from simcot_latent.curricula.base import Stage
from simcot_latent.curricula.replace import Replace


class FixedK(Replace):
    """The schedule of `Replace` with the thoughts of its end."""

    key = "fixed_k"

    def stage_of(self, groups: int) -> Stage:
        if groups == self.latent.groups:
            return self.all_replaced
        return Stage(self.latent.n_latents, first_written=groups, overlap=True)
