"""Where files are: what a path means that somebody typed, and whether a file can be written there."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from simcot_latent.errors import UserError
from simcot_latent.text import valid_text

HUB_ID = re.compile(r"\w[\w.-]*(?:/[\w.-]+)?")  # no `./folder`; old ones have no owner: gpt2
"""What may be the id of a repository on the Hugging Face hub."""


def expanded(path: str | Path, key: str) -> Path:
    """The path with `~` and `~name` at its start as home folders.

    Args:
        key: what the path came from, for the error.

    Raises:
        UserError: there is no such user, or nobody knows where the home folder is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{key}={path}: no home folder is known for it; write the path out, or ./~ for a name"
        ) from error


def free_name(path: Path) -> Path:
    """The first of `name-1.ext`, `name-2.ext`, ... that nothing has, not even a link that leads nowhere."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.stem}-{number}{path.suffix}")):
        number += 1
    return aside


@contextmanager
def writing(file: Path, hint: str = "") -> Iterator[None]:
    """Turns what goes wrong in writing `file` (or a folder of that name) into a `UserError`.

    Args:
        hint: what to do about it, the end of the line.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"{file}: cannot be written ({reason}){f'; {hint}' if hint else ''}") from error


def check_writable(files: Iterable[Path], hint: str = "") -> None:
    """Finds out by writing whether files can be written, and leaves everything as it was.

    For commands that work for minutes before they write: nothing that was computed is to be lost.

    Raises:
        UserError: one of them cannot be; the line names it and ends in `hint`.
    """
    for file in files:
        made: list[Path] = []
        with writing(file, hint):
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder")
            try:
                for folder in [*reversed(file.parents)]:
                    if folder.is_dir():
                        continue
                    if folder.exists():
                        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file")
                    folder.mkdir()
                    made.append(folder)
                with _beside(file).open("w", encoding="utf-8") as handle:
                    handle.write("\n")
            finally:
                if file.parent.is_dir():
                    _remove(_beside(file))
                for folder in reversed(made):
                    folder.rmdir()


def write_text(file: Path, text: str) -> None:
    """Writes a UTF-8 file, its folder made if need be: beside its place and renamed, so it is whole or not there.

    A lone surrogate, which UTF-8 has no bytes for, becomes U+FFFD.

    Raises:
        UserError: it cannot be written.
    """
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            _beside(file).write_text(valid_text(text), encoding="utf-8")
            _beside(file).replace(file)
        finally:
            _remove(_beside(file))


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSONL file as `write_text` does."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def give_usual_permissions(file: Path) -> None:
    """Lets whoever the umask lets read a file read it: libraries that write by way of temporary files leave 0600."""
    usual = _beside(file)
    usual.touch()
    file.chmod(usual.stat().st_mode & 0o777)
    usual.unlink()


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:  # where nothing can be removed nothing was written
        pass
