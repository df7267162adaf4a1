"""Every reader against some hundred broken files; `python tests/fuzz/run.py` goes on for as long as one likes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import TARGETS, Fuzzed, broken


@pytest.mark.parametrize("name", TARGETS)
def test_broken_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    fuzzed = Fuzzed(name, tmp_path)
    refused = 0

    @settings(deadline=None, max_examples=100, database=None)
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        nonlocal refused
        refused += fuzzed.read(broken(fuzzed.seed, random.Random(seed))) != "read"

    check()
    assert refused or name == "problem", "nothing was broken"
