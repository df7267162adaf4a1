"""Runs the mutants of `mutants.py`: breaks a line, runs the tests that must notice, puts it back.

python tests/mutation/run.py [--only TEXT] [--jobs 1] [--list]

Works on copies of the repository in a temporary folder. A mutant is *killed* where a test fails, *survived* where all
pass, *stale* where its line is not there exactly once, *broken* where the tests could not even be collected. Exits
with 1 unless every mutant is killed, or has survived as argued in its `equivalent`.
"""

from __future__ import annotations

import argparse
import enum
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import pytest
from mutants import MUTANTS, Mutant

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "simcot_latent"
SECONDS = 600
"""A mutant whose tests take longer is killed: it hangs, or is so slow that nobody would miss it."""
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["pytest", "torch", "hypothesis", "hydra", "datasets", "transformers", "safetensors.torch", "tiktoken", "wandb"]
)
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "wandb", "__pycache__", ".*_cache", ".hypothesis", "build")


class Verdict(enum.Enum):
    """What became of a mutant."""

    KILLED = "killed"
    SURVIVED = "survived"
    STALE = "stale"
    BROKEN = "broken"


@dataclass(frozen=True)
class Judgement:
    """A mutant's verdict, the test that killed it or what else there is to say, and the seconds it took."""

    mutant: Mutant
    verdict: Verdict
    reason: str
    seconds: float = 0.0

    @property
    def is_fine(self) -> bool:
        wanted = Verdict.KILLED if self.mutant.equivalent is None else Verdict.SURVIVED
        return self.verdict is wanted


def stale(mutant: Mutant, package: Path) -> str | None:
    """Why a mutant cannot be made; None where it can."""
    file = package / mutant.file
    count = file.read_text(encoding="utf-8").count(mutant.old) if file.is_file() else 0
    return None if count == 1 else f"{count} times in {mutant.file}"


def copy_repository(folder: Path) -> Path:
    """A copy to break, with the reference data beside it, where there are any."""
    shutil.copytree(REPOSITORY, folder / "repository", ignore=LEFT_OUT, symlinks=True)
    if (REPOSITORY.parent / "shared").is_dir():
        (folder / "shared").symlink_to(REPOSITORY.parent / "shared")
    return folder / "repository"


def pytest_in(copy: Path, tests: Sequence[str], output: Path) -> None:
    """Ends this process with pytest's exit status. Hypothesis does not simplify what it finds."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True  # a mutant is written within the second that bytecode is dated by
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", "--hypothesis-profile=mutation"]
    sys.exit(int(pytest.main([*options, *tests])))


def run_tests(copy: Path, tests: Sequence[str], seconds: float = SECONDS) -> tuple[int | None, str]:
    """pytest's exit status (None: out of time), and what it printed, of a process in which all is imported already but
    what is broken."""
    output = copy.parent / "output.txt"
    process = PROCESSES.Process(target=pytest_in, args=(copy, tests, output))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None, ""
    return process.exitcode, output.read_text(encoding="utf-8", errors="replace")


def judge_in(copy: Path, mutant: Mutant) -> Judgement:
    """Breaks the copy, runs the tests and puts the line back."""
    if (reason := stale(mutant, copy / "simcot_latent")) is not None:
        return Judgement(mutant, Verdict.STALE, reason)
    file = copy / "simcot_latent" / mutant.file
    text = file.read_text(encoding="utf-8")
    began = time.perf_counter()
    try:
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        status, output = run_tests(copy, mutant.tests)
    finally:
        file.write_text(text, encoding="utf-8")
    seconds = time.perf_counter() - began
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if status is None:
        return Judgement(mutant, Verdict.KILLED, f"not done in {SECONDS} s", seconds)
    if status == 0:
        return Judgement(mutant, Verdict.SURVIVED, mutant.equivalent or "no test noticed", seconds)
    if status == 1 and failed is not None:
        return Judgement(mutant, Verdict.KILLED, failed.group(1), seconds)
    return Judgement(mutant, Verdict.BROKEN, " ".join(output.split())[-300:], seconds)


def judge(mutants: Sequence[Mutant], jobs: int = 1, says: bool = False) -> list[Judgement]:
    """Judges mutants, `jobs` at a time, each in a copy of its own; `says` prints each as it comes."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        copies: Queue[Path] = Queue()
        for job in range(jobs):
            (Path(scratch) / str(job)).mkdir()
            copies.put(copy_repository(Path(scratch) / str(job)))

        def one(mutant: Mutant) -> Judgement:
            copy = copies.get()
            try:
                found = judge_in(copy, mutant)
            finally:
                copies.put(copy)
            if says:
                print(f"{found.verdict.value:8} {found.seconds:4.0f} s  {mutant.name}  [{found.reason}]", flush=True)
            return found

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, mutants))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Runs the mutants of mutants.py.")
    parser.add_argument("--only", default="", help="mutants whose file, old or new text holds this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print them, run none")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    if arguments.list:
        print(*(mutant.name for mutant in chosen), sep="\n")
        return 0
    tests = list(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    print(
        f"{len(chosen)} mutants of {len(MUTANTS)}; first the {len(tests)} test files, on the code as it is", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        status, output = run_tests(copy_repository(Path(scratch)), tests)
    if status != 0:
        print(f"they fail without any mutant:\n{output}")
        return 1
    began = time.perf_counter()
    judged = judge(chosen, arguments.jobs, says=True)
    counts = Counter(each.verdict.value for each in judged)
    print(f"{dict(counts)} in {(time.perf_counter() - began) / 60:.0f} minutes")
    for each in judged:
        if not each.is_fine:
            print(f"{each.verdict.value}: {each.mutant.name}  [{each.reason}]")
    return 0 if all(each.is_fine for each in judged) else 1


if __name__ == "__main__":
    raise SystemExit(main())
