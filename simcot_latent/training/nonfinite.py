"""Steps whose loss or gradient is not a number: noticed, counted, skipped at choice, and their batches kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simcot_latent.data.problem import Problem
from simcot_latent.distributed import Ranks
from simcot_latent.files import write_json

LOOK_EVERY = 100
"""Steps at most between two looks at a device's numbers; each makes it finish what it was given."""
MOST_BATCHES = 100
"""Files that a run keeps of its bad batches."""


class NonFinite:
    """Watches the losses and gradient norms of steps, without a device having to wait for it in every step.

    Args:
        ranks: all must see the same steps.
        counted: bad steps so far, and how many of them the last steps were, as `state` gave them.
    """

    def __init__(self, ranks: Ranks, counted: tuple[int, int] = (0, 0)) -> None:
        self.ranks = ranks
        self.total: int
        self.in_a_row: int
        self.total, self.in_a_row = counted
        self._unseen: list[tuple[int, Tensor, Tensor]] = []

    @property
    def state(self) -> tuple[int, int]:
        """What a checkpoint keeps: bad steps in all, and those of them that came last in a row."""
        return self.total, self.in_a_row

    def add(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Takes a step's loss (this rank's share) and gradient norm, scalars that may still be being computed."""
        self._unseen.append((step, loss, grad_norm))

    @property
    def is_due(self) -> bool:
        """Whether it is time to look; on one CPU looking costs nothing, so that is after every step."""
        if not self._unseen:
            return False
        free = self.ranks.world == 1 and self._unseen[-1][1].device.type == "cpu"
        return free or len(self._unseen) >= LOOK_EVERY

    def look(self) -> list[tuple[int, float, float]]:
        """The bad ones among the steps since the last look: step, rank 0's loss, gradient norm. Every rank calls it."""
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return []
        flat = torch.stack([value for _, *pair in unseen for value in pair]).tolist()  # one read for all of them
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        bad = [not all(map(math.isfinite, pair)) for pair in pairs]
        if self.ranks.world > 1:
            bad = (self.ranks.sum({"bad": torch.tensor(bad, dtype=torch.float32)})["bad"] > 0).tolist()
        for is_bad in bad:
            self.total += is_bad
            self.in_a_row = self.in_a_row + 1 if is_bad else 0
        if not any(bad):
            return []
        return [(step, *pair) for (step, *_), pair, is_bad in zip(unseen, pairs, bad, strict=True) if is_bad]


def save_batch(
    out_dir: Path, step: int, loss: float, grad_norm: float, indices: Sequence[int], problems: Sequence[Problem]
) -> Path | None:
    """Writes the problems of a bad step to `out_dir/nonfinite/step_NNNNNNN.json`; None once there are very many.

    Args:
        indices: which training problems (of those that are kept, see `on_too_long`) the step was computed on.
    """
    folder = out_dir / "nonfinite"
    folder.mkdir(exist_ok=True)
    file = folder / f"step_{step:07d}.json"
    if not file.exists() and sum(1 for _ in folder.iterdir()) >= MOST_BATCHES:
        return None
    rows: list[dict[str, Any]] = [
        {
            "index": i,
            "question": problems[i].question,
            "rationale": problems[i].rationale,
            "answer": problems[i].answer,
        }
        for i in indices
    ]
    # JSON has no nan.
    write_json(file, {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "problems": rows})
    return file
