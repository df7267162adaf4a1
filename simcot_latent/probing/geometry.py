"""How thoughts lie: their distances from one another, from other problems' and from the words.

Shapes: B questions, K thoughts, D width, V vocabulary; X sets of N points.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


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
