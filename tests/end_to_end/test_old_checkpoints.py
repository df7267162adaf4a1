"""Checkpoints that earlier versions wrote still serve.

`old_checkpoints/` holds the middle and the end of runs of six steps, what the version that made them answered at their
end, and what it thought:

    weighted, latent  of each mode, commit 4cecb04, before manifests, data versions and formats (format 1)
    format_2          of mode=latent, commit 401302a, where a projector was a part of the model

Of those that think, the last state is only decoded (`feeds_last=false`), which format 1 counted among its four
thoughts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from commands import PROBE, TRAIN, predictions_of, read_lines, report_in, run
from safetensors.torch import load_file

import simcot_latent as sl
from simcot_latent.checkpoint import write_checkpoint
from simcot_latent.loops.sequential import Sequential, SequentialConfig

OLD = Path(__file__).parent / "old_checkpoints"

# As they were trained; what is called otherwise now, or has another default, as it is now.
COMMON = (
    "model.n_layer=1", "model.n_embd=8", "model.n_head=1", "device=cpu", "dtype=float32", "target_examples_per_step=8",
    "device_batch_size=8", "data.train_size=64", "data.validation_size=8", "data.test_size=6", "data.version=1",
    "eval_examples=4", "max_new_tokens=12", "num_iterations=6", "checkpoint_every=3", "log_every=1",
    "keep_checkpoints=2", "learning_rate=0.03", "matrix_lr=0.1",
)  # fmt: skip
LATENT = (
    "mode=latent", "latent.n_latents=3", "latent.latents_per_step=2", "latent.feeds_last=false", "latent.missing=mask",
    "latent.warmup=0.2", "latent.stages=0",
)  # fmt: skip
RUNS = {
    "weighted": ("mode=weighted",),
    "latent": LATENT,
    "format_2": (*LATENT, "latent.projector_width=8"),
}
THINKING = ["latent", "format_2"]


@pytest.fixture(params=RUNS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of an old run as it was halfway: `latest` is its third step."""
    folder = Path(shutil.copytree(OLD / request.param, tmp_path / request.param))
    (folder / "latest").symlink_to("step_0000003")
    return folder


def test_it_answers_as_it_did(old: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcome = run("evals.arithmetic", f"ckpt={old}/step_0000006", "device=cpu", f"out={tmp_path}/out", folder=tmp_path)
    outcome.ok()
    assert ("holds no manifest.json, so its files are not verified" in caplog.text) == (old.name != "format_2")
    found = read_lines(predictions_of(report_in(tmp_path / "out", "arithmetic.test")))
    wanted = read_lines(old / "predictions.jsonl")
    assert len(found) == 6
    for ours, theirs in zip(found, wanted, strict=True):
        for key in ("question", "gold", "output", "finished"):
            assert ours[key] == theirs[key], "another data version, or another answer"
        for key in ("decoded_steps", "gold_steps"):
            assert ours.get(key) == theirs.get(key)
        # The state that is only decoded is no thought, so an answer takes one less.
        assert ours["n_tokens"] == theirs["n_tokens"] - (old.name == "latent")


@pytest.mark.parametrize("name", THINKING)
def test_it_thinks_as_it_did(name: str) -> None:
    checkpoint = sl.load_checkpoint(OLD / name / "step_0000006")
    expected = json.loads((OLD / name / "thoughts.json").read_text())
    thoughts = sl.think(checkpoint, expected["questions"])
    assert (checkpoint.stage, checkpoint.n_states) == (sl.Stage(3, first_written=None), 4)
    assert isinstance(checkpoint.loop, Sequential)
    assert checkpoint.loop.config == SequentialConfig(False, 8 if name == "format_2" else None)
    torch.testing.assert_close(thoughts.latents, torch.tensor(expected["latents"]), atol=1e-5, rtol=1e-5)
    assert len(sl.decode_steps(checkpoint, thoughts)[0]) == 2


def test_its_projector_belongs_to_the_loop(tmp_path: Path) -> None:
    """To the bit, also once it is saved as checkpoints are now."""
    folder = OLD / "format_2" / "step_0000006"
    saved = load_file(folder / "model.safetensors")
    projector = {name: weight for name, weight in saved.items() if name.startswith("projector.")}
    checkpoint = sl.load_checkpoint(folder)
    write_checkpoint(checkpoint, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format"] == 3
    for found in (checkpoint, sl.load_checkpoint(tmp_path)):
        assert found.loop is not None
        assert_equal(found.loop.state_dict(), projector)
        assert_equal(found.model.state_dict(), {name: saved[name] for name in saved.keys() - projector.keys()})
    assert_equal(load_file(tmp_path / "loop.safetensors"), projector)


def assert_equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert wanted
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("name", THINKING)
def test_it_is_probed(name: str, tmp_path: Path) -> None:
    arguments = (f"ckpt={OLD}/{name}/step_0000006", "data=arithmetic", "limit=3", "device=cpu")
    outcome = run(PROBE, *arguments, folder=tmp_path).ok()
    assert "V-information" in outcome.out


@pytest.mark.parametrize("resume", ["true", "auto"])
def test_it_goes_on(resume: str, old: Path, tmp_path: Path) -> None:
    """From its third step to the weights that the old version came to at its sixth; no option counts as changed."""
    shutil.move(old / "step_0000006", tmp_path / "end")
    told = run(TRAIN, *COMMON, *RUNS[old.name], f"out_dir={old}", f"resume={resume}", folder=tmp_path).ok().out
    assert "(was " not in told
    ours, theirs = sl.load_checkpoint(old), sl.load_checkpoint(tmp_path / "end")
    assert ours.step == theirs.step == 6
    pairs = [(ours.model, theirs.model), (ours.loop, theirs.loop), (ours.step_decoder, theirs.step_decoder)]
    for our_part, their_part in pairs:
        assert (our_part is None) == (their_part is None)
        if our_part is None or their_part is None:
            continue
        weights = our_part.state_dict()
        assert weights.keys() == their_part.state_dict().keys()
        for name, weight in their_part.state_dict().items():
            torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-4, msg=name)
    losses = [
        [line["loss"] for line in read_lines(x / "metrics.jsonl") if "loss" in line] for x in (old, OLD / old.name)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_decoder_that_no_loss_reaches_is_left_behind(tmp_path: Path) -> None:
    """Earlier versions made one with loss.step_weight=0 too, and kept moments of it."""
    folder = Path(shutil.copytree(OLD / "latent", tmp_path / "latent"))
    (folder / "latest").symlink_to("step_0000003")
    shutil.rmtree(folder / "step_0000006")
    arguments = ("mode=latent", *COMMON, *RUNS["latent"], "loss.step_weight=0", f"out_dir={folder}", "resume=true")
    run(TRAIN, *arguments, folder=tmp_path).ok()
    assert (folder / "step_0000003/step_decoder.safetensors").exists()
    assert not (folder / "step_0000006/step_decoder.safetensors").exists()
    assert sl.load_checkpoint(folder).step == 6
