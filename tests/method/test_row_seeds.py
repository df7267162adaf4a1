"""Whatever is drawn for a row is the same however a step is cut into micro-batches and ranks, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.batch import Seeds, seed_of
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.parts import PARTS, register
from simcot_latent.terms.base import Collated, Rows, Term
from simcot_latent.training.batches import Batches

SIZE = 12


@dataclass
class Recorded:
    """A batch, which is no more than what it is made of."""

    examples: list[Any]
    seeds: Seeds
    totals: dict[str, Tensor] = field(default_factory=lambda: {"rows": torch.tensor(1.0)})


class Recorder:
    """A method that makes such batches."""

    curriculum = SimpleNamespace(begin=lambda steps_per_epoch, num_steps: None)

    def stages_of(self, progress: float, seeds: Seeds) -> Stage:
        return Stage()

    def collate(self, examples: Sequence[Any], stage: Stage, seeds: Seeds) -> Recorded:
        assert len(seeds.rows) == len(examples)
        return Recorded(list(examples), seeds)


def seeds_of_step(
    step: int, make_run: Callable[..., RunConfig], world: int = 1, size: int = SIZE, seed: int = 3
) -> tuple[dict[int, int], int]:
    """The seed of each example of a step, by its index, over all ranks; and the seed of the step."""
    run = make_run(target_examples_per_step=SIZE, device_batch_size=size, seed=seed, num_iterations=9)
    # Of different lengths, so that the order of a batch is that of the lengths.
    examples = [SimpleNamespace(length=length, index=length) for length in range(500)]
    found: dict[int, int] = {}
    of_step: set[int] = set()
    for rank in range(world):
        job = SimpleNamespace(run=run, ranks=Ranks(rank, world), device=torch.device("cpu"))
        for batch in Batches(Recorder(), examples, job).prepare(step).batches:  # type: ignore[arg-type]
            of_step.add(batch.seeds.step)
            for example, row in zip(batch.examples, batch.seeds.rows, strict=True):
                assert example.index not in found
                found[example.index] = row
    assert len(found) == SIZE
    (step_seed,) = of_step
    return found, step_seed


@pytest.mark.parametrize(("world", "size"), [(1, 5), (1, 1), (2, 12), (3, 2), (12, 1)])
def test_the_cut_does_not_matter(world: int, size: int, make_run: Callable[..., RunConfig]) -> None:
    whole = seeds_of_step(4, make_run)
    assert seeds_of_step(4, make_run, world, size) == whole


def test_all_else_does(make_run: Callable[..., RunConfig]) -> None:
    """Every row of every step of every run has a seed of its own, and so has every step."""
    found = [seeds_of_step(step, make_run, seed=seed) for step in range(9) for seed in (0, 1, 2**62)]
    seeds = [seed for rows, of_step in found for seed in [*rows.values(), of_step]]
    assert len(set(seeds)) == len(seeds) == 9 * 3 * (SIZE + 1)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seeds_stay_what_they_are() -> None:
    """A run that is resumed by a later version draws what it would have drawn."""
    assert seed_of(0, 1) == 3278692055
    assert Seeds.of(0, 1, [2, 0]) == Seeds(3278692055, [1798632349, 2482128658])


def test_terms_get_them(make_model: Callable[..., GPT], tokenizer: Tokenizer, problems: list[Problem]) -> None:
    seen: list[Rows] = []

    class Draws(Term):
        def collate(self, rows: Rows) -> Collated:
            seen.append(rows)
            return Collated()

    register("term", "draws")(Draws)
    try:
        run = RunConfig(mode="", model={}, data={}, tokenizer={}, rationale="equations")
        config = MethodConfig(loop="sequential", latent=LatentConfig(n_latents=2), terms=["draws"])
        method = Method(make_model(vocab_size=tokenizer.n_vocab), tokenizer, run, config)
        examples = [method.encode(problem) for problem in problems[:2]]
        seeds = Seeds.of(0, 7, [1, 0])
        method.collate(examples, method.last_stage, seeds)
        method.collate(examples, method.last_stage)
        assert [rows.seeds for rows in seen] == [seeds, None]
    finally:
        del PARTS["term"]["draws"]
