"""loop=pause against one plain pass over [question, <|bot|>, pause x K, <|eot|>, text], row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simcot_latent.checkpoint import Checkpoint, TrainerState, load_checkpoint
from simcot_latent.checkpoint_folders import LOOP
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.generate import generate
from simcot_latent.loops.base import NoSettings, Thoughts, go_on
from simcot_latent.loops.pause import Pause
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.training.saving import save_checkpoint
from simcot_latent.weights import read_tensors

WIDTH = 32
QUESTIONS = [[7, 3, 22, 9, 41, 60], [5, 60], [60], [50, 11, 8, 60]]
TEXTS = [[59, 1, 2], [59, 13, 40, 6, 2], [59], [59, 4]]

gatherings = pytest.mark.parametrize("gathers", [False, True], ids=["ordinary", "gathered"])


@pytest.fixture
def loop() -> Pause:
    """One whose vector is as large as hidden states are, so that it matters."""
    loop = Pause(WIDTH, NoSettings())
    with torch.no_grad():
        loop.pause_D.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(5)))
    return loop


def naive(model: GPT, loop: Pause, question: Sequence[int], count: int, text: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One row alone in a single pass without a cache.

    Returns:
        The hidden states at the pauses (K, D), and those at the text (A, D).
    """
    table = model.embedding.weight
    vectors = [*(table[i] for i in question), *[loop.pause_D] * count, *(table[i] for i in text)]
    hidden_TD = model.transformer(torch.stack(vectors).unsqueeze(0))[0]
    return hidden_TD[len(question) : len(question) + count], hidden_TD[len(question) + count :]


def embed(model: GPT, *sections: Sequence[Sequence[int]]) -> Tensor:
    """Embeddings of all rows' first section, row by row, then of all rows' second."""
    return model.embedding(torch.tensor([i for rows in sections for row in rows for i in row], dtype=torch.long))


def think_about(
    model: GPT,
    loop: Pause,
    questions: Sequence[Sequence[int]],
    counts: Sequence[int],
    texts: Sequence[Sequence[int]],
    tight: bool = False,
) -> tuple[Thoughts, list[Tensor]]:
    """A batch as training has it: its thoughts, and the hidden states at each row's text."""
    before, bots = [question[:-1] for question in questions], [question[-1:] for question in questions]
    lengths = list(map(len, texts))
    packing = loop.pack_questions(list(map(len, before)), counts, tight)
    thoughts = loop.think(model, embed(model, before, bots), packing, counts, max(lengths))
    hidden_AD = go_on(model, thoughts, embed(model, texts), loop.pack_texts(lengths, counts))
    return thoughts, list(hidden_AD.split(lengths))


def probe_loss(latents_KD: Tensor, hidden_AD: Tensor) -> Tensor:
    """A scalar in which every number of the thoughts and of the states after them counts, each differently."""
    return (latents_KD.cumsum(0).cos() * latents_KD).sum() + (hidden_AD.cumsum(0).sin() * hidden_AD).sum()


def what_learns(model: GPT, loop: Pause) -> nn.Module:
    """All but an output head of its own, which hidden states do not know."""
    return nn.ModuleList([model.embedding, model.transformer, loop])


@gatherings
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("question", "text"), list(zip(QUESTIONS, TEXTS, strict=True)))
def test_one_row_is_one_plain_pass(
    model: GPT,
    loop: Pause,
    assert_equal_gradients: Callable[..., None],
    question: list[int],
    text: list[int],
    count: int,
    gathers: bool,
) -> None:
    """Thoughts, what follows them, and the gradients of both into every parameter, the vector's among them."""
    with gathered_gradients(model, loop) if gathers else nullcontext():
        thoughts, (hidden_AD,) = think_about(model, loop, [question], [count], [text])
    assert thoughts.latents.shape == (1, count, WIDTH)
    assert thoughts.unread_RD is None, "the question's pass has read them all"
    assert thoughts.cache.longest == thoughts.cache.capacity, "room is for what follows the thoughts, to a position"
    latents_KD, expected_AD = naive(model, loop, question, count, text)
    torch.testing.assert_close(thoughts.latents[0], latents_KD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden_AD, expected_AD, atol=1e-5, rtol=1e-5)
    ours, theirs = probe_loss(thoughts.latents[0], hidden_AD), probe_loss(latents_KD, expected_AD)
    assert_equal_gradients(ours, theirs, what_learns(model, loop))


