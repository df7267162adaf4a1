"""What is made when it is asked for, and which examples a run asks for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simcot_latent.data.batch import BatchOrder
from simcot_latent.data.lazy import Lazily
from simcot_latent.data.sources.arithmetic import Arithmetic


def test_items_are_made_once_and_when_asked_for() -> None:
    asked: list[int] = []

    def square(index: int) -> int:
        asked.append(index)
        return index * index

    squares = Lazily(1000, square)
    assert (len(squares), asked) == (1000, [])
    assert (squares[7], squares[7], squares[-1], squares[3:5]) == (49, 49, 998001, [9, 16])
    assert asked == [7, 999, 3, 4]
    assert list(squares.made()) == [49, 998001, 9, 16]
    assert Lazily(3, square) == [0, 1, 4]
    assert Lazily(3, square) != [0, 1, 5]
    assert Lazily(3, square) != [0, 1]
    with pytest.raises(IndexError):
        squares[1000]


def test_made_up_problems_are_made_when_they_are_asked_for() -> None:
    source = Arithmetic(train_size=10**7)
    problems = source.load("train").problems
    assert len(problems) == 10**7
    assert problems[1_234_567] == source.problem("train", 1_234_567)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4000), st.integers(1, 9), st.integers(1, 60), st.integers(0, 9))
def test_a_run_reads_no_other_example_than_it_says(size: int, batch_size: int, num_steps: int, seed: int) -> None:
    """And its batches are those of a run that knows all lengths."""
    lengths = random.Random(size).choices(range(1, 50), k=size)
    all_known = BatchOrder(lengths, batch_size, seed)
    wanted = BatchOrder(lengths, batch_size, seed).read_by(num_steps)
    assert wanted == sorted(set(wanted))
    known = dict.fromkeys(wanted)

    def length(index: int) -> int:
        assert index in known, "a length that nobody has made"
        return lengths[index]

    order = BatchOrder(Lazily(size, length), batch_size, seed)
    batches = [order.batch(step) for step in range(num_steps)]
    assert batches == [all_known.batch(step) for step in range(num_steps)]
    pool = 16 * batch_size
    assert len(wanted) <= min(size, -(-num_steps // 16) * pool), "no more than the pools that are begun"


def test_a_short_run_reads_little_of_a_large_set() -> None:
    assert len(BatchOrder(Lazily(72_000, lambda index: 1), 32, 0).read_by(300)) == 19 * 512
