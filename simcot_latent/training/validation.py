"""Held-out losses and answers, how thoughts lie and what they hold, while training goes on.

Shapes: N problems, K thoughts, G step groups, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.config import RunConfig
from simcot_latent.data.batch import by_length, to_device
from simcot_latent.data.format import Example
from simcot_latent.data.problem import Problem, same_number
from simcot_latent.distributed import Ranks
from simcot_latent.generate import generate
from simcot_latent.loops.given import GivenLoop
from simcot_latent.method import Method
from simcot_latent.metrics import wilson_interval
from simcot_latent.model.losses import add_up
from simcot_latent.probing.geometry import geometry
from simcot_latent.probing.information import v_information
from simcot_latent.probing.thoughts import latents_of, states_of

# Thoughts count as collapsed when they lie this much closer together than they are long. Published distances: 28 in a
# healthy model, 4 in a collapsed one, where the norm is of the order of the former (SIM-CoT, section 3.1).
COLLAPSE_RATIO = 0.1

V_INFORMATION_PROBLEMS = 32
"""Held-out problems whose steps are scored with each other's thoughts: a step takes as many scorings, and V-information
is at most 5 bits here. The probe takes the thoughts of up to 64 problems."""


@dataclass(frozen=True)
class HeldOut:
    """Validation problems, the same in token ids, and how far answers may be from gold (see `same_number`)."""

    problems: Sequence[Problem]
    examples: Sequence[Example]
    tolerance: float = 0.0


@torch.no_grad()
def validate(
    method: Method, checkpoint: Checkpoint, held_out: HeldOut, run: RunConfig, ranks: Ranks
) -> dict[str, float]:
    """Metrics of a stage of training: `val_<share>`, `val_accuracy` (strict, greedy) and `thought_*`.

    All ranks take part, each with its share of the problems (at least one); all return the same.

    Args:
        checkpoint: what is trained, as it answers now.
    """
    stage, n, has_thoughts = checkpoint.stage, len(held_out.examples), checkpoint.stage.thoughts > 0
    device = checkpoint.device
    mine = range(ranks.rank, n, ranks.world)
    plan = [
        [mine[i] for i in batch]
        for batch in by_length([held_out.examples[i].length for i in mine], run.eval_batch_size)
    ]
    method.eval()
    batches = [method.collate([held_out.examples[i] for i in batch], stage) for batch in plan]
    totals = ranks.sum({key: value.to(device) for key, value in add_up([b.totals for b in batches]).items()})
    found = add_up([method(to_device(batch, device), totals) for batch in batches])
    metrics = {f"val_{key}": value.item() for key, value in ranks.sum(found).items()}
    correct = torch.zeros((), device=device)
    latents_NKD = torch.zeros(n, checkpoint.n_states, checkpoint.model.config.n_embd, device=device)
    states_NKD = torch.zeros_like(latents_NKD)
    counts_N = torch.zeros(n, device=device)
    for batch in plan:
        problems = [held_out.problems[i] for i in batch]
        questions = [problem.question for problem in problems]
        generations = generate(checkpoint, questions, run.max_new_tokens)
        answered = zip(generations, problems, strict=True)
        correct += sum(same_number(g.answer, p.answer, held_out.tolerance) for g, p in answered)
        if has_thoughts:
            latents_BKD = latents_of(generations).float()
            latents_NKD[:, : latents_BKD.shape[1]][batch] = latents_BKD
            counts = [0 if g.latents_KD is None else len(g.latents_KD) for g in generations]
            counts_N[batch] = torch.tensor(counts, dtype=counts_N.dtype, device=device)
        if checkpoint.reads_steps:
            states_NKD[batch] = states_of(checkpoint, generations).float()
    everyones = ranks.sum({"correct": correct, "latents": latents_NKD, "states": states_NKD, "counts": counts_N})
    metrics["val_accuracy"] = everyones["correct"].item() / n
    if has_thoughts:
        most = int(everyones["counts"].max())
        is_there_NK = torch.arange(most, device=device) < everyones["counts"].unsqueeze(1)
        metrics |= geometry(everyones["latents"][:, :most], checkpoint.model.embedding.weight, is_there_NK)
        if isinstance(checkpoint.loop, GivenLoop):
            metrics["thoughts_per_problem"] = everyones["counts"].mean().item()
    if checkpoint.reads_steps:
        metrics |= thought_v_information(checkpoint, held_out.problems, everyones["states"], run, ranks)
    method.train()
    return metrics


def thought_v_information(
    checkpoint: Checkpoint, problems: Sequence[Problem], states_NKD: Tensor, run: RunConfig, ranks: Ranks
) -> dict[str, float]:
    """Mean V-information of thoughts about their steps (see `probe.v_information`), and of the most that it can be,
    over the first `V_INFORMATION_PROBLEMS` problems; nan where no two of them have a step in the same group.

    The step loss alone does not tell whether thoughts hold anything: much of a step can be guessed.
    """
    problems, states_NKD = problems[:V_INFORMATION_PROBLEMS], states_NKD[:V_INFORMATION_PROBLEMS]
    mine = range(ranks.rank, len(problems), ranks.world)
    found = v_information(checkpoint, states_NKD, problems, mine, run.eval_batch_size).values()
    sums = torch.tensor(
        [float(len(found)), sum(each.v_information for each in found), sum(each.v_information_bound for each in found)]
    )
    count, total, bound = ranks.sum({"sums": sums.to(states_NKD.device)})["sums"].tolist()
    return {
        "thought_v_information": total / count if count else math.nan,
        "thought_v_information_bound": bound / count if count else math.nan,
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
