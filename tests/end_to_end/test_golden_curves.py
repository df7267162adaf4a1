"""Golden loss curves: an optimisation or a refactor must give the same losses, step by step.

They are recordings of ourselves, so they say nothing about right or wrong; other tests do. A change that is *meant* to
change the numbers records them anew, with `python tests/end_to_end/test_golden_curves.py`, and says why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
from commands import TRAIN, read_lines, run

GOLDEN = Path(__file__).parent / "golden"
KEYS = ("loss", "answer_loss", "step_loss", "grad_norm")

# All three kinds of stage are met in 30 steps: written steps, some steps replaced, all replaced. Two micro-batches a
# step, so that what is normalised over the whole step is seen to be.
COMMON = (
    # What they were recorded with; defaults have changed since.
    "data.version=1",
    "learning_rate=0.003",
    "matrix_lr=0.02",
    "data.train_size=512",
    "data.validation_size=8",
    "device=cpu",
    "dtype=float32",
    "num_iterations=30",
    "device_batch_size=16",
    "eval_every=-1",
    "eval_examples=8",
    "max_new_tokens=8",
    "log_every=1",
)
MODES = {
    "weighted": (),
    "latent": ("latent.n_latents=4", "latent.missing=mask", "latent.warmup=0.2", "latent.stages=0.3"),
}

# One thread against two, and one run against another, differ by 2e-7; other processors' kernels add up in other orders.
RELATIVE_TOLERANCE = 1e-4


def curve(mode: str, folder: Path, *more: str) -> list[dict[str, float]]:
    """The losses of a fresh run, one row a step."""
    run(TRAIN, f"mode={mode}", *COMMON, *MODES[mode], *more, "out_dir=run", folder=folder).ok()
    rows = [row for row in read_lines(folder / "run" / "metrics.jsonl") if "loss" in row]
    return [{"step": row["step"]} | {key: row[key] for key in KEYS if key in row} for row in rows]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id=""),
        pytest.param(["activation_checkpointing=true"], id="checkpointing", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_losses_are_the_recorded_ones(mode: str, more: list[str], tmp_path: Path) -> None:
    golden = read_lines(GOLDEN / f"{mode}.jsonl")
    assert len(golden) == 30
    for ours, recorded in zip(curve(mode, tmp_path, *more), golden, strict=True):
        assert ours == pytest.approx(recorded, rel=RELATIVE_TOLERANCE), f"step {recorded['step']}"


if __name__ == "__main__":
    for name in sys.argv[1:] or MODES:
        with tempfile.TemporaryDirectory() as scratch:
            rows = curve(name, Path(scratch))
        (GOLDEN / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
