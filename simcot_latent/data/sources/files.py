"""What the sources of written solutions share: rows from local files or the hub, and a validation split cut from train.

A source of this kind is a subclass of `WrittenSolutions` that says which files it reads and what one row holds.
"""

import gzip
import hashlib
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from simcot_latent.data.problem import Problem, parse_number, parse_steps, split_solution, trailer
from simcot_latent.data.sources import SPLITS, LoadedSplit, Split
from simcot_latent.data.tokenizer import LONE_SURROGATE
from simcot_latent.errors import UserError
from simcot_latent.files import read_bytes, require_regular

if TYPE_CHECKING:
    import datasets

# The note on a step that is not well-formed. What becomes of it depends on what is written, which a source cannot know.
MALFORMED = "malformed step: text where whole solutions are written, left out where steps alone are (or thoughts)"

# The names that people give the splits, in file names and on the hub.
_SPLIT_OF_NAME: dict[str, Split] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# train.jsonl; a data set's name before it, gsm_train.json, as Coconut's code writes them; or the hub's own layout,
# train-00000-of-00002.parquet, in which some have a digest behind the count.
_SPLIT_FILE = re.compile(
    r"(?:(?P<prefix>[\w.-]*)[_.-])?"
    rf"(?P<name>{'|'.join(_SPLIT_OF_NAME)})"
    r"(?:-(?P<number>[0-9]+)-of-(?P<count>[0-9]+)(?:-[0-9a-f]{8,})?)?"
    r"(?P<suffix>\.[a-z]+(?:\.(?:gz|zst))?)"
)
# The hub's conversion of every data set: default/train/0000.parquet, of large ones main/partial-train/0000.parquet.
_SPLIT_FOLDER = re.compile(rf"(?P<partial>partial-)?(?P<name>{'|'.join(_SPLIT_OF_NAME)})")
_CONVERTED = re.compile(r"(?P<number>[0-9]{4,})(?P<suffix>\.parquet)")
_PACKED = (".gz", ".zst")
# What is named where it is not read: files of these kinds, and whatever is packed in any way.
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")
_ARCHIVES = (*_PACKED, ".xz", ".bz2", ".zip", ".tgz", ".7z")
UNREAD = "file that is not read"
"""How the note on such a file begins; it is the same for every split."""
# How a text begins that is one value of several lines: what is broken in it is looked for in the whole.
_LONG_VALUE = re.compile(r"\[|\{(?:[^\n]*[,\[{])?[ \t]*\n")
_SAVED = ("dataset_dict.json", "state.json")
"""What `datasets`' `save_to_disk` writes of a set of splits, and of one table."""


_HUB_ID, _HUB_CONFIG = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*"), re.compile(r"(?!\.)[^/\\\x00]+")


class Row(NamedTuple):
    """One row as it was read: an object (JSON, parquet, hub) or a line of text; and the place to name in a message."""

    value: object
    where: str


class Solution(NamedTuple):
    """A row taken apart, before its steps are looked for."""

    question: str
    rationale: str
    answer: str
    trailer: str
    """What stood behind the answer, and is left out."""


