"""Where checkpoints are: the names inside a checkpoint folder, and the checkpoints of a run's `out_dir`.

What is not ours by name and by content is neither counted nor deleted.
"""

from __future__ import annotations

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from simcot_latent.data.tokenizer import TOKENIZER_FILES
from simcot_latent.errors import UserError
from simcot_latent.files import read_json
from simcot_latent.folders import MANIFEST
from simcot_latent.parts import FILE_NAME
from simcot_latent.paths import expanded, free_name

MODEL, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"
DECODER, LOOP, LORA = "step_decoder.safetensors", "loop.safetensors", "lora.safetensors"
STATE_TENSORS, STATE_JSON = "trainer_state.safetensors", "trainer_state.json"
LATEST = "latest"
STEP_FOLDER = re.compile(r"step_(\d{7,})")


def find_checkpoint(path: str | Path, key: str = "ckpt") -> Path:
    """The checkpoint folder that `path` means: itself, or the `latest` of a run's `out_dir`.

    Args:
        key: the config key that the path came from, for the error.

    Raises:
        UserError: there is none.
    """
    path = expanded(path, key)
    for folder in (path, path / LATEST):
        if (folder / CONFIG).is_file() and (folder / MODEL).is_file():
            return folder.resolve()
    if (path / LATEST).is_symlink() and (found := checkpoints_of_training(path)):
        warnings.warn(f"{path / LATEST} leads to no checkpoint; taking the newest, {found[-1].name}", stacklevel=2)
        return found[-1].resolve()
    what = "holds no checkpoint" if path.is_dir() else "is no folder"
    raise UserError(f"{key}={path}: {what}; give a folder that training wrote, such as runs/latent/latest")


def is_checkpoint(path: str | Path) -> bool:
    """Whether `find_checkpoint` finds one; a `config.json` alone may be anybody's."""
    try:
        folder = find_checkpoint(path)
    except UserError:
        return False
    return (folder / TOKENIZER).is_dir() and is_ours(read_json(folder / CONFIG))


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is of a checkpoint of ours, not of a published model."""
    return "stage" in config or "thoughts" in config  # the latter up to format 2


def checkpoints_of_training(out_dir: Path) -> list[Path]:
    """The complete checkpoints that training wrote into its folder, oldest first."""
    if not out_dir.is_dir():
        return []
    numbered = [(int(m[1]), f) for f in out_dir.iterdir() if (m := STEP_FOLDER.fullmatch(f.name))]
    return [folder for step, folder in sorted(numbered) if is_complete(folder, step)]


def is_checkpoint_of_training(folder: Path) -> bool:
    """Whether a folder is, by name and content, one of `checkpoints_of_training`."""
    number = STEP_FOLDER.fullmatch(folder.name)
    return number is not None and is_complete(folder, int(number[1]))


def is_complete(folder: Path, step: int) -> bool:
    """Whether a folder is, by its content, the checkpoint of a step with all that training goes on from."""
    files = (MODEL, STATE_TENSORS, STATE_JSON)
    if folder.is_symlink() or not all((folder / name).is_file() for name in files) or not (folder / TOKENIZER).is_dir():
        return False
    try:
        config = read_json(folder / CONFIG)
    except (UserError, OSError):
        return False
    return is_ours(config) and config.get("step") == step


def remove_checkpoint(folder: Path) -> None:
    """Deletes what `write_checkpoint` wrote into a folder, and the folder if nothing else is in it: evals stay."""
    tokenizer = folder / TOKENIZER
    inside = [] if tokenizer.is_symlink() else [tokenizer / name for name in TOKENIZER_FILES]
    others = [folder / name for name in (MODEL, DECODER, LOOP, LORA, STATE_TENSORS, STATE_JSON, MANIFEST)]
    others += [folder / f"{name}.safetensors" for name in parts_of(folder)]
    for file in (folder / CONFIG, *others, *inside):  # without the first of them it is no checkpoint any more
        if file.is_file() or file.is_symlink():
            file.unlink()
    for empty in (tokenizer, folder):
        with suppress(OSError):  # it is not empty
            empty.rmdir()


def parts_of(folder: Path) -> list[str]:
    """The further parts that a checkpoint's `config.json` names; each has a file of its name."""
    with suppress(UserError, OSError):
        parts = read_json(folder / CONFIG).get("parts")
        if isinstance(parts, list):
            return [name for name in parts if isinstance(name, str) and FILE_NAME.fullmatch(name)]
    return []


def place_of_real_latest(out_dir: Path) -> Path | None:
    """Where a `latest` that is no link (copied with `cp -L`, say) moves to make room for one; None where it is a link.

    A checkpoint takes the name of its step if that is free, anything else the first free of latest-1, latest-2, ...
    """
    latest = out_dir / LATEST
    if latest.is_symlink() or not latest.exists():
        return None
    with suppress(UserError, OSError, TypeError, ValueError):
        step = int(read_json(latest / CONFIG)["step"])
        if is_complete(latest, step) and not os.path.lexists(place := out_dir / f"step_{step:07d}"):
            return place
    return free_name(latest)
