"""loop=soft: each thought is the mixture of token embeddings under the model's own next-token distribution.

z_{k+1} = sum over tokens v of p(v) E_v, where p is the softmax of the logits at the position before, divided by a
temperature, over the most likely tokens. Soft thinking, a baseline without training: https://arxiv.org/abs/2505.15778.

Shapes: R rows that are still thinking, D width, V vocabulary, N likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from simcot_latent.errors import require
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT


@dataclass(frozen=True)
class SoftConfig:
    """Settings of loop=soft.

    Attributes:
        feeds_last: as of loop=sequential.
        temperature: what logits are divided by.
        top_k: the tokens that are mixed, the most likely ones; None: all.
    """

    feeds_last: bool = True
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        require(self.temperature > 0, "latent.temperature", self.temperature, "above 0")
        require(self.top_k is None or self.top_k >= 1, "latent.top_k", self.top_k, "at least 1, or null for all tokens")


class Soft(Sequential):
    """`Sequential` with mixtures of embeddings as thoughts."""

    Config = SoftConfig

    def __init__(self, width: int, config: SoftConfig) -> None:
        super().__init__(width, SequentialConfig(config.feeds_last))
        self.config = config  # type: ignore[assignment]

    @property
    def soft(self) -> SoftConfig:
        """Its settings, of their own type."""
        return self.config  # type: ignore[return-value]

    def thought_from(self, model: GPT, hidden_RD: Tensor) -> Tensor:
        logits_RN = model.logits(hidden_RD) / self.soft.temperature
        if self.soft.top_k is None:
            return model.embedding.mixtures(logits_RN.softmax(-1).to(model.embedding.weight.dtype))
        logits_RN, token_RN = logits_RN.topk(min(self.soft.top_k, logits_RN.shape[-1]), dim=-1)
        weight_RN1 = logits_RN.softmax(-1).to(model.embedding.weight.dtype).unsqueeze(-1)
        return (weight_RN1 * model.embedding(token_RN)).sum(-2)
