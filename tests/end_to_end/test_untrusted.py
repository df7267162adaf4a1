"""A folder from a stranger: it runs nothing, tells nothing, costs no more than its size, and is refused in one line."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import (
    ARITHMETIC,
    OFFLINE,
    PROBE,
    REPOSITORY,
    TINY,
    TRAIN,
    Outcome,
    Trained,
    environment,
    predictions_of,
    report_in,
    run,
    run_process,
)
from conftest import made_once
from hostile import CALL, HOSTILE, PWNED, WRITE, tampered
from safetensors.torch import load_file, save_file

import simcot_latent as sl
from simcot_latent.checkpoint import write_checkpoint
from simcot_latent.checkpoint_config import read_config
from simcot_latent.data.patterns import GPT2_PATTERN, KNOWN_PATTERNS, pieces
from simcot_latent.data.sources import SPLITS, Split, load_first
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.tokenizer import Tokenizer, default_tokenizer
from simcot_latent.errors import UserError
from simcot_latent.folders import fingerprint
from simcot_latent.interop.exported import export_hf
from simcot_latent.interop.pretrained import load_pretrained
from simcot_latent.interop.published_tokenizers import read_tokenizer, write_tokenizer
from simcot_latent.weights import DTYPES, save_tensors

OLD_CHECKPOINTS = Path(__file__).with_name("old_checkpoints")
OLD = {1: OLD_CHECKPOINTS / "latent" / "step_0000006", 2: OLD_CHECKPOINTS / "format_2" / "step_0000006"}
"""Checkpoints of earlier formats."""

EVAL = "evals.arithmetic"
SECRET = {"SECRET": "s3cr3t-value"}
LATENT = [*TINY, *ARITHMETIC, "mode=latent", "latent.n_latents=2", "latent.stages=0", "latent.projector_width=8",
          "num_iterations=2"]  # fmt: skip


@pytest.fixture(scope="session")
def arithmetic_run(shared_folder: Path) -> Path:
    """A checkpoint of mode=latent, trained for two steps on embedded problems."""

    def make(folder: Path) -> None:
        folder.mkdir()
        run(TRAIN, *LATENT, f"out_dir={folder / 'run'}", folder=folder).ok()

    return made_once(shared_folder / "arithmetic", make) / "run" / "latest"


@pytest.fixture
def checkpoint(arithmetic_run: Path, tmp_path: Path) -> Path:
    """A copy of its own for a test to tamper with."""
    return Path(shutil.copytree(arithmetic_run, tmp_path / "checkpoint"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where commands are run."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def tamper(checkpoint: Path, change: Callable[[dict[str, Any]], object], file: str = "config.json") -> None:
    config = json.loads((checkpoint / file).read_text())
    change(config)
    (checkpoint / file).write_text(json.dumps(config))


def evaluate(checkpoint: Path, work: Path, *arguments: str) -> Outcome:
    """As a stranger would have it: the manifest fits what was tampered with, or there is none."""
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    return run(EVAL, f"ckpt={checkpoint}", "limit=2", "device=cpu", *arguments, folder=work, env=SECRET)


def refusal(call: Callable[[], object], seconds: float = 10) -> str:
    """The one line that a call is refused with, soon."""
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        call()
    assert time.process_time() - began < seconds
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- code, secrets, paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", [WRITE, CALL, [WRITE], [CALL, "+"]])
@pytest.mark.parametrize("key", ["operations", "seed"])
def test_a_data_source_is_told_plain_values_only(hostile: Any, key: str, checkpoint: Path, work: Path) -> None:
    tamper(checkpoint, lambda config: config["run"]["data"].update({key: hostile}))
    message = evaluate(checkpoint, work, "verify=false").error
    assert f"{checkpoint}/config.json: run.data.{key}" in message
    probe = run(PROBE, f"ckpt={checkpoint}", "data=arithmetic", "verify=false", folder=work).error
    assert f"run.data.{key}" in probe
    assert not list(work.iterdir())


def test_nothing_is_resolved(checkpoint: Path, work: Path) -> None:
    for value in ("${oc.env:SECRET}", ["${oc.env:SECRET}"], "${oc.env:HOME}"):
        tamper(checkpoint, lambda config, value=value: config["run"]["data"].update(operations=value))
        outcome = evaluate(checkpoint, work, "verify=false")
        assert "data.operations" in outcome.error
        assert SECRET["SECRET"] not in outcome.out + outcome.err
        assert os.environ["HOME"] not in outcome.err.replace(str(checkpoint), "")


@pytest.mark.parametrize("key", ["unknown", "_partial_", "_args_", "_recursive_", "_convert_", "self"])
def test_fields_that_the_source_has_not_are_named(key: str, checkpoint: Path, work: Path) -> None:
    tamper(checkpoint, lambda config: config["run"]["data"].update({key: 1}))
    message = evaluate(checkpoint, work, "verify=false").error
    assert key in message
    assert "config.json" in message


def test_the_class_is_never_the_checkpoints(checkpoint: Path, work: Path) -> None:
    """Another `_target_` is another source: the command line's is used, with its own settings."""
    tamper(checkpoint, lambda config: config["run"].update(data=CALL))
    evaluate(checkpoint, work, "data.test_size=3", "data.train_size=4", "verify=false").ok()
    assert not list(work.iterdir())
    names = ("objective", "curriculum", "loop", "steps")
    parts: dict[str, Any] = {**dict.fromkeys(names, "os.system"), "terms": ["os.system"], "use": ["mine"]}
    (work / "mine.py").write_text(f"open({PWNED!r}, 'w')\n")
    for saved in (parts, dict.fromkeys([*parts, "tokenizer", "mode", "model"], CALL)):
        tamper(checkpoint, lambda config, saved=saved: config["run"].update(saved))
        evaluate(checkpoint, work, "data.test_size=3", "verify=false").ok()
        assert [path.name for path in work.iterdir()] == ["mine.py"]


