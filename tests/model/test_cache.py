"""Reading in pieces through a cache changes nothing: neither hidden states nor, in training, gradients."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from simcot_latent.model.cache import CacheView, KVCache
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing

FAMILIES = ["gpt2", "llama", "nanochat"]
VOCAB, LENGTH, WIDTH = 61, 12, 32


def random_ids(rows: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_weights(*shape: int, seed: int = 0) -> Tensor:
    """What each number of a hidden state counts in a scalar, each differently."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read_in_pieces(model: GPT, ids_BT: Tensor, cuts: Sequence[int], cache: KVCache) -> Tensor:
    """Hidden states of all positions of rows of equal length, read piece by piece."""
    return torch.cat([model(ids_BT[:, a:b], cache=cache) for a, b in pairwise([0, *cuts, ids_BT.shape[1]])], dim=1)


def read_ragged(model: GPT, ids_BT: Tensor, pieces: Sequence[Sequence[int]], cache: KVCache) -> list[list[Tensor]]:
    """Hidden states of rows that are read in pieces of any lengths (a list a piece): for each piece, of each row."""
    begins = [0] * len(ids_BT)
    found = []
    for lengths in pieces:
        ids = [row[begin : begin + length] for row, begin, length in zip(ids_BT, begins, lengths, strict=True)]
        found.append(list(model(torch.cat(ids), Packing.of(lengths), cache).split(list(lengths))))
        begins = [begin + length for begin, length in zip(begins, lengths, strict=True)]
    return found


def room_for(pieces: Sequence[Sequence[int]]) -> int:
    """A capacity that does for these pieces."""
    return sum(map(max, pieces))


@pytest.mark.parametrize("capacity", [LENGTH, LENGTH + 5], ids=["exact", "roomy"])
@pytest.mark.parametrize("cuts", [range(1, LENGTH), [5], [1, 4, 11], []], ids=["tokens", "two", "four", "one"])
@torch.no_grad()
def test_cached_equals_uncached(model: GPT, cuts: Sequence[int], capacity: int) -> None:
    ids_BT = random_ids(3)
    cache = KVCache(capacity)
    assert cache.is_empty
    hidden_BTD = read_in_pieces(model, ids_BT, cuts, cache)
    assert not cache.is_empty
    assert cache.longest == LENGTH
    assert cache.length_B is not None
    assert cache.length_B.tolist() == [LENGTH] * 3
    torch.testing.assert_close(hidden_BTD, model(ids_BT), atol=1e-5, rtol=1e-5)


def test_who_may_see_whom() -> None:
    """A row's own columns up to the query's position; where there is no token, something, so softmax is defined."""
    cache, first, second = KVCache(capacity=5), Packing.of([1, 3, 2]), Packing.of([2, 1, 0])
    cache.advance(first)
    column_P = cache.place(second)
    assert column_P.tolist() == [1, 2, 3]
    view = CacheView(cache, second, column_P, rotary=None, heads=(4, 2))
    seen_BTC = torch.tensor(
        [[[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]], [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]]
    )
    assert set(view.bias.unique().tolist()) == {-torch.inf, 0.0}
    # Two key/value heads a row, and for each of them the two query heads that share it.
    for key_head in range(2):
        for query_head in range(2):
            found_BTC = (view.bias == 0)[key_head::2, 2 * query_head : 2 * query_head + 2]
            assert torch.equal(found_BTC, seen_BTC.bool())


# Ragged rows in ragged pieces


class Reading(NamedTuple):
    """Rows that are read in ragged pieces, some of which enter a scalar."""

    pieces: list[list[int]]
    counts: list[bool]
    spare: int
    seed: int


@st.composite
def readings(draw: st.DrawFn) -> Reading:
    """No piece is without any token: nobody reads one."""
    rows = draw(st.integers(1, 3))
    pieces = draw(st.lists(st.lists(st.integers(0, 4), min_size=rows, max_size=rows), min_size=1, max_size=4))
    assume(all(any(piece) for piece in pieces))
    counts = draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    return Reading(pieces, counts, draw(st.integers(0, 3)), draw(st.integers(0, 1000)))


