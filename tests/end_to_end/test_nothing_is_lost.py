"""Whatever happens to a run or its folder: nothing that was there is lost, and what is wrong is said in one line."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ARITHMETIC, TINY, TRAIN, contents, environment, read_lines, run, run_process
from safetensors.torch import load_file, save_file
from torch import Tensor

import simcot_latent as sl
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.errors import UserError, file_errors
from simcot_latent.logs import RunLog
from simcot_latent.method import Method
from simcot_latent.training.memory import in_units, out_of_memory

pytestmark = pytest.mark.xdist_group("nothing_is_lost")  # one worker, so that the runs are made once

WEIGHTED = (*TINY, *ARITHMETIC, "mode=weighted", "num_iterations=12", "checkpoint_every=4", "eval_every=6")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `WEIGHTED` that nothing interrupted: checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("once")
    run(TRAIN, *WEIGHTED, "out_dir=run", folder=folder).ok()
    return folder / "run"


def cut_back(once: Path, to: Path, step: int = 8) -> Path:
    """The run as it would lie there had it been killed after its checkpoint of `step`."""
    shutil.copytree(once, to, symlinks=True)
    for folder in to.glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (to / "latest").unlink()
    (to / "latest").symlink_to(f"step_{step:07d}")
    return to


def metrics(out_dir: Path) -> list[dict[str, Any]]:
    clock = ("tokens_per_s", "data_wait")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_lines(out_dir / "metrics.jsonl")]


def assert_as_if_uninterrupted(out_dir: Path, once: Path) -> None:
    assert (out_dir / "latest").readlink() == Path("step_0000012")
    ours, theirs = contents((out_dir / "latest").resolve()), contents((once / "latest").resolve())
    assert ours.keys() == theirs.keys()
    differ = [name for name in ours if ours[name] != theirs[name]]
    assert [name for name in differ if name not in ("config.json", "manifest.json")] == []
    assert metrics(out_dir) == metrics(once)


# --- which folders are ours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["true", "auto"])
def test_a_link_that_leads_nowhere_goes_on_from_the_newest_checkpoint(resume: str, once: Path, tmp_path: Path) -> None:
    out_dir = cut_back(once, tmp_path / "run")
    (out_dir / "latest").unlink()
    (out_dir / "latest").symlink_to("step_0000010")
    before = contents(out_dir)
    refused = run(TRAIN, *WEIGHTED, "out_dir=run", folder=tmp_path).error
    assert "holds a run already" in refused
    assert contents(out_dir) == before
    resumed = run(TRAIN, *WEIGHTED, "out_dir=run", f"resume={resume}", folder=tmp_path).ok()
    assert "latest leads to no checkpoint; going on from the newest, step_0000008" in resumed.out
    assert_as_if_uninterrupted(out_dir, once)


@pytest.mark.parametrize("resume", ["false", "true", "auto"])
def test_a_link_that_leads_nowhere_without_a_checkpoint_is_no_empty_folder(
    resume: str, once: Path, tmp_path: Path
) -> None:
    out_dir = cut_back(once, tmp_path / "run")
    shutil.rmtree(out_dir / "step_0000008")
    before = contents(out_dir)
    message = run(TRAIN, *WEIGHTED, "out_dir=run", f"resume={resume}", folder=tmp_path).error
    assert "out_dir=run: latest -> step_0000008 leads nowhere, and there is no other checkpoint" in message
    assert contents(out_dir) == before


def test_a_run_whose_links_were_copied_as_folders_goes_on(once: Path, tmp_path: Path) -> None:
    cut_back(once, tmp_path / "links")
    out_dir = Path(shutil.copytree(tmp_path / "links", tmp_path / "run"))  # as cp -rL does
    assert not (out_dir / "latest").is_symlink()
    copied = contents(out_dir / "latest")
    resumed = run(TRAIN, *WEIGHTED, "out_dir=run", "resume=true", folder=tmp_path).ok()
    assert "latest is no link; the first save moves it to latest-1" in resumed.out
    assert_as_if_uninterrupted(out_dir, once)
    assert contents(out_dir / "latest-1") == copied

    bare = tmp_path / "bare"  # `latest` is all there is
    shutil.copytree(tmp_path / "links" / "latest", bare / "latest")
    shutil.copy(tmp_path / "links" / "metrics.jsonl", bare)
    run(TRAIN, *WEIGHTED, "out_dir=bare", "resume=auto", folder=tmp_path).ok()
    assert_as_if_uninterrupted(bare, once)
    assert contents(bare / "step_0000008") == copied  # under its name it counts as what it is


def test_what_is_not_ours_is_neither_counted_nor_deleted(once: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    shutil.copytree(once / "step_0000008", out_dir / "step_0000002_best")
    shutil.copytree(once / "step_0000008", tmp_path / "elsewhere")
    shutil.copytree(once / "step_0000008", out_dir / "step_0000003")  # by its content it is of step 8
    (out_dir / "step_0000005").symlink_to(tmp_path / "elsewhere")
    for name in ("step_notes", "step_0000001", "step_99", "step_9999999"):
        (out_dir / name).mkdir()
        (out_dir / name / "notes.txt").write_text("mine")
    (out_dir / "step_0000006").write_text("a file")
    theirs = contents(out_dir)
    run(TRAIN, *WEIGHTED, "out_dir=run", "keep_checkpoints=1", folder=tmp_path).ok()
    after = contents(out_dir)
    assert {name: after.get(name) for name in theirs} == theirs
    ours = {name.split("/")[0] for name in after.keys() - theirs.keys()}
    assert ours == {"latest", "metrics.jsonl", "step_0000012"}
    assert contents(tmp_path / "elsewhere") == contents(once / "step_0000008")


def test_a_run_that_went_back_keeps_what_it_saves(once: Path, tmp_path: Path) -> None:
    """Checkpoints beyond the present step are of what it went back from; they are not the newest of this run."""
    out_dir = Path(shutil.copytree(once, tmp_path / "run", symlinks=True))
    (out_dir / "latest").unlink()
    (out_dir / "latest").symlink_to("step_0000008")
    with stop_after(9):
        stopped = run(TRAIN, *WEIGHTED, "out_dir=run", "resume=true", "keep_checkpoints=1", folder=tmp_path)
    assert stopped.status == 143
    assert {path.name for path in out_dir.glob("step_*")} == {"step_0000010", "step_0000012"}
    assert (out_dir / "latest").readlink() == Path("step_0000010")
    run(TRAIN, *WEIGHTED, "out_dir=run", "resume=true", "keep_checkpoints=1", folder=tmp_path).ok()
    assert {path.name for path in out_dir.glob("step_*")} == {"step_0000012"}
    assert_as_if_uninterrupted(out_dir, once)


def test_a_fresh_run_leaves_the_metrics_of_an_earlier_one(tmp_path: Path) -> None:
    """One that ended before its first checkpoint, for example."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run/metrics-1.jsonl").write_text("mine")
    arguments = (*TINY, *ARITHMETIC, "mode=weighted", "num_iterations=1", "out_dir=run")
    out = run(TRAIN, *arguments, folder=tmp_path).ok().out
    assert "metrics.jsonl is of an earlier run; it is now metrics-2.jsonl" in out
    assert (tmp_path / "run/metrics-2.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "run/metrics-1.jsonl").read_text() == "mine"


@pytest.mark.parametrize("from_step", [0, 8])
def test_metrics_that_are_no_file_are_refused(from_step: int, tmp_path: Path) -> None:
    """A fifo would wait for ever for somebody who reads it."""
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a folder, a device or the like; it must be a file"):
        RunLog(tmp_path, True, from_step, run="", project="", config={})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a folder, a device or the like; it must be a file"):
        RunLog(tmp_path, True, from_step, run="", project="", config={})


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_names_of_half_written_files_that_are_taken(make: Callable[[Path], None], once: Path, tmp_path: Path) -> None:
    """A fifo is out of the way at once, where writing to it would wait for ever; a folder is named."""
    for name in (".lock.json.partial", ".metrics.jsonl.partial"):
        folder = tmp_path / name[1:5]
        folder.mkdir()
        cut_back(once, folder / "run")
        make(folder / "run" / name)
        resumed = run(TRAIN, *WEIGHTED, "out_dir=run", "resume=true", folder=folder)
        if make is os.mkfifo:
            resumed.ok()
            assert_as_if_uninterrupted(folder / "run", once)
        else:
            assert "run" in resumed.error


@pytest.mark.parametrize("empty", ["", "' '"])
def test_an_empty_out_dir_is_refused(empty: str, tmp_path: Path) -> None:
    message = run(TRAIN, *WEIGHTED, f"out_dir={empty}", folder=tmp_path).error
    assert "out_dir=" in message
    assert "must be a folder, or null for runs/weighted" in message
    assert list(tmp_path.iterdir()) == []


def test_lines_that_are_no_metrics_are_kept_aside(once: Path, tmp_path: Path) -> None:
    out_dir = cut_back(once, tmp_path / "run")
    strange = [b"{}", b'{"step": "3"}', b"\xff\xfe", b"[1]", b"null", b'{"step": true}', b'{"step": 7, "loss": 1']
    good = (out_dir / "metrics.jsonl").read_bytes().splitlines()
    mixed = [*good[:2], *strange[:3], *good[2:], *strange[3:]]
    (out_dir / "metrics.jsonl").write_bytes(b"\n".join(mixed))
    resumed = run(TRAIN, *WEIGHTED, "out_dir=run", "resume=true", folder=tmp_path).ok()
    assert "metrics.jsonl: 7 line(s) are no records of a step; they are now in metrics.unreadable" in resumed.out
    assert (out_dir / "metrics.unreadable").read_bytes().splitlines() == strange
    assert_as_if_uninterrupted(out_dir, once)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"nonfinite": "3"}, "nonfinite and nonfinite_in_a_row must be whole numbers"),
        ({"nonfinite": True}, "nonfinite and nonfinite_in_a_row must be whole numbers"),
        ({"nonfinite": -1, "nonfinite_in_a_row": -1}, "nonfinite and nonfinite_in_a_row must be whole numbers"),
        ({"nonfinite_in_a_row": None}, "nonfinite and nonfinite_in_a_row must be whole numbers"),
        ({"nonfinite_in_a_row": 1}, "the second at most the first"),
        ({"owes_validation": "no"}, "owes_validation must be true or false"),
        ({"step": 7}, "says step=7, but"),
    ],
)
def test_a_state_of_training_that_cannot_be_is_named(
    changes: dict[str, Any], wanted: str, once: Path, tmp_path: Path
) -> None:
    out_dir = cut_back(once, tmp_path / "run")
    file = out_dir / "step_0000008/trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    before = contents(out_dir)
    message = run(TRAIN, *WEIGHTED, "out_dir=run", "resume=true", "verify=false", folder=tmp_path).error
    assert "step_0000008/trainer_state.json: " in message
    assert wanted in message
    if "step" in changes:
        assert "step_0000008/config.json says step=8" in message
    assert contents(out_dir) == before


