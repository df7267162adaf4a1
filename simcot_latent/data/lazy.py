"""Items that are made when they are first asked for: a run of 300 steps does not wait for 72,000 problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class Lazily(Sequence[T]):
    """`size` items, item i made by `make(i)` when it is first asked for, and kept. A slice is a list.

    Args:
        make: a function of nothing but the index; what it raises, asking for the item raises.
    """

    def __init__(self, size: int, make: Callable[[int], T]) -> None:
        self.size, self.make = size, make
        self._made: dict[int, T] = {}

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"item {index} of {self.size}")
        index %= self.size
        if index not in self._made:
            self._made[index] = self.make(index)
        return self._made[index]

    def __eq__(self, other: object) -> bool:
        same_kind = isinstance(other, (list, Lazily))
        return same_kind and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def made(self) -> Iterator[T]:
        """The items that are made already."""
        return iter(self._made.values())
