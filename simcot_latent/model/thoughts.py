"""The latent thought loop: a question becomes thoughts, and a state to go on from.

Input `[q_1 .. q_n, <bot>, z_1 .. z_K, <eot>, answer ..]`. z_1 is the hidden state (after the final norm) at `<bot>`;
z_{k+1} is the hidden state at the position where z_k was fed as the input embedding (Coconut,
https://arxiv.org/abs/2412.06769, section 3; SIM-CoT, https://arxiv.org/abs/2509.20317, section 3). With a projector
(CODI, https://arxiv.org/abs/2502.21074, section 3) each is projected first. Nothing is sampled, positions keep
counting.

Shapes: B rows, P tokens of all questions with `<bot>`, A of all texts from `<eot>` on (see `packing`), K thoughts,
G step groups of C thoughts, D width; X sets of N points; N rows that are taught a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from simcot_latent.errors import UserError, require
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing


@dataclass(frozen=True)
class ThoughtFormat:
    """How a model answers.

    Attributes:
        thinks: whether prompts end in `<|bot|>` and answers begin after `<|eot|>`.
        n_latents: K, the thoughts between the two; 0 for a model that writes its steps.
        latents_per_step: c, the thoughts of a step group.
        feeds_last: whether the last thought is read before the answer (Coconut), or only decoded (SIM-CoT on CODI).
        question_end: text between the question and what follows.
        answer_mark: text that the number of an answer stands behind.
    """

    thinks: bool = False
    n_latents: int = 0
    latents_per_step: int = 1
    feeds_last: bool = True
    question_end: str = ""
    answer_mark: str = "####"

    def __post_init__(self) -> None:
        require(self.n_latents >= 0, "thoughts.n_latents", self.n_latents, "at least 0")
        c = self.latents_per_step
        require(c >= 1, "thoughts.latents_per_step", c, "at least 1")
        require(self.n_latents % c == 0, "thoughts.n_latents", self.n_latents, f"a multiple of latents_per_step={c}")
        if self.n_latents and not self.feeds_last and self.n_latents < 2:
            raise UserError("thoughts: n_latents must be at least 2 where the last one is not fed")

    @property
    def groups(self) -> int:
        """Step groups of a question."""
        return self.n_latents // self.latents_per_step


@dataclass
class Thoughts:
    """What a batch of questions was thought into.

    Attributes:
        latents_BKD: the thoughts z_1 .. z_K.
        cache: everything read so far: question, `<bot>` and z_1 .. z_{K-1}. The last thought is still to be read;
            `go_on` feeds it together with what follows, which saves a pass.
        feeds_last: see `ThoughtFormat`.
    """

    latents_BKD: Tensor
    cache: KVCache
    feeds_last: bool = True

    @property
    def latents(self) -> Tensor:
        """The thoughts, (B, K, D)."""
        return self.latents_BKD


def think(
    model: GPT, questions_PD: Tensor, packing: Packing, n_latents: int, room: int, feeds_last: bool = True
) -> Thoughts:
    """Reads questions and thinks `n_latents` (at least 1) thoughts about each.

    Args:
        questions_PD: their embeddings; the last B tokens are the rows' `<bot>`, in the order of the rows.
        packing: how they lie.
        room: positions to reserve for what a row reads after its thoughts, `<eot>` included.
        feeds_last: see `ThoughtFormat`.
    """
    B = packing.rows
    cache = KVCache(packing.longest + n_latents + room)
    thoughts = [model.thought(model.transformer(questions_PD, packing, cache, read_out=B))]
    one_each = Packing.grid(B, 1, questions_PD.device)
    for _ in range(n_latents - 1):
        thoughts.append(model.thought(model.transformer(thoughts[-1], one_each, cache)))
    return Thoughts(torch.stack(thoughts, dim=1), cache, feeds_last)


def pack_texts(lengths: Sequence[int], feeds_last: bool) -> Packing:
    """How what follows the thoughts lies: the last thoughts of all rows first, if they are fed, then the texts."""
    return Packing.of([1] * len(lengths), lengths) if feeds_last else Packing.of(lengths)


def go_on(model: GPT, thoughts: Thoughts, texts_AD: Tensor, packing: Packing) -> Tensor:
    """Feeds the last thought (see `ThoughtFormat.feeds_last`) and what follows; returns the hidden states there (A, D).

    Args:
        texts_AD: embeddings of the tokens from `<eot>` on.
        packing: of `pack_texts`.
    """
    x = torch.cat((thoughts.latents_BKD[:, -1], texts_AD)) if thoughts.feeds_last else texts_AD
    return model.transformer(x, packing, thoughts.cache, read_out=len(texts_AD))


def geometry(latents_BKD: Tensor, embedding_VD: Tensor) -> dict[str, float]:
    """How far thoughts lie apart, and from the words: collapse shows here before it shows in accuracy.

    Returns:
        `thought_distance`: mean L2 distance between two thoughts of one problem (nan for a single thought);
        `thought_to_embedding`: mean L2 distance of a thought to the mean token embedding
        (both as in SIM-CoT, https://arxiv.org/abs/2509.20317, section 3.1);
        `thought_spread`: mean L2 distance between two problems' thoughts of the same index (nan for a single problem);
        a thought that is the same for every problem says nothing about its own;
        `thought_norm`: mean L2 norm of a thought, the scale that the others are read against.
    """
    latents_BKD = latents_BKD.float()
    to_mean = (latents_BKD - embedding_VD.float().mean(0)).norm(dim=-1).mean().item()
    return {
        "thought_distance": mean_distance(latents_BKD),
        "thought_spread": mean_distance(rearrange(latents_BKD, "b k d -> k b d")),
        "thought_to_embedding": to_mean,
        "thought_norm": latents_BKD.norm(dim=-1).mean().item(),
    }


def mean_distance(points_XND: Tensor) -> float:
    """Mean L2 distance between two of N points, over X sets of them; nan for a single point."""
    X, N, _ = points_XND.shape
    return torch.cdist(points_XND, points_XND).sum().item() / (X * N * (N - 1)) if N > 1 else float("nan")


def others_thoughts(latents_BKD: Tensor, taught_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Thoughts of the wrong problem: what a decoder makes of them it does not have from its own problem's thoughts.

    Args:
        taught_BG: which step groups are taught something. Only these are exchanged, so that a thought that had a step
            to say stands where one had.

    Returns:
        The thoughts, each taught group's being those of the row before that is taught in the same group (the last for
        the first); and which groups were exchanged (B, G): a group that only one row is taught was not.
    """
    G = taught_BG.shape[1]
    groups_BGCD = rearrange(latents_BKD, "b (g c) d -> b g c d", g=G)
    others_BGCD = groups_BGCD.clone()
    for group in range(G):
        row_N = taught_BG[:, group].nonzero().squeeze(1)
        others_BGCD[row_N, group] = groups_BGCD[row_N.roll(1), group]
    return rearrange(others_BGCD, "b g c d -> b (g c) d"), taught_BG & (taught_BG.sum(0) > 1)
