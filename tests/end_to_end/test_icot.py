"""Runs of method=icot: killed and resumed, on two ranks, and what evals make of its checkpoints on the way."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import (
    ARITHMETIC,
    PROBE,
    TINY,
    TRAIN,
    contents,
    predictions_of,
    read_lines,
    report_in,
    run,
    run_process,
    without_command,
)
from safetensors.torch import load_file

from simcot_latent.checkpoint import load_checkpoint
from simcot_latent.curricula.base import Stage
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.evaluate import with_steps_left

pytestmark = pytest.mark.xdist_group("icot")  # one worker, so that the runs are made once

# 8 steps an epoch, so every other step removes one token more, and the 17th and those after it all.
ICOT = (
    *TINY,
    *ARITHMETIC,
    "method=icot",
    "optimizer=adamw",
    "learning_rate=0.003",
    "num_epochs=3",
    "latent.remove_per_epoch=4",
    "latent.remove_all_at=8",
    "latent.removal_smoothing=0.5",
    "checkpoint_every=3",
    "keep_checkpoints=20",
    "out_dir=run",
)
STEPS = 24

# Training as it is, but killed in the steps that are named, counted from 0.
KILLED = """
import os, signal, sys
from simcot_latent import cli, train
from simcot_latent.train import Trainer

train_step, last = Trainer.train_step, int(os.environ["KILLED_IN"])

def killed(self, prepared):
    if self.step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, prepared)

Trainer.train_step = killed
cli.run(train.main, "train")
"""


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("icot")
    (folder / "out.txt").write_text(run(TRAIN, *ICOT, folder=folder).ok().out)
    return folder / "run"


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The logged lines of training, without what the clock says."""
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "loss" in row]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "data_wait")} for row in rows]