@pytest.mark.parametrize("key", ["os.system", "simcot_latent.loops.pause.Pause", "none", "", "replace", "../pause"])
def test_a_loop_is_one_of_the_table(key: str, checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config["loop"].update(key=key))
    message = refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))
    assert f"{checkpoint}/config.json: loop.key={key}: must be one of " in message
    assert "pause_multipass, sequential, soft" in message


@pytest.mark.parametrize("settings", [{"unknown": 1}, {"feeds_last": "no"}, {"_target_": "os.system"}, [], None, 3])
def test_a_loop_has_its_own_settings(settings: Any, checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config["loop"].update(settings=settings))
    message = refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))
    assert f"{checkpoint}/config.json: " in message
    assert "loop.settings" in message


@pytest.mark.parametrize(
    "parts", [["../model"], ["a" * 101], ["a/b"], ["Contrast"], [""], [3], ["."], "contrast", {"a": 1}, None]
)
def test_parts_are_names_of_files_beside_the_model(parts: Any, checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config.update(parts=parts))
    message = refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))
    assert f"{checkpoint}/config.json: " in message
    assert "parts" in message


def test_a_part_that_is_not_there(checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config.update(parts=["contrast"]))
    assert "contrast.safetensors" in refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))


def test_a_part_is_finite_and_no_view_of_its_file(checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config.update(parts=["contrast"]))
    save_file({"w": torch.tensor([1.0, math.inf])}, checkpoint / "contrast.safetensors")
    message = refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))
    assert f"{checkpoint}/contrast.safetensors: w holds numbers that are not finite" in message
    save_file({"w": torch.ones(2)}, checkpoint / "contrast.safetensors")
    loaded = sl.load_checkpoint(checkpoint, verify=False)
    write_checkpoint(loaded, checkpoint)
    assert loaded.parts["contrast"]["w"].tolist() == [1.0, 1.0]
    assert sl.load_checkpoint(checkpoint).parts["contrast"]["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("files", [("diary.txt",), ("diary.txt", "train.jsonl")])
def test_a_path_of_a_checkpoint_lists_no_folder(files: tuple[str, ...], checkpoint: Path, work: Path) -> None:
    for name in files:
        (work / name).write_text('{"question": "Mine?", "answer": "#### 1"}\n')
    data = {"_target_": "simcot_latent.data.sources.gsm8k.GSM8K", "path": str(work)}
    tamper(checkpoint, lambda config: config["run"].update(data=data))
    arguments = (f"ckpt={checkpoint}", "verify=false")
    message = run("evals.gsm8k", *arguments, folder=work, env=OFFLINE).error
    assert str(work) in message
    assert "diary" not in message
    given = run("evals.gsm8k", *arguments, f"data.path={work}", folder=work, env=OFFLINE).error
    assert "diary" in given, "of a path that the user gave, the names help"


def test_a_path_of_a_checkpoint_names_no_file_in_notes(checkpoint: Path, work: Path) -> None:
    row = '{"question": "Mine?", "answer": "<<1+1=2>> #### 2"}\n'
    for name in ("test.jsonl", "my_diary.csv", "my_taxes.jsonl.xz"):
        (work / name).write_text(row)
    data = {"_target_": "simcot_latent.data.sources.gsm8k.GSM8K", "path": str(work)}
    tamper(checkpoint, lambda config: config["run"].update(data=data))
    given = (f"data.path={work}",)
    for module, arguments in (("evals.gsm8k", ()), (PROBE, ("data=gsm8k",))):
        arguments = (f"ckpt={checkpoint}", "verify=false", *arguments)
        told = run(module, *arguments, folder=work).ok().out
        assert f"data.path={work}, as in training" in told
        assert "test: 2 x file that is not read, beside those that are" in told
        assert "my_" not in told
        assert "test: 1 x file that is not read (my_diary.csv)" in run(module, *arguments, *given, folder=work).ok().out
    (work / "their_test.jsonl").write_text(row)
    (work / "test.jsonl").rename(work / "my_test.jsonl")
    message = run("evals.gsm8k", f"ckpt={checkpoint}", "verify=false", folder=work).error
    assert "2 files are all test data" in message
    assert "my_" not in message


def test_settings_of_another_source_are_said_to_be_left(checkpoint: Path, work: Path) -> None:
    line = "the settings are the command line's"
    assert line not in evaluate(checkpoint, work).ok().out
    tamper(checkpoint, lambda config: config["run"]["data"].update(_target_="[red]mine.Mine" + "\n" * 99))
    told = evaluate(checkpoint, work, "data.test_size=3").ok().out
    assert "trained on '[red]mine.Mine" in told
    assert line in " ".join(told.split())
    arguments = (f"ckpt={checkpoint}", "data=arithmetic", "limit=2", "verify=false")
    assert line in " ".join(run(PROBE, *arguments, folder=work).ok().out.split())
    json.loads(run(PROBE, *arguments, "format=json", folder=work).ok().out)


def test_a_source_of_ones_own_is_given_the_checkpoints_plain_values(checkpoint: Path, work: Path) -> None:
    (work / "configs" / "data").mkdir(parents=True)
    (work / "configs" / "data" / "mine.yaml").write_text("_target_: mine.Mine\nword: a\nnested: {a: 1}\nnumber: 1\n")
    (work / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from simcot_latent.data.problem import Problem\n"
        "from simcot_latent.data.sources import LoadedSplit\n\n"
        "@dataclass\nclass Mine:\n    word: str\n    nested: dict\n    number: int\n\n"
        "    def load(self, split):\n"
        "        return LoadedSplit([Problem(f'{self.word} {dict(self.nested)} {self.number}', (), '', '1')])\n"
    )
    saved: dict[str, Any] = {"_target_": "mine.Mine", "word": "${oc.env:SECRET}", "nested": {"a": 1}, "number": 2}
    command = ("-m", EVAL, "--config-dir=configs", f"ckpt={checkpoint}", "data=mine", "data.number=3", "verify=false")
    env = {**SECRET, "PYTHONPATH": f"{REPOSITORY}:{work}"}
    tamper(checkpoint, lambda config: config["run"].update(data=saved))
    run_process(*command, folder=work, env=env).ok()
    line = json.loads(predictions_of(report_in(checkpoint / "evals", "arithmetic.test")).read_text())
    assert line["question"] == "${oc.env:SECRET} {'a': 1} 3", "as it stands; what the command line says goes first"
    tamper(checkpoint, lambda config: config["run"]["data"].update(nested={"a": 2}))
    outcome = run_process(*command, folder=work, env=env)
    assert "run.data.nested" in outcome.error
    assert "data.nested=" in outcome.error, "what to do about it"
    run_process(*command, "data.nested.a=2", folder=work, env=env).ok()


def test_a_hub_name_is_no_path(checkpoint: Path, work: Path) -> None:
    (work / "train.jsonl").write_text('{"question": "Mine?", "answer": "#### 1"}\n')
    source = "simcot_latent.data.sources.gsm8k.GSM8K"
    for value in (str(work), "../work", "./work", "/", ".."):
        for key in ("hub_id", "hub_config"):
            data = {"_target_": source, key: value}
            tamper(checkpoint, lambda config, data=data: config["run"].update(data=data))
            assert (
                f"data.{key}"
                in run("evals.gsm8k", f"ckpt={checkpoint}", "verify=false", folder=work, env=OFFLINE).error
            )


def test_what_a_hub_repository_says_is_no_argument(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it say where data lie on this machine."""
    source = {"_target_": "simcot_latent.data.sources.gsm8k.GSM8K", "path": "/home/me/secret"}

    def change(config: dict[str, Any]) -> None:
        config["run"].update(data=source, init_from="/home/me/secret", out_dir="/home/me")

    tamper(checkpoint, change)
    monkeypatch.setattr("simcot_latent.hub.snapshot_download", lambda *_, **__: str(checkpoint))
    run_of_it = sl.Checkpoint.from_pretrained("me/name", verify=False).config
    assert run_of_it["data"]["path"] is None
    assert "/home/me" not in json.dumps(run_of_it)


@pytest.mark.parametrize("share", [0.01, pytest.param(1.0, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_every_place_of_a_configuration(share: float, checkpoint: Path, work: Path) -> None:
    """Every leaf replaced by hostile values, every object with hostile keys: a use that works, or one line."""
    command = [sys.executable, str(Path(__file__).with_name("hostile.py")), str(checkpoint), str(work), str(share)]
    done = subprocess.run(command, cwd=work, env=environment(SECRET), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert SECRET["SECRET"] not in done.stdout
    outcomes = json.loads(done.stdout)["outcomes"]
    for outcome in outcomes:
        assert outcome["status"] in (0, 2), outcome
        if outcome["status"] == 2:
            assert len(outcome["err"].splitlines()) == 1, outcome
        assert outcome["seconds"] < 10, outcome
    assert {outcome["status"] for outcome in outcomes} == {0, 2}, "some do harm, some none"
    assert not list(work.iterdir())
    written = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET["SECRET"].encode() in path.read_bytes()]
    assert PWNED not in {path.name for path in written}


def test_the_walk_reaches_everything(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    names = [what for what, _ in tampered(config)]
    for place in (
        "run.data.operations.0 = ",
        "run.data + _target_",
        "model.n_layer = ",
        "stage.thoughts = ",
        "loop + ",
        "loop.key = ",
        "loop.settings.projector_width = ",
        "groups.latents_per_step = ",
        "parts = ",
        "step = ",
    ):
        assert any(name.startswith(place) for name in names), place
    assert len(names) > 60 * len(HOSTILE)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("file", ["model.safetensors", "step_decoder.safetensors", "loop.safetensors"])
def test_weights_that_are_not_finite(file: str, number: float, checkpoint: Path) -> None:
    weights = load_file(checkpoint / file)
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1] = number
    save_file(weights, checkpoint / file)
    message = refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))
    assert f"{checkpoint / file}: {name} holds numbers that are not finite" in message


def test_published_weights_that_are_not_finite(published: Path) -> None:
    weights = load_file(published / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.c_fc.weight"):
        weights[name].view(-1)[0] = math.nan
    save_file(weights, published / "model.safetensors")
    message = refusal(lambda: load_pretrained(published))
    assert f"{published}: " in message
    assert "more weights hold numbers that are not finite" in message


# --- sizes -----------------------------------------------------------------------------------------------------------

SIZES = [("n_layer", 10**7), ("n_layer", 2**31 - 1), ("vocab_size", 2**40), ("vocab_size", 2**31 - 1),
         ("n_embd", 2**30), ("ffn_width", 2**31 - 1), ("context_length", 2**40),
         ("n_head", 2**40), ("n_layer", 10**400), ("rope_base", 10**400), ("n_layer", True),
         ("norm_eps", "1")]  # fmt: skip


@pytest.mark.parametrize("part", ["model", "step_decoder"])
@pytest.mark.parametrize(("key", "value"), SIZES)
def test_shapes_are_the_files(part: str, key: str, value: Any, checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config[part].update({key: value}))
    if part == "step_decoder" and key == "vocab_size" and value < 2**31:
        return  # a decoder that shares the model's table has none of its own
    message = refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))
    assert "config.json" in message or "safetensors" in message


@pytest.mark.parametrize("value", [2**31 - 1, 2**40, 10**400, 9, 0, -1, True, "8", None])
def test_a_projector_is_the_files(value: Any, checkpoint: Path) -> None:
    """Of the present format, and of format 2, where it was a part of the model."""
    old = Path(shutil.copytree(OLD[2], checkpoint.parent / "old"))
    tamper(old, lambda config: config["model"].update(projector_width=value))
    tamper(checkpoint, lambda config: config["loop"]["settings"].update(projector_width=value))
    for folder in (old, checkpoint) if value is not None else (old,):  # of what is not asked for, no file is read
        message = refusal(lambda folder=folder: sl.load_checkpoint(folder, verify=False))
        assert str(folder) in message
        assert "config.json" in message or "safetensors" in message


def test_many_blocks_by_name_cost_no_more_than_the_file(checkpoint: Path) -> None:
    """As many names as blocks are claimed, but not the weights of a block each."""
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        weights | {f"transformer.blocks.{i}.x": torch.zeros(1) for i in range(20_000)}, checkpoint / "model.safetensors"
    )
    tamper(checkpoint, lambda config: config["model"].update(n_layer=20_000))
    assert "does not fit" in refusal(lambda: sl.load_checkpoint(checkpoint, verify=False), seconds=5)


@pytest.mark.parametrize(("section", "key"), [("stage", "thoughts"), ("groups", "latents_per_step")])
@pytest.mark.parametrize("value", [10**6, 10**13, -2, 2.5, "4"])
def test_thoughts_fit_the_context(section: str, key: str, value: Any, checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config[section].update({key: value}))
    assert f"{section}.{key}" in refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))


def test_a_decoder_has_room_for_a_step_group(checkpoint: Path) -> None:
    """Its positions are rotary, so the file does not tell how many it has."""
    tamper(checkpoint, lambda config: config["step_decoder"].update(context_length=1))
    message = refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))
    assert "step_decoder.context_length=1: too short for a step group of groups.latents_per_step=1" in message


@pytest.mark.parametrize("value", [-1, 2.5, "1", True, [0]])
def test_a_stage_writes_from_a_step_on(value: Any, checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config["stage"].update(first_written=value))
    assert "stage.first_written" in refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))


@pytest.mark.parametrize("change", [{"loop": None}, {"answers": {"thinks": False}}])
def test_thoughts_need_a_loop(change: dict[str, Any], checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config.update(change))
    message = refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))
    assert "stage.thoughts=2: must be 0 without a loop, and with answers.thinks=false" in message


@pytest.mark.parametrize("key", ["n_latents", "latents_per_step"])
@pytest.mark.parametrize("value", [10**6, 10**13, -2, 2.5, "4"])
def test_thoughts_of_an_earlier_format_fit_the_context(key: str, value: Any, tmp_path: Path) -> None:
    old = Path(shutil.copytree(OLD[2], tmp_path / "old"))
    tamper(old, lambda config: config["thoughts"].update({key: value}))
    message = refusal(lambda: sl.load_checkpoint(old, verify=False))
    assert f"{old}/config.json" in message
    assert "thoughts" in message


@pytest.mark.parametrize("written", OLD)
@pytest.mark.slow
def test_every_place_of_an_earlier_configuration(written: int, tmp_path: Path) -> None:
    """What a stranger may write into it is read as the present format is, or refused in one line."""
    file, refused, read = tmp_path / "config.json", 0, 0
    for what, changed in tampered(json.loads((OLD[written] / "config.json").read_text())):
        file.write_text(json.dumps(changed))
        try:
            saved, said = read_config(file), ""
        except UserError as error:
            saved, said = None, str(error)
        if saved is None:
            assert said.startswith(f"{file}: "), what
            assert "\n" not in said, what
            refused += 1
        else:
            assert saved.loop is None or saved.loop.key == "sequential", what
            read += 1
    assert refused > 500
    assert read > 500


@pytest.mark.parametrize("key", ["question_end", "answer_mark"])
def test_texts_around_an_answer_are_short(key: str, checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config["answers"].update({key: "ab" * 500}))
    sl.load_checkpoint(checkpoint, verify=False)
    tamper(checkpoint, lambda config: config["answers"].update({key: "ab" * 10**6}))
    message = refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))
    assert f"answers.{key}=(2,000,000 characters): must be at most 1,000 long" in message


@pytest.mark.parametrize("value", [10**13, 2**31 - 1, -1, "8", None, [8]])
def test_an_answer_has_an_end(value: Any, checkpoint: Path, work: Path) -> None:
    tamper(checkpoint, lambda config: config["run"].update(max_new_tokens=value))
    assert "run.max_new_tokens" in evaluate(checkpoint, work, "verify=false").error


@pytest.mark.parametrize("key", ["test_size", "validation_size"])
def test_held_out_problems_are_bounded(key: str, checkpoint: Path, work: Path) -> None:
    tamper(checkpoint, lambda config: config["run"]["data"].update({key: 10**6}))
    message = evaluate(checkpoint, work, "verify=false").error
    assert f"{checkpoint}/config.json: run.data.{key}=1000000: must be at most 100,000" in message
    assert f"run.data.{key}" in run(PROBE, f"ckpt={checkpoint}", "data=arithmetic", folder=work).error
    evaluate(checkpoint, work, f"data.{key}=3").ok()


def test_training_problems_are_bounded(checkpoint: Path, work: Path) -> None:
    """Of which there may be many: they count only where they are asked for."""
    tamper(checkpoint, lambda config: config["run"]["data"].update(train_size=10**7))
    evaluate(checkpoint, work, "verify=false").ok()
    arguments = (f"ckpt={checkpoint}", "device=cpu", "split=train", "verify=false")
    message = run("evals.arithmetic", *arguments, folder=work).error
    assert "config.json: run.data.train_size=10000000: must be at most 100,000; if you trust it" in message
    began = time.monotonic()
    run("evals.arithmetic", *arguments, "limit=3", folder=work).ok()
    run("evals.arithmetic", *arguments, "data.train_size=3", folder=work).ok()
    run(PROBE, *arguments, "data=arithmetic", "limit=3", folder=work).ok()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_no_more_problems_are_made_than_the_limit(split: Split, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data.test_size` may be a checkpoint's: 100,000 problems take half a minute and more."""
    made: list[int] = []
    make = Arithmetic._make
    monkeypatch.setattr(Arithmetic, "_make", lambda self, *args: made.append(args[1]) or make(self, *args))
    source = Arithmetic(test_size=10**5, validation_size=10**5, version=version)
    problems = load_first(source, split, 3).problems
    assert made == [0, 1, 2]
    assert problems == Arithmetic(0, 3, 3, 3, version=version).load(split).problems


def test_a_limit_is_kept_by_eval_and_probe(checkpoint: Path, work: Path) -> None:
    tamper(checkpoint, lambda config: config["run"]["data"].update(test_size=10**5))
    began = time.monotonic()
    evaluate(checkpoint, work).ok()
    run(PROBE, f"ckpt={checkpoint}", "data=arithmetic", "limit=2", folder=work).ok()
    assert time.monotonic() - began < 20


@pytest.fixture
def published(checkpoint: Path, tmp_path: Path) -> Path:
    """A folder in Hugging Face's layout."""
    export_hf(sl.load_checkpoint(checkpoint), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("value", [10**7, 2**40, -1, 2.0, "2", None, [2]])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size",
                                 "num_attention_heads", "max_position_embeddings"])  # fmt: skip
def test_published_sizes_are_the_files(key: str, value: Any, published: Path) -> None:
    tamper(published, lambda config: config.update({key: value}))
    if (key, value) in (("max_position_embeddings", 10**7), ("intermediate_size", None)):  # no memory; a default
        load_pretrained(published)
        return
    assert str(published) in refusal(lambda: load_pretrained(published))


def gguf(fields: bytes, count: int, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + fields


def gguf_array(kind: int, length: int) -> bytes:
    return struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, kind, length)


@pytest.mark.parametrize(
    "content",
    [
        gguf(b"", 2**60),
        gguf(b"", 0, 2**60),
        *(gguf(gguf_array(kind, 2**60), 1) for kind in range(13)),
        gguf(gguf_array(9, 1) + struct.pack("<IQ", 9, 1) * 5000, 1),
        gguf(struct.pack("<Q", 2**60), 1),
    ],
)
def test_counts_of_gguf_are_not_believed(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    assert "not a whole GGUF file" in refusal(lambda: load_pretrained(file), seconds=5)


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20)])
def test_a_number_that_claims_to_be_a_tensor(shape: tuple[int, ...], tmp_path: Path, published: Path) -> None:
    (published / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.zeros(1).expand(shape)}, published / "pytorch_model.bin")
    assert "only plain tensors" in refusal(lambda: load_pretrained(published))


