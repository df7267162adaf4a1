"""Folders that are written whole or not at all, and the manifest by which damaged and exchanged files are found."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from simcot_latent.errors import UserError
from simcot_latent.files import read_json, require_regular
from simcot_latent.paths import check_writable, expanded, free_name, writing

MANIFEST = "manifest.json"
NOTES = logging.getLogger(__name__)
"""What is worth a line, but stops nothing; shown on stderr unless the program that uses this library says otherwise."""


def remove_empty(folder: Path) -> None:
    """Removes a folder with nothing in it; what else has its name moves aside."""
    if folder.is_dir() and not folder.is_symlink():
        with suppress(OSError):  # it is not empty
            folder.rmdir()
    if os.path.lexists(folder):
        move_aside(folder)


def move_aside(path: Path) -> None:
    """Gives what has a name that is needed another one, and says so; of a link, the link itself."""
    path.rename(aside := free_name(path))
    NOTES.warning("warning: %s was there and is no checkpoint of this run; it is now %s", path, aside.name)


def remove_partial_folder(partial: Path) -> None:
    """Removes a half-written folder; of a link, the link alone."""
    if partial.is_symlink() or partial.is_file():
        partial.unlink()
    else:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk: after a loss of power they are there."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Fingerprint:
    """What tells a file from others: its size in bytes, and the SHA-256 of its content in hexadecimal."""

    size: int
    sha256: str


def fingerprint(file: Path) -> Fingerprint:
    """What a file is. Other threads go on meanwhile.

    Raises:
        UserError: it is no regular file, or cannot be read.
    """
    size, digest, buffer = require_regular(file), hashlib.sha256(), bytearray(2**22)
    try:
        with file.open("rb", buffering=0) as handle:
            left = size
            while left > 0 and (n := handle.readinto(buffer)):
                digest.update(memoryview(buffer)[: min(n, left)])
                left -= n
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return Fingerprint(size, digest.hexdigest())


def verify_files(folder: Path, names: Sequence[str]) -> None:
    """Compares files of a checkpoint with its manifest; those that are not there are left to whoever needs them.

    A checkpoint that was saved without a manifest is taken as it is, with a note.

    Raises:
        UserError: a file is not the one that was saved; the message names it.
    """
    manifest = folder / MANIFEST
    if not os.path.lexists(manifest):  # a link that leads nowhere is a manifest that was lost
        NOTES.warning("note: %s holds no %s, so its files are not verified", folder, MANIFEST)
        return
    try:
        saved = read_json(manifest).get("files")
        if not isinstance(saved, dict):
            raise UserError(f"{manifest}: lacks files, a mapping from names to sizes and hashes")
    except UserError as error:
        raise UserError(f"{error}; verify=false loads the checkpoint all the same") from error
    found = [name for name in names if (folder / name).exists()]

    def verify(name: str) -> None:
        file, right = folder / name, saved.get(name)
        wrong = "it is not in the manifest" if right is None else None
        if wrong is None:  # the size first, which costs nothing
            size = require_regular(file)
            if not isinstance(right, dict) or right.get("size") != size:
                wrong = "size differs"
            elif right.get("sha256") != fingerprint(file).sha256:
                wrong = "SHA-256 differs"
        if wrong is not None:
            raise UserError(
                f"{file}: is not the file that this checkpoint was saved with ({wrong}); verify=false loads it all "
                "the same"
            )

    with ThreadPoolExecutor() as pool:
        list(pool.map(verify, found))


@contextmanager
def new_folder(out: str | Path, key: str = "out") -> Iterator[Path]:
    """A folder to write into, which takes its place at `out` once all is written.

    Raises:
        UserError: there is something at `out`.
    """
    with written_beside(check_new_folder(out, key)) as partial:
        yield partial


def check_new_folder(out: str | Path, key: str = "out") -> Path:
    """The place of a folder that is to be written, made sure of before work begins.

    Raises:
        UserError: there is something at `out`, or nothing can be written there.
    """
    out = expanded(out, key).resolve()
    try:
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        raise UserError(f"{key}={out}: cannot be written ({error.strerror})") from error
    if taken:
        raise UserError(f"{key}={out}: is there already; give a new folder, or an empty one")
    check_writable([out / MANIFEST])
    return out


@contextmanager
def written_beside(folder: Path, make_room: Callable[[Path], None] = remove_empty) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once all is written, and on the disk.

    Args:
        make_room: frees the name.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        remove_partial_folder(partial)
        partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        make_room(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
