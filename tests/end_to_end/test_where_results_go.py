"""Nothing is worked out for nothing: where results go is made sure of first, whatever the place or the console is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import (
    ARITHMETIC,
    PROBE,
    TINY,
    TRAIN,
    Outcome,
    Trained,
    contents,
    environment,
    predictions_of,
    read_lines,
    report_in,
    run,
    strict_json,
)

import simcot_latent as sl

GSM8K, EXPORT, IMPORT = "evals.gsm8k", "simcot_latent.export", "simcot_latent.import_checkpoint"

# Root may write and read everything; without these two capabilities it may what everybody may.
LIKE_EVERYBODY = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) and os.geteuid() == 0:  # PR_CAPBSET_DROP
        sys.exit(77)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def like_everybody(*arguments: str, folder: Path) -> Outcome:
    """`python -m arguments`, by somebody for whom permissions count."""
    command = [sys.executable, "-c", LIKE_EVERYBODY, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("root's capabilities cannot be dropped here")
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def read_only(latent_run: Trained, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint in which nothing can be written."""
    folder = latent_run.copy_to(tmp_path / "checkpoint")
    shutil.rmtree(folder / "evals", ignore_errors=True)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


@pytest.mark.slow
def test_a_read_only_checkpoint(read_only: Path, tmp_path: Path) -> None:
    ckpt = f"ckpt={read_only}"
    outcome = like_everybody(GSM8K, ckpt, "limit=3", "device=cpu", folder=tmp_path)
    assert outcome.error == (
        f"error: {read_only}/evals/gsm8k.test.json: cannot be written (Permission denied); give out=DIR, a folder for "
        "the results"
    )
    assert outcome.out == "", "nothing was answered first"
    like_everybody(GSM8K, ckpt, "limit=3", "device=cpu", "out=results/of it", folder=tmp_path).ok()
    report = report_in(tmp_path / "results/of it")
    assert set((tmp_path / "results/of it").iterdir()) == {report, predictions_of(report)}
    assert strict_json(report.read_text())["n"] == 3
    assert not (read_only / "evals").exists()


def test_probes_are_written_where_they_are_told_to(latent_run: Trained, tmp_path: Path) -> None:
    arguments = (f"ckpt={latent_run.latest}", "question=How many are 3 and 4?", "device=cpu", "out=a/b")
    printed = run(PROBE, *arguments, "format=json", folder=tmp_path).ok().out
    assert strict_json((tmp_path / "a/b/probe.json").read_text()) == strict_json(printed)
    assert set(contents(tmp_path)) == {"a/b/probe.json"}


PLACES = {
    "a name that is too long": ("x" * 300, "File name too long"),
    "in a file": ("a_file/results", "a_file is a file"),
}


@pytest.mark.parametrize("module", [GSM8K, PROBE, EXPORT, IMPORT])
@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be(module: str, place: str, latent_run: Trained, tmp_path: Path) -> None:
    out, reason = PLACES[place]
    (tmp_path / "a_file").touch()
    arguments = {
        GSM8K: (f"ckpt={latent_run.latest}", "device=cpu"),
        PROBE: (f"ckpt={latent_run.latest}", "question=How many?", "device=cpu"),
        EXPORT: (f"ckpt={latent_run.latest}",),
        IMPORT: (f"source={latent_run.latest}", "kind=coconut", "base=gpt2"),
    }[module]
    outcome = run(module, *arguments, f"out={out}", folder=tmp_path)
    assert reason in outcome.error
    assert outcome.out == ""
    assert contents(tmp_path) == {"a_file": b""}


