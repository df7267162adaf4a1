"""Small trained models that the end-to-end tests share: made once a test session, read-only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import TINY, TRAIN, Trained, run, write_jsonl
from filelock import FileLock


def sum_problem(name: str, thing: str, a: int, b: int, aside: str = "") -> dict[str, str]:
    """A row of GSM8K: two steps, the answer twice the sum."""
    total = a + b
    return {
        "question": f"{name} has {a} {thing} and finds {b} more.{aside} Then the number of {thing} doubles. "
        f"How many {thing} does {name} have?",
        "answer": f"First {name} has {a}+{b}=<<{a}+{b}={total}>>{total} {thing}.\n"
        f"Then there are {total}*2=<<{total}*2={2 * total}>>{2 * total}.\n#### {2 * total}",
    }


NAMES = ("Ann", "Bartholomew", "Chloe", "Dmitri", "Eve", "Fatima-Zahra", "Gus", "Hildegard")
THINGS = ("pens", "marbles", "eggs", "wooden boats", "coins")


def write_sums(folder: Path) -> None:
    """Data in the layout of GSM8K. All training problems have one answer, 14, which a tiny model learns in seconds.

    So it is right about some of the 21 test problems and wrong about the others: an accuracy worth recomputing.
    """
    train = [sum_problem(NAMES[i % 8], THINGS[i % 5], 3, 4) for i in range(40)]
    asides = ("", " It rains, and nobody minds.", " It is Monday; the shop shuts early, so that was a lucky day.")
    test = [sum_problem(NAMES[i % 8], THINGS[i % 3], 3, 4 if i % 2 else 4 + i // 2, asides[i % 3]) for i in range(21)]
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)


def train_on_sums(data: Path, mode: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        arguments = [f"mode={mode}", "data=gsm8k", f"data.path={data}", f"out_dir={folder / 'run'}"]
        arguments += ["num_iterations=60", "learning_rate=0.02", "matrix_lr=0.02"]
        arguments += ["target_examples_per_step=16", "device_batch_size=16"]
        arguments += ["checkpoint_every=20", "eval_every=30", "max_new_tokens=64"]
        if mode == "latent":
            arguments += [
                "latent.n_latents=3",
                "latent.latents_per_step=1",
                "latent.missing=mask",
                "latent.warmup=0.3",
                "latent.stages=0",
                "loss.step_weight=1",
            ]
        outcome = run(TRAIN, *TINY, *arguments, folder=folder).ok()
        (folder / "out.txt").write_text(outcome.out, encoding="utf-8")

    return make


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by whichever worker needs it first."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def sums(shared_folder: Path) -> Path:
    """A folder with `train.jsonl` and `test.jsonl`, see `write_sums`."""
    return made_once(shared_folder / "sums", write_sums)


@pytest.fixture(scope="session")
def latent_run(shared_folder: Path, sums: Path) -> Trained:
    """A run of mode=latent."""
    return load(made_once(shared_folder / "latent", train_on_sums(sums, "latent")))


@pytest.fixture(scope="session")
def weighted_run(shared_folder: Path, sums: Path) -> Trained:
    """A run of mode=weighted."""
    return load(made_once(shared_folder / "weighted", train_on_sums(sums, "weighted")))


@pytest.fixture(params=["latent", "weighted"])
def trained(request: pytest.FixtureRequest) -> Trained:
    """Each of the two."""
    return request.getfixturevalue(f"{request.param}_run")


def load(folder: Path) -> Trained:
    return Trained(folder / "run", (folder / "out.txt").read_text(encoding="utf-8"))
