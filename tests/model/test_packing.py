"""Ragged rows without padding: how they lie, and that a row is the same in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from simcot_latent.data.batch import to_device
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import WORTH_A_RECTANGLE, Packing, take, tight_rectangles

FAMILIES = ["gpt2", "llama", "nanochat"]
WIDTH, VOCAB = 32, 61


def sections_of(rows: st.SearchStrategy[int], longest: int = 4) -> st.SearchStrategy[list[list[int]]]:
    """Tokens of each row in each of up to three sections, none at all included."""
    return rows.flatmap(
        lambda n: st.lists(st.lists(st.integers(0, longest), min_size=n, max_size=n), min_size=1, max_size=3)
    )


def shuffled(packing: Packing, seed: int) -> tuple[Packing, Tensor]:
    """The same tokens in an order that no `Packing.of` gives; and which token each of them was."""
    order_P = torch.randperm(len(packing), generator=torch.Generator().manual_seed(seed))
    row_P, offset_P, slot_P = (x[order_P] for x in (packing.row_P, packing.offset_P, packing.slot_P))
    return replace(packing, row_P=row_P, offset_P=offset_P, slot_P=slot_P), order_P


def row_by_row(packing: Packing, x_PN: Tensor) -> list[Tensor]:
    """Each row's tokens in their order, by looking at one token after the other."""
    places: list[dict[int, int]] = [{} for _ in range(packing.rows)]
    for place, (row, offset) in enumerate(zip(packing.row_P.tolist(), packing.offset_P.tolist(), strict=True)):
        places[row][offset] = place
    return [x_PN[[where[offset] for offset in range(len(where))]] for where in places]


def random_numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


# How tokens lie


@given(sections_of(st.integers(0, 5)))
@settings(deadline=None)
def test_sections_are_laid_out_one_after_the_other(sections: list[list[int]]) -> None:
    """Every attribute against a loop that writes the tokens down one by one."""
    lengths = [0] * len(sections[0])
    tokens: list[tuple[int, int]] = []
    for section in sections:
        for row, count in enumerate(section):
            tokens += [(row, lengths[row] + i) for i in range(count)]
            lengths[row] += count
    packing = Packing.of(*sections)
    assert list(zip(packing.row_P.tolist(), packing.offset_P.tolist(), strict=True)) == tokens
    assert packing.length_B.tolist() == lengths
    assert packing.longest == max(lengths, default=0)
    assert packing.rectangles == ((packing.rows, packing.longest),)
    assert packing.slot_P.tolist() == [row * packing.longest + offset for row, offset in tokens]
    assert (len(packing), packing.rows) == (len(tokens), len(lengths))
    assert not packing.is_grid


@pytest.mark.parametrize(("rows", "length"), [(3, 4), (1, 1), (2, 0), (0, 3)])
def test_a_grid_is_rows_of_equal_length(rows: int, length: int) -> None:
    grid, same = Packing.grid(rows, length), Packing.of([length] * rows)
    assert grid.is_grid
    assert grid.longest == length
    for ours, theirs in ((grid.row_P, same.row_P), (grid.offset_P, same.offset_P), (grid.length_B, same.length_B)):
        assert ours.tolist() == theirs.tolist()
    assert grid.slot_P.tolist() == list(range(rows * length))
    x_PN = random_numbers(rows * length, 2)
    assert torch.equal(grid.pad(x_PN), x_PN.view(rows, length, 2))
    assert torch.equal(grid.unpad(x_PN.view(rows, length, 2)), x_PN)


def test_a_packing_moves_to_a_device_whole() -> None:
    packing = Packing.of([2, 0, 3], [1, 1, 1])
    moved = to_device(packing, torch.device("meta"))
    assert {x.device.type for x in (moved.row_P, moved.offset_P, moved.slot_P, moved.length_B)} == {"meta"}
    assert (moved.longest, moved.is_grid, len(moved), moved.rows) == (4, False, 8, 3)
    assert to_device(Packing.grid(2, 3), torch.device("meta")).is_grid


def cost(lengths: Sequence[int], cuts: Sequence[int]) -> float:
    """Slots of rows, longest first, that are cut into rectangles, and the price of these."""
    price = WORTH_A_RECTANGLE * sum(lengths)
    return sum((end - begin) * lengths[begin] + price for begin, end in pairwise([0, *cuts, len(lengths)]))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).map(lambda lengths: sorted(lengths, reverse=True)))
