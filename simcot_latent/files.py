"""Files that anybody may have written: read without harm, their values plain and of the types that we ask for.

A folder from a stranger chooses no class, no import and no path: what it may say is numbers, texts, truth values, null
and lists of those, for fields of dataclasses that we name here.
"""

from __future__ import annotations

import json
import math
import stat
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from simcot_latent.errors import UserError

T = TypeVar("T")

MAX_TEXT = 256 * 2**20
"""Bytes of the longest text file that describes a model; the tokenizers of published models have up to 40 MB."""

MAX_NUMBER = 2**31 - 1
"""The largest size that a file may name. None is near it, and products of two fit a tensor's 64-bit size."""


def is_regular(file: Path) -> bool:
    """Whether there is a regular file; a link counts as what it points at. Nothing is opened."""
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError):  # ValueError: a null character
        return False


def require_regular(file: Path) -> int:
    """The size of a regular file in bytes.

    Devices, fifos and the like, which may give bytes for ever or wait for ever, are refused without being opened.

    Raises:
        UserError: it is not there, or something else.
    """
    try:
        status = file.stat()
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file}: is a folder, a device or the like; it must be a file")
    return status.st_size


def read_bytes(file: Path, limit: int | None = None) -> bytes:
    """The content of a regular file, never more than the size that it had when it was opened.

    Raises:
        UserError: it is not there, no regular file, longer than `limit` bytes, or cannot be read.
    """
    size = require_regular(file)
    if limit is not None and size > limit:
        raise UserError(f"{file}: has {size:,} bytes; at most {limit:,} are read")
    try:
        with file.open("rb") as handle:
            return handle.read(size)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def read_text(file: Path) -> str:
    """The content of a UTF-8 file.

    Raises:
        UserError: see `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(file, MAX_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: it is missing, not JSON (which has no NaN), or no object.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    text = read_text(file)
    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # brackets thousands deep
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return value


def is_plain(value: object) -> bool:
    """Whether a value is a number, a text, a truth value, null, or a list of those."""
    if isinstance(value, list):
        return all(is_plain(item) and not isinstance(item, list) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


def from_plain(cls: type[T], values: object, key: str) -> T:
    """An instance of a dataclass from what a file says about it.

    Nothing is converted, looked up or resolved: each value must be of the type of its field. Whole numbers are at most
    `MAX_NUMBER`, others finite. What a field of type `dict` holds is not looked at.

    Args:
        key: what the values stand under, for errors.

    Raises:
        UserError: they are no object, a key is unknown or missing, a value is of another type, or `cls` refuses it.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{key} must be an object")
    known = {f.name for f in fields(cls) if f.init}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"{key}: unknown key {unknown[0]!r}")
    hints = get_type_hints(cls)
    chosen = {name: _of_type(value, hints[name], f"{key}.{name}") for name, value in values.items()}
    try:
        return cls(**chosen)
    except TypeError as error:  # a key that has no default is missing
        raise UserError(f"{key}: {error}") from error


def _of_type(value: Any, kind: Any, key: str) -> Any:
    """`value`, if it is of a type; an instance where that is a dataclass."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for kind in kinds:
        if is_dataclass(kind) and isinstance(kind, type):
            if isinstance(value, kind):
                return value
            if isinstance(value, Mapping):
                return from_plain(kind, value, key)
        elif _is_of(value, kind):
            return value
    what = " or ".join(_in_words(kind) for kind in kinds)
    shown = repr(value)
    raise UserError(f"{key}={shown if len(shown) <= 60 else shown[:60] + '...'}: must be {what}")


def _is_of(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is int:
        return type(value) is int and abs(value) <= MAX_NUMBER
    if kind is float:
        return _is_of(value, int) or (type(value) is float and math.isfinite(value))
    return type(value) is (get_origin(kind) or kind)  # of an object only that it is one


def _in_words(kind: Any) -> str:
    words = {
        int: f"a whole number of at most {MAX_NUMBER:,}",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
    }
    return f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else words.get(kind, "an object")


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
