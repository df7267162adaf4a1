"""Whether a collapse of thoughts is noticed. What `validate` measures is tested where runs are."""

import math

import pytest

from simcot_latent.validation import collapse

HEALTHY = {"val_accuracy": 0.5, "thought_distance": 5.0, "thought_spread": 4.0, "thought_norm": 10.0}


def test_healthy_thoughts_and_none_at_all() -> None:
    assert collapse(HEALTHY) is None
    assert collapse({"val_accuracy": 0.5}) is None
    assert collapse(HEALTHY | {"thought_distance": math.nan, "thought_spread": math.nan}) is None, "no pair to measure"


@pytest.mark.parametrize(
    ("key", "words"), [("thought_distance", "between thoughts of a problem"), ("thought_spread", "between problems")]
)
def test_collapsed_thoughts(key: str, words: str) -> None:
    assert collapse(HEALTHY | {key: 1.001}) is None
    found = collapse(HEALTHY | {key: 0.999})
    assert found is not None
    for part in (words, "1.00", "10.00", "loss.step_weight"):
        assert part in found
