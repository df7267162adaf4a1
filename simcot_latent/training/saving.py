"""A run's checkpoints as training writes them: `out_dir/step_NNNNNNN`, `latest`, and the deletion of old ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from simcot_latent.checkpoint import Checkpoint, TrainerState, write_checkpoint
from simcot_latent.checkpoint_folders import (
    LATEST,
    STEP_FOLDER,
    checkpoints_of_training,
    is_checkpoint_of_training,
    place_of_real_latest,
    remove_checkpoint,
)
from simcot_latent.curricula.base import Stage
from simcot_latent.errors import UserError
from simcot_latent.folders import move_aside, remove_empty, remove_partial_folder, sync_folder, written_beside
from simcot_latent.method import Method
from simcot_latent.model.lora import frozen_weights
from simcot_latent.parts import NONE
from simcot_latent.training.memory import in_units


def as_checkpoint(method: Method, stage: Stage, options: dict[str, Any], step: int) -> Checkpoint:
    """What is trained, as it stands after a step.

    Args:
        options: the run's configuration as plain values.
    """
    return Checkpoint(
        model=method.model,
        step_decoder=method.step_decoder,
        tokenizer=method.tokenizer,
        config=options,
        answers=method.answers,
        loop=method.loop,
        stage=stage,
        groups=method.groups,
        steps=method.config.steps if "step" in method.terms else NONE,
        parts=method.further_parts(),
        lora=method.lora,
        step=step,
    )


def save_checkpoint(checkpoint: Checkpoint, out_dir: Path, state: TrainerState, keep: int) -> Path:
    """Writes `out_dir/step_NNNNNNN`, points `out_dir/latest` at it and deletes all but the newest `keep` checkpoints.

    Whatever else has one of these names moves aside, with a line that says so, and the save goes on. Killed at any
    moment, it leaves `latest` at a complete checkpoint. Later steps than this one, which a run that went back left
    behind, are not counted: they are replaced when training gets there.
    """
    name = f"step_{checkpoint.step:07d}"
    folder, latest = out_dir / name, out_dir / LATEST
    if is_checkpoint_of_training(folder) and latest.resolve() == folder.resolve():
        return folder  # the same step of the same run: replacing it would leave `latest` at nothing for a moment
    with written_beside(folder, _make_room) as partial:
        write_checkpoint(checkpoint, partial, state)
    sync_folder(out_dir)
    if aside := place_of_real_latest(out_dir):
        latest.rename(aside)
    link = out_dir / f".{LATEST}.partial"
    _remove_link(link)
    link.symlink_to(name)
    link.replace(latest)
    sync_folder(out_dir)
    earlier = [old for old in checkpoints_of_training(out_dir) if int(old.name[5:]) <= checkpoint.step]
    for old in earlier[:-keep]:
        remove_checkpoint(old)
    return folder


def _make_room(folder: Path) -> None:
    """Frees the name of a folder that is to be renamed to it; only checkpoints of ours, and what is empty, go."""
    if is_checkpoint_of_training(folder):
        remove_checkpoint(folder)
    remove_empty(folder)


def _remove_link(link: Path) -> None:
    """Removes a link that was not yet renamed to `latest`; what else has its name moves aside."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        move_aside(link)


def remove_partial(out_dir: Path) -> None:
    """Removes what saves that were killed left half-written."""
    for path in out_dir.glob(".step_*.partial"):
        if STEP_FOLDER.fullmatch(path.name[1 : -len(".partial")]):
            remove_partial_folder(path)
    _remove_link(out_dir / f".{LATEST}.partial")


def make_room(out_dir: Path, method: Method, optimizer: str) -> None:
    """Removes what killed saves left half-written, and makes sure that a checkpoint fits.

    Args:
        method: what is trained.
        optimizer: the run's option of that name.

    Raises:
        UserError: the disk has no room for a checkpoint, which would only show at the first one.
    """
    remove_partial(out_dir)
    moments = 2 if optimizer == "adamw" else 1  # at least; Muon has one per matrix
    parameters = list(method.parameters())
    numbers = sum(p.numel() for p in parameters) + moments * sum(p.numel() for p in parameters if p.requires_grad)
    if method.lora is not None and method.lora.merged:
        numbers += sum(weight.numel() for weight in frozen_weights(method.model).values())
    needed = 4 * numbers
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise UserError(
            f"out_dir={out_dir}: {in_units(free)} are free there, a checkpoint takes {in_units(needed)}; make room, or "
            "give another folder"
        )
