"""The numbers of a made-up word problem, without its words: a chain of operations on a running quantity."""

import re
from functools import lru_cache
from typing import NamedTuple

from simcot_latent.data.problem import Problem


class Link(NamedTuple):
    """One link of a chain: an operation on the running quantity with `number`, or with `number * each`."""

    operation: str
    number: int
    each: int = 0
    """Size of the `number` groups of a second quantity; 0 where there is none."""

    @property
    def amount(self) -> int:
        return self.number * self.each if self.each else self.number

    def apply(self, value: int) -> int:
        if self.operation == "+":
            return value + self.amount
        if self.operation == "-":
            return value - self.amount
        return value * self.amount if self.operation == "*" else value // self.amount

    def calculations(self, value: int) -> list[str]:
        """What is worked out, from the running quantity `value`; see `Calculations`."""
        groups = [unordered(self.number, "*", self.each)] if self.each else []
        return [*groups, unordered(value, self.operation, self.amount)]

    def undoes(self, before: "Link") -> bool:
        return self == Link(_INVERSE[before.operation], before.number, before.each)


_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


Calculations = tuple[str, ...]
"""The calculations of a chain in order, each with its larger operand first: 3*5 and 5*3 are the same."""


class Chain(NamedTuple):
    """The numbers and operations of a problem, without its words."""

    start: int
    links: tuple[Link, ...]

    def calculations(self) -> Calculations:
        found: list[str] = []
        value = self.start
        for link in self.links:
            found += link.calculations(value)
            value = link.apply(value)
        return tuple(found)


def calculations_of(problem: Problem) -> Calculations:
    """The calculations of a problem that was made here."""
    parts = (re.split(r"([-+*/])", step.expression) for step in problem.steps)
    return tuple(unordered(int(a), operation, int(b)) for a, operation, b in parts)


def unordered(a: int, operation: str, b: int) -> str:
    return f"{a}{operation}{b}" if a > b else f"{b}{operation}{a}"


@lru_cache(maxsize=1 << 16)
def divisors(value: int, largest: int) -> tuple[int, ...]:
    """The divisors of `value` from 2 to `largest`."""
    return tuple(n for n in range(2, largest + 1) if value % n == 0)
