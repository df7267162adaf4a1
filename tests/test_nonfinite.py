"""Steps that are not finite: noticed when looked for, counted, kept; weights that are no model any more."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from simcot_latent.data.problem import Problem
from simcot_latent.distributed import Ranks
from simcot_latent.training.nonfinite import LOOK_EVERY, MOST_BATCHES, NonFinite, save_batch
from simcot_latent.weights import broken_weights

NUMBERS = st.sampled_from([0.0, -3.5, 1e30, math.nan, math.inf, -math.inf])


@given(st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=6), max_size=6))
def test_counts_do_not_depend_on_when_one_looks(looks: list[list[tuple[float, float]]]) -> None:
    watch, step, found = NonFinite(Ranks()), 0, []
    for steps in looks:
        for loss, norm in steps:
            step += 1
            watch.add(step, torch.tensor(loss), torch.tensor(norm))
        found += [bad for bad, *_ in watch.look()]
    every = [pair for steps in looks for pair in steps]
    bad = [not all(map(math.isfinite, pair)) for pair in every]
    assert found == [i for i, is_bad in enumerate(bad, start=1) if is_bad]
    in_a_row = next((i for i, is_bad in enumerate(reversed(bad)) if not is_bad), len(bad))
    assert watch.state == (sum(bad), in_a_row)
    assert NonFinite(Ranks(), watch.state).state == watch.state


def test_what_is_found_says_the_numbers() -> None:
    watch = NonFinite(Ranks())
    watch.add(4, torch.tensor(2.5), torch.tensor(math.inf))
    assert watch.look() == [(4, 2.5, math.inf)]
    assert watch.look() == []


def test_a_cpu_is_looked_at_after_every_step_and_a_device_now_and_then() -> None:
    watch = NonFinite(Ranks())
    assert not watch.is_due
    watch.add(1, torch.tensor(1.0), torch.tensor(1.0))
    assert watch.is_due
    elsewhere = NonFinite(Ranks())
    for step in range(LOOK_EVERY):
        assert not elsewhere.is_due
        elsewhere.add(step, torch.tensor(1.0, device="meta"), torch.tensor(1.0, device="meta"))
    assert elsewhere.is_due


def test_batches_are_kept_up_to_a_number(tmp_path: Path, problems: list[Problem]) -> None:
    for step in range(MOST_BATCHES):
        assert save_batch(tmp_path, step, math.nan, 1.0, [1, 0], problems) is not None
    assert save_batch(tmp_path, MOST_BATCHES, math.nan, 1.0, [1, 0], problems) is None
    assert save_batch(tmp_path, 3, math.nan, 1.0, [0], problems) is not None  # the same step once more
    kept = json.loads((tmp_path / "nonfinite/step_0000004.json").read_text())
    assert [row["index"] for row in kept["problems"]] == [1, 0]
    assert kept["problems"][1]["question"] == problems[0].question


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e30])
def test_broken_weights_are_named(number: float) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert broken_weights(module.named_parameters()) == []
    with torch.no_grad():
        next(module[1].parameters())[1, 2] = number
    assert broken_weights(module.named_parameters()) == ["1.weight"]