@pytest.mark.parametrize("family", FAMILIES)
@given(reading=readings())
@settings(deadline=None, max_examples=40)
@torch.no_grad()
def test_any_rows_read_in_any_pieces(make_model: Callable[..., GPT], family: str, reading: Reading) -> None:
    """All at once: rows of any lengths, pieces anywhere, some of them nothing for some rows; each row as if alone."""
    model = make_model(family)
    lengths = [sum(row) for row in zip(*reading.pieces, strict=True)]
    ids_BT = random_ids(len(lengths), max(lengths), reading.seed)
    cache = KVCache(room_for(reading.pieces) + reading.spare)
    found = read_ragged(model, ids_BT, reading.pieces, cache)
    assert cache.length_B is not None
    assert cache.length_B.tolist() == lengths
    assert max(lengths) <= cache.longest <= cache.capacity
    for ids_T, length, pieces in zip(ids_BT, lengths, zip(*found, strict=True), strict=True):
        if length > 0:
            alone_TD = model(ids_T[:length].unsqueeze(0))[0]
            torch.testing.assert_close(torch.cat(pieces), alone_TD, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@given(reading=readings())
@example(reading=Reading([[3, 1], [2, 4], [1, 2]], [False, False, True], 0, 0)).via("only what is read last counts")
@example(reading=Reading([[3, 1], [2, 4], [1, 2]], [True, False, False], 0, 0)).via("only what is read first counts")
@example(reading=Reading([[3, 1], [2, 4], [1, 2]], [False, True, False], 0, 0)).via("only the middle counts")
@example(reading=Reading([[3, 1], [2, 0], [0, 4], [1, 0]], [True, False, False, True], 2, 0)).via("with gaps")
@settings(deadline=None, max_examples=40)
def test_gradients_of_any_pieces(
    make_model: Callable[..., GPT], assert_equal_gradients: Callable[..., None], family: str, reading: Reading
) -> None:
    """Training reads in pieces: hidden states and gradients are those of each row alone, read at once.

    Whichever pieces a scalar is made of: the others' gradient comes through keys and values alone, or is none.
    """
    assume(any(any(piece) for piece, counts in zip(reading.pieces, reading.counts, strict=True) if counts))
    model = make_model(family)
    lengths = [sum(row) for row in zip(*reading.pieces, strict=True)]
    ids_BT = random_ids(len(lengths), max(lengths), reading.seed)
    weight_BTD = random_weights(*ids_BT.shape, WIDTH, seed=reading.seed)
    found = read_ragged(model, ids_BT, reading.pieces, KVCache(room_for(reading.pieces) + reading.spare))
    scalar, expected = torch.zeros(()), torch.zeros(())
    for row, length in enumerate(lengths):
        if length == 0:
            continue
        weights = weight_BTD[row, :length].split([piece[row] for piece in reading.pieces])
        alone = model(ids_BT[row : row + 1, :length])[0].split([piece[row] for piece in reading.pieces])
        for piece, counts, weight_TD, alone_TD in zip(found, reading.counts, weights, alone, strict=True):
            torch.testing.assert_close(piece[row], alone_TD, atol=2e-5, rtol=2e-5)
            if counts:
                scalar = scalar + (piece[row] * weight_TD).sum()
                expected = expected + (alone_TD * weight_TD).sum()
    assert_equal_gradients(scalar, expected, model)


@pytest.mark.parametrize("cuts", [range(1, LENGTH), [5], [1, 4, 11]], ids=["tokens", "two", "four"])
def test_gradients_reach_input_embeddings(model: GPT, cuts: Sequence[int]) -> None:
    """Thoughts are inputs: what a later piece sees of them must reach them."""
    weight_BTD = random_weights(2, LENGTH, WIDTH)
    gradients = []
    for pieces in (cuts, []):
        x_BTD = model.embedding(random_ids(2)).detach().requires_grad_()
        cache = KVCache(LENGTH)
        hidden = [model.transformer(x_BTD[:, a:b], cache=cache) for a, b in pairwise([0, *pieces, LENGTH])]
        gradients.append(torch.autograd.grad((torch.cat(hidden, dim=1) * weight_BTD).sum(), x_BTD)[0])
    torch.testing.assert_close(*gradients, atol=1e-4 * gradients[1].abs().max().item(), rtol=1e-4)


def test_the_order_of_tokens_does_not_matter(model: GPT, assert_equal_gradients: Callable[..., None]) -> None:
    """A later piece whose tokens lie in any order, rows mixed: hidden states and gradients are the same."""
    first, second = Packing.of([4, 1, 2]), Packing.of([2, 3, 1])
    order_P = torch.tensor([4, 0, 5, 3, 1, 2])
    row_P, offset_P, slot_P = (x[order_P] for x in (second.row_P, second.offset_P, second.slot_P))
    mixed = replace(second, row_P=row_P, offset_P=offset_P, slot_P=slot_P)
    ids_P, more_P, weight_PD = random_ids(1, 7)[0], random_ids(1, 6, seed=1)[0], random_weights(6, WIDTH)
    hidden = []
    for packing, more in ((second, more_P), (mixed, more_P[order_P])):
        cache = KVCache(7)
        model(ids_P, first, cache)
        hidden.append(model(more, packing, cache))
    torch.testing.assert_close(hidden[1], hidden[0][order_P], atol=1e-5, rtol=1e-5)
    assert_equal_gradients((hidden[1] * weight_PD[order_P]).sum(), (hidden[0] * weight_PD).sum(), model)


def test_a_first_piece_in_tight_rectangles(model: GPT, assert_equal_gradients: Callable[..., None]) -> None:
    """Rows of one or two tokens beside a long one: what later pieces see, and all gradients, are the same."""
    sections, second = ([1, 7, 2, 0], [1, 1, 1, 1]), Packing.of([2, 1, 0, 3])
    ids_P, more_P, weight_PD = random_ids(1, 14)[0], random_ids(1, 6, seed=1)[0], random_weights(20, WIDTH)
    found = []
    for tight in (False, True):
        first, cache = Packing.of(*sections, tight=tight), KVCache(11)
        assert len(first.rectangles) == (4 if tight else 1)
        found.append(torch.cat((model(ids_P, first, cache), model(more_P, second, cache))))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert_equal_gradients(*((hidden_PD * weight_PD).sum() for hidden_PD in found), model)


# Several graphs


def two_scalars(model: GPT) -> list[Tensor]:
    """Of two different texts, each read in pieces through a cache of its own."""
    return [
        (
            read_in_pieces(model, random_ids(2, seed=seed), cuts, KVCache(LENGTH)) * random_weights(2, LENGTH, WIDTH)
        ).sum()
        for seed, cuts in ((1, [4, 9]), (2, [3, 4, 5]))
    ]


def test_two_caches_in_one_graph(model: GPT, assert_equal_gradients: Callable[..., None]) -> None:
    """Two micro batches in one backward pass have the sum of their gradients."""
    weight_BTD = random_weights(2, LENGTH, WIDTH)
    uncached = sum(((model(random_ids(2, seed=seed)) * weight_BTD).sum() for seed in (1, 2)), torch.zeros(()))
    first, second = two_scalars(model)
    assert_equal_gradients(first + second, uncached, model)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_backward_passes_do_not_disturb_each_other(model: GPT, order: tuple[int, int]) -> None:
    """Two graphs that stand side by side, whichever goes first; and one that is gone through twice."""
    weight = model.embedding.weight
    expected = [torch.autograd.grad(scalar, weight)[0] for scalar in two_scalars(model)]
    scalars = two_scalars(model)
    for which in (*order, *order):
        (gradient,) = torch.autograd.grad(scalars[which], weight, retain_graph=True)
        assert torch.equal(gradient, expected[which])


# The buffers


@pytest.mark.parametrize("trains", [False, True])
def test_writes_in_place(model: GPT, trains: bool) -> None:
    """What is there is neither moved nor copied, and a pass writes to its own columns alone."""
    cache = KVCache(LENGTH)
    lengths = torch.zeros(2, dtype=torch.long)
    with torch.set_grad_enabled(trains):
        read_ragged(model, random_ids(2), [[3, 1]], cache)
        buffers = [layer.kv for layer in cache._layers]
        for piece in ([1, 4], [0, 2], [2, 1]):
            lengths = cache.length_B
            assert lengths is not None
            before = [kv.clone() for kv in buffers]
            read_ragged(model, random_ids(2, seed=1), [piece], cache)
            assert all(layer.kv is kv for layer, kv in zip(cache._layers, buffers, strict=True))
            for kv, kv_before in zip(buffers, before, strict=True):
                for row, (length, new) in enumerate(zip(lengths.tolist(), piece, strict=True)):
                    is_new = torch.zeros(LENGTH, dtype=torch.bool)
                    is_new[length : length + new] = True
                    changed_C = (kv != kv_before)[:, row].any(dim=-1).flatten(0, 1).any(0)
                    assert torch.equal(changed_C, is_new)


@pytest.mark.parametrize("trains", [False, True])
def test_a_full_cache_says_so(model: GPT, trains: bool) -> None:
    """Rather than writing into the next row, which lies right behind in memory."""
    with torch.set_grad_enabled(trains):
        cache = KVCache(capacity=5)
        model(random_ids(2, 4), cache=cache)
        with pytest.raises(ValueError, match="a cache of 5 positions cannot hold 6"):
            model(random_ids(2, 2), cache=cache)
        model(random_ids(2, 1), cache=cache)
        assert cache.longest == 5


def test_a_first_pass_too_long_for_its_cache(model: GPT) -> None:
    with pytest.raises(ValueError, match="a cache of 5 positions cannot hold 6"):
        model(random_ids(2, 6), cache=KVCache(capacity=5))


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed is freed by reference counts alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("goes_back", [False, True])
def test_buffers_go_with_the_results(model: GPT, goes_back: bool) -> None:
    """The cache of a training step is as large as all its activations: nothing may hold on to it, not even a cycle."""

    def read() -> tuple[Tensor, list[weakref.ref]]:
        cache = KVCache(LENGTH)
        scalar = read_in_pieces(model, random_ids(2), [3, 4, 9], cache).square().cumsum(-1).sum()
        return scalar, [weakref.ref(x) for layer in cache._layers for x in (layer, layer.kv)]

    scalar, buffers = read()
    assert len(buffers) == 4
    assert all(buffer() is not None for buffer in buffers), "the graph must hold them until it has gone back"
    if goes_back:
        scalar.backward()
    del scalar
    assert all(buffer() is None for buffer in buffers)


# Fewer rows


@pytest.mark.parametrize("rows", [[2, 0], [1], [3, 2, 1, 0]])
@torch.no_grad()
def test_keep_goes_on_with_those_rows(model: GPT, rows: list[int]) -> None:
    """Rows taken out of a ragged batch, in a new order, read on as if they had been alone all along."""
    ids_BT = random_ids(4)
    before, after = [8, 2, 1, 5], [1, 3, 0, 4]
    cache = KVCache(LENGTH)
    read_ragged(model, ids_BT, [before], cache)
    cache.keep(torch.tensor(rows))
    assert cache.length_B is not None
    assert cache.length_B.tolist() == [before[row] for row in rows]
    remaining_BT = torch.stack([ids_BT[row].roll(-before[row]) for row in rows])
    (found,) = read_ragged(model, remaining_BT, [[after[row] for row in rows]], cache)
    for row, hidden_TD in zip(rows, found, strict=True):
        alone_TD = model(ids_BT[row : row + 1, : before[row] + after[row]])[0, before[row] :]
        torch.testing.assert_close(hidden_TD, alone_TD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [[1, 0], [1]], ids=["reordered", "fewer"])
def test_gradients_end_where_rows_are_kept(model: GPT, rows: list[int]) -> None:
    """As `keep` says: none, rather than another row's."""
    x_BTD = model.embedding(random_ids(2)).detach().requires_grad_()
    cache = KVCache(LENGTH)
    model.transformer(x_BTD[:, :8], cache=cache)
    cache.keep(torch.tensor(rows))
    model.transformer(x_BTD[rows, 8:], cache=cache).square().cumsum(-1).sum().backward()
    assert x_BTD.grad is not None
    assert not x_BTD.grad[:, :8].any()
    assert x_BTD.grad[rows, 8:].any(dim=-1).all()


# What is read again


def test_rewinding_goes_back_before_the_last_tokens() -> None:
    cache, one_each, again = KVCache(capacity=8), Packing.of([1, 1, 1]), Packing.of([2, 0, 3])
    cache.advance(Packing.of([4, 5, 3]))
    assert cache.place(one_each).tolist() == [4, 5, 3]
    cache.rewind(again)
    assert cache.rewound
    assert cache.place(again).tolist() == [2, 3, 0, 1, 2]
    cache.advance(again)
    assert not cache.rewound
    assert cache.place(one_each).tolist() == [4, 5, 3]
    assert cache.longest == 5, "what is read again takes no room"


@pytest.mark.parametrize("asks", ["every iteration", "the text"])
@pytest.mark.parametrize("attention", ["products", "sdpa"])
@pytest.mark.parametrize("counts", [[3, 3, 3], [4, 1, 2]], ids=["as many", "ragged"])
def test_jacobi_iterations(
    model: GPT, counts: list[int], attention: str, asks: str, assert_equal_gradients: Callable[..., None]
) -> None:
    """Iterations over the same columns, each in place of the one before, and text that goes on behind the last.

    Values and gradients are those of each row alone, where every iteration reads the question anew.
    """
    model.transformer.later_attention = attention
    iterations, lengths, texts = 3, [5, 2, 7], [2, 4, 1]

    def embedded() -> list[list[Tensor]]:
        return [
            [model.embedding(random_ids(1, n, seed=seed + n)[0]) for n in part]
            for seed, part in ((0, lengths), (10, counts), (20, texts))
        ]

    def updated(latents: Sequence[Tensor], hidden: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat((x_CD[:1], h_CD[:-1])) for x_CD, h_CD in zip(latents, hidden, strict=True)]

    questions, latents, answers = embedded()
    cache, packing = KVCache(max(lengths) + max(counts) + max(texts)), Packing.of(counts)
    model.transformer(torch.cat(questions), Packing.of(lengths), cache)
    found = list[Tensor]()
    for iteration in range(iterations + 1):
        if iteration > 0:
            cache.rewind(packing)
            latents = updated(latents, found[-len(counts) :])
        found += model.transformer(torch.cat(latents), packing, cache).split(counts)
    found += model.transformer(torch.cat(answers), Packing.of(texts), cache).split(texts)

    questions, latents, answers = embedded()
    expected = list[Tensor]()
    for iteration in range(iterations + 1):
        if iteration > 0:
            latents = updated(latents, expected[-len(counts) :])
        for question_TD, x_CD in zip(questions, latents, strict=True):
            expected.append(model.transformer(torch.cat((question_TD, x_CD)).unsqueeze(0))[0, -len(x_CD) :])
    for question_TD, x_CD, text_TD in zip(questions, latents, answers, strict=True):
        expected.append(model.transformer(torch.cat((question_TD, x_CD, text_TD)).unsqueeze(0))[0, -len(text_TD) :])

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)
    counted = slice(None) if asks == "every iteration" else slice(-len(counts), None)
    scalars = [
        sum(((x * random_weights(*x.shape, seed=i)).sum() for i, x in enumerate(hidden[counted])), torch.zeros(()))
        for hidden in (found, expected)
    ]
    assert_equal_gradients(*scalars, model)


