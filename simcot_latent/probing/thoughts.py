"""Questions into thoughts, thoughts into the text of their steps.

Shapes: B questions, K thoughts, G step groups, C thoughts per group, N = B * G, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint, require_decoder
from simcot_latent.data.problem import Problem
from simcot_latent.errors import UserError
from simcot_latent.generate import Generation, encode_prompts, think_about
from simcot_latent.loops.base import Thoughts
from simcot_latent.model.cache import KVCache

MAX_STEP_TOKENS = 128
"""Where free-running decoding of a group gives up; merged steps of GSM8K stay under it."""


@torch.no_grad()
def think(checkpoint: Checkpoint, questions: Sequence[str]) -> Thoughts:
    """The thoughts about some questions, as one batch: `.latents` is (B, K, D).

    Raises:
        UserError: the model does not think, or a question is empty or does not fit the context.
    """
    require_thoughts(checkpoint)
    prompts = encode_prompts(checkpoint, questions)
    if not prompts:
        width = checkpoint.model.config.n_embd
        return Thoughts(torch.empty(0, checkpoint.n_states, width, device=checkpoint.device), KVCache(0))
    return think_about(checkpoint, prompts)


def require_thoughts(checkpoint: Checkpoint) -> None:
    if checkpoint.stage.thoughts == 0 and checkpoint.loop is not None:
        raise UserError(f"{checkpoint.path}: is of the warm-up, before any thought; use a later checkpoint")
    if checkpoint.stage.thoughts == 0:
        raise UserError(f"{checkpoint.path}: this model writes its steps and has no thoughts; use one of mode=latent")


def gold_groups(checkpoint: Checkpoint, problem: Problem) -> list[str | None]:
    """What each group of a problem was supervised to say, as text; None: nothing."""
    return checkpoint.groups.gold(problem, checkpoint.n_groups, checkpoint.stage, checkpoint.answers)


def latents_of(generations: Sequence[Generation]) -> Tensor:
    """The thoughts (B, K, D) that answers (at least one) of a model that thinks came from."""
    return torch.stack([g.latents_KD for g in generations if g.latents_KD is not None])


def decode_steps(checkpoint: Checkpoint, thoughts: Thoughts | Tensor) -> list[list[str]]:
    """What thoughts say: for each question one string a step group, free-running.

    Args:
        thoughts: from `think`, or latents (B, K, D) of your own.

    Raises:
        UserError: the checkpoint has no decoder.
    """
    return [[text for text, _ in groups] for groups in decode_groups(checkpoint, thoughts)]


def decode_groups(checkpoint: Checkpoint, thoughts: Thoughts | Tensor) -> list[list[tuple[str, float]]]:
    """As `decode_steps`, each text with its probability."""
    latents_BKD = thoughts if isinstance(thoughts, Tensor) else thoughts.latents
    decoded = _decode(checkpoint, group_prefix(checkpoint, latents_BKD))
    G = checkpoint.n_groups
    return [decoded[i : i + G] for i in range(0, len(decoded), G)]


def decode_taught(checkpoint: Checkpoint, latents_BKD: Tensor, gold: Sequence[Sequence[str | None]]) -> list[list[str]]:
    """As `decode_steps`, of the groups with gold alone; the others, which may ramble on, are left empty."""
    taught_N = torch.tensor([text is not None for groups in gold for text in groups], device=latents_BKD.device)
    decoded = iter(_decode(checkpoint, group_prefix(checkpoint, latents_BKD)[taught_N]))
    return [["" if text is None else next(decoded)[0] for text in groups] for groups in gold]


def _decode(checkpoint: Checkpoint, prefix_NCD: Tensor) -> list[tuple[str, float]]:
    """What each step group's thoughts say, free-running, and its probability."""
    decoder, tokenizer = require_decoder(checkpoint), checkpoint.tokenizer
    ids, probabilities = decoder.decode(prefix_NCD, tokenizer.end_id, MAX_STEP_TOKENS)
    return list(zip(map(tokenizer.decode, ids), probabilities, strict=True))


def group_prefix(checkpoint: Checkpoint, latents_BKD: Tensor) -> Tensor:
    """Thoughts cut into the step groups that the decoder reads, (N, C, D)."""
    return rearrange(latents_BKD, "b (g c) d -> (b g) c d", c=checkpoint.groups.latents_per_step)
