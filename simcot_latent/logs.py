"""What a run says: console, progress bar, `metrics.jsonl`, wandb. All on rank 0 only."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

from simcot_latent.errors import UserError
from simcot_latent.files import read_bytes, read_text, require_regular
from simcot_latent.paths import free_name, write_text, writing

T = TypeVar("T")

SECONDS_A_LINE = 5.0
"""How often progress is told where there is no terminal to draw a bar on."""


class RateColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


def make_progress(console: Console) -> Progress:
    """A bar with count, rate and time left on a terminal; nothing where the output is a file or a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class LastingOutput:
    """The standard output of a run that outlives it: once the terminal is closed, what is written goes nowhere.

    Args:
        reader_gone: called where a pipe lost its reader instead; it says whether the run still has something to do.
            Else the write fails as any other.
    """

    def __init__(self, reader_gone: Callable[[], bool]) -> None:
        self._stream, self._reader_gone = sys.stdout, reader_gone

    def write(self, text: str) -> int:
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            terminal_gone = error.errno == errno.EIO
            if not terminal_gone and not (error.errno == errno.EPIPE and self._reader_gone()):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)  # also for what is in a buffer, and written at the very end
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def make_console(is_main: bool = True, reader_gone: Callable[[], bool] | None = None) -> Console:
    """The console of a command; silent on other ranks than 0. Lines are not wrapped in a file or a pipe.

    Args:
        reader_gone: makes it a `LastingOutput`.
    """
    # Questions, paths and what a model writes are no markup.
    file: Any = None if reader_gone is None else LastingOutput(reader_gone)
    console = Console(file=file, quiet=not is_main, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    return console


def track(
    items: Sequence[T], description: str, console: Console, unit_sizes: Sequence[int] | None = None
) -> Iterator[T]:
    """Goes through `items` under a progress bar; without a terminal, a plain line every few seconds.

    Args:
        unit_sizes: how many units each item counts for (a batch: its rows); default 1.
    """
    sizes = [1] * len(items) if unit_sizes is None else list(unit_sizes)
    total, done, told = sum(sizes), 0, time.monotonic()
    with make_progress(console) as progress:
        task = progress.add_task(description, total=total)
        for item, size in zip(items, sizes, strict=True):
            yield item
            progress.advance(task, size)
            done += size
            if not console.is_terminal and time.monotonic() - told >= SECONDS_A_LINE:
                told = time.monotonic()
                speed = progress.tasks[task].speed
                console.print(f"{description} {done}/{total}" + ("" if speed is None else f" | {speed:.1f}/s"))


class RunLog:
    """A training run's metrics: a line a record in `metrics.jsonl`, the same to wandb if the run has a name.

    Args:
        out_dir: the run's folder.
        is_main: whether this is rank 0; other ranks log nothing.
        from_step: the step training goes on from; what an earlier attempt logged beyond it is cut off. A run that
            starts from nothing leaves an earlier one's file under another name.
        run: name of the wandb run; empty: no wandb. A run that is gone on with stays the same one there.
        project: wandb project.
        config: what wandb stores beside the run.
        console: where to tell of lines that cannot be read.

    Raises:
        UserError: a file of the log cannot be read or written, or wandb cannot start.
    """

    def __init__(
        self,
        out_dir: Path,
        is_main: bool,
        from_step: int,
        run: str,
        project: str,
        config: dict[str, Any],
        console: Console | None = None,
    ) -> None:
        self.is_main = is_main
        self.file = out_dir / "metrics.jsonl"
        self.wandb = None
        if not is_main:
            return
        console = console or make_console()
        if os.path.lexists(self.file):
            require_regular(self.file)
        with writing(self.file):
            if from_step:
                cut_back(self.file, from_step, console)
            elif self.file.exists() and self.file.stat().st_size:
                self.file.rename(aside := free_name(self.file))
                warn(console, f"{self.file} is of an earlier run; it is now {aside.name}")
            self.file.touch()
        if run:
            run_id = wandb_id(out_dir, new=from_step == 0)
            import wandb  # only here: it takes half a second to import

            try:
                settings = wandb.Settings(console="off")
                self.wandb = wandb.init(
                    project=project,
                    name=run,
                    id=run_id,
                    resume="allow",
                    config=config,
                    dir=out_dir,
                    settings=settings,
                )
            except (wandb.Error, ValueError) as error:  # no key, no network, an impossible WANDB_ variable
                raise UserError(
                    f"run={run}: wandb cannot start ({' '.join(str(error).split())}); log in with `wandb login`, "
                    "set WANDB_MODE=offline, or leave run= empty"
                ) from error

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of a step; what is not finite is left out of the file (JSON has no nan).

        Raises:
            UserError: the line cannot be written, on a full disk for example; the file is as it was.
        """
        if not self.is_main:
            return
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        append_line(self.file, (json.dumps({"step": step, **finite}) + "\n").encode())
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def sync(self) -> None:
        """Waits until what was written is on the disk; a checkpoint is never ahead of its metrics."""
        if self.is_main:
            with writing(self.file), self.file.open("ab") as handle:
                os.fsync(handle.fileno())

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()


def append_line(file: Path, line: bytes) -> None:
    """Appends a line to a file, or nothing.

    Raises:
        UserError: it cannot be written.
    """
    with writing(file), file.open("ab", buffering=0) as handle:
        before = handle.seek(0, os.SEEK_END)
        left = memoryview(line)
        try:
            while left:  # in one piece where the disk takes it: a process that is killed leaves no half line
                left = left[handle.write(left) :]
        except OSError:
            handle.truncate(before)
            raise


def cut_back(file: Path, step: int, console: Console) -> None:
    """Cuts off a log what comes after a step; what cannot be read moves to a file of its own beside it."""
    if not file.exists():
        return
    kept: list[bytes] = []
    strange: list[bytes] = []
    for line in read_bytes(file).split(b"\n"):
        logged = logged_step(line)
        if logged is not None and logged <= step:
            kept.append(line)
        elif logged is None and line.strip():
            strange.append(line)
    if strange:
        aside = file.with_name("metrics.unreadable")
        if os.path.lexists(aside):
            require_regular(aside)
        with aside.open("ab") as handle:
            handle.write(b"".join(line + b"\n" for line in strange))
        warn(console, f"{file}: {len(strange)} line(s) are no records of a step; they are now in {aside.name}")
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)  # what else has the name, a fifo say, would be written into
    with partial.open("wb") as handle:
        handle.write(b"".join(line + b"\n" for line in kept))
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(file)


def logged_step(line: bytes) -> int | None:
    """The step that a line of `metrics.jsonl` is about; None if it is no such line."""
    try:
        step = json.loads(line.decode("utf-8"))["step"]
    except (ValueError, KeyError, TypeError, RecursionError):  # bytes that are no UTF-8 are a ValueError
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


# What wandb allows, and no more than one line of it.
_WANDB_ID = re.compile(r"[^/\\#?%:\s\x00-\x1f\x7f]{1,128}")


def wandb_id(out_dir: Path, new: bool) -> str:
    """The id under which wandb knows the run of a folder, kept in `out_dir/wandb_id`.

    Raises:
        UserError: the file holds no id, is no file, or cannot be written; or the variable `WANDB_RUN_ID` is none.
    """
    file = out_dir / "wandb_id"
    if os.path.lexists(file):
        require_regular(file)
        if not new and (known := read_text(file).strip()):
            if not _WANDB_ID.fullmatch(known):
                raise UserError(f"{file}: holds no id of a wandb run; delete it to begin another run there")
            return known
    known = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    if not _WANDB_ID.fullmatch(known):
        raise UserError(f"WANDB_RUN_ID={known}: is no id of a wandb run, which has up to 128 letters and digits")
    write_text(file, known + "\n")
    return known


def warn(console: Console, text: str) -> None:
    """A line that begins with `warning:`."""
    console.print(f"warning: {text}", style="yellow")
