"""What README and `docs/` tell readers to type, typed: in a folder with small data, and with small models.

`tests/test_readme.py` checks the commands that are not run here (GPUs, the hub, minutes of work) without running them.
Those of `docs/extending.md` need the files that it prints, see `test_extending.py`.
"""

from __future__ import annotations

import re
import shutil
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import (
    ARITHMETIC,
    REPOSITORY,
    TINY,
    TRAIN,
    Trained,
    predictions_of,
    read_lines,
    report_in,
    run,
    run_process,
    strict_json,
)
from documents import BLOCK, PAGES, Command, blocks, commands

pytestmark = pytest.mark.xdist_group(
    "documentation"
)  # one worker, so that the runs that pages take for granted are made once

DATA = "data.path=path/to/gsm8k"
SHORT = ("num_iterations=2", "eval_every=-1", "checkpoint_every=-1")
HERE = {"evals.arithmetic", "evals.gsm8k", "simcot_latent.probe", "simcot_latent.export"}


def is_run_here(command: Command) -> bool:
    """Whether a command needs seconds, no network and no further files."""
    words = command.words
    if command.module == TRAIN and words[0] == "python":
        elsewhere = any(word.startswith(("run=", "experiment=")) for word in words)
        return not elsewhere and ("data=gsm8k" not in words or any(word.startswith("data.path=") for word in words))
    if command.module == "simcot_latent.data.train_tokenizer":
        return True
    return command.module in HERE and "ckpt=imported" not in words


def made_small(command: Command) -> list[str]:
    """A command's arguments, and what makes it take a second."""
    arguments = command.arguments
    if command.module == TRAIN:
        given = {word.partition("=")[0] for word in arguments}
        more = [*TINY, *SHORT, *(ARITHMETIC if not any(word.startswith("data=") for word in arguments) else ())]
        if "init_from" in given:
            more = [word for word in more if not word.startswith("model.")]
        return [*arguments, *(word for word in more if word.partition("=")[0] not in given)]
    if command.module == "simcot_latent.data.train_tokenizer":
        return ["300" if word in ("20000", "1024") else word for word in arguments]
    return [*arguments, *(["device=cpu"] if command.module != "simcot_latent.export" else [])]


PARTS = [
    pytest.param(part, id=f"{page.name}: {part[0].line}")
    for page in PAGES
    if page.name != "extending.md"
    for block in dict.fromkeys(blocks(page, ""))
    if (part := [c for c in commands(page) if c.is_block and c.line in block.splitlines() and is_run_here(c)])
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, sums: Path) -> Path:
    """A folder that has what the pages take for granted: data under `path/to`, and runs."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(sums, folder / "path/to/gsm8k")
    aug = folder / "path/to/gsm8k_aug"
    aug.mkdir()
    for split in ("train", "test"):
        rows = [f"What is {i}+1?||<<{i}+1={i + 1}>> #### {i + 1}\n" for i in range(20)]
        (aug / f"{split}.txt").write_text("".join(rows))
    for mode in ("latent", "weighted"):
        run(TRAIN, f"mode={mode}", *TINY, *SHORT, *ARITHMETIC, folder=folder).ok()
    shutil.copytree(folder / "runs/weighted", folder / "runs/smollm2_weighted", symlinks=True)
    run("simcot_latent.export", "ckpt=runs/weighted", "out=path/to/SmolLM2-135M", folder=folder).ok()
    shutil.copytree(folder / "path/to/SmolLM2-135M", folder / "path/to/gpt2")
    return folder


@pytest.mark.parametrize("part", PARTS)
def test_commands_run(part: Sequence[Command], place: Path) -> None:
    for command in part:
        assert command.module is not None
        run(command.module, *made_small(command), folder=place).ok()


def test_most_pages_have_commands_that_run() -> None:
    pages = {part.values[0][0].page for part in PARTS}  # type: ignore[index]
    assert pages >= {"README.md", "methods.md", "data.md", "running.md", "evaluating.md", "probing.md", "weights.md"}


def test_python_of_the_readme(place: Path) -> None:
    (program,) = blocks(REPOSITORY / "README.md", "python")
    shape, steps, answers, edited = run_process("-c", program, folder=place).ok().out.splitlines()
    (thoughts,) = re.findall(r"^torch\.Size\(\[1, (\d), 32\]\)$", shape)
    for line in (steps, edited):
        (groups,) = literal_eval(line)
        assert [type(text) for text in groups] == [str] * int(thoughts)
    assert len(literal_eval(answers)) == 1


@pytest.mark.parametrize("page", ["probing.md", "weights.md"])
def test_python_of_a_page(page: str, place: Path) -> None:
    for program in blocks(REPOSITORY / "docs" / page, "python"):
        if "push_to_hub" not in program:  # needs the hub
            run_process("-c", program, folder=place).ok()


def keys_of(page: str, heading: str) -> set[str]:
    """The keys in the first column of a section's tables."""
    section = (REPOSITORY / "docs" / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}


def test_every_field_of_a_report_is_described(trained: Trained, sums: Path, tmp_path: Path) -> None:
    run("evals.gsm8k", f"ckpt={trained.latest}", "limit=2", "device=cpu", "out=results", folder=tmp_path).ok()
    report = strict_json(report_in(tmp_path / "results").read_text())
    assert report.keys() <= keys_of("evaluating.md", "The report")
    page = BLOCK.sub("", (REPOSITORY / "docs/evaluating.md").read_text(encoding="utf-8"))
    listed = set(re.findall(r"`(\w+)`", page.split("predictions.jsonl")[1]))
    assert read_lines(predictions_of(report_in(tmp_path / "results")))[0].keys() <= listed


def test_every_field_of_the_metrics_is_described(trained: Trained) -> None:
    lines = read_lines(trained.out_dir / "metrics.jsonl")
    assert {key for line in lines for key in line} <= keys_of("running.md", "metrics.jsonl")


def test_every_file_of_a_run_is_described(latent_run: Trained) -> None:
    page = (REPOSITORY / "docs/running.md").read_text(encoding="utf-8").split("\n## The folder of a run\n")[1]
    (tree,) = [body for _, body in BLOCK.findall(page) if body.startswith("out_dir/")]
    there = {path.name for path in latent_run.out_dir.iterdir()} | {path.name for path in latent_run.latest.iterdir()}
    there = {re.sub(r"^step_\d{7}$", "step_0003907", name) for name in there}
    assert {name for name in there if not re.search(rf"^ +{re.escape(name)}\b", tree, re.MULTILINE)} == set()