def test_it_goes_by_its_schedule(once: Path) -> None:
    rows = metrics_of(once)
    expected = [step // 2 for step in range(16)] + [0] * 8  # `tokens_removed` is logged while it is a number
    assert [row.get("tokens_removed", 0) for row in rows] == expected
    out = (once.parent / "out.txt").read_text()
    assert "step 00002 | stage: 1 written tokens removed" in out
    assert "step 00016 | stage: all written tokens removed" in out
    assert out.count("| stage: ") == 8
    assert "warning" not in out
    # In the end nothing but the answer lines is left: far fewer tokens than of whole solutions.
    assert max(row["num_tokens"] for row in rows[16:]) < min(row["num_tokens"] for row in rows[:2]) / 2


def test_what_its_checkpoints_say(once: Path) -> None:
    for step, removed in ((3, 1), (15, 7), (18, None), (24, None)):
        assert load_checkpoint(once / f"step_{step:07d}").stage == Stage(removed=removed)
    options = json.loads((once / "latest" / "config.json").read_text())["run"]
    assert options["curriculum"] == "remove_tokens"
    assert (options["rationale"], options["step_weight_multiplier"]) == ("equations", 1.0)
    assert options["latent"] == {
        "remove_per_epoch": 4,
        "remove_side": "left",
        "remove_start": 0,
        "remove_all_at": 8,
        "removal_smoothing": 0.5,
        "pretrain_epochs": 0,
        "reset_optimizer": True,
    }


def test_the_published_recipe(tmp_path: Path) -> None:
    """facts.md, section 8; and a schedule that does not come to its end is told."""
    arguments = [*TINY, *ARITHMETIC, "method=icot", "out_dir=run"]
    outcome = run(TRAIN, *arguments, folder=tmp_path).ok()
    options = json.loads((tmp_path / "run/latest/config.json").read_text())["run"]
    latent = options["latent"]
    assert (latent["remove_per_epoch"], latent["remove_side"]) == (8, "left")
    assert (latent["remove_all_at"], latent["removal_smoothing"]) == (39, 4.0)
    assert latent["reset_optimizer"] is True
    assert "curriculum=remove_tokens: 7 tokens are removed in the last step, not all" in " ".join(outcome.out.split())


@pytest.mark.parametrize("reset", [True, False])
def test_the_optimizer_is_reset_at_each_removal_or_never(reset: bool, once: Path, tmp_path: Path) -> None:
    """AdamW counts its steps: those since the last token was removed, or all."""
    folder = once
    if not reset:
        run(TRAIN, *ICOT, "latent.reset_optimizer=false", folder=tmp_path).ok()
        folder = tmp_path / "run"
    for step, since in ((3, 1), (9, 1), (12, 2), (24, 8)):
        state = load_file(folder / f"step_{step:07d}" / "trainer_state.safetensors")
        counted = {value.item() for name, value in state.items() if name.endswith("/step")}
        assert counted == {float(since if reset else step)}


def test_killed_and_resumed_it_is_the_same_run(once: Path, tmp_path: Path) -> None:
    """Killed twice: it goes on from where a stage begins (6 steps), and from amid one (9)."""
    (tmp_path / "program.py").write_text(KILLED)
    for last, went_on in ((7, 0), (10, 1)):
        outcome = run_process("program.py", *ICOT, "resume=auto", folder=tmp_path, env={"KILLED_IN": str(last)})
        assert outcome.status == -signal.SIGKILL
        assert outcome.out.count("going on from") == went_on
    outcome = run(TRAIN, *ICOT, "resume=auto", folder=tmp_path).ok()
    assert "step_0000009" in outcome.out
    ours, theirs = (contents((folder / "latest").resolve()) for folder in (tmp_path / "run", once))
    assert without_command(ours) == without_command(theirs)
    assert metrics_of(tmp_path / "run") == metrics_of(once)


@pytest.mark.parametrize("how", ["two ranks", "one micro-batch"])
def test_ranks_and_micro_batches_do_not_matter(how: str, once: Path, tmp_path: Path) -> None:
    """The same tokens are trained in each step, and the losses differ by rounding."""
    if how == "two ranks":
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        run_process(*launcher, "-m", TRAIN, *ICOT, folder=tmp_path).ok()
    else:
        run(TRAIN, *ICOT, "device_batch_size=8", folder=tmp_path).ok()
    ours, theirs = metrics_of(tmp_path / "run"), metrics_of(once)
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["num_tokens"] == other["num_tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    weights = [load_file(folder / "latest" / "model.safetensors") for folder in (tmp_path / "run", once)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-4, rtol=1e-4)


def test_evals_ask_for_the_steps_that_are_left(tmp_path: Path, once: Path) -> None:
    """All but the first where 7 tokens are removed of solutions whose steps take 7 to 11; none in the end."""
    data = json.loads((once / "latest" / "config.json").read_text())["run"]["data"]
    source = Arithmetic(**{key: value for key, value in data.items() if key != "_target_"})
    gold = [[step.text for step in problem.steps] for problem in source.load("test").problems]
    for step in (15, 24):
        out, ckpt = tmp_path / str(step), once / f"step_{step:07d}"
        run("evals.arithmetic", f"ckpt={ckpt}", f"out={out}", "device=cpu", folder=tmp_path).ok()
        report = json.loads(report_in(out, "arithmetic.test").read_text())
        predictions = read_lines(predictions_of(report_in(out, "arithmetic.test")))
        found = [[step for step in p["gold_steps"] if step is not None] for p in predictions]
        assert report["thoughts"] == 0
        if step == 15:
            assert found == [steps[1:] for steps in gold]
            assert report["steps"] == sum(map(len, found)) > 0
        else:
            assert found == [[]] * 12
            assert not {"steps", "step_exact_match"} & report.keys()


def test_steps_that_are_left(once: Path, problems: list[Problem]) -> None:
    """Those without a gap: of << 3 * 4 = 1 2 >> newline << 1 2 - 2 = 1 0 >> newline, a token each."""
    ckpt = load_checkpoint(once)
    problem = problems[0]
    for side, removed, left in (
        ("left", 0, ["<<3*4=12>>", "<<12-2=10>>"]),
        ("left", 1, ["<<12-2=10>>"]),
        ("left", 9, ["<<12-2=10>>"]),
        ("left", 10, []),
        ("right", 1, ["<<3*4=12>>", "<<12-2=10>>"]),
        ("right", 2, ["<<3*4=12>>"]),
        ("right", 11, ["<<3*4=12>>"]),
        ("right", 12, []),
        ("right", None, []),
    ):
        ckpt.stage = Stage(removed=removed, removed_side=side)
        assert [step.text for step in with_steps_left(ckpt, problem).steps] == left


def test_there_is_nothing_to_probe(once: Path, tmp_path: Path) -> None:
    assert "thoughts" in run(PROBE, f"ckpt={once}", "question=1+1?", folder=tmp_path).error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["latent.remove_per_epoch=0"], "latent.remove_per_epoch=0.0: must be above 0"),
        (["latent.remove_side=top"], "latent.remove_side=top: must be one of left, right"),
        (["latent.remove_per_epok=3"], "latent.remove_per_epok"),
        (["rationale=none"], "rationale=none: must be equations or natural with curriculum=remove_tokens"),
        (["loop=sequential"], "loop=sequential: must be none with curriculum=remove_tokens"),
        (["steps=decoder"], "steps=decoder: needs thoughts, which loop=none has not"),
    ],
)
def test_mistakes(arguments: list[str], named: str, tmp_path: Path) -> None:
    assert named in run(TRAIN, *ICOT, *arguments, folder=tmp_path).error