# --- numbers that are none -------------------------------------------------------------------------------------------


def all_finite(folder: Path) -> bool:
    files = folder.glob("*.safetensors")
    return all(bool(value.isfinite().all()) for file in files for value in load_file(file).values())


def test_a_model_that_is_not_finite_is_never_saved(once: Path, tmp_path: Path) -> None:
    """The issue's: nothing is logged between the step that breaks it and the next checkpoints."""
    diverging = ("learning_rate=1e38", "matrix_lr=1e38", "max_grad_norm=null", "log_every=20", "checkpoint_every=1")
    tiny = [argument for argument in WEIGHTED if not argument.startswith(("log_every", "checkpoint_every"))]
    message = run(TRAIN, *tiny, *diverging, "out_dir=fresh", folder=tmp_path).error
    for word in ("step 1", "training is unstable", "learning_rate"):
        assert word in message
    assert not list((tmp_path / "fresh").glob("step_*"))

    out_dir = cut_back(once, tmp_path / "run")
    before = contents(out_dir / "step_0000008")
    message = run(TRAIN, *tiny, *diverging, "out_dir=run", "resume=true", folder=tmp_path).error
    assert "step 9" in message
    assert (out_dir / "latest").readlink() == Path("step_0000008")
    assert contents(out_dir / "step_0000008") == before
    assert all_finite(out_dir / "step_0000008")
    assert [path.name for path in out_dir.glob("step_*")] == ["step_0000008"]


