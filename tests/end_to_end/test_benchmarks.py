"""The benchmarks run, and write what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import run


def measure(name: str, arguments: str, folder: Path) -> tuple[dict[str, Any], str]:
    """The report that a benchmark writes, and what it prints."""
    done = run(f"benchmarks.{name}", *arguments.split(), "--out", "report.json", folder=folder).ok()
    return json.loads((folder / "report.json").read_text()), done.out


def test_a_latent_step_against_its_bound_and_its_peer(sums: Path, tmp_path: Path) -> None:
    arguments = f"--data {sums} --batch-sizes 2 --thoughts 2 --latents-per-step 1 --repeats 1 --peers"
    report, out = measure("train_step", arguments, tmp_path)
    (row,) = report["rows"]
    assert row["ratio"] == row["ours_s"] / row["bound_s"]
    assert row["peer_to_ours"] == row["peer_s"] / row["ours_s"]
    assert f"{row['ratio']:.2f}" in out
    assert 0 < row["products_to_bound"] == row["products_s"] / row["bound_s"] < row["ratio"]
    # Two questions of two thoughts each, and two taught steps each; rows of the bound are rounded up, never down.
    assert row["base_tokens"] > 2 * 2
    assert row["base_tokens"] % 2 == 0
    assert row["decoder_tokens"] % 4 == 0
    assert report["threads"] == 1
    assert report["versions"]["torch"]


def test_a_bfloat16_step_against_its_bound_and_float32(sums: Path, tmp_path: Path) -> None:
    arguments = f"--data {sums} --batch-sizes 2 --thoughts 2 --latents-per-step 1 --repeats 1 --dtype bfloat16"
    report, out = measure("train_step", arguments, tmp_path)
    (row,) = report["rows"]
    assert row["float32_to_ours"] == row["float32_s"] / row["ours_s"]
    assert f"{row['float32_to_ours']:.2f}" in out
    assert report["dtype"] == "bfloat16"


def test_a_weighted_step(sums: Path, tmp_path: Path) -> None:
    report, _ = measure("train_step", f"--data {sums} --mode weighted --batch-sizes 2 --repeats 1 --peers", tmp_path)
    (row,) = report["rows"]
    assert row["decoder_tokens"] == 0
    assert row["peer_s"] > 0
    assert "products_s" not in row, "a model without thoughts"


def test_generation(sums: Path, tmp_path: Path) -> None:
    arguments = f"--data {sums} --questions 4 --batch-size 2 --thoughts 2 --answer-tokens 2"
    report, out = measure("generate", f"{arguments} --written-tokens 3 --repeats 1", tmp_path)
    assert [row["way"] for row in report["rows"]] == ["latent", "written"]
    for row in report["rows"]:
        assert row["speedup"] == pytest.approx(row["ours_per_s"] / row["peer_per_s"])
        assert f"{row['speedup']:.2f}x" in out
    assert report["written_to_latent_tokens"] == 3 / 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_memory(sums: Path, tmp_path: Path) -> None:
    report, _ = measure("memory", f"--data {sums} --batch-sizes 2 --thoughts 2 --latents-per-step 1", tmp_path)
    (row,) = report["rows"]
    assert 0 < row["ours_step_mb"] < row["ours_peak_mb"]
    assert row["ratio_step_mb"] == row["ours_step_mb"] / row["padded_step_mb"]


def test_lora(sums: Path, tmp_path: Path) -> None:
    report, out = measure("lora", f"--data {sums} --size S --batch-size 2 --thoughts 2 --repeats 1", tmp_path)
    rows = {row["side"]: row for row in report["rows"]}
    assert list(rows) == ["whole", "lora", "no dropout", "not frozen"]
    assert rows["lora"]["trained"] == rows["not frozen"]["trained"] < rows["whole"]["trained"]
    assert rows["no dropout"]["gradients_mb"] == pytest.approx(4e-6 * rows["lora"]["trained"])
    assert rows["no dropout"]["gradients_mb"] < rows["not frozen"]["gradients_mb"]
    assert f"{rows['lora']['to_whole']:.2f}" in out


def test_a_step_of_each_method_against_its_bound(sums: Path, tmp_path: Path) -> None:
    """Tokens are those of all passes: of PCCoT's three iterations more than of CODI's six thoughts."""
    arguments = f"--data {sums} --size S --batch-size 2 --repeats 1 --methods cot simcot_coconut codi pccot colar"
    report, out = measure("method_steps", arguments, tmp_path)
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == ["cot", "simcot_coconut", "codi", "pccot", "colar"]
    assert rows["pccot"]["base_tokens"] == rows["codi"]["base_tokens"] + 2 * (4 * 24 - 6)
    assert [rows[name]["passes"] for name in ("cot", "codi", "pccot", "colar")] == [1, 7, 5, 1]
    assert [name for name, row in rows.items() if row["decoder_tokens"]] == ["simcot_coconut"]
    for row in rows.values():
        assert row["ratio"] == row["ours_s"] / row["bound_s"]
        assert f"{row['ratio']:.2f}" in out


@pytest.mark.slow
def test_what_methods_learn(tmp_path: Path) -> None:
    """Two runs side by side; a second command takes what the first has left, and trains nothing."""
    tiny = "data.train_size=64 data.validation_size=8 data.test_size=8 model.n_layer=1 model.n_embd=32 model.n_head=2"
    arguments = f"--methods cot coconut --seeds 3 --minutes 0.02 --cores 0 0 --out-dir runs {tiny}"
    report, out = measure("methods", arguments, tmp_path)
    assert [row["method"] for row in report["rows"]] == ["cot", "coconut"]
    assert all(row["steps"] >= 120 and len(row["accuracies"]) == 1 for row in report["rows"])
    assert report["rows"][0]["passes_per_answer"] == report["rows"][0]["tokens_per_answer"]
    assert "simcot_latent.train method=coconut seed=3" in out
    again, out = measure("methods", arguments, tmp_path)
    assert again["rows"] == report["rows"]
    assert "simcot_latent.train" not in out
