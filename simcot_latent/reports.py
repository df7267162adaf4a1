"""Where the results of an eval go, and what they are results of.

A report is called by all that decides on its numbers, so that none takes another's place:

    gsm8k.test.step2250.greedy.3f9c01ab.json        TASK.SPLIT.stepN.DECODING.HASH.json

The hash is of the weights, the problems and every setting of the decoding. The same eval of the same checkpoint has the
same name on every machine; a run that goes on, another run, other problems or another temperature have others.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from simcot_latent.checkpoint_folders import LATEST, STATE_TENSORS, STEP_FOLDER, find_checkpoint
from simcot_latent.data.problem import Problem
from simcot_latent.folders import fingerprint

FOLDER = "evals"
"""Of a run, or of a checkpoint that is in none, where its reports are."""

NO_DIFFERENCE = frozenset({
    "seed", "out_dir", "run", "wandb_project", "resume", "resume_with_changes", "max_minutes", "device", "profile",
    "verify", "log_every", "eval_every", "eval_examples", "eval_batch_size", "checkpoint_every", "keep_checkpoints",
    "device_batch_size", "use",
})  # fmt: skip
"""Settings of training that make no other configuration: the seed, and what a model does not depend on."""


class ReportFiles(NamedTuple):
    """The report, and one line per problem beside it."""

    report: Path
    predictions: Path


def results_folder(ckpt: str) -> Path:
    """Where the reports of a checkpoint are: with its run, whichever of its folders was named.

    Raises:
        UserError: there is no checkpoint.
    """
    folder = find_checkpoint(ckpt)
    run = folder.parent
    of_a_run = STEP_FOLDER.fullmatch(folder.name) and (run / LATEST).is_symlink()
    # As it was typed, where that is the same folder: what is printed can be pasted.
    typed = Path(ckpt).expanduser()
    place = run if of_a_run else folder
    for each in (typed, typed.parent):
        if each.resolve() == place:
            return each / FOLDER
    return place / FOLDER


def report_files(
    folder: Path, task: str, split: str, step: int, decoding: Mapping[str, Any], hashes: Iterable[str]
) -> ReportFiles:
    """What a report is called.

    Args:
        folder: where it goes.
        decoding: every setting that answers depend on; `temperature` and `seed` are also written out.
        hashes: of the weights and the problems.
    """
    temperature = decoding["temperature"]
    how = "greedy" if temperature == 0 else f"t{temperature:g}.seed{decoding['seed']}"
    stem = f"{task}.{split}.step{step}.{how}.{hash_of([*hashes, decoding])[:8]}"
    return ReportFiles(folder / f"{stem}.json", folder / f"{stem}.predictions.jsonl")


def hash_of(value: object) -> str:
    """SHA-256 of plain values, whatever the order of keys; 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_of_problems(problems: Iterable[Problem]) -> str:
    """The same of questions and gold answers, in their order."""
    return hash_of([[problem.question, problem.answer] for problem in problems])


def hash_of_configuration(config: Mapping[str, Any]) -> str:
    """The same of a run's settings but for `NO_DIFFERENCE`: equal for the seeds of one configuration."""
    return hash_of({key: value for key, value in config.items() if key not in NO_DIFFERENCE})


def hash_of_weights(folder: Path) -> str:
    """The same of all weights of a checkpoint."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != STATE_TENSORS)
    return hash_of({file.name: fingerprint(file).sha256 for file in files})


def installed_version() -> str | None:
    """Of this package; None: it is not installed."""
    try:
        return version("simcot-latent")
    except PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+` behind it if files differ; None: it is none."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", __file__) is None:
        return None  # installed inside somebody else's repository
    head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return None if head is None else head + ("+" if changed else "")