@pytest.mark.parametrize(("out", "reason"), [("x" * 300, "File name too long"), ("a_file/run", "Not a directory")])
def test_a_run_where_none_can_be(out: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    outcome = run(TRAIN, *TINY, *ARITHMETIC, "mode=weighted", "num_iterations=1", f"out_dir={out}", folder=tmp_path)
    assert reason in outcome.error
    assert "step 00001" not in outcome.out
    assert contents(tmp_path) == {"a_file": b""}


def test_a_full_disk(latent_run: Trained, tmp_path: Path) -> None:
    """Files are written under a name of their own first; here that name leads to a device that is always full."""
    results = tmp_path / "results"
    arguments = (GSM8K, f"ckpt={latent_run.latest}", "device=cpu", "limit=2", f"out={results}")
    run(*arguments, folder=tmp_path).ok()
    predictions = predictions_of(report_in(results))
    shutil.rmtree(results)
    results.mkdir()
    (results / f".{predictions.name}.partial").symlink_to("/dev/full")
    outcome = run(*arguments, folder=tmp_path)
    assert f"{predictions}: cannot be written (No space left on device)" in outcome.error
    assert "accuracy" not in outcome.out
    assert contents(results) == {}


def test_a_report_is_whole_or_not_there(latent_run: Trained, tmp_path: Path) -> None:
    """A file that is there already stays until the new one is complete."""
    results = tmp_path / "results"
    arguments = (f"ckpt={latent_run.latest}", "device=cpu", f"out={results}", "limit=2")
    run(GSM8K, *arguments, folder=tmp_path).ok()
    report = report_in(results)
    report.write_text("old")
    before = contents(results)
    run(GSM8K, *arguments, "data.path=nowhere", folder=tmp_path)
    assert contents(results) == before
    run(GSM8K, *arguments, folder=tmp_path).ok()
    assert strict_json(report.read_text())["n"] == 2
    assert contents(results).keys() == before.keys()


@pytest.mark.slow
def test_files_that_cannot_be_read(latent_run: Trained, sums: Path, tmp_path: Path) -> None:
    checkpoint = latent_run.copy_to(tmp_path / "checkpoint")
    data = Path(shutil.copytree(sums, tmp_path / "data"))
    (data / "test.jsonl").chmod(0)
    evaluate = (GSM8K, f"ckpt={checkpoint}", "device=cpu", "limit=2")
    message = like_everybody(*evaluate, f"data.path={data}", folder=tmp_path).error
    assert f"{data}/test.jsonl: cannot be read (Permission denied)" in message
    data.chmod(0)
    assert f"{data}: cannot be read" in like_everybody(*evaluate, f"data.path={data}", folder=tmp_path).error
    data.chmod(0o755)
    for file in ("config.json", "model.safetensors", "tokenizer/ranks.tiktoken"):
        mode = (checkpoint / file).stat().st_mode
        (checkpoint / file).chmod(0)
        message = like_everybody(*evaluate, folder=tmp_path).error
        assert f"{checkpoint}/{file}" in message
        assert "Permission denied" in message
        (checkpoint / file).chmod(mode)
    (tmp_path / "weights.pt").touch(0)
    importing = (IMPORT, "source=weights.pt", "kind=coconut", "base=gpt2", "out=imported")
    assert "weights.pt: cannot be read (Permission denied)" in like_everybody(*importing, folder=tmp_path).error


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_are_the_umasks(umask: int, tmp_path: Path) -> None:
    """Weights too: safetensors writes by way of temporary files, which nobody else may read."""
    before = os.umask(umask)
    try:
        arguments = (*TINY, *ARITHMETIC, "mode=latent", "model.activation=gelu", "num_iterations=1", "out_dir=run")
        run(TRAIN, *arguments, folder=tmp_path).ok()
        run("evals.arithmetic", "ckpt=run", "limit=2", "device=cpu", folder=tmp_path).ok()
        run(EXPORT, "ckpt=run", "out=exported", folder=tmp_path).ok()
        sl.load_checkpoint(tmp_path / "run").save_pretrained(tmp_path / "for_the_hub")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([file for file in files if file.suffix == ".safetensors"]) >= 6
    assert {str(f.relative_to(tmp_path)): oct(f.stat().st_mode & 0o777) for f in files} == {
        str(f.relative_to(tmp_path)): oct(0o666 & ~umask) for f in files
    }


# --- consoles and characters -----------------------------------------------------------------------------------------

QUESTION = "Zoë has 3 \u6f22\u5b57 and \u2265 4 \U0001f34e. How many?"


@pytest.mark.parametrize(
    "encoding", [pytest.param("cp1252", marks=pytest.mark.slow), "ascii", pytest.param("utf-8", marks=pytest.mark.slow)]
)
def test_a_console_that_lacks_characters(encoding: str, latent_run: Trained, tmp_path: Path) -> None:
    row = {"question": QUESTION, "answer": "<<3+4=7>>\n#### 7"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    for module, arguments in (
        (PROBE, (f"question={QUESTION}",)),
        (PROBE, ("data=gsm8k", "data.path=test.jsonl")),
        (GSM8K, ("data.path=test.jsonl", "out=results")),
    ):
        command = [sys.executable, "-m", module, f"ckpt={latent_run.latest}", "device=cpu", *arguments]
        env = environment({"PYTHONIOENCODING": encoding})
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        if module == PROBE:
            shown = "\u6f22" if encoding == "utf-8" else "\\u6f22"
            assert shown in done.stdout.decode(encoding)
    [line] = read_lines(predictions_of(report_in(tmp_path / "results")))
    assert line["question"] == QUESTION, "files are UTF-8 whatever the console is"


def test_a_question_that_is_no_text(latent_run: Trained, tmp_path: Path) -> None:
    command = [sys.executable, "-m", PROBE, f"ckpt={latent_run.latest}", "device=cpu", b"question=Tom \xff has 3."]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, timeout=120)
    outcome = Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert outcome.error.startswith("error: question: its character 5 is U+DCFF, which is no text")


def test_half_a_character_in_python(latent_run: Trained) -> None:
    """It is read as U+FFFD, so it changes nothing whether it comes whole or in halves."""
    checkpoint = sl.load_checkpoint(latent_run.latest)
    questions = ["Tom \ud83d has 3 pens.", "Tom \ufffd has 3 pens."]
    thoughts = sl.think(checkpoint, questions)
    assert thoughts.latents[0].equal(thoughts.latents[1])
    assert len(sl.answer(checkpoint, questions)) == 2


def test_paths_with_any_characters(sums: Path, tmp_path: Path) -> None:
    """`=`, `${`, blanks, quotes and commas; and an eval remembers such a path of the data."""
    data = Path(shutil.copytree(sums, tmp_path / "o'brien, j=1 ${data} {x}"))
    out = 'runs=1/my ${out} "quoted", it\'s'
    arguments = ("mode=weighted", "data=gsm8k", f"data.path={data}", f"out_dir={out}", "num_iterations=1")
    outcome = run(TRAIN, *TINY, *arguments, folder=tmp_path).ok()
    assert strict_json((tmp_path / out / "latest/config.json").read_text())["run"]["data"]["path"] == str(data)
    (command,) = [line for line in outcome.out.splitlines() if line.startswith("next: ")]
    run(GSM8K, f"ckpt={out}/latest", "limit=2", "device=cpu", folder=tmp_path).ok()
    assert strict_json(report_in(tmp_path / out / "evals").read_text())["data"]["path"] == str(data)
    shell = ["bash", "-c", f"set -- {command.removeprefix('next: ')}; printf '%s' \"${{!#}}\""]
    given = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    assert given == f"ckpt={out}", "what is printed can be typed"
