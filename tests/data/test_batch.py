"""Which examples make a step, whatever the seed, the sizes and the number of ranks; and how they are padded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simcot_latent.data.batch import POOL_BATCHES, BatchOrder, by_length, micro_batches, pad_right, to_device

no_deadline = settings(deadline=None)  # a busy machine is not a failure

lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=60)
seeds = st.integers(0, 2**31)


def waste(lengths: list[int], batches: list[list[int]]) -> float:
    """Share of padding where every batch is as long as its longest example."""
    longest = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / longest


# BatchOrder


@given(lengths_lists, st.integers(1, 9), seeds)
@no_deadline
def test_every_epoch_holds_each_example_once(lengths: list[int], batch_size: int, seed: int) -> None:
    """Epochs follow each other without a gap: at the end of every pool of batches, whole epochs have been seen and
    what is over holds no example twice. Every batch is full."""
    order = BatchOrder(lengths, batch_size, seed)
    seen = Counter(dict.fromkeys(range(len(lengths)), 0))
    for pool in range(1, 4):
        for step in range((pool - 1) * POOL_BATCHES, pool * POOL_BATCHES):
            batch = order.batch(step)
            assert len(batch) == batch_size
            seen.update(batch)
        epochs = pool * POOL_BATCHES * batch_size // len(lengths)
        assert set(seen.values()) <= {epochs, epochs + 1}
        assert seen.total() == pool * POOL_BATCHES * batch_size
        assert set(seen) == set(range(len(lengths)))


@given(lengths_lists, st.integers(1, 9), seeds, st.lists(st.integers(0, 200), max_size=8))
@no_deadline
def test_any_step_can_be_asked_for(lengths: list[int], batch_size: int, seed: int, steps: list[int]) -> None:
    """Training resumes anywhere: a step's batch does not depend on which were asked for before."""
    in_turn = BatchOrder(lengths, batch_size, seed)
    sequence = [in_turn.batch(step) for step in range(max(steps, default=0) + 1)]
    jumping = BatchOrder(lengths, batch_size, seed)
    for step in steps:
        assert jumping.batch(step) == sequence[step]
        assert BatchOrder(lengths, batch_size, seed).batch(step) == sequence[step]


def test_a_batch_runs_from_short_to_long() -> None:
    """So that ranks and micro-batches, cut from it, get examples of similar length."""
    lengths = torch.randint(1, 300, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    order = BatchOrder(lengths, 16, seed=1)
    for step in range(40):
        batch = [lengths[i] for i in order.batch(step)]
        assert batch == sorted(batch)


def test_epochs_shuffle_anew() -> None:
    """No batch of an epoch comes back in the next, and lengths come in no order."""
    lengths = [1 + i % 50 for i in range(1000)]
    order = BatchOrder(lengths, 10, seed=0)
    epochs = [[order.batch(step) for step in range(first, first + 100)] for first in (0, 100)]
    assert not {frozenset(batch) for batch in epochs[0]} & {frozenset(batch) for batch in epochs[1]}
    for epoch in epochs:
        shortest = [lengths[batch[0]] for batch in epoch]
        rises = sum(a < b for a, b in pairwise(shortest))
        assert 25 < rises < 75, "of 99 neighbours about half should rise"


@pytest.mark.parametrize("other", [1, 2, 2**32, 2**40 + 7])
def test_seeds_shuffle_differently(other: int) -> None:
    """Runs that differ in the seed alone see the data in different orders."""
    lengths = [1 + i % 50 for i in range(1000)]
    ours, theirs = BatchOrder(lengths, 10, seed=0), BatchOrder(lengths, 10, seed=other)
    same = [step for step in range(50) if set(ours.batch(step)) == set(theirs.batch(step))]
    assert same == []


def test_bucketing_lowers_padding() -> None:
    """On lengths spread like GSM8K's (facts of the data: mean 147, up to 600) padding falls by much more than half."""
    spread = torch.randn(4000, generator=torch.Generator().manual_seed(0)).mul(0.45).exp().mul(130).clamp(20, 600)
    lengths = [int(x) for x in spread.tolist()]
    order = BatchOrder(lengths, 32, seed=0)
    bucketed = [order.batch(step) for step in range(len(lengths) // 32)]
    shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1)).tolist()
    plain = [shuffled[i : i + 32] for i in range(0, len(lengths) // 32 * 32, 32)]
    assert waste(lengths, bucketed) < 0.3 * waste(lengths, plain)


# Cutting a step's batch


@given(st.lists(st.integers(0, 10_000), unique=True), st.integers(1, 9), st.integers(1, 5))
@no_deadline
def test_micro_batches_partition_a_batch(indices: list[int], device_batch_size: int, world: int) -> None:
    """For any number of ranks, every index goes to exactly one piece of one rank, and no piece is too large."""
    pieces = [piece for rank in range(world) for piece in micro_batches(indices, device_batch_size, rank, world)]
    assert sorted(i for piece in pieces for i in piece) == sorted(indices)
    assert all(1 <= len(piece) <= device_batch_size for piece in pieces)
    sizes = [sum(map(len, micro_batches(indices, device_batch_size, rank, world))) for rank in range(world)]
    assert max(sizes) - min(sizes) <= 1


@given(lengths_lists, st.integers(1, 9))
@no_deadline
def test_by_length_partitions_longest_first(lengths: list[int], batch_size: int) -> None:
    batches = by_length(lengths, batch_size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(ordered, reverse=True)
    assert by_length([], batch_size) == []


# Padding


@given(st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=6))
@no_deadline
def test_pad_right(rows: list[list[int]]) -> None:
    ids_BT, mask_BT = pad_right(rows, pad_id=77)
    length = max(map(len, rows), default=0)
    assert ids_BT.shape == mask_BT.shape == (len(rows), length)
    assert (ids_BT.dtype, mask_BT.dtype) == (torch.long, torch.bool)
    for row, ids_T, mask_T in zip(rows, ids_BT, mask_BT, strict=True):
        assert ids_T.tolist() == row + [77] * (length - len(row))
        assert mask_T.tolist() == [True] * len(row) + [False] * (length - len(row))


@dataclass
class Inner:
    values: Tensor


@dataclass
class Outer:
    ids: Tensor
    inner: Inner
    count: int
    totals: dict[str, Tensor]


def test_to_device_moves_nested_tensors_and_keeps_the_rest() -> None:
    totals = {"tokens": torch.tensor(3.0)}
    moved = to_device(Outer(torch.ones(2), Inner(torch.zeros(3)), 5, totals), torch.device("meta"))
    assert moved.ids.device.type == moved.inner.values.device.type == "meta"
    assert moved.count == 5
    assert moved.totals is totals, "totals are summed over ranks and handed over apart"
    with pytest.raises(TypeError, match="list is no dataclass"):
        to_device([1], torch.device("cpu"))