@dataclass
class WrittenSolutions(ABC):
    """Problems with written solutions, from a local path or from the hub by `datasets`.

    Attributes:
        path: a folder with a file for each split (`train.jsonl`, `gsm_test.json`, `test.parquet`, text also as
            `.jsonl.gz` or `.jsonl.zst`; or the hub's own layouts, `main/train-00000-of-00001.parquet` and
            `default/train/0000.parquet`), a folder that `save_to_disk` wrote, or a single file; None reads from the
            hub. A single file is train
            (and the validation split cut from it) and also test, whichever is asked for: evaluate on the file that a
            model was trained on and you measure memory.
        hub_id: the data set's name on the hub.
        hub_config: its configuration there, also looked for as a subfolder of `path`; None where it has only one.
        validation_size: how many problems are held out of train for validation, where the data have no validation
            split of their own; never more than a tenth of train. Which ones depends on the questions alone, not on
            their order or on a run's seed.
        train_limit: train on the first so many problems only, after validation is held out; None for all.
        tolerance: how far an answer may be from gold and still be right, as a share of gold, see `same_number`.

    Raises:
        UserError: a field has an impossible value.
    """

    path: str | None = None
    hub_id: str = ""
    hub_config: str | None = None
    validation_size: int = 500
    train_limit: int | None = None
    tolerance: float = 0.0

    tells_names: ClassVar[bool] = True
    """Whether errors and notes name what lies in the folder `path`; not where a checkpoint, maybe a stranger's, chose
    it."""
    suffixes: ClassVar[tuple[str, ...]]
    """The kinds of file that are read."""
    shape: ClassVar[str]
    """What a row must be, for error messages."""

    def __post_init__(self) -> None:
        for key, optional in (("path", True), ("hub_id", False), ("hub_config", True)):
            value = getattr(self, key)
            if not (isinstance(value, str) and value) and not (optional and value is None):
                raise UserError(f"data.{key}={value!r}: must be a text that is not empty{', or null' * optional}")
        for key, shape in (("hub_id", _HUB_ID), ("hub_config", _HUB_CONFIG)):  # no paths: a checkpoint may name them
            if (value := getattr(self, key)) is not None and not shape.fullmatch(value):
                raise UserError(f"data.{key}={value!r}: must be a name on the hub, not a path")
        for key, optional in (("validation_size", False), ("train_limit", True)):
            value = getattr(self, key)
            if not (type(value) is int and value >= 1) and not (optional and value is None):
                raise UserError(f"data.{key}={value!r}: must be a whole number of at least 1{', or null' * optional}")
        if (
            isinstance(self.tolerance, bool)
            or not isinstance(self.tolerance, int | float)
            or not 0 <= self.tolerance < 1
        ):
            raise UserError(f"data.tolerance={self.tolerance!r}: must be a share of the gold answer, from 0 to below 1")

    @abstractmethod
    def read(self, row: Row) -> tuple[str, str]:
        """The question of a row, and its written solution down to the `#### answer`.

        Raises:
            UserError: the row is not of the form that `shape` tells.
        """

    def load(self, split: Split) -> LoadedSplit:
        """The problems of one split, see `Source`; the notes count what is odd about them.

        Raises:
            UserError: there is no such split or file, a file is empty or has a broken row, or the hub is out of reach.
        """
        if split not in SPLITS:
            raise UserError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
        unread: list[str] = []  # notes
        path = None if self.path is None else _local_path(self.path)
        tables = self._hub_tables() if path is None else self._local_tables(path, unread)
        cut = split != "test" and "validation" not in tables
        table: Split = "train" if cut else split
        if table not in tables:
            holds = ""
            if path is not None and path.is_dir() and self.tells_names:
                holds = f"; the folder holds {_names(path)}"
            raise UserError(f"{self.path or self.hub_id} has no {table} split; it has: {', '.join(tables)}{holds}")
        solutions = [self._solution(row) for row in tables[table]()]
        if cut:
            held_out = _held_out([solution.question for solution in solutions], self.validation_size)
            solutions = [s for s in solutions if (s.question in held_out) == (split == "validation")]
            if not solutions:
                raise UserError(
                    f"{self.path or self.hub_id}: one question to train on, and validation takes it; give at least two"
                )
        loaded = _with_steps(solutions[: self.train_limit] if split == "train" else solutions)
        loaded.notes.update(unread)
        return loaded

    def broken(self, row: Row, what: str) -> UserError:
        """The error for a row that is not of the right form."""
        return UserError(f"{row.where}: {what}; every row must be {self.shape}")

    def text(self, row: Row, key: str) -> str:
        """The text under `key`.

        Raises:
            UserError: the row is not an object, the key is missing, or what it holds is not a text.
        """
        value = self.fields(row).get(key)
        if value is None:
            raise self.broken(row, f'no "{key}"')
        if not isinstance(value, str):
            raise self.broken(row, f'"{key}" is {_kind(value)}, not a text')
        return value

    def fields(self, row: Row) -> dict[str, Any]:
        """The row as an object.

        Raises:
            UserError: it is something else.
        """
        if not isinstance(row.value, dict):
            raise self.broken(row, f"{_kind(row.value)}, not an object")
        return cast(dict[str, Any], row.value)

    def _solution(self, row: Row) -> Solution:
        question, written = self.read(row)
        if not question.strip():
            raise self.broken(row, "the question is empty")
        if half := LONE_SURROGATE.search(question + written):
            raise UserError(
                f"{row.where}: holds U+{ord(half[0]):04X}, half of a character that was cut in two; write the whole "
                "character, or take it out"
            )
        try:
            return Solution(question.strip(), *split_solution(written), trailer(written))
        except ValueError as error:
            raise self.broken(row, str(error)) from None

    def _local_tables(self, path: Path, unread: list[str]) -> dict[Split, Callable[[], Iterator[Row]]]:
        """For each split that is there, what reads its rows; a note of each file beside them that looks like data, but
        is not read, is added to `unread`."""
        kinds = ", ".join(self.suffixes)
        if path.is_file():
            if _kind_of_file(path.name) not in self.suffixes:
                raise UserError(
                    f"{path}: cannot tell what kind of file this is; data.path must end in one of {kinds} (text also "
                    f"with {' or '.join(_PACKED)} behind it)"
                )
            files: dict[Split, list[Path]] = {"train": [path], "test": [path]}
        elif path.is_dir():
            if any(entry.name in _SAVED for entry in _entries(path)):
                return _saved_tables(path)
            folders = [path, *([path / self.hub_config] if self.hub_config else []), path / "default", path / "data"]
            found = (
                (folder, _split_files(folder, self.suffixes, self.tells_names)) for folder in folders if folder.is_dir()
            )
            folder, files = next((pair for pair in found if pair[1]), (path, {}))
            read = {file for paths in files.values() for file in paths}
            others = [file for file in _entries(folder) if file.is_file() and file not in read]
            unread += [
                f"{UNREAD} ({file.name})" if self.tells_names else f"{UNREAD}, beside those that are"
                for file in others
                if _looks_like_data(file.name)
            ]
            if not files:
                raise UserError(
                    f"{path}: no data in this folder; looked for train, validation and test with {kinds}"
                    + (f"; it holds {_names(path)}" if self.tells_names else "")
                )
        else:
            raise UserError(
                f"data.path={path} does not exist; looked for a folder with train and test as {kinds}, or one such file"
            )
        return {split: partial(self._file_rows, paths) for split, paths in files.items()}

    def _file_rows(self, files: Sequence[Path]) -> Iterator[Row]:
        for file in files:
            rows = _READERS[_kind_of_file(file.name)](file, self.shape)
            if not rows:
                raise UserError(f"{file}: the file is empty; every row must be {self.shape}")
            yield from rows

    def _hub_tables(self) -> dict[Split, Callable[[], Iterator[Row]]]:
        """For each split on the hub, what reads its rows."""
        try:
            import datasets  # only here: it takes a second to import

            tables = datasets.load_dataset(self.hub_id, self.hub_config)
        except Exception as error:  # `datasets` raises its own errors, the hub client's, the network's and the disk's
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UserError(
                f"cannot read {self.hub_id} from the hub ({reason}); data.path= reads it from a local folder or file"
            ) from error
        names = {str(name): table for name, table in cast(datasets.DatasetDict, tables).items()}
        return {
            _SPLIT_OF_NAME[name]: partial(_hub_rows, table, f"{self.hub_id} {name}")
            for name, table in names.items()
            if name in _SPLIT_OF_NAME
        }