@example([40, 40, 39, 6, 5, 5, 1, 0]).via("worth cutting")
@example([10, 10, 10, 9, 9, 9]).via("not worth it")
@settings(deadline=None)
def test_rectangles_are_the_best_there_are(lengths: list[int]) -> None:
    """Against all ways to cut the rows."""
    rectangles = tight_rectangles(lengths)
    assert sum(rows for rows, _ in rectangles) == len(lengths)
    cuts = list(accumulate(rows for rows, _ in rectangles))
    assert [width for _, width in rectangles] == [lengths[begin] for begin in [0, *cuts[:-1]]]
    ways = [cost(lengths, way) for n in range(len(lengths)) for way in combinations(range(1, len(lengths)), n)]
    assert cost(lengths, cuts[:-1]) == pytest.approx(min(ways))


@given(sections_of(st.integers(1, 6), longest=9), st.integers(0, 1000))
@settings(deadline=None)
def test_tight_rectangles_hold_every_row_once(sections: list[list[int]], seed: int) -> None:
    """Rows and their zeros, as in one rectangle, in fewer slots or as many; there and back."""
    packing, _ = shuffled(Packing.of(*sections, tight=True), seed)
    loose = Packing.of(*sections)
    assert len(packing) <= packing.slots <= loose.slots == loose.rows * loose.longest
    x_PN = random_numbers(len(packing), 2, seed=seed)
    laid_out = packing.lay_out(x_PN)
    assert [x_BTN.shape[:2] for x_BTN in laid_out] == list(packing.rectangles)
    found = sorted(row_TN.tolist() for x_BTN in laid_out for row_TN in x_BTN)
    widths = [width for rows, width in packing.rectangles for _ in range(rows)]
    by_length = sorted(row_by_row(packing, x_PN), key=len, reverse=True)
    expected = [F.pad(row_TN, (0, 0, 0, width - len(row_TN))) for row_TN, width in zip(by_length, widths, strict=True)]
    assert found == sorted(row_TN.tolist() for row_TN in expected)
    assert torch.equal(packing.unpad(*laid_out), x_PN)


@given(sections_of(st.integers(1, 5)), st.integers(0, 1000))
@settings(deadline=None)
def test_a_rectangle_holds_the_rows_and_zeros(sections: list[list[int]], seed: int) -> None:
    """There and back; the gradient of either way is the other way."""
    packing, _ = shuffled(Packing.of(*sections), seed)
    x_PN = random_numbers(len(packing), 2, 3, seed=seed).requires_grad_()
    x_BTN = packing.pad(x_PN)
    assert x_BTN.shape == (packing.rows, packing.longest, 2, 3)
    for padded_TN, row_TN in zip(x_BTN, row_by_row(packing, x_PN), strict=True):
        assert torch.equal(padded_TN[: len(row_TN)], row_TN)
        assert not padded_TN[len(row_TN) :].any()
    weight_BTN = random_numbers(*x_BTN.shape, seed=seed + 1)
    assert torch.equal(torch.autograd.grad((x_BTN * weight_BTN).sum(), x_PN)[0], packing.unpad(weight_BTN))

    y_BTN = random_numbers(*x_BTN.shape, seed=seed + 2).requires_grad_()
    y_PN = packing.unpad(y_BTN)
    for token, (row, offset) in enumerate(zip(packing.row_P, packing.offset_P, strict=True)):
        assert torch.equal(y_PN[token], y_BTN[row, offset])
    weight_PN = x_PN.detach()
    assert torch.equal(torch.autograd.grad((y_PN * weight_PN).sum(), y_BTN)[0], packing.pad(weight_PN))


@pytest.mark.parametrize("index", [[4, 0, 2], [1], [3, 2, 1, 0, 4], []])
def test_taking_rows(index: list[int]) -> None:
    """What indexing gives; rows that nobody took have gradient 0."""
    x_SN = random_numbers(5, 2, 3).double().requires_grad_()
    index_P = torch.tensor(index, dtype=torch.long)
    assert torch.equal(take(x_SN, index_P), x_SN[index_P])
    weight_PN = random_numbers(len(index), 2, 3, seed=1).double()
    (gradient,) = torch.autograd.grad((take(x_SN, index_P) * weight_PN).sum(), x_SN)
    expected = torch.zeros(5, 2, 3, dtype=torch.double)
    for place, row in enumerate(index):
        expected[row] = weight_PN[place]
    assert torch.equal(gradient, expected)
    assert torch.autograd.gradcheck(lambda x: take(x, index_P), x_SN)


# What a model makes of them


