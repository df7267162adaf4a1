"""Held-out losses, answers and thought geometry, while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from simcot_latent.config import RunConfig
from simcot_latent.data.batch import by_length, to_device
from simcot_latent.data.format import Example
from simcot_latent.data.problem import Problem, same_number
from simcot_latent.distributed import Ranks
from simcot_latent.generate import encode_prompts, generate, think_about
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
    shares = ranks.sum(add_up([objective(to_device(batch, device), totals) for batch in batches]))
    correct = sum(count_correct(objective, thoughts, [held_out.problems[i] for i in batch], run) for batch in plan)
    correct_all = ranks.sum({"correct": torch.tensor(float(correct), device=device)})["correct"].item()
    metrics = {f"val_{key}": value.item() for key, value in shares.items()}
    metrics["val_accuracy"] = correct_all / len(held_out.examples)
    if thoughts.n_latents:
        # One batch is plenty for a mean distance; rank 0's, so that all ranks report the same.
        questions = [held_out.problems[i].question for i in range(min(run.eval_batch_size, len(held_out.problems)))]
        metrics |= geometry(latents(objective, thoughts, questions), objective.model.embedding.weight)
    objective.train()
    return metrics


def count_correct(objective: Objective, thoughts: ThoughtFormat, problems: Sequence[Problem], run: RunConfig) -> int:
    """How many problems the model answers right, strictly."""
    questions = [problem.question for problem in problems]
    generations = generate(objective.model, objective.tokenizer, thoughts, questions, run.max_new_tokens)
    return sum(same_number(g.answer, p.answer) for g, p in zip(generations, problems, strict=True))


def latents(objective: Objective, thoughts: ThoughtFormat, questions: Sequence[str]) -> Tensor:
    """The thoughts about some questions, (B, K, D)."""
    prompts = encode_prompts(objective.model, objective.tokenizer, thoughts, questions)
    return think_about(objective.model, thoughts, prompts).latents_BKD


def have_collapsed(metrics: dict[str, float]) -> bool:
    """Whether the thoughts of a question have become one and the same."""
    return "thought_distance" in metrics and metrics["thought_distance"] < COLLAPSE_RATIO * metrics["thought_norm"]


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