def _held_out(questions: Sequence[str], size: int) -> set[str]:
    """The questions that validation takes: `size` of them, at most a tenth of the distinct ones, at least one.

    They are the first by a hash of the question: the same ones whatever the order of the file or the seed of a run, and
    a question that comes twice is never on both sides.
    """

    def fixed_order(question: str) -> bytes:
        return hashlib.sha256(question.encode(errors="surrogatepass")).digest()

    shuffled = sorted(set(questions), key=fixed_order)
    return set(shuffled[: min(size, max(1, round(len(shuffled) / 10)))])


def _with_steps(solutions: Sequence[Solution]) -> LoadedSplit:
    problems: list[Problem] = []
    notes: Counter[str] = Counter()
    for question, rationale, answer, left_out in solutions:
        steps, malformed = parse_steps(rationale)
        problems.append(Problem(question, steps, rationale, answer))
        notes[MALFORMED] += len(malformed)
        notes["answer with text behind it, left out"] += bool(left_out)
        notes["step whose result is rounded or wrong"] += sum(not step.is_correct() for step in steps)
        notes["problem without a step"] += not steps
        notes["answer that is not a number"] += parse_number(answer) is None
    return LoadedSplit(problems, +notes)  # the plus leaves out what was counted zero times


# --- files -----------------------------------------------------------------------------------------------------------


def _kind_of_file(name: str) -> str:
    """A file's suffix, that of what is packed in it if it is packed."""
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


def _looks_like_data(name: str) -> bool:
    """Whether a file may hold data, by its name in whatever case: a split's, or that of a kind of data or archive."""
    name = name.lower()
    return name.endswith((*_DATA_SUFFIXES, *_ARCHIVES)) or _SPLIT_FILE.fullmatch(name) is not None


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, in the order of names; hidden files are left out.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None