def test_as_many_jacobi_iterations_as_thoughts_are_one_after_the_other(model: GPT) -> None:
    """Thought i is what it will be after i - 1 iterations (PCCoT, https://arxiv.org/abs/2506.18582, section 3)."""
    lengths, C = [5, 2, 7], 4
    questions_PD, one_each = model.embedding(random_ids(1, sum(lengths))[0]), Packing.grid(len(lengths), 1)
    with torch.no_grad():
        cache = KVCache(max(lengths) + C)
        hidden_PD = model.transformer(questions_PD, Packing.of(lengths), cache)
        first_BD = hidden_PD[torch.tensor(lengths).cumsum(0) - 1]
        thoughts = [first_BD]
        for _ in range(C - 1):
            thoughts.append(model.transformer(thoughts[-1], one_each, cache))

        cache, grid = KVCache(max(lengths) + C), Packing.grid(len(lengths), C)
        model.transformer(questions_PD, Packing.of(lengths), cache)
        x_BCD = model.embedding(random_ids(len(lengths), C, seed=1))
        x_BCD[:, 0] = first_BD
        for _ in range(C - 1):
            hidden_PD = model.transformer(x_BCD.flatten(0, 1), grid, cache)
            x_BCD = torch.cat((x_BCD[:, :1], hidden_PD.unflatten(0, (-1, C))[:, :-1]), dim=1)
            cache.rewind(grid)
    torch.testing.assert_close(x_BCD, torch.stack(thoughts, dim=1), atol=3e-5, rtol=3e-5)


