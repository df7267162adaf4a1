"""The thought loop against a naive one that computes the whole sequence anew for every thought."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT
from simcot_latent.model.thoughts import ThoughtFormat, geometry, go_on, last_real, think

QUESTIONS = [[7, 3, 22, 9, 41, 60], [5, 60], [50, 11, 8, 60]]
ANSWERS = [[59, 1, 2], [59, 13, 40, 6, 2], [59]]


def naive(model: GPT, question: Sequence[int], n_latents: int, after: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The way the published code does it: a list of input vectors, and a whole new pass for each thought.

    Returns:
        Thoughts (K, D), and the hidden states at `after` (A, D).
    """

    def read(vectors: list[Tensor]) -> Tensor:
        return model(embeddings_BTD=torch.stack(vectors).unsqueeze(0))[0]

    vectors = [model.embedding.weight[i] for i in question]
    for _ in range(n_latents):
        vectors.append(read(vectors)[-1])
    vectors += [model.embedding.weight[i] for i in after]
    return torch.stack(vectors[len(question) : len(question) + n_latents]), read(vectors)[-len(after) :]


def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """Rows of ids with padding that would matter, were it seen; and their mask."""
    length = max(map(len, rows))
    ids_BT = torch.full((len(rows), length), 17)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids_BT[i, where] = torch.tensor(row)
        mask_BT[i, where] = True
    return ids_BT, mask_BT


