"""Rows of data files (JSON, JSONL, parquet, lines of text; packed or not), each with the place to name in a message."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from simcot_latent.errors import UserError
from simcot_latent.files import read_bytes, require_regular

if TYPE_CHECKING:
    import datasets

PACKED = (".gz", ".zst")
"""What text may be packed as; the name ends in it."""
# How a text begins that is one value of several lines: what is broken in it is looked for in the whole.
_LONG_VALUE = re.compile(r"\[|\{(?:[^\n]*[,\[{])?[ \t]*\n")


class Row(NamedTuple):
    """One row as it was read: an object (JSON, parquet, hub) or a line of text; and the place to name in a message."""

    value: object
    where: str


def kind_of_file(name: str) -> str:
    """A file's suffix, that of what is packed in it if it is packed."""
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


def rows_of_file(file: Path, shape: str) -> Iterator[Row]:
    """The rows of a file of one of the kinds in `_READERS`.

    Args:
        shape: what a row must be, for errors.

    Raises:
        UserError: it cannot be read, is broken, or has no row.
    """
    rows = _READERS[kind_of_file(file.name)](file, shape)
    if not rows:
        raise UserError(f"{file}: the file is empty; every row must be {shape}")
    yield from rows


def rows_of_table(table: "datasets.Dataset", where: str) -> Iterator[Row]:
    """The rows of a table that `datasets` has read from `where`."""
    for number, value in enumerate(table.to_list(), start=1):
        yield Row(value, f"{where} row {number}")


def _lines(file: Path) -> list[str]:
    """The lines of a text file, unpacked if it is packed; those at its end that are blank are left out.

    Lines end at "\\n" only. `str.splitlines` also splits at characters such as U+2028, which stands inside a question
    of GSM8K.
    """
    data = _unpacked(file)
    try:
        text = data.decode("utf-8-sig").rstrip()  # -sig: without the byte order mark that some editors put in front
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 text (byte {data[error.start]:#04x}); save it as UTF-8") from None
    return [line.rstrip("\r") for line in text.split("\n")] if text else []


def _unpacked(file: Path) -> bytes:
    """A file's bytes; those that are packed in it where its name ends in `.gz` or `.zst`."""
    try:
        if file.suffix == ".gz":
            return gzip.decompress(read_bytes(file))
        if file.suffix == ".zst":
            import pyarrow  # comes with `datasets`; the standard library reads zst from Python 3.14 on

            require_regular(file)

            with pyarrow.input_stream(str(file), compression="zstd") as stream:
                return stream.read()
        return read_bytes(file)
    except OSError as error:
        if file.suffix in PACKED and error.errno is None:
            raise UserError(f"{file}: not a whole {file.suffix} file ({str(error).splitlines()[0]})") from None
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a whole {file.suffix} file ({error})") from None


def _read_text(file: Path, shape: str) -> list[Row]:
    return [Row(line, f"{file}:{number}") for number, line in _filled_lines(file)]


def _read_jsonl(file: Path, shape: str) -> list[Row]:
    """One row per line; or one JSON value as `_read_json` reads it, as some name their JSON files `.jsonl`."""
    lines = _filled_lines(file)
    first = _value_or_none(lines[0][1]) if lines else None
    is_row = isinstance(first, dict) and not (len(lines) == 1 and isinstance(first.get("data"), list))
    if lines and not is_row:
        text = "\n".join(line for _, line in lines)
        if _value_or_none(text) is not None or (first is None and text.lstrip().startswith("[")):
            return _read_json(file, shape)
    return _rows_of_lines(lines, file, shape)


def _rows_of_lines(lines: Sequence[tuple[int, str]], file: Path, shape: str) -> list[Row]:
    return [Row(_json(line, file, number, shape), f"{file}:{number}") for number, line in lines]


def _value_or_none(text: str) -> object | None:
    """The JSON value that a text is; None if it is none (or null)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _filled_lines(file: Path) -> list[tuple[int, str]]:
    """The lines that hold something, with their numbers: blank ones part rows in some files, and are no rows."""
    return [(number, line) for number, line in enumerate(_lines(file), start=1) if line.strip()]


def _read_json(file: Path, shape: str) -> list[Row]:
    """One JSON value: a list of rows, that list under `data` beside whatever else is told, or a single row; or one row
    per line, as some name their JSONL files `.json`."""
    text = "\n".join(_lines(file))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not _LONG_VALUE.match(text.lstrip()):
            return _rows_of_lines(_filled_lines(file), file, shape)
        value = _json(text, file, 1, shape)  # says where it is broken
    if isinstance(value, dict) and "question" not in value and isinstance(value.get("data"), list):
        value = value["data"]
    values = value if isinstance(value, list) else [value]
    return [Row(value, f"{file} row {number}") for number, value in enumerate(cast(list[object], values), start=1)]


def _json(text: str, file: Path, first_line: int, shape: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where, what = f"{file}:{first_line + error.lineno - 1}", f"{error.msg}, column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        where, what = f"{file}:{first_line}", str(error)
    raise UserError(f"{where}: not valid JSON ({what}); every row must be {shape}")


def _read_parquet(file: Path, shape: str) -> list[Row]:
    import pyarrow  # comes with `datasets`; only here, as it takes a while to import
    import pyarrow.parquet

    require_regular(file)
    try:
        values = pyarrow.parquet.read_table(file).to_pylist()
    except Exception as error:  # broken bytes end in whatever they happen to mean to the library
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not a parquet file that can be read ({reason}); every row must be {shape}") from None
    return [Row(value, f"{file} row {number}") for number, value in enumerate(values, start=1)]


_READERS: dict[str, Callable[[Path, str], list[Row]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
