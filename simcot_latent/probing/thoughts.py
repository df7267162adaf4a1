"""Questions into thoughts, thoughts into the text of their steps.

Shapes: B questions, K thoughts, G step groups, N = B * G, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.data.problem import Problem
from simcot_latent.errors import UserError
from simcot_latent.generate import Generation, encode_prompts, think_about
from simcot_latent.loops.base import Thoughts
from simcot_latent.model.cache import KVCache
from simcot_latent.probing.readers import step_reader


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
    """The thoughts (B, K, D) that answers (at least one) of a model that thinks came from; zeros beyond those of a row
    that has fewer.
    """
    return pad_sequence([g.latents_KD for g in generations if g.latents_KD is not None], batch_first=True)


def states_of(checkpoint: Checkpoint, generations: Sequence[Generation]) -> Tensor:
    """What the steps of answers (at least one) of a model that thinks are read of, (B, K, D)."""
    before = [g.before_KD for g in generations if g.before_KD is not None]
    return step_reader(checkpoint).states(latents_of(generations), torch.stack(before) if before else None)


def decode_steps(checkpoint: Checkpoint, thoughts: Thoughts | Tensor) -> list[list[str]]:
    """What thoughts say: for each question one string per step group, free-running.

    Args:
        thoughts: from `think`, or latents (B, K, D) of your own where a decoder reads them.

    Raises:
        UserError: the checkpoint has nothing that reads them.
    """
    return [[text for text, _ in groups] for groups in decode_groups(checkpoint, thoughts)]


def decode_groups(checkpoint: Checkpoint, thoughts: Thoughts | Tensor) -> list[list[tuple[str, float]]]:
    """As `decode_steps`, each text with its probability."""
    reader = step_reader(checkpoint)
    latents, before = (thoughts, None) if isinstance(thoughts, Tensor) else (thoughts.latents_BKD, thoughts.before_BKD)
    return decode_states(checkpoint, reader.states(latents, before))


@torch.no_grad()
def decode_states(checkpoint: Checkpoint, states_BKD: Tensor) -> list[list[tuple[str, float]]]:
    """As `decode_groups`, of what steps are read of; see `states_of`."""
    reader, G = step_reader(checkpoint), checkpoint.n_groups
    decoded = reader.read(reader.groups(states_BKD))
    return [decoded[i : i + G] for i in range(0, len(decoded), G)]


def decode_taught(checkpoint: Checkpoint, states_BKD: Tensor, gold: Sequence[Sequence[str | None]]) -> list[list[str]]:
    """As `decode_steps`, of the groups with gold alone; the others, which may ramble on, are left empty."""
    reader = step_reader(checkpoint)
    taught_N = torch.tensor([text is not None for groups in gold for text in groups], device=states_BKD.device)
    decoded = iter(reader.read(reader.groups(states_BKD)[taught_N]))
    return [["" if text is None else next(decoded)[0] for text in groups] for groups in gold]
