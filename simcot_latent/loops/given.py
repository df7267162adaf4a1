"""Loops whose thoughts are known in training, where the written steps say what they are (teacher forcing).

There everything from the question to the answer is read in one pass. Afterwards such a loop comes to its thoughts one
by one and stops by itself, so every row has a number of its own.

Shapes: B rows, P tokens of all questions with `<|bot|>`, A of all texts from `<|eot|>` on, K thoughts, N of all rows, L
tokens that these are made of, D width, M hidden states before the texts that predict something.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simcot_latent.data.batch import Seeds
from simcot_latent.loops.base import ThoughtLoop, Thoughts
from simcot_latent.model.cache import StaticCaches
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing
from simcot_latent.model.taps import Taps


@dataclass
class Given:
    """The thoughts of a batch, as its written steps say them.

    Attributes:
        ids_L: the tokens that they are made of, thought by thought and row by row.
        thought_L: which of the N thoughts each goes into.
        size_N: how many go into each thought.
        speed_B: at which of its speeds the loop thinks about each row.
        counts: the thoughts of each row.
    """

    ids_L: Tensor
    thought_L: Tensor
    size_N: Tensor
    speed_B: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], r: int, speed: int) -> Given:
        """Every `r` tokens of each row's steps in a thought, from the left; the last may have fewer."""
        counts = [-(-len(ids) // r) for ids in texts]
        sizes = [min(r, len(ids) - r * k) for ids, n in zip(texts, counts, strict=True) for k in range(n)]
        size_N = torch.tensor(sizes, dtype=torch.long)
        return cls(
            ids_L=torch.tensor([i for ids in texts for i in ids], dtype=torch.long),
            thought_L=torch.arange(len(sizes)).repeat_interleave(size_N),
            size_N=size_N,
            speed_B=torch.full((len(texts),), speed, dtype=torch.long),
            counts=tuple(counts),
        )


@dataclass
class GivenThoughts(Thoughts):
    """What a batch whose thoughts were given was read into; the cache is empty.

    Attributes:
        states_MD: the hidden states that predict what comes next, in the order in which the loop reads them: see there.
    """

    states_MD: Tensor = field(kw_only=True)


@dataclass(frozen=True)
class Ending:
    """How thoughts that come about one by one are drawn, and when they end.

    Attributes:
        end_id: the token that ends them where it is the most likely one.
        temperature: what the standard deviation of draws is multiplied by; 0: nothing is drawn.
        generator: source of randomness; None: torch's global one.
    """

    end_id: int
    temperature: float = 0.0
    generator: torch.Generator | None = None


class GivenLoop(ThoughtLoop):
    """A loop that is given its thoughts in training."""

    gives_predictions = True

    def n_passes(self, thoughts: int) -> int:
        return 1 + thoughts  # after training, where each is read before the next is known

    @abstractmethod
    def give(self, texts: Sequence[Sequence[int]], seeds: Seeds | None) -> Given:
        """The thoughts of a batch, CPU tensors.

        Args:
            texts: token ids of the steps that the thoughts of each row stand for.
            seeds: of whatever is drawn; None: nothing is.
        """

    @abstractmethod
    def pack_given(self, lengths: Sequence[int], given: Given, texts: Sequence[int]) -> Packing:
        """How the pass of `read_given` is laid out, the texts last.

        Args:
            lengths: tokens of each question before its `<|bot|>`.
            texts: tokens of each text from `<|eot|>` on.
        """

    @abstractmethod
    def read_given(
        self,
        model: GPT,
        questions_PD: Tensor,
        given: Given,
        given_LD: Tensor,
        texts_AD: Tensor,
        packing: Packing,
        taps: Taps | None = None,
    ) -> tuple[GivenThoughts, Tensor]:
        """Reads questions, the thoughts that are given, and the texts after them, without a cache.

        Args:
            questions_PD: as of `think`.
            given: of `give`.
            given_LD: the embeddings of its tokens.
            texts_AD: as of `go_on`.
            packing: of `pack_given`.
            taps: to be filled in this pass.

        Returns:
            The thoughts, and the hidden states (A, D) at the texts.
        """

    @abstractmethod
    def think(
        self,
        model: GPT,
        questions_PD: Tensor,
        packing: Packing,
        counts: Sequence[int],
        room: int,
        caches: StaticCaches | None = None,
        keys: bool = False,
        ending: Ending | None = None,
    ) -> Thoughts:
        """Reads questions and thinks about each.

        Args:
            counts: the most thoughts of each row.
            ending: how they end; None: with the most that there may be.
        """
