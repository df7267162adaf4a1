"""loop=sequential against a naive one that computes the whole sequence anew for every thought."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from simcot_latent.loops.base import Thoughts, go_on
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.packing import Packing

QUESTIONS = [[7, 3, 22, 9, 41, 60], [5, 60], [60], [50, 11, 8, 60]]
ANSWERS = [[59, 1, 2], [59, 13, 40, 6, 2], [59], [59, 4]]

LOOP = Sequential(32, SequentialConfig())

gatherings = pytest.mark.parametrize("gathers", [False, True], ids=["ordinary", "gathered"])


def naive(model: GPT, question: Sequence[int], n_latents: int, after: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The way the published code does it: a list of input vectors, and a whole new pass for each thought.

    Returns:
        Thoughts (K, D), and the hidden states at `after` (A, D).
    """

    def read(vectors: list[Tensor]) -> Tensor:
        return model.transformer(torch.stack(vectors).unsqueeze(0))[0]

    vectors = [model.embedding.weight[i] for i in question]
    for _ in range(n_latents):
        vectors.append(read(vectors)[-1])
    vectors += [model.embedding.weight[i] for i in after]
    return torch.stack(vectors[len(question) : len(question) + n_latents]), read(vectors)[-len(after) :]


def embed(model: GPT, *sections: Sequence[Sequence[int]]) -> Tensor:
    """Embeddings of all rows' first section, row by row, then of all rows' second."""
    return model.embedding(torch.tensor([i for rows in sections for row in rows for i in row], dtype=torch.long))


def think_about(model: GPT, questions: Sequence[Sequence[int]], n_latents: int, room: int) -> Thoughts:
    """Questions packed as the loop wants them: what stands before `<bot>`, then the `<bot>` of every row."""
    before, bots = [question[:-1] for question in questions], [question[-1:] for question in questions]
    counts = [n_latents] * len(questions)
    packing = LOOP.pack_questions(list(map(len, before)), counts)
    return LOOP.think(model, embed(model, before, bots), packing, counts, room)


