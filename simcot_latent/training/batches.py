"""Which problems each optimizer step trains on, and in what form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from simcot_latent.curricula.base import Stage
from simcot_latent.data.batch import BatchOrder, Seeds, micro_batches, pin
from simcot_latent.data.format import Example
from simcot_latent.data.lazy import Lazily
from simcot_latent.errors import UserError
from simcot_latent.method import Method
from simcot_latent.model.losses import add_up
from simcot_latent.profiling import PROFILED, SKIPPED, WARMUP
from simcot_latent.training.setup import Job


@dataclass
class PreparedStep:
    """What an optimizer step trains on: this rank's micro-batches, and their totals."""

    batches: list[Any]
    totals: dict[str, Tensor]


class Batches:
    """The batches of a run, each a function of nothing but its step.

    Args:
        method: what is trained.
        examples: training problems in token ids.
        job: what stays the same.

    Raises:
        UserError: a step is of fewer problems than there are ranks, or there are too few steps for a profile.
    """

    def __init__(self, method: Method, examples: Sequence[Example], job: Job) -> None:
        self.method, self.examples, self.job = method, examples, job
        run, size, ranks = job.run, job.run.target_examples_per_step, job.ranks.world
        if size < ranks:
            raise UserError(f"target_examples_per_step={size}: must be at least the {ranks} ranks")
        self.order = BatchOrder(Lazily(len(examples), lambda index: examples[index].length), size, run.seed)
        of_epochs = math.ceil(run.num_epochs * len(examples) / size)
        self.num_steps = of_epochs if run.num_iterations == -1 else run.num_iterations
        needed = SKIPPED + WARMUP + PROFILED
        if run.profile and self.num_steps < needed:
            raise UserError(f"profile=true: takes {needed} steps, this run has {self.num_steps}; raise num_iterations")
        method.curriculum.begin(len(examples) / size, self.num_steps)

    def stage(self, step: int) -> Stage:
        """How problems are put to the model in a step (0-based)."""
        return self.method.stage_at(step / self.num_steps)

    def prepare(self, step: int) -> PreparedStep:
        """This rank's batches of a step."""
        job, indices = self.job, self.order.batch(step)
        batches: list[Any] = []
        for rows in micro_batches(range(len(indices)), job.run.device_batch_size, job.ranks.rank, job.ranks.world):
            examples = [self.examples[indices[row]] for row in rows]
            seeds = Seeds.of(job.run.seed, step, rows)
            stages = self.method.stages_of(step / self.num_steps, seeds)
            batches.append(self.method.collate(examples, stages, seeds))
        totals = add_up([batch.totals for batch in batches])
        batches = [replace(batch, totals={}) for batch in batches]  # they are not read on the device
        return PreparedStep([pin(batch) for batch in batches] if job.device.type == "cuda" else batches, totals)
