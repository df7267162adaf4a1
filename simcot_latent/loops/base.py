"""What a thought loop is: a question becomes thoughts, and a state to go on from.

    [q_1 .. q_n, <|bot|>, z_1 .. z_K, <|eot|>, answer ..]

Loops differ in how the thoughts z come about. Training, generation, evals and probing call the same loop; a checkpoint
holds it, with what it has learned.

Rows of a batch may have different numbers of thoughts. Positions keep counting; nothing is sampled.

Shapes: B rows, P tokens of all questions with `<|bot|>`, A of all texts from `<|eot|>` on (see `packing`), K states
that the loop comes to (of the row that has most), D width, R thoughts that are still to be read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simcot_latent.config import NoSettings
from simcot_latent.model.cache import KVCache, StaticCaches
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing
from simcot_latent.parts import key_of


@dataclass
class Thoughts:
    """What a batch of questions was thought into.

    Attributes:
        latents_BKD: the thoughts z_1 .. z_K; zeros beyond those of a row that has fewer.
        cache: everything read so far: question, `<|bot|>` and the thoughts but `unread_RD`.
        unread_RD: the thoughts that `go_on` feeds together with what follows, which saves a pass; None: none.
    """

    latents_BKD: Tensor
    cache: KVCache
    unread_RD: Tensor | None = None

    @property
    def latents(self) -> Tensor:
        """The thoughts, (B, K, D)."""
        return self.latents_BKD


class ThoughtLoop(nn.Module, ABC):
    """How thoughts come about. What it learns are its own parameters.

    A subclass gives `think`; one whose passes are other than the default's says so in the methods below it, by which
    batches are laid out before anything is computed.

    Args:
        width: D, of the model.
        config: an instance of `Config`.
    """

    Config: ClassVar[type] = NoSettings
    """A frozen dataclass of its settings. Those of the command line are the keys of the same name under `latent`;
    `config.json` keeps them."""

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        self.width, self.config = width, config

    @property
    def key(self) -> str:
        """What the table of parts calls it."""
        return key_of("loop", type(self))

    @abstractmethod
    def think(
        self,
        model: GPT,
        questions_PD: Tensor,
        packing: Packing,
        counts: Sequence[int],
        room: int,
        caches: StaticCaches | None = None,
    ) -> Thoughts:
        """Reads questions and thinks about each.

        Args:
            questions_PD: their embeddings; the last B tokens are the rows' `<|bot|>`, in the order of the rows.
            packing: of `pack_questions`.
            counts: the states of each row, see `states`.
            room: positions to reserve for what a row reads after its thoughts, `<|eot|>` included.
            caches: where to take the cache from; None: a new one.
        """

    def states(self, thoughts: int) -> int:
        """The states that the loop comes to, where the model reads so many thoughts per question."""
        return thoughts

    def pack_questions(self, lengths: Sequence[int], counts: Sequence[int], tight: bool = False) -> Packing:
        """How the first pass is laid out.

        Args:
            lengths: tokens of each question before its `<|bot|>`.
            counts: the states of each row.
            tight: see `Packing.of`.
        """
        return Packing.of(lengths, [1] * len(lengths), tight=tight)

    def passes(self, counts: Sequence[int]) -> list[Packing]:
        """How the passes between the question's and the text's are laid out, for counting tokens."""
        return []

    def unread(self, counts: Sequence[int]) -> list[int]:
        """How many thoughts of each row the pass over the text still feeds."""
        return [0] * len(counts)

    def pack_texts(self, lengths: Sequence[int], counts: Sequence[int]) -> Packing:
        """How what follows the thoughts is laid out: what is unread of all rows first, then the texts."""
        unread = self.unread(counts)
        return Packing.of(unread, lengths) if any(unread) else Packing.of(lengths)


def go_on(model: GPT, thoughts: Thoughts, texts_AD: Tensor, packing: Packing) -> Tensor:
    """Feeds the thoughts that are unread and what follows; returns the hidden states there (A, D).

    Args:
        texts_AD: embeddings of the tokens from `<|eot|>` on.
        packing: of `ThoughtLoop.pack_texts`.
    """
    x = texts_AD if thoughts.unread_RD is None else torch.cat((thoughts.unread_RD, texts_AD))
    return model.transformer(x, packing, thoughts.cache, read_out=len(texts_AD))
