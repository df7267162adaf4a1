"""python -m simcot_latent.train, run as a user would: what it leaves, how it stops, goes on and spreads."""

from __future__ import annotations

import math
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import (
    ARITHMETIC,
    OFFLINE,
    TINY,
    TRAIN,
    Trained,
    contents,
    environment,
    read_lines,
    report_in,
    run,
    run_process,
    strict_json,
    without_command,
    write_jsonl,
)
from safetensors.torch import load_file
from torch import Tensor

import simcot_latent as sl
from simcot_latent.logs import RunLog

CHECKPOINT_FILES = {
    "model.safetensors",
    "config.json",
    "tokenizer/ranks.tiktoken",
    "tokenizer/tokenizer.json",
    "trainer_state.safetensors",
    "trainer_state.json",
    "manifest.json",
}
LATENT_FILES = CHECKPOINT_FILES | {"step_decoder.safetensors"}

# Half of the training on written steps, then thoughts, with a fresh optimizer: a change of stage in the middle.
STAGES = ("mode=latent", "latent.warmup=0.5", "latent.reset_optimizer=true")
MODES = {"latent": STAGES, "weighted": ("mode=weighted",)}
both_modes = pytest.mark.parametrize("mode", list(MODES))


def metrics(out_dir: Path) -> list[dict[str, Any]]:
    """The logged lines, without the numbers that depend on the clock."""
    clock = ("tokens_per_s", "data_wait")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_lines(out_dir / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Bit for bit: weights, moments, random states, tokenizer; what differs is how the command was given."""
    ours, theirs = without_command(contents(one)), without_command(contents(other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_leaves_a_whole_checkpoint_folder(trained: Trained) -> None:
    wanted = LATENT_FILES if "latent" in trained.out_dir.parts[-2] else CHECKPOINT_FILES
    assert set(contents(trained.latest)) == wanted
    assert trained.latest.is_symlink()
    assert trained.latest.readlink() == Path("step_0000060")  # relative: the run's folder can be moved
    # keep_checkpoints=2 of those after steps 20, 40 and 60; nothing half-written beside them.
    assert sorted(path.name for path in trained.out_dir.iterdir()) == [
        "latest", "metrics.jsonl", "step_0000040", "step_0000060"
    ]  # fmt: skip


def test_no_file_of_a_checkpoint_is_a_pickle(trained: Trained) -> None:
    for name, data in contents(trained.latest).items():
        assert not data.startswith((b"PK", b"\x80")), f"{name} looks like a pickle"
        if name.endswith(".json"):
            assert isinstance(strict_json(data.decode()), dict)
        elif name.endswith(".safetensors"):
            (header,) = struct.unpack("<Q", data[:8])
            assert isinstance(strict_json(data[8 : 8 + header].decode()), dict)
    state = strict_json((trained.latest / "trainer_state.json").read_text())
    assert state["step"] == 60


def test_the_log_has_a_line_a_step_with_the_promised_keys(trained: Trained) -> None:
    lines = read_lines(trained.out_dir / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 61))
    wanted = {"step", "loss", "step_accuracy", "num_tokens", "weighted_tokens", "lrm", "tokens_per_s", "grad_norm"}
    for line in steps:
        assert wanted <= line.keys()
        assert line["num_tokens"] > 0
        assert line["tokens_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert 0 <= line["padding"] < 1
        assert 0 <= line["step_accuracy"] <= 1
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]

    evaluations = [line for line in lines if "val_accuracy" in line]
    assert [line["step"] for line in evaluations] == [30, 60]
    for line in evaluations:
        nearest = steps[line["step"] - 1]  # the same problems but for names and things: much the same losses
        for key in ("loss", "step_accuracy", *(["answer_loss", "step_loss"] if "step_loss" in nearest else [])):
            assert line[f"val_{key}"] == pytest.approx(nearest[key], rel=1.0, abs=0.3), key


def test_the_last_validation_is_what_evals_finds(trained: Trained, sums: Path, tmp_path: Path) -> None:
    """Of the last checkpoint on the same held-out problems."""
    checkpoint = trained.copy_to(tmp_path / "checkpoint")
    arguments = ("split=validation", "limit=4", f"data.path={sums}", "device=cpu")
    run("evals.gsm8k", f"ckpt={checkpoint}", *arguments, folder=tmp_path).ok()
    report = strict_json(report_in(checkpoint / "evals", "gsm8k.validation").read_text())
    last = read_lines(trained.out_dir / "metrics.jsonl")[-1]
    assert (last["step"], last["val_accuracy"]) == (60, report["accuracy"])


def test_latent_mode_logs_both_losses_and_the_geometry_of_its_thoughts(latent_run: Trained) -> None:
    lines = read_lines(latent_run.out_dir / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    written, thinking = steps[:18], steps[18:]  # latent.warmup is 0.3 of 60
    assert all(line["n_latents"] == 0 and "step_loss" not in line for line in written)
    for line in thinking:
        assert line["n_latents"] == 3
        assert line["loss"] == pytest.approx(line["answer_loss"] + line["step_loss"], rel=1e-5)
    assert thinking[-1]["step_loss"] < 0.5 * thinking[0]["step_loss"]
    last = [line for line in lines if "val_accuracy" in line][-1]
    assert last["val_step_loss"] > 0
    assert min(last[f"thought_{key}"] for key in ("distance", "spread", "to_embedding", "norm")) > 0
    # Four held-out problems of one question each: two steps, scored with the thoughts of the four.
    assert last["thought_v_information_bound"] == pytest.approx(math.log2(4))
    assert abs(last["thought_v_information"]) < 2, "every problem has the same steps, so no thought tells it apart"


def test_what_it_prints(trained: Trained) -> None:
    lines = trained.out.splitlines()
    steps = [line for line in lines if line.startswith("step 00001/00060 | loss ")]
    assert len(steps) == 1
    for part in (" | lrm ", " | tokens ", " | weighted ", " | step_acc "):
        assert part in steps[0]
    assert any("strict accuracy" in line for line in lines)
    # Five problems with their decoded thoughts (four are held out here), in the mode that has thoughts.
    assert trained.out.count("How many") == (5 if "latent" in trained.out_dir.parts[-2] else 0), "one to be asked next"


def test_a_checkpoint_loads_by_itself_and_answers_as_before(trained: Trained, tmp_path: Path) -> None:
    questions = ["Eve has 3 pens and finds 4 more. How many pens does Eve have?", "Gus has 3 eggs. How many is that?"]
    there = sl.load_checkpoint(trained.out_dir, device="cpu")
    moved = sl.load_checkpoint(trained.copy_to(tmp_path / "elsewhere"))
    assert (there.step, there.config["mode"], there.config["num_iterations"]) == (60, trained.out_dir.parent.name, 60)
    assert there.config["model"]["n_embd"] == there.model.config.n_embd == 32
    assert sl.generate_all(there, questions, batch_size=2) == sl.generate_all(moved, questions, batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(there.model.parameters(), moved.model.parameters(), strict=True))
    if there.stage.thoughts:
        thoughts = sl.think(there, questions)
        assert thoughts.latents.shape == (2, 3, 32)
        assert sl.decode_steps(there, thoughts) == sl.decode_steps(moved, sl.think(moved, questions))
        assert [len(groups) for groups in sl.decode_steps(there, thoughts)] == [3, 3]


def test_the_model_is_usable_without_its_decoder(latent_run: Trained, tmp_path: Path) -> None:
    folder = latent_run.copy_to(tmp_path / "bare")
    (folder / "step_decoder.safetensors").unlink()
    bare, whole = sl.load_checkpoint(folder), sl.load_checkpoint(latent_run.latest)
    questions = ["Eve has 3 pens and finds 4 more. How many pens does Eve have?"]
    assert bare.step_decoder is None
    assert sl.answer(bare, questions) == sl.answer(whole, questions)
    with pytest.raises(sl.UserError, match="no auxiliary decoder"):
        sl.decode_steps(bare, sl.think(bare, questions))


def test_nothing_is_written_beside_the_run_folder(tmp_path: Path) -> None:
    run(TRAIN, *TINY, *ARITHMETIC, "mode=weighted", "num_iterations=1", folder=tmp_path).ok()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["weighted"]


def test_a_single_step_is_a_run_too(tmp_path: Path) -> None:
    """Its one step is a warm-up step, so the model has no thoughts that could be shown."""
    run(TRAIN, *TINY, *ARITHMETIC, "mode=latent", "num_iterations=1", "out_dir=one", folder=tmp_path).ok()
    assert set(contents(tmp_path / "one" / "latest")) == LATENT_FILES


# --- what the numbers mean -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [1.0, 2.0, 0.0])
def test_weighted_tokens_count_step_tokens_times_the_multiplier(multiplier: float, tmp_path: Path) -> None:
    arguments = ("mode=weighted", "num_iterations=3", f"step_weight_multiplier={multiplier}", "out_dir=run")
    outcome = run(TRAIN, *TINY, *ARITHMETIC, *arguments, folder=tmp_path).ok()
    assert "warning:" not in outcome.out
    for line in metrics(tmp_path / "run")[:3]:
        if multiplier == 1:
            assert line["weighted_tokens"] == line["num_tokens"]
        else:
            # What a step token adds is multiplier - 1, so this is how many there are: some, but not all.
            step_tokens = (line["weighted_tokens"] - line["num_tokens"]) / (multiplier - 1)
            assert step_tokens == int(step_tokens)
            assert 0 < step_tokens < line["num_tokens"]


@both_modes
def test_data_without_a_step_train_but_not_without_a_warning(mode: str, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(20)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    arguments = (f"mode={mode}", "num_iterations=3", "data=gsm8k", "data.path=data", "out_dir=run")
    outcome = run(TRAIN, *TINY, *arguments, folder=tmp_path).ok()
    warned = [line for line in outcome.out.splitlines() if line.startswith("warning:")]
    assert any("no <<expression=result>> step" in line for line in warned)
    assert sum("step_weight_multiplier=2.0" in line for line in warned) == 1  # weights equal counts: said once
    # Two of the twenty, a tenth, are held out.
    assert "train: 18 x problem without a step" in outcome.out
    assert "validation: 2 x problem without a step" in outcome.out
    assert all(line["weighted_tokens"] == line["num_tokens"] for line in metrics(tmp_path / "run") if "loss" in line)


def test_init_from_starts_with_the_weights_of_a_checkpoint(weighted_run: Trained, sums: Path, tmp_path: Path) -> None:
    arguments = [
        "mode=latent",
        "num_iterations=2",
        "learning_rate=1e-30",
        "matrix_lr=1e-30",
        "weight_decay=0",
        "latent.warmup=0",
    ]
    arguments += ["data=gsm8k", f"data.path={sums}", f"init_from={weighted_run.out_dir}", "out_dir=warm"]
    run(TRAIN, *TINY, *arguments, folder=tmp_path).ok()
    warm, cold = contents(tmp_path / "warm" / "latest"), contents(weighted_run.latest)
    assert warm["model.safetensors"] == cold["model.safetensors"]


# --- stopping and going on -------------------------------------------------------------------------------------------

TWENTY_STEPS = (*TINY, *ARITHMETIC, "num_iterations=20", "eval_every=5", "checkpoint_every=10")


def cut_back(run_folder: Path, step: int, to: Path) -> None:
    """A run as it would lie there had it been killed just after its checkpoint of `step`."""
    shutil.copytree(run_folder, to, symlinks=True)
    for folder in to.glob("step_*"):
        if folder.name > f"step_{step:07d}":
            shutil.rmtree(folder)
    (to / "latest").unlink()
    (to / "latest").symlink_to(f"step_{step:07d}")


@both_modes
def test_resumed_equals_uninterrupted(mode: str, tmp_path: Path) -> None:
    """In latent mode the stage changes, and the optimizer is made anew, at the very step that training resumes with."""
    run(TRAIN, *TWENTY_STEPS, *MODES[mode], "out_dir=once", folder=tmp_path).ok()
    cut_back(tmp_path / "once", 10, tmp_path / "twice")
    # What a killed save leaves is in nobody's way.
    (tmp_path / "twice" / ".step_0000020.partial").mkdir()
    (tmp_path / "twice" / ".step_0000020.partial" / "model.safetensors").write_bytes(b"half")

    before = contents(tmp_path / "twice")
    refused = run(TRAIN, *TWENTY_STEPS, *MODES[mode], "num_iterations=30", "resume=true", "out_dir=twice",
                  folder=tmp_path)  # fmt: skip
    assert "the number of steps (was 20, is 30; see num_iterations) may not change in a run" in refused.error
    assert contents(tmp_path / "twice") == before

    resumed = run(TRAIN, *TWENTY_STEPS, *MODES[mode], "resume=true", "out_dir=twice", folder=tmp_path).ok()
    assert "step 00010/00020 | loss" not in resumed.out
    assert "step 00011/00020 | loss" in resumed.out
    assert_same_checkpoint(tmp_path / "once" / "step_0000020", tmp_path / "twice" / "step_0000020")
    assert metrics(tmp_path / "once") == metrics(tmp_path / "twice")
    assert sorted(path.name for path in (tmp_path / "twice").iterdir()) == [
        "latest", "metrics.jsonl", "step_0000010", "step_0000020"
    ]  # fmt: skip


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    arguments = (*TINY, *ARITHMETIC, "mode=latent", "num_iterations=2", "out_dir=run")
    run(TRAIN, *arguments, folder=tmp_path).ok()
    before = weights(tmp_path / "run" / "latest")
    logged = metrics(tmp_path / "run")
    run(TRAIN, *arguments, "resume=true", folder=tmp_path).ok()
    after = weights(tmp_path / "run" / "latest")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics(tmp_path / "run")[: len(logged)] == logged


def test_another_mode_does_not_resume_a_run(tmp_path: Path) -> None:
    arguments = (*TINY, *ARITHMETIC, "num_iterations=2", "out_dir=run")
    run(TRAIN, *arguments, "mode=weighted", folder=tmp_path).ok()
    before = contents(tmp_path / "run")
    refused = run(TRAIN, *arguments, "mode=latent", "resume=true", folder=tmp_path).error
    assert "decoder (there was none), loop (was none, is sequential) may not change in a run" in refused
    assert "mode (was weighted, is latent)" in refused
    refused = run(TRAIN, *arguments, "mode=weighted", "model.n_layer=2", "resume=true", folder=tmp_path).error
    assert "model.n_layer (was 1, is 2) may not change in a run" in refused
    assert contents(tmp_path / "run") == before


def test_resuming_with_other_options_is_said(tmp_path: Path) -> None:
    once = (TRAIN, *TWENTY_STEPS, *MODES["latent"])
    run(*once, "out_dir=once", folder=tmp_path).ok()
    for name in ("same", "other"):
        cut_back(tmp_path / "once", 10, tmp_path / name)
    assert "other options" not in run(*once, "out_dir=same", "resume=true", folder=tmp_path).ok().out
    refused = run(*once, "optimizer=adamw", "out_dir=other", "resume=true", folder=tmp_path)
    assert "optimizer (was muon, is adamw) may not change in a run" in refused.error
    changed = run(*once, "seed=5", "latent.missing=mask", "out_dir=other", "resume=true", folder=tmp_path).ok()
    assert (
        "resume: from here on other options than before: latent.missing (was answer, is mask), seed (was 0, is 5)"
    ) in " ".join(changed.out.split())


@contextmanager
def signal_after(step: int, number: signal.Signals) -> Iterator[None]:
    """While this lasts, a run in this process gets a signal as soon as it has logged `step`."""
    write, sent = RunLog.write, []

    def write_then_signal(self: RunLog, at: int, values: dict[str, float]) -> None:
        write(self, at, values)
        if at == step and not sent:
            sent.append(at)
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", write_then_signal)
        yield


@pytest.mark.parametrize(
    ("number", "at_step", "stops_at"),
    [(signal.SIGINT, 2, 3), (signal.SIGTERM, 11, 12), (signal.SIGTERM, 19, 20)],
    ids=["SIGINT in the warm-up", "SIGTERM later", "SIGTERM in the last step"],
)
def test_a_signal_ends_training_with_a_checkpoint(
    number: signal.Signals, at_step: int, stops_at: int, tmp_path: Path
) -> None:
    run(TRAIN, *TWENTY_STEPS, *STAGES, "out_dir=once", folder=tmp_path).ok()
    with signal_after(at_step, number):
        stopped = run(TRAIN, *TWENTY_STEPS, *STAGES, "out_dir=twice", folder=tmp_path)
    assert "Traceback" not in stopped.err, stopped.err
    assert (tmp_path / "twice" / "latest").readlink() == Path(f"step_{stops_at:07d}")
    assert set(contents(tmp_path / "twice" / "latest")) == LATENT_FILES
    if stops_at == 20:  # nothing was left to stop
        stopped.ok()
    else:
        assert stopped.status == 128 + number
        assert "resume=true" in stopped.out
        run(TRAIN, *TWENTY_STEPS, *STAGES, "out_dir=twice", "resume=true", folder=tmp_path).ok()
    assert_same_checkpoint(tmp_path / "once" / "step_0000020", tmp_path / "twice" / "step_0000020")
    assert metrics(tmp_path / "once") == metrics(tmp_path / "twice")


def test_a_process_that_gets_a_signal_ends_with_a_checkpoint(tmp_path: Path) -> None:
    """Two processes side by side, one gets Ctrl-C, one SIGTERM, at whatever step they are; then one goes on.

    Their pipes are so small that neither gets far before it is listened to.
    """
    arguments = [*TINY, *ARITHMETIC, "mode=weighted", "num_iterations=150"]
    stops = {"interrupted": signal.SIGINT, "terminated": signal.SIGTERM}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", TRAIN, *arguments, f"out_dir={name}"],
            cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            pipesize=4096,
        )
        for name in stops
    }  # fmt: skip
    for name, process in processes.items():
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("step 00003"):
            assert line, process.communicate()
        process.send_signal(stops[name])
    for name, process in processes.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + stops[name], err
        assert "Traceback" not in err
        assert "resume=true" in out
        checkpoint = sl.load_checkpoint(tmp_path / name)
        assert 3 <= checkpoint.step < 150
        assert metrics(tmp_path / name)[-1]["step"] == checkpoint.step

    run(TRAIN, *arguments, "out_dir=terminated", "resume=true", folder=tmp_path).ok()
    steps = [line["step"] for line in metrics(tmp_path / "terminated") if "loss" in line]
    assert steps == list(range(1, 151))


def test_evals_of_a_model_stopped_in_its_warm_up(sums: Path, tmp_path: Path) -> None:
    """It has a decoder but no thoughts yet: it is answered with and scored like a model that writes."""
    arguments = [*TINY, "mode=latent", "data=gsm8k", f"data.path={sums}", "num_iterations=10", "out_dir=run"]
    with signal_after(1, signal.SIGTERM):
        assert run(TRAIN, *arguments, folder=tmp_path).status == 128 + signal.SIGTERM
    run("evals.gsm8k", "ckpt=run/latest", "limit=3", "device=cpu", folder=tmp_path).ok()
    report = strict_json(report_in(tmp_path / "run/evals").read_text())
    assert (report["n"], report["thoughts"]) == (3, 0)


# --- many processes, many runs ---------------------------------------------------------------------------------------


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", TRAIN)


@both_modes
def test_two_ranks_equal_one_with_twice_the_accumulation(mode: str, tmp_path: Path) -> None:
    """Seven examples a step: the ranks have four and three, so two micro-batches each, where one process has four."""
    arguments = [*TINY, *ARITHMETIC, f"mode={mode}", "num_iterations=6", "eval_every=3"]
    arguments += ["target_examples_per_step=7", "device_batch_size=2"]
    if mode == "latent":
        arguments += ["latent.warmup=0.34"]  # two steps written, four with thoughts
    two = run_process(*LAUNCHER, *arguments, folder=tmp_path).ok()
    assert "2 rank(s)" in two.out
    assert two.out.count("step 00003/00006 | loss") == 1  # rank 0 alone reports
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [mode]
    one = run(TRAIN, *arguments, "out_dir=alone", folder=tmp_path).ok()
    assert "1 rank(s)" in one.out

    ours, theirs = tmp_path / "runs" / mode / "latest", tmp_path / "alone" / "latest"
    assert set(contents(ours)) == (LATENT_FILES if mode == "latent" else CHECKPOINT_FILES)
    assert sl.load_checkpoint(ours).step == 6
    together, alone = weights(ours), weights(theirs)
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        if not name.startswith("trainer_state"):
            error = (together[name] - value).norm() / value.norm()
            assert error < 1e-5, f"{name} differs by {error:.1e}"
    for line, other in zip(metrics(tmp_path / "runs" / mode), metrics(tmp_path / "alone"), strict=True):
        for key, value in other.items():
            if key != "padding":  # which does depend on how a step is cut
                # V-information is a small difference of two losses.
                small = 1e-3 if key == "thought_v_information" else 1e-6
                assert line[key] == pytest.approx(value, rel=1e-3, abs=small), key


@pytest.mark.slow
def test_more_ranks_than_held_out_problems(tmp_path: Path) -> None:
    """Refused before training begins, not at its end, when it would be lost; likewise fewer examples than ranks."""
    arguments = [*TINY, *ARITHMETIC, "mode=latent", "num_iterations=2", "out_dir=run"]
    for option, reason in (
        ("eval_examples=1", "error: eval_examples: 1 held-out problems are fewer than the 2 ranks"),
        ("target_examples_per_step=1", "error: target_examples_per_step=1: must be at least the 2 ranks"),
    ):
        outcome = run_process(*LAUNCHER, *arguments, option, folder=tmp_path)
        assert outcome.status != 0
        assert reason in outcome.err
        assert "loss" not in outcome.out, "not a step was trained"
        assert not (tmp_path / "run").exists()


def test_a_sweep_makes_a_folder_a_run(tmp_path: Path) -> None:
    run(TRAIN, "-m", "seed=0,1", "num_iterations=3", *TINY, *ARITHMETIC, folder=tmp_path).ok()
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert folders == ["latent", "latent-2"]
    runs = [sl.load_checkpoint(tmp_path / "runs" / name) for name in folders]
    assert [checkpoint.config["seed"] for checkpoint in runs] == [0, 1]
    assert [checkpoint.step for checkpoint in runs] == [3, 3]
    assert not torch.equal(runs[0].model.embedding.weight, runs[1].model.embedding.weight)


# --- wandb -----------------------------------------------------------------------------------------------------------


def wandb_records(file: Path) -> list[Any]:
    """What an offline run wrote: a LevelDB log (32 KiB blocks of chunks: CRC, length, kind, data) of protobuf records.

    https://github.com/google/leveldb/blob/main/doc/log_format.md; wandb puts 7 bytes of its own in front.
    """
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    make_record: Any = import_module("wandb.proto.wandb_internal_pb2").Record  # wandb picks it by protobuf's version
    records: list[Any] = []
    position, pending = 7, b""
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            break
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            record = make_record()
            record.ParseFromString(pending)
            records.append(record)
            pending = b""
    return records


def test_wandb_offline_gets_the_metrics(tmp_path: Path) -> None:
    places = {key: str(tmp_path / "home") for key in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    env = {**OFFLINE, **places, "WANDB_MODE": "offline"}
    arguments = ("mode=latent", "num_iterations=4", "latent.warmup=0.25", "run=a first run", "out_dir=out")
    run_process("-m", TRAIN, *TINY, *ARITHMETIC, *arguments, folder=tmp_path, env=env).ok()
    (file,) = (tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb")
    records = wandb_records(file)

    (started,) = [record.run for record in records if record.HasField("run")][:1]
    assert (started.display_name, started.project) == ("a first run", "simcot_latent")
    config = {item.key: strict_json(item.value_json) for item in started.config.update}
    assert config["latent"]["warmup"] == 0.25
    logged: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.HasField("history"):
            values = {item.key or item.nested_key[0]: strict_json(item.value_json) for item in record.history.item}
            logged.setdefault(values["_step"], {}).update(values)
    written: dict[int, dict[str, Any]] = {}
    for line in read_lines(tmp_path / "out" / "metrics.jsonl"):
        written.setdefault(line["step"], {}).update(line)
    assert sorted(logged) == sorted(written) == [1, 2, 3, 4]
    for step, line in written.items():
        assert {key: logged[step][key] for key in line if key != "step"} == {k: line[k] for k in line if k != "step"}
    assert {"val_accuracy", "step_loss"} <= logged[4].keys()


def test_a_short_run_makes_only_the_problems_that_it_trains_on(tmp_path: Path) -> None:
    """Not a million of them; too long ones count where the run comes to them."""
    arguments = ("mode=latent", "data.train_size=1000000", "data.validation_size=8", "num_iterations=2", "out_dir=run")
    began = time.monotonic()
    outcome = run(TRAIN, *TINY, *arguments, folder=tmp_path).ok()
    assert time.monotonic() - began < 60, "making and encoding all of them takes minutes"
    assert "1000000 problems, 4 held out" in outcome.out


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(tmp_path: Path) -> None:
    places = {key: str(tmp_path / "home") for key in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    env = {**OFFLINE, **places, "WANDB_MODE": "offline"}
    arguments = ("mode=weighted", "num_iterations=6", "checkpoint_every=2", "run=first", "out_dir=out")
    run_process("-m", TRAIN, *TINY, *ARITHMETIC, *arguments, folder=tmp_path, env=env).ok()
    (tmp_path / "out/latest").unlink()
    (tmp_path / "out/latest").symlink_to("step_0000004")
    run_process("-m", TRAIN, *TINY, *ARITHMETIC, *arguments, "resume=true", folder=tmp_path, env=env).ok()
    files = sorted((tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    ids = [next(record.run.run_id for record in wandb_records(file) if record.HasField("run")) for file in files]
    assert len(ids) == 2
    assert ids[0] == ids[1] == (tmp_path / "out/wandb_id").read_text().strip()
