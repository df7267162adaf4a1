"""Which examples make a step, whatever the seed, the sizes and the number of ranks; and how batches are made ready."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simcot_latent.data.batch import POOL_BATCHES, BatchOrder, Prefetch, by_length, micro_batches, pin, to_device

no_deadline = settings(deadline=None)  # a busy machine is not a failure

lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=60)
seeds = st.integers(0, 2**31)


def waste(lengths: list[int], batches: list[list[int]]) -> float:
    """Share of padding where every batch is as long as its longest example, as its rectangle in attention is."""
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


def test_pools_order_their_batches_anew() -> None:
    """Within a pool batches are of different lengths; which length comes when is drawn for each pool."""
    lengths = list(range(1, 10 * POOL_BATCHES + 1))  # a pool of ten is an epoch, so all pools hold the same batches
    order = BatchOrder(lengths, 10, seed=0)
    pools = [[order.batch(pool * POOL_BATCHES + i) for i in range(POOL_BATCHES)] for pool in range(3)]
    for pool in pools:
        assert sorted(pool) == sorted(pools[0])
    assert pools[0] != pools[1] != pools[2] != pools[0]


@pytest.mark.parametrize("other", [1, 2, 2**32, 2**40 + 7])
def test_seeds_shuffle_differently(other: int) -> None:
    """Runs that differ in the seed alone see the data in different orders."""
    lengths = [1 + i % 50 for i in range(1000)]
    ours, theirs = BatchOrder(lengths, 10, seed=0), BatchOrder(lengths, 10, seed=other)
    same = [step for step in range(50) if set(ours.batch(step)) == set(theirs.batch(step))]
    assert same == []


def test_no_two_of_many_seeds_are_alike() -> None:
    lengths = [1 + i % 50 for i in range(1000)]
    assert len({tuple(BatchOrder(lengths, 10, seed).batch(0)) for seed in range(400)}) == 400


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


# Making a batch ready


@dataclass
class Inner:
    values: Tensor


@dataclass
class Outer:
    ids: Tensor
    inner: Inner
    count: int
    parts: dict[str, Any]


def outer() -> Outer:
    """Tensors as such, in a dataclass, in a dict, and in a dataclass in a dict; and what is none."""
    parts = {"ids": torch.arange(4), "step": Inner(torch.zeros(1)), "none": None, "inner": {"name": "x"}}
    return Outer(torch.arange(2), Inner(torch.zeros(3)), 5, parts)


def test_to_device_moves_nested_tensors_and_keeps_the_rest() -> None:
    batch = outer()
    moved = to_device(batch, torch.device("meta"))
    assert moved.ids.device.type == moved.inner.values.device.type == "meta"
    assert moved.count == 5
    assert moved.parts.keys() == batch.parts.keys()
    assert moved.parts["ids"].device.type == moved.parts["step"].values.device.type == "meta"
    assert moved.parts["none"] is None
    assert moved.parts["inner"] == {"name": "x"}
    assert batch.parts["ids"].device.type == batch.parts["step"].values.device.type == "cpu", "it stays what it was"
    with pytest.raises(TypeError, match="list is no dataclass"):
        to_device([1], torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_pinned_is_the_same() -> None:
    batch = outer()
    pinned = pin(batch)
    assert pinned.ids.is_pinned()
    assert pinned.inner.values.is_pinned()
    assert pinned.parts["ids"].is_pinned()
    assert pinned.parts["step"].values.is_pinned()
    assert torch.equal(pinned.ids, batch.ids)
    assert torch.equal(pinned.parts["ids"], batch.parts["ids"])
    assert pinned.count == 5


# Made ahead


def test_the_next_step_is_made_while_this_one_runs() -> None:
    """Once a step has been handed over, the next one is under way without being asked for; each is made once, in
    another thread, and none after the last."""
    made = [threading.Event() for _ in range(4)]
    order: list[int] = []

    def make(step: int) -> tuple[int, int]:
        order.append(step)
        made[step].set()
        return step, threading.get_ident()

    prefetch = Prefetch(make, end=3)
    for step in range(3):
        found, thread = prefetch.get(step)
        assert found == step
        assert thread != threading.get_ident()
        if step < 2:
            assert made[step + 1].wait(timeout=60), "the next step should be under way"
    assert order == [0, 1, 2]
    prefetch.get(0)  # the thread works in order: what was begun before has been made by now
    prefetch.close()
    assert order[:4] == [0, 1, 2, 0]


@given(st.lists(st.integers(0, 9), max_size=6))
@settings(deadline=None, max_examples=20)
def test_any_step_can_be_asked_of_it(steps: list[int]) -> None:
    """Training resumes anywhere."""
    prefetch = Prefetch(lambda step: step * 10, end=10)
    assert [prefetch.get(step) for step in steps] == [step * 10 for step in steps]
    prefetch.close()


def test_an_error_comes_out_where_its_step_is_asked_for() -> None:
    """Not in the thread, where nobody would see it, and not at the step before."""

    def make(step: int) -> int:
        if step == 1:
            raise ValueError("step 1 cannot be made")
        return step

    prefetch = Prefetch(make, end=3)
    assert prefetch.get(0) == 0
    with pytest.raises(ValueError, match="step 1 cannot be made"):
        prefetch.get(1)
    prefetch.close()


def test_closing_ends_the_thread() -> None:
    """Whatever is still to be made."""

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]

    assert threads() == []
    prefetch = Prefetch(lambda step: step, end=100)
    prefetch.get(0)
    assert len(threads()) == 1
    prefetch.close()
    assert threads() == []


def test_waiting_is_counted() -> None:
    """`waited` grows by the time that a step takes to make if it is asked for at once."""
    prefetch = Prefetch(lambda step: time.sleep(0.05) or step, end=1)
    assert prefetch.waited == 0
    assert prefetch.get(0) == 0
    assert prefetch.waited > 0.04
    prefetch.close()