MOMENT = "optimizer/model.embedding.weight/exp_avg_sq"
MATRIX = "optimizer/model.transformer.blocks.0.attention.out.weight/momentum"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t[MOMENT].view(-1)[3:4].fill_(math.nan), f"{MOMENT} holds numbers that no training leaves"),
        (lambda t: t[MOMENT].view(-1)[3:4].fill_(-1.0), f"{MOMENT} holds numbers that no training leaves"),
        (lambda t: t[MATRIX].view(-1)[3:4].fill_(math.inf), f"{MATRIX} holds numbers that no training leaves"),
        (lambda t: t.pop(MOMENT), f"lacks {MOMENT}"),
        (lambda t: t.update({MOMENT: t[MOMENT][:3].clone()}), f"{MOMENT} must be float32 numbers of shape"),
        (lambda t: t.update({MOMENT: t[MOMENT][0, 0].clone()}), f"{MOMENT} must be float32 numbers of shape"),
        (lambda t: t.update({MOMENT: t[MOMENT].to(torch.int32)}), f"{MOMENT} must be float32 numbers of shape"),
        (lambda t: t.update({MOMENT + "2": t[MOMENT].clone()}), f"holds {MOMENT}2, of which this run has no parameter"),
    ],
    ids=["nan", "negative", "inf", "missing", "shape", "number", "dtype", "left over"],
)
def test_moments_that_no_training_leaves_are_refused(
    change: Callable[[dict[str, Tensor]], object], named: str, once: Path, tmp_path: Path
) -> None:
    out_dir = cut_back(once, tmp_path / "run")
    tensors = load_file(out_dir / "latest/trainer_state.safetensors")
    change(tensors)
    save_file(tensors, out_dir / "latest/trainer_state.safetensors")
    before = contents(out_dir)
    message = run(TRAIN, *WEIGHTED, "out_dir=run", "resume=true", "verify=false", folder=tmp_path).error
    assert "trainer_state.safetensors: " + named in message
    assert contents(out_dir) == before


