"""Which files of a folder hold which split of a data set, by the names that people and the hub give them."""

import re
from collections.abc import Sequence
from pathlib import Path

from simcot_latent.data.rows import PACKED, kind_of_file
from simcot_latent.data.sources import Split
from simcot_latent.errors import UserError

# The names that people give the splits, in file names and on the hub.
SPLIT_OF_NAME: dict[str, Split] = {
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
    rf"(?P<name>{'|'.join(SPLIT_OF_NAME)})"
    r"(?:-(?P<number>[0-9]+)-of-(?P<count>[0-9]+)(?:-[0-9a-f]{8,})?)?"
    r"(?P<suffix>\.[a-z]+(?:\.(?:gz|zst))?)"
)
# The hub's conversion of every data set: default/train/0000.parquet, of large ones main/partial-train/0000.parquet.
_SPLIT_FOLDER = re.compile(rf"(?P<partial>partial-)?(?P<name>{'|'.join(SPLIT_OF_NAME)})")
_CONVERTED = re.compile(r"(?P<number>[0-9]{4,})(?P<suffix>\.parquet)")
# What is named where it is not read: files of these kinds, and whatever is packed in any way.
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")
_ARCHIVES = (*PACKED, ".xz", ".bz2", ".zip", ".tgz", ".7z")


def local_path(path: str) -> Path:
    """`data.path` as a path that may be asked whether it is there."""
    try:
        expanded = Path(path).expanduser()
        expanded.exists()  # raises where a name is too long, or holds what no name can
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nobody's home
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.path={path[:100]}: is no path ({reason})") from error
    return expanded


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in the order of names; hidden files are left out.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None


def names_in(folder: Path, most: int = 8) -> str:
    """The names of what lies in a folder, for a message."""
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries(folder)]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def looks_like_data(name: str) -> bool:
    """Whether a file may hold data, by its name in whatever case: a split's, or that of a kind of data or archive."""
    name = name.lower()
    return name.endswith((*_DATA_SUFFIXES, *_ARCHIVES)) or _SPLIT_FILE.fullmatch(name) is not None


def split_files(folder: Path, suffixes: Sequence[str], tells_names: bool = True) -> dict[Split, list[Path]]:
    """The files of each split that lie in `folder` itself, or in the subfolders of a conversion; shards in order.

    Files without a data set's name before that of the split go before those with one.

    Args:
        tells_names: whether errors name the files.

    Raises:
        UserError: several files claim a split or a shard, or a shard is missing.
    """
    found: dict[Split, dict[tuple[str, ...], dict[int, Path]]] = {}  # a split's files by what they share, by number
    for entry in entries(folder):
        match = _SPLIT_FILE.fullmatch(entry.name)
        if match and entry.is_file() and kind_of_file(entry.name) in suffixes:
            # The shards of one series may be packed differently.
            suffix = kind_of_file(entry.name) if match["count"] else match["suffix"]
            series = (match["prefix"] or "", match["name"], match["count"] or "", suffix)
            shards = found.setdefault(SPLIT_OF_NAME[match["name"]], {}).setdefault(series, {})
            number = int(match["number"] or 0)
            if number in shards:
                names = f"{shards[number].name} and {entry.name}" if tells_names else "two files"
                raise UserError(f"{folder}: {names} are the same shard; keep one")
            shards[number] = entry
        elif (match := _SPLIT_FOLDER.fullmatch(entry.name)) and entry.is_dir() and ".parquet" in suffixes:
            converted = ((_CONVERTED.fullmatch(file.name), file) for file in entries(entry))
            shards = {int(number["number"]): file for number, file in converted if number}
            if shards:
                series = ("", match["name"], str(max(shards) + 1), ".parquet", match["partial"] or "")
                found.setdefault(SPLIT_OF_NAME[match["name"]], {})[series] = shards
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