def _names(folder: Path, most: int = 8) -> str:
    """The names of what lies in a folder, for a message."""
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in _entries(folder)]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _split_files(folder: Path, suffixes: Sequence[str], tells_names: bool = True) -> dict[Split, list[Path]]:
    """The files of each split that lie in `folder` itself, or in the subfolders of a conversion; shards in order.

    Files without a data set's name before that of the split go before those with one.

    Args:
        tells_names: whether errors name the files.
    """
    found: dict[Split, dict[tuple[str, ...], dict[int, Path]]] = {}  # a split's files by what they share, by number
    for entry in _entries(folder):
        match = _SPLIT_FILE.fullmatch(entry.name)
        if match and entry.is_file() and _kind_of_file(entry.name) in suffixes:
            # The shards of one series may be packed differently.
            suffix = _kind_of_file(entry.name) if match["count"] else match["suffix"]
            series = (match["prefix"] or "", match["name"], match["count"] or "", suffix)
            shards = found.setdefault(_SPLIT_OF_NAME[match["name"]], {}).setdefault(series, {})
            number = int(match["number"] or 0)
            if number in shards:
                names = f"{shards[number].name} and {entry.name}" if tells_names else "two files"
                raise UserError(f"{folder}: {names} are the same shard; keep one")
            shards[number] = entry
        elif (match := _SPLIT_FOLDER.fullmatch(entry.name)) and entry.is_dir() and ".parquet" in suffixes:
            converted = ((_CONVERTED.fullmatch(file.name), file) for file in _entries(entry))
            shards = {int(number["number"]): file for number, file in converted if number}
            if shards:
                series = ("", match["name"], str(max(shards) + 1), ".parquet", match["partial"] or "")
                found.setdefault(_SPLIT_OF_NAME[match["name"]], {})[series] = shards
    files: dict[Split, list[Path]] = {}
    for split, all_series in found.items():
        plain = {series: shards for series, shards in all_series.items() if not series[0]} or all_series
        all_names = [str(file.relative_to(folder)) for shards in plain.values() for file in shards.values()]
        names = ", ".join(all_names) if tells_names else f"{len(all_names)} files"
        if len(plain) > 1:
            raise UserError(f"{folder}: {names} are all {split} data; keep one, or name a single file as data.path")
        [(series, shards)] = plain.items()
        count = int(series[2] or 1)
        if len(shards) != count:
            raise UserError(f"{folder}: {len(shards)} of {count} {split} files are there ({names}); all are needed")
        files[split] = [shards[number] for number in sorted(shards)]
    return files


def _saved_tables(folder: Path) -> dict[Split, Callable[[], Iterator[Row]]]:
    """For each split of a folder that `datasets`' `save_to_disk` wrote, what reads its rows.

    One table, saved without its splits, is train and test, as a single file is.
    """
    import datasets  # only here: it takes a second to import

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` raises its own errors, pyarrow's and whatever a broken description leads to
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{folder}: not a whole folder of save_to_disk ({reason})") from error
    if not isinstance(saved, datasets.DatasetDict):
        name = str(saved.split)
        splits: tuple[Split, ...] = (_SPLIT_OF_NAME[name],) if name in _SPLIT_OF_NAME else ("train", "test")
        return {split: partial(_hub_rows, saved, str(folder)) for split in splits}
    tables = {str(name): table for name, table in saved.items()}
    known = {name: table for name, table in tables.items() if name in _SPLIT_OF_NAME}
    if not known:
        raise UserError(f"{folder}: no train, validation or test split; it holds {', '.join(tables)}")
    return {_SPLIT_OF_NAME[name]: partial(_hub_rows, table, f"{folder / name}") for name, table in known.items()}


def _local_path(path: str) -> Path:
    """`data.path` as a path that may be asked whether it is there."""
    try:
        expanded = Path(path).expanduser()
        expanded.exists()  # raises where a name is too long, or holds what no name can
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nobody's home
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.path={path[:100]}: is no path ({reason})") from error
    return expanded


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
        if file.suffix in _PACKED and error.errno is None:
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


def _hub_rows(table: "datasets.Dataset", where: str) -> Iterator[Row]:
    for number, value in enumerate(table.to_list(), start=1):
        yield Row(value, f"{where} row {number}")


_READERS: dict[str, Callable[[Path, str], list[Row]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    return {str: "a text", list: "a list", dict: "an object"}.get(type(value), f"a {type(value).__name__}")
