"""loop=compressed: a thought is a few tokens of the written steps in one, and a Gaussian head says the next (CoLaR).

    [q_1 .. q_n, speed, <|bot|>, z_1 .. z_K, <|eot|>, answer ..]

In training every r tokens of the steps are merged into one thought, z = sum of their embeddings / sqrt(n), n <= r. r is
drawn for each optimizer step, and told to the model by a learned vector, where the published code has a token per r. At
`<|bot|>` and at each thought the head gives mean and standard deviation of the next input embedding, that of `<|eot|>`
last, in units of the embeddings' own standard deviation (see `terms.compressed` for the loss). Afterwards a draw from
the head, or its mean, is fed until `<|eot|>` is the most likely token. Source: CoLaR,
https://arxiv.org/abs/2505.16552, section 3, and its code.

Shapes: B rows, P tokens of all questions with `<|bot|>`, K thoughts, N of all rows, L tokens that these are made of, D
width, R rows that are still thinking, A tokens of all texts from `<|eot|>` on, M = 2B + N, X = P + B + N + A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simcot_latent.data.batch import Seeds
from simcot_latent.errors import require, require_choice
from simcot_latent.loops.base import Thoughts, by_row
from simcot_latent.loops.given import Ending, Given, GivenLoop, GivenThoughts
from simcot_latent.model.cache import KVCache, StaticCaches, make_cache
from simcot_latent.model.gpt import GPT, init_weights
from simcot_latent.model.linear import Embedding, Linear
from simcot_latent.model.packing import Packing, take
from simcot_latent.model.taps import Taps

MAX_COMPRESSION = 64
"""The most tokens per thought that a configuration may ask for; CoLaR takes up to 5."""


@dataclass(frozen=True)
class CompressedConfig:
    """Settings of loop=compressed.

    Attributes:
        compressions: the tokens per thought, r, one of which is drawn for each optimizer step.
        compression: the r that the model answers with, in validation too; one of these.
        merge: what the sum of a thought's n embeddings is divided by: `sqrt` (sqrt(n), CoLaR) or `mean` (n).
        embedding_std: the standard deviation that embeddings have for the head; None: that of the table as it is, where
            the published code has a constant per model.
        head_width: hidden width of the head; None: the model's.
    """

    compressions: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    compression: int = 2
    merge: str = "sqrt"
    embedding_std: float | None = None
    head_width: int | None = None

    def __post_init__(self) -> None:
        among = self.compressions
        right = f"different whole numbers from 1 to {MAX_COMPRESSION}, at least one"
        are_right = all(type(r) is int and 1 <= r <= MAX_COMPRESSION for r in among)
        require(are_right and len(set(among)) == len(among) > 0, "latent.compressions", among, right)
        right = f"one of latent.compressions={among}"
        require(self.compression in among, "latent.compression", self.compression, right)
        require_choice("latent.merge", self.merge, ("sqrt", "mean"))
        std, width = self.embedding_std, self.head_width
        require(std is None or std > 0, "latent.embedding_std", std, "above 0, or null for that of the embeddings")
        require(width is None or width >= 1, "latent.head_width", width, "at least 1, or null for the model's width")


class GaussianHead(nn.Module):
    """From a hidden state to mean and standard deviation of the next input embedding, in each of its numbers."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.first = Linear(width, hidden_width)
        self.second = Linear(hidden_width, hidden_width)
        self.norm = nn.LayerNorm(hidden_width)
        self.mean = Linear(hidden_width, width)
        self.log_std = Linear(hidden_width, width)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation (..., D) of hidden states (..., D)."""
        x = self.norm(self.second(F.gelu(self.first(hidden))))
        return self.mean(x), self.log_std(x)


class Compressed(GivenLoop):
    """Thoughts made of r tokens each."""

    Config = CompressedConfig
    config: CompressedConfig
    free = ("compression",)

    def __init__(self, width: int, config: CompressedConfig) -> None:
        super().__init__(width, config)
        self.speeds = Embedding(len(config.compressions), width)
        self.head = GaussianHead(width, config.head_width or width)
        self.apply(init_weights)

    def positions(self, thoughts: int) -> int:
        return thoughts + (thoughts > 0)

    def pack_questions(self, lengths: Sequence[int], counts: Sequence[int], tight: bool = False) -> Packing:
        one_each = [1] * len(lengths)
        return Packing.of(lengths, one_each, one_each, tight=tight)

    def pack_given(self, lengths: Sequence[int], given: Given, texts: Sequence[int]) -> Packing:
        one_each = [1] * len(lengths)
        return Packing.of(lengths, one_each, one_each, given.counts, texts, tight=True)

    def speed_of(self, compression: int) -> int:
        """Which of the speeds an r is."""
        return self.config.compressions.index(compression)

    def embedding_std(self, model: GPT) -> Tensor | float:
        """What an embedding is divided by for the head; no gradient goes through it."""
        constant = self.config.embedding_std
        return model.embedding.weight.detach().std() if constant is None else constant

    def give(self, texts: Sequence[Sequence[int]], seeds: Seeds | None) -> Given:
        among, speed = self.config.compressions, self.speed_of(self.config.compression)
        if seeds is not None:
            speed = int(torch.randint(len(among), (), generator=torch.Generator().manual_seed(seeds.step)))
        return Given.of(texts, among[speed], speed)

    def read_given(
        self,
        model: GPT,
        questions_PD: Tensor,
        given: Given,
        given_LD: Tensor,
        texts_AD: Tensor,
        packing: Packing,
        taps: Taps | None = None,
    ) -> tuple[GivenThoughts, Tensor]:
        """The states are those at the speeds of all rows, then at all `<|bot|>`, then at all thoughts."""
        N, A, M = len(given.size_N), len(texts_AD), 2 * packing.rows + len(given.size_N)
        thoughts_ND = given_LD.new_zeros(N, self.width).index_add(0, given.thought_L, given_LD)
        n_N1 = given.size_N.unsqueeze(1)
        thoughts_ND = thoughts_ND / (n_N1.sqrt() if self.config.merge == "sqrt" else n_N1)
        x_XD = torch.cat((self.with_speed(questions_PD, given.speed_B), thoughts_ND, texts_AD))
        states_MD, hidden_AD = model.transformer(x_XD, packing, read_out=M + A, taps=taps).split([M, A])
        return GivenThoughts(by_row(thoughts_ND, given.counts), KVCache(0), states_MD=states_MD), hidden_AD

    def with_speed(self, questions_PD: Tensor, speed_B: Tensor) -> Tensor:
        """Questions with the speed before each row's `<|bot|>`."""
        silent_PD, bots_BD = questions_PD[: -len(speed_B)], questions_PD[-len(speed_B) :]
        return torch.cat((silent_PD, self.speeds(speed_B).to(questions_PD.dtype), bots_BD))

    def think(
        self,
        model: GPT,
        questions_PD: Tensor,
        packing: Packing,
        counts: Sequence[int],
        room: int,
        caches: StaticCaches | None = None,
        keys: bool = False,
        ending: Ending | None = None,
    ) -> Thoughts:
        B, device, std = packing.rows, questions_PD.device, self.embedding_std(model)
        cache = make_cache(B, packing.longest + max(counts) + room, caches)
        speed_B = torch.full((B,), self.speed_of(self.config.compression), device=device)
        hidden_RD = model.transformer(self.with_speed(questions_PD, speed_B), packing, cache, read_out=B)
        rows, found, thoughts = list(range(B)), [0] * B, []
        while True:
            ends = [False] * len(rows)
            if ending is not None:
                ends = (model.logits(hidden_RD).argmax(-1) == ending.end_id).tolist()
            kept = [i for i, row in enumerate(rows) if found[row] < counts[row] and not ends[i]]
            if not kept:
                break
            if len(kept) < len(rows):
                hidden_RD, rows = take(hidden_RD, torch.tensor(kept, device=device)), [rows[i] for i in kept]
            mean_RD, log_std_RD = self.head(hidden_RD)
            if ending is not None and ending.temperature > 0:
                noise_RD = torch.empty_like(mean_RD).normal_(generator=ending.generator)
                mean_RD = mean_RD + ending.temperature * log_std_RD.exp() * noise_RD
            thought_RD = (mean_RD * std).to(questions_PD.dtype)
            row_R = torch.tensor(rows, device=device)
            thoughts.append(thought_RD.new_zeros(B, self.width).index_copy(0, row_R, thought_RD))
            for row in rows:
                found[row] += 1
            one_each = Packing.grid(B, 1, device)
            if len(rows) < B:
                going = set(rows)
                one_each = Packing.of([int(row in going) for row in range(B)]).to(device)
            hidden_RD = model.transformer(thought_RD, one_each, cache)
        latents_BKD = torch.stack(thoughts, dim=1) if thoughts else questions_PD.new_zeros(B, 0, self.width)
        return Thoughts(latents_BKD, cache, counts=tuple(found))
