"""How thoughts lie: their distances from one another, from other problems' and from the words.

Shapes: B questions, K thoughts, D width, V vocabulary; X sets of N points; of B * K thoughts, N that there are.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def geometry(latents_BKD: Tensor, embedding_VD: Tensor, is_there_BK: Tensor | None = None) -> dict[str, float]:
    """How far thoughts lie apart, and from the words: collapse shows here before it shows in accuracy.

    Args:
        is_there_BK: which of the thoughts there are, where rows have different numbers of them; None: all.

    Returns:
        `thought_distance`: mean L2 distance between two thoughts of one problem (nan for a single thought);
        `thought_to_embedding`: mean L2 distance of a thought to the mean token embedding
        (both as in SIM-CoT, https://arxiv.org/abs/2509.20317, section 3.1);
        `thought_spread`: mean L2 distance between two problems' thoughts of the same index (nan for a single problem);
        a thought that is the same for every problem says nothing about its own;
        `thought_norm`: mean L2 norm of a thought, the scale that the others are read against.
    """
    latents_BKD = latents_BKD.float()
    if is_there_BK is None:
        is_there_BK = torch.ones_like(latents_BKD[..., 0], dtype=torch.bool)
    there_ND = latents_BKD[is_there_BK]
    return {
        "thought_distance": mean_distance(latents_BKD, is_there_BK),
        "thought_spread": mean_distance(rearrange(latents_BKD, "b k d -> k b d"), is_there_BK.T),
        "thought_to_embedding": (there_ND - embedding_VD.float().mean(0)).norm(dim=-1).mean().item(),
        "thought_norm": there_ND.norm(dim=-1).mean().item(),
    }


def mean_distance(points_XND: Tensor, is_there_XN: Tensor) -> float:
    """Mean L2 distance between two points of a set, over all such pairs of X sets; nan where there is none.

    Args:
        is_there_XN: which of the N points each set has.
    """
    size_X = is_there_XN.sum(1)
    pairs = (size_X * (size_X - 1)).sum().item()
    is_pair_XNN = is_there_XN.unsqueeze(1) & is_there_XN.unsqueeze(2)
    distance_XNN = torch.cdist(points_XND, points_XND).masked_fill(~is_pair_XNN, 0.0)
    return distance_XNN.sum().item() / pairs if pairs else float("nan")
