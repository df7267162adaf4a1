"""The torture script, a few kills in CI and many with `-m slow`; see torture.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run_process

SCRIPT = str(Path(__file__).with_name("torture.py"))


def tortured(kills: int, kills_of_two_ranks: int, folder: Path, seconds: float) -> None:
    arguments = (f"--kills={kills}", f"--kills-of-two-ranks={kills_of_two_ranks}")
    out = run_process(SCRIPT, *arguments, folder=folder, timeout=seconds).ok().out
    reports = [json.loads(line) for line in out.splitlines()]
    wanted = {(mode, ranks): n for mode in ("weighted", "latent") for n, ranks in ((kills, 1), (kills_of_two_ranks, 2))}
    assert {(report["mode"], report["ranks"]): report["kills"] for report in reports} == wanted


def test_a_few_kills(tmp_path: Path) -> None:
    tortured(1, 1, tmp_path, 280)


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_a_hundred_kills_and_twenty_of_two_ranks(tmp_path: Path) -> None:
    tortured(50, 10, tmp_path, 3900)
