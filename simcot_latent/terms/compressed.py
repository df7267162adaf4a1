"""steps=compressed: at every thought the next one must be known: its embedding, and a token that it is made of (CoLaR).

    L = tokens + embedding_weight * embeddings

Tokens: cross-entropy of `<|bot|>`, of one token of each thought, drawn from those that it is made of, and of `<|eot|>`,
each predicted by the position before it. As in the published code they are averaged together with the answer's tokens.
Embeddings: at `<|bot|>` and every thought, the distance of the head's prediction (mean m, standard deviation s) from
the next input embedding g, detached, divided by the embeddings' standard deviation; a mean over width and positions:

    mse: (m + s * noise - g)^2        nll: -log N(g; m, s)

Source: CoLaR, https://arxiv.org/abs/2505.16552, section 3.2, and its code.

Shapes: B rows, K thoughts, N of all rows, D width, M = 2B + N labels, S = B + N predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from simcot_latent.config import MethodConfig
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import require, require_choice
from simcot_latent.loops.compressed import Compressed
from simcot_latent.loops.given import GivenThoughts
from simcot_latent.model.gpt import GPT
from simcot_latent.model.losses import Labelled, at_least_tiny
from simcot_latent.terms.base import Collated, Rows, Term, TermLoss, Trace

T = TypeVar("T")


@dataclass(frozen=True)
class CompressedSettings:
    """The weight that this part has from `loss`, see there, and settings of its own.

    Attributes:
        embedding_weight: weight of the loss on embeddings, beside that on tokens.
        embedding_distance: `mse` or `nll`; CoLaR takes the former.
    """

    step_weight: float = 1.0
    embedding_weight: float = 1.0
    embedding_distance: str = "mse"

    def __post_init__(self) -> None:
        require(self.embedding_weight >= 0, "loss.embedding_weight", self.embedding_weight, "at least 0")
        require_choice("loss.embedding_distance", self.embedding_distance, ("mse", "nll"))


@dataclass
class CompressedBatch:
    """What is to be predicted.

    Attributes:
        label_M: `<|bot|>` of all rows, then the first token of all, then the others, row by row.
        next_S: which of the B * K thoughts comes next, in the order of the predictions; B * K: `<|eot|>`.
        noise_SD: standard normal numbers; None: none.
    """

    label_M: Tensor
    next_S: Tensor
    noise_SD: Tensor | None


class CompressedTerm(Term):
    """Token and embedding of the next thought."""

    Config = CompressedSettings
    config: CompressedSettings
    name = "step"
    needs_predictions = True

    def __init__(self, model: GPT, tokenizer: Tokenizer, method: MethodConfig) -> None:
        super().__init__(model, tokenizer, method)
        self.bot_id, self.eot_id = tokenizer.bot_id, tokenizer.eot_id

    @property
    def weight(self) -> float:
        return self.config.step_weight

    def collate(self, rows: Rows) -> Collated:
        given = rows.given
        assert given is not None
        counts, B, K = given.counts, len(given.counts), max(given.counts)
        first_N, share_N, noise_SD = given.size_N.cumsum(0) - given.size_N, torch.zeros(len(given.size_N)), None
        if rows.seeds is not None:
            generators = [torch.Generator().manual_seed(seed) for seed in rows.seeds.rows]
            drawn = list(zip(counts, generators, strict=True))
            share_N = torch.cat([torch.rand(n, generator=generator) for n, generator in drawn])
            width = self.model.config.n_embd
            noise_SD = torch.cat(firsts_first([torch.randn(1 + n, width, generator=g).split(1) for n, g in drawn]))
        which_N = (share_N * given.size_N).long().minimum(given.size_N - 1)
        tokens = given.ids_L[first_N + which_N].split(counts)
        labels = [self.bot_id] * B + firsts_first([[*token_K.tolist(), self.eot_id] for token_K in tokens])
        nexts = firsts_first([[*range(row * K, row * K + n), B * K] for row, n in enumerate(counts)])
        batch = CompressedBatch(torch.tensor(labels), torch.tensor(nexts), noise_SD)
        totals = {"predictions": torch.tensor(float(len(nexts)))}
        return Collated(batch, totals, weights=torch.tensor(float(len(labels))))

    def loss(self, trace: Trace, batch: CompressedBatch, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        model, loop, thoughts, config = self.model, trace.loop, trace.thoughts, self.config
        assert isinstance(loop, Compressed)
        assert isinstance(thoughts, GivenThoughts)
        eot_1D = model.embedding.weight[self.eot_id].unsqueeze(0)
        gold_SD = torch.cat((thoughts.latents_BKD.flatten(0, 1), eot_1D)).detach()[batch.next_S]
        gold_SD = gold_SD.float() / loop.embedding_std(model)
        B = len(thoughts.latents_BKD)
        mean_SD, log_std_SD = (x.float() for x in loop.head(thoughts.states_MD[B:]))
        if config.embedding_distance == "mse":
            drawn_SD = mean_SD if batch.noise_SD is None else mean_SD + log_std_SD.exp() * batch.noise_SD
            distance_SD = (drawn_SD - gold_SD).square()
        else:
            away_SD = (gold_SD - mean_SD) / log_std_SD.exp()
            distance_SD = 0.5 * away_SD.square() + log_std_SD + 0.5 * math.log(2 * math.pi)
        predictions = at_least_tiny(totals["predictions"])
        embeddings = distance_SD.mean(1).sum() / predictions
        entropy = (log_std_SD.detach().mean(1) + 0.5 * math.log(2 * math.pi * math.e)).sum() / predictions
        weights = at_least_tiny(totals["weights"])

        def metrics(nll_M: Tensor, correct_M: Tensor) -> dict[str, Tensor]:
            return {
                "token_loss": nll_M.sum() / weights,
                "embedding_loss": embeddings.detach(),
                "thought_entropy": entropy,
            }

        scale_M = torch.ones_like(batch.label_M, dtype=torch.float32) / weights
        labelled = Labelled(thoughts.states_MD, model.output_table, batch.label_M, scale_M)
        return TermLoss(labelled, config.embedding_weight * embeddings, metrics)


def firsts_first(rows: Sequence[Sequence[T]]) -> list[T]:
    """The first of every row, then the others, row by row."""
    return [row[0] for row in rows] + [x for row in rows for x in row[1:]]