def test_a_compressed_pickle(published: Path) -> None:
    """torch.save compresses nothing; a file that is, may be a thousand times as large when it is read."""
    import zipfile

    (published / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(10**6)}, published / "plain.bin")
    with (
        zipfile.ZipFile(published / "plain.bin") as plain,
        zipfile.ZipFile(published / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "pytorch_model.bin" in refusal(lambda: load_pretrained(published))


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [10**13, 5, [256], [-1], ["a"], {"0": 1}, [[1]], None, "ab"])
def test_missing_bytes_are_bytes(value: Any, checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config.update(missing_bytes=value), "tokenizer/tokenizer.json")
    assert "missing_bytes" in refusal(lambda: Tokenizer.load(checkpoint / "tokenizer"))


@pytest.mark.parametrize("i", [2**33, 2**64, 10**7, -1, 1.5, "3", True, None])
@pytest.mark.parametrize("where", ["vocab", "added"])
def test_ids_have_few_holes(i: Any, where: str, tmp_path: Path) -> None:
    write_tokenizer(default_tokenizer(), tmp_path)

    def change(content: dict[str, Any]) -> None:
        if where == "vocab":
            content["model"]["vocab"]["zzzz"] = i
        else:
            content["added_tokens"].append({"id": i, "content": "<|mine|>", "special": True})

    tamper(tmp_path, change, "tokenizer.json")
    assert "tokenizer.json" in refusal(lambda: read_tokenizer(tmp_path))


def test_a_token_that_is_very_long(tmp_path: Path) -> None:
    write_tokenizer(default_tokenizer(), tmp_path)
    tamper(tmp_path, lambda content: content["model"]["vocab"].update({"a" * 10**6: 2100}), "tokenizer.json")
    assert "characters" in refusal(lambda: read_tokenizer(tmp_path))


@pytest.mark.parametrize("pattern", ["", "(?s).{0}", "(?!)", "no text of this kind"])
def test_a_pattern_that_finds_nothing(pattern: str, checkpoint: Path) -> None:
    tamper(checkpoint, lambda config: config.update(pattern=pattern), "tokenizer/tokenizer.json")
    message = refusal(lambda: sl.load_checkpoint(checkpoint, verify=False))
    assert f"{checkpoint}/tokenizer/tokenizer.json with ranks.tiktoken: pattern {pattern!r} finds no piece" in message


@pytest.mark.parametrize("role", ["bot", "eot", "end"])
def test_a_role_that_is_missing(role: str, checkpoint: Path, work: Path) -> None:
    tamper(checkpoint, lambda config: config["roles"].pop(role), "tokenizer/tokenizer.json")
    message = evaluate(checkpoint, work).error
    assert f"{checkpoint}/tokenizer/tokenizer.json: roles name no {role} token" in message
    assert "with_roles" not in message


def with_pattern(pattern: str) -> Tokenizer:
    ours = default_tokenizer()
    return Tokenizer("x", pattern, ours.ranks, ours.special_tokens)


@pytest.mark.parametrize("pattern", [r"(?:a|a)*b|[\s\S]", r"(?:a|aa)+$|[\s\S]", r"(?:\w|\d|[a-z])*!|[\s\S]"])
def test_a_pattern_that_backtracks_for_ever(pattern: str) -> None:
    message = refusal(lambda: with_pattern(pattern).encode("a" * 4999 + "?"))
    assert "pattern" in message
    assert "5,000 characters" in message


@pytest.mark.parametrize("pattern", ["(?:(?:a{300}){300}){300}", "a{1,99999}", "a" * 10**6, "(?:(?=a)a{1000}){1000}",
                                     "(", "\ud800", "(" * 900 + "a" + ")" * 900])  # fmt: skip
def test_a_pattern_that_takes_long_to_compile(pattern: str) -> None:
    assert "pattern" in refusal(lambda: with_pattern(pattern), seconds=2)


@pytest.mark.parametrize("pattern", sorted(KNOWN_PATTERNS))
def test_texts_over_which_tiktoken_panics(pattern: str) -> None:
    """A long run of blanks overflows its stack: `PanicException`, which is no `Exception`."""
    tokenizer = with_pattern(pattern)
    for text in (" " * 300_000, "\n" * 300_000, " a" + " \t" * 150_000 + "b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pattern", sorted(KNOWN_PATTERNS))
def test_pieces_are_those_of_tiktoken(pattern: str) -> None:
    """What is cut by the other library has the same ids."""
    tokenizer = with_pattern(pattern)
    text = "Tom's  12,345 pens -- \u00e9t\u00e9 \u4e2d\u6587\n\n\t x=<<3+4=7>>7 \u00bd \u2028\u00a0end   "
    assert "".join(pieces(pattern, text)) == text
    assert tokenizer._encode_pieces(text)[0] == tokenizer.encoding.encode_ordinary(text)


def test_other_patterns_still_work() -> None:
    """A checkpoint whose tokenizer has a pattern that we do not know is not refused for that."""
    tokenizer = with_pattern(r"\d|[a-z]+| +|[\s\S]")
    assert tokenizer.decode(tokenizer.encode("abc 12  d\u00e9")) == "abc 12  d\u00e9"
    assert tokenizer.encode("12") == tokenizer.encoding.encode_ordinary("12")


def test_a_panic_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simcot_latent.data.tokenizer.LONG", 10**9)
    assert "tiktoken gave up" in refusal(lambda: with_pattern(GPT2_PATTERN).encode(" " * 10**6))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["../model.safetensors", "/dev/zero", "/etc/passwd", "x/../../model.safetensors",
                                   "..", "", "a\\b", "C:model", ".hidden", "a\0"])  # fmt: skip
