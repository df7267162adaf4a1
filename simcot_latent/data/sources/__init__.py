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
    """What every data source offers.

    It may also state a `tolerance`: how far answers to its problems may be from gold and still be right, as a share of
    gold (see `same_number`), in evals, probe and validation. Without one, not at all.
    """

    def load(self, split: Split) -> LoadedSplit:
        """The problems of one split. `train` and `validation` never hold a problem of `test`.

        Raises:
            UserError: the split or its file does not exist, is empty, or a line of it is broken.
        """
        ...


def load_first(source: Source, split: Split, limit: int | None) -> LoadedSplit:
    """The first `limit` problems of a split (None: all), and the notes about what was read or made for them.

    A source that makes its problems has a `load_first` of its own, which makes no others: how many there are may be a
    stranger's word.

    Raises:
        UserError: see `Source.load`.
    """
    own = getattr(source, "load_first", None)
    if own is not None:
        return own(split, limit)
    loaded = source.load(split)
    return LoadedSplit(loaded.problems[:limit], loaded.notes)
