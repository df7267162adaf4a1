"""loop=sequential: each thought is the hidden state at the one before it, fed back as an input (Coconut, CODI).

z_1 is the hidden state (after the final norm) at `<|bot|>`; z_{k+1} is the hidden state at the position where z_k was
fed as the input embedding (Coconut, https://arxiv.org/abs/2412.06769, section 3; SIM-CoT,
https://arxiv.org/abs/2509.20317, section 3). With a projector (CODI, https://arxiv.org/abs/2502.21074, section 3) each
is projected first.

Rows that have all of their thoughts wait for the others, unread.

Shapes: B rows, P tokens of all questions with `<|bot|>`, K states, D width, R rows that are still thinking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simcot_latent.errors import require
from simcot_latent.loops.base import ThoughtLoop, Thoughts
from simcot_latent.model.cache import StaticCaches, make_cache
from simcot_latent.model.gpt import GPT, init_weights
from simcot_latent.model.linear import Linear, activated
from simcot_latent.model.packing import Packing, take


@dataclass(frozen=True)
class SequentialConfig:
    """Settings of loop=sequential.

    Attributes:
        feeds_last: whether the model reads the last state that the loop comes to (Coconut), or only the auxiliary
            decoder does (SIM-CoT on CODI).
        projector_width: hidden width of the projector between a hidden state and the thought that it becomes (CODI);
            None: no projector, the hidden state is the thought (Coconut).
    """

    feeds_last: bool = True
    projector_width: int | None = None

    def __post_init__(self) -> None:
        width = self.projector_width
        require(width is None or width >= 1, "latent.projector_width", width, "at least 1, or null for no projector")


class Projector(nn.Module):
    """From a hidden state to the thought that it becomes (CODI, https://arxiv.org/abs/2502.21074, section 3)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden_width)
        self.down = Linear(hidden_width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.down(activated(self.up(hidden), F.gelu, self.down, keeps_input_alone=True)))


class Sequential(ThoughtLoop):
    """One pass per thought."""

    Config = SequentialConfig
    config: SequentialConfig

    def __init__(self, width: int, config: SequentialConfig) -> None:
        super().__init__(width, config)
        hidden_width = config.projector_width
        self.projector = None if hidden_width is None else Projector(width, hidden_width)
        if self.projector is not None:
            self.projector.apply(init_weights)

    def states(self, thoughts: int) -> int:
        """The thoughts, and one state more where the last is not fed.

        CODI's six thoughts are the projected state at `<|bot|>` and those at the first five; SIM-CoT decodes that at
        the sixth as well.
        """
        return thoughts + (thoughts > 0 and not self.config.feeds_last)

    def passes(self, counts: Sequence[int]) -> list[Packing]:
        return [Packing.of([int(count > k) for count in counts]) for k in range(1, max(counts))]

    def unread(self, counts: Sequence[int]) -> list[int]:
        return [int(count > 0 and self.config.feeds_last) for count in counts]

    def thought(self, hidden: Tensor) -> Tensor:
        """The thought (..., D) that a hidden state (..., D) becomes: itself, or its projection."""
        return hidden if self.projector is None else self.projector(hidden)

    def thought_from(self, model: GPT, hidden_RD: Tensor) -> Tensor:
        """The thought (R, D) that a hidden state (R, D) of the model becomes."""
        return self.thought(hidden_RD)

    def think(
        self,
        model: GPT,
        questions_PD: Tensor,
        packing: Packing,
        counts: Sequence[int],
        room: int,
        caches: StaticCaches | None = None,
        keys: bool = False,
    ) -> Thoughts:
        B, K, device = packing.rows, max(counts), questions_PD.device
        cache = make_cache(B, packing.longest + K + room, caches)
        thoughts = [self.thought_from(model, model.transformer(questions_PD, packing, cache, read_out=B))]
        if min(counts) == K > 0:
            one_each = Packing.grid(B, 1, device)
            for _ in range(K - 1):
                thoughts.append(self.thought_from(model, model.transformer(thoughts[-1], one_each, cache)))
            return Thoughts(torch.stack(thoughts, dim=1), cache, thoughts[-1] if self.config.feeds_last else None)
        has_any_B1 = torch.tensor([[float(count > 0)] for count in counts], device=device)
        rows, latest_RD = list(range(B)), thoughts[0]
        thoughts[0] = latest_RD * has_any_B1
        for k, one_each in enumerate(self.passes(counts), start=1):
            one_each = one_each.to(device)
            going = [row for row in rows if counts[row] > k]
            if len(going) < len(rows):
                latest_RD = take(latest_RD, torch.tensor([rows.index(row) for row in going], device=device))
                rows = going
            latest_RD = self.thought_from(model, model.transformer(latest_RD, one_each, cache))
            thoughts.append(latest_RD.new_zeros(B, latest_RD.shape[1]).index_copy(0, one_each.row_P, latest_RD))
        latents_BKD = torch.stack(thoughts, dim=1)
        latents_BKD = latents_BKD[:, :K]  # none in rows of the first stage alone, among others
        return Thoughts(latents_BKD, cache, last_of_each(latents_BKD, counts) if any(self.unread(counts)) else None)


def last_of_each(latents_BKD: Tensor, counts: Sequence[int]) -> Tensor:
    """The last thought (R, D) of each row that has any."""
    K = latents_BKD.shape[1]
    index = [row * K + count - 1 for row, count in enumerate(counts) if count]
    index_R = torch.tensor(index, dtype=torch.long, device=latents_BKD.device)
    return take(rearrange(latents_BKD, "b k d -> (b k) d"), index_R)
