"""What reads a step out of thoughts: the auxiliary decoder, or the model's own head.

Shapes: B questions, K thoughts, C thoughts per group, N groups that are read or scored, M labels, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint, require_decoder
from simcot_latent.data.batch import to_device
from simcot_latent.errors import UserError
from simcot_latent.model.losses import Labelled, cross_entropy
from simcot_latent.parts import NONE
from simcot_latent.terms.step_decoder import PackedSteps

MAX_STEP_TOKENS = 128
"""Where free-running decoding of a group gives up; merged steps of GSM8K stay under it."""


class Scored(NamedTuple):
    """Texts as a reader sees them, token by token: minus the log of the probability of each, in nats, and the share of
    its tokens that are the most likely ones. The end token is among them, where the reader knows one.
    """

    nats_N: Tensor
    token_accuracy_N: Tensor


class StepReader(ABC):
    """Reads steps out of step groups.

    Args:
        checkpoint: whose thoughts are read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer
        self.c = checkpoint.groups.latents_per_step

    def states(self, latents_BKD: Tensor, before_BKD: Tensor | None) -> Tensor:
        """What is read, (B, K, D), of thoughts or of the hidden states before them."""
        return latents_BKD

    def groups(self, states_BKD: Tensor) -> Tensor:
        """States cut into step groups, (N, C, D)."""
        return rearrange(states_BKD, "b (g c) d -> (b g) c d", c=self.c)

    @abstractmethod
    def read(self, groups_NCD: Tensor) -> list[tuple[str, float]]:
        """What each group says, free-running, and the probability of the whole of it."""

    @abstractmethod
    def score(self, groups_NCD: Tensor, ids: Sequence[Sequence[int]]) -> Scored:
        """How likely a text, in token ids without end token, is in each group."""


class DecoderReader(StepReader):
    """The auxiliary decoder of SIM-CoT."""

    def read(self, groups_NCD: Tensor) -> list[tuple[str, float]]:
        decoder, tokenizer = require_decoder(self.checkpoint), self.tokenizer
        ids, probabilities = decoder.decode(groups_NCD, tokenizer.end_id, MAX_STEP_TOKENS)
        return list(zip(map(tokenizer.decode, ids), probabilities, strict=True))

    def score(self, groups_NCD: Tensor, ids: Sequence[Sequence[int]]) -> Scored:
        steps = to_device(PackedSteps.of(ids, self.tokenizer.end_id, self.c), groups_NCD.device)
        found = require_decoder(self.checkpoint).score(groups_NCD, steps)
        return by_group(found.nll_M, found.correct_M, steps.group_M, len(ids))


class OwnHeadReader(StepReader):
    """The model's own head (LOTUS): token j of a group's step is predicted at the j-th state of the group.

    These are the states at `<|bot|>` and at all thoughts but the last. A step ends in the end token, or fills its
    group.
    """

    def states(self, latents_BKD: Tensor, before_BKD: Tensor | None) -> Tensor:
        if before_BKD is None:
            raise UserError("steps=own_head: reads the hidden states before the thoughts; give what `think` returns")
        return before_BKD

    def read(self, groups_NCD: Tensor) -> list[tuple[str, float]]:
        tokenizer = self.tokenizer
        log_prob_NC, id_NC = self.checkpoint.model.logits(groups_NCD).log_softmax(-1).max(-1)
        found: list[tuple[str, float]] = []
        for ids, log_probs in zip(id_NC.tolist(), log_prob_NC, strict=True):
            n = ids.index(tokenizer.end_id) if tokenizer.end_id in ids else len(ids)
            found.append((tokenizer.decode(ids[:n]), log_probs[: n + 1].sum().exp().item()))
        return found

    def score(self, groups_NCD: Tensor, ids: Sequence[Sequence[int]]) -> Scored:
        model, device = self.checkpoint.model, groups_NCD.device
        labels = [[*step, self.tokenizer.end_id][: self.c] for step in ids]
        index = [group * self.c + j for group, step in enumerate(labels) for j in range(len(step))]
        group_M = torch.tensor([group for group, step in enumerate(labels) for _ in step], device=device)
        label_M = torch.tensor([token for step in labels for token in step], device=device)
        hidden_MD = groups_NCD.flatten(0, 1)[torch.tensor(index, device=device)]
        one_M = torch.ones_like(label_M, dtype=torch.float32)
        found = cross_entropy(
            Labelled(hidden_MD, model.output_table, label_M, one_M), softcap=model.config.logit_softcap
        )
        return by_group(found.nll_M, found.correct_M, group_M, len(ids))


def by_group(nll_M: Tensor, correct_M: Tensor, group_M: Tensor, n: int) -> Scored:
    """Sums over the labels of each group."""
    zero_N = torch.zeros(n, device=nll_M.device)
    labels_N = zero_N.index_add(0, group_M, torch.ones_like(nll_M))
    accuracy_N = zero_N.index_add(0, group_M, correct_M.float()) / labels_N
    return Scored(zero_N.index_add(0, group_M, nll_M), accuracy_N)


READERS: dict[str, type[StepReader]] = {"decoder": DecoderReader, "own_head": OwnHeadReader}
"""By the key of the part that taught the steps."""


def step_reader(checkpoint: Checkpoint) -> StepReader:
    """What reads the steps of a checkpoint's thoughts.

    Raises:
        UserError: nothing does.
    """
    if checkpoint.steps not in (*READERS, NONE):
        raise UserError(
            f"{checkpoint.path}: steps={checkpoint.steps} leaves nothing that steps could be read out of its thoughts "
            f"with; probe a checkpoint with steps={' or '.join(READERS)}"
        )
    if checkpoint.steps not in READERS or (checkpoint.steps == "decoder" and checkpoint.step_decoder is None):
        require_decoder(checkpoint)
    return READERS[checkpoint.steps](checkpoint)
