"""Muon against its definition, and which optimizer has which parameter."""

from __future__ import annotations

import pytest
import torch

from simcot_latent.optimizer import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)], ids=["square", "wide", "tall"])
def test_orthogonalise_keeps_directions_and_levels_singular_values(shape: tuple[int, int, int]) -> None:
    """Against the singular value decomposition: x = U S V becomes U S' V with all of S' near 1."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ orthogonalise(x) @ vh.mT
    levelled = values.diagonal(dim1=1, dim2=2)
    assert levelled.max() < 1.3
    assert levelled.min() > 0.3
    assert (values - torch.diag_embed(levelled)).abs().max() < 1e-4


def test_a_zero_matrix_stays_zero() -> None:
    assert orthogonalise(torch.zeros(1, 4, 6)).abs().max() == 0


def test_matrices_are_updated_as_if_alone() -> None:
    """Batching matrices of one shape changes nothing, to float tolerance; a matrix without a gradient stays."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    gradients = [[torch.randn(6, 4, generator=generator) for _ in range(2)] for _ in range(3)]

    def trained(groups: list[list[int]]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(x.clone()) for x in start]
        idle = torch.nn.Parameter(torch.ones(6, 4))
        for group in groups:
            optimizer = Muon([*(parameters[i] for i in group), idle], lr=0.1, weight_decay=0.1)
            for step in range(3):
                for i in group:
                    parameters[i].grad = gradients[step][i % 2].clone()
                optimizer.step()
        assert torch.equal(idle, torch.ones(6, 4))
        return [p.detach() for p in parameters]

    for together, alone in zip(trained([[0, 1, 2]]), trained([[0], [1], [2]]), strict=True):
        torch.testing.assert_close(together, alone)


def test_one_step_by_the_formula() -> None:
    """The first step: weight decay, then the orthogonalised gradient, tall matrices scaled by sqrt(rows / columns)."""
    generator = torch.Generator().manual_seed(2)
    weight, gradient = torch.randn(8, 2, generator=generator), torch.randn(8, 2, generator=generator)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    expected = weight * (1 - 0.1 * 0.5) - 0.1 * 2.0 * orthogonalise(gradient.unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(parameter.detach(), expected)
