"""Data sources: one file each. A source is a dataclass whose fields are its yaml keys, with a `load` method."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from simcot_latent.data.problem import Problem

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


@dataclass(frozen=True)
class LoadedSplit:
    """Problems of one split, in file order, and what was noticed while reading them.

    `notes` counts everything that is not plain sailing ("problem without a step": 12, ...), so that the caller
    can report it: a source never drops or repairs in silence.
    """

    problems: Sequence[Problem]
    notes: Counter[str] = field(default_factory=Counter)


class Source(Protocol):
    """What every data source offers."""

    def load(self, split: Split) -> LoadedSplit:
        """The problems of one split. `train` and `validation` never hold a problem of `test`.

        Raises:
            UserError: the split or its file does not exist, is empty, or a line of it is broken.
        """
        ...
