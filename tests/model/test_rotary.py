"""Rotary positions against complex numbers, and the properties that the model relies on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simcot_latent.model.rotary import Rotary

POSITIONS = torch.tensor([0, 1, 5, 2, 100, 5])


def random_heads(tokens: int, heads: int = 3, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(tokens, heads, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "base"), [(8, 10_000.0), (2, 500.0), (16, 3.0)])
def test_equals_a_rotation_of_complex_numbers(width: int, base: float) -> None:
    """Entry i and entry i + E/2 are real and imaginary part, turned by position * base ** (-2i / E)."""
    x_PXE = random_heads(len(POSITIONS), width=width)
    found_PXE = Rotary.at(POSITIONS, width, base)(x_PXE)
    for token, position in enumerate(POSITIONS.tolist()):
        for i in range(width // 2):
            number_X = torch.complex(x_PXE[token, :, i].double(), x_PXE[token, :, i + width // 2].double())
            angle = torch.tensor(position * base ** (-2 * i / width), dtype=torch.double)
            turned_X = number_X * torch.exp(1j * angle)
            torch.testing.assert_close(found_PXE[token, :, i], turned_X.real.float(), atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(found_PXE[token, :, i + width // 2], turned_X.imag.float(), atol=2e-5, rtol=1e-5)


@given(st.integers(0, 100), st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_only_distances_are_seen(first: int, shift: int) -> None:
    """What a query finds in a key depends on how far apart they are, not on where they stand."""
    q_P1E, k_P1E = random_heads(2, heads=1).split(1)

    def score(at_query: int, at_key: int) -> Tensor:
        query, key = (Rotary.at(torch.tensor([at]), 8, 10_000.0) for at in (at_query, at_key))
        return (query(q_P1E) * key(k_P1E)).sum()

    torch.testing.assert_close(score(first + 5, first), score(first + shift + 5, first + shift), atol=1e-4, rtol=1e-4)


def test_lengths_and_the_first_position_stay() -> None:
    """So that queries and keys may be normalised before they are turned as well as after."""
    x_PXE = random_heads(len(POSITIONS))
    found_PXE = Rotary.at(POSITIONS, 8, 10_000.0)(x_PXE)
    torch.testing.assert_close(found_PXE.norm(dim=-1), x_PXE.norm(dim=-1))
    assert torch.equal(found_PXE[0], x_PXE[0])


def test_turning_back() -> None:
    """`turn` is the same without autograd, `turn_back` undoes it."""
    rotary, x_PXE = Rotary.at(POSITIONS, 8, 10_000.0), random_heads(len(POSITIONS))
    assert torch.equal(rotary.turn(x_PXE), rotary(x_PXE))
    torch.testing.assert_close(rotary.turn_back(rotary.turn(x_PXE)), x_PXE)


def test_gradient() -> None:
    """Against differences, in float64; and the input is left as it was."""
    rotary = Rotary.at(POSITIONS, 8, 10_000.0)
    x_PXE = random_heads(len(POSITIONS)).double().requires_grad_()
    before_PXE = x_PXE.detach().clone()
    assert torch.autograd.gradcheck(rotary, x_PXE)
    assert torch.equal(x_PXE, before_PXE)


def test_numbers_keep_their_format() -> None:
    """Turned in float32, as the angle of position 1000 has no meaning in bfloat16, and handed back as they came."""
    positions = torch.tensor([1000, 1001])
    rotary, x_PXE = Rotary.at(positions, 8, 10_000.0), random_heads(2).bfloat16().requires_grad_()
    found_PXE = rotary(x_PXE)
    assert found_PXE.dtype == torch.bfloat16
    torch.testing.assert_close(found_PXE, rotary(x_PXE.float()).bfloat16(), atol=1e-2, rtol=1e-2)
    found_PXE.sum().backward()
    assert x_PXE.grad is not None
    assert x_PXE.grad.dtype == torch.bfloat16
