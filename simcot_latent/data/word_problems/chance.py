"""Chance that is the same everywhere.

Of `random`, only `Random.random` gives the same numbers in every version of Python; all draws are made of it.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

Draw = Callable[[], float]
"""A source of random numbers in [0, 1)."""

_T = TypeVar("_T")


def between(draw: Draw, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return low + int(draw() * (high - low + 1))


def pick(draw: Draw, options: Sequence[_T]) -> _T:
    return options[int(draw() * len(options))]


def sample(draw: Draw, options: Sequence[_T], count: int) -> list[_T]:
    """`count` different options, in any order."""
    pool = list(options)
    for i in range(count):
        j = between(draw, i, len(pool) - 1)
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:count]
