"""The latent thought loop: a question becomes thoughts, and a state to go on from.

Input `[q_1 .. q_n, <bot>, z_1 .. z_K, <eot>, answer ..]`. z_1 is the hidden state (after the final norm) at `<bot>`;
z_{k+1} is the hidden state at the position where z_k was fed as the input embedding (Coconut,
https://arxiv.org/abs/2412.06769, section 3; SIM-CoT, https://arxiv.org/abs/2509.20317, section 3). With a projector
(CODI, https://arxiv.org/abs/2502.21074, section 3) each is projected first. Nothing is sampled, positions keep
counting.

Rows of a batch may have different numbers of thoughts: those that have all of theirs wait for the others, unread.

Shapes: B rows, P tokens of all questions with `<bot>`, A of all texts from `<eot>` on (see `packing`), K states that
the loop comes to (of the row that has most), G step groups of C states, D width, R rows that are still thinking; X sets
of N points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from simcot_latent.errors import require
from simcot_latent.model.cache import KVCache, StaticCaches, make_cache
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing, take

MAX_MARK = 1000
"""The most characters of the texts that stand around every answer; those of published models have at most 14."""


@dataclass(frozen=True)
class ThoughtFormat:
    """How a model answers.

    Attributes:
        thinks: whether prompts end in `<|bot|>` and answers begin after `<|eot|>`.
        n_latents: the thoughts between the two, all of which the model reads; 0 for a model that writes its steps.
        latents_per_step: c, the thoughts of a step group.
        feeds_last: whether the model reads the last state that the loop comes to (Coconut), or only the auxiliary
            decoder does (SIM-CoT on CODI); see `n_states`.
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
        for key in ("question_end", "answer_mark"):
            length = len(getattr(self, key))  # each is a part of every answer's prompt or of its text
            require(length <= MAX_MARK, f"thoughts.{key}", f"({length:,} characters)", f"at most {MAX_MARK:,} long")
        require(self.n_latents >= 0, "thoughts.n_latents", self.n_latents, "at least 0")
        c = self.latents_per_step
        require(c >= 1, "thoughts.latents_per_step", c, "at least 1")
        whole = f"{'' if self.feeds_last else 'one less than '}a multiple of latents_per_step={c}"
        require(self.n_states % c == 0, "thoughts.n_latents", self.n_latents, whole)

    @property
    def n_states(self) -> int:
        """K, the states that the loop comes to: the thoughts, and one more where the last is not fed.

        CODI's six thoughts are the projected state at `<bot>` and those at the first five; SIM-CoT decodes that at the
        sixth as well.
        """
        return self.n_latents + (self.n_latents > 0 and not self.feeds_last)

    @property
    def groups(self) -> int:
        """Step groups of a question."""
        return self.n_states // self.latents_per_step


@dataclass
class Thoughts:
    """What a batch of questions was thought into.

    Attributes:
        latents_BKD: the thoughts z_1 .. z_K; zeros beyond those of a row that has fewer.
        cache: everything read so far: question, `<bot>` and each row's thoughts but the last. That is still to be read;
            `go_on` feeds it together with what follows, which saves a pass.
        feeds_last: see `ThoughtFormat`.
        counts: how many each row has. None: K.
    """

    latents_BKD: Tensor
    cache: KVCache
    feeds_last: bool = True
    counts: Sequence[int] | None = None

    @property
    def latents(self) -> Tensor:
        """The thoughts, (B, K, D)."""
        return self.latents_BKD


def think(
    model: GPT,
    questions_PD: Tensor,
    packing: Packing,
    counts: int | Sequence[int],
    room: int,
    feeds_last: bool = True,
    caches: StaticCaches | None = None,
) -> Thoughts:
    """Reads questions and thinks about each.

    Args:
        questions_PD: their embeddings; the last B tokens are the rows' `<bot>`, in the order of the rows.
        packing: how they lie.
        counts: K, the states to come to (`ThoughtFormat.n_states`), of every row or of each.
        room: positions to reserve for what a row reads after its thoughts, `<eot>` included.
        feeds_last: see `ThoughtFormat`.
        caches: where to take the cache from; None: a new one.
    """
    B = packing.rows
    counts = [counts] * B if isinstance(counts, int) else list(counts)
    K, device = max(counts), questions_PD.device
    cache = make_cache(B, packing.longest + K + room, caches)
    thoughts = [model.thought(model.transformer(questions_PD, packing, cache, read_out=B))]
    if min(counts) == K > 0:
        one_each = Packing.grid(B, 1, device)
        for _ in range(K - 1):
            thoughts.append(model.thought(model.transformer(thoughts[-1], one_each, cache)))
        return Thoughts(torch.stack(thoughts, dim=1), cache, feeds_last)
    has_any_B1 = torch.tensor([[float(count > 0)] for count in counts], device=device)
    rows, latest_RD = list(range(B)), thoughts[0]
    thoughts[0] = latest_RD * has_any_B1
    for k, one_each in enumerate(passes(counts), start=1):
        one_each = one_each.to(device)
        going = [row for row in rows if counts[row] > k]
        if len(going) < len(rows):
            latest_RD = take(latest_RD, torch.tensor([rows.index(row) for row in going], device=device))
            rows = going
        latest_RD = model.thought(model.transformer(latest_RD, one_each, cache))
        thoughts.append(latest_RD.new_zeros(B, latest_RD.shape[1]).index_copy(0, one_each.row_P, latest_RD))
    return Thoughts(torch.stack(thoughts, dim=1), cache, feeds_last, counts)


def passes(counts: Sequence[int]) -> list[Packing]:
    """How the thoughts lie that `think` feeds, pass by pass."""
    return [Packing.of([int(count > k) for count in counts]) for k in range(1, max(counts))]


def pack_texts(lengths: Sequence[int], feeds_last: bool, counts: Sequence[int] | None = None) -> Packing:
    """How what follows the thoughts lies: the last thoughts of all rows first, if they are fed, then the texts.

    Args:
        counts: see `think`. None: no row is without.
    """
    if not feeds_last:
        return Packing.of(lengths)
    return Packing.of([1] * len(lengths) if counts is None else [int(count > 0) for count in counts], lengths)


def go_on(model: GPT, thoughts: Thoughts, texts_AD: Tensor, packing: Packing) -> Tensor:
    """Feeds the last thought (see `ThoughtFormat.feeds_last`) and what follows; returns the hidden states there (A, D).

    Args:
        texts_AD: embeddings of the tokens from `<eot>` on.
        packing: of `pack_texts`.
    """
    x = torch.cat((last_thoughts(thoughts), texts_AD)) if thoughts.feeds_last else texts_AD
    return model.transformer(x, packing, thoughts.cache, read_out=len(texts_AD))


def last_thoughts(thoughts: Thoughts) -> Tensor:
    """The last thought (R, D) of each row that has any."""
    latents_BKD, counts = thoughts.latents_BKD, thoughts.counts
    if counts is None:
        return latents_BKD[:, -1]
    K = latents_BKD.shape[1]
    index = [row * K + count - 1 for row, count in enumerate(counts) if count]
    return take(
        rearrange(latents_BKD, "b k d -> (b k) d"), torch.tensor(index, dtype=torch.long, device=latents_BKD.device)
    )


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
