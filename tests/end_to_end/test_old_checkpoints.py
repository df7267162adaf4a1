"""Checkpoints that an earlier version wrote (commit 4cecb04, before manifests, data versions and formats) still serve.

`old_checkpoints/` holds, of each mode, the middle and the end of a run of six steps, what that version answered at its
end, and what it thought. Of mode=latent the last state is only decoded (`feeds_last=false`), which that version counted
among its four thoughts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import PROBE, TRAIN, read_lines, run

import simcot_latent as sl

OLD = Path(__file__).parent / "old_checkpoints"

# As they were trained; what is called otherwise now, or has another default, as it is now.
COMMON = (
    "model.n_layer=1", "model.n_embd=8", "model.n_head=1", "device=cpu", "dtype=float32", "target_examples_per_step=8",
    "device_batch_size=8", "data.train_size=64", "data.validation_size=8", "data.test_size=6", "data.version=1",
    "eval_examples=4", "max_new_tokens=12", "num_iterations=6", "checkpoint_every=3", "log_every=1",
    "keep_checkpoints=2", "learning_rate=0.03", "matrix_lr=0.1",
)  # fmt: skip
MODES = {
    "weighted": (),
    "latent": (
        "latent.n_latents=3", "latent.latents_per_step=2", "latent.feeds_last=false", "latent.warmup=0.2",
        "latent.stages=0",
    ),
}  # fmt: skip


@pytest.fixture(params=MODES)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of an old run as it was halfway: `latest` is its third step."""
    folder = Path(shutil.copytree(OLD / request.param, tmp_path / request.param))
    (folder / "latest").symlink_to("step_0000003")
    return folder


def test_it_answers_as_it_did(old: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcome = run("evals.arithmetic", f"ckpt={old}/step_0000006", "device=cpu", f"out={tmp_path}/out", folder=tmp_path)
    outcome.ok()
    assert "holds no manifest.json, so its files are not verified" in caplog.text
    found = read_lines(tmp_path / "out" / "arithmetic.predictions.jsonl")
    wanted = read_lines(old / "predictions.jsonl")
    assert len(found) == 6
    for ours, theirs in zip(found, wanted, strict=True):
        for key in ("question", "gold", "output", "finished"):
            assert ours[key] == theirs[key], "another data version, or another answer"
        # The state that is only decoded is no thought, so an answer takes one less.
        assert ours["n_tokens"] == theirs["n_tokens"] - (old.name == "latent")


def test_it_thinks_as_it_did(tmp_path: Path) -> None:
    checkpoint = sl.load_checkpoint(OLD / "latent" / "step_0000006")
    expected = json.loads((OLD / "latent" / "thoughts.json").read_text())
    thoughts = sl.think(checkpoint, expected["questions"])
    assert (checkpoint.thoughts.n_latents, checkpoint.thoughts.n_states) == (3, 4)
    torch.testing.assert_close(thoughts.latents, torch.tensor(expected["latents"]), atol=1e-5, rtol=1e-5)
    assert len(sl.decode_steps(checkpoint, thoughts)[0]) == 2


def test_it_is_probed(tmp_path: Path) -> None:
    arguments = (f"ckpt={OLD}/latent/step_0000006", "data=arithmetic", "limit=3", "device=cpu")
    outcome = run(PROBE, *arguments, folder=tmp_path).ok()
    assert "V-information" in outcome.out


def test_it_goes_on(old: Path, tmp_path: Path) -> None:
    """From its third step to the weights that the old version came to at its sixth."""
    shutil.move(old / "step_0000006", tmp_path / "end")
    arguments = (f"mode={old.name}", *COMMON, *MODES[old.name], f"out_dir={old}", "resume=true")
    run(TRAIN, *arguments, folder=tmp_path).ok()
    ours, theirs = sl.load_checkpoint(old), sl.load_checkpoint(tmp_path / "end")
    assert ours.step == theirs.step == 6
    for name, weight in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight, atol=1e-5, rtol=1e-4, msg=name)
    losses = [
        [line["loss"] for line in read_lines(x / "metrics.jsonl") if "loss" in line] for x in (old, OLD / old.name)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