@gatherings
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("counts", [(3, 3, 3, 3), (1, 4, 2, 1), (0, 3, 0, 2), (2, 0, 5, 5)], ids=str)
def test_a_batch_is_its_rows(
    model: GPT,
    loop: Pause,
    assert_equal_gradients: Callable[..., None],
    counts: tuple[int, ...],
    tight: bool,
    gathers: bool,
) -> None:
    """Questions and texts of different lengths, as many thoughts as each row is to have, some none: values and
    gradients are those of each row alone, and what lies beyond a row's thoughts is zero."""
    with gathered_gradients(model, loop) if gathers else nullcontext():
        thoughts, hidden = think_about(model, loop, QUESTIONS, counts, TEXTS, tight)
    assert thoughts.latents.shape == (len(counts), max(counts), WIDTH)
    ours, theirs = torch.zeros(()), torch.zeros(())
    for row, (count, question, text) in enumerate(zip(counts, QUESTIONS, TEXTS, strict=True)):
        latents_KD, expected_AD = naive(model, loop, question, count, text)
        torch.testing.assert_close(thoughts.latents[row, :count], latents_KD, atol=1e-5, rtol=1e-5)
        assert not thoughts.latents[row, count:].any()
        torch.testing.assert_close(hidden[row], expected_AD, atol=1e-5, rtol=1e-5)
        ours = ours + probe_loss(thoughts.latents[row], hidden[row])
        theirs = theirs + probe_loss(torch.cat((latents_KD, torch.zeros(max(counts) - count, WIDTH))), expected_AD)
    assert_equal_gradients(ours, theirs, what_learns(model, loop))


