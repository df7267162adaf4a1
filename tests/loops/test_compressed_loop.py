"""loop=compressed: thoughts of a few tokens each, against a naive loop that computes the whole sequence anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from simcot_latent.data.batch import Seeds
from simcot_latent.errors import UserError
from simcot_latent.loops.base import Thoughts, go_on, with_settings
from simcot_latent.loops.compressed import Compressed, CompressedConfig
from simcot_latent.loops.given import Ending, Given
from simcot_latent.model.cache import StaticCaches
from simcot_latent.model.gpt import GPT

QUESTIONS = [[7, 3, 22, 9, 41, 60], [5, 60], [60], [50, 11, 8, 60]]
STEPS = [[12, 13, 14, 15, 16, 17, 18], [21, 22], [], [31, 32, 33, 34, 35]]
TEXTS = [[59, 1, 2], [59, 13, 40, 6, 2], [59], [59, 4]]


@pytest.fixture
def loop(randomise: Callable[..., None]) -> Compressed:
    """A loop with random weights that answers with 3 tokens per thought."""
    return make_loop(randomise)


def make_loop(randomise: Callable[..., None], **settings: Any) -> Compressed:
    config = CompressedConfig(**({"compressions": [1, 3, 2], "compression": 3} | settings))
    loop = Compressed(32, config)
    randomise(loop, seed=1)
    return loop.eval()


def embed(model: GPT, *sections: Sequence[Sequence[int]]) -> Tensor:
    """Embeddings of all rows' first section, row by row, then of all rows' second."""
    return model.embedding(torch.tensor([i for rows in sections for row in rows for i in row], dtype=torch.long))


def silent_and_bots(model: GPT, questions: Sequence[Sequence[int]]) -> Tensor:
    return embed(model, [ids[:-1] for ids in questions], [ids[-1:] for ids in questions])


def naive_vectors(model: GPT, loop: Compressed, question: Sequence[int], r: int) -> list[Tensor]:
    """What stands before the first thought, one by one."""
    vectors = [model.embedding.weight[i] for i in question]
    return [*vectors[:-1], loop.speeds.weight[loop.config.compressions.index(r)], vectors[-1]]


def read(model: GPT, vectors: Sequence[Tensor]) -> Tensor:
    """The hidden states (T, D) of a row."""
    return model.transformer(torch.stack(list(vectors)).unsqueeze(0))[0]


# In training


def test_tokens_are_grouped_from_the_left() -> None:
    given = Given.of([[4, 5, 6, 7, 8], [], [9]], r=2, speed=1)
    assert given.counts == (3, 0, 1)
    assert given.size_N.tolist() == [2, 2, 1, 1]
    assert given.ids_L.tolist() == [4, 5, 6, 7, 8, 9]
    assert given.thought_L.tolist() == [0, 0, 1, 1, 2, 3]
    assert given.speed_B.tolist() == [1, 1, 1]


@pytest.mark.parametrize("merge", ["sqrt", "mean"])
@torch.no_grad()
def test_given_thoughts_equal_the_naive_way(model: GPT, randomise: Callable[..., None], merge: str) -> None:
    """The thoughts, the states that predict, and what is read after them, in rows of different lengths."""
    loop, r = make_loop(randomise, merge=merge), 3
    given = loop.give(STEPS, None)
    assert given.counts == (3, 1, 0, 2)
    packing = loop.pack_given([len(ids) - 1 for ids in QUESTIONS], given, list(map(len, TEXTS)))
    given_LD, questions_PD = model.embedding(given.ids_L), silent_and_bots(model, QUESTIONS)
    thoughts, found_AD = loop.read_given(model, questions_PD, given, given_LD, embed(model, TEXTS), packing)
    speeds, bots, others, texts = [], [], [], []
    for row, (question, steps, text) in enumerate(zip(QUESTIONS, STEPS, TEXTS, strict=True)):
        groups = [steps[i : i + r] for i in range(0, len(steps), r)]
        latents = [
            sum(model.embedding.weight[i] for i in ids) / (len(ids) ** 0.5 if merge == "sqrt" else len(ids))
            for ids in groups
        ]
        for k, latent in enumerate(latents):
            torch.testing.assert_close(thoughts.latents_BKD[row, k], latent)
        assert not thoughts.latents_BKD[row, len(latents) :].any()
        vectors = [*naive_vectors(model, loop, question, r), *latents, *(model.embedding.weight[i] for i in text)]
        hidden_TD, n = read(model, vectors), len(question)  # `<|bot|>` stands behind the speed
        speeds.append(hidden_TD[n - 1])
        bots.append(hidden_TD[n])
        others += list(hidden_TD[n + 1 : n + 1 + len(latents)])
        texts += list(hidden_TD[n + 1 + len(latents) :])
    torch.testing.assert_close(thoughts.states_MD, torch.stack([*speeds, *bots, *others]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found_AD, torch.stack(texts), atol=1e-4, rtol=1e-4)


def test_speeds_are_drawn_by_the_seed_of_the_step(loop: Compressed) -> None:
    def compression(seeds: Seeds | None) -> int:
        given = loop.give([[1] * 12], seeds)
        r = int(given.size_N[0])
        assert loop.config.compressions[int(given.speed_B[0])] == r
        return r

    assert compression(None) == 3  # that which it answers with
    found = [compression(Seeds(step, [0])) for step in range(600)]
    assert [compression(Seeds(step, [9, 5])) for step in range(600)] == found
    for r in (1, 2, 3):
        assert found.count(r) == pytest.approx(200, abs=50)


# Afterwards


def with_names(found: Thoughts) -> tuple[Tensor, tuple[int, ...]]:
    assert found.counts is not None
    return found.latents_BKD, found.counts


def think(
    model: GPT,
    loop: Compressed,
    questions: Sequence[Sequence[int]],
    most: int | Sequence[int],
    ending: Ending | None = None,
    caches: StaticCaches | None = None,
) -> Thoughts:
    B = len(questions)
    counts = [most] * B if isinstance(most, int) else most
    packing = loop.pack_questions([len(ids) - 1 for ids in questions], counts)
    return loop.think(model, silent_and_bots(model, questions), packing, counts, 8, caches, ending=ending)


@torch.no_grad()
def naive(model: GPT, loop: Compressed, question: Sequence[int], most: int) -> tuple[list[Tensor], list[int]]:
    """Thoughts without end, and the most likely token before each and after the last."""
    vectors, likely, thoughts = naive_vectors(model, loop, question, loop.config.compression), [], []
    for k in range(most + 1):
        hidden_D = read(model, vectors)[-1]
        likely.append(int(model.logits(hidden_D).argmax()))
        if k < most:
            x_D = loop.head.norm(loop.head.second(torch.nn.functional.gelu(loop.head.first(hidden_D))))
            thoughts.append(loop.head.mean(x_D) * model.embedding.weight.std())
            vectors.append(thoughts[-1])
    return thoughts, likely


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["", "static caches"])
def test_equals_the_naive_way_and_stops_by_itself(model: GPT, loop: Compressed, static: bool) -> None:
    """Every row has its own number of thoughts, and what is read after them stands behind its last."""
    most = 6
    wanted = [naive(model, loop, question, most) for question in QUESTIONS]
    tokens = {token for _, likely in wanted for token in likely}
    lengths = {
        token: tuple(likely.index(token) if token in likely else most for _, likely in wanted) for token in tokens
    }
    end_id, counts = max(lengths.items(), key=lambda each: (len(set(each[1])), -sum(each[1])))
    assert len(set(counts)) > 1
    caches = StaticCaches(model.config.context_length) if static else None
    found = think(model, loop, QUESTIONS, most, Ending(end_id), caches)
    latents_BKD, found_counts = with_names(found)
    assert found_counts == counts
    assert latents_BKD.shape[1] == max(counts)
    texts_AD = embed(model, TEXTS)
    hidden_AD = go_on(model, found, texts_AD, loop.pack_texts(list(map(len, TEXTS)), counts))
    expected = []
    for row, ((thoughts, _), n) in enumerate(zip(wanted, counts, strict=True)):
        assert not latents_BKD[row, n:].any()
        for ours, theirs in zip(latents_BKD[row], thoughts[:n], strict=False):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        vectors = [*naive_vectors(model, loop, QUESTIONS[row], 3), *thoughts[:n]]
        vectors += [model.embedding.weight[i] for i in TEXTS[row]]
        expected += list(read(model, vectors)[-len(TEXTS[row]) :])
    torch.testing.assert_close(hidden_AD, torch.stack(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_row_has_its_own_limit(model: GPT, loop: Compressed) -> None:
    latents_BKD, counts = with_names(think(model, loop, QUESTIONS, [2, 0, 5, 1]))
    assert counts == (2, 0, 5, 1)
    for row, question in enumerate(QUESTIONS):
        alone_1KD, (n,) = with_names(think(model, loop, [question], counts[row]))
        assert n == counts[row]
        torch.testing.assert_close(latents_BKD[row, :n], alone_1KD[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_thought_at_all(model: GPT, loop: Compressed) -> None:
    likely = naive(model, loop, QUESTIONS[0], 0)[1][0]
    latents_BKD, counts = with_names(think(model, loop, QUESTIONS[:1], 4, Ending(likely)))
    assert counts == (0,)
    assert latents_BKD.shape == (1, 0, 32)


@torch.no_grad()
def test_draws_have_the_heads_mean_and_deviation(model: GPT, loop: Compressed) -> None:
    bot_1D = read(model, naive_vectors(model, loop, QUESTIONS[0], 3))[-1:]
    mean_1D, log_std_1D = loop.head(bot_1D)
    std = model.embedding.weight.std()
    n, generator = 4000, torch.Generator().manual_seed(0)
    drawn_BKD = think(model, loop, QUESTIONS[:1] * n, 1, Ending(-1, 0.5, generator)).latents_BKD
    in_units_BD = (drawn_BKD[:, 0] / std - mean_1D) / (0.5 * log_std_1D.exp())
    torch.testing.assert_close(in_units_BD.mean(0), torch.zeros(32), atol=5 / n**0.5, rtol=0)
    torch.testing.assert_close(in_units_BD.std(0), torch.ones(32), atol=5 / n**0.5, rtol=0)
    again_BKD = think(model, loop, QUESTIONS[:1] * n, 1, Ending(-1, 0.5, torch.Generator().manual_seed(0))).latents_BKD
    assert torch.equal(again_BKD, drawn_BKD)


@torch.no_grad()
def test_a_constant_in_place_of_the_embeddings_deviation(model: GPT, randomise: Callable[..., None]) -> None:
    own, constant = make_loop(randomise), make_loop(randomise, embedding_std=0.25)
    ours, theirs = (think(model, loop, QUESTIONS, 1).latents_BKD for loop in (own, constant))
    torch.testing.assert_close(ours / model.embedding.weight.std() * 0.25, theirs)


@torch.no_grad()
def test_answers_with_another_compression(model: GPT, loop: Compressed) -> None:
    before = think(model, loop, QUESTIONS, 2).latents_BKD
    assert with_settings(loop, {"compression": 1}) is loop
    after = think(model, loop, QUESTIONS, 2).latents_BKD
    assert not torch.allclose(before, after)
    thoughts, _ = naive(model, loop, QUESTIONS[0], 2)
    torch.testing.assert_close(after[0], torch.stack(thoughts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"merge": "mean"},
            "loop_settings.merge: may not change after training with loop=compressed; must be one of compression",
        ),
        ({"compression": 4}, "latent.compression=4: must be one of latent.compressions=[1, 3, 2]"),
        ({"compression": "2"}, "loop_settings.compression='2': must be a whole number"),
    ],
)
def test_settings_that_may_not_change(loop: Compressed, values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        with_settings(loop, values)
    assert says in str(error.value)


def test_settings_of_other_loops_may_not_change() -> None:
    with pytest.raises(UserError, match=r"loop_settings\.x: .* loop=none; must be left out"):
        with_settings(None, {"x": 1})
    assert with_settings(None, {}) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"compressions": []}, "latent.compressions=[]: must be different whole numbers from 1 to 64, at least one"),
        ({"compressions": [2, 2]}, "latent.compressions=[2, 2]: must be"),
        ({"compressions": [0, 2]}, "latent.compressions=[0, 2]: must be"),
        ({"compressions": [65, 2]}, "latent.compressions=[65, 2]: must be"),
        ({"compressions": ["1", 2]}, "latent.compressions=['1', 2]: must be"),
        ({"compression": 6}, "latent.compression=6: must be one of latent.compressions=[1, 2, 3, 4, 5]"),
        ({"merge": "sum"}, "latent.merge"),
        ({"embedding_std": 0.0}, "latent.embedding_std=0.0: must be above 0, or null"),
        ({"head_width": 0}, "latent.head_width=0: must be at least 1, or null"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        CompressedConfig(**settings)
    assert says in str(error.value)