def go_on_with(model: GPT, thoughts: Thoughts, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The hidden states of each row."""
    lengths = list(map(len, texts))
    packing = LOOP.pack_texts(lengths, [1] * len(texts))
    return list(go_on(model, thoughts, embed(model, texts), packing).split(lengths))


def room_for(texts: Sequence[Sequence[int]]) -> int:
    return max(map(len, texts))


def probe_loss(latents_KD: Tensor, hidden_AD: Tensor) -> Tensor:
    """A scalar in which every number of the thoughts and of the states after them counts, each differently."""
    return (latents_KD.cumsum(0).cos() * latents_KD).sum() + (hidden_AD.cumsum(0).sin() * hidden_AD).sum()


def probe_losses(model: GPT, questions: list[list[int]], n_latents: int, answers: list[list[int]]) -> Tensor:
    """That of all rows of a batch."""
    thoughts = think_about(model, questions, n_latents, room_for(answers))
    hidden = go_on_with(model, thoughts, answers)
    losses = [probe_loss(*row) for row in zip(thoughts.latents, hidden, strict=True)]
    return torch.stack(losses).sum()


def naive_losses(model: GPT, questions: list[list[int]], n_latents: int, answers: list[list[int]]) -> Tensor:
    """The same, row by row, the naive way."""
    rows = zip(questions, answers, strict=True)
    return torch.stack([probe_loss(*naive(model, question, n_latents, after)) for question, after in rows]).sum()


@gatherings
@pytest.mark.parametrize("n_latents", [1, 2, 5])
@pytest.mark.parametrize(("question", "after"), list(zip(QUESTIONS, ANSWERS, strict=True)))
def test_one_row_equals_the_naive_way(
    model: GPT,
    assert_equal_gradients: Callable[..., None],
    question: list[int],
    after: list[int],
    n_latents: int,
    gathers: bool,
) -> None:
    """Thoughts, what follows them, and the gradients of both into every parameter."""
    with gathered_gradients(model) if gathers else nullcontext():
        thoughts = think_about(model, [question], n_latents, len(after))
        assert thoughts.latents.shape == (1, n_latents, 32)
        assert thoughts.cache.longest == len(question) + n_latents - 1, "the last thought is not read before go_on"
        (hidden_AD,) = go_on_with(model, thoughts, [after])
    assert thoughts.cache.longest == thoughts.cache.capacity, "room is for what follows the thoughts, to a position"
    expected_latents, expected_hidden = naive(model, question, n_latents, after)
    torch.testing.assert_close(thoughts.latents[0], expected_latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden_AD, expected_hidden, atol=1e-5, rtol=1e-5)
    assert_equal_gradients(
        probe_loss(thoughts.latents[0], hidden_AD), probe_loss(expected_latents, expected_hidden), model
    )


@gatherings
@pytest.mark.parametrize("n_latents", [1, 4])
def test_a_ragged_batch_equals_its_rows(
    model: GPT, assert_equal_gradients: Callable[..., None], n_latents: int, gathers: bool
) -> None:
    """Questions and texts of different lengths, packed: forward and gradients."""
    with gathered_gradients(model) if gathers else nullcontext():
        thoughts = think_about(model, QUESTIONS, n_latents, room_for(ANSWERS))
        hidden = go_on_with(model, thoughts, ANSWERS)
    for latents_KD, hidden_AD, question, after in zip(thoughts.latents, hidden, QUESTIONS, ANSWERS, strict=True):
        expected_latents, expected_hidden = naive(model, question, n_latents, after)
        torch.testing.assert_close(latents_KD, expected_latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden_AD, expected_hidden, atol=1e-5, rtol=1e-5)
    loss = torch.stack([probe_loss(*row) for row in zip(thoughts.latents, hidden, strict=True)]).sum()
    assert_equal_gradients(loss, naive_losses(model, QUESTIONS, n_latents, ANSWERS), model)


@gatherings
@pytest.mark.parametrize("what", ["first thought", "last thought", "last row's text"])
def test_gradients_of_a_part(model: GPT, assert_equal_gradients: Callable[..., None], what: str, gathers: bool) -> None:
    """Of the thoughts of some groups or the texts of some rows alone: passes that lead nowhere change nothing."""
    with gathered_gradients(model) if gathers else nullcontext():
        thoughts = think_about(model, QUESTIONS, 4, room_for(ANSWERS))
        hidden = go_on_with(model, thoughts, ANSWERS)
    alone = [naive(model, question, 4, after) for question, after in zip(QUESTIONS, ANSWERS, strict=True)]
    ours, theirs = {
        "first thought": (thoughts.latents[:, 0], torch.stack([latents_KD[0] for latents_KD, _ in alone])),
        "last thought": (thoughts.latents[:, -1], torch.stack([latents_KD[-1] for latents_KD, _ in alone])),
        "last row's text": (hidden[-1], alone[-1][1]),
    }[what]
    assert_equal_gradients((ours * ours.cumsum(1)).sum(), (theirs * theirs.cumsum(1)).sum(), model)


@torch.no_grad()
def test_thinking_without_gradients_is_the_same(model: GPT) -> None:
    """Generation's way of thinking, which looks at fewer columns and multiplies the other way round, is training's."""
    generating = think_about(model, QUESTIONS, 3, room=1)
    with torch.enable_grad():
        training = think_about(model, QUESTIONS, 3, room=7)
    assert training.latents.requires_grad
    assert not generating.latents.requires_grad
    torch.testing.assert_close(generating.latents, training.latents, atol=1e-5, rtol=1e-5)
    eots = [[59]] * len(QUESTIONS)
    found, expected = go_on_with(model, generating, eots), go_on_with(model, training, eots)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_more_text_than_room(model: GPT) -> None:
    thoughts = think_about(model, QUESTIONS, 2, room=room_for(ANSWERS) - 1)
    with pytest.raises(ValueError, match="a cache of 12 positions cannot hold 13"):
        go_on_with(model, thoughts, ANSWERS)


def test_equals_the_published_coconut(
    reference: Path, make_model: Callable[..., GPT], from_hf_gpt2: Callable[..., dict[str, Tensor]]
) -> None:
    """Thoughts, logits, loss and all gradients as the public Coconut code computed them (tests/reference)."""
    expected = load_file(reference / "coconut_final_stage.safetensors")
    weights = from_hf_gpt2(load_file(reference / "weights_base.safetensors"))
    gradients = from_hf_gpt2(expected, prefix="grad.base.")

    ids_BT, mask_BT, labels_BT = expected["input_ids"], expected["attention_mask"].bool(), expected["labels"]
    is_thought_T = ids_BT[0] == 127  # they pad on the left, so thoughts stand in the same place in all rows
    first, last = is_thought_T.nonzero()[[0, -1], 0].tolist()
    questions = [ids_T[:first][mask_T[:first]].tolist() for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
    texts = ids_BT[:, last + 1 :].tolist()
    assert len({len(question) for question in questions}) == 3, "questions must be ragged for this to prove anything"
    for gathers in (False, True):
        model = make_model("gpt2", vocab_size=128, n_head=2)
        model.load_state_dict(weights)
        with gathered_gradients(model) if gathers else nullcontext():
            thoughts = think_about(model, questions, last + 1 - first, room_for(texts))
            logits_BAV = model.logits(torch.stack(go_on_with(model, thoughts, texts)))
        torch.testing.assert_close(thoughts.latents, expected["latent_vectors"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits_BAV, expected["logits"][:, last + 1 :], atol=1e-5, rtol=1e-5)
        loss = F.cross_entropy(logits_BAV[:, :-1].flatten(0, 1), labels_BT[:, last + 2 :].flatten())
        torch.testing.assert_close(loss, expected["loss"][0], atol=1e-5, rtol=1e-5)
        loss.backward()
        assert len(gradients) == len(list(model.parameters()))
        for name, gradient in gradients.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-4)


# Several graphs


@gatherings
def test_two_micro_batches_in_one_graph(model: GPT, assert_equal_gradients: Callable[..., None], gathers: bool) -> None:
    """Their sum has the sum of their gradients, whether one context gathers both or each has its own."""
    first, second = (QUESTIONS[:2], 3, ANSWERS[:2]), (QUESTIONS[2:], 2, ANSWERS[2:])
    together = naive_losses(model, *first) + naive_losses(model, *second)
    with gathered_gradients(model) if gathers else nullcontext():
        loss = probe_losses(model, *first) + probe_losses(model, *second)
    assert_equal_gradients(loss, together, model)

    apart = torch.zeros(())
    for micro_batch in (first, second):
        with gathered_gradients(model) if gathers else nullcontext():
            apart = apart + probe_losses(model, *micro_batch)
    assert_equal_gradients(apart, naive_losses(model, *first) + naive_losses(model, *second), model)


@gatherings
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_backward_passes_do_not_disturb_each_other(model: GPT, order: tuple[int, int], gathers: bool) -> None:
    """Two graphs that stand side by side, whichever goes first; what they leave in `grad` adds up."""
    micro_batches = (QUESTIONS[:2], 3, ANSWERS[:2]), (QUESTIONS[2:], 2, ANSWERS[2:])
    losses = []
    for micro_batch in micro_batches:
        with gathered_gradients(model) if gathers else nullcontext():
            losses.append(probe_losses(model, *micro_batch))
    for which in order:
        losses[which].backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected_loss = torch.stack([naive_losses(model, *micro_batch) for micro_batch in micro_batches]).sum()
    expected = torch.autograd.grad(expected_loss, [model.get_parameter(name) for name in found])
    for gradient, expected_gradient in zip(found.values(), expected, strict=True):
        scale = expected_gradient.abs().max().item()
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("goes_back", [False, True])
def test_nothing_of_a_training_step_stays(model: GPT, goes_back: bool) -> None:
    """Thoughts, cache and gatherings are freed with the loss, without help of the garbage collector."""

    def step() -> tuple[Tensor, list[weakref.ref]]:
        with gathered_gradients(model):
            thoughts = think_about(model, QUESTIONS, 3, room_for(ANSWERS))
            hidden = go_on_with(model, thoughts, ANSWERS)
            layers = [module for module in model.modules() if getattr(module, "gathering", None) is not None]
            held = [layer.gathering for layer in layers] + [layer.kv for layer in thoughts.cache._layers]
            loss = torch.cat(hidden).square().cumsum(-1).sum() + thoughts.latents.sum()
            return loss, [weakref.ref(x) for x in (*held, thoughts.latents, thoughts.cache)]

    gc.collect()
    gc.disable()
    try:
        loss, held = step()
        assert len(held) == 2 * 4 + 2 + 2, "four linear layers and one buffer a block"
        if goes_back:
            loss.backward()
        del loss
        assert [reference() for reference in held] == [None] * len(held)
    finally:
        gc.enable()


# Small parts


def test_the_last_state_may_be_decoded_only() -> None:
    """It is one more than the thoughts then, of which none is left to read; without any thought there is none."""
    only_decoded = Sequential(32, SequentialConfig(feeds_last=False))
    assert [LOOP.states(n) for n in (0, 1, 6)] == [0, 1, 6]
    assert [only_decoded.states(n) for n in (0, 1, 6)] == [0, 2, 7]
    counts = [2, 0, 7]
    assert LOOP.unread(counts) == [1, 0, 1]
    assert only_decoded.unread(counts) == [0, 0, 0]


def test_attention_in_bfloat16_as_on_a_gpu(model: GPT) -> None:
    """A CPU keeps attention in float32 whatever the autocast; a GPU does not, so all of it is run in bfloat16 here."""
    questions, texts = Packing.of([5, 1, 3], [1, 1, 1]), Packing.of([1, 1, 1], [3, 5, 1])
    generator = torch.Generator().manual_seed(3)
    question_ids, text_ids = (torch.randint(61, (len(p),), generator=generator) for p in (questions, texts))
    found: list[tuple[Tensor, list[Tensor]]] = []
    for dtype in (torch.float32, torch.bfloat16):
        low = model.to(dtype)
        low.zero_grad()
        with gathered_gradients(low):
            thoughts = LOOP.think(low, low.embedding(question_ids), questions, [2] * 3, room=6)
            hidden_AD = go_on(low, thoughts, low.embedding(text_ids[3:]), texts)
        assert hidden_AD.dtype == dtype
        hidden_AD.float().sin().sum().backward()
        found.append((hidden_AD.detach().float(), [p.grad.float() for p in low.parameters() if p.grad is not None]))
    (exact, exact_grads), (rough, rough_grads) = found
    assert (rough - exact).norm() < 0.1 * exact.norm()
    for ours, expected in zip(rough_grads, exact_grads, strict=True):
        assert (ours - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("counts", [(1, 4, 2), (3, 0, 3), (2, 2, 1)], ids=str)
def test_rows_think_as_many_thoughts_as_each_is_to(
    model: GPT, assert_equal_gradients: Callable[..., None], counts: tuple[int, ...]
) -> None:
    """Values and gradients are those of each row alone; what lies beyond a row's thoughts is zero."""
    B, K = len(counts), max(counts)
    questions, answers = QUESTIONS[:B], ANSWERS[:B]
    silent = Packing.of([len(q) - 1 for q in questions], [1] * B)
    texts = LOOP.pack_texts(list(map(len, answers)), counts)
    with gathered_gradients(model):
        x = embed(model, [q[:-1] for q in questions], [q[-1:] for q in questions])
        thoughts = LOOP.think(model, x, silent, counts, room_for(answers))
        hidden_AD = go_on(model, thoughts, embed(model, answers), texts)
    weighed = (hidden_AD * torch.linspace(-1, 1, hidden_AD.numel()).reshape(hidden_AD.shape)).sum()
    weighed = weighed + thoughts.latents.square().sum()
    naive_hidden: list[Tensor] = []
    expected = torch.zeros(())
    for row, count in enumerate(counts):
        assert not thoughts.latents[row, count:].any()
        vectors = model.embedding(torch.tensor(questions[row]))
        if count:
            latents_KD, hidden = naive(model, questions[row], count, answers[row])
            torch.testing.assert_close(thoughts.latents[row, :count], latents_KD, atol=1e-4, rtol=1e-4)
            expected = expected + latents_KD.square().sum()
        else:
            ids = torch.tensor([[*questions[row], *answers[row]]])
            hidden = model(ids)[0, len(vectors) :]
        naive_hidden.append(hidden)
    torch.testing.assert_close(hidden_AD, torch.cat(naive_hidden), atol=1e-4, rtol=1e-4)
    weights = torch.linspace(-1, 1, hidden_AD.numel()).reshape(hidden_AD.shape)
    expected = expected + (torch.cat(naive_hidden) * weights).sum()
    assert_equal_gradients(weighed, expected, model)
    assert [len(packing) for packing in LOOP.passes(counts)] == [sum(n > k for n in counts) for k in range(1, K)]