@st.composite
def repeated(draw: st.DrawFn) -> tuple[Reading, list[int]]:
    reading = draw(readings())
    return reading, [draw(st.integers(1, 3)) for _ in reading.pieces]


@pytest.mark.parametrize("attention", ["products", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@given(case=repeated(), first_counts=st.booleans(), last_counts=st.booleans())
@example(case=(Reading([[3, 1], [2, 4], [1, 2]], [True] * 3, 0, 0), [3, 3, 3]), first_counts=True,
         last_counts=True).via("all are read again")  # fmt: skip
@example(case=(Reading([[3, 1], [2, 0], [1, 2]], [False, True, False], 0, 0), [1, 2, 2]), first_counts=True,
         last_counts=False).via("nothing comes of the last")  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_what_is_read_again_was_never_read(
    make_model: Callable[..., GPT],
    assert_equal_gradients: Callable[..., None],
    family: str,
    attention: str,
    case: tuple[Reading, list[int]],
    first_counts: bool,
    last_counts: bool,
) -> None:
    """Pieces that are read up to three times, as other tokens each time: as if each row had been read anew."""
    reading, times = case
    model = make_model(family)
    model.transformer.later_attention = attention
    rows = len(reading.pieces[0])
    cache = KVCache(room_for(reading.pieces) + reading.spare)
    scalar, expected = torch.zeros(()), torch.zeros(())
    before: list[list[int]] = [[] for _ in range(rows)]
    contexts = before
    anything = False
    for number, (piece, n_times, counts) in enumerate(zip(reading.pieces, times, reading.counts, strict=True)):
        packing = Packing.of(piece)
        for time in range(n_times):
            seed = reading.seed + 10 * number + time
            ids = random_ids(1, sum(piece), seed)[0].split(piece)
            if time > 0:
                cache.rewind(packing)
            hidden_PD = model(torch.cat(ids), packing, cache)
            contexts = [[*row, *new.tolist()] for row, new in zip(before, ids, strict=True)]
            for row, hidden_TD in enumerate(hidden_PD.split(piece)):
                if piece[row] == 0:
                    continue
                alone_TD = model(torch.tensor(contexts[row]), Packing.of([len(contexts[row])]))[-piece[row] :]
                torch.testing.assert_close(hidden_TD, alone_TD, atol=3e-5, rtol=3e-5)
                if counts and (time > 0 or first_counts) and (time < n_times - 1 or last_counts):
                    anything = True
                    weight_TD = random_weights(*hidden_TD.shape, seed=seed)
                    scalar = scalar + (hidden_TD * weight_TD).sum()
                    expected = expected + (alone_TD * weight_TD).sum()
        before = contexts
    if anything:
        assert_equal_gradients(scalar, expected, model)


@pytest.mark.parametrize("attention", ["products", "sdpa"])
def test_going_back_twice_through_what_was_read_again(model: GPT, attention: str) -> None:
    """The columns are then what they were after the first pass; the second time they must be the last's once more."""
    model.transformer.later_attention = attention
    x_BTD = model.embedding(random_ids(2)).detach().requires_grad_()
    packing, cache = Packing.grid(2, 4), KVCache(LENGTH)
    model.transformer(x_BTD[:, :6].flatten(0, 1), Packing.grid(2, 6), cache)
    for begin in (2, 4, 6):
        cache.rewind(packing)
        hidden_PD = model.transformer(x_BTD[:, begin : begin + 4].flatten(0, 1), packing, cache)
    scalar = (hidden_PD * random_weights(*hidden_PD.shape)).sum()
    once, twice = (torch.autograd.grad(scalar, x_BTD, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(twice, once)


@torch.no_grad()
def test_rows_that_are_kept_can_be_rewound(model: GPT) -> None:
    ids_BT = random_ids(3)
    found = []
    for rows in ([0, 1, 2], [2, 0]):
        cache, grid = KVCache(2 * LENGTH), Packing.grid(len(rows), 2)
        read_ragged(model, ids_BT, [[4, 2, 5]], cache)
        if len(rows) < 3:
            cache.keep(torch.tensor(rows))
        cache.rewind(grid)
        found.append(model(ids_BT[rows, 6:8].flatten(), grid, cache).unflatten(0, (-1, 2)))
    torch.testing.assert_close(found[1], found[0][[2, 0]], atol=1e-5, rtol=1e-5)
