"""Files of published models, read into one thing whatever kind they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from simcot_latent.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Published:
    """A published model as Hugging Face's layout has it, wherever it was read from.

    Attributes:
        path: the folder or file, for errors.
        config: the content of `config.json`; of other sources, what would stand in it.
        tensors: all weights by their Hugging Face names, as stored.
        tokenizer: makes the tokenizer; the ids of the original, roles `end`, `pad` and `bos` where it has them.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: Callable[[], Tokenizer]


def read_published(source: str | Path, key: str = "source") -> Published:
    """..."""
    raise NotImplementedError
