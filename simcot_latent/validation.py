"""Held-out losses, answers and thought geometry, while training goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.table import Table

from simcot_latent.config import RunConfig
from simcot_latent.data.batch import by_length, to_device
from simcot_latent.data.format import Example
from simcot_latent.data.problem import Problem, same_number
from simcot_latent.distributed import Ranks
from simcot_latent.generate import generate
from simcot_latent.losses import add_up
from simcot_latent.metrics import wilson_interval
from simcot_latent.model.thoughts import ThoughtFormat, geometry
from simcot_latent.objectives.base import Objective

# Thoughts count as collapsed when they lie this much closer together than they are long. Published distances: 28 in a
# healthy model, 4 in a collapsed one, where the norm is of the order of the former (SIM-CoT, section 3.1).
COLLAPSE_RATIO = 0.1


@dataclass(frozen=True)
class HeldOut:
    """Validation problems, and the same in token ids."""

    problems: list[Problem]
    examples: list[Example]


@torch.no_grad()
def validate(
    objective: Objective, held_out: HeldOut, thoughts: ThoughtFormat, run: RunConfig, ranks: Ranks
) -> dict[str, float]:
    """Metrics of a stage of training: `val_<share>`, `val_accuracy` (strict, greedy) and `thought_*`.

    All ranks take part, each with its share of the problems (at least one); all return the same.
    """
    device = objective.model.embedding.weight.device
    mine = range(ranks.rank, len(held_out.examples), ranks.world)
    plan = [
        [mine[i] for i in batch]
        for batch in by_length([held_out.examples[i].length for i in mine], run.eval_batch_size)
    ]
    objective.eval()
    batches = [objective.collate([held_out.examples[i] for i in batch], thoughts) for batch in plan]
    totals = ranks.sum({key: value.to(device) for key, value in add_up([b.totals for b in batches]).items()})
    found = add_up([objective(to_device(batch, device), totals) for batch in batches])
    shares = {f"val_{key}": value for key, value in ranks.sum(found).items()}
    correct, latents = 0, []
    for batch in plan:
        problems = [held_out.problems[i] for i in batch]
        questions = [problem.question for problem in problems]
        generations = generate(objective.model, objective.tokenizer, thoughts, questions, run.max_new_tokens)
        correct += sum(same_number(g.answer, p.answer) for g, p in zip(generations, problems, strict=True))
        latents += [g.latents_KD for g in generations if g.latents_KD is not None]
    means = {"val_accuracy": correct / len(mine)}
    if latents:
        latents_BKD = torch.stack(latents).float()
        sum_KD = ranks.sum({"latents": latents_BKD.sum(0)})["latents"]
        means |= geometry(latents_BKD, objective.model.embedding.weight, sum_KD, len(held_out.examples))
    sums = ranks.sum({key: torch.tensor(value * len(mine), device=device) for key, value in means.items()})
    objective.train()
    return {key: value.item() for key, value in shares.items()} | {
        key: value.item() / len(held_out.examples) for key, value in sums.items()
    }


def collapse(metrics: dict[str, float]) -> str | None:
    """What is the matter with thoughts that lie too close together, and what helps; None where nothing is."""
    least = COLLAPSE_RATIO * metrics.get("thought_norm", 0.0)
    for key, between in (("thought_distance", "thoughts of a problem"), ("thought_spread", "problems")):
        if metrics.get(key, math.inf) < least:
            return (
                f"thoughts have collapsed: the mean distance between {between}, {metrics[key]:.2f}, is under "
                f"{COLLAPSE_RATIO} of their norm {metrics['thought_norm']:.2f}; raise loss.step_weight or lower "
                "latent.n_latents"
            )
    return None


def validation_table(metrics: dict[str, float], n: int) -> Table:
    """An evaluation for people, with the interval of its accuracy."""
    table = Table("held-out (validation)", "value")
    accuracy = metrics["val_accuracy"]
    low, high = wilson_interval(round(accuracy * n), n)
    table.add_row("strict accuracy", f"{accuracy:.1%} (n={n}, 95% interval {low:.1%} to {high:.1%})")
    for key, value in metrics.items():
        if key != "val_accuracy":
            table.add_row(key.removeprefix("val_").replace("_", " "), f"{value:.3f}")
    return table
