"""Reading in pieces through a cache, and padding wherever it lies, change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT, causal_mask

VOCAB, LENGTH = 61, 12


def random_ids(rows: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def read_in_pieces(model: GPT, ids_BT: Tensor, mask_BT: Tensor | None, cuts: Sequence[int], cache: KVCache) -> Tensor:
    """Hidden states of all positions, read piece by piece."""
    return torch.cat(
        [
            model(ids_BT[:, a:b], mask_BT=None if mask_BT is None else mask_BT[:, a:b], cache=cache)
            for a, b in pairwise([0, *cuts, ids_BT.shape[1]])
        ],
        dim=1,
    )


@pytest.mark.parametrize("capacity", [None, LENGTH, LENGTH + 5], ids=["appending", "exact", "roomy"])
@pytest.mark.parametrize("cuts", [range(1, LENGTH), [5], [1, 4, 11], []], ids=["tokens", "two", "four", "one"])
@torch.no_grad()
def test_cached_equals_uncached(model: GPT, cuts: Sequence[int], capacity: int | None) -> None:
    ids_BT = random_ids(3)
    cache = KVCache(capacity)
    hidden_BTD = read_in_pieces(model, ids_BT, None, cuts, cache)
    assert cache.length == LENGTH
    torch.testing.assert_close(hidden_BTD, model(ids_BT), atol=1e-5, rtol=1e-5)


def test_who_may_see_whom() -> None:
    """Real keys at or before the query; a padding position sees itself alone, so that its softmax is defined."""
    seen_BS = torch.tensor([[0, 1, 1, 0, 1]]).bool()
    expected_TS = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]).bool()
    assert torch.equal(causal_mask(seen_BS, T=3), expected_TS[None, None])
    assert causal_mask(seen_BS, T=5)[0, 0, 0].tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("side", ["left", "right", "middle", "both"])
@torch.no_grad()
def test_padded_equals_unpadded(model: GPT, side: str) -> None:
    """A padded row, its padding filled with tokens that would matter, beside a row without padding."""
    real = {"left": range(4, 12), "right": range(8), "middle": [0, 1, 2, 7, 8, 9, 10, 11], "both": range(2, 10)}[side]
    mask_BT = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask_BT[0, list(real)] = True
    mask_BT[1] = True
    ids_BT = random_ids(2)
    hidden_BTD = model(ids_BT, mask_BT=mask_BT)
    assert hidden_BTD.isfinite().all()
    for row in range(2):
        alone_TD = model(ids_BT[row : row + 1, mask_BT[row]])[0]
        torch.testing.assert_close(hidden_BTD[row, mask_BT[row]], alone_TD, atol=1e-5, rtol=1e-5)


class Reading(NamedTuple):
    """Rows with padding anywhere, read in pieces."""

    masks: list[list[bool]]
    cuts: list[int]
    capacity: int | None
    seed: int


readings = st.builds(
    Reading,
    masks=st.lists(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, LENGTH - 1), unique=True).map(sorted),
    capacity=st.sampled_from([None, LENGTH, LENGTH + 3]),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
@given(reading=readings)
@settings(deadline=None, max_examples=60)
@torch.no_grad()
def test_any_padding_read_in_any_pieces(make_model: Callable[..., GPT], family: str, reading: Reading) -> None:
    """All at once: padding anywhere, pieces anywhere (some of them all padding), either cache; each row as if alone."""
    model = make_model(family)
    mask_BT = torch.tensor(reading.masks)
    ids_BT = random_ids(len(mask_BT), seed=reading.seed)
    cache = KVCache(reading.capacity)
    hidden_BTD = read_in_pieces(model, ids_BT, mask_BT, reading.cuts, cache)
    assert hidden_BTD.isfinite().all()
    assert cache.mask_BS is not None
    assert torch.equal(cache.mask_BS, mask_BT)
    for hidden_TD, ids_T, mask_T in zip(hidden_BTD, ids_BT, mask_BT, strict=True):
        if mask_T.any():
            alone_TD = model(ids_T[mask_T].unsqueeze(0))[0]
            torch.testing.assert_close(hidden_TD[mask_T], alone_TD, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("capacity", [None, LENGTH], ids=["appending", "preallocated"])
@pytest.mark.parametrize("rows", [[2, 0], [1], [3, 2, 1, 0]])
@torch.no_grad()
def test_keep_goes_on_with_those_rows(model: GPT, rows: list[int], capacity: int | None) -> None:
    """Rows taken out of a padded batch, in a new order, read on as if they had been alone all along."""
    ids_BT = random_ids(4)
    mask_BT = torch.ones(4, LENGTH, dtype=torch.bool)
    for row in range(4):
        mask_BT[row, 3 : 3 + row] = False  # another padding a row, before the cut
    cache = KVCache(capacity)
    model(ids_BT[:, :8], mask_BT=mask_BT[:, :8], cache=cache)
    cache.keep(torch.tensor(rows))
    hidden_NTD = model(ids_BT[rows, 8:], mask_BT=mask_BT[rows, 8:], cache=cache)
    for kept, row in enumerate(rows):
        alone_TD = model(ids_BT[row : row + 1, mask_BT[row]])[0, -4:]
        torch.testing.assert_close(hidden_NTD[kept], alone_TD, atol=1e-5, rtol=1e-5)


def test_a_preallocated_cache_writes_in_place() -> None:
    """Keys and values of earlier positions are neither moved nor copied, and only what was written comes back."""
    cache = KVCache(capacity=6)
    pieces = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4).split((2, 1, 2), dim=2)
    addresses = set()
    for i, piece in enumerate(pieces, start=1):
        cache.extend_mask(torch.ones(2, piece.shape[2], dtype=torch.bool))
        k, v = cache.append(0, piece, -piece)
        assert torch.equal(k, torch.cat(pieces[:i], dim=2))
        assert torch.equal(v, -torch.cat(pieces[:i], dim=2))
        addresses.add((k.data_ptr(), v.data_ptr()))
    assert len(addresses) == 1
    assert cache.length == 5


def test_gradients_go_through_an_appending_cache(model: GPT) -> None:
    """Training reads questions and thoughts through the cache: its gradients are those of one pass."""
    ids_BT = random_ids(2)
    weight_BTD = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    parameters = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    gradients = [
        torch.autograd.grad((hidden_BTD * weight_BTD).sum(), parameters)
        for hidden_BTD in (model(ids_BT), read_in_pieces(model, ids_BT, None, [1, 4, 9], KVCache()))
    ]
    for one_pass, in_pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(in_pieces, one_pass, atol=1e-4, rtol=1e-4)
