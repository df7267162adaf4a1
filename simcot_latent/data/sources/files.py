"""What the sources of written solutions share: rows from local files or the hub, and a validation split cut from train.

A source of this kind is a subclass of `WrittenSolutions` that says which files it reads and what one row holds.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

from simcot_latent.data.problem import Problem, parse_number, parse_steps, split_solution, trailer
from simcot_latent.data.rows import PACKED, Row, kind_of_file, rows_of_file, rows_of_table
from simcot_latent.data.sources import SPLITS, LoadedSplit, Split
from simcot_latent.data.split_files import SPLIT_OF_NAME, entries, local_path, looks_like_data, names_in, split_files
from simcot_latent.errors import UserError
from simcot_latent.text import LONE_SURROGATE

# The note on a step that is not well-formed. What becomes of it depends on what is written, which a source cannot know.
MALFORMED = "malformed step: text where whole solutions are written, left out where steps alone are (or thoughts)"

UNREAD = "file that is not read"
"""How the note on such a file begins; it is the same for every split."""
_SAVED = ("dataset_dict.json", "state.json")
"""What `datasets`' `save_to_disk` writes of a set of splits, and of one table."""
_HUB_ID, _HUB_CONFIG = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*"), re.compile(r"(?!\.)[^/\\\x00]+")


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
            hub. A single file is train (and the validation split cut from it) and also test, whichever is asked for:
            evaluate on the file that a model was trained on and you measure memory.
        hub_id: the data set's name on the hub; of a source whose data are not there, empty.
        hub_config: its configuration there, also looked for as a subfolder of `path`; None where it has only one.
        validation_size: how many problems are held out of train for validation, where the data have no validation
            split of their own; never more than a tenth of train. Which ones depends on the questions alone, not on
            their order or on a run's seed.
        train_limit: train on the first so many problems only, after validation is held out; None for all.
        tolerance: how far an answer may be from gold and still be right, as a share of gold, in validation
            (`val_accuracy`), evals and the probe. Steps are compared exactly.

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
        texts = {"path": True, "hub_id": False, "hub_config": True}
        if self.hub_id == type(self).hub_id == "":  # of a source whose data are not on the hub
            del texts["hub_id"]
        for key, optional in texts.items():
            value = getattr(self, key)
            if not (isinstance(value, str) and value) and not (optional and value is None):
                raise UserError(f"data.{key}={value!r}: must be a text that is not empty{', or null' * optional}")
        for key, shape in (("hub_id", _HUB_ID), ("hub_config", _HUB_CONFIG)):  # no paths: a checkpoint may name them
            if key in texts and (value := getattr(self, key)) is not None and not shape.fullmatch(value):
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
        if self.path is None and not self.hub_id:
            raise UserError("data.path=null: must be a folder or a file, as these data are not on the hub")
        unread: list[str] = []  # notes
        path = None if self.path is None else local_path(self.path)
        tables = self._hub_tables() if path is None else self._local_tables(path, unread)
        cut = split != "test" and "validation" not in tables
        table: Split = "train" if cut else split
        if table not in tables:
            holds = ""
            if path is not None and path.is_dir() and self.tells_names:
                holds = f"; the folder holds {names_in(path)}"
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
            if kind_of_file(path.name) not in self.suffixes:
                raise UserError(
                    f"{path}: cannot tell what kind of file this is; data.path must end in one of {kinds} (text also "
                    f"with {' or '.join(PACKED)} behind it)"
                )
            files: dict[Split, list[Path]] = {"train": [path], "test": [path]}
        elif path.is_dir():
            if any(entry.name in _SAVED for entry in entries(path)):
                return _saved_tables(path)
            folders = [path, *([path / self.hub_config] if self.hub_config else []), path / "default", path / "data"]
            found = (
                (folder, split_files(folder, self.suffixes, self.tells_names)) for folder in folders if folder.is_dir()
            )
            folder, files = next((pair for pair in found if pair[1]), (path, {}))
            read = {file for paths in files.values() for file in paths}
            others = [file for file in entries(folder) if file.is_file() and file not in read]
            unread += [
                f"{UNREAD} ({file.name})" if self.tells_names else f"{UNREAD}, beside those that are"
                for file in others
                if looks_like_data(file.name)
            ]
            if not files:
                raise UserError(
                    f"{path}: no data in this folder; looked for train, validation and test with {kinds}"
                    + (f"; it holds {names_in(path)}" if self.tells_names else "")
                )
        else:
            raise UserError(
                f"data.path={path} does not exist; looked for a folder with train and test as {kinds}, or one such file"
            )
        return {split: partial(self._file_rows, paths) for split, paths in files.items()}

    def _file_rows(self, files: Sequence[Path]) -> Iterator[Row]:
        for file in files:
            yield from rows_of_file(file, self.shape)

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
            SPLIT_OF_NAME[name]: partial(rows_of_table, table, f"{self.hub_id} {name}")
            for name, table in names.items()
            if name in SPLIT_OF_NAME
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
        splits: tuple[Split, ...] = (SPLIT_OF_NAME[name],) if name in SPLIT_OF_NAME else ("train", "test")
        return {split: partial(rows_of_table, saved, str(folder)) for split in splits}
    tables = {str(name): table for name, table in saved.items()}
    known = {name: table for name, table in tables.items() if name in SPLIT_OF_NAME}
    if not known:
        raise UserError(f"{folder}: no train, validation or test split; it holds {', '.join(tables)}")
    return {SPLIT_OF_NAME[name]: partial(rows_of_table, table, f"{folder / name}") for name, table in known.items()}


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    return {str: "a text", list: "a list", dict: "an object"}.get(type(value), f"a {type(value).__name__}")