@contextmanager
def bad_loss(*steps: int, value: float = math.nan) -> Iterator[list[int]]:
    """While this lasts, the loss of these steps (from 1) is multiplied by `value`; two micro-batches make a step."""
    forward, calls = Method.forward, []

    def broken(self: Method, batch: Any, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        shares = forward(self, batch, totals)
        if self.training:
            calls.append(len(calls) // 2 + 1)
            if calls[-1] in steps and len(calls) % 2:  # the first micro-batch alone
                shares["loss"] = shares["loss"] * value
        return shares

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "forward", broken)
        yield calls


NO_SURPRISES = ("weight_decay=0", "warmup_ratio=0", "lr_schedule=constant")


def training_problems() -> list[Problem]:
    return list(Arithmetic(train_size=64, validation_size=8, test_size=12).load("train").problems)


def test_a_step_that_is_not_finite_ends_training_and_its_batch_is_kept(tmp_path: Path) -> None:
    with bad_loss(3):
        message = run(TRAIN, *WEIGHTED, "log_every=20", "out_dir=run", folder=tmp_path).error
    for word in ("loss is nan", "at step 3", "nonfinite/step_0000003.json", "on_nonfinite=skip"):
        assert word in message
    batch = json.loads((tmp_path / "run/nonfinite/step_0000003.json").read_text())
    assert (batch["step"], batch["loss"]) == (3, "nan")
    problems = training_problems()
    assert len(batch["problems"]) == 8
    for row in batch["problems"]:
        problem = problems[row["index"]]
        assert (row["question"], row["rationale"], row["answer"]) == (
            problem.question, problem.rationale, problem.answer)  # fmt: skip
    assert not list((tmp_path / "run").glob("step_*"))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(optimizer: str, tmp_path: Path) -> None:
    """So a run of four steps whose third is skipped ends with what it had after two good steps and the fourth."""
    arguments = (*WEIGHTED, f"optimizer={optimizer}", "on_nonfinite=skip", "num_iterations=4", "checkpoint_every=1")
    arguments += ("keep_checkpoints=9", *NO_SURPRISES)
    with bad_loss(3, value=math.inf):
        outcome = run(TRAIN, *arguments, "out_dir=run", folder=tmp_path).ok()
    assert "at step 3" in outcome.out
    assert "no update (1 such steps so far)" in outcome.out
    states = [load_state(tmp_path / f"run/step_{step:07d}") for step in (2, 3, 4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert all_finite(tmp_path / "run/latest")
    logged = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "num_tokens" in line]
    assert [line["nonfinite_steps"] for line in logged] == [0, 0, 1, 1]
    assert ["loss" in line for line in logged] == [True, True, False, True]  # JSON has no infinity


def load_state(folder: Path) -> dict[str, Tensor]:
    return {f"{file.name}/{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_too_many_bad_steps_in_a_row_end_training(tmp_path: Path) -> None:
    arguments = (*WEIGHTED, "on_nonfinite=skip", "max_nonfinite=2")
    with bad_loss(2, 3, 5, 6):
        run(TRAIN, *arguments, "out_dir=two", folder=tmp_path).ok()
    with bad_loss(2, 3, 4):
        message = run(TRAIN, *arguments, "out_dir=three", folder=tmp_path).error
    assert "at step 4" in message
    assert "max_nonfinite=2" in message
    # Going on does not forget how many there were.
    with bad_loss(3, 4), stop_after(4):
        assert run(TRAIN, *arguments, "out_dir=on", folder=tmp_path).status == 143  # after step 5, a good one
    assert json.loads((tmp_path / "on/latest/trainer_state.json").read_text())["nonfinite"] == 2


# --- two runs, one folder --------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_of_one_that_is_going_on_is_refused(tmp_path: Path) -> None:
    arguments = [*TINY, *ARITHMETIC, "mode=weighted", "num_iterations=2000", "checkpoint_every=2", "out_dir=run"]
    process = subprocess.Popen(
        [sys.executable, "-m", TRAIN, *arguments], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("step 00003"):
            assert line
        for resume in ("false", "true", "auto"):
            message = run(TRAIN, *arguments, f"resume={resume}", folder=tmp_path).error
            assert f"out_dir=run: another run writes there (process {process.pid} on {platform.node()}" in message
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    # That one left its lock behind; the operating system knows that it is over.
    assert (tmp_path / "run/lock.json").exists()
    with stop_after(json.loads((tmp_path / "run/latest/trainer_state.json").read_text())["step"] + 1):
        stopped = run(TRAIN, *arguments, "resume=auto", folder=tmp_path)
    assert stopped.status == 143
    assert f"(process {process.pid} on {platform.node()}" in stopped.out
    assert "ended without giving the folder back" in stopped.out
    assert not (tmp_path / "run/lock.json").exists()


def test_a_lock_of_another_machine_is_believed(once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out_dir = cut_back(once, tmp_path / "run")
    owner = {"host": "node17", "pid": 1, "started": "2026-01-02 03:04:05 +0000", "job": "4711"}
    (out_dir / "lock.json").write_text(json.dumps(owner))
    before = contents(out_dir)
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    message = run(TRAIN, *WEIGHTED, "out_dir=run", "resume=auto", folder=tmp_path).error
    for word in ("process 1 on node17, since 2026-01-02 03:04:05", "delete run/lock.json"):
        assert word in message
    assert contents(out_dir) == before
    # Slurm starts a job a second time, perhaps elsewhere, only when it is over.
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    run(TRAIN, *WEIGHTED, "out_dir=run", "resume=auto", folder=tmp_path).ok()
    assert_as_if_uninterrupted(out_dir, once)


# --- resume=auto -----------------------------------------------------------------------------------------------------


@contextmanager
def stop_after(step: int, number: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """While this lasts, a run in this process gets a signal once it has logged `step`, so it stops a step later."""
    write, sent = RunLog.write, []

    def write_then_signal(self: RunLog, at: int, values: dict[str, float]) -> None:
        write(self, at, values)
        if at == step and not sent:
            sent.append(at)
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", write_then_signal)
        yield


def test_auto_starts_goes_on_and_is_done(once: Path, tmp_path: Path) -> None:
    arguments = (*WEIGHTED, "out_dir=run", "resume=auto")
    with stop_after(4):
        started = run(TRAIN, *arguments, folder=tmp_path)
    assert started.status == 143
    assert "going on" not in started.out
    assert "going on from" in run(TRAIN, *arguments, folder=tmp_path).ok().out
    assert_as_if_uninterrupted(tmp_path / "run", once)
    before = contents(tmp_path / "run")
    assert "is trained to its end" in run(TRAIN, *arguments, folder=tmp_path).ok().out
    assert contents(tmp_path / "run") == before


def test_auto_refuses_other_options_and_lists_them(once: Path, tmp_path: Path) -> None:
    cut_back(once, tmp_path / "run")
    before = contents(tmp_path / "run")
    others = ("seed=3", "learning_rate=0.1", "data.train_size=96", "log_every=2")
    arguments = (*WEIGHTED, *others, "out_dir=run", "resume=auto")
    message = run(TRAIN, *arguments, folder=tmp_path).error
    for word in ("seed (was 0, is 3)", "learning_rate (was 0.002, is 0.1)", "data.train_size (was 64, is 96)",
                 "resume_with_changes=true"):  # fmt: skip
        assert word in message
    assert "log_every" not in message
    assert contents(tmp_path / "run") == before
    went_on = run(TRAIN, *arguments, "resume_with_changes=true", folder=tmp_path).ok()
    assert "seed (was 0, is 3)" in went_on.out


@pytest.mark.parametrize("resume", ["resume=auto", "resume=true", "resume=auto resume_with_changes=true"])
def test_what_may_never_change_is_named_and_the_rest_listed(resume: str, once: Path, tmp_path: Path) -> None:
    """No option lets it: weights, moments and schedules would not fit."""
    cut_back(once, tmp_path / "run")
    before = contents(tmp_path / "run")
    others = ("model.n_embd=64", "model.norm=rmsnorm", "num_iterations=24", "optimizer=adamw", "seed=3", "log_every=2")
    message = run(TRAIN, *WEIGHTED, *others, "out_dir=run", *resume.split(), folder=tmp_path).error
    never, _, rest = message.partition(" may not change in a run; ")
    assert (
        "optimizer (was muon, is adamw), model.n_embd (was 32, is 64), model.norm (was layernorm, is rmsnorm)" in never
    )
    assert "the number of steps (was 12, is 24; see num_iterations)" in never
    for word in ("model.n_embd (was 32, is 64)", "num_iterations (was 12, is 24)", "seed (was 0, is 3)"):
        assert word in rest
    assert "resume_with_changes" not in message
    assert "log_every" not in message
    assert contents(tmp_path / "run") == before


def test_auto_lets_free_options_change(once: Path, tmp_path: Path) -> None:
    cut_back(once, tmp_path / "run")
    free = ("log_every=3", "checkpoint_every=2", "device_batch_size=8", "max_minutes=5", "eval_batch_size=2")
    out = run(TRAIN, *WEIGHTED, *free, "out_dir=run", "resume=auto", folder=tmp_path).ok().out
    assert "log_every (was 1, is 3)" in out
    assert "max_minutes" not in out


def test_options_that_a_checkpoint_is_older_than_are_no_changes(once: Path, tmp_path: Path) -> None:
    out_dir = cut_back(once, tmp_path / "run")
    file = out_dir / "latest/config.json"
    config = json.loads(file.read_text())
    for key in ("on_nonfinite", "max_nonfinite", "resume_with_changes", "max_minutes"):
        del config["run"][key]
    for key in ("unseen_steps", "distractors"):
        del config["run"]["data"][key]
    file.write_text(json.dumps(config))
    (out_dir / "latest/manifest.json").unlink(missing_ok=True)
    out = run(TRAIN, *WEIGHTED, "out_dir=run", "resume=auto", folder=tmp_path).ok().out
    assert "other options" not in out


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("resume=maybe", "resume=maybe: must be true, false, or auto"),
        ("resume=auto", "resume=auto: must be given with out_dir="),
        ("max_minutes=0", "max_minutes=0"),
        ("on_nonfinite=ignore", "on_nonfinite=ignore: must be one of error, skip"),
        ("max_nonfinite=0", "max_nonfinite=0"),
    ],
)
def test_values_that_are_none(option: str, named: str, tmp_path: Path) -> None:
    assert named in run(TRAIN, *WEIGHTED, option, folder=tmp_path).error
    assert not any(tmp_path.iterdir())


# --- ends before the end ---------------------------------------------------------------------------------------------


@pytest.fixture
def hangup_is_heard() -> Iterator[None]:
    """Also where the tests themselves run under `nohup`: what they start would ignore SIGHUP, too."""
    kept = signal.getsignal(signal.SIGHUP)
    if kept == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, kept)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.usefixtures("hangup_is_heard")
def test_a_signal_saves_and_ends(step: int, name: str, once: Path, tmp_path: Path) -> None:
    """Step 6 is to be validated: the run that stops there owes it, and the one that goes on pays."""
    with stop_after(step, signal.Signals[name]):
        stopped = run(TRAIN, *WEIGHTED, "out_dir=run", folder=tmp_path)
    assert stopped.status == 128 + signal.Signals[name]
    assert f"stopped by a signal, {name}, at step {step + 1}; go on with resume=true" in stopped.out
    assert (tmp_path / "run/latest").readlink() == Path(f"step_{step + 1:07d}")
    run(TRAIN, *WEIGHTED, "out_dir=run", "resume=auto", folder=tmp_path).ok()
    assert_as_if_uninterrupted(tmp_path / "run", once)


# A process with a terminal of its own, as a shell gives it one.
ON_ITS_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def read_until(handle: int, text: bytes) -> None:
    """Reads what a process prints until it has printed a text."""
    printed = b""
    while text not in printed:
        printed += (piece := os.read(handle, 4096))
        assert piece, printed.decode()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no such terminals here")
@pytest.mark.parametrize("nohup", [False, True])
@pytest.mark.usefixtures("hangup_is_heard")
def test_a_terminal_that_is_closed(nohup: bool, once: Path, tmp_path: Path) -> None:
    """It sends SIGHUP, and nothing can be written to it any more; a run that ignores SIGHUP goes on to its end."""
    ours, theirs = os.openpty()
    # As nohup does, but that its process then writes to a file.
    ignoring = ["/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh"] if nohup else []
    train = [sys.executable, "-m", TRAIN, *WEIGHTED, "out_dir=run"]
    arguments = [sys.executable, "-c", ON_ITS_TERMINAL, *ignoring, *train]
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        read_until(ours, b"step 00002")
        os.close(ours)
        status = process.wait(60)
    assert status == (0 if nohup else 128 + signal.SIGHUP)
    assert not (tmp_path / "run/lock.json").exists()
    if not nohup:
        assert 2 <= sl.load_checkpoint(tmp_path / "run").step < 12
        run(TRAIN, *WEIGHTED, "out_dir=run", "resume=auto", folder=tmp_path).ok()
    assert_as_if_uninterrupted(tmp_path / "run", once)


def test_a_pipe_that_is_closed(once: Path, tmp_path: Path) -> None:
    """`... | head`, or `| tee` that ended: what was trained is saved."""
    ours, theirs = os.pipe()
    arguments = [sys.executable, "-m", TRAIN, *WEIGHTED, "out_dir=run"]
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=environment(), stdout=theirs, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        read_until(ours, b"step 00002")
        os.close(ours)
        told = process.communicate(timeout=60)[1]
    assert (process.returncode, told) == (128 + signal.SIGPIPE, "")
    assert 2 <= sl.load_checkpoint(tmp_path / "run").step < 12
    run(TRAIN, *WEIGHTED, "out_dir=run", "resume=auto", folder=tmp_path).ok()
    assert_as_if_uninterrupted(tmp_path / "run", once)


def test_max_minutes_saves_and_ends(tmp_path: Path) -> None:
    arguments = (*WEIGHTED, "num_iterations=100000", "out_dir=run", "checkpoint_every=-1")
    stopped = run(TRAIN, *arguments, "max_minutes=0.03", folder=tmp_path).ok()
    assert "stopped after max_minutes=0.03 at step " in stopped.out
    first = sl.load_checkpoint(tmp_path / "run").step
    assert 1 <= first < 100000
    run(TRAIN, *arguments, "max_minutes=0.03", "resume=auto", folder=tmp_path).ok()
    assert sl.load_checkpoint(tmp_path / "run").step > first
    steps = [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, steps[-1] + 1))


# --- disks and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out_dir", "named"),
    [
        ("x" * 300, "File name too long"),
        ("a_file/run", "Not a directory"),
        ("/proc/self/run", ""),
        ("dangling", "File exists"),
    ],
)
def test_a_folder_that_cannot_be_made(out_dir: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("a file")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = contents(tmp_path)
    for more in ((), ("resume=auto",)):
        message = run(TRAIN, *WEIGHTED, f"out_dir={out_dir}", *more, folder=tmp_path).error
        assert message.startswith(f"error: out_dir={out_dir}")
        assert named in message
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    assert "Permission denied" in run(TRAIN, *WEIGHTED, "out_dir=run", folder=tmp_path).error


def test_a_disk_without_room_for_a_checkpoint_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = run(TRAIN, *WEIGHTED, "out_dir=run", folder=tmp_path).error
    assert re.search(r"out_dir=run: 1\.0 kB are free there, a checkpoint takes \d\d\d kB; make room", message)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_is_full_for_the_metrics(tmp_path: Path) -> None:
    """Files may not be larger than 1 kB here, which is less than the metrics of these steps."""
    done = subprocess.run(
        [sys.executable, "-m", TRAIN, *WEIGHTED, "checkpoint_every=-1", "out_dir=run"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr == "error: run/metrics.jsonl: cannot be written (File too large)\n"
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines, "whole lines, as many as fit"


def test_a_disk_that_is_full_at_a_save(once: Path, tmp_path: Path) -> None:
    """Files may not be larger than 40 kB here: the metrics still fit, the model does not."""
    out_dir = cut_back(once, tmp_path / "run")
    before = contents(out_dir / "step_0000008")
    done = subprocess.run(
        [sys.executable, "-m", TRAIN, *WEIGHTED, "out_dir=run", "resume=auto"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: run/")
    assert "cannot be written (File too large)" in done.stderr
    assert (out_dir / "latest").readlink() == Path("step_0000008")
    assert contents(out_dir / "step_0000008") == before
    run(TRAIN, *WEIGHTED, "out_dir=run", "resume=auto", folder=tmp_path).ok()
    assert_as_if_uninterrupted(out_dir, once)


def test_out_of_memory_is_one_line_with_sizes_and_settings(tmp_path: Path) -> None:
    """A pass over 4096 problems does not fit into the gigabytes that this process may have beside its libraries."""
    arguments = [*TINY, *ARITHMETIC, "mode=weighted", "model.n_embd=512", "model.n_layer=4", "num_iterations=1"]
    arguments += ["target_examples_per_step=4096", "device_batch_size=4096", "out_dir=run"]
    program = (
        "import resource, runpy, sys, torch, simcot_latent.train\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))\n"
        "sys.argv[0] = 'train'\n"
        "runpy.run_module('simcot_latent.train', run_name='__main__', alter_sys=True)\n"
    )
    done = run_process("-W", "ignore", "-c", program, *arguments, folder=tmp_path)
    for word in ("out of memory at step 1", "4096 problems", "tokens", "parameters", "device_batch_size (now 4096)",
                 "activation_checkpointing=true"):  # fmt: skip
        assert word in done.error


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 bytes"), (999, "999 bytes"), (999.7, "1.0 kB"), (1000, "1.0 kB"), (9949, "9.9 kB"),
     (9951, "10 kB"), (999_499, "999 kB"), (999_501, "1.0 MB"), (3e9, "3.0 GB"), (8.4e10, "84 GB"), (5e15, "5000 TB")],
)  # fmt: skip
def test_sizes_for_people(size: float, text: str) -> None:
    assert in_units(size) == text


def test_only_running_out_of_memory_is_called_that() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory("here", torch.device("cpu"), "try"):
        raise RuntimeError("shapes do not fit")
    line = r"out of memory here, on cpu, 3\.0 GB more were asked for; try"
    with pytest.raises(sl.UserError, match=line), out_of_memory("here", torch.device("cpu"), "try"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3000000000 bytes.")
    with pytest.raises(sl.UserError, match="out of memory here"), out_of_memory("here", torch.device("cpu"), "try"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_file_errors_name_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(sl.UserError, match=r"data: No such file or directory \(.*nowhere\)"), file_errors("data"):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(BrokenPipeError), file_errors("data"):
        raise BrokenPipeError
