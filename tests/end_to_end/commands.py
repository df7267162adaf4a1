"""Runs the project's commands as a user would, and says what came of it."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = REPOSITORY.parent / "shared" / "data"

TRAIN, PROBE = "simcot_latent.train", "simcot_latent.probe"

# What makes a run of the trainer take a second or two, the same on every machine.
TINY = (
    "model.n_layer=1",
    "model.n_embd=32",
    "model.n_head=2",
    "device=cpu",
    "dtype=float32",
    "target_examples_per_step=8",
    "device_batch_size=4",
    "eval_examples=4",
    "max_new_tokens=12",
    "log_every=1",
)
ARITHMETIC = ("data.train_size=64", "data.validation_size=8", "data.test_size=12")

# No route to anywhere but this machine: what tries the network fails at once.
OFFLINE = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Outcome:
    """What a command left behind: exit status, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a mistake must end in; anything else fails the test."""
        assert self.status == 2, f"exit status {self.status}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0]

    def ok(self) -> Outcome:
        """Itself, of a command that must have succeeded."""
        assert self.status == 0, f"exit status {self.status}\n{self.out}\n{self.err}"
        return self


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder, its newest checkpoint, and what the command printed."""

    out_dir: Path
    out: str

    @property
    def latest(self) -> Path:
        return self.out_dir / "latest"

    def copy_to(self, folder: Path) -> Path:
        """A copy of the newest checkpoint for a test that writes to it."""
        return Path(shutil.copytree(self.latest, folder))


def run(module: str, *arguments: str, folder: Path, env: Mapping[str, str] | None = None) -> Outcome:
    """`python -m module arguments` in `folder`, but inside this process: no seconds of imports."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        signals_restored(),
        redirect_stdout(out),
        redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, where a test has imported the module before
        patch.chdir(folder)
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "0")  # cli sets it; this restores it
        for key, value in (env or {}).items():
            patch.setenv(key, value)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            traceback.print_exc()
            status = 1
    return Outcome(status, out.getvalue(), err.getvalue())


def run_process(*arguments: str, folder: Path, env: Mapping[str, str] | None = None, timeout: float = 120) -> Outcome:
    """`python arguments` in `folder`, a process of its own."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment(env), capture_output=True, text=True, timeout=timeout
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """For processes of tests: the package in this checkout, one thread (several of them run at a time)."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **(extra or {})}


@contextmanager
def signals_restored():
    """Training takes over Ctrl-C, SIGTERM and others; pytest gets them back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    kept = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` (links by where they point), to see that nothing was touched."""
    return {
        str(path.relative_to(folder)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def without_command(checkpoint: Mapping[str, bytes]) -> dict[str, bytes]:
    """The contents of a checkpoint but for what tells how the command was given (`out_dir`, `resume`)."""
    files = json.loads(checkpoint["manifest.json"])["files"]
    del files["config.json"]
    return {**checkpoint, "config.json": b"", "manifest.json": json.dumps(files).encode()}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [strict_json(line) for line in file.read_text(encoding="utf-8").splitlines()]


def strict_json(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A JSONL file, its folder made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def report_in(folder: Path, stem: str = "gsm8k.test") -> Path:
    """The newest report of an eval (TASK.SPLIT) in a folder; its predictions are `predictions_of` it."""
    return max(folder.glob(f"{stem}.*.json"), key=lambda file: file.stat().st_mtime_ns)


def predictions_of(report: Path) -> Path:
    return report.with_suffix(".predictions.jsonl")
