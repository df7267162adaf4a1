"""The auxiliary decoder of SIM-CoT (https://arxiv.org/abs/2509.20317, section 4): thoughts back into written steps.

It reads the thoughts of one step group as a prefix of input vectors and must write the group's calculator step. It is
trained with the model, so that its loss shapes the thoughts; inference does without it; probing loads it again.

Shapes: N step groups, C thoughts a group, L tokens of a step with its end token, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from simcot_latent.errors import UserError
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT, GPTConfig, Transformer, output_logits


class StepDecoder(nn.Module):
    """A small transformer over the base model's token embedding, which also serves as its output head.

    Args:
        config: the decoder's own transformer; its width and vocabulary are the base's.
        embedding: the base model's token embedding, shared: the step loss trains it too.
    """

    def __init__(self, config: GPTConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.transformer = Transformer(config)

    @classmethod
    def from_base(cls, base: GPT, n_layer: int, init: Literal["random", "base"]) -> StepDecoder:
        """A decoder of `n_layer` blocks shaped like the base's, with random weights or the base's first blocks."""
        decoder = cls(replace(base.config, n_layer=n_layer), base.embedding)
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

    def forward(self, thoughts_NCD: Tensor, ids_NL: Tensor) -> Tensor:
        """Teacher forcing: the hidden states (N, L, D) from which each of the L tokens is to be predicted.

        Padding of `ids_NL` is on the right, where causal attention alone keeps it from being seen.
        """
        C = thoughts_NCD.shape[1]
        inputs = torch.cat((thoughts_NCD, self.embedding(ids_NL[:, :-1])), dim=1)
        return self.transformer(inputs)[:, C - 1 :]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., D)."""
        return output_logits(hidden, self.embedding, self.config.logit_softcap)

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
        hidden_ND = self.transformer(thoughts_NCD, cache=cache)[:, -1]
        ids_per_step: list[Tensor] = []
        log_prob_N = torch.zeros(N, device=thoughts_NCD.device)
        done_N = torch.zeros(N, dtype=torch.bool, device=thoughts_NCD.device)
        for _ in range(max_tokens):
            log_probs_NV = self.logits(hidden_ND).log_softmax(-1)
            best_N, ids_N = log_probs_NV.max(-1)
            log_prob_N += best_N.masked_fill(done_N, 0.0)
            ids_N = ids_N.masked_fill(done_N, end_id)
            ids_per_step.append(ids_N)
            done_N |= ids_N == end_id
            if done_N.all():
                break
            hidden_ND = self.transformer(self.embedding(ids_N).unsqueeze(1), cache=cache)[:, -1]
        rows = torch.stack(ids_per_step, dim=1).tolist()
        return [row[: row.index(end_id)] if end_id in row else row for row in rows], log_prob_N.exp().tolist()
