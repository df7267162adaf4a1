"""The benchmarks run, and write what they print."""

from __future__ import annotations

import json
from pathlib import Path

from commands import run


def test_train_step_reports_the_ratio_of_ours_to_the_bound(sums: Path, tmp_path: Path) -> None:
    arguments = (
        f"--data {sums} --sizes S --batch-sizes 2 --thoughts 2 --latents-per-step 1 --repeats 1 --out report.json"
    )
    done = run("benchmarks.train_step", *arguments.split(), folder=tmp_path).ok()
    report = json.loads((tmp_path / "report.json").read_text())
    (row,) = report["rows"]
    assert row["ratio"] == row["ours_s"] / row["bound_s"]
    assert f"{row['ratio']:.2f}" in done.out
    # Two questions of two thoughts each, and two taught steps each; rows of the bound are rounded up, never down.
    assert row["base_tokens"] > 2 * 2
    assert row["base_tokens"] % 2 == 0
    assert row["decoder_tokens"] % 4 == 0
    assert report["threads"] == 1
