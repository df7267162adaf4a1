"""How much thoughts tell the decoder, or the head that reads them, about steps: pointwise V-information.

Shapes: B questions, K thoughts, G step groups, C thoughts per group, N groups that are scored, D width, M labels.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.data.problem import Problem
from simcot_latent.logs import make_console, track
from simcot_latent.probing.readers import step_reader
from simcot_latent.probing.thoughts import gold_groups
from simcot_latent.terms.steps import holds_step

DONORS = 64
"""Problems whose thoughts a step is scored with for its V-information, its own among them: it is at most 6 bits."""


class VInformation(NamedTuple):
    """Pointwise V-information of a group's thoughts about its step, and the most it can be, both in bits."""

    v_information: float
    v_information_bound: float


@torch.no_grad()
def v_information(
    checkpoint: Checkpoint,
    states_BKD: Tensor,
    problems: Sequence[Problem],
    rows: Sequence[int] | None = None,
    batch_size: int = 32,
    console: Console | None = None,
) -> dict[tuple[int, int], VInformation]:
    """How much the thoughts tell the decoder about each gold step, in bits:

        log2 p(y | z_own) - log2 mean_j p(y | z_j)

    Pointwise V-information (Ethayarajh et al. 2022, https://arxiv.org/abs/2110.08420, after Xu et al. 2020,
    https://arxiv.org/abs/2002.10689), where what a decoder knows without the thoughts is its mean over problems that
    hold a step in the same group: up to `DONORS` of them, the own one among them. So it is at most log2 of their
    number, and 0 for a decoder that does not read the thoughts. Which ones is settled by the questions' texts, whatever
    their order and the batches: all problems of a group stand in a circle by a digest, and each takes those that follow
    it.

    Args:
        states_BKD: what steps are read of, of the thoughts about `problems`; see `states_of`.
        rows: the problems to score; None: all. Donors are of all problems in any case.
        batch_size: problems at once.
        console: where to show progress; None: nowhere.

    Returns:
        By problem and group; without the groups that hold no step, or that hold one in a single problem.
    """
    reader, tokenizer, G = step_reader(checkpoint), checkpoint.tokenizer, checkpoint.n_groups
    gold = [gold_groups(checkpoint, problem) for problem in problems]
    wanted = set(range(len(problems)) if rows is None else rows)
    circle = sorted(range(len(problems)), key=lambda row: (_digest(problems[row].question), row))
    pairs: list[tuple[int, int, int]] = []  # row and group of a step, and the row whose thoughts it is scored with
    for group in range(G):
        members = [row for row in circle if gold[row][group] is not None and holds_step(problems[row], group)]
        n = min(DONORS, len(members))
        if n > 1:
            twice = [*members, *members]  # the own problem comes first
            pairs += [(row, group, j) for i, row in enumerate(members) if row in wanted for j in twice[i : i + n]]
    ids = {(row, group): tokenizer.encode(gold[row][group] or "") for row, group, _ in pairs}
    groups_NCD = reader.groups(states_BKD)
    nats: dict[tuple[int, int], list[float]] = {}
    starts = range(0, len(pairs), batch_size * G)
    for start in track(starts, "V-information", console or make_console(is_main=False)):
        batch = pairs[start : start + batch_size * G]
        index_N = torch.tensor([j * G + group for _, group, j in batch], device=states_BKD.device)
        nats_N = reader.score(groups_NCD[index_N], [ids[row, group] for row, group, _ in batch]).nats_N
        for (row, group, _), value in zip(batch, nats_N.tolist(), strict=True):
            nats.setdefault((row, group), []).append(value)
    return {key: _v_information(values) for key, values in nats.items()}


def _v_information(nats: Sequence[float]) -> VInformation:
    """From the code lengths of a step with the thoughts of each problem, the own one's first."""
    ratios = torch.tensor(nats, dtype=torch.float64).sub(nats[0]).neg()  # log p(y | z_j) - log p(y | z_own)
    bound = math.log2(len(nats))
    return VInformation(bound - torch.logsumexp(ratios, 0).item() / math.log(2), bound)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def text_entropy(texts: Sequence[str]) -> float:
    """Entropy in bits of the texts as they are distributed here: what there is to know about one of them."""
    return sum(count / len(texts) * math.log2(len(texts) / count) for count in Counter(texts).values())
