"""Shares of a loss: against formulas, against PyTorch's own cross-entropy, and added up again."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simcot_latent.losses import Targets, add_up, cross_entropy, share

ROWS, LENGTH, WIDTH, VOCAB = 3, 6, 8, 11


def make_targets() -> Targets:
    """Labels at positions 1-3 of row 0, none in row 1, 0-4 of row 2."""
    ids_BT = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    rows = [
        (1, [4, 5, 6], [1.0, 2.0, 2.0], [False, True, True]),
        (0, [], [], []),
        (0, [7, 8, 9, 10, 0], [1.0, 2.0, 0.5, 1.0, 1.0], [False, True, True, False, False]),
    ]
    return Targets.from_rows(rows, ids_BT)


def hidden_and_table() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=generator)
    return hidden.requires_grad_(), torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()


def test_targets_lie_where_their_rows_say() -> None:
    targets = make_targets()
    assert targets.index_M.tolist() == [1, 2, 3, 12, 13, 14, 15, 16]
    assert targets.label_M.tolist() == [4, 5, 6, 7, 8, 9, 10, 0]
    assert targets.weight_M.tolist() == [1, 2, 2, 1, 2, 0.5, 1, 1]
    assert targets.step_M.tolist() == [False, True, True, False, True, True, False, False]


def test_cross_entropy_equals_pytorch_over_the_padded_batch() -> None:
    """The same numbers as logits everywhere with ignored labels, though logits are computed at 8 of 18 positions."""
    targets = make_targets()
    hidden, table = hidden_and_table()
    asked: list[int] = []

    def logits_of(states: Tensor) -> Tensor:
        asked.append(len(states))
        return states @ table.T

    loss_M, correct_M = cross_entropy(hidden, targets, logits_of)
    assert asked == [8]
    labels_BT = torch.full((ROWS * LENGTH,), -100)
    labels_BT[targets.index_M] = targets.label_M
    everywhere = F.cross_entropy((hidden @ table.T).flatten(0, 1), labels_BT, reduction="none")
    torch.testing.assert_close(loss_M, everywhere[targets.index_M])
    most_likely = (hidden @ table.T).argmax(-1).flatten()[targets.index_M]
    assert correct_M.tolist() == (most_likely == targets.label_M).tolist()
    assert not correct_M.requires_grad


def test_the_weighted_loss_in_closed_form() -> None:
    """sum(w * ce) / sum(w), and its gradient w * (softmax - onehot) / sum(w)."""
    targets = make_targets()
    logits = torch.randn(ROWS, LENGTH, VOCAB, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss_M, _ = cross_entropy(logits, targets, lambda states: states)
    loss = share(loss_M * targets.weight_M, targets.weight_M.sum())
    total = 0.0
    expected_gradient = torch.zeros(ROWS * LENGTH, VOCAB)
    for at, label, weight in zip(
        targets.index_M.tolist(), targets.label_M.tolist(), targets.weight_M.tolist(), strict=True
    ):
        scores = logits.flatten(0, 1)[at].tolist()
        exponentials = [math.exp(score) for score in scores]
        total += weight * (math.log(sum(exponentials)) - scores[label])
        probabilities = torch.tensor([e / sum(exponentials) for e in exponentials])
        expected_gradient[at] = weight * (probabilities - F.one_hot(torch.tensor(label), VOCAB)) / 10.5
    assert loss.item() == pytest.approx(total / 10.5, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient.flatten(0, 1), expected_gradient, atol=1e-6, rtol=1e-5)


@given(st.lists(st.floats(-5, 5, width=32), max_size=30), st.lists(st.integers(0, 30), max_size=5))
@settings(deadline=None)
def test_shares_add_up(values: list[float], cuts: list[int]) -> None:
    """Any cut of the labels of a step gives pieces whose shares add up to the whole's."""
    values_M, total = torch.tensor(values), torch.tensor(7.5)
    pieces = torch.tensor_split(values_M, sorted(cuts))
    added = add_up([{"loss": share(piece, total)} for piece in pieces])["loss"]
    assert added.item() == pytest.approx(math.fsum(values) / 7.5, abs=1e-5)


def test_an_empty_share_is_zero_with_a_zero_gradient() -> None:
    """No label of a kind in a whole step: nothing is lost, and no nan gets into the model."""
    hidden, table = hidden_and_table()
    nothing = Targets.from_rows([(0, [], [], [])] * ROWS, torch.zeros(ROWS, LENGTH))
    loss_M, correct_M = cross_entropy(hidden, nothing, lambda states: states @ table.T)
    assert loss_M.shape == correct_M.shape == (0,)
    loss = share(loss_M * nothing.weight_M, nothing.weight_M.sum())
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (hidden, table)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_labels_that_all_weigh_nothing_are_zero_too() -> None:
    """step_weight_multiplier=0 on nothing but steps: 0 / 0 is no loss, not nan."""
    values_M = torch.tensor([1.5, 2.5], requires_grad=True)
    loss = share(values_M * 0, torch.tensor(0.0))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, values_M)[0].tolist() == [0, 0]


def test_add_up_by_key() -> None:
    parts = [{"a": torch.tensor(1.0), "b": torch.tensor([1.0, 2.0])}, {"a": torch.tensor(0.5), "b": torch.ones(2)}]
    added = add_up(parts)
    assert added["a"].item() == 1.5
    assert added["b"].tolist() == [2, 3]
