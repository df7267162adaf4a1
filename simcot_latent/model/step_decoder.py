"""The auxiliary decoder of SIM-CoT (https://arxiv.org/abs/2509.20317, section 4): thoughts back into written steps.

It reads the thoughts of one step group as a prefix of input vectors and must write the group's calculator step. It is
trained with the model, so that its loss shapes the thoughts; inference does without it; probing loads it again.

Shapes: N step groups, C thoughts a group, L input tokens of all groups (see `packing`), M = N + L tokens to predict,
D width, V vocabulary, R groups that still write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from simcot_latent.errors import UserError
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT, GPTConfig, Transformer, output_logits
from simcot_latent.model.linear import Embedding
from simcot_latent.model.losses import CrossEntropy, Labelled, cross_entropy
from simcot_latent.model.packing import Packing


@dataclass(frozen=True)
class PackedSteps:
    """What N groups are to say, as the decoder reads and predicts it.

    Attributes:
        ids_L: the tokens of each group's step, group by group; the end token is only predicted.
        packing: how they lie behind the groups' thoughts.
        label_M: what is to be predicted: the first token of every group, then the others, group by group.
        group_M: the group of each label.
    """

    ids_L: Tensor
    packing: Packing
    label_M: Tensor
    group_M: Tensor

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], end_id: int, latents_per_step: int) -> PackedSteps:
        """From the token ids of each group's step, without end token."""
        first = [[*ids, end_id][0] for ids in groups]
        others = [[*ids, end_id][1:] for ids in groups]
        lengths = torch.tensor(list(map(len, groups)), dtype=torch.long)
        group_N = torch.arange(len(groups))
        return cls(
            ids_L=torch.tensor(list(chain.from_iterable(groups)), dtype=torch.long),
            # Every group's first thought, every group's second, .., then the tokens.
            packing=Packing.of(*[[1] * len(groups)] * latents_per_step, lengths.tolist(), tight=True),
            label_M=torch.tensor([*first, *chain.from_iterable(others)], dtype=torch.long),
            group_M=torch.cat((group_N, group_N.repeat_interleave(lengths))),
        )


class StepDecoder(nn.Module):
    """A small transformer over the base model's token embedding.

    Args:
        config: the decoder's own transformer; its width is the base's. With `tie_head` the embedding serves as output
            head too; without, the decoder has a head of its own, as in the published code, which may know fewer tokens.
        embedding: the base model's token embedding, shared: the step loss trains it too.
    """

    def __init__(self, config: GPTConfig, embedding: Embedding) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.transformer = Transformer(config)
        self.head = None if config.tie_head else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @classmethod
    def from_base(cls, base: GPT, n_layer: int | None, init: Literal["random", "base"]) -> StepDecoder:
        """A decoder of `n_layer` blocks shaped like the base's (None: as many as it has), with random weights or the
        base's first blocks.
        """
        n_layer = base.config.n_layer if n_layer is None else n_layer
        decoder = cls(replace(base.config, n_layer=n_layer, tie_head=True, projector_width=None), base.embedding)
        if init == "base":
            if n_layer > base.config.n_layer:
                raise UserError(
                    f"decoder.n_layer={n_layer}: must be at most model.n_layer={base.config.n_layer} with "
                    "decoder.init=base, which copies the base's first blocks"
                )
            decoder.copy_base(base)
        return decoder

    def copy_base(self, base: GPT) -> None:
        """Takes over the base's positions, norm and first blocks."""
        source = base.transformer.state_dict()
        self.transformer.load_state_dict({name: source[name] for name in self.transformer.state_dict()})

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "cpu") -> StepDecoder:
        """The decoder of a checkpoint folder, ready to `decode` its thoughts.

        Raises:
            UserError: the folder is no checkpoint, or holds no decoder.
        """
        from simcot_latent.checkpoint import load_checkpoint, require_decoder

        return require_decoder(load_checkpoint(path, device=device))

    def forward(self, thoughts_NCD: Tensor, steps_LD: Tensor, packing: Packing) -> Tensor:
        """Teacher forcing: the hidden states (M, D) from which the labels of `PackedSteps` are to be predicted.

        Args:
            thoughts_NCD: the thoughts of each group.
            steps_LD: embeddings of the groups' tokens.
            packing: of `PackedSteps`.
        """
        N = len(thoughts_NCD)
        x = torch.cat((rearrange(thoughts_NCD, "n c d -> (c n) d"), steps_LD))
        return self.transformer(x, packing, read_out=N + len(steps_LD))

    @property
    def output_table(self) -> Tensor:
        """The weight (V, D) of the output head."""
        return self.embedding.table if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., D)."""
        return output_logits(hidden, self.output_table, self.config.logit_softcap)

    @torch.no_grad()
    def score(self, thoughts_NCD: Tensor, steps: PackedSteps) -> CrossEntropy:
        """How likely every label of `steps` is after the ones before it, were these the groups' thoughts."""
        hidden_MD = self(thoughts_NCD, self.embedding(steps.ids_L), steps.packing)
        one_M = torch.ones_like(steps.label_M, dtype=torch.float32)
        labelled = Labelled(hidden_MD, self.output_table, steps.label_M, one_M)
        return cross_entropy(labelled, softcap=self.config.logit_softcap)

    @torch.no_grad()
    def decode(self, thoughts_NCD: Tensor, end_id: int, max_tokens: int = 64) -> tuple[list[list[int]], list[float]]:
        """Free-running greedy decoding of every group at once.

        Returns:
            For each group the token ids before the end token (or the first `max_tokens`, where none comes), and the
            probability that the decoder gives to the whole of what it wrote, end token included.
        """
        N, C, _ = thoughts_NCD.shape
        max_tokens = min(max_tokens, self.config.context_length - C)
        cache = KVCache(capacity=C + max_tokens)
        hidden_RD = self.transformer(thoughts_NCD, cache=cache)[:, -1]
        written: list[list[int]] = [[] for _ in range(N)]
        log_prob_N = torch.zeros(N, device=thoughts_NCD.device)
        going_R = torch.arange(N, device=thoughts_NCD.device)  # groups that still write; the cache holds theirs alone
        for _ in range(max_tokens):
            best_R, ids_R = self.logits(hidden_RD).log_softmax(-1).max(-1)
            log_prob_N[going_R] += best_R
            kept_R = (ids_R != end_id).nonzero().squeeze(1)
            if len(kept_R) < len(going_R):
                going_R, ids_R = going_R[kept_R], ids_R[kept_R]
                cache.keep(kept_R)
            if len(going_R) == 0:
                break
            for group, token in zip(going_R.tolist(), ids_R.tolist(), strict=True):
                written[group].append(token)
            one_each = Packing.grid(len(going_R), 1, thoughts_NCD.device)
            hidden_RD = self.transformer(self.embedding(ids_R), one_each, cache)
        return written, log_prob_N.exp().tolist()
