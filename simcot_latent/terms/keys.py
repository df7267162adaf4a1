"""distill=kv: keys and values of thoughts are pulled towards those of the written steps that matter most (KaVa).

In the written pass each block and key/value head selects as many step tokens as there are thoughts, by R-KV:

    S = lambda * I + (1 - lambda) * R
    I = mean over answer tokens of the softmax, over the step tokens alone, of their scaled attention scores
    R = softmax over the step tokens of minus (1 / N) * the sum of cosines of a key with the other keys

Thought m is paired with the m-th selected token, in the order of the text; thoughts beyond the last are left out. Then

    D = 1/2 mean d(k_student, k_teacher) + 1/2 mean d(v_student, v_teacher)

over rows, blocks, heads, pairs and width. No gradient reaches the written pass. Source: KaVa,
https://arxiv.org/abs/2510.02312, equation 7 and listing 1, as quoted by others: no official code is known. The sum over
the width that is written there is a mean here. R-KV: https://arxiv.org/abs/2505.24133. A controlled comparison found
its choice no better than `uniform` or `random` ones.

Shapes: B rows, L blocks, H query heads, G key/value heads, E head width, N step tokens (of the row that has most), A
answer tokens, K thoughts, M pairs, T tapped tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor

from simcot_latent.errors import require, require_choice
from simcot_latent.model.losses import at_least_tiny
from simcot_latent.terms.base import Collated, Rows, Term, TermLoss, Trace, Wanted
from simcot_latent.terms.hidden import DISTANCES


@dataclass(frozen=True)
class KeysConfig:
    """Settings of distill=kv.

    Attributes:
        kv_weight: weight of the pull.
        kv_select: which step tokens: `rkv` (KaVa), `uniform` (evenly spaced) or `random` (the same in every epoch).
        kv_lambda: weight of importance in R-KV, from 0 to 1; KaVa takes 0.1.
        kv_distance: `smooth_l1`, `l1` or `mse`.
        kv_norm: what a block's distance is divided by: `none`, or `std`, that of the selected keys (or values).
    """

    kv_weight: float = 1.0
    kv_select: str = "rkv"
    kv_lambda: float = 0.1
    kv_distance: str = "smooth_l1"
    kv_norm: str = "none"

    def __post_init__(self) -> None:
        require(self.kv_weight >= 0, "loss.kv_weight", self.kv_weight, "at least 0")
        require_choice("loss.kv_select", self.kv_select, ("rkv", "uniform", "random"))
        require(0 <= self.kv_lambda <= 1, "loss.kv_lambda", self.kv_lambda, "from 0 to 1")
        require_choice("loss.kv_distance", self.kv_distance, tuple(DISTANCES))
        require_choice("loss.kv_norm", self.kv_norm, ("none", "std"))


@dataclass
class KeysBatch:
    """Tokens of the written pass, and which of them are whose.

    Attributes:
        token_T: step tokens and answer tokens of all rows.
        step_BN, answer_BA: which of them are the row's step tokens, and its answer tokens; 0 where there is none.
        has_step_BN, has_answer_BA: where there is one.
        order_BN: a random number per step token, by which `random` chooses.
    """

    token_T: Tensor
    step_BN: Tensor
    answer_BA: Tensor
    has_step_BN: Tensor
    has_answer_BA: Tensor
    order_BN: Tensor


class Keys(Term):
    """The pull of keys and values."""

    Config = KeysConfig
    config: KeysConfig
    name = "kv"
    needs_written = True
    needs_keys = True

    @property
    def weight(self) -> float:
        return self.config.kv_weight

    def collate(self, rows: Rows) -> Collated:
        tokens: list[int] = []
        steps: list[list[int]] = []
        answers: list[list[int]] = []
        orders: list[list[float]] = []
        for row, example in enumerate(rows.examples):
            # Token j of a solution is read where token j + 1 is predicted; the end token is not read.
            n_steps, n = len(rows.solutions[row]) - len(example.answer), len(rows.solutions[row])
            first = rows.in_written(row, 1)
            for places, span in ((steps, range(n_steps)), (answers, range(n_steps, n - 1))):
                places.append(list(range(len(tokens), len(tokens) + len(span))))
                tokens += [first + j for j in span]
            seed = hashlib.blake2b(str(example.question).encode(), digest_size=4).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
            orders.append(torch.rand(n_steps, generator=generator).tolist())
        step_BN, has_step_BN = padded(steps)
        answer_BA, has_answer_BA = padded(answers)
        order_BN, _ = padded(orders, torch.float32)
        pairs = sum(min(len(row), count) for row, count in zip(steps, rows.counts, strict=True))
        batch = KeysBatch(
            torch.tensor(tokens, dtype=torch.long), step_BN, answer_BA, has_step_BN, has_answer_BA, order_BN
        )
        return Collated(batch, {"kv_pairs": torch.tensor(float(pairs))})

    def wants_of_written(self, batch: KeysBatch) -> Wanted:
        return Wanted(batch.token_T, queries=True, keys=True, values=True, detach=True)

    def loss(self, trace: Trace, batch: KeysBatch, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        thoughts, taps = trace.thoughts, trace.written_taps
        assert taps is not None
        assert thoughts.keys_LBKGE is not None
        assert thoughts.values_LBKGE is not None
        keys_LTGE, values_LTGE = taps.keys_LNGE.float(), taps.values_LNGE.float()
        k_LBGNE, v_LBGNE = (rearrange(x[:, batch.step_BN], "l b n g e -> l b g n e") for x in (keys_LTGE, values_LTGE))
        q_LBHAE = rearrange(taps.queries_LNHE.float()[:, batch.answer_BA], "l b a h e -> l b h a e")
        K = thoughts.keys_LBKGE.shape[2]
        count_B = torch.tensor(trace.counts, device=batch.step_BN.device)
        score_LBGN = self.scores(q_LBHAE, k_LBGNE, batch, count_B)
        index_LBGM = select(score_LBGN, batch.has_step_BN, count_B, K)
        n_pairs_B = torch.minimum(batch.has_step_BN.sum(1), count_B)
        M = index_LBGM.shape[-1]
        is_pair_BM = torch.arange(M, device=count_B.device) < n_pairs_B.unsqueeze(1)
        index = index_LBGM.unsqueeze(-1)
        value = torch.zeros((), device=count_B.device)
        for student_LBKGE, teacher_LBGNE in ((thoughts.keys_LBKGE, k_LBGNE), (thoughts.values_LBKGE, v_LBGNE)):
            teacher_LBGME = teacher_LBGNE.take_along_dim(index, dim=3)
            student_LBGME = rearrange(student_LBKGE.float()[:, :, :M], "l b m g e -> l b g m e")
            distance_L = pair_distance_L(
                student_LBGME, teacher_LBGME, is_pair_BM, self.config.kv_distance, self.config.kv_norm
            )
            _, _, G, _, E = teacher_LBGME.shape
            value = value + 0.5 * distance_L.mean() / (G * E * at_least_tiny(totals["kv_pairs"]))
        return TermLoss(value=value)

    def scores(self, q_LBHAE: Tensor, k_LBGNE: Tensor, batch: KeysBatch, count_B: Tensor) -> Tensor:
        """What each step token is chosen by (L, B, G, N), the highest first."""
        L, B, G, N, _ = k_LBGNE.shape
        if self.config.kv_select == "random":
            return batch.order_BN[None, :, None].expand(L, B, G, N)
        if self.config.kv_select == "uniform":
            return evenly_spaced(batch.has_step_BN, count_B)[None, :, None].expand(L, B, G, N)
        lam = self.config.kv_lambda
        importance_LBGN = importance(q_LBHAE, k_LBGNE, batch.has_step_BN, batch.has_answer_BA)
        return lam * importance_LBGN + (1 - lam) * non_redundancy(k_LBGNE, batch.has_step_BN)


def padded(rows: Sequence[Sequence[float]], dtype: torch.dtype = torch.long) -> tuple[Tensor, Tensor]:
    """Rows as a rectangle (B, N) with zeros behind, and where they are."""
    width = max((len(row) for row in rows), default=0)
    values = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype).view(len(rows), width)
    return values, torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(1)


def importance(q_LBHAE: Tensor, k_LBGNE: Tensor, has_step_BN: Tensor, has_answer_BA: Tensor) -> Tensor:
    """I (L, B, G, N): how much the answer attends to each step token, of all that it attends to steps.

    Query heads that share a key/value head count alike.
    """
    G, E = k_LBGNE.shape[2], k_LBGNE.shape[-1]
    q = rearrange(q_LBHAE, "l b (g r) a e -> l b g r a e", g=G)
    scores = torch.einsum("lbgrae,lbgne->lbgran", q, k_LBGNE) / E**0.5
    weights = softmax_where(scores, has_step_BN[None, :, None, None, None])
    asks = has_answer_BA[None, :, None, None, :, None]
    n_answers_B = at_least_tiny(has_answer_BA.sum(1).float())[None, :, None, None]
    return reduce(weights * asks, "l b g r a n -> l b g n", "sum") / (q.shape[3] * n_answers_B)


def non_redundancy(k_LBGNE: Tensor, has_step_BN: Tensor) -> Tensor:
    """R (L, B, G, N): the higher, the less a key is like the other keys of its row and head."""
    unit = k_LBGNE / (k_LBGNE.norm(dim=-1, keepdim=True) + 1e-8) * has_step_BN[None, :, None, :, None]
    cosines = unit @ unit.mT
    others = cosines.sum(-1) - cosines.diagonal(dim1=-2, dim2=-1)
    n_B = has_step_BN.sum(1).clamp(min=1)[None, :, None, None]
    return softmax_where(-others / n_B, has_step_BN[None, :, None])


def softmax_where(scores: Tensor, where: Tensor) -> Tensor:
    """Softmax over the last dimension of those that are there; 0 for the others."""
    weights = scores.masked_fill(~where, float("-inf")).softmax(-1)
    return weights.nan_to_num(0.0)  # rows of which nothing is there


def select(score_LBGN: Tensor, has_step_BN: Tensor, count_B: Tensor, most: int) -> Tensor:
    """Which step tokens are paired with thoughts, (L, B, G, M) with M <= `most`, in the order of the text.

    Of a row with more tokens than thoughts, those of the highest score.
    Entries beyond a row's pairs are any.
    """
    M = min(most, has_step_BN.shape[1])
    scores = score_LBGN.masked_fill(~has_step_BN[None, :, None], float("-inf"))
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices
    place = ranked.argsort(dim=-1)  # of each token among the highest
    chosen = (place < count_B[None, :, None, None]) & has_step_BN[None, :, None]
    # Chosen tokens first, each side in the order of the text.
    return (~chosen).to(torch.int8).sort(dim=-1, stable=True).indices[..., :M]


def evenly_spaced(has_step_BN: Tensor, count_B: Tensor) -> Tensor:
    """1 for as many step tokens of each row as it has thoughts (or all), at equal distances, and 0 for the others."""
    n_B1 = has_step_BN.sum(1, keepdim=True)
    pairs_B1 = torch.minimum(n_B1, count_B.unsqueeze(1))
    j_N, n_B1 = torch.arange(has_step_BN.shape[1], device=count_B.device), n_B1.clamp(min=1)
    return (((j_N + 1) * pairs_B1 // n_B1) > (j_N * pairs_B1 // n_B1)).float()


def pair_distance_L(
    student_LBGME: Tensor, teacher_LBGME: Tensor, is_pair_BM: Tensor, distance: str, norm: str = "none"
) -> Tensor:
    """The distance of each block, summed over pairs, heads and width (L,)."""
    where = is_pair_BM[None, :, None, :, None]
    found = DISTANCES[distance](student_LBGME, teacher_LBGME, reduction="none") * where
    distance_L = found.flatten(1).sum(1)
    if norm == "std" and is_pair_BM.any():
        std = [layer[where[0].expand_as(layer)].std() for layer in teacher_LBGME]
        distance_L = distance_L / torch.stack(std)
    return distance_L