@pytest.mark.parametrize("family", FAMILIES)
@given(sections=sections_of(st.integers(1, 4)), tight=st.booleans(), shuffle=st.booleans(), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_a_row_is_the_same_in_any_company(
    make_model: Callable[..., GPT],
    assert_equal_gradients: Callable[..., None],
    family: str,
    sections: list[list[int]],
    tight: bool,
    shuffle: bool,
    seed: int,
) -> None:
    """Hidden states and gradients of ragged rows, their tokens in any order, are those of each row alone."""
    model = make_model(family)
    packing = Packing.of(*sections, tight=tight)
    if shuffle:
        packing, _ = shuffled(packing, seed)
    ids_P = random_ids(len(packing), seed)
    hidden_PD = model(ids_P, packing)
    assert hidden_PD.shape == (len(packing), WIDTH)
    weight_PD = random_numbers(len(packing), WIDTH, seed=seed)
    expected = torch.zeros(())
    rows = (row_by_row(packing, x) for x in (ids_P, hidden_PD, weight_PD))
    for ids_T, hidden_TD, weight_TD in zip(*rows, strict=True):
        if len(ids_T) > 0:
            alone_TD = model(ids_T.unsqueeze(0))[0]
            torch.testing.assert_close(hidden_TD, alone_TD, atol=1e-5, rtol=1e-5)
            expected = expected + (alone_TD * weight_TD).sum()
    if len(packing) > 0:
        assert_equal_gradients((hidden_PD * weight_PD).sum(), expected, model)


@torch.no_grad()
def test_a_grid_is_a_packing(model: GPT) -> None:
    """Rows of equal length, (B, T) without packing, are the same as (P,) with one."""
    ids_BT = random_ids(12).view(3, 4)
    hidden_BTD = model(ids_BT)
    assert hidden_BTD.shape == (3, 4, WIDTH)
    for packing in (Packing.grid(3, 4), Packing.of([4, 4, 4]), Packing.of([1] * 3, [3] * 3)):
        ids_P, expected_PD = packing.unpad(ids_BT.unsqueeze(2)).squeeze(1), packing.unpad(hidden_BTD)
        torch.testing.assert_close(model(ids_P, packing), expected_PD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed_row", range(4))
@torch.no_grad()
def test_no_row_sees_another(model: GPT, changed_row: int) -> None:
    """Other tokens in one row, in both passes through a cache: to the last bit, no other row is any different."""
    pieces = [Packing.of([5, 0, 1, 3], [1, 1, 4, 0]), Packing.of([2, 6, 0, 1])]
    ids = [random_ids(len(packing), seed) for seed, packing in enumerate(pieces)]
    changed = [
        torch.where(packing.row_P == changed_row, (ids_P + 1) % VOCAB, ids_P)
        for ids_P, packing in zip(ids, pieces, strict=True)
    ]
    caches = KVCache(capacity=12), KVCache(capacity=12)
    for packing, before_P, after_P in zip(pieces, ids, changed, strict=True):
        before_PD, after_PD = model(before_P, packing, caches[0]), model(after_P, packing, caches[1])
        is_other = packing.row_P != changed_row
        assert torch.equal(before_PD[is_other], after_PD[is_other])
        assert not torch.isclose(before_PD[~is_other], after_PD[~is_other]).all(dim=1).any()


@pytest.mark.parametrize("read_outs", [(1, 1), (5, 8), (14, 10), (0, 4)], ids=["one", "some", "all", "none at first"])
@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_reading_out_is_slicing(
    model: GPT, assert_equal_gradients: Callable[..., None], read_outs: tuple[int, int], cached: bool
) -> None:
    """The last block computes fewer hidden states, and nothing else differs: what remains, gradients, the cache."""
    passes = Packing.of([3, 1, 4], [2, 3, 1]), Packing.of([2, 5, 1], [0, 1, 1])

    def read(read_outs: Sequence[int | None]) -> list[Tensor]:
        cache = KVCache(capacity=13) if cached else None
        return [
            model(random_ids(len(packing), i), packing, cache, read_out)
            for i, (packing, read_out) in enumerate(zip(passes, read_outs, strict=True))
        ]

    def scalar(hidden: list[Tensor]) -> Tensor:
        return sum(((x_MD * x_MD.cumsum(0).sin()).sum() for x_MD in hidden), torch.zeros(()))

    ours = read(read_outs)
    theirs = [
        hidden_PD[len(hidden_PD) - count :] for hidden_PD, count in zip(read((None, None)), read_outs, strict=True)
    ]
    assert tuple(map(len, ours)) == read_outs
    for our_MD, their_MD in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_MD, their_MD, atol=1e-5, rtol=1e-5)
    assert_equal_gradients(scalar(ours), scalar(theirs), model)


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no rows", "no tokens"])
def test_nothing_to_read(model: GPT, lengths: Sequence[int]) -> None:
    """A batch in which nothing is taught goes through the decoder all the same: no states, gradients of 0."""
    hidden_PD = model(torch.zeros(0, dtype=torch.long), Packing.of(lengths))
    assert hidden_PD.shape == (0, WIDTH)
    hidden_PD.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
