"""A static cache gives what an ordinary one gives: only where its memory lies, and how a pass is started, differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.generate import generate
from simcot_latent.loops.base import NoSettings, ThoughtLoop
from simcot_latent.loops.pause import Pause
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.cache import KVCache, StaticCache, StaticCaches
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import keep_weights_in
from simcot_latent.model.packing import Packing

LENGTHS = [3, 7, 1, 5, 2]


def read(model: GPT, cache: KVCache, lengths: list[int], passes: int, seed: int = 0) -> list[Tensor]:
    """Hidden states of a ragged first pass, then of passes of a token per row."""
    generator = torch.Generator().manual_seed(seed)
    ids_P = torch.randint(61, (sum(lengths),), generator=generator)
    found = [model(ids_P, Packing.of(lengths), cache)]
    for _ in range(passes):
        ids_B = torch.randint(61, (len(lengths),), generator=generator)
        found.append(model(ids_B, Packing.grid(len(lengths), 1), cache))
    return found


@torch.no_grad()
def test_passes_are_those_of_an_ordinary_cache(model: GPT) -> None:
    static = StaticCache(rows=8, capacity=20, context_length=128)
    for seed in range(3):  # other batches, other lengths, the same memory
        lengths = LENGTHS[seed:]
        static.begin()
        wanted = read(model, KVCache(12), lengths, passes=5, seed=seed)
        for ours, expected in zip(read(model, static, lengths, 5, seed), wanted, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert len(static._layers) == model.config.n_layer, "memory is used again, not added"


@torch.no_grad()
def test_what_was_replayed_stays_what_it_was(model: GPT) -> None:
    """A replayed pass writes where the pass before it wrote; what is handed out must be a copy."""
    static = StaticCache(rows=5, capacity=12, context_length=128)
    found = read(model, static, LENGTHS, passes=4)
    kept = [hidden.clone() for hidden in found]
    model(torch.zeros(5, dtype=torch.long), Packing.grid(5, 1), static)
    assert all(map(torch.equal, found, kept))


@torch.no_grad()
def test_a_full_cache_says_so(model: GPT) -> None:
    with pytest.raises(ValueError, match="a cache of 8 positions cannot hold 9"):
        read(model, StaticCache(rows=8, capacity=8, context_length=128), LENGTHS, passes=2)


def test_gradients_need_an_ordinary_cache(model: GPT) -> None:
    static = StaticCache(rows=8, capacity=20, context_length=128)
    static.length_B = torch.zeros(8, dtype=torch.long)
    assert not static.can_replay(Packing.grid(5, 1))
    with torch.no_grad():
        assert static.can_replay(Packing.grid(5, 1))
        assert not static.can_replay(Packing.grid(5, 2))
        assert not static.can_replay(Packing.of([1] * 5))


@torch.no_grad()
def test_what_is_read_again(model: GPT) -> None:
    """As with an ordinary cache, in batches that read again and in batches that do not, whichever comes first."""
    ids = torch.randint(61, (60,), generator=torch.Generator().manual_seed(0))

    def read_with(cache: KVCache, lengths: list[int], again: bool) -> list[Tensor]:
        rows, two_each = len(lengths), Packing.grid(len(lengths), 2)
        found = [model(ids[: sum(lengths)], Packing.of(lengths), cache)]
        for iteration in range(3):
            if again and iteration > 0:
                cache.rewind(two_each)
            found.append(model(ids[iteration:][: 2 * rows], two_each, cache))
        for step in range(4):
            found.append(model(ids[10 * step :][:rows], Packing.grid(rows, 1), cache))
        return found

    static = StaticCache(rows=8, capacity=20, context_length=128)
    for seed, again in enumerate((False, True, False, True, True)):
        lengths = LENGTHS[seed:] + [4] * seed
        static.begin()
        wanted = read_with(KVCache(20), lengths, again)
        for ours, expected in zip(read_with(static, lengths, again), wanted, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


LOOPS: dict[str, Callable[[int], ThoughtLoop] | None] = {
    "writes": None,
    "thinks": lambda width: Sequential(width, SequentialConfig()),
    "last not read": lambda width: Sequential(width, SequentialConfig(feeds_last=False)),
    "pauses": lambda width: Pause(width, NoSettings()),
}


@pytest.mark.parametrize("make_loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_answers_are_the_same(
    make_model: Callable[..., GPT], tokenizer: Tokenizer, family: str, make_loop: Callable[[int], ThoughtLoop] | None
) -> None:
    """In batches of several sizes, to the end of the context, where rows that have stopped are read on."""
    model = make_model(family, vocab_size=tokenizer.n_vocab, context_length=24)
    checkpoint = Checkpoint(model, None, tokenizer, {})
    if make_loop is not None:
        thinks, loop = AnswerFormat(thinks=True), make_loop(model.config.n_embd)
        checkpoint = replace(checkpoint, answers=thinks, loop=loop, stage=Stage(3, first_written=None))
    questions = ["Ann has 3 pears.", "2+2?", "How many legs has a dog, Joe?", "Why?", "Half of 30?"]
    caches = StaticCaches(model.config.context_length)
    for rows in (5, 3, 1, 5):
        for limit in (40, 3):
            wanted = generate(checkpoint, questions[:rows], limit)
            found = generate(checkpoint, questions[:rows], limit, caches=caches)
            assert found == wanted
            for ours, expected in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours.latents_KD, expected.latents_KD, atol=1e-5, rtol=1e-5)
    assert len({generation.n_tokens for generation in wanted}) > 1 or limit == 3


def test_few_caches_are_kept() -> None:
    caches = StaticCaches(context_length=512, most=2)
    first = caches.take(5, 100)
    assert (first.rows, first.capacity) == (8, 128)
    assert caches.take(8, 65) is first
    second, third = caches.take(1, 64), caches.take(9, 64)
    assert (second.rows, third.rows) == (1, 16)
    assert caches.take(1, 64) is second
    assert caches.take(8, 128) is not first, "the least recently used was dropped"


@torch.no_grad()
def test_weights_kept_in_another_format(make_model: Callable[..., GPT]) -> None:
    """The same numbers as autocast's, and the model's own again afterwards; gradients go to the weights themselves."""
    model = make_model("gpt2")
    ids_BT = torch.arange(20).reshape(2, 10)
    exact = model(ids_BT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(ids_BT)
        keep_weights_in(model, torch.bfloat16)
        assert torch.equal(model(ids_BT), autocast)
    assert not torch.equal(autocast.float(), exact), "or nothing was shown"
    with torch.enable_grad():
        model(ids_BT).sum().backward()
    keep_weights_in(model, None)
    assert torch.equal(model(ids_BT), exact)
    assert all(parameter.grad is not None for parameter in model.parameters())
