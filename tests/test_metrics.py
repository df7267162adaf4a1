"""Scores: Wilson's interval against published numbers and its own equation; decoded steps against gold steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simcot_latent.metrics import StepScore, score_steps, steps_are_right, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_intervals(correct: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3."""
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 4))
@settings(deadline=None)
def test_wilson_solves_its_equation(counts: tuple[int, int], z: float) -> None:
    """Each end p of the interval is where the observed share lies z standard errors of p away."""
    correct, n = counts
    low, high = wilson_interval(correct, n, z)
    assert 0 <= low <= correct / n + 1e-12
    assert correct / n - 1e-12 <= high <= 1
    for end in (low, high):
        distance = abs(correct / n - end)
        assert distance == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-7)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


RIGHT, WRONG = StepScore(True, True, True, True), StepScore(False, False, False, False)


@pytest.mark.parametrize(
    ("decoded", "gold", "expected"),
    [
        ("<<3*4=12>>", "<<3*4=12>>", RIGHT),
        (" <<3 * 4=12>>\n", "<<3*4=12>>", RIGHT),  # spaces aside
        ("<<3*4=13>>", "<<3*4=12>>", StepScore(False, True, True, False)),
        ("<<3*5=15>>", "<<3*4=12>>", StepScore(False, True, False, False)),
        ("<<3+4=12>>", "<<3*4=12>>", StepScore(False, False, True, True)),
        ("<<4*3=12>>", "<<3*4=12>>", StepScore(False, True, False, True)),  # operands in order
        ("<<3.0*4=12.00>>", "<<3*4=12>>", StepScore(False, True, True, True)),  # compared as numbers
        ("<<6/4=3/2>>", "<<6/4=1.5>>", StepScore(False, True, True, True)),
        ("<<(3)*4=12>>", "<<3*4=12>>", StepScore(False, True, True, True)),
        # Merged steps: all of them, in order.
        ("<<3*4=12>>\n<<12-2=10>>", "<<3*4=12>>\n<<12-2=10>>", RIGHT),
        ("<<3*4=12>>", "<<3*4=12>>\n<<12-2=10>>", WRONG),
        ("<<12-2=10>>\n<<3*4=12>>", "<<3*4=12>>\n<<12-2=10>>", WRONG),
        ("<<3*4=12>>\n<<12-2=11>>", "<<3*4=12>>\n<<12-2=10>>", StepScore(False, True, True, False)),
        # What cannot be read is wrong in every part.
        ("<<3*4=12", "<<3*4=12>>", WRONG),
        ("<<3*=12>>", "<<3*4=12>>", WRONG),
        ("3*4=12", "<<3*4=12>>", WRONG),
        ("", "<<3*4=12>>", WRONG),
        ("<<3*4=12>> <<", "<<3*4=12>>", WRONG),
        # A group that was taught the answer can only be matched as a whole.
        ("#### 10", "#### 10", RIGHT),
        ("#### 11", "#### 10", WRONG),
        ("<<3*4=12>>", "#### 10", WRONG),
    ],
)
def test_decoded_steps_against_gold(decoded: str, gold: str, expected: StepScore) -> None:
    assert score_steps(decoded, gold) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<<3*4=12>>", True),
        ("<<3*4=12.0>>", True),
        ("<<3*4=13>>", False),
        ("<<3*4=12>>\n<<12-2=10>>", True),
        ("<<3*4=12>>\n<<12-2=11>>", False),
        ("<<3*4=12>> <<3*=2>>", False),
        ("<<3*4=12", False),
        ("<<1/0=1>>", False),
        ("#### 12", None),
        ("", None),
    ],
)
def test_whether_steps_are_right(text: str, expected: bool | None) -> None:
    """None: there is no step to be right or wrong. A broken one is wrong, not missing."""
    assert steps_are_right(text) is expected
