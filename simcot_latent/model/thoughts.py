"""The latent thought loop: a question becomes thoughts, and a state to go on from.

Input `[q_1 .. q_n, <bot>, z_1 .. z_K, <eot>, answer ..]`. z_1 is the hidden state (after the final norm) at `<bot>`;
z_{k+1} is the hidden state at the position where z_k was fed as the input embedding (Coconut,
https://arxiv.org/abs/2412.06769, section 3; SIM-CoT, https://arxiv.org/abs/2509.20317, section 3). Nothing is sampled,
positions keep counting.

Shapes: B rows, T question tokens with `<bot>`, K thoughts, A tokens from `<eot>` on, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT


@dataclass(frozen=True)
class ThoughtFormat:
    """How a model answers.

    Attributes:
        thinks: whether prompts end in `<|bot|>` and answers begin after `<|eot|>`.
        n_latents: K, the thoughts between the two; 0 for a model that writes its steps.
        latents_per_step: c, the thoughts of a step group.
    """

    thinks: bool = False
    n_latents: int = 0
    latents_per_step: int = 1

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
    """

    latents_BKD: Tensor
    cache: KVCache

    @property
    def latents(self) -> Tensor:
        """The thoughts, (B, K, D)."""
        return self.latents_BKD


def think(
    model: GPT, question_ids_BT: Tensor, question_mask_BT: Tensor, n_latents: int, cache: KVCache | None = None
) -> Thoughts:
    """Reads questions that end in `<bot>` and thinks `n_latents` (at least 1) thoughts about each.

    Args:
        question_mask_BT: True at real tokens; padding may lie on either side.
        cache: an empty cache to fill; default: one that autograd can follow.
    """
    cache = KVCache() if cache is None else cache
    hidden_BTD = model(question_ids_BT, mask_BT=question_mask_BT, cache=cache)
    thought_B1D = last_real(hidden_BTD, question_mask_BT).unsqueeze(1)
    thoughts = [thought_B1D]
    for _ in range(n_latents - 1):
        thought_B1D = model(embeddings_BTD=thought_B1D, cache=cache)
        thoughts.append(thought_B1D)
    return Thoughts(torch.cat(thoughts, dim=1), cache)


def go_on(model: GPT, thoughts: Thoughts, ids_BA: Tensor, mask_BA: Tensor | None = None) -> Tensor:
    """Feeds the last thought and then token ids; returns the hidden states at those tokens (B, A, D)."""
    embeddings = torch.cat((thoughts.latents_BKD[:, -1:], model.embedding(ids_BA)), dim=1)
    if mask_BA is not None:
        mask_BA = torch.cat((torch.ones_like(mask_BA[:, :1]), mask_BA), dim=1)
    return model(embeddings_BTD=embeddings, mask_BT=mask_BA, cache=thoughts.cache)[:, 1:]


def last_real(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The hidden state (B, D) at each row's last real position."""
    last_B = (mask_BT * torch.arange(mask_BT.shape[1], device=mask_BT.device)).argmax(dim=1)
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), last_B]


def geometry(latents_BKD: Tensor, embedding_VD: Tensor) -> dict[str, float]:
    """How far thoughts lie apart, and from the words: collapse shows here before it shows in accuracy.

    Returns:
        `thought_distance`: mean L2 distance between two thoughts of one problem (nan for a single thought);
        `thought_to_embedding`: mean L2 distance of a thought to the mean token embedding
        (both as in SIM-CoT, https://arxiv.org/abs/2509.20317, section 3.1);
        `thought_norm`: mean L2 norm of a thought, the scale that the other two are read against.
    """
    latents_BKD = latents_BKD.float()
    K = latents_BKD.shape[1]
    distance_BKK = torch.cdist(latents_BKD, latents_BKD)
    pairwise = distance_BKK.sum((1, 2)).div(K * (K - 1)).mean().item() if K > 1 else float("nan")
    to_mean = (latents_BKD - embedding_VD.float().mean(0)).norm(dim=-1).mean().item()
    return {
        "thought_distance": pairwise,
        "thought_to_embedding": to_mean,
        "thought_norm": latents_BKD.norm(dim=-1).mean().item(),
    }