def test_shards_lie_beside_their_index(shard: str, published: Path) -> None:
    weights = {"model.norm.weight": shard}
    shutil.copy(published / "model.safetensors", published.parent)
    (published / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert "which is no file beside it" in refusal(lambda: load_pretrained(published))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "model-1.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop"])
def test_what_is_no_file_is_not_opened(file: str, kind: str, published: Path) -> None:
    """A fifo would wait for ever, a device give bytes for ever."""
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    if file.startswith("model-"):
        (published / "model.safetensors.index.json").write_text(json.dumps(index))
    (published / file).unlink(missing_ok=True)
    replace_by(kind, published / file)
    assert str(published) in refusal(lambda: load_pretrained(published))


@pytest.mark.parametrize("file", ["model.safetensors", "step_decoder.safetensors", "loop.safetensors", "config.json",
                                  "manifest.json",
                                  "tokenizer/tokenizer.json", "tokenizer/ranks.tiktoken"])  # fmt: skip
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_no_file_in_a_checkpoint(file: str, kind: str, verify: bool, checkpoint: Path) -> None:
    (checkpoint / file).unlink()
    replace_by(kind, checkpoint / file)
    if file == "manifest.json" and not verify:
        sl.load_checkpoint(checkpoint, verify=False)
    else:
        refusal(lambda: sl.load_checkpoint(checkpoint, verify=verify))


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_data_that_are_no_file(kind: str, checkpoint: Path, work: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    replace_by(kind, tmp_path / "data" / "test.jsonl")
    data = {"_target_": "simcot_latent.data.sources.gsm8k.GSM8K"}
    for path in (tmp_path / "data", tmp_path / "data" / "test.jsonl"):
        tamper(checkpoint, lambda config, path=path: config["run"].update(data={**data, "path": str(path)}))
        assert str(path) in run("evals.gsm8k", f"ckpt={checkpoint}", "verify=false", folder=work).error


def replace_by(kind: str, path: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.mkdir()


# --- integrity -------------------------------------------------------------------------------------------------------

FILES = ["model.safetensors", "step_decoder.safetensors", "loop.safetensors", "config.json", "tokenizer/tokenizer.json",
         "tokenizer/ranks.tiktoken"]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_found(file: str, checkpoint: Path, work: Path) -> None:
    data = bytearray((checkpoint / file).read_bytes())
    data[len(data) * 3 // 4] ^= 1
    (checkpoint / file).write_bytes(data)
    message = refusal(lambda: sl.load_checkpoint(checkpoint))
    assert f"{checkpoint / file}: is not the file that this checkpoint was saved with (SHA-256 differs)" in message
    for command in (EVAL, "simcot_latent.export"):
        assert file in run(command, f"ckpt={checkpoint}", *([] if command == EVAL else ["out=x"]), folder=work).error
    assert file in run(PROBE, f"ckpt={checkpoint}", "question=What?", folder=work).error
    assert file in run(TRAIN, *TINY, *ARITHMETIC, f"init_from={checkpoint}", folder=work).error
    assert not list(work.iterdir())


def test_weights_of_another_step_are_found_and_one_key_lets_them_in(checkpoint: Path, work: Path) -> None:
    """Of the same shape, and so of the same size."""
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, checkpoint / "model.safetensors")
    message = run(EVAL, f"ckpt={checkpoint}", "limit=2", folder=work).error
    assert "model.safetensors: is not the file" in message
    assert "verify=false" in message
    run(EVAL, f"ckpt={checkpoint}", "limit=2", "verify=false", folder=work).ok()
    sl.load_checkpoint(checkpoint, verify=False)


def test_every_file_is_in_the_manifest(checkpoint: Path) -> None:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    there = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
    assert there - {"manifest.json"} == files.keys()
    for name, right in files.items():
        found = fingerprint(checkpoint / name)
        assert (found.size, found.sha256) == (right["size"], right["sha256"])


def test_a_file_that_is_added_is_named(checkpoint: Path) -> None:
    tamper(checkpoint, lambda manifest: manifest["files"].pop("step_decoder.safetensors"), "manifest.json")
    assert "step_decoder.safetensors: is not the file" in refusal(lambda: sl.load_checkpoint(checkpoint))


def test_a_decoder_that_was_removed_is_no_damage(checkpoint: Path) -> None:
    (checkpoint / "step_decoder.safetensors").unlink()
    assert sl.load_checkpoint(checkpoint).step_decoder is None


@pytest.mark.parametrize("file", ["trainer_state.safetensors", "trainer_state.json"])
def test_resume_verifies_the_state_of_training(file: str, checkpoint: Path, tmp_path: Path, work: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "run" / "latest")
    state = tmp_path / "run" / "latest" / file
    data = bytearray(state.read_bytes())
    data[-3] ^= 1
    state.write_bytes(data)
    message = run(TRAIN, *LATENT, f"out_dir={tmp_path / 'run'}", "resume=true", folder=work).error
    assert f"{file}: is not the file" in message


def test_an_old_checkpoint_loads_with_a_note(checkpoint: Path, work: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    outcome = run_process("-m", EVAL, f"ckpt={checkpoint}", "limit=2", "device=cpu", folder=work).ok()
    notes = [line for line in outcome.err.splitlines() if "manifest.json" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: ")


@pytest.mark.parametrize("content", ["{}", '{"files": []}', '{"files": {"model.safetensors": 3}}', "[", "NaN", ""])
def test_a_manifest_that_is_none(content: str, checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text(content)
    message = refusal(lambda: sl.load_checkpoint(checkpoint))
    assert "verify=false" in message
    sl.load_checkpoint(checkpoint, verify=False)


def test_a_manifest_that_leads_nowhere_is_not_taken_for_none(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").symlink_to("elsewhere.json")
    message = refusal(lambda: sl.load_checkpoint(checkpoint))
    assert f"{checkpoint}/manifest.json: no such file; verify=false" in message


def test_a_file_is_byte_for_byte_the_librarys(tmp_path: Path) -> None:
    """All number formats; no numbers, one, and those that do not lie row by row; names that JSON escapes."""
    tensors = {f'{n}\u00e9"{i}': torch.ones(3, 5).to(d) for i, d in enumerate(reversed(list(DTYPES))) for n in "ba"}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(3), "turned": torch.randn(3, 4).t()}
    found = save_tensors(tensors, tmp_path / "ours")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert found == fingerprint(tmp_path / "theirs")


def test_a_saved_model_of_a_training_run_is_verified(latent_run: Trained) -> None:
    assert sl.load_checkpoint(latent_run.latest).step == 60
