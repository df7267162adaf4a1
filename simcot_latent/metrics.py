"""Scores: answers against gold answers, decoded steps against gold steps, and the interval of an accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from simcot_latent.data.problem import ExpressionError, operands_and_operator, parse_steps, same_number


def wilson_interval(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95% by default (Wilson 1927; as in the NIST handbook, section 7.2.4.1)."""
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class StepScore:
    """A decoded step group against its gold steps.

    Attributes:
        exact: the same text, spaces aside.
        operators, operands, result: whether these parts are the same, of all its steps and in order; numbers are
            compared as numbers.
    """

    exact: bool
    operators: bool
    operands: bool
    result: bool


def score_steps(decoded: str, gold: str) -> StepScore:
    """Compares the text of a step group with gold text. What cannot be read is wrong in every part."""
    exact = "".join(decoded.split()) == "".join(gold.split())
    ours, theirs = _parts(decoded), _parts(gold)
    if ours is None or theirs is None:
        # Gold that holds no step (a group taught the answer) can only be matched as a whole.
        return StepScore(exact, exact, exact, exact)
    return StepScore(exact, ours[0] == theirs[0], ours[1] == theirs[1],
                     len(ours[2]) == len(theirs[2]) and all(map(same_number, ours[2], theirs[2])))  # fmt: skip


def steps_are_right(text: str) -> bool | None:
    """Whether every step in the text is arithmetically right; None without any, False with a broken one."""
    steps, malformed = parse_steps(text)
    if malformed:
        return False
    return all(step.is_correct() for step in steps) if steps else None


def _parts(text: str) -> tuple[list[object], list[object], Sequence[str]] | None:
    """Operators, operands and results of all steps in the text; None where there is none or one is malformed."""
    steps, malformed = parse_steps(text)
    if malformed or not steps:
        return None
    try:
        parts = [operands_and_operator(step.expression) for step in steps]
    except ExpressionError:
        return None
    return [p[0] for p in parts], [p[1] for p in parts], [step.result for step in steps]
