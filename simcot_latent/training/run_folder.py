"""The folder of a run: who may write into it, and what a run in it goes on from."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from simcot_latent.checkpoint import read_json
from simcot_latent.checkpoint_folders import LATEST, checkpoints_of_training, find_checkpoint, place_of_real_latest
from simcot_latent.config import RunConfig
from simcot_latent.errors import UserError, file_errors
from simcot_latent.files import write_json
from simcot_latent.logs import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

OWNER = "lock.json"


class RunFolder:
    """A run's folder, from `take` to the end of the `with` block this run's alone.

    Two things keep others out: a lock of the operating system on the folder, which ends with its process however that
    ends, and `lock.json`, which says who has it, to people and to machines that do not share such locks.

    Args:
        run: the configuration; `out_dir`, or the first of runs/<mode>, runs/<mode>-2, ... that does not exist.
        console: where to tell what was found.
    """

    def __init__(self, run: RunConfig, console: Console) -> None:
        self.run, self.console = run, console
        self.path: Path | None = None
        self._handle: int | None = None
        self._owned = False
        self._made: list[Path] = []

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the folder back; a new one into which nothing was written is removed."""
        if self._owned and self.path is not None:
            (self.path / OWNER).unlink(missing_ok=True)
        if self._handle is not None:
            os.close(self._handle)
        with suppress(OSError):  # of the first that holds something
            for folder in self._made:
                folder.rmdir()

    def take(self) -> tuple[Path, Path | None]:
        """Makes and locks the folder; the folder, and the checkpoint that training goes on from, if it does.

        Raises:
            UserError: it cannot be written to, another run has it, there is a run in it that is not to be gone on with,
                or none that can be.
        """
        with file_errors(f"out_dir={self.run.out_dir or f'runs/{self.run.mode}'}"):
            if self.run.out_dir is not None:  # refuses before a folder is made, or locked, for nothing
                found = require_no_lost_checkpoint(Path(self.run.out_dir))
                if self.run.resume is True and not found:
                    find_checkpoint(self.run.out_dir, key="out_dir")
            self.path = self._make()
            self._lock(self.path)
            return self.path, self._start(self.path)

    def _make(self) -> Path:
        if self.run.out_dir is not None:
            path = Path(self.run.out_dir)
            if path.exists() and not path.is_dir():
                raise UserError(f"out_dir={path}: is a file; give a folder")
            self._made = [p for p in (path, *path.parents) if not p.exists()]
            path.mkdir(parents=True, exist_ok=True)
            return path
        number = 1
        while True:
            path = Path("runs") / (self.run.mode if number == 1 else f"{self.run.mode}-{number}")
            made = [p for p in (path, path.parent) if not p.exists()]
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                self._made = made
                return path

    def _lock(self, path: Path) -> None:
        shared = self._lock_folder(path)
        file = path / OWNER
        if file.exists():
            try:
                owner = read_json(file)
            except UserError:  # cut short by a full disk
                owner = {}
            who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
            if not _is_gone(owner, certainly=shared):
                raise UserError(
                    f"out_dir={path}: another run writes there ({who}); give another folder, or stop that run; if it "
                    f"is over, delete {file}"
                )
            warn(self.console, f"{path}: the run before this one ({who}) ended without giving the folder back")
        mine = {"host": platform.node(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        mine["job"] = os.environ.get("SLURM_JOB_ID", "")
        partial = file.with_name(f".{OWNER}.partial")
        partial.unlink(missing_ok=True)  # what else has the name, a fifo say, would be written into
        write_json(partial, mine)
        partial.replace(file)
        self._owned = True

    def _lock_folder(self, path: Path) -> bool:
        """The operating system's lock; False where there is no such thing.

        Raises:
            UserError: another process has it.
        """
        if fcntl is None:
            return False
        self._handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                owner: dict[str, Any] = json.loads((path / OWNER).read_text(encoding="utf-8"))
                who = f"process {owner['pid']} on {owner['host']}, since {owner['started']}"
            except (OSError, ValueError, KeyError, TypeError):
                who = "it has only just begun"
            raise UserError(
                f"out_dir={path}: another run writes there ({who}); give another folder, or stop that run"
            ) from None
        except OSError:  # a file system without locks
            return False
        return True

    def _start(self, path: Path) -> Path | None:
        """The checkpoint to go on from; None: training starts from nothing."""
        run, latest = self.run, path / LATEST
        found = require_no_lost_checkpoint(path)
        if run.resume is False:
            if found or latest.exists():
                raise UserError(
                    f"out_dir={path}: holds a run already; give another folder, or resume=true to go on with it"
                )
            return None
        if latest.exists():
            start = find_checkpoint(path, key="out_dir")
            if (aside := place_of_real_latest(path)) is not None:
                warn(self.console, f"{latest} is no link; the first save moves it to {aside.name}")
            return start
        if found:
            warn(self.console, f"{latest} leads to no checkpoint; going on from the newest, {found[-1].name}")
            return found[-1].resolve()
        return None


def require_no_lost_checkpoint(path: Path) -> list[Path]:
    """The checkpoints of a run's folder, see `checkpoints_of_training`.

    Raises:
        UserError: there is none, but a `latest` that leads to where one was.
    """
    found, latest = checkpoints_of_training(path), path / LATEST
    if not found and latest.is_symlink() and not latest.exists():
        raise UserError(
            f"out_dir={path}: latest -> {latest.readlink()} leads nowhere, and there is no other checkpoint; "
            "bring it back, or delete the link to start anew"
        )
    return found


def _is_gone(owner: dict[str, Any], certainly: bool) -> bool:
    """Whether the process that wrote a `lock.json` is known to be over.

    Args:
        certainly: whether the operating system has given us its lock: no process of this machine has it then.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if job and owner.get("job") == job:
        return True  # Slurm requeues a job only once it is over, wherever it ran
    if owner.get("host", platform.node()) != platform.node():
        return False
    pid = owner.get("pid")
    if certainly or not isinstance(pid, int) or pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