def test_rows_that_have_no_thoughts(model: GPT, loop: Pause) -> None:
    """As in a micro-batch of the stage without any, among others."""
    thoughts, hidden = think_about(model, loop, QUESTIONS, [0] * 4, TEXTS)
    assert thoughts.latents.shape == (4, 0, WIDTH)
    for question, text, hidden_AD in zip(QUESTIONS, TEXTS, hidden, strict=True):
        torch.testing.assert_close(hidden_AD, naive(model, loop, question, 0, text)[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_thinking_without_gradients_is_the_same(model: GPT, loop: Pause) -> None:
    generating, found = think_about(model, loop, QUESTIONS, [3] * 4, TEXTS)
    with torch.enable_grad():
        training, expected = think_about(model, loop, QUESTIONS, [3] * 4, TEXTS)
    assert training.latents.requires_grad
    assert not generating.latents.requires_grad
    torch.testing.assert_close(generating.latents, training.latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_all_in_one_pass(loop: Pause) -> None:
    """Every thought is read, with the question, and none comes to a state beyond it."""
    counts = [2, 0, 3]
    questions = loop.pack_questions([4, 1, 0], counts)
    assert questions.length_B.tolist() == [4 + 1 + 2, 1 + 1 + 0, 0 + 1 + 3]
    assert loop.passes(counts) == []
    assert loop.unread(counts) == [0, 0, 0]
    assert [loop.states(n) for n in (0, 1, 6)] == [0, 1, 6]
    assert loop.pack_texts([3, 1, 2], counts).length_B.tolist() == [3, 1, 2]
    assert questions.rectangles == ((3, 7),)
    assert loop.pack_questions([40, 1, 0], counts, tight=True).rectangles == ((1, 43), (2, 4))


def test_the_vector_starts_as_an_embedding_does() -> None:
    torch.manual_seed(0)
    pause_D = Pause(4096, NoSettings()).pause_D
    assert pause_D.requires_grad
    assert pause_D.std().item() == pytest.approx(0.02, rel=0.1)


# Checkpoints


def ending_checkpoint(make_model: Callable[..., GPT], tokenizer: Tokenizer, loop: Pause) -> Checkpoint:
    """Of a model that ends its answers now sooner, now later."""
    model = make_model("gpt2", vocab_size=tokenizer.n_vocab, seed=61)
    with torch.no_grad():
        model.embedding.weight[tokenizer.end_id] *= 8
    loop = loop.eval()
    return Checkpoint(
        model, None, tokenizer, {}, answers=AnswerFormat(thinks=True), loop=loop, stage=Stage(4, first_written=None)
    )


QUESTIONS_IN_WORDS = ["How many?", "Ann has 3 pears and eats 2 of them. How many are left?", "2+2?", "Half of 30?"]


@torch.no_grad()
def test_answers_equal_a_naive_greedy_loop(make_model: Callable[..., GPT], tokenizer: Tokenizer, loop: Pause) -> None:
    """In a batch, with a cache, against one question at a time with a whole new pass a token."""
    checkpoint, most = ending_checkpoint(make_model, tokenizer, loop), 12
    model = checkpoint.model
    found = generate(checkpoint, QUESTIONS_IN_WORDS, most)
    for question, generation in zip(QUESTIONS_IN_WORDS, found, strict=True):
        prompt, written = [*tokenizer.encode(question), tokenizer.bot_id], list[int]()
        while len(written) < most and tokenizer.end_id not in written:
            hidden_AD = naive(model, loop, prompt, 4, [tokenizer.eot_id, *written])[1]
            written.append(int(model.logits(hidden_AD[-1]).argmax()))
        assert generation.text == tokenizer.decode(written)
        assert generation.n_tokens == 4 + len(written)
        latents_KD = naive(model, loop, prompt, 4, [tokenizer.eot_id])[0]
        torch.testing.assert_close(generation.latents_KD, latents_KD, atol=1e-5, rtol=1e-5)
    assert len({generation.n_tokens for generation in found}) > 1, "too much alike to prove anything"


def test_a_saved_checkpoint_answers_the_same(
    tmp_path: Path, make_model: Callable[..., GPT], tokenizer: Tokenizer, loop: Pause
) -> None:
    """It holds the loop by its key, and the vector in a file of its own."""
    saved = ending_checkpoint(make_model, tokenizer, loop)
    folder = save_checkpoint(saved, tmp_path, TrainerState({}, {}), keep=1)
    loaded = load_checkpoint(folder)
    assert isinstance(loaded.loop, Pause)
    assert loaded.loop.key == "pause"
    assert not loaded.loop.training
    assert torch.equal(loaded.loop.pause_D, loop.pause_D)
    assert read_tensors(folder / LOOP).keys() == {"pause_D"}
    assert (loaded.stage, loaded.answers, loaded.n_states) == (saved.stage, saved.answers, 4)
    found, expected = generate(loaded, QUESTIONS_IN_WORDS, 12), generate(saved, QUESTIONS_IN_WORDS, 12)
    assert found == expected
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.latents_KD is not None
        assert theirs.latents_KD is not None
        assert torch.equal(ours.latents_KD, theirs.latents_KD)
    other = generate(replace(loaded, loop=Pause(WIDTH, NoSettings())), QUESTIONS_IN_WORDS, 12)
    assert other != expected, "the vector must matter for this to prove anything"


def test_a_checkpoint_without_its_vector_is_refused(
    tmp_path: Path, make_model: Callable[..., GPT], tokenizer: Tokenizer, loop: Pause
) -> None:
    """A new one in its place would answer, and wrongly."""
    folder = save_checkpoint(ending_checkpoint(make_model, tokenizer, loop), tmp_path, TrainerState({}, {}), keep=1)
    (folder / LOOP).unlink()
    for verify in (True, False):
        with pytest.raises(UserError, match=LOOP):
            load_checkpoint(folder, verify=verify)
