"""How thoughts lie, in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from simcot_latent.probing.geometry import geometry


def test_geometry_in_closed_form() -> None:
    """Corners of a 3-4-5 triangle, twice as large in a second problem; the mean embedding is (0, 8)."""
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    found = geometry(torch.stack((triangle, 2 * triangle)), torch.tensor([[-1.0, 8.0], [1.0, 8.0]]))
    assert found["thought_distance"] == pytest.approx((3 + 4 + 5) / 3 * 1.5)
    assert found["thought_spread"] == pytest.approx((0 + 3 + 4) / 3)
    assert found["thought_norm"] == pytest.approx((0 + 3 + 4 + 0 + 6 + 8) / 6)
    to_mean = [8, math.hypot(3, 8), 4, 8, math.hypot(6, 8), 0]
    assert found["thought_to_embedding"] == pytest.approx(sum(to_mean) / 6)


def test_geometry_of_collapsed_and_of_single_thoughts() -> None:
    same = torch.ones(2, 4, 3)
    assert geometry(same, torch.zeros(5, 3))["thought_distance"] == pytest.approx(0, abs=1e-6)
    assert math.isnan(geometry(same[:, :1], torch.zeros(5, 3))["thought_distance"]), "there is no pair to measure"
    assert geometry(same, torch.zeros(5, 3))["thought_spread"] == pytest.approx(0, abs=1e-6)
    assert math.isnan(geometry(same[:1], torch.zeros(5, 3))["thought_spread"]), "there is no second problem"


def test_rows_with_fewer_thoughts() -> None:
    """What stands in place of thoughts that a row has not makes no pair."""
    generator = torch.Generator().manual_seed(0)
    latents_BKD = torch.randn(3, 4, 5, generator=generator)
    is_there_BK = torch.arange(4) < torch.tensor([4, 1, 2]).unsqueeze(1)
    found = geometry(latents_BKD, torch.zeros(7, 5), is_there_BK)
    rows = [latents_BKD[row, :n] for row, n in enumerate((4, 1, 2))]
    within = [(row[i] - row[j]).norm() for row in rows for i in range(len(row)) for j in range(i)]
    assert found["thought_distance"] == pytest.approx(torch.stack(within).mean().item(), rel=1e-5)
    columns = [[row[k] for row in rows if len(row) > k] for k in range(4)]
    between = [(c[i] - c[j]).norm() for c in columns for i in range(len(c)) for j in range(i)]
    assert found["thought_spread"] == pytest.approx(torch.stack(between).mean().item(), rel=1e-5)
    assert found["thought_norm"] == pytest.approx(torch.cat(rows).norm(dim=-1).mean().item(), rel=1e-5)