def probe_loss(latents_KD: Tensor, hidden_AD: Tensor) -> Tensor:
    """A scalar in which every number of the thoughts and of the states after them counts, each differently."""
    return (latents_KD.cumsum(0).cos() * latents_KD).sum() + (hidden_AD.cumsum(0).sin() * hidden_AD).sum()


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, of the parameters that the loss depends on; the output head is none of them."""
    named = {name: p for name, p in model.named_parameters() if not name.startswith("head.")}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, expected in theirs.items():
        scale = expected.abs().max().item()
        assert scale > 0, f"{name} has no gradient: the comparison would be empty"
        torch.testing.assert_close(
            ours[name], expected, atol=1e-4 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("n_latents", [1, 2, 5])
@pytest.mark.parametrize(("question", "after"), list(zip(QUESTIONS, ANSWERS, strict=True)))
def test_one_row_equals_the_naive_way(model: GPT, question: list[int], after: list[int], n_latents: int) -> None:
    """Thoughts, what follows them, and the gradients of both into every parameter."""
    thoughts = think(model, torch.tensor([question]), torch.ones(1, len(question), dtype=torch.bool), n_latents)
    assert thoughts.latents.shape == (1, n_latents, 32)
    assert thoughts.cache.length == len(question) + n_latents - 1, "the last thought is not read before go_on"
    hidden_BAD = go_on(model, thoughts, torch.tensor([after]))
    expected_latents, expected_hidden = naive(model, question, n_latents, after)
    torch.testing.assert_close(thoughts.latents[0], expected_latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden_BAD[0], expected_hidden, atol=1e-5, rtol=1e-5)
    assert_same_gradients(
        gradients(probe_loss(thoughts.latents[0], hidden_BAD[0]), model),
        gradients(probe_loss(expected_latents, expected_hidden), model),
    )


@pytest.mark.parametrize("n_latents", [1, 4])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_equals_its_rows(model: GPT, side: str, n_latents: int) -> None:
    """Questions padded on either side, texts after the thoughts padded on the right: forward and gradients."""
    thoughts = think(model, *padded(QUESTIONS, side), n_latents)
    ids_BA, mask_BA = padded(ANSWERS, "right")
    hidden_BAD = go_on(model, thoughts, ids_BA, mask_BA)
    loss, expected_loss = torch.zeros(()), torch.zeros(())
    for row, (question, after) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        expected_latents, expected_hidden = naive(model, question, n_latents, after)
        torch.testing.assert_close(thoughts.latents[row], expected_latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden_BAD[row, : len(after)], expected_hidden, atol=1e-5, rtol=1e-5)
        loss = loss + probe_loss(thoughts.latents[row], hidden_BAD[row, : len(after)])
        expected_loss = expected_loss + probe_loss(expected_latents, expected_hidden)
    assert_same_gradients(gradients(loss, model), gradients(expected_loss, model))


@torch.no_grad()
def test_a_preallocated_cache_thinks_the_same(model: GPT) -> None:
    """Generation's way of thinking is training's."""
    ids_BT, mask_BT = padded(QUESTIONS, "right")
    training = think(model, ids_BT, mask_BT, 3)
    generating = think(model, ids_BT, mask_BT, 3, KVCache(capacity=ids_BT.shape[1] + 3 + 1))
    torch.testing.assert_close(generating.latents, training.latents, atol=1e-5, rtol=1e-5)
    eot_B1 = torch.full((len(QUESTIONS), 1), 59)
    torch.testing.assert_close(go_on(model, generating, eot_B1), go_on(model, training, eot_B1), atol=1e-5, rtol=1e-5)


def test_equals_the_published_coconut(
    shared: Path, make_model: Callable[..., GPT], from_hf_gpt2: Callable[..., dict[str, Tensor]]
) -> None:
    """Thoughts, logits, loss and all gradients as the public Coconut code computed them (its fixtures' README.md)."""
    folder = shared / "fixtures"
    expected = load_file(folder / "coconut_final_stage.safetensors")
    model = make_model("gpt2", vocab_size=128, n_head=2)
    model.load_state_dict(from_hf_gpt2(load_file(folder / "weights_base.safetensors")))

    ids_BT, mask_BT, labels_BT = expected["input_ids"], expected["attention_mask"].bool(), expected["labels"]
    is_thought_T = ids_BT[0] == 127  # they pad on the left, so thoughts stand in the same place in all rows
    first, last = is_thought_T.nonzero()[[0, -1], 0].tolist()
    thoughts = think(model, ids_BT[:, :first], mask_BT[:, :first], n_latents=last + 1 - first)
    logits_BAV = model.logits(go_on(model, thoughts, ids_BT[:, last + 1 :]))
    torch.testing.assert_close(thoughts.latents, expected["latent_vectors"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_BAV, expected["logits"][:, last + 1 :], atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(logits_BAV[:, :-1].flatten(0, 1), labels_BT[:, last + 2 :].flatten())
    torch.testing.assert_close(loss, expected["loss"][0], atol=1e-5, rtol=1e-5)
    loss.backward()
    for name, gradient in from_hf_gpt2(expected, prefix="grad.base.").items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-4)


# Small parts


def test_last_real_position() -> None:
    hidden_BTD = torch.arange(4 * 3.0).view(4, 3, 1)
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]]).bool()
    assert last_real(hidden_BTD, mask_BT).flatten().tolist() == [2, 3, 8, 10]


def test_groups_of_a_thought_format() -> None:
    assert ThoughtFormat(True, n_latents=10, latents_per_step=2).groups == 5
    assert ThoughtFormat().groups == 0


def test_geometry_in_closed_form() -> None:
    """Corners of a 3-4-5 triangle, twice as large in a second problem; the mean embedding is (0, 8)."""
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    found = geometry(torch.stack((triangle, 2 * triangle)), torch.tensor([[-1.0, 8.0], [1.0, 8.0]]))
    assert found["thought_distance"] == pytest.approx((3 + 4 + 5) / 3 * 1.5)
    assert found["thought_norm"] == pytest.approx((0 + 3 + 4 + 0 + 6 + 8) / 6)
    to_mean = [8, math.hypot(3, 8), 4, 8, math.hypot(6, 8), 0]
    assert found["thought_to_embedding"] == pytest.approx(sum(to_mean) / 6)


def test_geometry_of_collapsed_and_of_single_thoughts() -> None:
    same = torch.ones(2, 4, 3)
    assert geometry(same, torch.zeros(5, 3))["thought_distance"] == pytest.approx(0, abs=1e-6)
    assert math.isnan(geometry(same[:, :1], torch.zeros(5, 3))["thought_distance"]), "there is no pair to measure"
